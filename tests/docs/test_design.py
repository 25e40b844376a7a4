"""The floor plan in docs/design.md is the one that the imports are held to."""

import re
from pathlib import Path

from tests.unit.test_layers import FLOORS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "design.md"
FLOOR = re.compile(r"^ {4} ?(\d+)  (\w+(?: \| \w+)*)(?: {2,}\S.*)?$", re.MULTILINE)
UNSPOKEN = {"__init__", "__main__"}


def test_every_room_stands_on_its_floor() -> None:
    drawn = {int(number): set(rooms.split(" | ")) for number, rooms in FLOOR.findall(PAGE.read_text())}
    built = {number: set(rooms) - UNSPOKEN for number, rooms in enumerate(FLOORS, start=1) if set(rooms) - UNSPOKEN}
    assert drawn == built
