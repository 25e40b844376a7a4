"""A trained reward model as a component: the export of a `reward` run, read at each sequence's last token.

    groups -> prompt ids + completion ids (the policy's, or text tokenized again) -> padded micro-batches
           -> rewards Float[n]

It uses the forward that trained the model (models/forward.py), so padding, masks and positions are the same.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from orchestrator.core.batches import Branch, Row, SequenceGroup
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.core.rollouts import Prompt, Rollout, RolloutGroup
from orchestrator.data.packing import pack
from orchestrator.data.tokenize import Encoder
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, run_forward
from orchestrator.models.load import load, load_config, load_tokenizer, placed
from orchestrator.recipe.schema import Data, Model, RewardFunction
from orchestrator.rollout.rewards.component import Outcome, RewardFailure


class RewardModel:
    """A component (component.Component) around a sequence-classification model with one output.

    If `policy` has the same tokenizer as the reward model (`same_tokenizer`), the rollouts' ids are read
    unchanged, so the reward is of exactly the tokens that were sampled. Else the texts of prompt and
    completion are tokenized by data/tokenize.py as in training, with an eos if the completion ended with one.
    """

    def __init__(
        self, function: RewardFunction, *, policy: Model | None, batch_size: int, device: torch.device
    ) -> None:
        """ConfigError or MissingInput if the folder does not hold a trained reward model."""
        assert function.model is not None
        cfg = Model(path=function.model, revision=function.revision)  # pyright: ignore[reportCallIssue]
        _check_head(function.name, cfg)
        loaded = load(cfg, seed=0, head="scalar")
        model: Any = loaded.model
        exported = getattr(load_config(cfg), "dtype", None)
        dtype = exported if device.type == "cuda" and isinstance(exported, torch.dtype) else torch.float32
        self.name, self.batch_size, self.device = function.name, batch_size, device
        self.model = ScoringModel(placed(model, device, dtype).eval(), head="scalar")
        self.longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.reads_ids = policy is not None and same_tokenizer(load_tokenizer(policy), loaded.tokenizer)
        self.encoders = {
            ended: Encoder(loaded.tokenizer, _data(append_eos=ended), "sft") for ended in (True, False)
        }

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float = float("inf")) -> list[Outcome]:
        """A reward per sample; a failure if it is too long or cannot be tokenized."""
        outcomes: list[Outcome | SequenceGroup] = [
            self._sequence(g.prompt, r) for g in groups for r in g.rollouts
        ]
        fitting = [i for i, s in enumerate(outcomes) if isinstance(s, SequenceGroup)]
        fitting.sort(
            key=lambda i: (
                -len(_sequence_at(outcomes, i).prompt) - len(_sequence_at(outcomes, i).branches[0].ids)
            )
        )
        for start in range(0, len(fitting), self.batch_size):
            chunk = fitting[start : start + self.batch_size]
            for i, reward in zip(
                chunk, self._rewards([_sequence_at(outcomes, i) for i in chunk]), strict=True
            ):
                outcomes[i] = reward
        samples = [f"{g.prompt.where}, sample {r.sample}" for g in groups for r in g.rollouts]
        return [
            _finite(self.name, outcome, sample) for outcome, sample in zip(outcomes, samples, strict=True)
        ]

    @torch.no_grad()
    def _rewards(self, sequences: Sequence[SequenceGroup]) -> list[float]:
        """Rewards of one micro-batch, which is halved if it does not fit into the device's memory."""
        try:
            rows = MicroBatchTensors.of(pack(sequences, "padded"), self.device)
            return run_forward(self.model, rows).values.flatten().tolist()
        except torch.OutOfMemoryError:
            if len(sequences) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(sequences) // 2
        return self._rewards(sequences[:middle]) + self._rewards(sequences[middle:])

    def _sequence(self, prompt: Prompt, rollout: Rollout) -> SequenceGroup | RewardFailure:
        where = f"{prompt.where}, sample {rollout.sample}"
        if self.reads_ids:
            sequence = SequenceGroup(
                prompt.id, prompt.ids, (Branch(rollout.ids, np.ones(len(rollout.ids), np.bool_)),)
            )
        else:
            given = {"tools": prompt.tools, "chat_template_kwargs": prompt.chat_template_kwargs}
            row = Row(
                prompt.id, where, prompt.source, prompt=prompt.text, completion=rollout.completion, **given
            )
            try:
                sequence = self.encoders[rollout.finish == "stop"].encode(row)
            except DataError as error:
                return RewardFailure(
                    f"reward {self.name} of {where}: it cannot be tokenized", why=error.what, fix=error.fix
                )
        if self.longest is not None and sequence.longest > self.longest:
            return RewardFailure(
                f"reward {self.name} of {where}: {sequence.longest} tokens, the reward model reads "
                f"{self.longest}"
            )
        return sequence


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether ids mean the same to both tokenizers.

    This is so if the serialized tokenizers (vocabulary, merges, normaliser, added tokens …) are equal but for
    padding and truncation, and if chat template and eos are equal.
    """
    return _identity(first) == _identity(second)


def _identity(tokenizer: Any) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        serialized: Any = (type(tokenizer).__name__, tokenizer.get_vocab())
    else:
        serialized = {
            k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")
        }
    return serialized, tokenizer.chat_template, tokenizer.eos_token_id


def _check_head(name: str, cfg: Model) -> None:
    """ConfigError for a folder without a reward head, which transformers would draw at random."""
    config = load_config(cfg)
    kinds = getattr(config, "architectures", None) or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or config.num_labels != 1:
        raise ConfigError(
            f"rewards.functions, {name}: {cfg.path} is not a reward model",
            why=f"it is a {', '.join(kinds) or 'model without an architecture'} with {config.num_labels} "
            "outputs",
            fix="give the export folder of a `reward` run, or another sequence classifier with one output",
        )


def _data(*, append_eos: bool) -> Data:
    return Data(train="", append_eos=append_eos)  # pyright: ignore[reportCallIssue]


def _sequence_at(outcomes: Sequence[Outcome | SequenceGroup], i: int) -> SequenceGroup:
    sequence = outcomes[i]
    assert isinstance(sequence, SequenceGroup)
    return sequence


def _finite(name: str, outcome: Outcome | SequenceGroup, sample: str) -> Outcome:
    if isinstance(outcome, float) and not np.isfinite(outcome):
        return RewardFailure(f"reward {name} of {sample} is {outcome:g}, not a finite number")
    assert not isinstance(outcome, SequenceGroup)
    return outcome
