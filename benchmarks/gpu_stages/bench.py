"""What the stages share: records of results (one JSON line each), surroundings, and the time left.

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
    """The machine of a measurement."""

    device: str
    """`cuda` or `cpu`."""
    card: str
    """Name of the device. Example: NVIDIA H100 80GB HBM3."""
    versions: str
    command: str
    """The command line as it was typed."""
    date: str


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a result with a limit."""

    stage: int
    name: str
    result: str
    limit: str
    ok: bool
    """True if the result keeps the limit."""
    goal: bool = False
    """True for a speed to reach: a miss is reported, and on a CPU fails nothing."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One contestant's training steps at one shape."""

    stage: int
    shape: str
    who: str
    """`ours` or `TRL`."""
    setting: str
    tokens_per_s: float
    """Tokens with prompts counted once per answer, as TRL counts."""
    step_s: float
    mfu: float
    """Share of the peak rate, by the model's FLOPs at the positions that were computed."""
    peak_gb: float
    """Peak of allocated memory; on a CPU of resident memory."""
    reserved_gb: float
    losses: tuple[float, ...]
    """Losses of the first steps."""
    norm: float
    """Norm of the first gradient."""
    plan_gb: float | None = None
    """Memory that the plan predicts."""


@dataclass(frozen=True, slots=True)
class Note:
    """A measurement without a limit, or the reason why one was left out."""

    stage: int
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a part of a stage."""

    stage: int
    part: str
    seconds: float
    error: str | None
    """Its last line if it failed, or that its deadline passed."""


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
    """The surroundings of a stage."""

    stage: int
    device: str
    out: Path
    """File to append records to."""
    work: Path
    """An empty folder."""
    ends: float
    """time.monotonic() of the deadline."""
    terminal: TextIO = sys.stdout
    """Stream for results."""

    @property
    def small(self) -> bool:
        """True on a CPU, where everything runs at small sizes."""
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def add(self, record: Record) -> None:
        """Writes a record and prints it."""
        append(self.out, record)
        print(describe(record), file=self.terminal, flush=True)

    def below(self, name: str, value: float | tuple[float, ...], limit: float, *, goal: bool = False) -> None:
        """Checks that each value is at most limit; nan fails."""
        values = value if isinstance(value, tuple) else (value,)
        text = ", ".join(f"{v:.3g}" for v in values)
        self.add(Check(self.stage, name, text, f"<= {limit:g}", all(v <= limit for v in values), goal))

    def above(self, name: str, value: float, limit: float, *, goal: bool = False) -> None:
        self.add(Check(self.stage, name, f"{value:.3g}", f">= {limit:g}", bool(value >= limit), goal))

    def holds(self, name: str, ok: bool, result: str, limit: str) -> None:
        self.add(Check(self.stage, name, result, limit, ok))

    def note(self, name: str, text: str) -> None:
        self.add(Note(self.stage, name, text))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turns an exception into a failed check; the next check runs all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(Check(self.stage, name, f"{type(error).__name__}: {first_line(error)}", "runs", False))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def describe(record: Record) -> str:
    """A record as one line for the terminal."""
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
