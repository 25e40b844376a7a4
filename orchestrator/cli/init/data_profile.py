"""What `init` finds in the user's model and data: kind and format of the rows, columns, lengths.

model, data --profile_data--> DataProfile (columns, kind, format, lengths)   -> cli/init/recipe.py
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
"""Rows that are tokenized to measure lengths."""
PEEKED = 200
"""Records whose columns are read."""
SHORT = 40
"""Characters of an answer that a reward can compare; a longer one is a demonstration."""


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the user gave on the command line."""

    model: str
    revision: str | None
    train: str
    held_out: str | None
    kind: Kind | None
    columns: dict[str, str]
    """TRL's column name -> the user's, for those named on the command line."""


@dataclass(frozen=True, slots=True)
class DataProfile:
    """What the data turned out to be."""

    kind: Kind
    why: str
    """Reason for the kind, as a clause. Example: "rows hold pairs (good, bad)"."""
    columns: dict[str, str]
    """TRL's column name -> the user's, where they differ."""
    form: str
    """Format of the rows. Example: "preference, text"."""
    rows: int
    lengths: tuple[int, ...]
    """Tokens of a row with its longest answer (of the prompt alone for grpo), for up to SAMPLED rows."""
    positions: int | None
    """Positions of the model; None if its configuration does not name them."""
    has_answers: bool
    """Whether rows have an answer that a reward can compare with."""
    numbers: bool
    """Whether those answers are numbers."""
    skipped: tuple[str, ...]
    """Rows that cannot be used, each with the reason."""

    def quantile(self, share: float) -> int:
        return int(np.quantile(self.lengths, share, method="higher"))


def parse_request(
    model: str,
    revision: str | None,
    train: str,
    held_out: str | None,
    kind: str | None,
    columns: Sequence[str],
) -> InitRequest:
    """Checks the command line; ConfigError for an unknown kind or column."""
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
                f"`{text}` does not map a column",
                fix=f"write data.columns.NAME=COLUMN; NAME is one of {', '.join(Columns.model_fields)}",
            )
        named[match[1]] = match[2]
    return InitRequest(model, revision, train, held_out, kind, named)  # pyright: ignore[reportArgumentType]


def profile_data(request: InitRequest) -> DataProfile:
    """Reads the data and the tokenizer; ConfigError, DataError or MissingInput if no recipe could work."""
    values = [record.value for record in islice(raw_records(request.train), PEEKED)]
    records = [value for value in values if isinstance(value, dict)]
    if not records:
        raise DataError(
            f"{request.train} holds no record", fix="give a file with one JSON object per line, or Parquet"
        )
    names = list(
        dict.fromkeys(str(name) for record in records for name, value in record.items() if value is not None)
    )
    kind, why = (
        (request.kind, "as requested")
        if request.kind is not None
        else _guess(records, names, request.columns)
    )
    columns = _columns(kind, names, request.columns)
    mapped = Columns.model_validate(columns)
    model = Model.model_validate({"path": request.model, "revision": request.revision})
    data = Data.model_validate(
        {
            "train": request.train,
            "columns": mapped,
            "max_bad_rows": 1_000_000_000,
            "max_length": 1_000_000_000,
        }
    )
    loaded = _loaded(request, kind, data, names)
    tokenizer = load_tokenizer(model)
    answers = [row.answer for row in loaded.rows if row.answer]
    return DataProfile(
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


def _loaded(request: InitRequest, kind: Kind, data: Data, names: Sequence[str]) -> LoadedRows:
    """The rows as the recipe will read them; DataError if most are bad, since then the guess is wrong."""
    loaded = load_rows(request.train, data, ROWS_OF[kind])
    if request.held_out is not None:
        load_rows(request.held_out, data, ROWS_OF[kind])
    if len(loaded.bad) > len(loaded.rows):
        why = (
            f"{loaded.bad[0]}; {len(loaded.bad)} of {len(loaded.bad) + len(loaded.rows)} rows; columns "
            f"are {', '.join(names)}"
        )
        raise DataError(
            f"{request.train} does not hold rows for {kind}",
            why=why,
            fix="give another --kind, or data.columns.NAME=COLUMN",
        )
    return loaded


def _guess(
    records: Sequence[dict[str, Any]], names: Sequence[str], given: dict[str, str]
) -> tuple[Kind, str]:
    """The kind of training that such rows are usually for, and why."""
    columns = {name: given.get(name) or likely(name, names) for name in LIKELY}
    prompt, answer, label = columns["prompt"], columns["completion"], columns["label"]
    if columns["chosen"] and columns["rejected"]:
        return "dpo", f"rows hold pairs ({columns['chosen']}, {columns['rejected']})"
    if label and prompt and answer and all(isinstance(r.get(label), bool) for r in records):
        return "kto", f"rows hold single answers, each marked in {label}"
    if columns["messages"] and isinstance(records[0].get(columns["messages"]), list):
        return "sft", f"rows hold conversations ({columns['messages']})"
    if prompt and answer:
        short = sum(len(str(record.get(answer, ""))) <= SHORT for record in records) >= 0.9 * len(records)
        if answer in LIKELY["answer"] and short:
            return "grpo", f"rows hold prompts and short answers to compare with ({prompt}, {answer})"
        return "sft", f"rows hold demonstrations ({prompt}, {answer})"
    if prompt:
        return "grpo", f"rows hold prompts alone ({prompt})"
    if columns["text"]:
        return "sft", f"rows hold text ({columns['text']})"
    fix = (
        "name the columns, e.g. data.columns.prompt=NAME data.columns.chosen=NAME data.columns.rejected=NAME"
    )
    raise ConfigError("the rows' format is not recognised", why=f"columns are {', '.join(names)}", fix=fix)


def _columns(kind: Kind, names: Sequence[str], given: dict[str, str]) -> dict[str, str]:
    """TRL's column name -> the user's, where they differ, of the columns that the kind can read."""
    for name, theirs in given.items():
        if theirs not in names:
            raise ConfigError(
                f"data.columns.{name}={theirs}: the data has no such column",
                why=f"columns are {', '.join(names)}",
                fix="name one of them",
            )
    rows = ROWS_OF[kind]
    wanted = _wanted(rows, names, given)
    columns = dict(given)
    for name in wanted:
        if name in columns:
            continue
        theirs = likely(name, (c for c in names if c not in columns.values()))
        if theirs is not None:
            columns[name] = theirs
    if rows == "prompt" and "prompt" not in columns and "messages" in names:
        wanted.remove("prompt")
    required = (*NEEDED.get(rows, ()), "messages", "text", "completion")
    missing = [name for name in wanted if name not in columns and name in required]
    if missing:
        needs = f"{kind} needs {' and '.join(missing)}"
        raise ConfigError(
            f"no column for {', '.join(missing)}", why=lacking(missing, needs, names), fix=_name_them(missing)
        )
    sharegpt = columns.get("messages") == SHAREGPT_COLUMN
    return {
        name: theirs
        for name, theirs in columns.items()
        if name != theirs and not (name == "messages" and sharegpt)
    }


def _wanted(rows: DataKind, names: Sequence[str], given: dict[str, str]) -> list[str]:
    """Columns that rows of this kind need or may have, in TRL's names."""
    if rows == "sft":
        if given.get("messages") or likely("messages", names):
            return ["messages"]
        return ["prompt", "completion"] if likely("completion", names) or "completion" in given else ["text"]
    optional = {"preference": ("prompt",), "prompt": ("answer",)}
    return [*NEEDED.get(rows, ()), *optional.get(rows, ())]


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
            continue  # `plan` reads every row and names this one
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
