"""Records of a training step, from a row of data to the micro-batches of an optimizer step.

    offline   Row -> SequenceGroup -> PackedBatch -> MicroBatch -> LearnReport -> StepReport

    online    Row -> Prompt -> RolloutGroup -> RewardedGroup -> SequenceGroup -> … as offline …
                                                               (its branches carry Experience)

Every record is frozen: one room makes it complete, and no other room fills it in later. Arrays are numpy, so
that records cross processes without copies and without torch.
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

    Which of the texts are set depends on the kind of data:

        sft          prompt (may be "") and completion, or `messages` or `text` alone
        preference   prompt, chosen, rejected
        unpaired     prompt, completion, label
        prompt       prompt

    A text is a string or a list of {"role", "content"} messages. A message with `weight` 0 is not learned.
    """

    id: int
    """Number of the row in its data set, from 0."""
    where: str
    """Place of the row in messages to the user. Example: "pairs.jsonl:12"."""
    source: int
    """Index of the source in the recipe."""
    prompt: Any = None
    completion: Any = None
    chosen: Any = None
    rejected: Any = None
    messages: Any = None
    text: str | None = None
    label: bool | None = None
    """KTO: True for a wanted completion."""
    margin: float | None = None
    """Reward model: by how much `chosen` is better than `rejected`."""
    answer: str | None = None
    """Reference answer that generated text is compared with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the record, for reward functions and environments."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of the tools that the chat template renders."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template. Example: {"enable_thinking": False}."""


@dataclass(frozen=True, slots=True)
class Experience:
    """Columns of reinforcement learning: one value for each of S scored tokens, in their order.

    S counts the scored tokens of one completion, or all N of a micro-batch. Log-probs are taken over the
    whole vocabulary, at the sampling temperature.

    Example: a completion of two tokens with reward 1, RLOO against one sample with reward 0:
    advantages [1.0, 1.0].
    """

    advantages: Floats
    """Float[S]."""
    sampled_logprobs: Floats
    """Float[S]: log-probs under the policy of the generator."""
    old_logprobs: Floats | None = None
    """Float[S]: log-probs under the proximal policy, which is the learner's before its first update from this
    rollout batch. None if that is the policy of this very step."""
    ref_logprobs: Floats | None = None
    """Float[S]: log-probs under the reference policy."""
    values: Floats | None = None
    """Float[S]: values of the critic before the update."""
    returns: Floats | None = None
    """Float[S]: targets of the critic."""


@dataclass(frozen=True, slots=True)
class Branch:
    """T tokens that follow a prompt."""

    ids: Ints
    """Int[T]: token ids."""
    loss_mask: Bools
    """Bool[T]: True for tokens that count in the loss (the scored tokens)."""
    experience: Experience | None = None
    """Values for the scored tokens, if the branch is a rollout."""


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The atom of packing: a prompt and the branches that share it. A group is never split.

    Example: prompt [1, 7, 8], branches ([9, 2], [5, 6, 2]): 3 + 2 + 3 = 8 tokens if the prompt is shared, 11
    if it is not.
    """

    id: int
    """Number of the example in its data set."""
    prompt: Ints
    """Int[P], P >= 1: so every token of a branch has a position that predicts it."""
    branches: tuple[Branch, ...]
    """SFT: 1. Pairs: 2, (chosen, rejected). KTO: 1, or 2 with the mismatched completion of its KL term.
    Online: one for each sample."""
    source: int = 0
    """Index of the data source in the recipe."""
    label: float | None = None
    """KTO: 1.0 for a wanted completion, 0.0 for an unwanted one."""
    margin: float | None = None
    """Reward model: by how much the chosen branch is better."""

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
        """Tokens of the prompt with the longest branch."""
        return len(self.prompt) + max(len(b.ids) for b in self.branches)

    @property
    def scored_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(int(b.loss_mask.sum()) for b in self.branches)


@dataclass(frozen=True, slots=True)
class Cut:
    """How an optimizer step is cut over the hardware. No value of a cut may change a result.

    `examples` bounds a micro-batch or, if that is None, `positions`.

    Example: 256 pairs, Cut(workers=2, examples=8, …): 2 workers x 16 micro-batches x 8 pairs.
    """

    workers: int
    """Number of data-parallel ranks."""
    examples: int | None
    """Most examples of a micro-batch."""
    positions: int | None
    """Most computed token positions of a micro-batch."""
    layout: Layout
    """How examples become rows."""
    zero_stage: int
    """ZeRO stage, 0 to 3."""
    sync: Sync
    """When gradients are reduced over the ranks."""
    one_row: bool = False
    """Whether a micro-batch is one long row under block masks (models/block_attention.py), for GPUs."""

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
    """GLOBAL counts of one optimizer step, taken before its first backward. Loss sums are divided by them.

    Example: the group of SequenceGroup's example, every branch token scored: LossUnits(1, (2, 3)).
    """

    examples: int
    """Examples of the step over all ranks: pairs, conversations or prompts."""
    branch_tokens: tuple[int, ...]
    """Scored tokens of branch k over all examples, for each k."""
    kl_coefficient: float | None = None
    """KL coefficient of this step if the adaptive controller sets it; None: the recipe's."""

    @property
    def tokens(self) -> int:
        """Scored tokens of all branches."""
        return sum(self.branch_tokens)

    @property
    def sequences(self) -> int:
        """Branches of all examples: the completions of a policy-gradient step."""
        return self.examples * len(self.branch_tokens)


ROW_MULTIPLE = 128
"""A single row is padded to a multiple of this length: the block size of FlexAttention's masks."""
SHORTEST_ROW = 512
"""Least length of a single row. torch compiles its attention again for shorter rows, because sizes 1 and 2 of
a dimension are special to it."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """R rows of T positions that one worker computes in one forward and backward pass.

    Token i sees token j if j <= i, segment[i] == segment[j], and branch[j] is 0 or branch[i]. The n examples
    have n * branches sequences, numbered example * branches + branch; N of their tokens are scored.

    Example: prompt [1, 7, 8] with branches ([9, 2], [5, 6, 2]), every branch token scored, prefix_shared:

        input_ids      [[1, 7, 8, 9, 2, 5, 6, 2]]       score_at   [2, 3, 2, 5, 6]
        position_ids   [[0, 1, 2, 3, 4, 3, 4, 5]]       targets    [9, 2, 5, 6, 2]
        segment        [[0, 0, 0, 0, 0, 0, 0, 0]]       sequence   [0, 0, 1, 1, 1]
        branch         [[0, 0, 0, 1, 1, 2, 2, 2]]       last_at    [4, 7]
    """

    layout: Layout
    """How the examples became rows."""
    input_ids: Ints
    """Int[R, T]."""
    position_ids: Ints
    """Int[R, T]: position of each token in its own sequence."""
    segment: Ints
    """Int[R, T]: group (prefix_shared) or sequence that a token belongs to; -1: padding."""
    branch: Ints
    """Int[R, T]: 0 for tokens that every branch sees (the prompt), k >= 1 for tokens of branch k."""
    score_at: Ints
    """Int[N]: flat positions r * T + t whose hidden states predict `targets`."""
    targets: Ints
    """Int[N]: the scored tokens."""
    sequence: Ints
    """Int[N]: sequence of each scored token."""
    last_at: Ints
    """Int[n * branches]: flat position of the last token of each sequence, where a reward head reads."""
    identity: Ints
    """Int[R, T]: a hash of (example, branch or prompt, position) of each token. It is the same in every
    layout, cut and order, and seeds LoRA's dropout."""
    examples: Ints
    """Int[n]: ids of the groups."""
    branches: int
    """Branches of each example."""
    unshared_tokens: int
    """Tokens with the prompt repeated for each branch."""
    one_row: bool = False
    """Whether the rows are one single row, made for block masks."""
    weight: float = 1.0
    """0.0 for a filler: it keeps the ranks in step and adds nothing."""
    source: Ints | None = None
    """Int[n]: index of the data source of each example."""
    ref_logprobs: Floats | None = None
    """Float[N]: log-probs under the reference policy."""
    coefficients: Floats | None = None
    """Float[N]: d loss / d token log-prob, for losses that couple the whole batch."""
    label: Floats | None = None
    """Float[n]: KTO's labels."""
    margin: Floats | None = None
    """Float[n]: margins of the reward model's pairs."""
    experience: Experience | None = None
    """Columns Float[N] of a policy-gradient step."""

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segment >= 0).sum())

    @property
    def positions(self) -> int:
        """All positions of the rows, padding included. They bound the growth of attention and memory."""
        return int(self.input_ids.size)

    def attended(self, window: int | None = None) -> int:
        """(query, key) pairs of one attention layer with this window. Example: a sequence of 3 tokens has
        1 + 2 + 3."""
        keys = self.position_ids[self.segment >= 0] + 1
        return int((keys if window is None else np.minimum(keys, window)).sum())

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One optimizer step for all ranks.

    Example: 8 pairs, Cut(workers=2, examples=2, …): 2 ranks with 2 micro-batches of 2 pairs each.
    """

    groups: tuple[SequenceGroup, ...]
    """The examples in batch order, for tables and for cutting the step again after an out-of-memory error."""
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    """micro_batches[rank][i]: every rank has the same number of them."""
    units: LossUnits
    """Counts of the whole step, which every rank divides its sums by."""

    @property
    def tokens(self) -> int:
        """Unshared tokens, as TRL counts them."""
        return sum(g.tokens for g in self.groups)

    def with_reference(self, logprobs: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        """A copy whose micro-batches carry reference log-probs. logprobs[rank][i]: Float[N]."""
        return self._with("ref_logprobs", logprobs)

    def with_coefficients(self, coefficients: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        """A copy whose micro-batches carry d loss / d token log-prob. coefficients[rank][i]: Float[N]."""
        return self._with("coefficients", coefficients)

    def _with(self, name: str, columns: tuple[tuple[Floats, ...], ...]) -> "PackedBatch":
        ranks = tuple(
            tuple(replace(mb, **{name: column}) for mb, column in zip(row, values, strict=True))
            for row, values in zip(self.micro_batches, columns, strict=True)
        )
        return replace(self, micro_batches=ranks)
