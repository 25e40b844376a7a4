"""CPUs and GPUs that a worker group requests."""

from dataclasses import dataclass

SLACK = 1e-6
"""Tolerance for sums and quotients of CPUs and GPUs. Ray counts in steps of 1e-4."""
NO_GPUS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
"""Environment variables that hide all GPUs of NVIDIA and AMD from a process."""


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers of one kind. Example: WorkerGroup("learners", 8, cpus=4.0, gpus=1.0)."""

    what: str
    """Section of the recipe. Example: "learners"."""
    workers: int
    """Number of workers."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker; 0.5: two workers share one."""

    def fit(self, cpus: float, gpus: float) -> int:
        """Number of such workers that fit into these CPUs and GPUs; `workers` if a worker needs neither."""
        return min(
            (times(has, each) for has, each in ((cpus, self.cpus), (gpus, self.gpus)) if each),
            default=self.workers,
        )


def times(has: float, each: float) -> int:
    """How many times `each` goes into `has`. Shares such as 0.1 are not exact in binary, hence SLACK."""
    return int(has / each + SLACK)
