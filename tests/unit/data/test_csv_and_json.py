"""CSV, TSV and JSON arrays give the rows of JSONL, with the values that `datasets` reads from the file."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator.core.errors import DataError
from orchestrator.data.files import choose, records
from orchestrator.data.sources import load_rows
from orchestrator.recipe.schema import Columns, Data

DATA = Data(train="unused")
PAIR = {"prompt": "The sea is", "chosen": ' "blue",\nand deep.', "rejected": " ä dry; place."}


def table(rows: list[dict[str, Any]], separator: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(path: Path, texts: tuple[str, ...] = ()) -> list[Any]:
    bad: list[Any] = []
    values = [record.value for record in records(str(path), bad, texts)]
    assert not bad
    return values


def by_datasets(path: Path, cache: Path) -> list[Any]:
    from datasets import load_dataset

    loaded: Any = load_dataset("csv", data_files=str(path), split="train", cache_dir=str(cache))
    return list(loaded)


WRITTEN = {
    "pairs.csv": table([PAIR]).encode(),
    "pairs.tsv": table([PAIR], "\t").encode(),
    "pairs.csv.gz": gzip.compress(table([PAIR]).encode()),
    "excel.csv": b"\xef\xbb\xbf" + table([PAIR]).encode(),
    "pairs.json": json.dumps([PAIR], indent=2).encode(),
    "line.json": json.dumps([PAIR]).encode(),
    "lines.json": json.dumps(PAIR).encode() + b"\n",
    "pairs.json.gz": gzip.compress(json.dumps([PAIR]).encode()),
    "lines.json.gz": gzip.compress(json.dumps(PAIR).encode()),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_file_gives_the_row_that_jsonl_gives(tmp_path: Path, name: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / name).write_bytes(WRITTEN[name])
    (expected,) = load_rows(str(tmp_path / "pairs.jsonl"), DATA, "preference").rows
    (row,) = load_rows(str(tmp_path / name), DATA, "preference").rows
    assert (row.prompt, row.chosen, row.rejected) == (expected.prompt, expected.chosen, expected.rejected)


COLUMNS = {
    "whole": ["3", "-4", "0", "12"],
    "numbers": ["3", "0.5", "-1e-3", "2.0"],
    "gaps": ["0.5", "", "NA", "nan"],
    "truth": ["True", "false", "TRUE", "False"],
    "words": ["yes", "3", "0.5 m", "true story"],
    "some words": ["yes", "", "no", ""],
    "dates": ["2026-11-27", "2026-11-28", "x", "y"],
    "quoted": ['a "b"', "c, d", "e\nf", " g "],
}


def test_columns_are_what_datasets_reads_them_as(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text(
        table([dict(zip(COLUMNS, cells, strict=True)) for cells in zip(*COLUMNS.values(), strict=True)])
    )
    assert read(file) == by_datasets(file, tmp_path / "cache")


def test_columns_drawn_at_random_are_what_datasets_reads_them_as(tmp_path: Path) -> None:
    draw = random.Random(0)
    cells = [
        "1",
        "-2",
        "2.5",
        "1e3",
        ".5",
        "True",
        "false",
        "word",
        "a,b",
        'say "x"',
        "two\nlines",
        "ü",
        "7 ",
    ]
    rows = []
    pools = [draw.sample(cells, draw.choice((1, 2, 5))) for _ in range(60)]
    for _ in range(4):
        rows.append({f"c{i}": draw.choice(pool) for i, pool in enumerate(pools)})
    file = tmp_path / "table.csv"
    file.write_text(table(rows))
    assert read(file) == by_datasets(file, tmp_path / "cache")


def test_what_pandas_would_lose_stays(tmp_path: Path) -> None:
    """pandas makes each a wrong example: a missing answer, another number, another type because of a gap."""
    rows = [{"text": "None", "id": "007", "n": "3"}, {"text": "word", "id": "1", "n": ""}]
    file = tmp_path / "table.csv"
    file.write_text(table(rows))
    assert read(file) == [{"text": "None", "id": "007", "n": 3}, {"text": "word", "id": "1", "n": None}]
    assert pd.read_csv(file)["id"].tolist() == [7, 1]  # what is avoided


def test_prompts_and_answers_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "sums.csv"
    file.write_text(
        table(
            [{"ask": "1", "completion": "2", "answer": "2"}, {"ask": "3", "completion": "4.0", "answer": "4"}]
        )
    )
    data = DATA.model_copy(update={"columns": Columns(prompt="ask")})  # pyright: ignore[reportCallIssue]
    rows = load_rows(str(file), data, "sft").rows
    assert [(row.prompt, row.completion, row.answer) for row in rows] == [("1", "2", "2"), ("3", "4.0", "4")]


def test_labels_margins_and_other_columns_have_their_types(tmp_path: Path) -> None:
    file = tmp_path / "kto.csv"
    file.write_text(
        table(
            [
                {"prompt": "a", "completion": "b", "label": "True"},
                {"prompt": "a", "completion": "c", "label": "False"},
            ]
        )
    )
    assert [row.label for row in load_rows(str(file), DATA, "unpaired").rows] == [True, False]
    file.write_text(table([{**PAIR, "margin": "1"}, {**PAIR, "margin": "0.5"}]))
    assert [row.margin for row in load_rows(str(file), DATA, "preference").rows] == [1.0, 0.5]
    file.write_text(table([{"prompt": "a", "answer": "4", "level": "2", "source": "x"}]))
    assert load_rows(str(file), DATA, "prompt").rows[0].columns == {"answer": 4, "level": 2, "source": "x"}


def test_messages_as_json_text_are_messages_with_a_note(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}]
    file = tmp_path / "chat.csv"
    file.write_text(table([{"messages": json.dumps(messages), "tools": ""}]))
    loaded = load_rows(str(file), DATA, "sft")
    assert loaded.rows[0].messages == messages
    (note,) = loaded.notes
    assert note.startswith(f"{file}: messages") and "JSON" in note
    file.write_text(table([{"messages": str(messages)}]))
    with pytest.raises(DataError, match=r"chat\.csv:2: messages .*Python.*json\.dumps"):
        load_rows(str(file), DATA, "sft")


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", r"a\.csv:3: 3 fields.*2"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd\n', r"a\.csv:4: 1 fields"),
        ("a.csv", 'prompt,completion\na,"b\n', r"a\.csv:2: [\s\S]*doubled"),
        ("a.csv", 'prompt,completion\n"a"b,c\n', r"a\.csv:2: "),
        ("a.csv", "prompt;completion\na;b\n", r"separated by ';'[\s\S]*commas"),
        ("a.csv", "prompt\tcompletion\na\tb\n", r"or call it \.tsv"),
        ("a.csv", "prompt,prompt\na,b\n", "several columns are named prompt"),
        ("a.csv", "", "no usable row"),
        ("a.csv", "prompt,completion\n", "no usable row"),
        ("a.json", '{"data": [{"prompt": "a", "completion": "b"}]}', "columns are data"),
        ("a.json", '{\n "data": [{"prompt": "a"}]}', r"one object, with the list data in it[\s\S]*one array"),
        ("a.json", '[{"prompt": "a"},\n {"prompt": ]', r"broken JSON[\s\S]*line 2"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, 3]', r"a\.json:2: a record must be an object"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, pattern: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=pattern):
        load_rows(str(tmp_path / name), DATA, "sft")


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,b\nc,ü\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8[\s\S]*CSV UTF-8"):
        load_rows(str(tmp_path / "a.csv"), DATA, "sft")


def test_cells_longer_than_pythons_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(table([{"text": "x" * 300_000}]))
    (row,) = load_rows(str(tmp_path / "a.csv"), DATA, "sft").rows
    assert len(row.text or "") == 300_000 and csv.field_size_limit() == before


def test_a_folder_of_csv_is_read_and_is_noted_beside_jsonl(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(table([PAIR]))
    (tmp_path / "test.json").write_text(json.dumps([PAIR]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [file.name for file in choose(tmp_path, None, "train").files] == ["train.csv"]
    assert [file.name for file in choose(tmp_path, None, "test").files] == ["test.json"]
    (tmp_path / "train.jsonl").write_text(json.dumps(PAIR))
    chosen = choose(tmp_path, None, None)
    assert [file.name for file in chosen.files] == ["train.jsonl"] and chosen.passed_over == (
        "test.json",
        "train.csv",
    )
