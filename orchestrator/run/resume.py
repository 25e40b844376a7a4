"""roles.Checkpoints over the store on disk and the learners' state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from orchestrator.cluster.ranks import Ranks
from orchestrator.core.errors import OutputError
from orchestrator.core.files import FileEntry
from orchestrator.core.reports import Progress
from orchestrator.learner.probes import adam_steps
from orchestrator.run.checkpoints import CheckpointStore, Saved

Final = Literal["full", "weights", "none"]
WEIGHTS_ONLY = "weights_only"
"""Fact of a checkpoint without Adam's moments."""


class RunCheckpoints:
    """Saves and restores one run. learners: the policy's, and PPO's critic; saved: the newest verified
    checkpoint, if any; base: fingerprint of the start weights; final: what the recipe keeps of the checkpoint
    of step `last`."""

    def __init__(
        self,
        store: CheckpointStore,
        learners: Sequence[Ranks],
        saved: Saved | None,
        base: str,
        *,
        final: Final = "full",
        last: int = 0,
    ) -> None:
        self.store, self.learners, self.saved, self.base = store, learners, saved, base
        self.final, self.last = final, last

    def restore(self) -> Progress:
        saved = self.saved
        if saved is None:
            return Progress()
        if saved.extra_state["base_model"] != self.base:
            raise OutputError(
                f"{saved.directory} was trained from other start weights than model.path holds now",
                why=f"fingerprint {saved.extra_state['base_model'][:12]} then, {self.base[:12]} now",
                fix="put the model back, or choose another --output",
            )
        refuse_without_optimizer(saved, self.last)
        for learners, steps in zip(self.learners, saved.extra_state["adam_steps"], strict=True):
            learners.load_state(saved.directory, 0 if saved.extra_state.get(WEIGHTS_ONLY) else steps)
        return saved.progress

    def save(self, progress: Progress) -> Path:
        def write(directory: Path) -> list[FileEntry]:
            return [
                entry for learners in self.learners for entry in learners.save_state(directory, moments=whole)
            ]

        whole = self.final == "full" or progress.step < self.last
        facts = {
            "base_model": self.base,
            "adam_steps": [learners.call(adam_steps)[0] for learners in self.learners],
        }
        facts |= {} if whole else {WEIGHTS_ONLY: True}
        return self.store.save(progress, facts, write)

    def finish(self) -> None:
        """After the export: leaves what checkpoint.final says."""
        if self.final != "full":
            self.store.keep_only(1 if self.final == "weights" else 0)


def refuse_without_optimizer(saved: Saved, last: int) -> None:
    """OutputError where a run is to go on from a checkpoint that has no optimizer state any longer."""
    if saved.extra_state.get(WEIGHTS_ONLY) and saved.progress.step < last:
        raise _not_extended(
            f"{saved.directory} holds weights only",
            "checkpoint.final was not full when the run ended: Adam's moments are gone",
        )


def refuse_without_checkpoint(folder: Path, done: int, last: int) -> None:
    """OutputError where a run that kept no checkpoint is to go on."""
    if done < last:
        raise _not_extended(
            f"{folder} holds a run of {done} steps and no checkpoint",
            "checkpoint.final was none when the run ended",
        )


def _not_extended(what: str, why: str) -> OutputError:
    fix = (
        "go on from its export with a fresh optimizer: model.path=RUN/export and another --output "
        "(checkpoint.final=full would have kept it)"
    )
    return OutputError(f"{what}, and cannot be extended", why=why, fix=fix)
