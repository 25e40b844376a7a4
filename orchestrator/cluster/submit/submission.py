"""From a recipe on this machine to a job on a cluster.

recipe, overrides --prepared--> Submission, Upload --decide--> start attempt n | follow the one that runs | nothing to do
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
"""Seconds between SIGTERM and SIGKILL of `ray job stop`: a step and its checkpoint have to fit. Ray's own
default is 3."""

RUNNER = "orchestrator-run.sh"
"""Comes along with every upload: the job's command begins with it."""
PROGRAM = ("sh", RUNNER)
FIND_PYTHON = """#!/bin/sh
# Runs this program with the interpreter that Ray's workers have here: the raylet, which this job descends
# from, names it. Ray may have been started without its environment being active, so that PATH has none or
# another one.
p=$PPID
ray=
while [ "${p:-0}" -gt 1 ] && [ -z "$ray" ]; do
    ray=$(tr '\\0' '\\n' <"/proc/$p/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p')
    p=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$p/status" 2>/dev/null)
done
for python in "$ray" python python3; do
    if [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 && "$python" -c 'import orchestrator' >/dev/null 2>&1; then
        exec "$python" -m orchestrator "$@"
    fi
done
echo "error: no Python on the head of the cluster has this program: tried ${ray:-no interpreter of Ray}, python, python3" >&2
echo "  fix: install it in the environment that Ray was started from, on every node" >&2
exit 78
"""


@dataclass(frozen=True, slots=True)
class Decision:
    """What submitting means now. attempt: the newest one, if any; number: of the attempt to start, None:
    start nothing."""

    attempt: JobAttempt | None
    number: int | None


def entrypoint(recipe: str, overrides: Sequence[str], output: Path, working_dir: Path) -> str:
    """The command of the driver, in the uploaded folder."""
    return shlex.join(
        [
            *PROGRAM,
            "train",
            path_in_upload(recipe, working_dir),
            *overrides,
            "--output",
            str(output.absolute()),
        ]
    )


def environment(stop_grace_s: int) -> dict[str, str]:
    """Variables of the driver: output at once, and time to save when it is stopped. Nothing secret may be
    here."""
    return {"PYTHONUNBUFFERED": "1", STOP_GRACE: str(stop_grace_s)}


def decide(attempts: Sequence[JobAttempt], command: str) -> Decision:
    """The same run once: follow it while it is going on, do nothing when it is done, else start it again to
    go on. OutputError where the name belongs to another command."""
    if not attempts:
        return Decision(None, 1)
    newest = max(attempts, key=lambda a: a.number)
    if newest.is_over and newest.status != "SUCCEEDED":
        return Decision(newest, newest.number + 1)  # with another command too: corrected and tried again
    if newest.entrypoint != command:
        raise OutputError(
            f"run {newest.run} is another one on that cluster ({newest.id}, {newest.status})",
            why=f"it runs `{newest.entrypoint}`",
            fix="give this one another run.name (or a pipeline another file name)",
        )
    return Decision(newest, None)


def start(jobs: Jobs, run: str, command: str, number: int, upload: Upload, stop_grace_s: int) -> str:
    """Uploads and starts attempt `number`; its id."""
    with upload.staged({RUNNER: FIND_PYTHON}) as folder:
        return jobs.submit(Submission(run, command, folder, environment(stop_grace_s)), number)


def ask(jobs: Jobs, words: Sequence[str], upload: Upload) -> str:
    """Runs a command of this program on the cluster, as a job of its own that belongs to no run; its id."""
    name = f"{words[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with upload.staged({RUNNER: FIND_PYTHON}) as folder:
        return jobs.submit(
            Submission(name, shlex.join([*PROGRAM, *words]), folder, environment(STOP_GRACE_S)), None
        )


def path_in_upload(recipe: str, working_dir: Path) -> str:
    """The recipe's name in the uploaded folder. ConfigError where it would not be there."""
    if recipe in builtin_recipes():
        return recipe
    file, root = Path(recipe).resolve(), working_dir.resolve()
    if not file.is_relative_to(root):
        raise ConfigError(
            f"{recipe} lies outside of {root}, which is what the job brings along",
            fix="run the command in the recipe's folder, or give --working-dir",
        )
    return file.relative_to(root).as_posix()


def check_paths(recipe: str, stages: Sequence[Stage], upload: Upload) -> None:
    """ConfigError or MissingInput where a relative path of the recipe will lead to nothing in the uploaded
    folder."""
    if recipe not in builtin_recipes():
        for file in recipe_files(Path(recipe).resolve()):
            _check_path("the recipe", os.path.relpath(file, upload.root), upload, is_file=True)
    for stage in stages:
        for key, path, is_file in _paths(stage.recipe):
            _check_path(f"{stage.name}: {key}", path, upload, is_file=is_file)


def _paths(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """(key, relative path, whether it can be nothing else than a file: a name on the hub looks like a
    folder)."""
    online = recipe.algorithm.name in ONLINE
    sources = [
        (f"data.{k}", v)
        for k, v in (("train", recipe.data.train), ("eval", recipe.data.eval))
        if v is not None
    ]
    found = [
        (key, s if isinstance(s, str) else s.path)
        for key, v in sources
        for s in ([v] if isinstance(v, str) else v)
    ]
    models = [
        ("model", recipe.model),
        *([("critic.model", recipe.critic.model)] if online and recipe.critic.model is not None else []),
    ]
    for name, model in models:
        found += [
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
        found += [
            (f"rewards.functions, {f.name}: model", f.model)
            for f in recipe.rewards.functions
            if f.model is not None
        ]
        found += [("rollouts.replay", recipe.rollouts.replay)] if recipe.rollouts.replay is not None else []
    code = [(key, v.rpartition(":")[0]) for key, v in named if v is not None]
    found += [(key, place) for key, place in code if place.endswith(".py")]
    for key, path in found:
        if not Path(path).is_absolute() and "://" not in path and not path.startswith(("toy:", STAGE)):
            yield key, path, key.endswith(("chat_template", "replay")) or path.endswith((*SUFFIXES, ".py"))


def _check_path(key: str, path: str, upload: Upload, *, is_file: bool) -> None:
    run, goes = upload.run_of(Path(path)), upload.holds(Path(path))
    if run is not None and (run == Path(path) or not goes):
        fix = (
            "copy it out of the run folder, or put it on storage that all nodes see and give its absolute "
            "path"
        )
        raise ConfigError(
            f"{key}: {path} does not go with the job",
            why=f"{run} is the folder of a run, which stays behind",
            fix=fix,
        )
    if goes:
        return
    if path.startswith("..") or (upload.root / path).exists():
        raise ConfigError(
            f"{key}: {path} does not go with the job",
            why=f"it lies outside of {upload.root}"
            if path.startswith("..")
            else "a .gitignore or .rayignore leaves it out, or it is empty",
            fix="change that, or put it on storage that all nodes see and give its absolute path",
        )
    if is_file or Path(path).exists():
        fix = (
            "paths of a submitted recipe are relative to --working-dir"
            if Path(path).exists()
            else "check the path"
        )
        raise MissingInput(f"{key}: there is no {path} in {upload.root}, which the job brings along", fix=fix)
