"""Records of a rollout, from a prompt to a rewarded batch of completions.

Prompt --generator--> Completion --episode--> Rollout -> RolloutGroup --scorer--> RewardedGroup
                                                                             -> batches.SequenceGroup
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.core.batches import Bools, Finish, Floats, Ints


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the policy answers."""

    id: int
    """Number of its row."""
    where: str
    """Place of its row in messages to the user. Example: "prompts.jsonl:3"."""
    source: int
    """Index of its source in the recipe."""
    ids: Ints
    """Int[P]: tokens, ready for generation."""
    text: Any
    """The prompt as rewards see it: a string, or a list of messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the row, which reward functions get by name. Example: {"answer": "42"}."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of the tools that the chat template renders."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters of sampling. The seed of a sample is a hash of (seed, prompt, draw, sample, version).

    Example: Sampling(samples=8, max_new_tokens=512, temperature=0.7).
    """

    samples: int
    """Completions of each prompt."""
    max_new_tokens: int
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Divisor of the logits; 0: greedy."""
    top_p: float = 1.0
    """Probability mass of nucleus sampling; 1: off."""
    top_k: int | None = None
    """Number of most likely tokens that can be drawn; None: all."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the most likely token's; 0: off."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    seed: int = 0
    """Seed of the run."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1.0 or self.top_k is not None or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """S tokens that a generator drew for one prompt. Example: ids [9, 2], logprobs [-0.7, -0.1], "stop"."""

    ids: Ints
    """Int[S]: tokens, the eos token included."""
    logprobs: Floats
    """Float[S]: log-probs under the policy. The softmax is over the whole vocabulary at the temperature, also
    if top-k, top-p or min-p leave tokens out."""
    finish: Finish
    """Why it ended: the eos token or a stop text, the length, or an error."""
    kept: Floats | None = None
    """Float[S]: log of the probability mass that top-k, top-p and min-p left to draw from. None if they are
    off, or if the engine does not report it."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One episode: T tokens that followed a prompt, S of them drawn by the model."""

    sample: int
    """Number among the rollouts of its prompt."""
    version: int
    """Version of the policy that sampled it."""
    ids: Ints
    """Int[T]: all tokens after the prompt, those of an environment included."""
    loss_mask: Bools
    """Bool[T]: True for tokens that the model drew."""
    logprobs: Floats
    """Float[S]: log-probs of the model's tokens, as in Completion."""
    finish: Finish
    """Why it ended."""
    completion: Any
    """The completion as rewards see it: text, or messages if the prompt is messages."""
    turns: int = 1
    """Turns of the model."""
    environment_reward: float | None = None
    """Reward that the environment gave. None without an environment."""
    failure: str | None = None
    """Error that the environment raised, which ended the episode."""
    kept: Floats | None = None
    """Float[S]: as in Completion."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt."""

    prompt: Prompt
    """The prompt that they share."""
    draw: int
    """Position in the data order (the prompt cursor). It seeds the samples, so a prompt that comes again gets
    others."""
    rollouts: tuple[Rollout, ...]
    """n rollouts, by sample number."""


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group with the rewards of its n rollouts. Example: rewards [1.0, 0.0], parts {"accuracy": [1.0,
    0.0]}."""

    group: RolloutGroup
    """The rollouts."""
    rewards: Floats
    """Float[n]: weighted sum of the components."""
    parts: Mapping[str, Floats] = field(default_factory=dict)
    """Float[n] for each component by name, unweighted."""


@dataclass(frozen=True, slots=True)
class BatchRewards:
    """Rewards of a rollout batch."""

    groups: tuple[RewardedGroup, ...]
    """Groups that have a reward."""
    dropped: tuple[str, ...] = ()
    """Groups without one. Example: "prompts.jsonl:3: accuracy: no answer within 60 s"."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each component took."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in which a rollout actor worked. A span of no length: the actor had no work."""

    actor: int
    """Number of the actor."""
    start: float
    """Seconds of time.perf_counter in the driver."""
    end: float
    """Seconds of time.perf_counter in the driver."""
    version: int
    """Version of the weights that it worked with."""


@dataclass(frozen=True, slots=True)
class WeightsDelivered:
    """Cost of publishing one version of the weights."""

    version: int
    """The version."""
    bytes: int
    """Bytes that each receiver got."""
    seconds: float
    """Seconds until the version was published."""
    buckets: int
    """Number of buckets that the weights were sent in."""
    transport: str
    """How they were sent. Example: "object_store"."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of one step of the online loop, with their rewards."""

    prompts: int
    """Prompts drawn from the data for it."""
    groups: tuple[RolloutGroup, ...]
    """All rollouts, one group for each prompt."""
    scoring: BatchRewards
    """Their rewards."""
    learned_from: tuple[RewardedGroup, ...]
    """Groups that become training data."""
    wanted: int
    """Number of groups that the step should learn from."""

    @property
    def rewarded(self) -> tuple[RewardedGroup, ...]:
        """Groups that have a reward."""
        return self.scoring.groups

    @property
    def tokens(self) -> int:
        """Tokens of all rollouts, with the prompt repeated for each."""
        return sum(len(g.prompt.ids) + len(r.ids) for g in self.groups for r in g.rollouts)

    def joined(self, other: "RolloutBatch") -> "RolloutBatch":
        """Both batches as one."""
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
