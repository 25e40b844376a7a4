"""The user's functions and environment are loaded once in a process that is thrown away, before anything is
placed for them.

try_user_code(rewards, environment, columns) --JSON--> `python -m orchestrator.rollout.trial` --JSON--> what cannot work, or nothing
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
from orchestrator.rollout.rewards.sandbox import START_TIMEOUT_S, Confinement, started_process, words_of


def try_user_code(rewards: Rewards, environment: str | None, columns: Sequence[str] | None) -> None:
    """ConfigError where a reward function or the environment cannot be loaded or called as it will be.
    columns: of the data, by name; None where there is none to look at."""
    if columns is not None:
        _check_builtins(rewards, columns)
    functions = [f for f in rewards.functions if is_users(f)]
    if not functions and environment is None:
        return
    asked = {
        "functions": [f.model_dump(mode="json") for f in functions],
        "environment": environment,
        "columns": columns,
    }
    found = _in_a_process(asked, Confinement.of(rewards, os.environ, None), functions, environment)
    if found is not None:
        raise ConfigError(found["what"], why=found["why"], fix=found["fix"])


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
    asked: dict[str, Any],
    confinement: Confinement,
    functions: Sequence[RewardFunction],
    environment: str | None,
) -> dict[str, str] | None:
    """The trial's answer. A process that ends without one, or is late, is an answer too."""
    named = ", ".join(
        [
            *(f"{f.name} ({f.function})" for f in functions),
            *([f"rollouts.environment ({environment})"] if environment else []),
        ]
    )
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        answer, said = Path(folder) / "answer.json", Path(folder) / "said.txt"
        # the environment's process is an actor with all of the driver's variables; a reward's has the few
        # that it will have
        variables = {**os.environ, **confinement.environment} if environment else confinement.environment
        with said.open("wb") as output:
            process = started_process(
                ["orchestrator.rollout.trial", str(answer)],
                variables,
                confinement.folder,
                output,
                stdin=subprocess.PIPE,
            )
            try:
                process.communicate(json.dumps(asked).encode(), timeout=START_TIMEOUT_S)
                why = f"its process ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                why = f"it was not loaded within {START_TIMEOUT_S:.0f} s"
            finally:
                process.kill()
                process.wait()
        if answer.is_file():
            return json.loads(answer.read_text())
        last = " ".join(said.read_text(errors="replace").split())[-300:]
        return {
            "what": f"{named} cannot be loaded",
            "why": f"{why}{f': {last}' if last else ''}",
            "fix": "import it on its own to see why",
        }


def main() -> None:
    """The process: the first thing that is wrong, as JSON in the file that is named."""
    asked = json.loads(sys.stdin.read())
    found = None
    for entry in asked["functions"]:
        found = found or _of_function(RewardFunction.model_validate(entry), asked["columns"])
    if asked["environment"] is not None:
        found = found or _of_environment(asked["environment"])
    Path(sys.argv[1]).with_suffix(".part").write_text(json.dumps(found))
    os.replace(Path(sys.argv[1]).with_suffix(".part"), sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # threads that a module started are no reason to wait


def _of_function(function: RewardFunction, columns: Sequence[str] | None) -> dict[str, str] | None:
    try:
        callable_ = resolve(function)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        if isinstance(error, ConfigError):
            return {"what": error.what, "why": error.why, "fix": error.fix}
        fix = "import it on its own to see why"
        return {
            "what": f"reward {function.name}: {function.function} cannot be loaded",
            "why": words_of(error, function),
            "fix": fix,
        }
    if not callable(callable_):
        what = f"reward {function.name}: {function.function} is a {type(callable_).__name__}, no function"
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
        "why": f"there are {given}",
        "fix": f"{fix} a default, an entry in options, or a column of that name",
    }


def _missing(function: Callable[..., Any], columns: Sequence[str] | None) -> list[str]:
    """Arguments without a default that nothing gives."""
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
    positional = [
        p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty
    ]  # everything is given by name
    return positional + (
        [] if columns is None else [name for name in required if name not in (*GIVEN, *columns)]
    )


def _of_environment(spec: str) -> dict[str, str] | None:
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
                "orchestrator.rollout.episodes.Environment"
            )
            return {
                "what": f"rollouts.environment: {name} of {spec} cannot be called as it will be",
                "why": str(error),
                "fix": fix,
            }
    return None


if __name__ == "__main__":
    main()
