"""Loads the user's modules, with reward functions or an environment, as Python itself would find them.

module            from the working folder, then from the Python path
file.py           under its own name in sys.modules (for pickle and dataclasses), with its folder on the
                  path (for its siblings)
package/file.py   with relative imports: as a module of its package
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.core.errors import ConfigError, MissingInput


def load_module(place: str) -> ModuleType:
    """The module of a dotted name, or of a path that ends with .py. Raises what the module raises."""
    _first_on_path(Path.cwd())
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place).resolve()
    _first_on_path(file.parent, after=Path.cwd())
    package = _package(file)
    if not package:
        return _single_file(file)
    _first_on_path(file.parents[len(package)], after=Path.cwd())
    return importlib.import_module(".".join([*package, file.stem]))


def names_code(value: object) -> bool:
    """True for `file.py:function` and `module:function`."""
    return isinstance(value, str) and ":" in value


def load_function(key: str, place: str) -> Callable[..., Any]:
    """The function of `file.py:function` or `module:function`, which the recipe names in `key`.

    MissingInput if there is no such file; ConfigError if its module raises, or holds no such function.
    """
    where, _, name = place.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise MissingInput(
            f"{key}: no file {where}", why=f"the working folder is {Path.cwd()}", fix="give its path"
        )
    try:
        module = load_module(where)
    except (Exception, SystemExit) as error:  # a script may end the process at its top level
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {where} cannot be imported", why=why, fix="import it alone to see why"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], n=1)
        fix = f"did you mean {close[0]}?" if close else f"define `def {name}(...)` at its top level"
        raise ConfigError(f"{key}: {where} has no function {name}", fix=fix)
    return function


def _package(file: Path) -> tuple[str, ...]:
    """The packages around a file with relative imports, outermost first; at least its folder.

    Empty for a file without relative imports, which need not run a package's __init__.
    """
    if not file.stem.isidentifier() or not file.parent.name.isidentifier() or not _imports_relatively(file):
        return ()
    names: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent
    return tuple(names) or (file.parent.name,)


def _imports_relatively(file: Path) -> bool:
    return any(
        isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(file.read_bytes()))
    )


def _single_file(file: Path) -> ModuleType:
    """The module of a file outside of packages. If its name is taken (json.py), it gets a unique one."""
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None and _is_from(loaded, file):
        return loaded
    if loaded is not None or name in sys.stdlib_module_names:
        name = f"{name}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_from(module: ModuleType, file: Path) -> bool:
    source = getattr(module, "__file__", None)
    return source is not None and Path(source).resolve() == file


def _first_on_path(folder: Path, after: Path | None = None) -> None:
    """Puts a folder first on sys.path, or just behind `after`, unless it is there already."""
    text = os.fspath(folder)
    if text in sys.path or ("" in sys.path and folder == Path.cwd()):
        return
    place = sys.path.index(os.fspath(after)) + 1 if after is not None and os.fspath(after) in sys.path else 0
    sys.path.insert(place, text)
