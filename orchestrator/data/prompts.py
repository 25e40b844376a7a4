"""From the recipe's `data` section to prompts for rollouts, and to the longest steps that they can lead to.

sources --load_rows--> rows --encode--> Prompt --Order, Batches--> the prompts of any rollout batch
                                          |
                                          +-- with completions of full length --> SequenceGroups to plan with
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
from orchestrator.data.dataset import PlanInput, held_out_source, seen_in
from orchestrator.data.formats import Reads
from orchestrator.data.order import Batches, Order
from orchestrator.data.sources import LoadedRows, load_rows
from orchestrator.data.tokenize import Encoder, EncodingReport, bad_row
from orchestrator.data.turns import OverlongCounts
from orchestrator.recipe.schema import Model, Recipe


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts to sample from."""

    tokenizer: Any
    loaded: LoadedRows
    batches: Batches[Prompt]
    """Prompts of a rollout batch by the cursor of consumed prompts."""
    held_out: tuple[Prompt, ...]
    """Prompts for evaluation."""
    longest: PlanInput
    """Data set of the longest possible rollouts, for the plan, the memory probe and the start-up checks."""


def load_prompts(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    load_tokenizer: Callable[[Model], Any],
    rewarded: frozenset[str] | None,
) -> PromptSet:
    """Reads and checks all prompts of a recipe.

    DataError, ConfigError or MissingInput before anything expensive starts. rewarded: columns that the
    reward's components read; None if a component reads all columns.
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
    longest = PlanInput(
        tokenizer=tokenizer,
        loaded=loaded,
        report=report,
        groups=groups,
        batches=Batches(groups, order, effective, recipe.data.remainder),
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
    """Mini-batches of one pass over a rollout batch.

    ConfigError if the rollout batch cannot be cut into effective batches, or if the algorithm needs other
    rollouts.
    """
    share, rollouts, effective = algorithm.group_examples, recipe.rollouts, recipe.batch.effective
    total = rollouts.prompts * share
    unit = "completions" if share > 1 or algorithm.loss_unit == "sequence" else "pairs"
    if effective % share:
        raise ConfigError(
            f"batch.effective={effective} is not a multiple of rollouts.samples={share}",
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
            fix="set rollouts.samples=4",
        )
    if (
        recipe.algorithm.name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline")
        and rollouts.samples < 2
    ):
        raise ConfigError(
            f"{recipe.algorithm.name} needs rollouts.samples of at least 2",
            why="its baseline is the group's mean",
            fix="set rollouts.samples=8",
        )
    if algorithm.online is not None and algorithm.online.dynamic_sampling and rollouts.max_staleness:
        raise ConfigError(
            "dynamic sampling needs rollouts.max_staleness=0",
            why="the rewards of one batch decide which prompts are drawn next",
            fix="set rollouts.max_staleness=0, or algorithm.dynamic_sampling=false",
        )
    return total // effective


def _encode(loaded: LoadedRows, tokenizer: Any, recipe: Recipe) -> tuple[tuple[Prompt, ...], EncodingReport]:
    encoder, room = Encoder(tokenizer, recipe.data, "prompt"), _prompt_room(recipe)
    prompts, bad, counts = [], [], OverlongCounts()
    for row in loaded.rows:
        try:
            fitted = _fitted(encoder, row, room, counts)
        except DataError as error:
            bad.append(bad_row(row, error))
            continue
        if fitted is not None:
            prompts.append(_prompt(*fitted, room))
    check_bad([*loaded.bad, *bad], recipe.data.max_bad_rows)
    if not prompts:
        raise DataError(
            "no prompt is left after data.overlong",
            why=f"a prompt may have {room} tokens",
            fix="raise data.max_length",
        )
    report = EncodingReport(
        rows=len(loaded.rows),
        kept=len(prompts),
        dropped=counts.dropped,
        truncated=counts.truncated,
        not_prefix=(),
        identical=0,
        lengths=tuple(len(p.ids) + recipe.rollouts.max_new_tokens for p in prompts),
        bad=tuple(bad),
        notes=(*encoder.notes, *counts.notes(f"{room} tokens beside rollouts.max_new_tokens")),
        turns=counts.turns,
    )
    return tuple(prompts), report


def _prompt_room(recipe: Recipe) -> int:
    """Tokens that a prompt may have; ConfigError if there are none, or for a policy that cuts completions."""
    data, rollouts = recipe.data, recipe.rollouts
    room = data.max_length - rollouts.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"data.max_length={data.max_length} leaves no room for "
            f"rollouts.max_new_tokens={rollouts.max_new_tokens}",
            fix="raise data.max_length (prompt and completion together), or lower rollouts.max_new_tokens",
        )
    if data.overlong == "truncate_end":
        raise ConfigError(
            "data.overlong=truncate_end has no meaning for prompts",
            fix="use error, drop or truncate_prompt_left",
        )
    return room


def _prompt(row: Row, ids: tuple[int, ...], room: int) -> Prompt:
    """The prompt of a row. DataError ends the run, however many bad rows it allows."""
    if len(ids) > room:  # data.overlong is error
        raise DataError(
            f"{row.where}: the prompt has {len(ids)} tokens, {room} are left beside the completion",
            fix="raise data.max_length, or set data.overlong to drop or truncate_prompt_left",
        )
    if not ids:
        raise DataError(f"{row.where}: the prompt has no token", fix="remove the row")
    return Prompt(
        row.id,
        row.where,
        row.source,
        np.array(ids, np.int64),
        row.prompt,
        row.columns,
        row.tools,
        row.chat_template_kwargs,
    )


def _fitted(
    encoder: Encoder, row: Row, room: int, counts: OverlongCounts
) -> tuple[Row, tuple[int, ...]] | None:
    """(the row as rewards will see it, its tokens) after data.overlong; None if the row is dropped.

    At most `room` tokens remain: a conversation loses whole turns, plain text its beginning. With
    data.overlong=error the tokens are returned as they are.
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
    shortened = counts.shorten(
        row.prompt,
        lambda messages: encoder.prompt_tokens(replace(row, prompt=messages)),
        lambda ids: len(ids) <= room,
    )
    return None if shortened is None else (replace(row, prompt=shortened[0]), shortened[1])


def _reads(recipe: Recipe, rewarded: frozenset[str] | None) -> Reads:
    """Columns that a run reads. Environments and endpoints get whole rows, functions what they name."""
    if recipe.rollouts.environment is not None:
        return Reads(margin=False, environment=True)
    return Reads(margin=False, others=rewarded)


def longest_rollouts(prompt: Prompt, recipe: Recipe, algorithm: AlgorithmSpec) -> SequenceGroup:
    """The prompt with completions of full length: repeats of its first token. Nothing learns from them."""
    tokens = recipe.rollouts.max_new_tokens
    zeros = np.zeros(tokens, np.float32)
    experience = (
        None if algorithm.loss_unit == "pair" else Experience(zeros, zeros, zeros, zeros, zeros, zeros)
    )
    branch = Branch(np.full(tokens, prompt.ids[0], np.int64), np.ones(tokens, np.bool_), experience)
    return SequenceGroup(prompt.id, prompt.ids, (branch,) * algorithm.branches, prompt.source)
