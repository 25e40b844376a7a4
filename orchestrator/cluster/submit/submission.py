"""From a recipe on this machine to a job on a cluster.

recipe, overrides --entrypoint, collect--> command, Upload
command, attempts --decide--> start attempt n | follow the running one | nothing to do
"""

import os
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster.submit.ray_jobs import STOP_GRACE, JobAttempt, Jobs, Submission
from orchestrator.cluster.submit.upload import Upload
from orchestrator.core.errors import ConfigError, MissingInput, OutputError
from orchestrator.core.user_code import names_code
from orchestrator.data.files import SUFFIXES
from orchestrator.recipe.files import builtin_recipes
from orchestrator.recipe.loading import recipe_files
from orchestrator.recipe.pipeline import STAGE, Stage
from orchestrator.recipe.schema import ONLINE, Recipe

STOP_GRACE_S = 300
"""Seconds between SIGTERM and SIGKILL of `ray job stop`: time for a step and its checkpoint. Ray's own
default is 3."""

RUNNER = "orchestrator-run.sh"
"""Script that goes with every upload; the job's command begins with it."""
PROGRAM = ("sh", RUNNER)
FIND_PYTHON = """#!/bin/sh
# Runs this program with the interpreter of Ray's workers on this node. The raylet, an ancestor of this job,
# has it on its command line. Ray may have been started without activating its environment, so that PATH has
# no interpreter or another one.
p=$PPID
ray=
while [ "${p:-0}" -gt 1 ] && [ -z "$ray" ]; do
    ray=$(tr '\\0' '\\n' <"/proc/$p/cmdline" 2>/dev/null |
        sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p')
    p=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$p/status" 2>/dev/null)
done
for python in "$ray" python python3; do
    if [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 &&
        "$python" -c 'import orchestrator' >/dev/null 2>&1; then
        exec "$python" -m orchestrator "$@"
    fi
done
tried="${ray:-no interpreter of Ray}, python, python3"
echo "error: no Python on the head of the cluster has this program: tried $tried" >&2
echo "  fix: install it in the environment that Ray was started from, on every node" >&2
exit 78
"""
"""Text of the script."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a submission does now."""

    attempt: JobAttempt | None
    """The newest attempt, if any."""
    number: int | None
    """Number of the attempt to start; None starts nothing."""


def entrypoint(recipe: str, overrides: Sequence[str], output: Path, working_dir: Path) -> str:
    """The command of the driver, in the uploaded folder."""
    path, folder = path_in_upload(recipe, working_dir), str(output.absolute())
    return shlex.join([*PROGRAM, "train", path, *overrides, "--output", folder])


def environment(stop_grace_s: int) -> dict[str, str]:
    """Variables of the driver: its output is not buffered, and it has time to save when it is stopped. They
    must not contain secrets."""
    return {"PYTHONUNBUFFERED": "1", STOP_GRACE: str(stop_grace_s)}


def decide(attempts: Sequence[JobAttempt], command: str) -> Decision:
    """Decides so that a run is done once: a running attempt is followed, nothing is done after success, and
    any other end leads to a new attempt, which resumes the run. OutputError if the name belongs to another
    command."""
    if not attempts:
        return Decision(None, 1)
    newest = max(attempts, key=lambda a: a.number)
    if newest.is_over and newest.status != "SUCCEEDED":
        return Decision(newest, newest.number + 1)  # also with another command, as a corrected one is
    if newest.entrypoint != command:
        raise OutputError(
            f"another run on that cluster is named {newest.run} ({newest.id}, {newest.status})",
            why=f"it runs `{newest.entrypoint}`",
            fix="set another run.name for this one (or give a pipeline's file another name)",
        )
    return Decision(newest, None)


def start(jobs: Jobs, run: str, command: str, number: int, upload: Upload, stop_grace_s: int) -> str:
    """Uploads the files and starts attempt `number`; its id."""
    with upload.staged({RUNNER: FIND_PYTHON}) as folder:
        return jobs.submit(Submission(run, command, folder, environment(stop_grace_s)), number)


def run_command(jobs: Jobs, command: Sequence[str], upload: Upload) -> str:
    """Runs a command of this program on the cluster, as a job that belongs to no run; its id."""
    name = f"{command[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with upload.staged({RUNNER: FIND_PYTHON}) as folder:
        line = shlex.join([*PROGRAM, *command])
        return jobs.submit(Submission(name, line, folder, environment(STOP_GRACE_S)), None)


def path_in_upload(recipe: str, working_dir: Path) -> str:
    """The recipe's path in the uploaded folder. ConfigError if it would not be in it."""
    if recipe in builtin_recipes():
        return recipe
    file, root = Path(recipe).resolve(), working_dir.resolve()
    if not file.is_relative_to(root):
        raise ConfigError(
            f"{recipe} lies outside of {root}, the folder that is uploaded with the job",
            fix="run the command in the recipe's folder, or give --working-dir",
        )
    return file.relative_to(root).as_posix()


def check_paths(recipe: str, stages: Sequence[Stage], upload: Upload) -> None:
    """ConfigError or MissingInput if a relative path of the recipe would lead to nothing in the uploaded
    folder."""
    if recipe not in builtin_recipes():
        for file in recipe_files(Path(recipe).resolve()):
            _check_path("the recipe", os.path.relpath(file, upload.root), upload, is_file=True)
    for stage in stages:
        for key, path, is_file in _paths(stage.recipe):
            _check_path(f"{stage.name}: {key}", path, upload, is_file=is_file)


def _paths(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """(key, relative path, whether the path must be a file) of the recipe. A path that need not be a file may
    be a name on the hub, which looks like a folder."""
    online = recipe.algorithm.name in ONLINE
    data = (("data.train", recipe.data.train), ("data.eval", recipe.data.eval))
    paths = [
        (key, source if isinstance(source, str) else source.path)
        for key, sources in data
        if sources is not None
        for source in ([sources] if isinstance(sources, str) else sources)
    ]
    models = [
        ("model", recipe.model),
        *([("critic.model", recipe.critic.model)] if online and recipe.critic.model is not None else []),
    ]
    for name, model in models:
        paths += [
            (f"{name}.{k}", v)
            for k in ("path", "reference", "chat_template")
            if (v := getattr(model, k)) is not None
        ]
    named = [
        (f"algorithm.{k}", v) for k in ("loss", "advantage") if names_code(v := getattr(recipe.algorithm, k))
    ]
    if online:
        named += [("rollouts.environment", recipe.rollouts.environment)]
        named += [(f"rewards.functions, {f.name}", f.function) for f in recipe.rewards.functions]
        paths += [
            (f"rewards.functions, {f.name}: model", f.model)
            for f in recipe.rewards.functions
            if f.model is not None
        ]
        paths += [("rollouts.replay", recipe.rollouts.replay)] if recipe.rollouts.replay is not None else []
    code = [(key, v.rpartition(":")[0]) for key, v in named if v is not None]
    paths += [(key, place) for key, place in code if place.endswith(".py")]
    for key, path in paths:
        if not Path(path).is_absolute() and "://" not in path and not path.startswith(("toy:", STAGE)):
            yield key, path, key.endswith(("chat_template", "replay")) or path.endswith((*SUFFIXES, ".py"))


def _check_path(key: str, path: str, upload: Upload, *, is_file: bool) -> None:
    run, uploaded = upload.run_of(Path(path)), upload.holds(Path(path))
    if run is not None and (run == Path(path) or not uploaded):
        fix = (
            "copy it out of the run folder, or put it on storage that all nodes see and give its absolute "
            "path"
        )
        raise ConfigError(
            f"{key}: {path} is not uploaded with the job",
            why=f"{run} is the folder of a run, which is left out",
            fix=fix,
        )
    if uploaded:
        return
    if path.startswith("..") or (upload.root / path).exists():
        raise ConfigError(
            f"{key}: {path} is not uploaded with the job",
            why=f"it lies outside of {upload.root}"
            if path.startswith("..")
            else "a .gitignore or .rayignore leaves it out, or it is empty",
            fix="move it into the folder or stop ignoring it, or put it on storage that all nodes see and "
            "give its absolute path",
        )
    if is_file or Path(path).exists():
        fix = (
            "paths of a submitted recipe are relative to --working-dir"
            if Path(path).exists()
            else "check the path"
        )
        raise MissingInput(
            f"{key}: {path} does not exist in {upload.root}, the folder that is uploaded", fix=fix
        )
