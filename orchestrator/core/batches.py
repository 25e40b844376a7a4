"""What flows: frozen records, made once by one room and never filled in later by another.

    offline   Row -> SequenceGroup -> PackedBatch -> MicroBatch -> LearnReport -> StepReport
    online    Row -> Prompt -> RolloutGroup -> ScoredGroup -> SequenceGroup (its branches carry Experience) -> … the same …

Arrays are numpy so that records cross processes without copies and without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Layout = Literal["prefix_shared", "packed", "padded"]
DataKind = Literal["sft", "preference", "unpaired", "prompt"]
Finish = Literal["stop", "length", "error"]
Sync = Literal["no_sync", "coalesced", "per_micro_batch"]


@dataclass(frozen=True, slots=True)
class Row:
    """One validated row of a data source, in TRL's terms, before any tokenizer.

    Texts are strings or lists of {"role", "content"} messages. SFT: prompt (may be "") + completion, or
    `messages` alone; preference: prompt, chosen, rejected; unpaired: prompt, completion, label; prompt:
    prompt alone, and in `columns` whatever else the record holds, for reward functions and environments.
    tools, chat_template_kwargs: what the chat template is given beside the messages; a message with `weight`
    0 is not learned. where: "file:line" for messages to the user; source: index of the source in the recipe.
    """

    id: int
    where: str
    source: int
    prompt: Any = None
    completion: Any = None
    chosen: Any = None
    rejected: Any = None
    messages: Any = None
    text: str | None = None
    label: bool | None = None
    margin: float | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experience:
    """What RL knows of the S scored tokens of a completion (or the N of a micro-batch), Float[S] each, in
    their order.

    sampled_logprobs: under the generator's policy; old_logprobs: under the learner's policy before the first
    update from this rollout batch (the proximal policy), None where that is the policy of this very step;
    ref_logprobs: under the reference; all over the whole vocabulary, at the temperature. values: the critic's
    before the update; returns: what it shall learn.

    Example: a completion of two tokens with reward 1, RLOO against one sample of reward 0: advantages [1.0,
    1.0].
    """

    advantages: Floats
    sampled_logprobs: Floats
    old_logprobs: Floats | None = None
    ref_logprobs: Floats | None = None
    values: Floats | None = None
    returns: Floats | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that follow a prompt. ids: Int[T]; loss_mask: Bool[T], True where a token counts in the loss.

    experience: of the scored tokens, where the branch is a rollout."""

    ids: Ints
    loss_mask: Bools
    experience: Experience | None = None


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The atom of packing: a prompt and the branches that share it. Never split over micro-batches.

    SFT and KTO have 1 branch (KTO a second, mismatched one for its KL term), a pair has 2: (chosen,
    rejected). The prompt holds at least one token, so every branch token has a position that predicts it.

    Example: prompt [1, 7, 8], branches ([9, 2], [5, 6, 2]): 3 + 2 + 3 = 8 tokens with a shared prompt, 11
    without.
    """

    id: int
    prompt: Ints
    branches: tuple[Branch, ...]
    source: int = 0
    label: float | None = None
    margin: float | None = None

    @property
    def shared_tokens(self) -> int:
        """Tokens with the prompt stored once."""
        return len(self.prompt) + sum(len(b.ids) for b in self.branches)

    @property
    def tokens(self) -> int:
        """Tokens with the prompt repeated for each branch: what TRL counts."""
        return sum(len(self.prompt) + len(b.ids) for b in self.branches)

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(b.ids) for b in self.branches)

    @property
    def scored_tokens(self) -> int:
        return sum(int(b.loss_mask.sum()) for b in self.branches)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the hardware cuts an optimizer step. Nothing in here may change a result.

    A micro-batch holds at most `examples` examples or, if that is None, `positions` computed token positions.
    one_row: a micro-batch is a single row under block masks (models/block_attention.py), as GPUs like it.
    Example: 256 pairs, Cut(workers=2, examples=8, …): 2 workers x 16 micro-batches x 8 pairs.
    """

    workers: int
    examples: int | None
    positions: int | None
    layout: Layout
    zero_stage: int
    sync: Sync
    one_row: bool = False

    def __str__(self) -> str:
        """Example: at most 4096 positions, ZeRO 2 (per_micro_batch)"""
        bound = f"{self.examples} examples" if self.examples is not None else f"{self.positions} positions"
        return f"at most {bound}, ZeRO {self.zero_stage} ({self.sync})"

    def halved(self) -> "Cut":
        """The cut to try after an out-of-memory error."""
        if self.examples is not None:
            return replace(self, examples=max(1, self.examples // 2))
        return replace(self, positions=max(1, (self.positions or 2) // 2))


@dataclass(frozen=True, slots=True)
class LossUnits:
    """The GLOBAL counts of one optimizer step, taken before the first backward: what loss sums are divided
    by.

    examples: pairs (or conversations); branch_tokens[k]: scored tokens of branch k over all examples.
    kl_coefficient: of this step where a controller steers it, else the recipe's holds. Example: the group
    above, both branches wholly scored: LossUnits(1, (2, 3)), `.tokens` 5.
    """

    examples: int
    branch_tokens: tuple[int, ...]
    kl_coefficient: float | None = None

    @property
    def tokens(self) -> int:
        return sum(self.branch_tokens)

    @property
    def sequences(self) -> int:
        """Branches of all examples: the completions of a policy-gradient step."""
        return self.examples * len(self.branch_tokens)


ROW_MULTIPLE = 128
"""The length of a single row is a multiple of it: the block of FlexAttention's masks."""
SHORTEST_ROW = 512
"""Shorter single rows make torch compile its attention again: sizes 1 and 2 of a dimension are special to it.
"""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A few rows that one worker takes through the model at once.

    input_ids, position_ids: Int[R, T]. segment: Int[R, T], which sequence group (or sequence) a token belongs
    to,
    -1 for padding; branch: Int[R, T], 0 for tokens every branch may see (the prompt), k >= 1 for branch k.
    Token i sees token j iff j <= i, same segment, and branch[j] is 0 or branch[i].
    score_at: Int[N], flat positions r*T + t whose hidden state predicts targets: Int[N];
    sequence: Int[N], the sequence (example * branches + branch) of each; sequences run 0 .. n*branches - 1.
    identity: Int[R, T], a hash of (example, branch or prompt, position) of each token: the same in every
    layout, cut and order.
    last_at: Int[n*branches], flat position of the last token of each sequence (where reward heads read).
    one_row: the row is single and made for block masks. examples: Int[n], group ids. weight: 0.0 for a filler
    that only keeps ranks in step.
    ref_logprobs: Float[N]; coefficients: Float[N], d loss / d token log-prob of losses that couple the whole
    batch.
    source: Int[n], which source of the data an example is from. label, margin: Float[n]. experience: columns
    Float[N] of a policy-gradient step.
    """

    layout: Layout
    input_ids: Ints
    position_ids: Ints
    segment: Ints
    branch: Ints
    score_at: Ints
    targets: Ints
    sequence: Ints
    last_at: Ints
    identity: Ints
    examples: Ints
    branches: int
    unshared_tokens: int
    one_row: bool = False
    weight: float = 1.0
    source: Ints | None = None
    ref_logprobs: Floats | None = None
    coefficients: Floats | None = None
    label: Floats | None = None
    margin: Floats | None = None
    experience: Experience | None = None

    @property
    def tokens(self) -> int:
        """Positions the model computes that are not padding."""
        return int((self.segment >= 0).sum())

    @property
    def positions(self) -> int:
        """Places in its rows, padding included: what attention and so memory grow with, at most."""
        return int(self.input_ids.size)

    def attended(self, window: int | None = None) -> int:
        """(query, key) pairs that one attention layer with this window looks at. Example: a sequence of 3
        tokens: 1 + 2 + 3."""
        seen = self.position_ids[self.segment >= 0] + 1
        return int((seen if window is None else np.minimum(seen, window)).sum())

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One optimizer step for all ranks: micro_batches[rank][i], the same number on every rank.

    groups: the examples themselves in batch order, for tables and for cutting the step again after an
    out-of-memory error.
    """

    groups: tuple[SequenceGroup, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    units: LossUnits

    @property
    def tokens(self) -> int:
        """Unshared tokens, as TRL counts them."""
        return sum(g.tokens for g in self.groups)

    def with_reference(self, logprobs: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        """A copy whose micro-batches carry reference log-probs: logprobs[rank][i]: Float[N]."""
        return self._with("ref_logprobs", logprobs)

    def with_coefficients(self, coefficients: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        """A copy whose micro-batches carry d loss / d token log-prob: coefficients[rank][i]: Float[N]."""
        return self._with("coefficients", coefficients)

    def _with(self, name: str, columns: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        ranks = tuple(
            tuple(replace(mb, **{name: column}) for mb, column in zip(row, values, strict=True))
            for row, values in zip(self.micro_batches, columns, strict=True)
        )
        return replace(self, micro_batches=ranks)
