"""From the recipe's `data` section to prompts for rollouts, and what the planner has to know of them.

sources --load_rows--> rows --encode--> Prompt --Order, Batches--> the prompts of any rollout batch
                                          |
                                          +-- with full-length completions --> SequenceGroups: the longest steps there can be
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Branch, Experience, Row, SequenceGroup
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.core.rollouts import Prompt
from orchestrator.data.bad_rows import check_bad
from orchestrator.data.dataset import DataSet, held_out_source, seen_in
from orchestrator.data.formats import Reads
from orchestrator.data.order import Batches, Order
from orchestrator.data.sources import LoadedRows, load_rows
from orchestrator.data.tokenize import Encoder, EncodingReport, bad_row
from orchestrator.data.turns import said_of, with_fewer_turns
from orchestrator.recipe.schema import Model, Recipe


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts to sample from. batches: by prompt cursor; held_out: for evaluation; longest: the data set that
    the longest possible rollouts would make, for the plan, the memory probe and the start-up checks."""

    tokenizer: Any
    loaded: LoadedRows
    batches: Batches[Prompt]
    held_out: tuple[Prompt, ...]
    longest: DataSet


def load_prompts(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    load_tokenizer: Callable[[Model], Any],
    rewarded: frozenset[str] | None,
) -> PromptSet:
    """Reads and checks all prompts of a recipe; DataError, ConfigError or MissingInput before anything
    expensive starts.

    rewarded: columns that the reward's components read; None if all columns go to one of them.
    """
    tokenizer = load_tokenizer(recipe.model)
    reads = _reads(recipe, rewarded)
    loaded = load_rows(recipe.data.train, recipe.data, "prompt", reads)
    prompts, report = _encode(loaded, tokenizer, recipe)
    sizes = Counter(p.source for p in prompts)
    order = Order([sizes[s] for s in range(len(loaded.sizes))], loaded.weights, recipe.run.seed)
    rows, held_out = None, ()
    if recipe.data.eval is not None:
        rows = load_rows(held_out_source(recipe.data.eval), recipe.data, "prompt", reads)
        held_out = _encode(rows, tokenizer, recipe)[0][: recipe.evaluation.max_prompts]
    unused, notes = seen_in(loaded, rows)
    groups = tuple(longest_rollouts(p, recipe, algorithm) for p in prompts)
    effective = recipe.batch.effective // algorithm.group_examples
    longest = DataSet(
        tokenizer=tokenizer,
        loaded=loaded,
        report=report,
        groups=groups,
        batches=Batches(groups, order, effective, recipe.data.remainder),
        held_out=(),
        held_out_report=None,
        held_out_names=(),
        prompts=(),
        answers=(),
        unused=unused,
        notes=(*notes, *report.notes),
    )
    return PromptSet(
        tokenizer,
        loaded,
        Batches(prompts, order, recipe.rollouts.prompts, recipe.data.remainder),
        held_out,
        longest,
    )


def check_batches(recipe: Recipe, algorithm: AlgorithmSpec) -> int:
    """Mini-batches of one pass over a rollout batch; ConfigError where the rollout batch cannot be cut into
    effective batches."""
    share, rollouts, effective = algorithm.group_examples, recipe.rollouts, recipe.batch.effective
    total = rollouts.prompts * share
    unit = "completions" if share > 1 or algorithm.loss_unit == "sequence" else "pairs"
    if effective % share:
        raise ConfigError(
            f"batch.effective={effective} is no multiple of rollouts.samples={share}",
            why="the completions of a prompt stay together: they share its computation",
            fix=f"set batch.effective to {max(1, effective // share) * share}, or rollouts.samples to a "
            "divisor",
        )
    if total % effective:
        raise ConfigError(
            f"{rollouts.prompts} prompts x {share} = {total} {unit} cannot be cut into effective batches of "
            f"{effective}",
            why="each optimizer step takes batch.effective of them",
            fix=f"set rollouts.prompts to a multiple of {effective // share}, or batch.effective to {total}",
        )
    if algorithm.online is not None and algorithm.online.advantage is None and rollouts.samples < 2:
        raise ConfigError(
            "online_dpo needs rollouts.samples of at least 2",
            why="it compares the best with the worst",
            fix="set it to 4",
        )
    if (
        recipe.algorithm.name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline")
        and rollouts.samples < 2
    ):
        raise ConfigError(
            f"{recipe.algorithm.name} needs rollouts.samples of at least 2",
            why="its baseline is the group's mean",
            fix="set it to 8",
        )
    if algorithm.online is not None and algorithm.online.dynamic_sampling and rollouts.max_staleness:
        raise ConfigError(
            "dynamic sampling needs rollouts.max_staleness=0",
            why="which prompts are drawn next depends on the rewards of the last ones",
            fix="set rollouts.max_staleness=0, or algorithm.dynamic_sampling=false",
        )
    return total // effective


def _encode(loaded: LoadedRows, tokenizer: Any, recipe: Recipe) -> tuple[tuple[Prompt, ...], EncodingReport]:
    encoder, data = Encoder(tokenizer, recipe.data, "prompt"), recipe.data
    room = data.max_length - recipe.rollouts.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"data.max_length={data.max_length} leaves no room for "
            f"rollouts.max_new_tokens={recipe.rollouts.max_new_tokens}",
            fix="raise data.max_length (prompt and completion together), or lower rollouts.max_new_tokens",
        )
    if data.overlong == "truncate_end":
        raise ConfigError(
            "data.overlong=truncate_end has no meaning for prompts",
            fix="use error, drop or truncate_prompt_left",
        )
    prompts, bad, counts = [], [], _Counts()
    for row in loaded.rows:
        try:
            fitted = _fitted(encoder, row, room, counts)
        except DataError as error:
            bad.append(bad_row(row, error))
            continue
        if fitted is None:
            continue
        row, ids = fitted
        if len(ids) > room:  # data.overlong is error: the run ends, however many bad rows it allows
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens, {room} are left beside the completion",
                fix="raise data.max_length, or set data.overlong to drop or truncate_prompt_left",
            )
        if not ids:
            raise DataError(f"{row.where}: the prompt has no token", fix="remove the row")
        tokens = np.array(ids, np.int64)
        prompts.append(
            Prompt(
                row.id,
                row.where,
                row.source,
                tokens,
                row.prompt,
                row.columns,
                row.tools,
                row.chat_template_kwargs,
            )
        )
    check_bad([*loaded.bad, *bad], data.max_bad_rows)
    if not prompts:
        raise DataError(
            "no prompt is left after data.overlong",
            why=f"{room} tokens are left for a prompt",
            fix="raise data.max_length",
        )
    lengths = tuple(len(p.ids) + recipe.rollouts.max_new_tokens for p in prompts)
    notes = (
        *encoder.notes,
        *said_of(counts.turns, counts.last_turns, f"{room} tokens beside rollouts.max_new_tokens"),
    )
    report = EncodingReport(
        len(loaded.rows),
        len(prompts),
        counts.dropped,
        counts.truncated,
        (),
        0,
        lengths,
        tuple(bad),
        notes,
        counts.turns,
    )
    return tuple(prompts), report


@dataclass(slots=True)
class _Counts:
    """turns: prompts that lost their oldest turns; last_turns: dropped, as their last one is too long."""

    dropped: int = 0
    truncated: int = 0
    turns: int = 0
    last_turns: int = 0


def _fitted(encoder: Encoder, row: Row, room: int, counts: _Counts) -> tuple[Row, tuple[int, ...]] | None:
    """The row, as rewards will see it too, and its tokens, by data.overlong at most `room` of them; None
    where it is dropped.

    A conversation loses whole turns, plain text its beginning.
    """
    ids, overlong = encoder.prompt_tokens(row), encoder.data.overlong
    if len(ids) <= room or overlong == "error":
        return row, ids
    if overlong == "drop":
        counts.dropped += 1
        return None
    if not isinstance(row.prompt, list):
        counts.truncated += 1
        return row, ids[-room:]
    found = with_fewer_turns(
        row.prompt,
        lambda left: encoder.prompt_tokens(replace(row, prompt=left)),
        lambda ids: len(ids) <= room,
    )
    if found is None:
        counts.dropped += 1
        counts.last_turns += 1
        return None
    counts.truncated += 1
    counts.turns += 1
    return replace(row, prompt=found[0]), found[1]


def _reads(recipe: Recipe, rewarded: frozenset[str] | None) -> Reads:
    """Environments and endpoints are given whole rows; functions what they name."""
    if recipe.rollouts.environment is not None:
        return Reads(margin=False, environment=True)
    return Reads(margin=False, others=rewarded)


def longest_rollouts(prompt: Prompt, recipe: Recipe, algorithm: AlgorithmSpec) -> SequenceGroup:
    """The prompt with completions of full length: repeats of its first token, which nothing learns from."""
    tokens = recipe.rollouts.max_new_tokens
    zeros = np.zeros(tokens, np.float32)
    experience = (
        None if algorithm.loss_unit == "pair" else Experience(zeros, zeros, zeros, zeros, zeros, zeros)
    )
    branch = Branch(np.full(tokens, prompt.ids[0], np.int64), np.ones(tokens, np.bool_), experience)
    return SequenceGroup(prompt.id, prompt.ids, (branch,) * algorithm.branches, prompt.source)
