"""Somebody's model and data, looked at for a first recipe: what the rows are, which columns hold what, and
how long they are.

model, data --look--> Look (columns, kind, format, lengths)   -> cli/init/recipe.py
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from orchestrator.core.batches import DataKind, Row
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.data.formats import SHAREGPT_COLUMN
from orchestrator.data.hints import LIKELY, lacking, likely
from orchestrator.data.sources import LoadedRows, load_rows, raw_records
from orchestrator.data.tokenize import Encoder
from orchestrator.models.load import load_config, load_tokenizer
from orchestrator.recipe.schema import Columns, Data, Model

Kind = Literal["sft", "dpo", "lora-dpo", "reward", "grpo", "kto"]
ROWS_OF: dict[str, DataKind] = {
    **dict.fromkeys(("dpo", "lora-dpo", "reward"), "preference"),
    **{"sft": "sft", "grpo": "prompt", "kto": "unpaired"},
}
NEEDED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "prompt": ("prompt",),
    "unpaired": ("prompt", "completion", "label"),
}
SAMPLED = 5_000
"""Rows that are tokenized to see how long they are."""
PEEKED = 200
"""Records that are looked at for their columns."""
SHORT = 40
"""Characters of an answer that a reward can compare; longer ones are demonstrations."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user gave. columns: TRL's name -> theirs, where they said so."""

    model: str
    revision: str | None
    train: str
    held_out: str | None
    kind: Kind | None
    columns: dict[str, str]


@dataclass(frozen=True, slots=True)
class Look:
    """What the data turned out to be. columns: TRL's name -> theirs, where they differ; form: of the rows in
    words; lengths: tokens of prompt and the longest answer; positions: of the model, None where its
    configuration does not say; answers: whether rows have one to compare with, and whether it is a number."""

    kind: Kind
    why: str
    columns: dict[str, str]
    form: str
    rows: int
    lengths: tuple[int, ...]
    positions: int | None
    has_answers: bool
    numbers: bool
    skipped: tuple[str, ...]

    def quantile(self, share: float) -> int:
        return int(np.quantile(self.lengths, share, method="higher"))


def asked(
    model: str,
    revision: str | None,
    train: str,
    held_out: str | None,
    kind: str | None,
    columns: Sequence[str],
) -> Asked:
    """From the command line; ConfigError for a kind or a column that there is not."""
    if kind is not None and kind not in ROWS_OF:
        close = difflib.get_close_matches(kind, ROWS_OF)
        raise ConfigError(
            f"--kind {kind} is not known",
            fix=f"did you mean {close[0]}?" if close else f"use one of {', '.join(ROWS_OF)}",
        )
    named = {}
    for text in columns:
        match = re.fullmatch(r"(?:data\.columns\.)?(\w+)=(.+)", text)
        if match is None or match[1] not in Columns.model_fields:
            raise ConfigError(
                f"`{text}` maps no column",
                fix=f"write data.columns.NAME=COLUMN; NAME is one of {', '.join(Columns.model_fields)}",
            )
        named[match[1]] = match[2]
    return Asked(model, revision, train, held_out, kind, named)  # pyright: ignore[reportArgumentType]


def look(asked: Asked) -> Look:
    """Reads the data and the tokenizer; ConfigError, DataError or MissingInput where no recipe could work."""
    records = [record.value for record in islice(raw_records(asked.train), PEEKED)]
    seen = [record for record in records if isinstance(record, dict)]
    if not seen:
        raise DataError(
            f"{asked.train} holds no record", fix="give a file with a JSON object a line, or Parquet"
        )
    there = list(
        dict.fromkeys(str(name) for record in seen for name, value in record.items() if value is not None)
    )
    kind, why = (asked.kind, "as asked") if asked.kind is not None else _guess(seen, there, asked.columns)
    columns = _columns(kind, there, asked.columns)
    mapped = Columns.model_validate(columns)
    model = Model.model_validate({"path": asked.model, "revision": asked.revision})
    data = Data.model_validate(
        {"train": asked.train, "columns": mapped, "max_bad_rows": 1_000_000_000, "max_length": 1_000_000_000}
    )
    loaded = _loaded(asked, kind, data, there)
    tokenizer = load_tokenizer(model)
    answers = [row.answer for row in loaded.rows if row.answer]
    return Look(
        kind=kind,
        why=why,
        columns=columns,
        form=loaded.formats[0],
        rows=len(loaded.rows),
        lengths=_lengths(loaded.rows, tokenizer, data, kind),
        positions=_positions(model),
        has_answers=len(answers) >= 0.9 * len(loaded.rows),
        numbers=bool(answers) and sum(map(_is_number, answers)) >= 0.9 * len(answers),
        skipped=tuple(str(row) for row in loaded.bad),
    )


def _loaded(asked: Asked, kind: Kind, data: Data, there: Sequence[str]) -> LoadedRows:
    """The rows as the recipe will read them; what is wrong with most of them is wrong with the guess."""
    loaded = load_rows(asked.train, data, ROWS_OF[kind])
    if asked.held_out is not None:
        load_rows(asked.held_out, data, ROWS_OF[kind])
    if len(loaded.bad) > len(loaded.rows):
        why = (
            f"{loaded.bad[0]}; {len(loaded.bad)} of {len(loaded.bad) + len(loaded.rows)} rows; columns "
            f"are {', '.join(there)}"
        )
        raise DataError(
            f"{asked.train} does not hold rows for {kind}",
            why=why,
            fix="give another --kind, or data.columns.NAME=COLUMN",
        )
    return loaded


def _guess(
    records: Sequence[dict[str, Any]], there: Sequence[str], given: dict[str, str]
) -> tuple[Kind, str]:
    """The kind that such rows are usually for, and why."""
    names = {name: given.get(name) or likely(name, there) for name in LIKELY}
    if names["chosen"] and names["rejected"]:
        return "dpo", f"rows hold pairs ({names['chosen']}, {names['rejected']})"
    column = names["label"]
    if (
        column
        and names["prompt"]
        and names["completion"]
        and all(isinstance(r.get(column), bool) for r in records)
    ):
        return "kto", f"rows hold single answers, each marked in {names['label']}"
    if names["messages"] and isinstance(records[0].get(names["messages"]), list):
        return "sft", f"rows hold conversations ({names['messages']})"
    answer = names["completion"]
    if names["prompt"] and answer and answer not in LIKELY["answer"]:
        return "sft", f"rows hold demonstrations ({names['prompt']}, {answer})"
    if names["prompt"] and answer:
        short = sum(len(str(record.get(answer, ""))) <= SHORT for record in records) >= 0.9 * len(records)
        if short:
            return (
                "grpo",
                f"rows hold prompts and short answers to compare with ({names['prompt']}, {answer})",
            )
        return "sft", f"rows hold demonstrations ({names['prompt']}, {answer})"
    if names["prompt"]:
        return "grpo", f"rows hold prompts alone ({names['prompt']})"
    if names["text"]:
        return "sft", f"rows hold text ({names['text']})"
    fix = (
        "say which columns they are, e.g. data.columns.prompt=NAME data.columns.chosen=NAME "
        "data.columns.rejected=NAME"
    )
    raise ConfigError("the rows' format is not recognised", why=f"columns are {', '.join(there)}", fix=fix)


def _columns(kind: Kind, there: Sequence[str], given: dict[str, str]) -> dict[str, str]:
    """Names that differ from TRL's, of the columns that the kind needs and of those that it may have."""
    for name, theirs in given.items():
        if theirs not in there:
            raise ConfigError(
                f"data.columns.{name}={theirs}: there is no such column",
                why=f"columns are {', '.join(there)}",
                fix="name one of them",
            )
    rows = ROWS_OF[kind]
    wanted = [
        *NEEDED.get(rows, ()),
        *(("prompt",) if rows == "preference" else ("answer",) if rows == "prompt" else ()),
    ]
    if rows == "sft":
        talks = given.get("messages") or likely("messages", there)
        wanted = (
            ["messages"]
            if talks
            else ["prompt", "completion"]
            if likely("completion", there) or "completion" in given
            else ["text"]
        )
    found = dict(given)
    for name in wanted:
        if (
            name not in found
            and (theirs := likely(name, (c for c in there if c not in found.values()))) is not None
        ):
            found[name] = theirs
    if rows == "prompt" and "prompt" not in found and "messages" in there:
        wanted.remove("prompt")
    missing = [
        name
        for name in wanted
        if name not in found and name in (*NEEDED.get(rows, ()), "messages", "text", "completion")
    ]
    if missing:
        needs = f"{kind} needs {' and '.join(missing)}"
        raise ConfigError(
            f"no column for {', '.join(missing)}", why=lacking(missing, needs, there), fix=_name_them(missing)
        )
    sharegpt = found.get("messages") == SHAREGPT_COLUMN
    return {
        name: theirs
        for name, theirs in found.items()
        if name != theirs and not (name == "messages" and sharegpt)
    }


def _name_them(missing: Sequence[str]) -> str:
    return (
        f"add {' '.join(f'data.columns.{name}=COLUMN' for name in missing)} to the command, or give "
        "another --kind"
    )


def _lengths(rows: Sequence[Row], tokenizer: Any, data: Data, kind: Kind) -> tuple[int, ...]:
    encoder = Encoder(tokenizer, data, ROWS_OF[kind])
    lengths = []
    for row in rows[:: max(1, len(rows) // SAMPLED)]:
        try:
            lengths.append(len(encoder.prompt_tokens(row)) if kind == "grpo" else encoder.encode(row).longest)
        except DataError:
            continue  # named by `plan`, which reads all of them
    if not lengths:
        raise DataError(
            "no row could be tokenized",
            fix="run `orchestrator plan` on a recipe with this data: it names each row",
        )
    return tuple(lengths)


def _positions(model: Model) -> int | None:
    named = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "").replace("$", "")))
    except ValueError:
        return False
