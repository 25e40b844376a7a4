"""Bad input to the program: one clear message, an exit code of sysexits.h, and nothing half-written."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.models.load import load_config, load_tokenizer
from orchestrator.recipe.schema import Model as ModelConfig
from orchestrator.recipe.schema import TinyModel
from tests.running import Sandbox

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Bad:
    """Overrides of tiny/dpo that cannot work."""

    name: str
    overrides: tuple[str, ...]
    code: int
    words: tuple[str, ...]
    """What the message must contain."""


CASES = (
    Bad("unknown key", ("batch.efective=64",), 78, ("batch.efective", "did you mean batch.effective?")),
    Bad("unknown loss", ("algorithm.loss=sigmoyd",), 78, ("sigmoyd", "did you mean", "sigmoid")),
    Bad(
        "too many workers",
        ("learners.workers=4", "learners.cpus_per_worker=1000"),
        69,
        ("4 learners", "CPU", "learners.cpus_per_worker="),
    ),
    Bad(
        "little memory",
        ("batch.memory_limit_gb=0.001",),
        69,
        ("may use 0.8 MB", "weights", "learners.zero_stage"),
    ),
)
MORE_CASES = (
    Bad(
        "sync and stage",
        ("learners.zero_stage=3", "learners.sync=no_sync"),
        78,
        ("no_sync", "ZeRO stage 3", "per_micro_batch"),
    ),
    Bad("effective below workers", ("batch.effective=1",), 78, ("batch.effective=1", "learners.workers=2")),
    Bad(
        "bf16 at stage 0", ("learners.zero_stage=0", "learners.precision=bf16"), 78, ("bf16", "zero_stage=1")
    ),
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("bad"))
    yield sandbox
    sandbox.close()


def refused(sandbox: Sandbox, code: int, *arguments: str | Path) -> str:
    """The error message of a command, which must fail with this code."""
    finished = sandbox.run(*arguments, timeout=120)
    assert finished.code == code, finished.err
    assert finished.err.startswith("error: ")
    assert finished.err.count("error: ") == 1 and "Traceback" not in finished.err
    assert "  fix: " in finished.err
    assert all(line.endswith(" …") for line in finished.out.splitlines()), (
        "only the phase is printed in which the error occurred"
    )
    return finished.err


@pytest.mark.parametrize(
    "bad",
    [*CASES, *(pytest.param(bad, marks=pytest.mark.slow) for bad in MORE_CASES)],
    ids=lambda bad: bad.name,
)
def test_impossible_recipe(sandbox: Sandbox, tmp_path: Path, bad: Bad) -> None:
    small = ["data.train=[{path: toy:preference, max_rows: 64}]", "batch.effective=16", "data.eval=null"]
    message = refused(
        sandbox, bad.code, "train", "tiny/dpo", *small, *bad.overrides, "--output", tmp_path / "run"
    )
    for words in bad.words:
        assert words in message
    assert list(tmp_path.iterdir()) == []


def test_missing_recipe(sandbox: Sandbox, tmp_path: Path) -> None:
    message = refused(sandbox, 66, "train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert "recipe.yaml" in message
    assert list(tmp_path.iterdir()) == []


def test_missing_data_file(sandbox: Sandbox, tmp_path: Path) -> None:
    message = refused(
        sandbox,
        66,
        "train",
        "tiny/dpo",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        "--output",
        tmp_path / "run",
    )
    assert str(tmp_path / "pairs.jsonl") in message
    assert list(tmp_path.iterdir()) == []


def test_corrupt_row_is_named_by_file_and_line(sandbox: Sandbox, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "ab>", "chosen": "ab", "rejected": "ba"})
    data.write_text(f'{good}\n{good}\n{{"prompt": "cut o\n{good}\n')
    message = refused(
        sandbox, 65, "train", "tiny/dpo", f"data.train={data}", "data.eval=null", "--output", tmp_path / "run"
    )
    assert f"{data}:3: " in message
    assert "data.max_bad_rows" in message
    assert list(tmp_path.iterdir()) == [data]


def test_conversations_need_a_chat_template(sandbox: Sandbox, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny = TinyModel(hidden_size=16, layers=1, heads=2)
    config = ModelConfig(tiny=tiny)  # pyright: ignore[reportCallIssue]
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    load_config(config).save_pretrained(model)
    data = tmp_path / "pairs.jsonl"
    row = {
        name: [{"role": role, "content": name}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    data.write_text(json.dumps(row) + "\n")
    overrides = (f"model.path={model}", f"data.train={data}", "data.eval=null")
    message = refused(sandbox, 78, "train", "tiny/dpo", *overrides, "--output", tmp_path / "run")
    assert "chat template" in message and "model.chat_template" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_folder_of_another_run_is_not_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    message = refused(sandbox, 73, "train", "tiny/dpo", "data.eval=null", "--output", output)
    assert "another run" in message and "--output" in message
    assert [p.name for p in output.iterdir()] == ["run.json"]


@pytest.mark.slow
def test_a_folder_with_other_files_is_not_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    message = refused(sandbox, 73, "train", "tiny/dpo", "data.eval=null", "--output", tmp_path)
    assert "not empty" in message
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_debug_shows_the_traceback(sandbox: Sandbox, tmp_path: Path) -> None:
    finished = sandbox.run("train", "tiny/dpo", "batch.efective=64", "--output", tmp_path / "run", "--debug")
    assert "Traceback" in finished.err and "batch.efective" in finished.err
