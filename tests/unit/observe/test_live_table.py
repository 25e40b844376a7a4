"""A step line is read back as the step; other lines of a log are not."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.observe.live_table import LiveTable, StepLine

words = st.text("abcdefgrt/_", min_size=1, max_size=8)


@given(
    st.integers(0, 9999),
    st.integers(1, 9999),
    st.dictionaries(words, st.text("0123456789.e-,", min_size=1), min_size=1),
)
def test_a_line_is_read_back(step: int, total: int, columns: dict[str, str]) -> None:
    row = StepLine(step, total, columns)
    assert StepLine.parse(str(row)) == row


@pytest.mark.parametrize(
    "line", ["", "step 3 of 4", "evaluation at step 3  loss 0.1", "note: step 3/4  loss 1", "step 3/4  loss"]
)
def test_other_lines_are_not_steps(line: str) -> None:
    assert StepLine.parse(line) is None


def test_the_table_shows_the_newest_steps_and_what_is_left() -> None:
    output = io.StringIO()
    table = LiveTable(Console(file=output, force_terminal=True, width=80))
    for step in range(1, 12):
        table.add(StepLine(step, 20, {"loss": f"0.{step:02d}", "eta": "8s"}))
    table.stop()
    last = output.getvalue().rsplit("loss", 1)[-1]
    assert "0.11" in last and "0.04" in last and "0.03" not in last
    assert "11/20 steps, 8s left" in last
