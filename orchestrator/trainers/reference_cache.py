"""Reference log-probs, computed once by the learners and kept on disk by content.

The key of a record is a hash of an example's tokens and loss mask; the folder's name depends on the model's
fingerprint and dtype. So a changed row, model or precision never gets old values, and an interrupted pass
continues where it stopped.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orchestrator.core.batches import Floats, MicroBatch, PackedBatch, SequenceGroup
from orchestrator.core.errors import DataError
from orchestrator.core.files import fsync_directory, fsync_file
from orchestrator.core.roles import PerMicroBatch

PART_EXAMPLES = 512
"""Examples of a file."""
Score = Callable[[PackedBatch], PerMicroBatch]
CutStep = Callable[[Sequence[SequenceGroup]], PackedBatch]


class ReferenceCache:
    """Float[scored tokens of all branches] of each example, in memory and on disk in safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._values: dict[str, Floats] = {}
        for part in sorted(folder.glob("part-*.safetensors")):
            self._values.update(_read(part))

    def fill(
        self,
        groups: Sequence[SequenceGroup],
        cut: CutStep,
        score: Score,
        progress: Callable[[int, int], None],
    ) -> int:
        """Computes and writes missing examples, file by file; returns their number.

        progress: called with (computed, missing) after each file.
        """
        missing = [g for g in groups if content_key(g) not in self._values]
        for start in range(0, len(missing), PART_EXAMPLES):
            part = missing[start : start + PART_EXAMPLES]
            batch = cut(part)
            computed = dict(self._by_example(batch, score(batch), {g.id: content_key(g) for g in part}))
            self._write(computed)
            self._values.update(computed)
            progress(min(start + PART_EXAMPLES, len(missing)), len(missing))
        return len(missing)

    def recheck(self, groups: Sequence[SequenceGroup], cut: CutStep, score: Score, tolerance: float) -> float:
        """The largest of the groups' mean differences between cached and live values, in nat per token.

        DataError above the tolerance.
        """
        batch = cut(groups)
        live = dict(self._by_example(batch, score(batch), {g.id: content_key(g) for g in groups}))
        worst = float(np.max([_gap(live[k], self._values[k]) for k in live]))  # numpy's max keeps a NaN
        if not worst <= tolerance:
            raise DataError(
                f"cached reference log-probs differ from live ones by {worst:.2e} nat a token",
                why=f"{self.folder} was written by another version of the model code or kernel",
                fix="remove that folder and start again",
            )
        return worst

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """The batch with reference log-probs in every micro-batch."""
        keys = {g.id: content_key(g) for g in batch.groups}
        columns = tuple(tuple(self._column(mb, keys) for mb in rank) for rank in batch.micro_batches)
        return batch.with_reference(columns)

    def _column(self, mb: MicroBatch, keys: Mapping[int, str]) -> Floats:
        if not mb.weight:
            return np.zeros(len(mb.targets), np.float32)
        column = np.empty(len(mb.targets), np.float32)
        column[by_sequence(mb)] = np.concatenate([self._values[keys[int(i)]] for i in mb.examples])
        return column

    @staticmethod
    def _by_example(
        batch: PackedBatch, logprobs: PerMicroBatch, keys: Mapping[int, str]
    ) -> Iterator[tuple[str, Floats]]:
        for rank, values in zip(batch.micro_batches, logprobs, strict=True):
            for mb, logps in zip(rank, values, strict=True):
                if not mb.weight:
                    continue
                ordered = logps[by_sequence(mb)]
                example = mb.sequence[by_sequence(mb)] // mb.branches
                bounds = np.searchsorted(example, np.arange(len(mb) + 1))
                for i, identity in enumerate(mb.examples):
                    yield keys[int(identity)], np.ascontiguousarray(ordered[bounds[i] : bounds[i + 1]])

    def _write(self, values: Mapping[str, Floats]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(sorted(values)).encode()).hexdigest()[:16]
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        save_file(dict(values), temporary)
        fsync_file(temporary)
        os.replace(temporary, self.folder / f"part-{name}.safetensors")
        fsync_directory(self.folder)


def _read(part: Path) -> dict[str, Floats]:
    try:
        return load_file(part)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{part} cannot be read", why=str(error), fix="remove that file: its values are computed again"
        ) from error


def _gap(live: Floats, cached: Floats) -> float:
    if live.shape != cached.shape:
        return float("inf")
    return float(np.abs(live - cached).mean()) if live.size else 0.0


def by_sequence(mb: MicroBatch) -> np.ndarray:
    """Indices that sort scored tokens by (example, branch, position)."""
    return np.lexsort((mb.score_at, mb.sequence))


def content_key(group: SequenceGroup) -> str:
    """SHA-256 over the tokens and the loss mask of an example."""
    digest = hashlib.sha256(np.int64(len(group.prompt)).tobytes() + group.prompt.tobytes())
    for branch in group.branches:
        digest.update(np.int64(len(branch.ids)).tobytes() + branch.ids.tobytes() + branch.loss_mask.tobytes())
    return digest.hexdigest()
