"""CPUs and GPUs as worker groups ask for them."""

from dataclasses import dataclass

SLACK = 1e-6
"""Of sums and quotients of CPUs and GPUs; Ray counts in steps of 1e-4."""
NO_GPUS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
"""Variables of a process that is to see no GPU, of NVIDIA or of AMD."""


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers of one kind. what: as in the recipe, e.g. "learners"; cpus, gpus: of each."""

    what: str
    workers: int
    cpus: float
    gpus: float

    def fit(self, cpus: float, gpus: float) -> int:
        """How many of such workers find room in so much, each whole; all of them where they ask for nothing."""
        return min(
            (times(has, each) for has, each in ((cpus, self.cpus), (gpus, self.gpus)) if each),
            default=self.workers,
        )


def times(has: float, each: float) -> int:
    """How often `each` goes into `has`: shares such as 0.1 are not exact in binary."""
    return int(has / each + SLACK)
