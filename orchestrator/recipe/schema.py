"""Every knob of a recipe on one page: strict, typed, without torch.

A recipe names WHAT an optimizer step is (`batch.effective`, `algorithm`, `optimizer`) and WHERE it runs
(`learners`). Only the first half may change a result. Loading (YAML, `extends`, overrides) is in
`recipe/loading.py`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

DURATION_PATTERN = r"^[0-9]*[1-9][0-9]*[smh]$"
DURATIONS = {"s": 1.0, "m": 60.0, "h": 3600.0}
"""Seconds of the units of a duration."""

Key = tuple[str | int, ...]
"""Path of a value in a recipe: ("data", "eval", 0, "path")."""


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors and values cannot be changed after loading."""

    # constants: a NaN among the options of a reward stays one on its way to the recipe file and to the
    # function
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


class Run(Section):
    name: str = Field(
        "run", pattern=NAME_PATTERN, description="names the run in the output folder and in wandb"
    )
    seed: int = Field(0, ge=0, description="decides data order, initial weights of tiny models and dropout")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps; null: `epochs` passes over the data"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training data when max_steps is not set")


class TinyModel(Section):
    """A random-weight model of a named architecture with a byte-level tokenizer: nothing to download."""

    architecture: str = Field(
        "llama", description="a transformers model type: llama, qwen2, gpt2, gemma, mistral, phi …"
    )
    hidden_size: int = Field(64, ge=8, description="width of the residual stream")
    layers: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads; default: as many as heads")
    intermediate_size: int | None = Field(
        None, ge=8, description="width of the feed-forward layer; default: the architecture's"
    )
    max_positions: int = Field(1024, ge=8, description="longest sequence in tokens")
    vocab_size: int | None = Field(
        None, ge=300, description="default: the byte tokenizer's size; larger pads the embedding"
    )


class Lora(Section):
    rank: int = Field(16, ge=1, description="of the update matrices")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of the adapter's input; drawn for each token from (seed, step, example, layer)",
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the linear layers that get an adapter"
    )


class Model(Section):
    path: str | None = Field(None, description="a folder or a Hugging Face hub name")
    revision: str | None = Field(None, description="hub revision; pin a commit for a reproducible run")
    trust_remote_code: bool = Field(False, description="runs code from the model repository: leave off")
    tiny: TinyModel | None = None
    lora: Lora | None = None
    chat_template: str | None = Field(
        None, description="a file with a Jinja chat template, for tokenizers without one"
    )
    reference: str | None = Field(
        None, description="folder or hub name of the reference policy; default: the start weights"
    )

    @model_validator(mode="after")
    def _one_model(self) -> "Model":
        if (self.path is None) == (self.tiny is None):
            raise ValueError("set exactly one of model.path (a folder or hub name) and model.tiny")
        return self


class Columns(Section):
    """Maps the recipe's field names to the names in the user's file, e.g. `chosen: preferred_answer`. A field
    is read from the column of its own name by default; null leaves it out, whatever the file holds."""

    messages: str | None = Field(
        "messages", description="a conversation; `conversations` (ShareGPT) is read where there is none"
    )
    text: str | None = Field("text", description="plain text, all of it learned")
    prompt: str | None = Field("prompt", description="text or messages")
    completion: str | None = Field("completion", description="the answer to the prompt")
    chosen: str | None = Field("chosen", description="the better answer")
    rejected: str | None = Field("rejected", description="the worse answer")
    label: str | None = Field("label", description="KTO: true for a wanted completion")
    margin: str | None = Field("margin", description="reward model: by how much chosen is better")
    answer: str | None = Field(
        "answer", description="what greedy generation and reward functions compare with"
    )
    tools: str | None = Field(
        "tools", description="the chat template's tools: a list of JSON schemas, or its JSON text"
    )
    chat_template_kwargs: str | None = Field(
        "chat_template_kwargs",
        description="further variables of the chat template, e.g. {enable_thinking: false}",
    )
    images: str | None = Field(
        "images",
        description="refused where a row has some (`image` too): models read text only; null: they are left "
        "out",
    )
    environment: str | None = Field(
        "environment",
        description="goes to rollouts.environment as part of the row; refused where there is none, null: "
        "left out",
    )


class Source(Section):
    path: str = Field(
        description="JSONL, JSON array, Parquet or CSV file or its URL (s3://…), a folder of them, "
        "`toy:NAME`, or a hub data set"
    )
    weight: float = Field(
        1.0, gt=0, description="passes over this source per epoch: 0.5 takes half of it, 2 takes it twice"
    )
    split: str | None = Field(
        None,
        description="of a hub data set, a folder with several splits, or toy data; default: train, of a "
        "folder its only split",
    )
    subset: str | None = Field(
        None, description="configuration of a hub data set, or its subfolder in a local folder"
    )
    revision: str | None = Field(None, description="hub revision; required for hub data sets")
    columns: Columns | None = Field(None, description="overrides data.columns for this source")
    max_rows: int | None = Field(None, ge=1, description="the first rows only")


class Data(Section):
    train: str | list[Source]
    eval: str | list[Source] | None = None
    max_bad_rows: int = Field(0, ge=0, description="rows that may be left out as unusable; each is named")
    columns: Columns = Columns()  # pyright: ignore[reportCallIssue]
    max_length: int = Field(1024, ge=2, description="tokens of prompt plus one completion")
    overlong: Literal["error", "drop", "truncate_prompt_left", "truncate_end"] = Field(
        "truncate_prompt_left", description="what becomes of a row longer than max_length"
    )
    remainder: Literal["drop", "use", "carry"] = Field(
        "carry", description="what becomes of an epoch's last partial batch"
    )
    append_eos: bool = Field(True, description="end plain-text completions with the eos token, as TRL does")


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
"""Algorithms that learn from rollouts of the policy itself; the others learn from rows."""


class Clip(Section):
    """Bounds of the probability ratio; defaults are the algorithm's own."""

    low: float | None = Field(None, ge=0, description="ratio is kept above 1 - low")
    high: float | None = Field(None, ge=0, description="ratio is kept below 1 + high (CISPO: below high)")
    dual: float | None = Field(
        None, gt=1, description="upper bound of the ratio where the advantage is negative (TRL's delta)"
    )


class Kl(Section):
    """KL of the policy from the reference, as a term of the loss or of the reward."""

    coefficient: float = Field(0.0, ge=0, description="0: none, and no reference policy is kept")
    place: Literal["loss", "reward"] = Field(
        "loss", description="a term of the loss, or taken from the reward"
    )
    estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        "auto", description="auto: k3 in the loss, k1 in the reward"
    )
    ratio: bool | None = Field(
        None,
        description="in the loss: times the probability ratio, as TRL's `use_bias_correction_kl`; default: "
        "GRPO's family, but not with k2",
    )
    target: float | None = Field(
        None, gt=0, description="adaptive: the coefficient is steered towards this KL (k3) per token"
    )
    horizon: float = Field(
        10_000.0,
        gt=0,
        description="adaptive: rollouts over which the coefficient may change by a factor e^0.2",
    )


class Correction(Section):
    """Importance correction for the gap between the generator's and the learner's log-probs (stale or other
    kernels)."""

    kind: Literal["none", "token", "sequence", "decoupled"] = Field(
        "token",
        description="token: TIS; sequence: whole sequences beyond `cap` are masked; decoupled: PPO around "
        "the learner's own log-probs",
    )
    cap: float = Field(2.0, gt=1, description="bound of the importance weight")
    alarm: float = Field(
        0.05,
        gt=0,
        description="mean |gap| in nat per token above which a note is written (strictly on-policy)",
    )


class AlgorithmConfig(Section):
    name: Literal[OfflineName, OnlineName] = Field(description="see [algorithms](algorithms.md)")
    loss: str | dict[str, float] | None = Field(
        None,
        description="one loss by name or a weighted mix, e.g. {sigmoid: 0.8, sft: 1.0}, or a function of "
        "your own, file.py:function; default: the algorithm's own",
    )
    advantage: str | None = Field(
        None,
        description="online: a function of your own that turns rewards into advantages, file.py:function; "
        "default: the algorithm's own",
    )
    beta: float = Field(
        0.1, gt=0, description="inverse temperature: how far the policy may move from the reference"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs assumed to be labelled the wrong way round"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="f-DPO: what replaces the log-ratio"
    )
    f_alpha: float = Field(0.5, description="the alpha of the alpha divergence")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight of tokens beyond the shared length"
    )
    wpo: bool = Field(False, description="WPO: weight pairs by their probability under the policy")
    ipo_length_average: bool = Field(
        True, description="IPO on per-token mean log-probs (TRL) or on their sums (paper)"
    )
    simpo_gamma: float = Field(0.5, description="SimPO target reward margin")
    discopop_tau: float = Field(0.05, gt=0, description="DiscoPOP: temperature of the mix")
    reward_centring: float = Field(
        0.0, ge=0, description="reward model: coefficient of (r_chosen + r_rejected)^2"
    )
    kto_desirable_weight: float = Field(1.0, gt=0, description="weight of wanted completions")
    kto_undesirable_weight: float = Field(1.0, gt=0, description="weight of unwanted completions")
    reference_sync_every: int | None = Field(
        None, ge=1, description="TR-DPO: steps between updates of the reference"
    )
    reference_sync_alpha: float = Field(
        0.6, gt=0, le=1, description="TR-DPO: ref <- alpha*policy + (1-alpha)*ref"
    )
    epochs: int = Field(
        1,
        ge=1,
        description="online: passes over each rollout batch, cut into mini-batches of batch.effective",
    )
    normaliser: Literal["auto", "token", "sequence", "constant"] = Field(
        "auto",
        description="online: what the loss is divided by, over the whole effective batch; constant: "
        "sequences x max_new_tokens",
    )
    clip: Clip = Clip()  # pyright: ignore[reportCallIssue]
    kl: Kl = Kl()  # pyright: ignore[reportCallIssue]
    correction: Correction = Correction()  # pyright: ignore[reportCallIssue]
    entropy_bonus: float = Field(0.0, ge=0, description="online: coefficient of the mean entropy per token")
    gamma: float = Field(1.0, gt=0, le=1, description="PPO: discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="PPO: GAE's lambda")
    value_clip: float | None = Field(
        0.2, gt=0, description="PPO: the critic's values move at most this far per rollout batch"
    )
    whiten: bool = Field(
        True, description="PPO: advantages of a rollout batch are brought to mean 0 and deviation 1"
    )
    scale_by_std: bool | None = Field(
        None,
        description="group advantages are divided by the group's deviation; default: the algorithm's own",
    )
    dynamic_sampling: bool | None = Field(
        None, description="groups of equal rewards are replaced by other prompts; default: DAPO only"
    )
    max_resampled: int = Field(
        3, ge=0, description="rollout batches that dynamic sampling may draw for one step, beyond the first"
    )
    mask_truncated: bool = Field(
        False, description="completions cut off at max_new_tokens do not count in the loss"
    )


class Batch(Section):
    effective: int = Field(
        256, ge=1, description="examples (pairs for DPO) in ONE optimizer step over all workers"
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="examples a worker holds at once; auto: a token budget found by a probe step"
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="token budget of a micro-batch, instead of micro_batch"
    )
    memory_utilisation: float = Field(
        0.8, gt=0, le=1, description="share of the memory limit that the plan may use"
    )
    memory_limit_gb: float | None = Field(
        None, gt=0, description="device memory per worker; default: the GPU's, on a CPU its share of RAM"
    )
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field(
        "auto", description="rows of a micro-batch; see [cutting](cutting.md)"
    )


class Optimizer(Section):
    learning_rate: float = Field(gt=0, description="of AdamW, after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the moments")
    eps: float = Field(1e-8, gt=0, description="of AdamW's denominator")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled; of all but biases and norms, as in transformers"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clips the gradient norm of the whole step; null: off"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(
        0, ge=0, description="optimizer steps, never micro-batches; from 0 at the first, as in transformers"
    )
    warmup_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the run's optimizer steps that warm up, rounded up, as in transformers",
    )
    min_learning_rate: float = Field(0.0, ge=0, description="where linear and cosine end")


class Offload(Section):
    optimizer: Literal["none", "cpu"] = Field("none", description="where AdamW's state lives")
    parameters: Literal["none", "cpu"] = Field("none", description="where ZeRO-3's parameters live")


class Workers(Section):
    """A group of workers whose number and GPUs may be left to the plan."""

    workers: Annotated[int, Field(ge=1)] | Literal["auto"]
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"]

    @property
    def count(self) -> int:
        """Workers of a planned run: the plan has put a number in the place of `auto`."""
        assert self.workers != "auto", "plan first"
        return self.workers

    @property
    def gpus(self) -> float:
        """GPUs of each worker of a planned run."""
        assert self.gpus_per_worker != "auto", "plan first"
        return self.gpus_per_worker


class Learners(Workers):
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="DeepSpeed ranks, each a Ray actor; auto: as many as there is room for beside the other "
        "actors",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0,
        description="0: on the CPU; auto: one where the machines have GPUs (half of it beside a colocated "
        "actor), else 0",
    )
    cpus_per_worker: float = Field(1, gt=0, description="reserved in Ray for each worker")
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field("auto", description="auto: the lowest whose state fits")
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16_autocast"] = Field(
        "fp32",
        description="of parameters and activations; master weights and accumulation are always fp32; auto: "
        "bf16 on GPUs that know it, else fp32",
    )
    sync: Literal["auto", "no_sync", "coalesced", "per_micro_batch"] = Field(
        "auto", description="how gradients are held back; see [cutting](cutting.md)"
    )
    offload: Offload = Offload()  # pyright: ignore[reportCallIssue]
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="what the backward computes again: all but matrix products and attention, or each "
        "layer; auto: what is quickest",
    )
    fused: bool = Field(
        False,
        description="norms and feed-forward blocks are compiled: fewer passes over a GPU's memory; ZeRO 0 "
        "to 2",
    )
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="deadline of one verb on every worker; what reads or writes the state has more, by its "
        "bytes",
    )
    start_timeout_s: float = Field(
        180.0, gt=0, description="deadline for the placement group and the process group"
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="times a lost worker group is rebuilt from the last checkpoint: within an hour, or "
        "while no newer one is written",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _a_word(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                f"{str(value).lower()} is no longer a value: use {'full' if value else 'none'}, or leave it "
                "to the plan (auto)"
            )
        return value

    @property
    def checkpointing(self) -> Literal["none", "selective", "full"]:
        """Of a planned run; none where nothing was planned."""
        return "none" if self.activation_checkpointing == "auto" else self.activation_checkpointing


class Reference(Section):
    cache_dir: str | None = Field(
        None, description="where reference log-probs are kept; default ~/.cache/orchestrator"
    )


class Rollouts(Workers):
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="rollout actors; auto: colocated one per learner, separate half of what there is room "
        "for",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0,
        description="of one actor; 0: on the CPU; auto: one where the machines have GPUs (half of it beside "
        "a colocated learner), else 0",
    )
    cpus_per_worker: float = Field(1, gt=0, description="reserved in Ray for each actor")
    placement: Literal["separate", "colocated"] = Field(
        "separate", description="colocated: actor i shares the bundle of learner worker i"
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="who decodes")
    batching: Literal["auto", "static", "continuous", "measured"] = Field(
        "auto",
        description="how the transformers engine decodes; auto: static on a CPU, continuous on a GPU; "
        "measured: each actor times both",
    )
    rows_at_once: int | None = Field(
        None,
        ge=1,
        description="sequences an actor decodes together; default: 64, with vLLM as many as it takes by "
        "itself",
    )
    prompts: int = Field(32, ge=1, description="prompts of one rollout batch")
    samples: int = Field(8, ge=1, description="completions of one prompt")
    max_new_tokens: int = Field(
        64, ge=1, description="tokens of a completion (multi-turn: of the whole episode)"
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="logits are divided by it, the learner's too; 0 (greedy) cannot be trained with",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling; 1: off; see [sampling](algorithms.md#sampling)"
    )
    top_k: int | None = Field(None, ge=1, description="the k likeliest tokens only")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="tokens below this share of the likeliest one's probability are left out"
    )
    stop: list[str] = Field([], description="texts that end a completion; they stay part of it")
    max_staleness: int = Field(
        0, ge=0, description="versions that generation may run ahead of learning; 0: strictly on-policy"
    )
    update: Literal["batch", "request"] = Field(
        "batch",
        description="batch: all of a rollout batch has one version; request: an actor takes the newest "
        "weights before each few prompts",
    )
    transport: Literal["auto", "object_store", "broadcast", "cuda_ipc"] = Field(
        "auto", description="how weights reach the actors"
    )
    bucket_mb: float = Field(256.0, gt=0, description="weights cross in buckets of this size")
    environment: str | None = Field(None, description="multi-turn: `module:Class` or `file.py:Class`")
    max_turns: int = Field(8, ge=1, description="multi-turn: turns of the model in one episode")
    replay: str | None = Field(
        None, description="a samples.jsonl to learn from instead of generating: for debugging"
    )
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="deadline of one piece of work of an actor; what moves weights has more, by their bytes",
    )
    start_timeout_s: float | None = Field(
        None,
        gt=0,
        description="deadline for an actor to be ready, and more by the model's bytes; default: 900 for "
        "vLLM on a GPU, else learners.start_timeout_s",
    )
    max_restarts: int = Field(
        8,
        ge=0,
        description="times a lost rollout actor is replaced: within an hour, or while nothing is rolled out",
    )

    @property
    def rows(self) -> int:
        """Sequences that an actor decodes together, as far as it is known before the engine is built."""
        return self.rows_at_once or (256 if self.engine == "vllm" else 64)


class RewardFunction(Section):
    """One component of the reward. Exactly one of function, model, url says what it is."""

    name: str = Field(pattern=NAME_PATTERN, description="of the component, in metrics")
    function: str | None = Field(
        None, description="`module:function`, `file.py:function`, or `trl:accuracy_reward` …"
    )
    model: str | None = Field(None, description="a trained reward model: a folder or hub name")
    revision: str | None = Field(None, description="hub revision of the model")
    url: str | None = Field(None, description="an HTTP endpoint that takes and returns batched JSON")
    weight: float = Field(1.0, description="of the component in the sum; 0: it is only watched")
    options: dict[str, Any] = Field(
        {}, description="keyword arguments of the function (or of the TRL function's maker)"
    )
    headers_from: dict[str, str] = Field(
        {}, description="HTTP header -> environment variable that holds its value"
    )
    gpus: float = Field(0, ge=0, description="of the scoring actor of a reward model")

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardFunction":
        if sum(kind is not None for kind in (self.function, self.model, self.url)) != 1:
            raise ValueError("set exactly one of function, model and url")
        return self


class Rewards(Section):
    functions: list[RewardFunction] = []
    timeout_s: float = Field(60.0, gt=0, description="deadline of one call")
    retries: int = Field(
        2, ge=0, description="further tries after a failure; then the group is dropped and counted"
    )
    max_dropped_fraction: float = Field(
        0.1, ge=0, le=1, description="of a rollout batch's groups; beyond it the run ends"
    )
    memory_limit_gb: float = Field(4.0, gt=0, description="of the process that runs reward functions")
    batch_size: int = Field(64, ge=1, description="completions per HTTP request or reward-model micro-batch")
    environment: list[str] = Field(
        [], description="variables that reward functions may see besides PATH, HOME, LANG …"
    )
    normalise: Literal["none", "running"] = Field(
        "none", description="running: rewards are divided by their running deviation"
    )


class Critic(Section):
    """PPO's value model: its own learner group. Its size and start weights are the policy's unless `model`
    says otherwise."""

    model: Model | None = None
    learning_rate: float | None = Field(None, gt=0, description="default: optimizer.learning_rate")
    workers: int = Field(1, ge=1, description="DeepSpeed ranks of the critic")
    gpus_per_worker: float = Field(0, ge=0, description="of one rank; 0: on the CPU")
    cpus_per_worker: float = Field(1, gt=0, description="reserved in Ray for each rank")
    warmup_steps: int = Field(0, ge=0, description="first rollout batches from which only the critic learns")
    export: bool = Field(False, description="writes export-critic/ at the end")


class Checkpoint(Section):
    every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=DURATION_PATTERN)] | None = Field(
        "10m",
        description="between checkpoints: optimizer steps, or time (90s, 10m, 1h); null: only at the end",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    final: Literal["full", "weights", "none"] = Field(
        "full",
        description="what stays of a run that is done: full can be extended; weights: the fp32 weights "
        "alone, a third of it; none: only the export",
    )

    @property
    def steps(self) -> int | None:
        """Optimizer steps between checkpoints, where they are counted."""
        return self.every if isinstance(self.every, int) else None

    @property
    def seconds(self) -> float | None:
        """Between checkpoints, where the time counts."""
        return float(self.every[:-1]) * DURATIONS[self.every[-1]] if isinstance(self.every, str) else None


class Export(Section):
    dtype: Literal["source", "fp32", "bf16", "fp16"] = Field(
        "source",
        description="of the exported weights; source: of the model that the run, or the pipeline, began "
        "with, or fp32 where an fp32 run would lose "
        "much of what it learned by rounding (an adapter's stay fp32)",
    )
    lora: Literal["both", "merged", "adapter"] = Field(
        "both",
        description="with model.lora: the whole model, with the adapter in adapter/ beside it; one of them "
        "alone",
    )


class Generation(Section):
    max_new_tokens: int = Field(64, ge=1, description="of an answer")
    max_prompts: int = Field(64, ge=1, description="held-out prompts that are answered")
    checker: Literal["exact_match", "last_number"] = Field(
        "exact_match", description="how a completion is compared with `answer`"
    )


class Evaluation(Section):
    every: int | None = Field(
        None, ge=1, description="steps between evaluations; null: at the start and at the end"
    )
    at_start: bool = Field(True, description="before the first step")
    max_examples: int | None = Field(None, ge=1, description="held-out examples")
    generate: Generation | None = Field(
        None, description="greedy generation on held-out prompts that have an answer"
    )
    worst_pairs: int = Field(8, ge=0, description="rows of the table of most-wrong pairs")
    max_prompts: int = Field(64, ge=1, description="online: held-out prompts")
    pass_at_k: int = Field(
        0,
        ge=0,
        description="online: samples per held-out prompt; pass@k: the share of prompts with one that passed",
    )
    pass_reward: float = Field(
        1.0, description="online: total reward from which a completion counts as passed"
    )


class Alerts(Section):
    """From when on a run says that something is wrong; docs/watching.md explains each rule."""

    steps: int = Field(
        10,
        ge=1,
        description="steps in a row for which something has to be wrong, and then right before it is told "
        "again",
    )
    reward_drop: float = Field(
        1.0,
        gt=0,
        description="fall of reward/mean under its best, in typical standard deviations of a reward",
    )
    reward_spread: float = Field(
        1e-3,
        ge=0,
        description="reward/std, as a share of its typical value, at which all rewards count as equal",
    )
    margin_growth: float = Field(
        0.5, gt=0, description="growth of rewards/margins that has to show in rewards/accuracies"
    )
    accuracy_gain: float = Field(0.01, gt=0, description="growth of rewards/accuracies that is enough for it")
    accuracy_enough: float = Field(
        0.9, gt=0, le=1, description="rewards/accuracies from which on margins may grow alone"
    )
    loss_rise: float = Field(
        1e-3, ge=0, description="rise of eval/loss above its first value, as a share of it, that is told"
    )
    kl: float = Field(1.0, gt=0, description="divergence from the reference, nat per token, that is told")
    component_fall: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of its start that a reward component may lose while reward/mean rises",
    )
    restarts: int = Field(3, ge=1, description="restarts within restarts_s")
    restarts_s: float = Field(3600.0, gt=0, description="seconds within which `restarts` alarm")
    goodput: float = Field(
        0.5, ge=0, le=1, description="least share of the time since the first start that is spent in steps"
    )
    goodput_after_s: float = Field(
        1800.0, ge=0, description="seconds since the first start before goodput is judged"
    )


class Tracking(Section):
    wandb: Literal["online", "offline", "off"] = Field(
        "offline", description="offline: recorded in the run folder, uploaded by `wandb sync`"
    )
    project: str = Field("orchestrator", description="in wandb")
    entity: str | None = Field(None, description="user or team in wandb; default: the account's")
    group: str | None = Field(None, description="groups runs in wandb: a sweep, or the stages of a pipeline")
    init_timeout_s: float = Field(30.0, gt=0, description="then the run goes on offline")
    finish_timeout_s: float = Field(60.0, gt=0, description="then the rest stays in the run folder")
    alerts: Alerts | None = Field(Alerts(), description="null: none")  # pyright: ignore[reportCallIssue]


class Recipe(Section):
    """A checked recipe: its sections as attributes."""

    run: Run = Run()  # pyright: ignore[reportCallIssue]
    model: Model
    data: Data
    algorithm: AlgorithmConfig
    batch: Batch = Batch()  # pyright: ignore[reportCallIssue]
    optimizer: Optimizer
    learners: Learners = Learners()  # pyright: ignore[reportCallIssue]
    rollouts: Rollouts = Rollouts()  # pyright: ignore[reportCallIssue]
    rewards: Rewards = Rewards()  # pyright: ignore[reportCallIssue]
    critic: Critic = Critic()  # pyright: ignore[reportCallIssue]
    reference: Reference = Reference()  # pyright: ignore[reportCallIssue]
    checkpoint: Checkpoint = Checkpoint()  # pyright: ignore[reportCallIssue]
    export: Export = Export()  # pyright: ignore[reportCallIssue]
    evaluation: Evaluation = Evaluation()  # pyright: ignore[reportCallIssue]
    tracking: Tracking = Tracking()  # pyright: ignore[reportCallIssue]

    def with_workers(self, count: int) -> "Recipe":
        """The same run on another number of learners."""
        return self._with_learners(workers=count)

    def in_one_process(self) -> "Recipe":
        """The same run on one learner, one critic and one rollout actor."""
        ones = {
            "rollouts": self.rollouts.model_copy(update={"workers": 1}),
            "critic": self.critic.model_copy(update={"workers": 1}),
        }
        return self.with_workers(1).model_copy(update=ones)

    def with_checkpointing(self, mode: Literal["none", "selective", "full"]) -> "Recipe":
        """The same run with activations computed again, or not."""
        return self._with_learners(activation_checkpointing=mode)

    def _with_learners(self, **changes: Any) -> "Recipe":
        return self.model_copy(update={"learners": self.learners.model_copy(update=changes)})
