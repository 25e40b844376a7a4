"""The files that are uploaded with a job are listed, and no secret is among them."""

import os
from pathlib import Path

import pytest

from orchestrator.cluster.submit.upload import LIMIT_BYTES, collect
from orchestrator.core.errors import ConfigError, MissingInput

REPOSITORY = Path(__file__).resolve().parents[3]


def write(root: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def names(root: Path) -> set[str]:
    return {file.as_posix() for file in collect(root).files}


def test_ignore_files_count_where_they_lie(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.py",
        "b.log",
        "runs/x/model.bin",
        "sub/b.log",
        "sub/keep.txt",
        "sub/deep/big.bin",
        ".git/config",
        "sub/__pycache__/a.pyc",
    )
    write(tmp_path, ".gitignore", content="/b.log\nruns/\n")
    write(tmp_path / "sub", ".rayignore", content="*.bin\n")
    assert names(tmp_path) == {"a.py", ".gitignore", "sub/b.log", "sub/keep.txt", "sub/.rayignore"}


@pytest.mark.parametrize(
    "secret",
    [
        ".env",
        ".netrc",
        "deploy/server.pem",
        "id_ed25519",
        ".ssh/known_hosts",
        "keys/tls.key",
        ".ray/auth_token",
    ],
)
def test_secrets_are_refused_and_may_be_ignored(tmp_path: Path, secret: str) -> None:
    write(tmp_path, "recipe.yaml", secret)
    with pytest.raises(ConfigError, match="must not leave") as refused:
        collect(tmp_path)
    assert secret in str(refused.value) and ".rayignore" in refused.value.fix
    write(tmp_path, ".rayignore", content=secret)
    assert names(tmp_path) == {"recipe.yaml", ".rayignore"}


def test_a_key_under_another_name_is_found(tmp_path: Path) -> None:
    # in two parts: no scanner takes this file for a key
    write(tmp_path, "notes.txt", content="-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        collect(tmp_path)


def test_a_link_to_a_secret_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "outside/.netrc", "work/recipe.yaml")
    os.symlink(tmp_path / "outside" / ".netrc", tmp_path / "work" / "hosts.txt")
    with pytest.raises(ConfigError, match=r"hosts\.txt"):
        collect(tmp_path / "work")


def test_a_link_into_a_folder_of_secrets_is_refused(tmp_path: Path) -> None:
    for name in ("aws/.aws/credentials", "work/recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "aws" / ".aws" / "credentials", tmp_path / "work" / "settings")
    with pytest.raises(ConfigError, match="settings"):
        collect(tmp_path / "work")


def test_a_link_within_the_folder_goes_wherever_the_folder_lies(tmp_path: Path) -> None:
    root = tmp_path / ".ray" / "work"
    root.mkdir(parents=True)
    (root / "a.yaml").write_text("x")
    os.symlink(root / "a.yaml", root / "b.yaml")
    assert collect(root).files == (Path("a.yaml"), Path("b.yaml"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / "memory")  # nobody can read its first page
    with pytest.raises(ConfigError, match="memory cannot be read"):
        collect(tmp_path)


def test_public_keys_and_examples_are_uploaded(tmp_path: Path) -> None:
    write(tmp_path, "id_rsa.pub", ".env.example")
    assert names(tmp_path) == {"id_rsa.pub", ".env.example"}


def test_too_many_bytes_are_refused_with_the_largest_files_named(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(ConfigError, match="at most") as refused:
        collect(tmp_path)
    assert "weights.bin (100.0 MB)" in refused.value.why


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        collect(tmp_path / "nowhere")


def test_staged_holds_these_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, "a/b.txt", "c.txt", "secret/x.bin")
    write(tmp_path, ".rayignore", content="secret/")
    upload = collect(tmp_path)
    with upload.staged() as folder:
        staged = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert staged == {"a/b.txt", "c.txt", ".rayignore"}
        assert (folder / "a/b.txt").read_text() == "x"
    assert not folder.exists()
    assert upload.summary() == f"3 files, 0.0 MB of {tmp_path}: .rayignore, a/ (1), c.txt"


def test_this_repository_sends_its_code_and_recipes() -> None:
    upload = collect(REPOSITORY)
    heads = {file.parts[0] for file in upload.files}
    assert {"orchestrator", "recipes"} <= heads and not {"tests", ".venv", "runs", ".git"} & heads
    assert upload.size < 5_000_000


def test_links_are_followed_and_those_to_nothing_are_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        "big/data/prompts.jsonl",
        "big/data/.rayignore",
        "big/data/raw.bin",
        "work/recipe.yaml",
        "work/sub/a.txt",
        content="*.bin\n",
    )
    work = tmp_path / "work"
    os.symlink(tmp_path / "big" / "data", work / "data")
    os.symlink("..", work / "sub" / "up")
    os.symlink(tmp_path / "nowhere", work / "gone")
    os.symlink(tmp_path / "big", work / "ignored")
    os.mkfifo(work / "pipe")
    write(work, ".gitignore", content="ignored\n")
    upload = collect(work)
    assert {f.as_posix() for f in upload.files} == {
        "recipe.yaml",
        ".gitignore",
        "sub/a.txt",
        "data/prompts.jsonl",
        "data/.rayignore",
    }
    assert upload.left_out == (
        "gone (a link to nothing)",
        "pipe (not a file)",
        "sub/up (a link to a folder that it lies in)",
    )
    assert "not: gone (a link to nothing), pipe" in upload.summary()
    assert (
        upload.holds(Path("data/prompts.jsonl"))
        and upload.holds(Path("./data/"))
        and not upload.holds(Path("data/raw.bin"))
    )
    with upload.staged() as folder:
        assert (folder / "data" / "prompts.jsonl").is_file() and not (folder / "data").is_symlink()


def test_a_linked_folder_of_secrets_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "home/.aws/credentials", "work/recipe.yaml")
    os.symlink(tmp_path / "home" / ".aws", tmp_path / "work" / "cloud")
    with pytest.raises(ConfigError, match="cloud/credentials"):
        collect(tmp_path / "work")


def test_executables_stay_executable(tmp_path: Path) -> None:
    write(tmp_path, "judge.sh", "plain.txt")
    (tmp_path / "judge.sh").chmod(0o755)
    with collect(tmp_path).staged({"run.sh": "#!/bin/sh\n"}) as folder:
        assert [os.access(folder / name, os.X_OK) for name in ("judge.sh", "run.sh", "plain.txt")] == [
            True,
            True,
            False,
        ]


def test_the_results_of_runs_are_left_out_and_listed(tmp_path: Path) -> None:
    """A folder with a few runs of a real model held 6,475 MB."""
    for run in ("runs/dpo", "runs/pipe/sft", "runs/pipe/dpo", "old"):
        write(
            tmp_path / run,
            "run.json",
            "recipe.yaml",
            "run.lock",
            "checkpoints/step-1/w.safetensors",
            "export/model.safetensors",
            "logs/learner-0",
        )
    os.truncate(tmp_path / "old/checkpoints/step-1/w.safetensors", 2 * LIMIT_BYTES)
    write(tmp_path, "recipe.yaml", "notes/run.json", "notes/a.txt", "runs/pipe/readme.txt")
    upload = collect(tmp_path)
    assert {f.as_posix() for f in upload.files if f.name not in ("recipe.yaml",)} == {
        "notes/run.json",
        "notes/a.txt",
        "runs/pipe/readme.txt",
    }
    assert upload.runs == (Path("old"), Path("runs/dpo"), Path("runs/pipe/dpo"), Path("runs/pipe/sft"))
    assert "not: the results of 4 runs (old, runs/dpo, runs/pipe/dpo …)" in upload.summary()
    assert upload.holds(Path("runs/dpo/recipe.yaml")), (
        "a run may be started again from the recipe in its folder"
    )
    assert (
        upload.run_of(Path("runs/dpo/export")) == Path("runs/dpo")
        and upload.run_of(Path("runs/pipe")) is None
    )
