"""The numbers of the nets in CONTRIBUTING.md are right."""

from pathlib import Path

from orchestrator.recipe.reference_page import KEYS, VALUES
from tests.architectures.table import NAMES
from tests.end_to_end.test_samplers import CASES
from tests.invariants.test_samplers import GRID, KINDS
from tests.unit.data.test_columns_net import COLUMNS, STAGES

ROOT = Path(__file__).resolve().parents[2]


def test_the_nets_have_the_sizes_that_the_page_gives() -> None:
    page = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"({len(COLUMNS)} kinds × {len(STAGES)} kinds of stage" in page
    assert f"({len(GRID)} × {len(KINDS)} corrections" in page and f"{len(CASES)} whole runs" in page
    assert f"every architecture ({len(NAMES)}:" in page
    assert f"({KEYS} keys, {VALUES} values" in page
