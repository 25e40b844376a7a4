"""Sanity checks of a recipe with its model and data: settings that are legal and hardly intended.

    recipe, data, steps --sanity_warnings--> warnings of `orchestrator plan`, and of `train` at its start

Each check is a function that returns a sentence with the numbers, or None.
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.algorithms.schedule import warmup
from orchestrator.data.dataset import PlanInput
from orchestrator.plan.data_report import DataReport
from orchestrator.recipe.schema import ONLINE, Recipe

TOY = 5_000_000
"""Parameters below which a model is a toy, which learns at any learning rate."""
MAX_CUT_PROMPTS, MAX_CUT_ROWS = 0.01, 0.05
"""Largest shares of rows whose prompts are cut, and that are dropped or lose the end of their answers,
without a warning."""
MAX_PASSES = 10.0
"""Passes over the data beyond which a model memorises it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates of AdamW for one kind of training. Example: Rates(1e-8, 5e-7, 1e-6, 1e-5) for DPO."""

    least: float
    """Below it the weights hardly change."""
    low: float
    """Lowest usual rate."""
    high: float
    """Highest usual rate."""
    most: float
    """Above it a pretrained model breaks."""


FULL = {"sft": Rates(1e-7, 1e-5, 2e-5, 1e-4), "reward": Rates(1e-7, 1e-6, 1e-5, 1e-4)}
FULL_PREFERENCE = Rates(1e-8, 5e-7, 1e-6, 1e-5)
FULL_ONLINE = Rates(1e-8, 5e-7, 3e-6, 1e-5)
ADAPTER = {"sft": Rates(1e-6, 1e-4, 2e-4, 2e-3), "reward": Rates(1e-6, 1e-5, 2e-4, 2e-3)}
ADAPTER_OTHERS = Rates(1e-7, 1e-5, 2e-4, 5e-4)
"""Rates of full fine-tuning, then of adapters. Zephyr, Tulu 3 and OpenRLHF use 5e-7 for DPO, TRL uses 1e-6
for DPO and GRPO and 2e-5 for SFT. LoRA uses about ten times as much (TRL's documentation). `most` is ten
times the usual rate: a 135M model loses its language at 5e-4."""


@dataclass(frozen=True, slots=True)
class SanityInputs:
    """Inputs of the checks."""

    recipe: Recipe
    """The recipe."""
    data: PlanInput
    """The encoded data."""
    report: DataReport
    """The report on the data."""
    steps: int
    """Steps of the loop."""
    optimizer_steps: int
    """Optimizer steps of the learning rate's schedule."""
    parameters: int
    """Parameters of the model."""

    @property
    def pretrained(self) -> bool:
        """Whether the weights are those of a real model, which training can break."""
        return self.recipe.model.path is not None and self.parameters >= TOY

    @property
    def online(self) -> bool:
        """Whether the algorithm learns from rollouts."""
        return self.recipe.algorithm.name in ONLINE


def rates_of(recipe: Recipe) -> Rates:
    """Usual learning rates of an algorithm, for all weights or for an adapter."""
    name = recipe.algorithm.name
    if recipe.model.lora is not None:
        return ADAPTER.get(name, ADAPTER_OTHERS)
    return FULL.get(name, FULL_ONLINE if name in ONLINE else FULL_PREFERENCE)


def learning_rate(inputs: SanityInputs) -> str | None:
    """A learning rate that is too high for pretrained weights, or too low to change them."""
    rate, usual, recipe = inputs.recipe.optimizer.learning_rate, rates_of(inputs.recipe), inputs.recipe
    if not inputs.pretrained or usual.least <= rate <= usual.most:
        return None
    what = (
        f"{recipe.algorithm.name} of "
        f"{'an adapter' if recipe.model.lora is not None else 'all weights of a pretrained model'}"
    )
    effect = "is likely to break the model" if rate > usual.most else "hardly changes the model"
    key = f"optimizer.learning_rate={rate:g}"
    return (
        f"{key} {effect}: {what} usually takes {usual.low:g} to {usual.high:g}, "
        f"{'at most' if rate > usual.most else 'at least'} {_bound(usual, rate):g}"
    )


def _bound(usual: Rates, rate: float) -> float:
    return usual.most if rate > usual.most else usual.least


def batch(inputs: SanityInputs) -> str | None:
    """A step with more examples than the data has."""
    recipe, rows = inputs.recipe, inputs.report.kept
    examples = recipe.rollouts.prompts if inputs.online else recipe.batch.effective
    if examples <= rows or recipe.data.remainder != "carry":
        return None
    key = "rollouts.prompts" if inputs.online else "batch.effective"
    return (
        f"{key}={examples} is more than the {rows} rows: each is in one step {examples / rows:.1f} times. "
        f"Set it to {rows} or less"
    )


def warm_up(inputs: SanityInputs) -> str | None:
    """A schedule that never reaches its learning rate."""
    optimizer, first = inputs.recipe.optimizer, warmup(inputs.recipe.optimizer, inputs.optimizer_steps)
    if not first or first < inputs.optimizer_steps:
        return None
    key = (
        f"optimizer.warmup_steps={optimizer.warmup_steps}"
        if optimizer.warmup_steps
        else f"optimizer.warmup_ratio={optimizer.warmup_ratio:g}"
    )
    reached = optimizer.learning_rate * (inputs.optimizer_steps - 1) / first
    return (
        f"{key} warms up for {first} of {inputs.optimizer_steps} optimizer steps: the rate reaches "
        f"{reached:.2g}, never {optimizer.learning_rate:g}. "
        f"Set optimizer.warmup_steps below {max(1, inputs.optimizer_steps // 2)}, or a longer run"
    )


def passes(inputs: SanityInputs) -> str | None:
    """Many passes over few rows."""
    examples = inputs.recipe.rollouts.prompts if inputs.online else inputs.recipe.batch.effective
    epochs = inputs.steps * examples / inputs.report.kept
    if not inputs.pretrained or epochs <= MAX_PASSES:
        return None
    return (
        f"{inputs.steps} steps of {examples} are {epochs:.0f} passes over {inputs.report.kept} rows: beyond "
        f"{MAX_PASSES:g} a model memorises them"
    )


def prompts_cut(inputs: SanityInputs) -> str | None:
    """Prompts that are cut."""
    report, data = inputs.report, inputs.recipe.data
    if data.overlong != "truncate_prompt_left" or report.truncated <= MAX_CUT_PROMPTS * report.rows:
        return None
    turns, share = (
        f", {report.turns} of them by whole turns" if report.turns else "",
        report.truncated / report.rows,
    )
    return (
        f"data.max_length={data.max_length} cuts {report.truncated} of {report.rows} prompts "
        f"({share:.1%}){turns}{_longer(inputs)}"
    )


def answers_cut(inputs: SanityInputs) -> str | None:
    """Answers that are cut, which teach the model not to end."""
    report, data = inputs.report, inputs.recipe.data
    if data.overlong != "truncate_end" or report.truncated <= MAX_CUT_ROWS * report.rows:
        return None
    share = report.truncated / report.rows
    return (
        f"data.max_length={data.max_length} cuts the end of {report.truncated} of {report.rows} rows "
        f"({share:.1%}){_longer(inputs)}"
    )


def rows_dropped(inputs: SanityInputs) -> str | None:
    """Rows that are dropped because they are too long."""
    report, data = inputs.report, inputs.recipe.data
    if report.dropped <= MAX_CUT_ROWS * report.rows:
        return None
    return (
        f"data.max_length={data.max_length} drops {report.dropped} of {report.rows} rows "
        f"({report.dropped / report.rows:.1%}){_longer(inputs)}"
    )


def pairs_made_equal(inputs: SanityInputs) -> str | None:
    """Pairs that are equal once cut, from which nothing can be learned."""
    equal = inputs.report.made_identical
    return (
        f"{equal} pairs are equal once cut to data.max_length={inputs.recipe.data.max_length}: nothing can "
        f"be learned from them{_longer(inputs)}"
        if equal
        else None
    )


def plain_text_for_a_chat_model(inputs: SanityInputs) -> str | None:
    """Plain text for a model with a chat template, which its users will apply."""
    tokenizer = inputs.data.tokenizer
    if not inputs.pretrained or tokenizer is None or not tokenizer.chat_template:
        return None
    plain = [
        name
        for name, form in zip(inputs.report.sources, inputs.report.formats, strict=True)
        if form.endswith(", text")
    ]
    if not plain:
        return None
    return (
        f"{', '.join(plain)} holds plain text, and the model has a chat template, which is not applied: "
        "give messages to train it as it is used"
    )


def _longer(inputs: SanityInputs) -> str:
    """The fix for rows that were cut."""
    return f". Raise data.max_length{'' if not inputs.online else ' (prompt and completion together)'}"


CHECKS: tuple[Callable[[SanityInputs], str | None], ...] = (
    learning_rate,
    batch,
    warm_up,
    passes,
    prompts_cut,
    answers_cut,
    rows_dropped,
    pairs_made_equal,
    plain_text_for_a_chat_model,
)


def sanity_warnings(inputs: SanityInputs) -> tuple[str, ...]:
    """The warnings of all checks."""
    return tuple(warning for check in CHECKS if (warning := check(inputs)) is not None)
