"""The records of a run as a table of at most 40 lines, and the page that holds it."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from gpu_stages.bench import Check, Ended, Machine, Note, Record, Speed

LINES = 40
PAGE = """# Results

`python benchmarks/gpu.py --results FILE.jsonl` writes one table for each card.
docs/measured.md has other results."""
EQUAL = {"cuda": 2e-2, "cpu": 1e-4}
"""Largest relative difference between two contestants that took the same step: bf16 on a GPU, fp32 on a
CPU."""


def failed(records: Sequence[Record]) -> bool:
    """True if a check failed, a part did not end well, or a speed was missed on a GPU."""
    on_gpu = any(isinstance(r, Machine) and r.device == "cuda" for r in records)
    checks = [r for r in records if isinstance(r, Check)]
    return any(not c.ok and (on_gpu or not c.goal) for c in checks) or any(
        isinstance(r, Ended) and r.error for r in records
    )


def difference(ours: Speed, theirs: Speed, device: str) -> float:
    """Largest relative difference of the losses and the first gradient's norm.

    In bf16 only the first step is compared: after it one contestant has bf16 copies of its weights and the
    other has none, so updates below bf16's grid show in only one of them."""
    losses = zip(ours.losses[: 1 if device == "cuda" else None], theirs.losses, strict=False)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in [*losses, (ours.norm, theirs.norm)])


def fastest(speeds: Sequence[Speed]) -> Speed:
    return max(speeds, key=lambda s: s.tokens_per_s)


def best(records: Sequence[Record], shape: str, who: str) -> Speed | None:
    speeds = [r for r in records if isinstance(r, Speed) and r.shape == shape and r.who == who]
    return fastest(speeds) if speeds else None


def latest(records: Sequence[Record]) -> list[Record]:
    """Each stage's records from the last command that ran it, with those commands: a file may hold
    several."""
    runs: list[list[Record]] = []
    for record in records:
        if isinstance(record, Machine):
            runs.append([])
        runs[-1].append(record)
    last = {r.stage: number for number, run in enumerate(runs) for r in run if not isinstance(r, Machine)}
    return [
        r
        for number, run in enumerate(runs)
        for r in run
        if number in ([last[r.stage]] if not isinstance(r, Machine) else last.values())
    ]


def table(records: Sequence[Record]) -> list[str]:
    """The table as Markdown: speeds, then checks; failed checks in full, passed ones as far as they fit."""
    machines = [r for r in records if isinstance(r, Machine)]
    machine = machines[-1]
    lines = [
        f"{machine.date}, {machine.card}; {machine.versions}",
        "",
        *(f"    {m.command}" for m in machines),
        "",
    ]
    lines += _speeds(records, machine.device)
    notes = [f"{n.name}: {n.text}" for n in records if isinstance(n, Note) and n.name.startswith("*")]
    ended = [f"stage {e.stage}, {e.part}: {e.error}" for e in records if isinstance(e, Ended) and e.error]
    tail = [*(f"- {line.removeprefix('*')}" for line in notes), *(f"- not ended: {line}" for line in ended)]
    return [*lines, *_checks(records, LINES - len(lines) - len(tail)), *tail]


def _speeds(records: Sequence[Record], device: str) -> list[str]:
    shapes = list(dict.fromkeys(r.shape for r in records if isinstance(r, Speed)))
    if not shapes:
        return []
    lines = [
        "| shape | ours tok/s, MFU, peak GB | TRL tok/s, MFU, peak GB | ratio | plan / measured GB |",
        "|---|---|---|---|---|",
    ]
    for shape in shapes:
        ours, trl = best(records, shape, "ours"), best(records, shape, "TRL")
        ratio = (
            ""
            if ours is None or trl is None
            else f"{ours.tokens_per_s / trl.tokens_per_s:.2f}x, {difference(ours, trl, device):.0e} apart"
        )
        plan = "" if ours is None or ours.plan_gb is None else f"{ours.plan_gb:.2f} / {ours.peak_gb:.2f}"
        lines.append(f"| {shape} | {_cell(ours)} | {_cell(trl)} | {ratio} | {plan} |")
    return [*lines, ""]


def _cell(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    return f"{speed.tokens_per_s:,.0f}, {speed.mfu:.0%}, {speed.peak_gb:.1f} ({speed.setting})"


def _checks(records: Sequence[Record], room: int) -> list[str]:
    """Failed checks in full; passed checks in full if they fit, else the stages with most checks as one
    line."""
    checks = [r for r in records if isinstance(r, Check)]
    bad, good = [c for c in checks if not c.ok], [c for c in checks if c.ok]
    stages = {
        number: [_row(c) for c in good if c.stage == number]
        for number in dict.fromkeys(c.stage for c in good)
    }
    while sum(map(len, stages.values())) + len(bad) > room - 2 and any(
        len(rows) > 1 for rows in stages.values()
    ):
        largest = max(stages, key=lambda number: len(stages[number]))
        stages[largest] = [f"| {largest}: {len(stages[largest])} checks | passed | |"]
    return [
        f"| {len(good)} of {len(checks)} checks passed | result | limit |",
        "|---|---|---|",
        *map(_row, bad),
        *chain(*stages.values()),
    ]


def _row(check: Check) -> str:
    verdict = "" if check.ok else " **missed**" if check.goal else " **FAILED**"
    return f"| {check.stage}: {check.name} | {check.result}{verdict} | {check.limit} |".replace("\n", " ")


def write_page(page: Path, records: Sequence[Record]) -> None:
    """Puts the table at the top of the page and removes the older one of the same card."""
    records = latest(records)
    machine = next(r for r in records if isinstance(r, Machine))
    title = f"## {machine.card}"
    older = page.read_text().split("\n## ")[1:] if page.exists() else []
    kept = [f"## {section}".rstrip() for section in older if not f"## {section}".startswith(f"{title}\n")]
    page.write_text("\n\n".join([PAGE, f"{title}\n\n" + "\n".join(table(records)), *kept]) + "\n")
