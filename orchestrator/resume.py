"""roles.Checkpoints over the store on disk and the learners' state."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.checkpoints import CheckpointStore, FileEntry, Saved
from orchestrator.cluster.ranks import Ranks
from orchestrator.errors import OutputError
from orchestrator.learner.checks import adam_steps
from orchestrator.records import Progress


class RunCheckpoints:
    """Saves and restores one run. learners: the policy's, and PPO's critic; saved: the newest verified checkpoint, if any;
    base: fingerprint of the start weights."""

    def __init__(self, store: CheckpointStore, learners: Sequence[Ranks], saved: Saved | None, base: str) -> None:
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
        for learners, steps in zip(self.learners, saved.facts["adam_steps"], strict=True):
            learners.load_state(saved.directory, steps)
        return saved.progress

    def save(self, progress: Progress) -> Path:
        def write(directory: Path) -> list[FileEntry]:
            return [entry for learners in self.learners for entry in learners.save_state(directory)]

        facts = {"base_model": self.base, "adam_steps": [learners.call(adam_steps)[0] for learners in self.learners]}
        return self.store.save(progress, facts, write)
