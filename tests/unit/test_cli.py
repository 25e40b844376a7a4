"""What a command prints last."""

from pathlib import Path

from orchestrator.assemble import Outcome
from orchestrator.cli import held_out


def outcome(before: dict[str, float], after: dict[str, float]) -> Outcome:
    return Outcome(Path("run"), Path("run/export"), Path("run/report.html"), 3, before, after)


def test_the_table_of_held_out_metrics_has_rows_where_there_are_any() -> None:
    assert held_out({"run": outcome({}, {})}).row_count == 0, "without data.eval nothing is printed"
    table = held_out({"sft": outcome({}, {}), "dpo": outcome({"eval/loss": 0.7, "eval/odd": 1.0}, {"eval/loss": 0.5, "eval/odd": 1.0})})
    assert [list(column.cells) for column in table.columns] == [["loss"], [""], [""], ["0.700"], ["0.500"]]
