"""Files, folders and mixtures; bad rows by file:line, missing files with a suggestion."""

import gzip
import importlib.util
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.core.errors import ConfigError, DataError, Exit, MissingInput
from orchestrator.data.bad_rows import BadRow, grouped
from orchestrator.data.sources import load_rows
from orchestrator.recipe.schema import Columns, Data, Source

PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
DATA = Data(train="unused")
GSM8K = Path(__file__).resolve().parents[2] / "data" / "gsm8k"
"""64 real pairs and demonstrations; the licence lies beside them."""


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records)


def source(path, **options):
    return Source(path=str(path), **options)


def prompts(loaded):
    return [row.prompt for row in loaded.rows]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(PAIRS))
    return path


def test_jsonl_rows_carry_id_place_and_source(pairs):
    loaded = load_rows(str(pairs), DATA, "preference")
    assert prompts(loaded) == ["p0", "p1", "p2", "p3", "p4"]
    assert [row.id for row in loaded.rows] == [0, 1, 2, 3, 4]
    assert loaded.rows[2].where == f"{pairs}:3"
    assert (loaded.sizes, loaded.weights, loaded.names, loaded.formats) == (
        (5,),
        (1.0,),
        ("pairs",),
        ("preference, text",),
    )


def test_jsonl_gz_parquet_and_folder_hold_the_same_rows(pairs, tmp_path):
    from pyarrow import Table, parquet

    packed, table, folder = tmp_path / "pairs.jsonl.gz", tmp_path / "pairs.parquet", tmp_path / "folder"
    packed.write_bytes(gzip.compress(lines(PAIRS).encode()))
    parquet.write_table(Table.from_pylist(PAIRS), table)
    folder.mkdir()
    (folder / "b.jsonl").write_text(lines(PAIRS[3:]))
    (folder / "a.jsonl").write_text(lines(PAIRS[:3]))
    (folder / "notes.txt").write_text("not data")
    loaded = [load_rows(str(path), DATA, "preference") for path in (pairs, packed, table, folder)]
    assert all(prompts(one) == ["p0", "p1", "p2", "p3", "p4"] for one in loaded)
    assert len({one.fingerprint for one in loaded}) == 1
    assert loaded[2].rows[4].where == f"{table}:5"
    assert loaded[3].rows[3].where == f"{folder / 'b.jsonl'}:1"


def test_message_lists_survive_parquet(tmp_path):
    from pyarrow import Table, parquet

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / "chat.parquet"
    parquet.write_table(Table.from_pylist([{"messages": messages}]), path)
    assert load_rows(str(path), DATA, "sft").rows[0].messages == messages


def test_the_fingerprint_follows_the_content(pairs):
    before = load_rows(str(pairs), DATA, "preference").fingerprint
    pairs.write_text(lines([*PAIRS[:4], {**PAIRS[4], "chosen": "good 5"}]))
    assert load_rows(str(pairs), DATA, "preference").fingerprint != before


def test_several_sources_with_weights_columns_and_a_limit(pairs, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(lines([{"q": "x", "good": "1", "bad": "2"}]))
    columns = Columns(prompt="q", chosen="good", rejected="bad")
    loaded = load_rows(
        [source(pairs, weight=0.5, max_rows=2), source(other, weight=3, columns=columns)], DATA, "preference"
    )
    assert [(row.source, row.prompt) for row in loaded.rows] == [(0, "p0"), (0, "p1"), (1, "x")]
    assert (loaded.sizes, loaded.weights, loaded.names) == ((2, 1), (0.5, 3.0), ("pairs", "other"))


def test_the_recipes_columns_hold_for_sources_without_their_own(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(lines([{"q": "x", "good": "1", "bad": "2"}]))
    data = Data(train="unused", columns=Columns(prompt="q", chosen="good", rejected="bad"))
    assert prompts(load_rows(str(path), data, "preference")) == ["x"]


GOOD = json.dumps(PAIRS[0]).encode()
BAD_LINES = [
    (b'{"prompt": "p", ', "broken JSON: Expecting property name enclosed in double quotes at column 16"),
    (b'{"prompt": "p"}', "no 'chosen' and no 'rejected'; columns are prompt"),
    (b'{"prompt": "p", "chosen": "", "rejected": "b"}', "chosen is empty"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "chosen and rejected are equal"),
    (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "not UTF-8 at byte 12"),
    (
        b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
        "prompt holds half of a surrogate pair at character 0",
    ),
    (b"[1, 2]", "a record must be an object, this is list"),
    (b"null", "a record must be an object, this is NoneType"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(DataError) as failure:
        load_rows(str(path), DATA, "preference")
    assert f"{path}:3: {reason}" in str(failure.value)
    assert failure.value.exit_code == Exit.DATA == 65
    loaded = load_rows(str(path), Data(train="unused", max_bad_rows=1), "preference")
    assert [(b.where, b.reason) for b in loaded.bad] == [(f"{path}:3", reason)]
    assert [row.where for row in loaded.rows] == [f"{path}:1", f"{path}:4"]


def test_equal_reasons_of_bad_rows_are_one_line_and_ten_lines_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": "p", "good": "a", "bad": "b"}) + "\n" for _ in range(96))
        + '{"prompt": 1, "chosen": "a", "rejected": "b"}\n'
    )
    with pytest.raises(DataError) as failure:
        load_rows([source(tmp_path / "a.jsonl")], Data(train="unused"), "preference")
    many = grouped([BadRow(f"f:{i}", f"reason {i // 2}") for i in range(24)], 10)
    assert len(many) == 11 and many[0] == "2 rows: reason 0 (the first is f:0)" and many[-1] == "… and 4 more"
    lines = [line.strip() for line in failure.value.why.splitlines() if line.strip()]
    hint = "data.columns.chosen=good data.columns.rejected=bad?"
    assert (
        lines[0]
        == f"96 rows: no 'chosen' and no 'rejected'; columns are prompt, good, bad; {hint} (the first is "
        f"{tmp_path}/a.jsonl:1)"
    )
    assert len(lines) == 2 and lines[1].startswith(f"{tmp_path}/a.jsonl:97: prompt must be text")


def test_bad_rows_of_all_sources_count_together(tmp_path):
    for name, count in (("a", 8), ("b", 4)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join([GOOD, *[b"{"] * count]))
    sources = [source(tmp_path / "a.jsonl"), source(tmp_path / "b.jsonl")]
    with pytest.raises(DataError) as failure:
        load_rows(sources, Data(train="unused", max_bad_rows=11), "preference")
    text = str(failure.value)
    assert text.startswith("12 bad rows, data.max_bad_rows allows 11")
    assert "12 rows: broken JSON" in text and text.count("broken JSON") == 1
    assert len(load_rows(sources, Data(train="unused", max_bad_rows=12), "preference").bad) == 12


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no usable row"):
        load_rows(str(path), DATA, "preference")


def test_a_missing_file_suggests_close_names(pairs):
    with pytest.raises(MissingInput, match=r"did you mean pairs\.jsonl\?") as failure:
        load_rows(str(pairs.with_name("pair.jsonl")), DATA, "preference")
    assert failure.value.exit_code == Exit.NO_INPUT == 66


def test_a_missing_file_without_neighbours_names_the_key(tmp_path):
    with pytest.raises(MissingInput, match=r"check data\.train and data\.eval"):
        load_rows(str(tmp_path / "nowhere" / "pairs.jsonl"), DATA, "preference")


def test_a_folder_without_data_files(tmp_path):
    with pytest.raises(MissingInput, match="holds no data file"):
        load_rows(str(tmp_path), DATA, "preference")


def test_an_unknown_suffix(tmp_path):
    path = tmp_path / "pairs.xlsx"
    path.write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"unknown kind of data file[\s\S]*\.parquet"):
        load_rows(str(path), DATA, "preference")


@pytest.mark.parametrize("path", ["trl-lib/ultrafeedback_binarized", "pairs"])
def test_a_hub_data_set_without_a_revision_is_refused(path):
    with pytest.raises(ConfigError, match="needs a pinned revision"):
        load_rows(path, DATA, "preference")


def test_a_truncated_gzip_file_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(lines(PAIRS).encode())[:-12])
    with pytest.raises(DataError, match=f"{path} cannot be read after line"):
        load_rows(str(path), DATA, "preference")


def test_a_file_that_is_not_gzip(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_text(lines(PAIRS))
    with pytest.raises(DataError, match=r"cannot be read after line 0[\s\S]*Not a gzipped file"):
        load_rows(str(path), DATA, "preference")


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1 nothing of use")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(str(path), DATA, "preference")


def test_a_margin_on_some_rows_only_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines([PAIRS[0], {**PAIRS[1], "margin": 1.5}]))
    with pytest.raises(DataError, match=f"{path}:1 has no margin, but {path}:2 has one"):
        load_rows(str(path), DATA, "preference")


@pytest.mark.parametrize("path", ["toy:preferences", "toy:"])
def test_unknown_toy_data(path):
    with pytest.raises(ConfigError, match="use toy:"):
        load_rows(path, DATA, "preference")


def test_an_unknown_toy_split():
    with pytest.raises(ConfigError, match="with split 'test'"):
        load_rows([source("toy:preference", split="test")], DATA, "preference")


def test_real_pairs_load_and_encode_without_a_bad_row():
    from orchestrator.data.tokenize import encode_rows
    from orchestrator.models.tiny import byte_tokenizer

    path = GSM8K / "preferences.jsonl"
    loaded = load_rows(str(path), DATA, "preference")
    records = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert [(r.prompt, r.chosen, r.rejected) for r in loaded.rows] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in records
    ]
    encoded = encode_rows(loaded.rows, byte_tokenizer(), Data(train="unused", max_length=4096), "preference")
    assert (
        encoded.report.kept,
        encoded.report.dropped,
        encoded.report.truncated,
        encoded.report.not_prefix,
    ) == (64, 0, 0, ())
    longest = [
        max(len((r["prompt"] + r[side]).encode()) + 1 for side in ("chosen", "rejected")) for r in records
    ]
    assert list(encoded.report.lengths) == longest


def test_real_demonstrations_load_with_their_answers():
    path = GSM8K / "train.jsonl"
    rows = load_rows([source(path, max_rows=50)], DATA, "sft").rows
    assert len(rows) == 50
    assert all(row.completion.endswith(f"#### {row.answer}") for row in rows)


# ---- file systems that fsspec opens


@pytest.fixture
def store():
    """fsspec's file system in memory, as a stand-in for a bucket."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/bucket", recursive=True)


def test_urls_are_read_like_files(store, pairs, tmp_path):
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "pairs.parquet")
    store.pipe("/bucket/pairs.jsonl", pairs.read_bytes())
    store.pipe("/bucket/pairs.jsonl.gz", gzip.compress(pairs.read_bytes()))
    store.pipe("/bucket/pairs.parquet", (tmp_path / "pairs.parquet").read_bytes())
    local = load_rows(str(pairs), DATA, "preference")
    for name in ("pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"):
        loaded = load_rows(f"memory://bucket/{name}", DATA, "preference")
        assert prompts(loaded) == prompts(local)
        assert loaded.fingerprint == local.fingerprint, "where rows lie does not decide a result"
        assert loaded.rows[2].where == f"memory://bucket/{name}:3"


def test_a_bad_row_behind_a_url_is_named(store):
    store.pipe("/bucket/bad.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": \n')
    with pytest.raises(DataError, match="1 bad rows") as caught:
        load_rows("memory://bucket/bad.jsonl", DATA, "preference")
    assert "memory://bucket/bad.jsonl:2: broken JSON" in caught.value.why


def test_urls_that_cannot_be_read(store):
    store.pipe("/bucket/pairs.jsonl", b"")
    with pytest.raises(MissingInput, match="no data file memory:"):
        load_rows("memory://bucket/none.jsonl", DATA, "preference")
    with pytest.raises(ConfigError, match="nosuch://"):
        load_rows("nosuch://bucket/pairs.jsonl", DATA, "preference")
    with pytest.raises(ConfigError, match="user or a password") as caught:
        load_rows("s3://key:hidden@bucket/pairs.jsonl", DATA, "preference")
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown kind of data file"):
        load_rows("memory://bucket/pairs.xlsx", DATA, "preference")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_s3_names_its_extra():
    with pytest.raises(ConfigError) as caught:
        load_rows("s3://bucket/pairs.jsonl", DATA, "preference")
    assert caught.value.fix == 'pip install "orchestrator[s3]"'
