"""The learner's state on disk by parameter name, the same for every ZeRO stage and number of ranks.

The state is the fp32 master weight and Adam's two moments of each trainable parameter, in safetensors without
pickle. Only rank i mod world copies parameter i to the host and writes it, so no rank ever holds the whole
state. Every rank reads all files back, one parameter at a time. A state saved on one number of ranks or stage
can be loaded on any other (docs/design.md).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.core.files import FileEntry, fsync_file
from orchestrator.learner.engine import Engine, on_cpu
from orchestrator.learner.rank_learner import RankLearner, Role, iterate_trainable

SHARD_BYTES = 1 << 30
MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIXES: Mapping[Role, str] = {"policy": "state", "critic": "critic"}


def save_state(learner: RankLearner, directory: Path, moments: bool = True) -> list[FileEntry]:
    """Writes this rank's shards and returns them with size and SHA-256. A collective: call it on all ranks.

    moments: False leaves out Adam's moments, which a finished run does not need. A critic's files lie beside
    the policy's: `critic-rank…` and `state-rank…`.
    """
    group, engine = learner.process_group, learner.engine
    entries: list[FileEntry] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            path = directory / f"{_prefix(learner)}-rank{group.rank:04d}-{len(entries):04d}.safetensors"
            save_file(pending, path)
            fsync_file(path)
            entries.append(FileEntry.of(path, directory))
            pending.clear()

    for index, (name, tensor) in enumerate(_named_state(learner, engine, moments)):
        if index % group.world == group.rank:
            pending[name] = on_cpu(tensor)
            if sum(t.numel() * t.element_size() for t in pending.values()) >= SHARD_BYTES:
                flush()
    flush()
    return entries


def load_state(learner: RankLearner, directory: Path, optimizer_step: int) -> None:
    """Loads weights, moments and Adam's step counter on every rank. A collective."""
    engine = learner.engine
    if optimizer_step > 0:
        _materialise_moments(learner)
    with _Shards(directory, _prefix(learner)) as shards:
        for name, parameter in iterate_trainable(engine.module):
            engine.set_weight(parameter, shards.read(f"weight.{name}"))
            for moment in MOMENTS if optimizer_step > 0 else ():
                engine.set_moment(parameter, moment, shards.read(f"{moment}.{name}"))
        if learner.reference is not None and _reference_moves(learner):
            for name, parameter in learner.reference.named_parameters():
                with torch.no_grad():
                    parameter.copy_(shards.read(f"reference.{name}"))
    engine.set_optimizer_step(optimizer_step)


def full_weights(learner: RankLearner, *, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, whole fp32 weight on the CPU) of every trainable parameter, one at a time. A
    collective: run it to its end.

    keep: False on a rank that only takes part in the gathers. Nothing is copied or yielded there.
    """
    for name, parameter in iterate_trainable(learner.engine.module):
        weight = learner.engine.weight(parameter)
        if keep:
            yield name, on_cpu(weight)


def weights_digest(learner: RankLearner) -> str:
    """SHA-256 over all trainable fp32 weights in order, equal if the weights are bit-identical. A
    collective."""
    digest = hashlib.sha256()
    for name, weight in full_weights(learner):
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _named_state(learner: RankLearner, engine: Engine, moments: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state, each whole on the device of every rank until the next one is taken."""
    has_moments = moments and engine.has_moments()
    for name, parameter in iterate_trainable(engine.module):
        yield f"weight.{name}", engine.weight(parameter)
        for moment in MOMENTS if has_moments else ():
            yield f"{moment}.{name}", engine.moment(parameter, moment)
    if learner.reference is not None and _reference_moves(learner):
        for name, parameter in learner.reference.named_parameters():
            yield f"reference.{name}", parameter


def _reference_moves(learner: RankLearner) -> bool:
    """Whether the reference is part of the state, as TR-DPO's is. A frozen one is loaded from its model."""
    return learner.spec.recipe.algorithm.reference_sync_every is not None


def _materialise_moments(learner: RankLearner) -> None:
    """Creates Adam's state by a step with a zero gradient and learning rate 0. The caller then overwrites
    every value."""
    with learner.engine.accumulation():
        learner.engine.backward(learner.idle_loss(), last=True)
    learner.engine.step(0.0)


def _prefix(learner: RankLearner) -> str:
    return PREFIXES[learner.spec.role]


@contextmanager
def saved_weights(directory: Path, role: Role) -> Iterator[Callable[[str], Tensor]]:
    """A function from a parameter's name to its fp32 weight in the checkpoint, without a learner."""
    with _Shards(directory, PREFIXES[role]) as shards:
        yield lambda name: shards.read(f"weight.{name}")


class _Shards:
    """Reads single tensors by name from a learner's safetensors files in a folder."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._files = [
            safe_open(path, framework="pt") for path in sorted(directory.glob(f"{prefix}-*.safetensors"))
        ]
        # a file is not a dict, so it has to be asked for its keys
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._where.clear()

    def read(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)
