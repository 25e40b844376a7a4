"""What goes with a job is told, and no secret is among it."""

import os
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, MissingInput
from orchestrator.upload import LIMIT_BYTES, collect

REPOSITORY = Path(__file__).resolve().parents[2]


def write(root: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def names(root: Path) -> set[str]:
    return {file.as_posix() for file in collect(root).files}


def test_ignore_files_count_where_they_lie(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "b.log", "runs/x/model.bin", "sub/b.log", "sub/keep.txt", "sub/deep/big.bin", ".git/config", "sub/__pycache__/a.pyc")
    write(tmp_path, ".gitignore", content="/b.log\nruns/\n")
    write(tmp_path / "sub", ".rayignore", content="*.bin\n")
    assert names(tmp_path) == {"a.py", ".gitignore", "sub/b.log", "sub/keep.txt", "sub/.rayignore"}


@pytest.mark.parametrize("secret", [".env", ".netrc", "deploy/server.pem", "id_ed25519", ".ssh/known_hosts", "keys/tls.key", ".ray/auth_token"])
def test_secrets_are_refused_and_may_be_ignored(tmp_path: Path, secret: str) -> None:
    write(tmp_path, "recipe.yaml", secret)
    with pytest.raises(ConfigError, match="must not leave") as refused:
        collect(tmp_path)
    assert secret in str(refused.value) and ".rayignore" in refused.value.fix
    write(tmp_path, ".rayignore", content=secret)
    assert names(tmp_path) == {"recipe.yaml", ".rayignore"}


def test_a_key_under_another_name_is_found(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt", content="-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc")  # in two parts: no scanner takes this file for a key
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        collect(tmp_path)


def test_a_link_to_a_secret_is_one(tmp_path: Path) -> None:
    write(tmp_path, "outside/.netrc", "work/recipe.yaml")
    os.symlink(tmp_path / "outside" / ".netrc", tmp_path / "work" / "hosts.txt")
    with pytest.raises(ConfigError, match=r"hosts\.txt"):
        collect(tmp_path / "work")


def test_a_link_into_a_folder_of_secrets_is_one(tmp_path: Path) -> None:
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


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / "memory")  # nobody can read its first page
    with pytest.raises(ConfigError, match="memory cannot be read"):
        collect(tmp_path)


def test_public_keys_and_examples_go(tmp_path: Path) -> None:
    write(tmp_path, "id_rsa.pub", ".env.example")
    assert names(tmp_path) == {"id_rsa.pub", ".env.example"}


def test_too_much_is_refused_with_the_largest_by_name(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(ConfigError, match="at most") as refused:
        collect(tmp_path)
    assert "weights.bin (100.0 MB)" in refused.value.why


def test_no_folder(tmp_path: Path) -> None:
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
