"""Schema of what is learned: `algorithm`, and for online algorithms `rollouts`, `rewards` and `critic`."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from orchestrator.recipe.schema_data import Model
from orchestrator.recipe.section import NAME_PATTERN, Section, Workers

OfflineName = Literal["sft", "reward", "dpo", "kto", "simpo", "orpo", "cpo"]
OnlineName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gspo",
    "cispo",
    "ppo",
    "online_dpo",
]
ONLINE: tuple[str, ...] = get_args(OnlineName)
"""Algorithms that learn from rollouts of the policy. The others learn from rows."""


class Clip(Section):
    """Bounds of the probability ratio. The defaults are the algorithm's own."""

    low: float | None = Field(None, ge=0, description="Lower bound of the ratio: 1 - low.")
    high: float | None = Field(None, ge=0, description="Upper bound of the ratio: 1 + high (CISPO: high).")
    dual: float | None = Field(
        None, gt=1, description="Upper bound of the ratio if the advantage is negative (TRL's delta)."
    )


class Kl(Section):
    """KL of the policy from the reference, as a term of the loss or of the reward."""

    coefficient: float = Field(
        0.0, ge=0, description="Coefficient of the KL; 0: none, and no reference policy is kept."
    )
    place: Literal["loss", "reward"] = Field(
        "loss", description="Place of the KL: a term of the loss, or subtracted from the reward."
    )
    estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        "auto", description="Estimator of the KL; auto: k3 in the loss, k1 in the reward."
    )
    ratio: bool | None = Field(
        None,
        description="Whether the KL in the loss is multiplied by the probability ratio, as with TRL's "
        "`use_bias_correction_kl`; default: GRPO's family, but not with k2.",
    )
    target: float | None = Field(
        None, gt=0, description="KL (k3) per token that the adaptive coefficient is steered towards."
    )
    horizon: float = Field(
        10_000.0,
        gt=0,
        description="Number of rollouts over which the adaptive coefficient may change by a factor e^0.2.",
    )


class Correction(Section):
    """Importance correction for the gap between the log-probs of the generator and the learner, which comes
    from stale weights or other kernels."""

    kind: Literal["none", "token", "sequence", "decoupled"] = Field(
        "token",
        description="Kind of correction; token: TIS; sequence: whole sequences beyond `cap` are masked; "
        "decoupled: PPO around the learner's own log-probs.",
    )
    cap: float = Field(2.0, gt=1, description="Bound of the importance weight.")
    alarm: float = Field(
        0.05,
        gt=0,
        description="Mean |gap| in nat per token above which a note is written (strictly on-policy).",
    )


class AlgorithmConfig(Section):
    name: Literal[OfflineName, OnlineName] = Field(
        description="Name of the algorithm; see [algorithms](algorithms.md)."
    )
    loss: str | dict[str, float] | None = Field(
        None,
        description="Loss by name, a weighted mix, e.g. {sigmoid: 0.8, sft: 1.0}, or a function of your "
        "own, file.py:function; default: the algorithm's own.",
    )
    advantage: str | None = Field(
        None,
        description="Function of your own that turns rewards into advantages, file.py:function; default: the "
        "algorithm's own.",
    )
    beta: float = Field(
        0.1, gt=0, description="Inverse temperature: how far the policy may move from the reference."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs assumed to have swapped labels."
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="Divergence of f-DPO, which replaces the log-ratio."
    )
    f_alpha: float = Field(0.5, description="Alpha of the alpha divergence.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO's weight of tokens beyond the shared length."
    )
    wpo: bool = Field(
        False, description="Whether pairs are weighted by their probability under the policy (WPO)."
    )
    ipo_length_average: bool = Field(
        True, description="Whether IPO takes per-token mean log-probs (TRL) or their sums (paper)."
    )
    simpo_gamma: float = Field(0.5, description="Target reward margin of SimPO.")
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of DiscoPOP's mix.")
    reward_centring: float = Field(
        0.0, ge=0, description="Coefficient of (r_chosen + r_rejected)^2 in the reward model's loss."
    )
    kto_desirable_weight: float = Field(1.0, gt=0, description="Weight of wanted completions.")
    kto_undesirable_weight: float = Field(1.0, gt=0, description="Weight of unwanted completions.")
    reference_sync_every: int | None = Field(
        None, ge=1, description="TR-DPO's steps between updates of the reference."
    )
    reference_sync_alpha: float = Field(
        0.6, gt=0, le=1, description="TR-DPO's alpha: ref <- alpha*policy + (1-alpha)*ref."
    )
    epochs: int = Field(
        1,
        ge=1,
        description="Online: passes over each rollout batch, which is cut into mini-batches of "
        "batch.effective.",
    )
    normaliser: Literal["auto", "token", "sequence", "constant"] = Field(
        "auto",
        description="Online: divisor of the loss, over the whole effective batch; constant: sequences x "
        "max_new_tokens.",
    )
    clip: Clip = Clip()  # pyright: ignore[reportCallIssue]
    kl: Kl = Kl()  # pyright: ignore[reportCallIssue]
    correction: Correction = Correction()  # pyright: ignore[reportCallIssue]
    entropy_bonus: float = Field(0.0, ge=0, description="Online: coefficient of the mean entropy per token.")
    gamma: float = Field(1.0, gt=0, le=1, description="PPO's discount per token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="PPO's lambda of GAE.")
    value_clip: float | None = Field(
        0.2, gt=0, description="PPO's bound on how far the critic's values move per rollout batch."
    )
    whiten: bool = Field(
        True,
        description="PPO: whether the advantages of a rollout batch are brought to mean 0 and deviation 1.",
    )
    scale_by_std: bool | None = Field(
        None,
        description="Whether group advantages are divided by the group's deviation; default: the "
        "algorithm's own.",
    )
    dynamic_sampling: bool | None = Field(
        None, description="Whether groups of equal rewards are replaced by other prompts; default: DAPO only."
    )
    max_resampled: int = Field(
        3,
        ge=0,
        description="Most rollout batches that dynamic sampling draws for one step, beyond the first.",
    )
    mask_truncated: bool = Field(
        False, description="Whether completions cut off at max_new_tokens are left out of the loss."
    )


class Rollouts(Workers):
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Number of rollout actors; auto: one per learner if colocated, half of what there is "
        "room for if separate.",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0,
        description="GPUs of each actor; 0: on the CPU; auto: one if the machines have GPUs (half of it "
        "beside a colocated learner), else 0.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each actor.")
    placement: Literal["separate", "colocated"] = Field(
        "separate",
        description="Placement of the actors; colocated: actor i shares the bundle of learner worker i.",
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="Engine that generates.")
    batching: Literal["auto", "static", "continuous"] = Field(
        "auto",
        description="Batching of the transformers engine; auto: static on a CPU, continuous on a GPU.",
    )
    rows_at_once: int | None = Field(
        None,
        ge=1,
        description="Sequences that an actor decodes together; default: 64, with vLLM as many as it takes "
        "by itself.",
    )
    prompts: int = Field(32, ge=1, description="Prompts of one rollout batch.")
    samples: int = Field(8, ge=1, description="Completions of one prompt.")
    max_new_tokens: int = Field(
        64, ge=1, description="Most tokens of a completion (multi-turn: of the whole episode)."
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="Divisor of the logits, the learner's too; 0 (greedy) cannot be trained with.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Probability mass of nucleus sampling; 1: off; see [sampling](algorithms.md#sampling).",
    )
    top_k: int | None = Field(None, ge=1, description="Number of most likely tokens to sample from.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Least probability of a token, as a share of the most likely one's."
    )
    stop: list[str] = Field([], description="Texts that end a completion; they stay part of it.")
    max_staleness: int = Field(
        0, ge=0, description="Versions that generation may run ahead of learning; 0: strictly on-policy."
    )
    update: Literal["batch", "request"] = Field(
        "batch",
        description="Moment at which actors take new weights; batch: all of a rollout batch has one "
        "version; request: an actor takes the newest before each few prompts.",
    )
    transport: Literal["auto", "object_store", "broadcast", "cuda_ipc"] = Field(
        "auto", description="Transport of the weights to the actors."
    )
    bucket_mb: float = Field(256.0, gt=0, description="Size of the buckets in which weights are sent.")
    environment: str | None = Field(
        None, description="Multi-turn: environment as `module:Class` or `file.py:Class`."
    )
    max_turns: int = Field(8, ge=1, description="Multi-turn: most turns of the model in one episode.")
    replay: str | None = Field(
        None, description="A samples.jsonl to learn from instead of generating: for debugging."
    )
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="Deadline of one call on an actor; calls that move weights get more, by their bytes.",
    )
    start_timeout_s: float | None = Field(
        None,
        gt=0,
        description="Deadline for an actor to be ready, and more by the model's bytes; default: 900 for "
        "vLLM on a GPU, else learners.start_timeout_s.",
    )
    max_restarts: int = Field(
        8,
        ge=0,
        description="Times that a lost rollout actor is replaced: within an hour, or while nothing is "
        "rolled out.",
    )

    @property
    def rows(self) -> int:
        """Sequences that an actor decodes together, as assumed before the engine is built."""
        return self.rows_at_once or (256 if self.engine == "vllm" else 64)


class RewardFunction(Section):
    """One component of the reward. Exactly one of function, model and url is set."""

    name: str = Field(pattern=NAME_PATTERN, description="Name of the component in metrics.")
    function: str | None = Field(
        None, description="Function as `module:function`, `file.py:function`, or `trl:accuracy_reward` …"
    )
    model: str | None = Field(None, description="Trained reward model: a folder or hub name.")
    revision: str | None = Field(None, description="Hub revision of the model.")
    url: str | None = Field(None, description="HTTP endpoint that takes and returns batched JSON.")
    weight: float = Field(1.0, description="Weight of the component in the sum; 0: it is only watched.")
    options: dict[str, Any] = Field(
        {}, description="Keyword arguments of the function (or of the TRL function's maker)."
    )
    headers_from: dict[str, str] = Field(
        {}, description="HTTP headers, each with the environment variable that holds its value."
    )
    gpus: float = Field(0, ge=0, description="GPUs of the actor of a reward model.")

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardFunction":
        if sum(kind is not None for kind in (self.function, self.model, self.url)) != 1:
            raise ValueError("set exactly one of function, model and url")
        return self


class Rewards(Section):
    functions: list[RewardFunction] = Field([])
    timeout_s: float = Field(60.0, gt=0, description="Deadline of one call.")
    retries: int = Field(
        2, ge=0, description="Further tries after a failure; then the group is dropped and counted."
    )
    max_dropped_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Largest share of a rollout batch's groups that may be dropped; beyond it the run ends.",
    )
    memory_limit_gb: float = Field(
        4.0, gt=0, description="Memory limit of the process that runs reward functions."
    )
    batch_size: int = Field(64, ge=1, description="Completions per HTTP request or reward-model micro-batch.")
    environment: list[str] = Field(
        [], description="Environment variables that reward functions see besides PATH, HOME, LANG …"
    )
    normalise: Literal["none", "running"] = Field(
        "none", description="Normalisation of rewards; running: they are divided by their running deviation."
    )


class Critic(Section):
    """PPO's value model, a separate learner group. Its size and start weights are the policy's if `model` is
    not set."""

    model: Model | None = None
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of the critic; default: optimizer.learning_rate."
    )
    workers: int = Field(1, ge=1, description="Number of DeepSpeed ranks of the critic.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each rank; 0: on the CPU.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each rank.")
    warmup_steps: int = Field(0, ge=0, description="First rollout batches from which only the critic learns.")
    export: bool = Field(False, description="Whether export-critic/ is written at the end.")
