"""The tables that commands print."""

from pathlib import Path

import pytest
from rich.table import Table

from orchestrator.cli.held_out import held_out
from orchestrator.cli.options import show
from orchestrator.run.supervise import Outcome


def outcome(before: dict[str, float], after: dict[str, float]) -> Outcome:
    return Outcome(Path("run"), Path("run/export"), Path("run/report.html"), 3, before, after)


def test_the_table_of_held_out_metrics_has_a_row_for_each_metric() -> None:
    assert held_out({"run": outcome({}, {})}).row_count == 0, "without data.eval nothing is printed"
    before, after = (
        {"eval/reward/mean": m, "eval/reward/brief": m, "eval/reward/whole": w}
        for m, w in ((0.575, 0.5), (0.592, 0.333))
    )
    assert held_out({"grpo": outcome(before, after)}).row_count == 3, (
        "a component that falls is shown beside the reward that rises"
    )
    single = {name: value for name, value in after.items() if not name.endswith("whole")}
    assert held_out({"grpo": outcome(single, single)}).row_count == 1, "one component is the reward itself"
    table = held_out(
        {
            "sft": outcome({}, {}),
            "dpo": outcome({"eval/loss": 0.7, "eval/odd": 1.0}, {"eval/loss": 0.5, "eval/odd": 1.0}),
        }
    )
    assert [list(column.cells) for column in table.columns] == [["loss"], [""], [""], ["0.700"], ["0.500"]]


def test_an_unknown_accuracy_is_a_dash_and_an_unmeasured_one_is_empty() -> None:
    before, after = (
        {"eval/loss": 0.69},
        {"eval/loss": 0.5, "eval/preference_accuracy": 0.75, "eval/logp_accuracy": 0.5},
    )
    table = held_out({"sft": outcome({"eval/loss": 2.0}, {"eval/loss": 1.0}), "dpo": outcome(before, after)})
    assert list(table.columns[0].cells) == [
        "loss",
        "preference_accuracy (by implicit reward)",
        "logp_accuracy (by log-prob per token)",
    ]
    assert [list(column.cells)[1] for column in table.columns[1:]] == ["", "", "–", "0.750"]


def test_a_table_in_a_pipe_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a-run-of-a-rather-long-name-{i}" for i in range(8)]
    table = Table(*names, box=None)
    table.add_row(*names)
    show(table)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == row.split() == names
