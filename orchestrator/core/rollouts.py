"""What flows before a rollout becomes training data: prompts, samples, groups and their rewards, frozen and
typed.

Prompt --generator--> Completion --turns--> Rollout -> RolloutGroup --scorer--> ScoredGroup -> records.SequenceGroup
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.core.batches import Bools, Finish, Floats, Ints


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question to the policy. id: of its row; ids: its tokens, ready for generation; text: a string or a
    list of messages as rewards see it; columns: what else the row holds (`answer` included), handed to reward
    functions by name; tools, chat_template_kwargs: what the chat template is given beside the messages."""

    id: int
    where: str
    source: int
    ids: Ints
    text: Any
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. temperature 0: greedy. A sample's seed is a hash of (seed, prompt, draw,
    sample, version)."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1.0 or self.top_k is not None or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator made of one prompt: ids Int[S] (the eos token included), logprobs Float[S] under the
    policy: the softmax over the whole vocabulary at the temperature, whatever top-k, top-p and min-p leave
    out.

    kept: Float[S], log of the mass that they left to draw from; None where they are off, or where the engine
    does not say.
    """

    ids: Ints
    logprobs: Floats
    finish: Finish
    kept: Floats | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One episode: what followed a prompt.

    ids: Int[T], every token after the prompt, an environment's included; loss_mask: Bool[T], True for the
    model's own; logprobs, kept: Float[S], of the scored ones, as in Completion. version: of the policy that
    sampled it. completion: text, or messages where the prompt is messages, as rewards see it. turns: of the
    model. environment_reward: what the environment gave, None without one. failure: what the environment
    raised instead of ending the episode.
    """

    sample: int
    version: int
    ids: Ints
    loss_mask: Bools
    logprobs: Floats
    finish: Finish
    completion: Any
    turns: int = 1
    environment_reward: float | None = None
    failure: str | None = None
    kept: Floats | None = None


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All samples of one prompt. draw: position of this draw in the data order (the prompt cursor), so that a
    prompt that comes again is sampled with other seeds."""

    prompt: Prompt
    draw: int
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group with the reward of each rollout: total, and each component by name (unweighted), Float[n]."""

    group: RolloutGroup
    rewards: Floats
    parts: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchRewards:
    """A scored rollout batch. dropped: groups without a reward, as "where: reason"; seconds: by component."""

    groups: tuple[RewardedGroup, ...]
    dropped: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """When a rollout actor worked. start, end: seconds of time.perf_counter in the driver; version: of the
    weights. A span of no length stands for an actor that had no work."""

    actor: int
    start: float
    end: float
    version: int


@dataclass(frozen=True, slots=True)
class WeightsDelivered:
    """What publishing a version took. bytes: per receiver; bucket and receiver counts say how it was cut."""

    version: int
    bytes: int
    seconds: float
    buckets: int
    transport: str


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """A scored rollout batch. prompts: drawn from the data for it; learned_from: the groups that become
    training data; wanted: how many they should be by the recipe."""

    prompts: int
    groups: tuple[RolloutGroup, ...]
    scoring: BatchRewards
    learned_from: tuple[RewardedGroup, ...]
    wanted: int

    @property
    def rewarded(self) -> tuple[RewardedGroup, ...]:
        return self.scoring.groups

    @property
    def tokens(self) -> int:
        """Unshared tokens of all rollouts, prompts repeated."""
        return sum(len(g.prompt.ids) + len(r.ids) for g in self.groups for r in g.rollouts)

    def joined(self, other: "RolloutBatch") -> "RolloutBatch":
        """Both, as one batch."""
        mine, theirs = self.scoring.seconds, other.scoring.seconds
        seconds = {name: mine.get(name, 0.0) + theirs.get(name, 0.0) for name in {**mine, **theirs}}
        scoring = BatchRewards(
            self.rewarded + other.rewarded, self.scoring.dropped + other.scoring.dropped, seconds
        )
        return RolloutBatch(
            self.prompts + other.prompts,
            self.groups + other.groups,
            scoring,
            self.learned_from + other.learned_from,
            self.wanted,
        )
