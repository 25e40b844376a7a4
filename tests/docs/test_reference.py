"""docs/recipe-reference.md is generated from the schema."""

import re
from pathlib import Path

from orchestrator.recipe.reference_page import render
from orchestrator.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe-reference.md"


def test_the_committed_page_is_fresh() -> None:
    assert PAGE.read_text() == render(), "run: orchestrator config reference > docs/recipe-reference.md"


def test_every_key_has_a_description() -> None:
    rows = [row for row in render().splitlines() if row.startswith("| `")]
    assert len(rows) > 150
    assert not [row for row in rows if row.endswith("|  |")], (
        "give the field a description in recipe/schema_*.py"
    )


def test_sections_types_bounds_and_defaults() -> None:
    page = render()
    for section in Recipe.model_fields:
        assert re.search(rf"^## {section}\b", page, re.MULTILINE)
    assert "\n## data.train[], data.eval[]\n" in page, "printed once for both places"
    assert "| `effective` | whole number, ≥ 1 | `256` |" in page
    assert "| `learning_rate` | number, > 0 | required |" in page
    assert "| `wandb` | `online` \\| `offline` \\| `off` | `offline` |" in page
