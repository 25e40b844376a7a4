"""What the stages share: what they find (one JSON line each), where they run, and how much time is left.
Imports no torch."""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Machine:
    """What a result was measured on. command: as it was given."""

    device: str
    card: str
    versions: str
    command: str
    date: str


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. ok: the result keeps the limit. goal: a speed to reach; missing it is told and on a CPU
    fails nothing."""

    stage: int
    name: str
    result: str
    limit: str
    ok: bool
    goal: bool = False


@dataclass(frozen=True, slots=True)
class Speed:
    """One contestant's training steps at one shape. tokens_per_s: prompts counted once per answer, as TRL
    counts; mfu: of the model's FLOPs at the positions it computed; peak_gb: allocated (on a CPU: resident);
    plan_gb: predicted. losses: of the first two steps; norm: of the first gradient."""

    stage: int
    shape: str
    who: str
    setting: str
    tokens_per_s: float
    step_s: float
    mfu: float
    peak_gb: float
    reserved_gb: float
    losses: tuple[float, ...]
    norm: float
    plan_gb: float | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """A measurement that is compared with nothing, or what was left out and why."""

    stage: int
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A part of a stage is over. error: the last thing it said, where it failed or was ended at its deadline."""

    stage: int
    part: str
    seconds: float
    error: str | None


Record = Machine | Check | Speed | Note | Ended
KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in (Machine, Check, Speed, Note, Ended)}


def to_line(record: Record) -> str:
    """One JSON object, its kind first."""
    return json.dumps({"kind": type(record).__name__.lower(), **asdict(record)})


def from_line(line: str) -> Record:
    fields: dict[str, Any] = json.loads(line)
    kind = KINDS[fields.pop("kind")]
    return kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )


def read(path: Path) -> list[Record]:
    """The records of a file, in the order they were written."""
    return [from_line(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(to_line(record) + "\n")


@dataclass(frozen=True, slots=True)
class Bench:
    """A stage's surroundings. work: an empty folder; ends: time.monotonic() of its deadline; terminal: where
    results are said."""

    stage: int
    device: str
    out: Path
    work: Path
    ends: float
    terminal: TextIO = sys.stdout

    @property
    def small(self) -> bool:
        """On a CPU everything runs in little."""
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def add(self, record: Record) -> None:
        """Writes a record and says it."""
        append(self.out, record)
        print(said(record), file=self.terminal, flush=True)

    def below(self, name: str, value: float | tuple[float, ...], limit: float, *, goal: bool = False) -> None:
        """Each value must be at most limit; nan is not."""
        values = value if isinstance(value, tuple) else (value,)
        text = ", ".join(f"{v:.3g}" for v in values)
        self.add(Check(self.stage, name, text, f"<= {limit:g}", all(v <= limit for v in values), goal))

    def above(self, name: str, value: float, limit: float, *, goal: bool = False) -> None:
        self.add(Check(self.stage, name, f"{value:.3g}", f">= {limit:g}", bool(value >= limit), goal))

    def holds(self, name: str, ok: bool, found: str, limit: str) -> None:
        self.add(Check(self.stage, name, found, limit, ok))

    def note(self, name: str, text: str) -> None:
        self.add(Note(self.stage, name, text))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A check that breaks is a failed check, and the next one is made all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(Check(self.stage, name, f"{type(error).__name__}: {first_line(error)}", "runs", False))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def said(record: Record) -> str:
    """One line for the terminal."""
    if isinstance(record, Check):
        verdict = "ok    " if record.ok else "MISSED" if record.goal else "FAILED"
        return f"[{record.stage}] {verdict} {record.name}: {record.result} ({record.limit})"
    if isinstance(record, Speed):
        return (
            f"[{record.stage}] {record.shape} {record.who} ({record.setting}): {record.tokens_per_s:.0f} "
            f"tok/s, {record.step_s:.2f} s/step, "
            f"MFU {record.mfu:.1%}, peak {record.peak_gb:.2f} GB, losses "
            f"{', '.join(f'{loss:.6f}' for loss in record.losses)}, norm {record.norm:.5g}"
        )
    if isinstance(record, Note):
        return f"[{record.stage}] {record.name}: {record.text}"
    if isinstance(record, Ended):
        return f"[{record.stage}] {record.part}: {record.error or 'done'} after {record.seconds:.0f} s"
    return f"{record.card}; {record.versions}"
