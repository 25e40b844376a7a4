"""What of a recipe makes no sense with its model and data: legal, but hardly what anyone wants. A function
for each, a sentence with its number.

recipe, data, steps --what_makes_no_sense--> warnings of `orchestrator plan`, and of `train` before its first step
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.algorithms.schedule import warmup
from orchestrator.data.dataset import DataSet
from orchestrator.plan.planner import DataReport
from orchestrator.recipe.schema import ONLINE, Recipe

TOY = 5_000_000
"""Parameters below which a model is a toy, which learns at any rate."""
CUT_PROMPTS, CUT_ROWS = 0.01, 0.05
"""Shares of the rows of which prompts may be cut, and which may be dropped or lose the end of their answers,
before it is told."""
PASSES = 10.0
"""Passes over the data from which on a model learns it by heart."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates of AdamW: from `low` to `high` is what the field uses, above `most` a pretrained model
    breaks, below `least` nothing moves."""

    least: float
    low: float
    high: float
    most: float


FULL = {"sft": Rates(1e-7, 1e-5, 2e-5, 1e-4), "reward": Rates(1e-7, 1e-6, 1e-5, 1e-4)}
FULL_PREFERENCE = Rates(1e-8, 5e-7, 1e-6, 1e-5)
FULL_ONLINE = Rates(1e-8, 5e-7, 3e-6, 1e-5)
ADAPTER = {"sft": Rates(1e-6, 1e-4, 2e-4, 2e-3), "reward": Rates(1e-6, 1e-5, 2e-4, 2e-3)}
ADAPTER_OTHERS = Rates(1e-7, 1e-5, 2e-4, 5e-4)
"""Full fine-tunes by kind, then adapters. Zephyr, Tulu 3 and OpenRLHF take 5e-7 for DPO, TRL 1e-6 for DPO and
GRPO and 2e-5 for SFT; LoRA takes about ten times as much (TRL's documentation). `most` is ten times what is
usual: a 135M model loses its language at 5e-4."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the senses look at. steps: of the loop; optimizer_steps: what the schedule counts; parameters: of
    the model."""

    recipe: Recipe
    data: DataSet
    report: DataReport
    steps: int
    optimizer_steps: int
    parameters: int

    @property
    def pretrained(self) -> bool:
        """Weights of a real model, which can be broken."""
        return self.recipe.model.path is not None and self.parameters >= TOY

    @property
    def online(self) -> bool:
        return self.recipe.algorithm.name in ONLINE


def rates_of(recipe: Recipe) -> Rates:
    """What is usual for an algorithm, with all weights or with an adapter."""
    name = recipe.algorithm.name
    if recipe.model.lora is not None:
        return ADAPTER.get(name, ADAPTER_OTHERS)
    return FULL.get(name, FULL_ONLINE if name in ONLINE else FULL_PREFERENCE)


def learning_rate(seen: Seen) -> str | None:
    """Too high for weights that know something, or too low to move them."""
    rate, usual, recipe = seen.recipe.optimizer.learning_rate, rates_of(seen.recipe), seen.recipe
    if not seen.pretrained or usual.least <= rate <= usual.most:
        return None
    what = (
        f"{recipe.algorithm.name} of "
        f"{'an adapter' if recipe.model.lora is not None else 'all weights of a pretrained model'}"
    )
    effect = "is likely to ruin it" if rate > usual.most else "hardly moves it"
    key = f"optimizer.learning_rate={rate:g}"
    return (
        f"{key} {effect}: {what} takes {usual.low:g} to {usual.high:g}, "
        f"{'at most' if rate > usual.most else 'at least'} {_bound(usual, rate):g}"
    )


def _bound(usual: Rates, rate: float) -> float:
    return usual.most if rate > usual.most else usual.least


def batch(seen: Seen) -> str | None:
    """More examples in a step than there are."""
    recipe, rows = seen.recipe, seen.report.kept
    asked = recipe.rollouts.prompts if seen.online else recipe.batch.effective
    if asked <= rows or recipe.data.remainder != "carry":
        return None
    key = "rollouts.prompts" if seen.online else "batch.effective"
    return (
        f"{key}={asked} is more than the {rows} rows: each stands {asked / rows:.1f} times in one step. "
        f"Set it to {rows} or less"
    )


def warm_up(seen: Seen) -> str | None:
    """A schedule that never reaches its rate."""
    optimizer, first = seen.recipe.optimizer, warmup(seen.recipe.optimizer, seen.optimizer_steps)
    if not first or first < seen.optimizer_steps:
        return None
    key = (
        f"optimizer.warmup_steps={optimizer.warmup_steps}"
        if optimizer.warmup_steps
        else f"optimizer.warmup_ratio={optimizer.warmup_ratio:g}"
    )
    reached = optimizer.learning_rate * (seen.optimizer_steps - 1) / first
    return (
        f"{key} warms up for {first} of {seen.optimizer_steps} optimizer steps: the rate reaches "
        f"{reached:.2g}, never {optimizer.learning_rate:g}. "
        f"Set optimizer.warmup_steps below {max(1, seen.optimizer_steps // 2)}, or a longer run"
    )


def passes(seen: Seen) -> str | None:
    """Few rows, again and again."""
    asked = seen.recipe.rollouts.prompts if seen.online else seen.recipe.batch.effective
    epochs = seen.steps * asked / seen.report.kept
    if not seen.pretrained or epochs <= PASSES:
        return None
    return (
        f"{seen.steps} steps of {asked} are {epochs:.0f} passes over {seen.report.kept} rows: beyond "
        f"{PASSES:g} a model learns them by heart"
    )


def prompts_cut(seen: Seen) -> str | None:
    """Prompts that are not what the user wrote."""
    report, data = seen.report, seen.recipe.data
    if data.overlong != "truncate_prompt_left" or report.truncated <= CUT_PROMPTS * report.rows:
        return None
    turns, share = (
        f", {report.turns} of them by whole turns" if report.turns else "",
        report.truncated / report.rows,
    )
    return (
        f"data.max_length={data.max_length} cuts {report.truncated} of {report.rows} prompts "
        f"({share:.1%}){turns}{_longer(seen)}"
    )


def answers_cut(seen: Seen) -> str | None:
    """Answers without their end teach not to end."""
    report, data = seen.report, seen.recipe.data
    if data.overlong != "truncate_end" or report.truncated <= CUT_ROWS * report.rows:
        return None
    share = report.truncated / report.rows
    return (
        f"data.max_length={data.max_length} cuts the end of {report.truncated} of {report.rows} rows "
        f"({share:.1%}){_longer(seen)}"
    )


def rows_dropped(seen: Seen) -> str | None:
    """Rows that are too long to be kept."""
    report, data = seen.report, seen.recipe.data
    if report.dropped <= CUT_ROWS * report.rows:
        return None
    return (
        f"data.max_length={data.max_length} drops {report.dropped} of {report.rows} rows "
        f"({report.dropped / report.rows:.1%}){_longer(seen)}"
    )


def pairs_made_equal(seen: Seen) -> str | None:
    """Pairs of which nothing can be learned."""
    equal = seen.report.made_identical
    return (
        f"{equal} pairs are equal once cut to data.max_length={seen.recipe.data.max_length}: they teach "
        f"nothing{_longer(seen)}"
        if equal
        else None
    )


def plain_text_for_a_chat_model(seen: Seen) -> str | None:
    """A chat model asked without its template answers as no user will ask it."""
    tokenizer = seen.data.tokenizer
    if not seen.pretrained or tokenizer is None or not tokenizer.chat_template:
        return None
    plain = [
        name
        for name, form in zip(seen.report.sources, seen.report.formats, strict=True)
        if form.endswith(", text")
    ]
    if not plain:
        return None
    return (
        f"{', '.join(plain)} holds plain text, and the model has a chat template, which is not applied: "
        "give messages to train it as it is used"
    )


def _longer(seen: Seen) -> str:
    return f". Raise data.max_length{'' if not seen.online else ' (prompt and completion together)'}"


SENSES: tuple[Callable[[Seen], str | None], ...] = (
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


def what_makes_no_sense(seen: Seen) -> tuple[str, ...]:
    """A sentence for each sense that finds something."""
    return tuple(said for sense in SENSES if (said := sense(seen)) is not None)
