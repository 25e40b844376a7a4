"""Report of the data in a plan: rows, lengths, and everything that was left out."""

from dataclasses import dataclass

from orchestrator.data.bad_rows import grouped
from orchestrator.data.dataset import PlanInput

MAX_REASONS = 3
"""Reasons of bad rows that a plan prints."""
BINS = 10
"""Bins of the histogram of lengths."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """The data of a run after encoding."""

    rows: int
    """Rows read."""
    bad: tuple[str, ...]
    """Unusable rows that were left out. Example: "pairs.jsonl:7: chosen is empty"."""
    kept: int
    """Rows that are trained on."""
    dropped: int
    """Rows that were dropped because they are too long."""
    truncated: int
    """Rows that were cut to data.max_length."""
    made_identical: int
    """Pairs that became equal when they were cut."""
    not_prefix: int
    """Rows whose prompt is not a token prefix of the whole."""
    formats: tuple[str, ...]
    """Format of each source. Example: "preference, conversational"."""
    sources: tuple[str, ...]
    """Name of each source."""
    held_out: int
    """Held-out rows."""
    quantiles: dict[str, int]
    """Tokens by quantile. Example: {"p50": 212, "max": 1024}."""
    histogram: tuple[tuple[int, int], ...]
    """(upper bound in tokens, rows) of equal bins of the lengths, without empty ones."""
    unused: tuple[str, ...] = ()
    """Columns that no part of the run reads."""
    notes: tuple[str, ...] = ()
    """Further remarks on the data."""
    turns: int = 0
    """Truncated rows that lost whole turns, the oldest ones."""
    reasons: tuple[str, ...] = ()
    """Reasons of the bad rows, equal ones grouped."""


def data_report(data: PlanInput, notes: tuple[str, ...] = ()) -> DataReport:
    """Report of a data set. notes: remarks of the algorithm, after those of the data."""
    report = data.report
    top = max(report.lengths)
    width = max(1, -(-top // BINS))
    counts = [0] * BINS
    for length in report.lengths:
        counts[min(BINS - 1, (length - 1) // width)] += 1
    return DataReport(
        rows=report.rows,
        bad=tuple(str(row) for row in (*data.loaded.bad, *report.bad)),
        reasons=tuple(grouped((*data.loaded.bad, *report.bad), MAX_REASONS)),
        kept=report.kept,
        dropped=report.dropped,
        truncated=report.truncated,
        made_identical=report.identical,
        not_prefix=len(report.not_prefix),
        formats=data.loaded.formats,
        sources=data.loaded.names,
        held_out=len(data.held_out),
        quantiles=report.quantiles(),
        histogram=tuple(((i + 1) * width, n) for i, n in enumerate(counts) if n),
        unused=data.unused,
        notes=(*data.notes, *notes),
        turns=report.turns,
    )
