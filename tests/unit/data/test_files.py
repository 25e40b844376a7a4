"""Splits of local folders in the hub's layout; values of tables and lines that Python cannot hold."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.core.errors import ConfigError, DataError, MissingInput
from orchestrator.data.bad_rows import BadRecord
from orchestrator.data.files import choose
from orchestrator.data.formats import Reads
from orchestrator.data.sources import check_apart, load_rows
from orchestrator.data.values import in_json, plain
from orchestrator.recipe.schema import Columns, Data, Source

DATA = Data(train="unused")


def lay_out(folder: Path, *names: str) -> Path:
    """Files of one row each, whose prompt is the file's name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": name, "completion": "x"}
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row]), file)
        else:
            file.write_text(json.dumps(row) + "\n")
    return folder


def chosen(folder: Path, split: str | None = None, subset: str | None = None) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in choose(folder, subset, split).files]


SHARDS = (
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/test-00000-of-00001.parquet",
)
LAYOUTS = [
    (("train.jsonl", "test.jsonl", "validation.jsonl"), "train", ["train.jsonl"]),
    (("train.jsonl", "val.jsonl"), "validation", ["val.jsonl"]),
    (("train.jsonl", "dev.parquet"), "valid", ["dev.parquet"]),
    (("my-train-set.jsonl", "my-eval-set.jsonl"), "test", ["my-eval-set.jsonl"]),
    (("my-train-set.jsonl", "my-eval-set.jsonl"), "eval", ["my-eval-set.jsonl"]),
    (("train1.jsonl", "train2.jsonl", "test.jsonl"), "train", ["train1.jsonl", "train2.jsonl"]),
    (SHARDS, "train", list(SHARDS[:2])),
    (SHARDS, "test", [SHARDS[2]]),
    (
        ("data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"),
        "train_sft",
        ["data/train_sft-00000-of-00001.parquet"],
    ),
    (("train_prefs.jsonl", "train_sft.jsonl"), "train_sft", ["train_sft.jsonl"]),
    (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), "train", ["train/a.jsonl", "train/b.jsonl"]),
    (("data/train/a.jsonl", "data/test/a.jsonl"), "test", ["data/test/a.jsonl"]),
    (("a.jsonl", "pretrain.jsonl"), "train", ["a.jsonl", "pretrain.jsonl"]),
]

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: parts/a-*}
  - split: test
    path: [held.jsonl]
- config_name: socratic
  data_files: other/**
- config_name: whole
  data_dir: parts
%s---
# A data set
"""


@pytest.mark.parametrize(
    ("subset", "split", "files"),
    [
        ("main", "train", ["parts/a-1.jsonl", "parts/a-2.parquet"]),
        ("main", "test", ["held.jsonl"]),
        ("socratic", None, ["other/deep/x.jsonl"]),
        ("whole", None, ["parts/a-1.jsonl", "parts/a-2.parquet", "parts/b.jsonl"]),
    ],
)
def test_a_readme_declares_the_files_of_a_subset_and_a_split(
    tmp_path: Path, subset: str, split: str | None, files: list[str]
) -> None:
    lay_out(
        tmp_path, "parts/a-1.jsonl", "parts/a-2.parquet", "parts/b.jsonl", "held.jsonl", "other/deep/x.jsonl"
    )
    (tmp_path / "README.md").write_text(CARD % "")
    assert chosen(tmp_path, split, subset) == files
    for subset_name, error, pattern in (
        ("main", ConfigError, "splits test, train|splits train, test"),
        ("none", MissingInput, "main, socratic, whole"),
    ):
        with pytest.raises(error, match=pattern):
            chosen(tmp_path, None, subset_name)
    with pytest.raises(ConfigError, match="has the subsets main, socratic, whole, and none is named"):
        chosen(tmp_path)
    (tmp_path / "README.md").write_text(
        CARD % "- {config_name: tried, data_files: held.jsonl, default: true}\n"
    )
    assert chosen(tmp_path) == ["held.jsonl"]


def test_a_readme_with_missing_files_or_a_broken_head_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "a.jsonl")
    for text in ("no head", "---\nlicense: mit\n---\n", "---\nnever closed"):
        (tmp_path / "README.md").write_text(text)
        assert chosen(tmp_path) == ["a.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_files: gone-*.jsonl}]\n---\n")
    with pytest.raises(MissingInput, match=r"README\.md"):
        chosen(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ConfigError, match=r"README\.md.*YAML"):
        chosen(tmp_path)


@pytest.mark.parametrize(("names", "split", "files"), LAYOUTS)
def test_a_split_of_a_folder_is_that_split(tmp_path, names, split, files):
    assert chosen(lay_out(tmp_path, *names), split) == files


def test_the_only_split_needs_no_name_and_so_do_files_without_one(tmp_path):
    assert chosen(lay_out(tmp_path / "a", "test-00000-of-00001.parquet")) == ["test-00000-of-00001.parquet"]
    assert chosen(lay_out(tmp_path / "b", "x.jsonl", "y.jsonl")) == ["x.jsonl", "y.jsonl"]


def test_splits_agree_with_the_hubs_own_rules(tmp_path):
    """`datasets` resolves each layout to the same files, but for those that only we read."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    for number, (names, split, files) in enumerate(LAYOUTS):
        folder = lay_out(tmp_path / str(number), *names)
        patterns = get_data_patterns(str(folder))
        resolved = DataFilesDict.from_patterns(patterns, str(folder)).items()
        theirs = {
            str(name): sorted(Path(file).relative_to(folder).as_posix() for file in named)
            for name, named in resolved
        }
        canonical = {"valid": "validation", "eval": "test"}.get(split, split)
        if canonical in theirs:  # the name of a file as a split is ours
            assert theirs[canonical] == files


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (
            ("train.jsonl", "test.jsonl"),
            {},
            ConfigError,
            r"holds the splits train, test, and none is named[\s\S]*split: train}",
        ),
        (SHARDS, {}, ConfigError, "holds the splits train, test"),
        (
            ("train.jsonl", "more.jsonl"),
            {},
            ConfigError,
            r"holds the split train and files of no split \(more\.jsonl\)",
        ),
        (
            ("train.jsonl",),
            {"split": "test"},
            MissingInput,
            r"holds no split test[\s\S]*its splits are train",
        ),
        (("a.jsonl",), {"split": "test"}, MissingInput, r"holds no split test[\s\S]*no file name"),
        (
            ("main/train.jsonl", "socratic/train.jsonl"),
            {},
            ConfigError,
            "holds data in the folders main, socratic only",
        ),
        (("main/train.jsonl",), {"subset": "other"}, MissingInput, r"no subset other[\s\S]*the folders main"),
    ],
)
def test_a_folder_that_could_be_read_two_ways_is_refused(tmp_path, names, options, error, words):
    with pytest.raises(error, match=words):
        load_rows([Source(path=str(lay_out(tmp_path, *names)), **options)], DATA, "sft")


def test_subsets_are_subfolders_and_other_folders_are_noted(tmp_path):
    folder = lay_out(
        tmp_path,
        "main/train-00000-of-00001.parquet",
        "main/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet",
    )
    assert chosen(folder, "train", "main") == ["main/train-00000-of-00001.parquet"]
    assert chosen(
        lay_out(tmp_path / "only", "default/train/0000.parquet", "default/test/0000.parquet"), "test"
    ) == ["default/test/0000.parquet"]
    folder = lay_out(tmp_path / "mixed", "a.jsonl", "old/a.jsonl", "main/train.jsonl", "b.csv", "notes.md")
    loaded = load_rows(str(folder), DATA, "sft")
    assert [row.prompt for row in loaded.rows] == ["a.jsonl"]
    (note,) = loaded.notes
    assert note.startswith(f"{folder}: ") and note.endswith(": main, old, b.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "train"}, r"`split: train` has no meaning for .*which is a file"),
        ({"subset": "main"}, "`subset: main` has no meaning"),
        ({"revision": "abc"}, "`revision: abc` has no meaning"),
    ],
)
def test_keys_that_a_file_does_not_read_are_refused(tmp_path, options, words):
    file = lay_out(tmp_path, "a.jsonl") / "a.jsonl"
    with pytest.raises(ConfigError, match=words):
        load_rows([Source(path=str(file), **options)], DATA, "sft")
    with pytest.raises(ConfigError, match="has no meaning for toy:sft"):
        load_rows([Source(path="toy:sft", subset="x")], DATA, "sft")


def test_held_out_rows_that_are_trained_on(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "x"} for i in range(4)]
    new = {"prompt": "new", "completion": "x"}
    for name, part in {"train": rows, "copy": rows[:2], "part": [rows[0], new], "other": [new]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train, copy, part, other = (
        load_rows(str(tmp_path / f"{name}.jsonl"), DATA, "sft") for name in ("train", "copy", "part", "other")
    )
    with pytest.raises(ConfigError, match=r"data\.eval holds the rows of data\.train: all 2 of them"):
        check_apart(train, copy)
    with pytest.raises(ConfigError, match=r"data\.eval and data\.train both read .*train\.jsonl"):
        check_apart(load_rows([Source(path=str(tmp_path / "train.jsonl"), max_rows=1)], DATA, "sft"), train)
    assert (
        check_apart(train, part)
        == f"1 of 2 held-out rows are trained on too, the first at {tmp_path / 'part.jsonl'}:1"
    )
    assert check_apart(train, other) is None
    toy = [
        load_rows([Source(path="toy:sft", split=split, max_rows=64)], DATA, "sft")
        for split in ("train", "eval")
    ]
    assert check_apart(*toy) is None


ODD_LINES = [
    ('{"prompt": "a", "completion": "b", "id": ' + "9" * 5000 + "}", "broken JSON: Exceeds the limit"),
    (
        '{"prompt": "a", "completion": "b", "x": ' + "[" * 20000 + "]" * 20000 + "}",
        "broken JSON: lists or objects are nested too deeply",
    ),
]


@pytest.mark.parametrize(("line", "reason"), ODD_LINES)
def test_json_that_python_refuses_is_a_bad_row(tmp_path, line, reason):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "a", "completion": "b"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"{file}:2: {reason}"):
        load_rows(str(file), DATA, "sft")
    assert len(load_rows(str(file), Data(train="unused", max_bad_rows=1), "sft").rows) == 1


def test_a_column_nested_deeper_than_processes_can_hand_over_is_a_bad_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "x": ' + "[" * 150 + "]" * 150 + "}\n")
    with pytest.raises(DataError, match=f"{file}:1: x is nested more than 100 levels deep"):
        load_rows(str(file), DATA, "prompt")


MOMENT = datetime.datetime(2026, 11, 27, 17, 5, tzinfo=datetime.UTC)
VALUES: list[tuple[Any, Any]] = [
    ("text", "text"),
    (7, 7),
    (2**70, 2**70),
    (0.5, 0.5),
    (True, True),
    (None, None),
    (MOMENT, "2026-11-27T17:05:00+00:00"),
    (MOMENT.date(), "2026-11-27"),
    (datetime.time(17, 5), "17:05:00"),
    (datetime.timedelta(seconds=90.5), 90.5),
    (Decimal("3.140"), "3.140"),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (b"\x00\x01\xfb", "AAH7"),
    ([MOMENT.date(), {"a": (Decimal(1), b"")}], ["2026-11-27", {"a": ["1", ""]}]),
    ({1: MOMENT.date(), MOMENT.date(): 2}, {"1": "2026-11-27", "2026-11-27": 2}),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.array([[1, 2]]), [[1, 2]]),
    (np.datetime64("2026-11-27"), "2026-11-27"),
]


@pytest.mark.parametrize(("value", "form"), VALUES)
def test_every_value_has_one_form(value, form):
    converted = plain(value, "x")
    assert converted == form and type(converted) is type(form)
    assert json.loads(json.dumps(converted)) == form


def test_numbers_that_json_lacks_stay_numbers_and_are_text_in_json():
    numbers = plain([float("nan"), float("inf"), -float("inf"), np.float64("nan")], "x")
    assert np.isnan(numbers[0]) and numbers[1:3] == [float("inf"), -float("inf")]
    assert type(numbers[3]) is float
    assert in_json({"x": numbers, "y": 1.5}) == {"x": ["NaN", "Infinity", "-Infinity", "NaN"], "y": 1.5}


def test_a_value_without_a_form_is_refused_by_name():
    with pytest.raises(BadRecord, match="picture holds a object"):
        plain([object()], "picture")


def table() -> pa.Table:
    """A row with a column of each kind that Parquet has and JSON lacks."""
    columns = {
        "prompt": pa.array(["p"]),
        "stamp": pa.array([MOMENT], pa.timestamp("us", "UTC")),
        "nanos": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
        "day": pa.array([MOMENT.date()], pa.date32()),
        "clock": pa.array([datetime.time(1, 2)], pa.time64("us")),
        "span": pa.array([datetime.timedelta(seconds=2)], pa.duration("us")),
        "price": pa.array([Decimal("1.50")], pa.decimal128(8, 2)),
        "raw": pa.array([b"\x00\x01"], pa.binary()),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["x"]).dictionary_encode(),
        "half": pa.array([np.float16(0.5)], pa.float16()),
        "nested": pa.array([{"when": [MOMENT.date()]}]),
        "missing": pa.array([float("nan")]),
        "void": pa.nulls(1),
    }
    return pa.table(columns)


FORMS = {
    "stamp": "2026-11-27T17:05:00+00:00",
    "nanos": "2023-11-14T22:13:20.000000001",
    "day": "2026-11-27",
    "clock": "01:02:00",
    "span": 2.0,
    "price": "1.50",
    "raw": "AAE=",
    "map": {"a": 1},
    "kind": "x",
    "half": 0.5,
    "nested": {"when": ["2026-11-27"]},
    "void": None,
}


def test_every_column_of_a_table_reaches_prompts_in_its_form(tmp_path):
    pq.write_table(table(), tmp_path / "rows.parquet")
    (row,) = load_rows(str(tmp_path / "rows.parquet"), DATA, "prompt").rows
    columns = dict(row.columns)
    assert np.isnan(columns.pop("missing")) and columns == FORMS


def test_a_date_that_python_cannot_hold_is_a_bad_row_of_its_own(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "day": pa.array([0, 2**30], pa.date32())}), file)
    with pytest.raises(DataError, match=f"{file}:2: a value that Python cannot hold"):
        load_rows(str(file), DATA, "prompt")
    assert [
        r.columns["day"] for r in load_rows(str(file), Data(train="unused", max_bad_rows=1), "prompt").rows
    ] == ["1970-01-01"]


def test_nulls_that_a_table_fills_in_reach_no_template(tmp_path):
    """Tools and calls of other shapes give each other their keys; a null in JSON is the user's own."""
    calls = [{"type": "function", "function": {"name": "stock", "arguments": {"item": "chair"}}}]
    asked = {"role": "user", "content": "a"}
    calling = {
        "messages": [asked, {"role": "assistant", "content": None, "tool_calls": calls}],
        "tools": [{"name": "stock", "x": {"item": 1}}],
    }
    rows = [
        calling,
        {
            "messages": [asked, {"role": "assistant", "content": "b"}],
            "tools": [{"name": "other", "x": {"city": 2}}],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, lines = (
        load_rows(str(tmp_path / name), DATA, "sft").rows for name in ("rows.parquet", "rows.jsonl")
    )
    assert [(r.messages, r.tools) for r in table] == [(r.messages, r.tools) for r in lines]
    assert lines[1].tools == [{"name": "other", "x": {"city": 2}}]


def test_ultrafeedbacks_redundant_prompt_is_dropped():
    from orchestrator.data.formats import to_rows

    talk = [{"role": "user", "content": "Sky?"}]
    good, bad = (
        [*talk, {"role": "assistant", "content": "Blue."}],
        [*talk, {"role": "assistant", "content": "Green."}],
    )
    (fields,) = to_rows({"prompt": "Sky?", "chosen": good, "rejected": bad}, Columns(), "preference")
    assert fields == {"prompt": talk, "chosen": good[1:], "rejected": bad[1:]}
    with pytest.raises(
        BadRecord,
        match=r"prompt text, chosen and rejected message lists: .*; data\.columns\.prompt=null leaves it out",
    ):
        to_rows({"prompt": "Sea?", "chosen": good, "rejected": bad}, Columns(), "preference")
    assert to_rows(
        {"prompt": "Sea?", "chosen": good, "rejected": bad}, Columns(prompt=None), "preference"
    ) == [fields]
    assert len(to_rows({"prompt": "Sky?", "chosen": good, "rejected": bad}, Columns(), "unpaired")) == 2


def test_margins_are_read_where_the_loss_has_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": f"b{i}", "margin": margin}
        for i, margin in enumerate((1.0, None, "much"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(str(file), DATA, "preference", Reads(margin=False))
    assert (len(loaded.rows), loaded.unused, {row.margin for row in loaded.rows}) == (3, ("margin",), {None})
    with pytest.raises(DataError, match=f"{file}:3: margin must be a finite number"):
        load_rows(str(file), DATA, "preference")
