"""Finds the reward function that a recipe names, and checks the names before anything is started.

    exact_match | last_number        the checkers of data/answers.py, against the row's `answer`
    module:function                  importable from the working folder or the Python path
    file.py:function                 a file outside of packages
    trl:NAME                         in trl.rewards; `options` are passed to its makers (`get_*`)

`check_rewards` reads sources and imports no user code; only the sandbox process calls `resolve`.
"""

import ast
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.core import hub
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.core.user_code import load_module
from orchestrator.data.answers import CHECKERS, matches
from orchestrator.recipe.schema import RewardFunction, Rewards

ENVIRONMENT = "environment"
"""Name of the part with the environments' rewards; no component may use it."""

NEEDS_MATH_VERIFY = "accuracy_rewards"
"""File of trl.rewards whose functions need the package math-verify."""

GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments that every function gets beside the columns of the data."""
ONLY_TRL = ("trainer_state", "log_metric", "log_extra", "environments")
"""Arguments that only TRL's trainers give."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a function is written."""

    name: str
    module: str | None
    """None for a file outside of packages."""
    file: Path | None
    """Its source; None if there is none to read."""

    @property
    def is_trl(self) -> bool:
        return self.module == "trl.rewards"


def check_rewards(rewards: Rewards) -> None:
    """ConfigError or MissingInput if a component cannot work as written. No user code is run."""
    names = [f.name for f in rewards.functions]
    for name in names:
        if names.count(name) > 1 or name == ENVIRONMENT:
            why = (
                "it is the name of the environment's reward"
                if name == ENVIRONMENT
                else "metrics need a different name for each component"
            )
            raise ConfigError(
                f"rewards.functions: the name {name} is taken", why=why, fix="rename the component"
            )
    for function in rewards.functions:
        _check_weight(function)
        if function.function is not None:
            _check_function(function)
        elif function.url is not None:
            _check_url(function.url, f"rewards.functions, {function.name}: url")
            header_values(function, os.environ)
        else:
            _check_model(function)


def header_values(function: RewardFunction, environment: Mapping[str, str]) -> dict[str, str]:
    """HTTP headers of a component. Error messages never show a value."""
    headers = {}
    for header, variable in function.headers_from.items():
        value = environment.get(variable, "").strip()
        if not value or not (value.isascii() and value.isprintable()):
            state = "holds characters that a header cannot have" if value else "is not set"
            raise ConfigError(
                f"rewards.functions, {function.name}: the variable {variable} for the header {header} "
                f"{state}",
                fix=f"export {variable}=…",
            )
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header):
            raise ConfigError(
                f"rewards.functions, {function.name}: {header!r} is not a name for an HTTP header",
                fix="rename it in headers_from",
            )
        headers[header] = value
    return headers


def parameters_of(function: RewardFunction) -> ast.arguments | None:
    """A function's arguments, from its source.

    None if there is none to read, as for a method, and for a decorated, imported or made function.
    """
    origin = _locate(function)
    if origin.file is None:
        return None
    definition = _definitions(origin.file, function).names.get(origin.name)
    return None if definition is None or definition.decorator_list or origin.is_trl else definition.args


def resolve(function: RewardFunction) -> Callable[..., Any]:
    """The function with its options bound. This runs user code: only for the sandbox process."""
    origin = _locate(function)
    if origin.module == __name__:
        return functools.partial(_check_answers, checker=origin.name)
    module = load_module(origin.module or str(origin.file))
    named: Any = functools.reduce(getattr, origin.name.split("."), module)
    if origin.is_trl and origin.name.startswith("get_"):
        return named(**function.options)
    return functools.partial(named, **function.options) if function.options else named


def _check_answers(
    completions: Sequence[Any], checker: str, answer: Sequence[str | None], **_: Any
) -> list[float | None]:
    """1.0 if the completion matches the row's answer, else 0.0; None if the row has no answer."""
    return [
        None if wanted is None else float(matches(text_of(completion), str(wanted), checker))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def text_of(completion: Any) -> str:
    """A completion's text; for messages, that of the assistant's last one."""
    if isinstance(completion, str):
        return completion
    content = next((m["content"] for m in reversed(completion) if m["role"] == "assistant"), "") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def is_users(function: RewardFunction) -> bool:
    """Whether the code is neither this program's nor TRL's."""
    return (
        function.function is not None
        and ":" in function.function
        and not function.function.startswith("trl:")
    )


def source_of(written: str) -> Path | None:
    """The file of `module:name` or `file.py:name`; None if there is none to read."""
    place = written.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    spec = _spec(place)
    return (
        Path(spec.origin)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py")
        else None
    )


def needs_answer(function: RewardFunction) -> bool:
    """Whether it is a checker of this program, which needs the column `answer`."""
    return function.function in CHECKERS


def _check_weight(function: RewardFunction) -> None:
    if not math.isfinite(function.weight):
        raise ConfigError(
            f"rewards.functions, {function.name}: the weight is {function.weight}", fix="give a finite number"
        )


def _check_function(function: RewardFunction) -> None:
    """ConfigError if the function or a package that it needs is missing, or it does not take the options."""
    origin = _locate(function)
    if origin.file is None:
        return
    needs_math_verify = origin.is_trl and origin.file.stem == NEEDS_MATH_VERIFY
    if needs_math_verify and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            f"rewards.functions, {function.name}: {function.function} needs the package math-verify",
            fix="pip install 'math-verify[antlr4_13_2]'",
        )
    defined = _definitions(origin.file, function)
    first = origin.name.split(".")[0]
    if first not in defined.names and not defined.open:
        raise _unknown(function, f"{origin.file} defines no {first}", first, defined.names)
    definition = defined.names.get(first)
    if definition is not None and first == origin.name:
        _check_options(function, definition, maker=origin.is_trl and first.startswith("get_"))


def _check_options(
    function: RewardFunction, definition: ast.FunctionDef | ast.AsyncFunctionDef, *, maker: bool
) -> None:
    if definition.decorator_list:  # decorators may change the arguments
        return
    arguments = definition.args
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    takes = [*positional, *(a.arg for a in arguments.kwonlyargs)]
    for option in function.options:
        if (option not in takes and arguments.kwarg is None) or (option in GIVEN and not maker):
            why = "orchestrator itself gives it" if option in takes else ""
            what = f"{function.function} takes no option {option}"
            raise _unknown(function, what, option, set(takes) - set(GIVEN), why)
    required = positional[: len(positional) - len(arguments.defaults)]
    missing = [name for name in required if name not in function.options]
    only_trl = [
        name
        for name in (*missing, *_without_default(arguments))
        if name in ONLY_TRL and name not in function.options
    ]
    if only_trl and not maker:
        raise ConfigError(
            f"rewards.functions, {function.name}: {function.function} needs {', '.join(only_trl)}, which "
            "only TRL's trainers give",
            why="it is given prompts, completions, completion_ids and the columns of the data",
            fix=f"give the argument a default ({only_trl[0]}=None) and remove the code that needs it",
        )
    if maker and missing:
        raise ConfigError(
            f"rewards.functions, {function.name}: {function.function} needs the options {', '.join(missing)}",
            fix=f"options: {{{missing[0]}: …}}",
        )


def _without_default(arguments: ast.arguments) -> list[str]:
    """Keyword-only arguments without a default."""
    return [
        a.arg
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]


def _locate(function: RewardFunction) -> Origin:
    """Where the function is, without importing it; ConfigError or MissingInput if that does not exist."""
    assert function.function is not None
    where, colon, name = function.function.rpartition(":")
    if not colon:
        if name not in CHECKERS:
            raise _unknown(
                function,
                f"no built-in reward is named {name}",
                name,
                CHECKERS,
                "others are written module:function or file.py:function",
            )
        if function.options:
            raise ConfigError(
                f"rewards.functions, {function.name}: {name} takes no options", fix="remove them"
            )
        return Origin(name, __name__, None)
    if where == "trl":
        return _locate_in_trl(function, name)
    if where.endswith(".py"):
        file = Path(where).absolute()
        if not file.is_file():
            close = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")])
            raise MissingInput(
                f"rewards.functions, {function.name}: no file {where}",
                fix=_did_you_mean(close) or "give the path of the file",
            )
        return Origin(name, None, file)
    spec = _spec(where)
    if spec is None:
        close = difflib.get_close_matches(where, [p.stem for p in Path.cwd().glob("*.py")])
        raise ConfigError(
            f"rewards.functions, {function.name}: no module is named {where!r}",
            why="it is neither in the working folder nor installed",
            fix=_did_you_mean([f"{c}:{name}" for c in close])
            or "check the name, set PYTHONPATH, or write file.py:function",
        )
    return Origin(
        name, where, Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None
    )


def _locate_in_trl(function: RewardFunction, name: str) -> Origin:
    spec = _spec("trl.rewards")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"rewards.functions, {function.name}: this trl has no trl.rewards", fix="pip install 'trl>=1.16'"
        )
    files: dict[str, Path] = {}
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        files |= {
            defined: file
            for defined in _definitions(file, function).names
            if not defined.startswith("_") and file.stem != "__init__"
        }
    files = {
        name: file for name, file in files.items() if name.endswith("_reward") or name.startswith("get_")
    }
    if name not in files:
        raise _unknown(function, f"trl.rewards has no {name}", name, files)
    return Origin(name, "trl.rewards", files[name])


def _spec(module: str) -> ModuleSpec | None:
    """A module's spec, found without importing its parents."""
    head, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(head, [os.getcwd(), *sys.path]) or importlib.util.find_spec(head)
    except (ValueError, ImportError):  # a name that Python cannot look up, such as __main__ or ""
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        head = f"{head}.{part}"
        spec = PathFinder.find_spec(head, list(spec.submodule_search_locations))
    return spec


@dataclass(frozen=True, slots=True)
class _Definitions:
    """Names at the top level of a source."""

    names: Mapping[str, ast.FunctionDef | ast.AsyncFunctionDef | None]
    """Name -> its definition; None for what is not a function."""
    open: bool
    """Whether there may be other names, from a star import or __getattr__."""


def _definitions(file: Path, function: RewardFunction) -> _Definitions:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(
            f"rewards.functions, {function.name}: {file}:{line} is not Python",
            why=str(error),
            fix="fix the file",
        ) from error
    names: dict[str, ast.FunctionDef | ast.AsyncFunctionDef | None] = {}
    for node in _top_level(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0]: None for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
    return _Definitions(names, "*" in names or "__getattr__" in names)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported, without those inside functions and classes."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _top_level(node)


def _check_url(url: str, key: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{key} is not an http:// or https:// address", fix="write http://host:port/path")
    if parts.username or parts.password:
        raise ConfigError(
            f"{key} holds a user or a password",
            why="recipes are stored and logged",
            fix="use headers_from with a variable",
        )


def _check_model(function: RewardFunction) -> None:
    path = str(function.model)
    if not hub.is_model_name(path) and not (Path(path) / "config.json").is_file():
        raise MissingInput(
            f"rewards.functions, {function.name}: {path} holds no config.json",
            fix="point to the export folder of a reward run",
        )


def _unknown(
    function: RewardFunction, what: str, name: str, choices: Iterable[str], why: str = ""
) -> ConfigError:
    """The error for an unknown name, with the choices that are close to it."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    fix = _did_you_mean(close) or (f"use one of {', '.join(names[:12])}" if names else "")
    return ConfigError(f"rewards.functions, {function.name}: {what}", why=why, fix=fix)


def _did_you_mean(close: Sequence[str]) -> str:
    return f"did you mean {' or '.join(close)}?" if close else ""
