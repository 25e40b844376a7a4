"""The files that are uploaded with a submitted job. They are listed before they are sent, and secrets are
refused.

    folder --.gitignore, .rayignore--> files --refusals--> Upload --staged--> a folder with just these files
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
"""Bytes of all files. Ray's own limit is 512 MB; data and models belong on shared storage."""
IGNORE_FILES = (".gitignore", ".rayignore")
NEVER = (".git", "__pycache__", ".venv", "node_modules")
"""Folders that are never uploaded."""
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
"""Names of files and folders with secrets."""
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
RECORD, RESULTS = "run.json", ("checkpoints", "export", "run.lock")
"""A folder with the file RECORD and one of RESULTS is the folder of a run (run/folder.py). The files that the
run was started with are uploaded, its results are not."""
STARTED_WITH = ("recipe.yaml",)
MAX_LISTED = 3
"""Run folders that the summary names."""
KEY_SEARCH_BYTES = 4096
"""Bytes at the beginning of a file in which a private key is searched."""


@dataclass(frozen=True, slots=True)
class Upload:
    """The files that are uploaded with a job."""

    root: Path
    """Folder that they lie in."""
    files: tuple[Path, ...]
    """Paths of the files, relative to `root`."""
    size: int
    """Bytes of all files."""
    left_out: tuple[str, ...] = ()
    """Files that cannot be uploaded though nothing ignores them, each with the reason."""
    runs: tuple[Path, ...] = ()
    """Folders of runs, whose results are not uploaded."""

    def summary(self) -> str:
        """Example: 41 files, 0.3 MB of /home/me/work: orchestrator/ (38), recipes/ (2), README.md"""
        heads: dict[str, int] = {}
        for file in self.files:
            head = file.parts[0] + ("/" if len(file.parts) > 1 else "")
            heads[head] = heads.get(head, 0) + 1
        names = ", ".join(
            f"{name} ({count})" if name.endswith("/") else name for name, count in sorted(heads.items())
        )
        excluded = [*self.left_out, *([self._runs()] if self.runs else [])]
        note = f"\n  not: {', '.join(excluded)}" if excluded else ""
        return f"{len(self.files)} files, {self.size / 1e6:.1f} MB of {self.root}: {names}{note}"

    def _runs(self) -> str:
        """Example: the results of 4 runs (runs/a, runs/b, runs/c …)."""
        names = ", ".join(map(str, self.runs[:MAX_LISTED])) + (" …" if len(self.runs) > MAX_LISTED else "")
        return f"the results of {len(self.runs)} run{'s' * (len(self.runs) > 1)} ({names})"

    def run_of(self, path: Path) -> Path | None:
        """The run folder that a path lies in, or is; None if there is none. path: relative to the root."""
        path = Path(os.path.normpath(path))
        return next((run for run in self.runs if run == path or run in path.parents), None)

    def holds(self, path: Path) -> bool:
        """Whether a file, or any file of a folder, is uploaded. path: relative to the root."""
        path = Path(os.path.normpath(path))
        return path == Path() or any(file == path or path in file.parents for file in self.files)

    @contextmanager
    def staged(self, scripts: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A temporary folder with copies of these files and nothing else. Links are replaced by what they
        lead to, and modes are kept.

        scripts: executable files to be added, texts by name.
        """
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
    """The files of `root` that no .gitignore or .rayignore file excludes. ConfigError for secrets, for files
    that cannot be read, and for more than LIMIT_BYTES."""
    if not root.is_dir():
        fix = "give --working-dir the folder that holds your recipe and code"
        raise MissingInput(f"{root} is not a folder", fix=fix)
    root = root.resolve()
    left_out: list[str] = []
    runs: list[Path] = []
    files = tuple(sorted(_walk(root, Path(), (), left_out, runs)))
    _reject_secrets(root, files)
    sizes = {file: (root / file).stat().st_size for file in files}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(files, key=lambda file: -sizes[file])[:3]
        names = ", ".join(f"{file} ({sizes[file] / 1e6:.1f} MB)" for file in largest)
        raise ConfigError(
            f"{root} would upload {total / 1e6:.0f} MB, a job may have at most {LIMIT_BYTES / 1e6:.0f} MB",
            why=f"the largest files are {names}",
            fix="name what is not needed in .rayignore; put data and models on storage that all nodes see",
        )
    return Upload(root, files, total, tuple(left_out), tuple(runs))


def _walk(
    root: Path,
    folder: Path,
    rules: tuple[tuple[Path, GitIgnoreSpec], ...],
    left_out: list[str],
    runs: list[Path],
) -> Iterator[Path]:
    """Files below root/folder, relative to root; links are followed.

    rules: the ignore files of the folders above, each with its folder.
    left_out: gets the files that cannot be uploaded, each with the reason.
    runs: gets the folders of runs.
    """
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
            left_out.append(f"{path} (a link to a folder that it lies in)")
        elif is_folder and _is_run(root / path):
            runs.append(path)
            yield from (path / name for name in STARTED_WITH if (root / path / name).is_file())
        elif is_folder:
            yield from _walk(root, path, rules, left_out, runs)
        elif entry.is_file():
            yield path
        else:
            left_out.append(f"{path} ({'a link to nothing' if entry.is_symlink() else 'not a file'})")


def _is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() and any((folder / name).exists() for name in RESULTS)


def _ignores(spec: GitIgnoreSpec, base: Path, path: Path, entry: os.DirEntry[str]) -> bool:
    """Whether a rule matches the path as git sees it, to which a link is a file, or as it would be
    uploaded."""
    return spec.match_file(_below(base, path, entry.is_dir())) or (
        entry.is_symlink() and spec.match_file(_below(base, path, False))
    )


def _below(base: Path, path: Path, is_folder: bool) -> str:
    """The path as an ignore file in `base` sees it."""
    return path.relative_to(base).as_posix() + ("/" if is_folder else "")


def _reject_secrets(root: Path, files: tuple[Path, ...]) -> None:
    secrets = [
        file
        for file in files
        if SECRETS.match_file(file) or _leads_to_secret(root, file) or _holds_key(root / file)
    ]
    if secrets:
        more = f" and {len(secrets) - 5} more" if len(secrets) > 5 else ""
        raise ConfigError(
            f"{root} holds secrets, which must not leave this machine: "
            f"{', '.join(map(str, secrets[:5]))}{more}",
            why="every user of the cluster can read what is uploaded",
            fix="move these files away, or name them in .rayignore; give keys to the nodes by their "
            "environment or ~/.netrc",
        )


def _leads_to_secret(root: Path, file: Path) -> bool:
    """Whether the file is reached by a link and is a secret where it really lies."""
    target = (root / file).resolve()
    return target != root / file and SECRETS.match_file(
        target.relative_to(root if target.is_relative_to(root) else target.anchor)
    )


def _holds_key(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            return PRIVATE_KEY.search(content.read(KEY_SEARCH_BYTES)) is not None
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read",
            why=error.strerror or str(error),
            fix="fix its permissions, or name it in .rayignore",
        ) from error
