"""docs/design.md draws the rooms in the order that imports keep."""

from pathlib import Path

from tests.unit.test_layers import ORDER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "design.md"


def test_the_page_draws_every_room_in_its_place() -> None:
    drawing = PAGE.read_text().split("## Rooms")[1].split("\n## ")[0]
    drawn = [
        line[:35].split() for line in drawing.splitlines() if line.startswith("    ") and line[4:5].strip()
    ]
    assert [rooms for rooms in drawn if rooms] == [
        floor.replace(" | ", " ").split() for floor in ORDER.split(" > ")
    ]
