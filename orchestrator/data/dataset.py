"""From the recipe's `data` section to batches: read, validate, encode, order. No model weights, no workers.

sources --load_rows--> rows --encode_rows--> groups --Order, Batches--> the examples of any optimizer step
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Row, SequenceGroup
from orchestrator.core.errors import DataError
from orchestrator.data.bad_rows import BadRow, check_bad
from orchestrator.data.formats import Reads
from orchestrator.data.kto_pairs import with_mismatched
from orchestrator.data.order import Batches, Order
from orchestrator.data.sources import LoadedRows, check_apart, load_rows
from orchestrator.data.tokenize import Encoded, Encoder, EncodingReport, bad_row, encode_rows
from orchestrator.recipe.schema import Model, Recipe, Source


@dataclass(frozen=True, slots=True)
class PlanInput:
    """What the planner has to know of the data.

    Rows of a data set, the longest rollouts that prompts can lead to, or rows of given lengths.
    """

    tokenizer: Any
    """None for rows that were made up."""
    loaded: LoadedRows
    """Rows of data.train."""
    report: EncodingReport
    groups: tuple[SequenceGroup, ...]
    """Training examples in row order."""
    batches: Batches[SequenceGroup]
    """Training examples of an optimizer step by the cursor of consumed examples."""
    held_out: tuple[SequenceGroup, ...] = ()
    """Examples for evaluation."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids of held-out prompts with an expected answer, for generation."""
    unused: tuple[str, ...] = ()
    """Columns that nothing reads."""
    notes: tuple[str, ...] = ()
    """What else the user should know of the data."""


@dataclass(frozen=True, slots=True)
class DataSet(PlanInput):
    """Everything that the offline loop reads."""

    held_out_report: EncodingReport | None = None
    held_out_names: tuple[str, ...] = ()
    """Names of the sources of data.eval."""
    answers: tuple[str, ...] = ()
    """Expected answer of each of `prompts`."""

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)


def load_data(recipe: Recipe, algorithm: AlgorithmSpec, load_tokenizer: Callable[[Model], Any]) -> DataSet:
    """Reads and checks all data of a recipe; DataError or MissingInput before anything expensive starts.

    load_tokenizer: called after the rows are read, so that a mistake in the data is reported first.
    """
    reads = Reads(margin=algorithm.name == "reward", answer=False)
    loaded = load_rows(recipe.data.train, recipe.data, algorithm.data, reads)
    held_out = None
    if recipe.data.eval is not None:
        answered = replace(reads, answer=recipe.evaluation.generate is not None and algorithm.head == "lm")
        held_out = load_rows(held_out_source(recipe.data.eval), recipe.data, algorithm.data, answered)
    unused, notes = seen_in(loaded, held_out)
    tokenizer = load_tokenizer(recipe.model)
    train = _encode(loaded, tokenizer, recipe, algorithm)
    sizes = Counter(group.source for group in train.groups)
    order = Order([sizes[s] for s in range(len(loaded.sizes))], loaded.weights, recipe.run.seed)
    held = None if held_out is None else _encode(_first(held_out, recipe), tokenizer, recipe, algorithm)
    prompts, answers = _prompts(held_out, tokenizer, recipe, algorithm)
    return DataSet(
        tokenizer=tokenizer,
        loaded=loaded,
        report=train.report,
        groups=train.groups,
        batches=Batches(train.groups, order, recipe.batch.effective, recipe.data.remainder),
        held_out=() if held is None else held.groups,
        held_out_report=None if held is None else held.report,
        held_out_names=() if held_out is None else held_out.names,
        prompts=prompts,
        answers=answers,
        unused=unused,
        notes=(*notes, *train.report.notes),
    )


def seen_in(loaded: LoadedRows, held_out: LoadedRows | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(columns that are not read in any of the rows, notes).

    ConfigError if all held-out rows are trained on.
    """
    if held_out is None:
        return loaded.unused, loaded.notes
    unused = [name for name in loaded.unused if name not in held_out.used]
    unused += [name for name in held_out.unused if name not in {*unused, *loaded.used, *held_out.used}]
    shared = check_apart(loaded, held_out)
    return tuple(unused), (*loaded.notes, *held_out.notes, *([shared] if shared else []))


def held_out_source(spec: str | list[Source]) -> str | list[Source]:
    """data.eval as sources. A toy task given as a plain string means its held-out half."""
    if isinstance(spec, str) and spec.startswith("toy:"):
        return [Source(path=spec, split="eval")]  # pyright: ignore[reportCallIssue]
    return spec


def _encode(loaded: LoadedRows, tokenizer: Any, recipe: Recipe, algorithm: AlgorithmSpec) -> Encoded:
    encoded = encode_rows(loaded.rows, tokenizer, recipe.data, algorithm.data, loaded.bad)
    if algorithm.name != "kto":
        return encoded
    return Encoded(with_mismatched(encoded.groups, recipe.data.max_length), encoded.report)


def _first(loaded: LoadedRows, recipe: Recipe) -> LoadedRows:
    limit = recipe.evaluation.max_examples
    return loaded if limit is None else replace(loaded, rows=loaded.rows[:limit])


def _prompts(
    held_out: LoadedRows | None, tokenizer: Any, recipe: Recipe, algorithm: AlgorithmSpec
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Prompts of distinct held-out rows that have an answer, as many as the recipe asks for."""
    generation = recipe.evaluation.generate
    if held_out is None or generation is None or algorithm.head != "lm":
        return (), ()
    encoder = Encoder(tokenizer, recipe.data, algorithm.data)
    chosen: dict[tuple[int, ...], str] = {}
    bad: list[BadRow] = []
    for row in held_out.rows:
        if row.answer is None or not _has_prompt(row):
            continue
        try:
            chosen.setdefault(encoder.prompt_tokens(row), row.answer)
        except DataError as error:
            bad.append(bad_row(row, error))
        if len(chosen) == generation.max_prompts:
            break
    check_bad([*held_out.bad, *bad], recipe.data.max_bad_rows)
    return tuple(chosen), tuple(chosen.values())


def _has_prompt(row: Row) -> bool:
    return row.messages is not None or bool(row.prompt)
