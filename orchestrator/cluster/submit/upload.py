"""What a submitted job brings along: the files of a folder, told before they go, without what must never go.

folder --.gitignore, .rayignore--> files --refusals--> Upload --staged--> a folder with just these
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from orchestrator.core.errors import ConfigError, MissingInput

LIMIT_BYTES = 100_000_000
"""Ray's own limit is 512 MB; data and models belong on shared storage."""
IGNORE_FILES = (".gitignore", ".rayignore")
NEVER = (".git", "__pycache__", ".venv", "node_modules")
_SECRETS = """
.env
.env.*
!.env.example
.netrc
_netrc
.pypirc
.git-credentials
.htpasswd
credentials.json
auth_token
*.pem
*.key
*.p12
*.pfx
id_rsa*
id_dsa*
id_ecdsa*
id_ed25519*
!*.pub
.aws/
.kube/
.ray/
.ssh/
"""
SECRETS = GitIgnoreSpec.from_lines(_SECRETS.split())
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
RECORD, RESULTS = "run.json", ("checkpoints", "export", "run.lock")
"""A folder with this file and one of these beside it is a run's (run/folder.py). What it was started with
goes along, nothing that it made."""
STARTED_WITH = ("recipe.yaml",)
NAMED = 3
"""Run folders that the summary names."""
LOOKED_INTO = 4096
"""Bytes at the beginning of a file in which a private key is looked for."""


@dataclass(frozen=True, slots=True)
class Upload:
    """Files below `root` that go along, relative to it, and their bytes. left: what stays behind though
    nothing ignores it, and why; runs: folders of runs, which stay behind too."""

    root: Path
    files: tuple[Path, ...]
    size: int
    left: tuple[str, ...] = ()
    runs: tuple[Path, ...] = ()

    def summary(self) -> str:
        """Example: 41 files, 0.3 MB of /home/me/work: orchestrator/ (38), recipes/ (2), README.md"""
        heads: dict[str, int] = {}
        for file in self.files:
            head = file.parts[0] + ("/" if len(file.parts) > 1 else "")
            heads[head] = heads.get(head, 0) + 1
        names = ", ".join(
            f"{name} ({count})" if name.endswith("/") else name for name, count in sorted(heads.items())
        )
        stays = [*self.left, *([self._runs()] if self.runs else [])]
        left = f"\n  not: {', '.join(stays)}" if stays else ""
        return f"{len(self.files)} files, {self.size / 1e6:.1f} MB of {self.root}: {names}{left}"

    def _runs(self) -> str:
        """Example: what 4 runs made (runs/a, runs/b, runs/c …)."""
        named = ", ".join(map(str, self.runs[:NAMED])) + (" …" if len(self.runs) > NAMED else "")
        return f"what {len(self.runs)} run{'s' * (len(self.runs) > 1)} made ({named})"

    def run_of(self, path: Path) -> Path | None:
        """The run folder that stays behind and that a path lies in, or is. path: relative to the root."""
        path = Path(os.path.normpath(path))
        return next((run for run in self.runs if run == path or run in path.parents), None)

    def holds(self, path: Path) -> bool:
        """Whether a file, or anything of a folder, goes along. path: relative to the root."""
        path = Path(os.path.normpath(path))
        return path == Path() or any(file == path or path in file.parents for file in self.files)

    @contextmanager
    def staged(self, scripts: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A temporary folder that holds these files, what links lead to in their place, with their modes, and
        nothing else but `scripts`: texts by name, to be run."""
        with tempfile.TemporaryDirectory(prefix="orchestrator-upload-") as folder:
            for file in self.files:
                target = Path(folder) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / file, target)
            for name, text in (scripts or {}).items():
                (Path(folder) / name).write_text(text)
                (Path(folder) / name).chmod(0o755)
            yield Path(folder)


def collect(root: Path) -> Upload:
    """The files of `root` that its .gitignore and .rayignore files leave. ConfigError for secrets, for what
    cannot be read, and for too much."""
    if not root.is_dir():
        raise MissingInput(
            f"{root} is no folder", fix="give --working-dir the folder that holds your recipe and code"
        )
    root = root.resolve()
    left: list[str] = []
    runs: list[Path] = []
    files = tuple(sorted(_walk(root, Path(), (), left, runs)))
    _refuse_secrets(root, files)
    sizes = {file: (root / file).stat().st_size for file in files}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(files, key=lambda file: -sizes[file])[:3]
        named = ", ".join(f"{file} ({sizes[file] / 1e6:.1f} MB)" for file in largest)
        raise ConfigError(
            f"{root} would upload {total / 1e6:.0f} MB, at most {LIMIT_BYTES / 1e6:.0f} MB go with a job",
            why=f"the largest files are {named}",
            fix="name what should stay in .rayignore; put data and models on storage that all nodes see",
        )
    return Upload(root, files, total, tuple(left), tuple(runs))


def _walk(
    root: Path, folder: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...], left: list[str], runs: list[Path]
) -> Iterator[Path]:
    """Files below root/folder, relative to root, links followed. rules: the ignore files met on the way, each
    with its folder; left: gets what cannot go; runs: the folders of runs."""
    for name in IGNORE_FILES:
        if (file := root / folder / name).is_file():
            rules += ((folder, GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines())),)
    for entry in sorted(os.scandir(root / folder), key=lambda e: e.name):
        path, is_folder = folder / entry.name, entry.is_dir()
        if entry.name in NEVER or any(_ignores(spec, base, path, entry) for base, spec in rules):
            continue
        if (
            is_folder
            and entry.is_symlink()
            and (root / folder).resolve().is_relative_to((root / path).resolve())
        ):
            left.append(f"{path} (a link to a folder that it lies in)")
        elif is_folder and _is_run(root / path):
            runs.append(path)
            yield from (path / name for name in STARTED_WITH if (root / path / name).is_file())
        elif is_folder:
            yield from _walk(root, path, rules, left, runs)
        elif entry.is_file():
            yield path
        else:
            left.append(f"{path} ({'a link to nothing' if entry.is_symlink() else 'no file'})")


def _is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() and any((folder / name).exists() for name in RESULTS)


def _ignores(spec: GitIgnoreSpec, base: Path, path: Path, entry: os.DirEntry[str]) -> bool:
    """As git sees it, to which a link is a file, and as it will lie there."""
    return spec.match_file(_below(base, path, entry.is_dir())) or (
        entry.is_symlink() and spec.match_file(_below(base, path, False))
    )


def _below(base: Path, path: Path, is_folder: bool) -> str:
    """The path as an ignore file in `base` sees it."""
    return path.relative_to(base).as_posix() + ("/" if is_folder else "")


def _refuse_secrets(root: Path, files: tuple[Path, ...]) -> None:
    found = [
        file
        for file in files
        if SECRETS.match_file(file) or _leads_to_secret(root, file) or _holds_key(root / file)
    ]
    if found:
        named = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ConfigError(
            f"{root} holds what must not leave this machine: {named}",
            why="everybody who may use the cluster can read what is uploaded",
            fix="move these files away, or name them in .rayignore; give keys to the nodes by their "
            "environment or ~/.netrc",
        )


def _leads_to_secret(root: Path, file: Path) -> bool:
    """Whether it is a link that brings in what would be refused where it lies."""
    there = (root / file).resolve()
    return there != root / file and SECRETS.match_file(
        there.relative_to(root if there.is_relative_to(root) else there.anchor)
    )


def _holds_key(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            return PRIVATE_KEY.search(content.read(LOOKED_INTO)) is not None
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read",
            why=error.strerror or str(error),
            fix="mend its permissions, or name it in .rayignore",
        ) from error
