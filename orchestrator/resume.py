"""roles.Checkpoints over the store on disk and the learners' state."""

from pathlib import Path

from orchestrator.checkpoints import CheckpointStore, Saved
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.errors import OutputError
from orchestrator.records import Progress


class RunCheckpoints:
    """Saves and restores one run. saved: the newest verified checkpoint, if any; base: fingerprint of the start weights."""

    def __init__(self, store: CheckpointStore, learners: LearnerGroup, saved: Saved | None, base: str) -> None:
        self.store, self.learners, self.saved, self.base = store, learners, saved, base

    def restore(self) -> Progress:
        saved = self.saved
        if saved is None:
            return Progress()
        if saved.facts["base_model"] != self.base:
            raise OutputError(
                f"{saved.directory} was trained from other start weights than model.path holds now",
                why=f"fingerprint {saved.facts['base_model'][:12]} then, {self.base[:12]} now",
                fix="put the model back, or choose another --output",
            )
        self.learners.load_state(saved.directory, saved.progress.step)
        return saved.progress

    def save(self, progress: Progress) -> Path:
        return self.store.save(progress, {"base_model": self.base}, self.learners.save_state)
