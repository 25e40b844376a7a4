"""A recipe for somebody's model and data: what the rows are, which columns hold what, and values that fit them, each with its reason.

    model, data --look--> Look (columns, kind, format, lengths) --write--> recipe text (and reward.py, where GRPO has no answers to compare with)
"""

import difflib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orchestrator.checkpoints import write_atomically
from orchestrator.config import Columns, Data, Model
from orchestrator.data.chat import Encoder
from orchestrator.data.hints import LIKELY, lacking, likely
from orchestrator.data.rows import SHAREGPT_COLUMN
from orchestrator.data.sources import LoadedRows, load_rows, raw_records
from orchestrator.errors import ConfigError, DataError, OutputError
from orchestrator.models.load import load_config, load_tokenizer
from orchestrator.records import DataKind, Row

Kind = Literal["sft", "dpo", "lora-dpo", "reward", "grpo", "kto"]
ROWS_OF: dict[str, DataKind] = {
    **dict.fromkeys(("dpo", "lora-dpo", "reward"), "preference"),
    **{"sft": "sft", "grpo": "prompt", "kto": "unpaired"},
}
NEEDED: dict[str, tuple[str, ...]] = {"preference": ("chosen", "rejected"), "prompt": ("prompt",), "unpaired": ("prompt", "completion", "label")}
RATES = {"sft": "2e-5", "dpo": "1e-6", "lora-dpo": "2e-5", "reward": "1e-5", "grpo": "1e-6", "kto": "1e-6"}
SAMPLED = 5_000
"""Rows that are tokenized to see how long they are."""
PEEKED = 200
"""Records that are looked at for their columns."""
ROUND = 64
"""data.max_length is a multiple of it."""
SHORT = 40
"""Characters of an answer that a reward can compare; longer ones are demonstrations."""
STEPS = 20
"""Optimizer steps that a pass over few rows is cut into, where they are enough."""


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
    """What the data turned out to be. columns: TRL's name -> theirs, where they differ; form: of the rows in words; lengths: tokens of prompt
    and the longest answer; positions: of the model, None where its configuration does not say; answers: whether rows have one to compare
    with, and whether it is a number."""

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


def asked(model: str, revision: str | None, train: str, held_out: str | None, kind: str | None, columns: Sequence[str]) -> Asked:
    """From the command line; ConfigError for a kind or a column that there is not."""
    if kind is not None and kind not in ROWS_OF:
        close = difflib.get_close_matches(kind, ROWS_OF)
        raise ConfigError(f"--kind {kind} is not known", fix=f"did you mean {close[0]}?" if close else f"use one of {', '.join(ROWS_OF)}")
    named = {}
    for text in columns:
        match = re.fullmatch(r"(?:data\.columns\.)?(\w+)=(.+)", text)
        if match is None or match[1] not in Columns.model_fields:
            raise ConfigError(f"`{text}` maps no column", fix=f"write data.columns.NAME=COLUMN; NAME is one of {', '.join(Columns.model_fields)}")
        named[match[1]] = match[2]
    return Asked(model, revision, train, held_out, kind, named)  # pyright: ignore[reportArgumentType]


def look(asked: Asked) -> Look:
    """Reads the data and the tokenizer; ConfigError, DataError or MissingInput where no recipe could work."""
    records = [record.value for record in islice(raw_records(asked.train), PEEKED)]
    seen = [record for record in records if isinstance(record, dict)]
    if not seen:
        raise DataError(f"{asked.train} holds no record", fix="give a file with a JSON object a line, or Parquet")
    there = list(dict.fromkeys(str(name) for record in seen for name, value in record.items() if value is not None))
    kind, why = (asked.kind, "as asked") if asked.kind is not None else _guess(seen, there, asked.columns)
    columns = _columns(kind, there, asked.columns)
    mapped = Columns.model_validate(columns)
    model = Model.model_validate({"path": asked.model, "revision": asked.revision})
    data = Data.model_validate({"train": asked.train, "columns": mapped, "max_bad_rows": 1_000_000_000, "max_length": 1_000_000_000})
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
        why = f"{loaded.bad[0]}; {len(loaded.bad)} of {len(loaded.bad) + len(loaded.rows)} rows; columns are {', '.join(there)}"
        raise DataError(f"{asked.train} does not hold rows for {kind}", why=why, fix="give another --kind, or data.columns.NAME=COLUMN")
    return loaded


def _guess(records: Sequence[dict[str, Any]], there: Sequence[str], given: dict[str, str]) -> tuple[Kind, str]:
    """The kind that such rows are usually for, and why."""
    names = {name: given.get(name) or likely(name, there) for name in LIKELY}
    if names["chosen"] and names["rejected"]:
        return "dpo", f"rows hold pairs ({names['chosen']}, {names['rejected']})"
    column = names["label"]
    if column and names["prompt"] and names["completion"] and all(isinstance(r.get(column), bool) for r in records):
        return "kto", f"rows hold single answers, each marked in {names['label']}"
    if names["messages"] and isinstance(records[0].get(names["messages"]), list):
        return "sft", f"rows hold conversations ({names['messages']})"
    answer = names["completion"]
    if names["prompt"] and answer and answer not in LIKELY["answer"]:
        return "sft", f"rows hold demonstrations ({names['prompt']}, {answer})"
    if names["prompt"] and answer:
        short = sum(len(str(record.get(answer, ""))) <= SHORT for record in records) >= 0.9 * len(records)
        if short:
            return "grpo", f"rows hold prompts and short answers to compare with ({names['prompt']}, {answer})"
        return "sft", f"rows hold demonstrations ({names['prompt']}, {answer})"
    if names["prompt"]:
        return "grpo", f"rows hold prompts alone ({names['prompt']})"
    if names["text"]:
        return "sft", f"rows hold text ({names['text']})"
    fix = "say which columns they are, e.g. data.columns.prompt=NAME data.columns.chosen=NAME data.columns.rejected=NAME"
    raise ConfigError("the rows' format is not recognised", why=f"columns are {', '.join(there)}", fix=fix)


def _columns(kind: Kind, there: Sequence[str], given: dict[str, str]) -> dict[str, str]:
    """Names that differ from TRL's, of the columns that the kind needs and of those that it may have."""
    for name, theirs in given.items():
        if theirs not in there:
            raise ConfigError(f"data.columns.{name}={theirs}: there is no such column", why=f"columns are {', '.join(there)}", fix="name one of them")
    rows = ROWS_OF[kind]
    wanted = [*NEEDED.get(rows, ()), *(("prompt",) if rows == "preference" else ("answer",) if rows == "prompt" else ())]
    if rows == "sft":
        talks = given.get("messages") or likely("messages", there)
        wanted = ["messages"] if talks else ["prompt", "completion"] if likely("completion", there) or "completion" in given else ["text"]
    found = dict(given)
    for name in wanted:
        if name not in found and (theirs := likely(name, (c for c in there if c not in found.values()))) is not None:
            found[name] = theirs
    if rows == "prompt" and "prompt" not in found and "messages" in there:
        wanted.remove("prompt")
    missing = [name for name in wanted if name not in found and name in (*NEEDED.get(rows, ()), "messages", "text", "completion")]
    if missing:
        needs = f"{kind} needs {' and '.join(missing)}"
        raise ConfigError(f"no column for {', '.join(missing)}", why=lacking(missing, needs, there), fix=_name_them(missing))
    sharegpt = found.get("messages") == SHAREGPT_COLUMN
    return {name: theirs for name, theirs in found.items() if name != theirs and not (name == "messages" and sharegpt)}


def _name_them(missing: Sequence[str]) -> str:
    return f"add {' '.join(f'data.columns.{name}=COLUMN' for name in missing)} to the command, or give another --kind"


def _lengths(rows: Sequence[Row], tokenizer: Any, data: Data, kind: Kind) -> tuple[int, ...]:
    encoder = Encoder(tokenizer, data, ROWS_OF[kind])
    lengths = []
    for row in rows[:: max(1, len(rows) // SAMPLED)]:
        try:
            lengths.append(len(encoder.prompt_tokens(row)) if kind == "grpo" else encoder.encode(row).longest)
        except DataError:
            continue  # named by `plan`, which reads all of them
    if not lengths:
        raise DataError("no row could be tokenized", fix="run `orchestrator plan` on a recipe with this data: it names each row")
    return tuple(lengths)


def _positions(model: Model) -> int | None:
    named = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "").replace("$", "")))
    except ValueError:
        return False


# ---- values that fit


@dataclass(frozen=True, slots=True)
class Fit:
    """Values that follow from the rows, and steps: of the whole run."""

    max_length: int
    effective: int
    epochs: int
    steps: int
    new_tokens: int


def fit(found: Look) -> Fit:
    """max_length: room for 99 rows of 100; effective: the usual one, or less where that makes too few steps."""
    most = found.positions or 1_000_000
    new_tokens = min(256, most // 2) if found.kind == "grpo" else 0
    length = min(-(-(found.quantile(0.99) + new_tokens) // ROUND) * ROUND, most)
    if found.kind == "grpo":
        prompts = min(8, found.rows)
        return Fit(length, prompts * 8, 1, max(1, found.rows // prompts), new_tokens)
    epochs = {"sft": 3 if found.rows < 1000 else 2, "reward": 1}.get(found.kind, 1)
    effective = 32
    while effective > 1 and found.rows * epochs // effective < STEPS:
        effective //= 2
    effective = min(max(effective, 4), found.rows)
    return Fit(length, effective, epochs, max(1, found.rows * epochs // effective), new_tokens)


def write(asked: Asked, found: Look, output: Path) -> dict[Path, str]:
    """Files by path: the recipe, and reward.py beside it where GRPO has nothing to compare with."""
    values, kind, files = fit(found), found.kind, dict[Path, str]()
    adapter = ["  lora: {rank: 16, alpha: 32, target_modules: all-linear}"] if kind == "lora-dpo" else []
    algorithm = f"{'dpo' if kind == 'lora-dpo' else kind}{', beta: 0.1' if kind in ('dpo', 'lora-dpo', 'kto') else ''}"
    blocks = [
        [
            f"# {kind} of {asked.model} on {asked.train}, written by `orchestrator init`: {found.why}.",
            f"# Format: {found.form}; {found.rows} rows. Paths are relative to the folder that commands are run in.",
            "run:",
            f"  name: {_name(output)}",
            f"  epochs: {values.epochs}  # {_passes(kind)}; {values.steps} {'rollout batches' if kind == 'grpo' else 'optimizer steps'} in all",
        ],
        ["model:", f"  path: {_quoted(asked.model)}", *([f"  revision: {_quoted(asked.revision)}"] if asked.revision else []), *adapter],
        _data(asked, found, values),
        [f"algorithm: {{name: {algorithm}}}"],
        ["batch:", f"  effective: {values.effective}  # {_effective(found, values)}", "  micro_batch: auto  # found by a probe; changes no result"],
        [
            "optimizer:",
            f"  learning_rate: {RATES[kind]}  # {_rate(kind)}",
            *([] if kind == "grpo" else ["  schedule: linear", "  warmup_ratio: 0.1  # of the run's optimizer steps"]),
        ],
        [
            "learners:",
            "  workers: auto  # as many as there is room for; changes no result",
            "  gpus_per_worker: auto  # one where there are GPUs",
            "  precision: auto  # bf16 on GPUs that know it, fp32 on a CPU",
            *(["  cpus_per_worker: 0.5  # a learner and a rollout actor take turns on one CPU, or one GPU"] if kind == "grpo" else []),
        ],
        *(_rollouts(found, values, output, files) if kind == "grpo" else []),
    ]
    if asked.held_out:
        every = max(1, values.steps // 4)
        blocks.append([f"evaluation: {{every: {every}}}  # four times in {values.steps} steps, and before the first"])
    return {output: "\n\n".join("\n".join(block) for block in blocks) + "\n", **files}


def _data(asked: Asked, found: Look, values: Fit) -> list[str]:
    over = sum(n + values.new_tokens > values.max_length for n in found.lengths)
    quantiles = ", ".join(f"{name} {found.quantile(q)}" for name, q in (("median", 0.5), ("95 % below", 0.95), ("longest", 1.0)))
    what = "prompts" if found.kind == "grpo" else "rows"
    answer = f", and {values.new_tokens} for the answer" if values.new_tokens else ""
    cut = f"{over or 'none'} of {len(found.lengths)} {what} looked at {'are' if over > 1 else 'is'} longer"
    columns = ", ".join(f"{name}: {_quoted(theirs)}" for name, theirs in found.columns.items())
    return [
        "data:",
        f"  train: {_quoted(asked.train)}",
        f"  eval: {_quoted(asked.held_out)}" if asked.held_out else "  # eval: FILE  # held-out rows say whether it got better",
        *([f"  columns: {{{columns}}}"] if columns else []),
        f"  max_length: {values.max_length}  # tokens of {what}: {quantiles}{answer}; {cut}",
        "  overlong: truncate_prompt_left  # of conversations the oldest turns go, whole",
    ]


def _passes(kind: str) -> str:
    return {"sft": "passes over the demonstrations", "grpo": "each prompt once"}.get(kind, "pairs are learned by heart within two or three passes")


def _effective(found: Look, values: Fit) -> str:
    if found.kind == "grpo":
        return f"completions in one step: {values.effective // 8} prompts with 8 answers each"
    fewer = "" if values.effective == 32 else f"; 32 are usual, and too many for {found.rows} rows"
    return f"examples in one optimizer step on any machine{fewer}"


def _rate(kind: str) -> str:
    return {
        "sft": "full fine-tune: 1e-5 to 2e-5 is usual, TRL's default is 2e-5",
        "dpo": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "kto": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "lora-dpo": "an adapter: 1e-5 to 2e-4, ten times that of all weights and more",
        "reward": "of the new head too; 1e-6 to 1e-5 is usual",
        "grpo": "TRL's and verl's default; 1e-5 ruins it",
    }[kind]


def _rollouts(found: Look, values: Fit, output: Path, files: dict[Path, str]) -> list[list[str]]:
    """The sections rollouts and rewards; where rows have no answer, a function of the user's own goes into `files`."""
    if found.has_answers:
        name = "last_number" if found.numbers else "exact_match"
        words = "the last number of an answer is the row's" if found.numbers else "an answer is the row's, word for word"
        component, why = f"{{name: correct, function: {name}}}", f"1 where {words} `answer`, else 0"
    else:
        file = output.parent / "reward.py"
        files[file] = REWARD
        component, why = f"{{name: mine, function: {_quoted(f'{file}:reward')}}}", "rows have no answer to compare with: write what you want there"
    rollouts = [
        "rollouts:",
        "  workers: auto  # one beside each learner",
        "  gpus_per_worker: auto",
        "  cpus_per_worker: 0.5",
        "  placement: colocated",
        f"  prompts: {values.effective // 8}",
        "  samples: 8  # TRL's default",
        f"  max_new_tokens: {values.new_tokens}",
    ]
    return [rollouts, ["rewards:", f"  functions: [{component}]  # {why}"]]


REWARD = '''"""The reward of a GRPO run: TRL's signature. Change it to what you want: whatever gets a higher number is what the model learns.

Try it on its own: python reward.py
"""


def reward(prompts, completions, **columns):
    """One number for each completion. A completion is text, or a list of messages where prompts are conversations; `columns` holds the
    other columns of the data, a value for each completion. This one likes answers of 5 to 50 words that end like a sentence."""
    scores = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words = len(text.split())
        length = 1.0 if 5 <= words <= 50 else max(0.0, 1.0 - abs(words - 28) / 100)
        scores.append(length + 0.5 * text.rstrip().endswith((".", "!", "?")))
    return scores


if __name__ == "__main__":
    print(reward(["Say hello."], ["Hello, it is nice to meet you."]))
'''


def _quoted(text: str | None) -> str:
    """Text as a YAML value: plain where that is safe."""
    assert text is not None
    plain = text and all(c.isalnum() or c in "/._-" for c in text) and (text[0].isalpha() or text[0] in "/.")
    return text if plain and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off") else "'" + text.replace("'", "''") + "'"


def _name(output: Path) -> str:
    """A run's name from the file's."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in output.stem).lstrip("._-")[:64]
    return name or "run"


def save(asked: Asked, found: Look, output: Path) -> list[Path]:
    """Writes the files and gives their paths. OutputError where one is there already; then none is written."""
    files = write(asked, found, output)
    for file in files:
        if file.exists():
            raise OutputError(f"{file} exists already", why="init overwrites nothing", fix="move it away, or choose another --output")
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder {output.parent}", fix=f"mkdir -p {shlex.quote(str(output.parent))}")
    for file, text in files.items():
        write_atomically(file, text)
    return list(files)


def next_commands(found: Look, output: Path) -> list[str]:
    """What a user types now, each with what it is for."""
    recipe, name = shlex.quote(str(output)), _name(output)
    commands = [
        (f"orchestrator plan {recipe}", "what your machine decides, and what makes no sense"),
        (f"orchestrator inspect {recipe}", "the first batch, coloured by what is learned"),
        (f"orchestrator train {recipe}", f"writes runs/{name}: report.html, and export/, the model"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"{command:<{width}}  # {why}" for command, why in commands]
