"""Loads the user's reward functions and environment once, in a process that is thrown away.

This runs before anything is placed for them, so that what cannot work is an error at once.

    try_user_code(rewards, environment, columns) --JSON--> `python -m orchestrator.rollout.trial`
                                                 <--JSON-- the first error, or null
"""

import difflib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.core.errors import ConfigError, OrchestratorError
from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.lookup import GIVEN, is_users, needs_answer, resolve
from orchestrator.rollout.rewards.sandbox import START_TIMEOUT_S, Confinement, describe_error, started_process


def try_user_code(rewards: Rewards, environment: str | None, columns: Sequence[str] | None) -> None:
    """ConfigError if a reward function or the environment cannot be loaded, or called as it will be.

    `columns` are the names of the data's columns; None without data.
    """
    if columns is not None:
        _check_builtins(rewards, columns)
    functions = [f for f in rewards.functions if is_users(f)]
    if not functions and environment is None:
        return
    request = {
        "functions": [f.model_dump(mode="json") for f in functions],
        "environment": environment,
        "columns": columns,
    }
    error = _in_a_process(request, Confinement.of(rewards, os.environ, None), functions, environment)
    if error is not None:
        raise ConfigError(error["what"], why=error["why"], fix=error["fix"])


def _check_builtins(rewards: Rewards, columns: Sequence[str]) -> None:
    for function in rewards.functions:
        if needs_answer(function) and "answer" not in columns:
            why = f"the rows have {', '.join(columns) or 'no other columns'}"
            fix = "name the column that holds it, e.g. data.columns.answer=solution"
            raise ConfigError(
                f"rewards.functions, {function.name}: {function.function} needs the column answer",
                why=why,
                fix=fix,
            )


def _in_a_process(
    request: dict[str, Any],
    confinement: Confinement,
    functions: Sequence[RewardFunction],
    environment: str | None,
) -> dict[str, str] | None:
    """The trial's answer; an error too if the process ends without one, or not in time."""
    named = ", ".join(
        [
            *(f"{f.name} ({f.function})" for f in functions),
            *([f"rollouts.environment ({environment})"] if environment else []),
        ]
    )
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        # An environment runs in an actor with all of the driver's variables, a reward with few of them.
        variables = {**os.environ, **confinement.environment} if environment else confinement.environment
        with log.open("wb") as output:
            process = started_process(
                ["orchestrator.rollout.trial", str(answer)],
                variables,
                confinement.folder,
                output,
                stdin=subprocess.PIPE,
            )
            try:
                process.communicate(json.dumps(request).encode(), timeout=START_TIMEOUT_S)
                why = f"its process ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                why = f"it was not loaded within {START_TIMEOUT_S:.0f} s"
            finally:
                process.kill()
                process.wait()
        if answer.is_file():
            return json.loads(answer.read_text())
        last = " ".join(log.read_text(errors="replace").split())[-300:]
        return {
            "what": f"{named} cannot be loaded",
            "why": f"{why}{f': {last}' if last else ''}",
            "fix": "import it alone to see why",
        }


def main() -> None:
    """The process: writes the first error as JSON into the file that its argument names."""
    request = json.loads(sys.stdin.read())
    error = None
    for entry in request["functions"]:
        error = error or _function_error(RewardFunction.model_validate(entry), request["columns"])
    if request["environment"] is not None:
        error = error or _environment_error(request["environment"])
    Path(sys.argv[1]).with_suffix(".part").write_text(json.dumps(error))
    os.replace(Path(sys.argv[1]).with_suffix(".part"), sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads that a module started


def _function_error(function: RewardFunction, columns: Sequence[str] | None) -> dict[str, str] | None:
    try:
        callable_ = resolve(function)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        if isinstance(error, ConfigError):
            return {"what": error.what, "why": error.why, "fix": error.fix}
        fix = "import it alone to see why"
        return {
            "what": f"reward {function.name}: {function.function} cannot be loaded",
            "why": describe_error(error, function),
            "fix": fix,
        }
    if not callable(callable_):
        what = f"reward {function.name}: {function.function} is a {type(callable_).__name__}, not a function"
        return {"what": what, "why": "", "fix": "name a function"}
    missing = _missing(callable_, columns)
    if not missing:
        return None
    given = ", ".join([*GIVEN, *(columns or ())])
    what = f"reward {function.name}: {function.function} needs {', '.join(missing)}, which it is not given"
    close = difflib.get_close_matches(missing[0], [*GIVEN, *(columns or ())])
    fix = f"did you mean {close[0]}? Or give it" if close else "give it"
    return {
        "what": what,
        "why": f"it is given {given}",
        "fix": f"{fix} a default, an entry in options, or a column of that name",
    }


def _missing(function: Callable[..., Any], columns: Sequence[str] | None) -> list[str]:
    """Arguments without a default that it is not given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C without one
        return []
    bound = getattr(function, "keywords", {})
    required = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in bound
    ]
    # Arguments are given by name, so a positional-only one is always missing.
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    return positional + (
        [] if columns is None else [name for name in required if name not in (*GIVEN, *columns)]
    )


def _environment_error(spec: str) -> dict[str, str] | None:
    from orchestrator.rollout.environment import load_environment

    try:
        factory: Any = load_environment(spec)
    except OrchestratorError as error:
        return {"what": error.what, "why": error.why, "fix": error.fix}
    for name, call, arguments in (
        ("the class", factory, ()),
        ("reset", factory.reset, (None, {})),
        ("step", factory.step, (None, "")),
    ):
        try:
            inspect.signature(call).bind(*arguments)
        except ValueError:
            continue
        except TypeError as error:
            fix = (
                "a class without arguments, with reset(row) and step(completion): see "
                "orchestrator.rollout.environment.Environment"
            )
            return {
                "what": f"rollouts.environment: {name} of {spec} cannot be called as it will be",
                "why": str(error),
                "fix": fix,
            }
    return None


if __name__ == "__main__":
    main()
