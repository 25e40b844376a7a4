"""The glossary has twenty words, each with a place that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(
    r"^\| \*\*(?P<word>[\w -]+)\*\* \| .+\. \| `(?P<file>[\w./]+)`(?: \(`(?P<name>\w+)`\))? \|$", re.MULTILINE
)


def test_the_glossary_names_places_that_exist() -> None:
    rows = list(ROW.finditer((ROOT / "docs" / "glossary.md").read_text()))
    assert len({row["word"] for row in rows}) == 20
    for row in rows:
        text = (ROOT / row["file"]).read_text()
        assert row["name"] is None or f"\nclass {row['name']}" in text, row[0]
