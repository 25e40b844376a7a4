"""Schema of a run: its steps (`run`, `batch`, `optimizer`), its workers (`learners`, `reference`), and its
output (`checkpoint`, `export`, `evaluation`, `tracking`)."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from orchestrator.recipe.section import DURATION_PATTERN, DURATIONS, NAME_PATTERN, Section, Workers


class Run(Section):
    name: str = Field(
        "run", pattern=NAME_PATTERN, description="Name of the run in the output folder and in wandb."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the data order, the initial weights of tiny models and dropout."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Number of optimizer steps; null: as many as `epochs` passes take."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training data, if max_steps is not set.")


class Batch(Section):
    effective: int = Field(
        256, ge=1, description="Examples (pairs for DPO) of ONE optimizer step over all workers."
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Examples that a worker computes at once; auto: a token budget found by a probe step.",
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="Token budget of a micro-batch, instead of micro_batch."
    )
    memory_utilisation: float = Field(
        0.8, gt=0, le=1, description="Share of the memory limit that the plan may use."
    )
    memory_limit_gb: float | None = Field(
        None, gt=0, description="Device memory per worker; default: the GPU's, on a CPU its share of RAM."
    )
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field(
        "auto", description="Layout of a micro-batch's rows; see [cutting](cutting.md)."
    )


class Optimizer(Section):
    learning_rate: float = Field(gt=0, description="Learning rate of AdamW after the warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of AdamW's moments.")
    eps: float = Field(1e-8, gt=0, description="Epsilon in AdamW's denominator.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay of all but biases and norms, as in transformers."
    )
    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        description="Largest gradient norm of the whole step, beyond which it is clipped; null: off.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Schedule of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps (never micro-batches) of the warm-up, which starts at 0, as in "
        "transformers.",
    )
    warmup_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the run's optimizer steps that warm up, rounded up, as in transformers.",
    )
    min_learning_rate: float = Field(0.0, ge=0, description="Learning rate at which linear and cosine end.")


class Offload(Section):
    optimizer: Literal["none", "cpu"] = Field("none", description="Place of AdamW's state; none: the device.")
    parameters: Literal["none", "cpu"] = Field(
        "none", description="Place of ZeRO-3's parameters; none: the device."
    )


class Learners(Workers):
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Number of DeepSpeed ranks, each a Ray actor; auto: as many as there is room for beside"
        " the other actors.",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0,
        description="GPUs of each rank; 0: on the CPU; auto: one if the machines have GPUs (half of it "
        "beside a colocated actor), else 0.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each worker.")
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto", description="ZeRO stage; auto: the lowest whose state fits."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16_autocast"] = Field(
        "fp32",
        description="Precision of parameters and activations; master weights and accumulation are always "
        "fp32; auto: bf16 on GPUs that compute in it, else fp32.",
    )
    sync: Literal["auto", "no_sync", "coalesced", "per_micro_batch"] = Field(
        "auto", description="Policy by which gradients are held back; see [cutting](cutting.md)."
    )
    offload: Offload = Offload()  # pyright: ignore[reportCallIssue]
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="Part of the forward that the backward computes again: all but matrix products and "
        "attention (selective), or each layer (full); auto: the quickest.",
    )
    fused: bool = Field(
        False,
        description="Whether norms and feed-forward blocks are compiled: fewer passes over a GPU's memory; "
        "ZeRO 0 to 2.",
    )
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="Deadline of one call on every worker; calls that read or write the state get more, by "
        "its bytes.",
    )
    start_timeout_s: float = Field(
        180.0, gt=0, description="Deadline for the placement group and the process group."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Times that a lost worker group is rebuilt from the last checkpoint: within an hour, or"
        " while no newer one is written.",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _reject_boolean(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                f"{str(value).lower()} is not a value any more: use {'full' if value else 'none'}, or auto"
                " to leave it to the plan"
            )
        return value

    @property
    def checkpointing(self) -> Literal["none", "selective", "full"]:
        """Activation checkpointing of a planned run; none before the plan."""
        return "none" if self.activation_checkpointing == "auto" else self.activation_checkpointing


class Reference(Section):
    cache_dir: str | None = Field(
        None, description="Folder of the reference log-probs; default ~/.cache/orchestrator."
    )


class Checkpoint(Section):
    every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=DURATION_PATTERN)] | None = Field(
        "10m",
        description="Interval of checkpoints: optimizer steps, or time (90s, 10m, 1h); null: only at the "
        "end.",
    )
    keep: int = Field(2, ge=1, description="Number of newest checkpoints that stay on disk.")
    final: Literal["full", "weights", "none"] = Field(
        "full",
        description="Files that stay of a finished run; full: it can be extended; weights: the fp32 weights"
        " alone, a third of it; none: only the export.",
    )

    @property
    def steps(self) -> int | None:
        """Optimizer steps between checkpoints; None if `every` is a time or null."""
        return self.every if isinstance(self.every, int) else None

    @property
    def seconds(self) -> float | None:
        """Seconds between checkpoints; None if `every` is a number of steps or null."""
        return float(self.every[:-1]) * DURATIONS[self.every[-1]] if isinstance(self.every, str) else None


class Export(Section):
    dtype: Literal["source", "fp32", "bf16", "fp16"] = Field(
        "source",
        description="Dtype of the exported weights; source: that of the model that the run, or the "
        "pipeline, began with, or fp32 if an fp32 run would lose much of what it learned by "
        "rounding (an adapter's stay fp32).",
    )
    lora: Literal["both", "merged", "adapter"] = Field(
        "both",
        description="Form of the export with model.lora: the whole model with the adapter in adapter/ "
        "beside it, or one of them alone.",
    )


class Generation(Section):
    max_new_tokens: int = Field(64, ge=1, description="Most tokens of an answer.")
    max_prompts: int = Field(64, ge=1, description="Number of held-out prompts that are answered.")
    checker: Literal["exact_match", "last_number"] = Field(
        "exact_match", description="Comparison of a completion with `answer`."
    )


class Evaluation(Section):
    every: int | None = Field(
        None, ge=1, description="Steps between evaluations; null: at the start and at the end."
    )
    at_start: bool = Field(True, description="Whether the run evaluates before the first step.")
    max_examples: int | None = Field(None, ge=1, description="Most held-out examples.")
    generate: Generation | None = Field(
        None, description="Greedy generation on held-out prompts that have an answer."
    )
    worst_pairs: int = Field(8, ge=0, description="Rows of the table of most-wrong pairs.")
    max_prompts: int = Field(64, ge=1, description="Online: most held-out prompts.")
    pass_at_k: int = Field(
        0,
        ge=0,
        description="Online: samples per held-out prompt; pass@k is the share of prompts with a sample that"
        " passed.",
    )
    pass_reward: float = Field(
        1.0, description="Online: total reward from which a completion counts as passed."
    )


class Alerts(Section):
    """Thresholds of the alerts of a run. docs/watching.md explains each rule."""

    steps: int = Field(
        10,
        ge=1,
        description="Steps in a row for which a problem has to last, and then be gone before it is reported"
        " again.",
    )
    reward_drop: float = Field(
        1.0,
        gt=0,
        description="Fall of reward/mean under its best, in typical standard deviations of a reward.",
    )
    reward_spread: float = Field(
        1e-3,
        ge=0,
        description="Value of reward/std, as a share of its typical value, at which all rewards count as "
        "equal.",
    )
    margin_growth: float = Field(
        0.5, gt=0, description="Growth of rewards/margins that has to show in rewards/accuracies."
    )
    accuracy_gain: float = Field(
        0.01, gt=0, description="Growth of rewards/accuracies that is enough for such a growth of margins."
    )
    accuracy_enough: float = Field(
        0.9, gt=0, le=1, description="Value of rewards/accuracies from which margins may grow alone."
    )
    loss_rise: float = Field(
        1e-3, ge=0, description="Rise of eval/loss above its first value, as a share of it, that is reported."
    )
    kl: float = Field(
        1.0, gt=0, description="Divergence from the reference, in nat per token, that is reported."
    )
    component_fall: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of its start that a reward component may lose while reward/mean rises.",
    )
    restarts: int = Field(3, ge=1, description="Restarts within restarts_s that are reported.")
    restarts_s: float = Field(3600.0, gt=0, description="Seconds within which `restarts` are counted.")
    goodput: float = Field(
        0.5, ge=0, le=1, description="Least share of the time since the first start that is spent in steps."
    )
    goodput_after_s: float = Field(
        1800.0, ge=0, description="Seconds since the first start before goodput is checked."
    )


class Tracking(Section):
    wandb: Literal["online", "offline", "off"] = Field(
        "offline", description="Mode of wandb; offline: recorded in the run folder, uploaded by `wandb sync`."
    )
    project: str = Field("orchestrator", description="Project in wandb.")
    entity: str | None = Field(None, description="User or team in wandb; default: the account's.")
    group: str | None = Field(
        None, description="Group of the run in wandb: a sweep, or the stages of a pipeline."
    )
    init_timeout_s: float = Field(
        30.0, gt=0, description="Seconds to reach wandb; after them the run continues offline."
    )
    finish_timeout_s: float = Field(
        60.0, gt=0, description="Seconds to upload at the end; after them the rest stays in the run folder."
    )
    alerts: Alerts | None = Field(
        Alerts(),  # pyright: ignore[reportCallIssue]
        description="Thresholds of alerts; null: none.",
    )
