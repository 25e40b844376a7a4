"""From a recipe on this machine to a job on a cluster.

    recipe, overrides --prepared--> Submission, Upload --decide--> start attempt n | follow the one that runs | nothing to do
"""

import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster.jobs import STOP_GRACE, Attempt, Jobs, Submission
from orchestrator.errors import ConfigError, OutputError
from orchestrator.recipe import builtin_recipes
from orchestrator.upload import Upload

STOP_GRACE_S = 300
"""Seconds between SIGTERM and SIGKILL of `ray job stop`: a step and its checkpoint have to fit. Ray's own default is 3."""

PROGRAM = ("python", "-m", "orchestrator")


@dataclass(frozen=True, slots=True)
class Decision:
    """What submitting means now. attempt: the newest one, if any; number: of the attempt to start, None: start nothing."""

    attempt: Attempt | None
    number: int | None


def entrypoint(recipe: str, overrides: Sequence[str], output: Path, working_dir: Path) -> str:
    """The command of the driver, in the uploaded folder."""
    return shlex.join([*PROGRAM, "train", there(recipe, working_dir), *overrides, "--output", str(output.absolute())])


def environment(stop_grace_s: int) -> dict[str, str]:
    """Variables of the driver: output at once, and time to save when it is stopped. Nothing secret may be here."""
    return {"PYTHONUNBUFFERED": "1", STOP_GRACE: str(stop_grace_s)}


def decide(attempts: Sequence[Attempt], command: str) -> Decision:
    """The same run once: follow it while it is going on, do nothing when it is done, else start it again to go on.
    OutputError where the name belongs to another command."""
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
    with upload.staged() as folder:
        return jobs.submit(Submission(run, command, folder, environment(stop_grace_s)), number)


def ask(jobs: Jobs, words: Sequence[str], upload: Upload) -> str:
    """Runs a command of this program on the cluster, as a job of its own that belongs to no run; its id."""
    name = f"{words[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with upload.staged() as folder:
        return jobs.submit(Submission(name, shlex.join([*PROGRAM, *words]), folder, environment(STOP_GRACE_S)), None)


def there(recipe: str, working_dir: Path) -> str:
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
