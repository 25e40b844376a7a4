"""The order of rooms: imports go one way, no files import each other in a circle, each foreign framework has
one home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.house import Figure, figures, import_circles, module_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orchestrator"

ORDER = (
    "cli > run > cluster > rollout | learner | plan | trainers > models | data > observe | algorithms > "
    "recipe > core"
)
"""Each room may import what stands to its right, and nothing beside it. docs/design.md draws it."""
CUDA = {
    "plan/hardware.py": "counts what there is, for plans",
    "cluster/doctor/smoke.py": "tries each GPU, for the doctor",
    "cluster/doctor/probe.py": "times collectives on the GPU that Ray gave it",
    "cluster/actors.py": "names the device that Ray gave an actor, and bounds its share",
    "cluster/rollout_actor.py": "waits for a copy on its device",
    "learner/memory.py": "measures the device it is given",
    "learner/probes.py": "asks the name of the device it is given",
    "models/weight_buckets.py": "waits for a broadcast on its device",
    "rollout/rewards/reward_model.py": "gives memory back on its device",
    "rollout/engines/vllm_engine.py": "asks the memory of its device",
}
"""Who may name torch.cuda, and what for. Nobody asks whether the machine has a GPU: the device that is
computed on is a parameter."""
FLOOR_OF = {
    room: floor for floor, rooms in enumerate(reversed(ORDER.split(" > "))) for room in rooms.split(" | ")
}
OPEN = ("__init__", "__main__")
CORE_LINES = 900
"""Lines of code in core/, docstrings and comments left out: it stays small, without code of other rooms."""
HOMES = {"deepspeed": "learner/engine.py", "ray": "cluster/", "wandb": "observe/"}
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "deepspeed", "ray", "wandb")


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that a source imports, and the line, from functions too. module: its own dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            folder = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*folder, *([node.module] if node.module else [])])
            # `from orchestrator import faults` names a room, `from orchestrator.core.errors import X` does
            # not
            yield from (
                (f"{base}.{alias.name}" if base == "orchestrator" else base, node.lineno)
                for alias in node.names
            )


def misplaced(source: str, file: str) -> list[str]:
    """What is wrong with the imports of `file` (its path below orchestrator/): "file:line: reason"."""
    path = Path(file)
    room, is_package = path.parts[0].removesuffix(".py"), path.stem == "__init__"
    if room not in FLOOR_OF and room not in OPEN:
        return [f"{file}: room {room} is not in the order"]
    parts = path.with_suffix("").parts[:-1] if is_package else path.with_suffix("").parts
    found: list[str] = []
    for name, line in imported(source, ".".join(("orchestrator", *parts)), is_package):
        top, _, rest = name.partition(".")
        home = HOMES.get(top)
        if home is not None and not (file == home or (home.endswith("/") and file.startswith(home))):
            found.append(f"{file}:{line}: {top} may only be imported in {home}")
        if room == "core" and top not in {"orchestrator", "numpy", *sys.stdlib_module_names}:
            found.append(f"{file}:{line}: core imports {top}; it may import numpy alone")
        if top != "orchestrator" or not rest:
            continue
        other = rest.split(".")[0]
        if room == other or room in OPEN or not (PACKAGE / other).is_dir():
            continue
        if other not in FLOOR_OF:
            found.append(f"{file}:{line}: room {other} is not in the order")
        elif FLOOR_OF[other] == FLOOR_OF[room]:
            found.append(
                f"{file}:{line}: {room} and {other} stand beside each other and must not import each other"
            )
        elif FLOOR_OF[other] > FLOOR_OF[room]:
            found.append(f"{file}:{line}: {room} imports {other}, which stands above it")
    return list(dict.fromkeys(found))


def test_every_import_goes_downwards_and_frameworks_stay_at_home() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    problems = [
        p for file in files for p in misplaced(file.read_text(), file.relative_to(PACKAGE).as_posix())
    ]
    assert not problems, "\n" + "\n".join(problems)


def code_lines(source: str) -> int:
    """Lines that are neither empty nor a comment nor part of a docstring."""
    lines = enumerate(source.splitlines(), start=1)
    numbers = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            numbers -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(numbers)


def test_core_stays_small() -> None:
    assert sum(code_lines(file.read_text()) for file in (PACKAGE / "core").rglob("*.py")) <= CORE_LINES


def test_no_files_import_each_other_in_a_circle() -> None:
    assert import_circles(module_imports()) == []


def test_the_check_sees_a_circle() -> None:
    assert import_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_imports_are_found() -> None:
    imports = module_imports()
    assert "orchestrator.core.errors" in imports["orchestrator.data.dataset"]
    assert sum(map(len, imports.values())) > 300


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: figure.name)
def test_the_house_is_easy_to_enter(figure: Figure) -> None:
    """`python tools/house.py` prints the same figures, and with --list the places."""
    assert figure.value <= figure.limit, figure.places[:10]


def names_cuda(source: str) -> list[tuple[str, int]]:
    """Each torch.cuda.NAME, `from torch.cuda import NAME` (or `from torch import cuda`) and the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            found.append((node.attr, node.lineno))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            inside = (node.module or "").startswith("torch.cuda")
            found += [(alias.name, node.lineno) for alias in node.names if inside or alias.name == "cuda"]
        elif isinstance(node, ast.Import):
            found += [
                (alias.name, node.lineno) for alias in node.names if alias.name.startswith("torch.cuda")
            ]
    return found


def test_nobody_asks_whether_the_machine_has_a_gpu() -> None:
    named = {
        file.relative_to(PACKAGE).as_posix(): names_cuda(file.read_text()) for file in PACKAGE.rglob("*.py")
    }
    asking = [
        f"{file}:{line}"
        for file, uses in named.items()
        for name, line in uses
        if name in ("is_available", "is_initialized")
    ]
    assert not asking, f"they ask about the machine, not about the device they compute on: {asking}"
    assert {file for file, uses in named.items() if uses} == set(CUDA)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.is_available()",
        "from torch.cuda import is_available",
        "from torch import cuda",
        "import torch.cuda as gpu",
    ],
)
def test_the_check_sees_cuda_by_any_name(source: str) -> None:
    assert names_cuda(source)


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("data/tokenize.py", "from orchestrator.models.load import load", "beside each other"),
        ("data/tokenize.py", "def f():\n    from orchestrator.trainers import offline", "above it"),
        ("data/tokenize.py", "from orchestrator import plan", "above it"),
        ("data/tokenize.py", "from ..learner import engine", "above it"),
        ("data/tokenize.py", "from .. import cli", "above it"),
        ("observe/__init__.py", "from ..algorithms import table", "beside each other"),
        ("data/tokenize.py", "import ray.util", "ray may only"),
        ("learner/rank_learner.py", "import deepspeed", "deepspeed may only"),
        ("trainers/offline.py", "from wandb import init", "wandb may only"),
        ("core/files.py", "import torch", "numpy alone"),
        ("attic/x.py", "import os", "not in the order"),
    ],
)
def test_the_check_sees_a_wrong_import(file: str, source: str, reason: str) -> None:
    (problem,) = misplaced(source, file)
    assert reason in problem


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/micro_batches.py", "from orchestrator.data.packing import pack"),
        ("observe/jsonl.py", "from orchestrator.core.files import read_lines"),
        ("learner/engine.py", "def f():\n    import deepspeed.comm"),
        ("core/batches.py", "from orchestrator.core.errors import DataError\nimport numpy as np"),
        (
            "data/tokenize.py",
            "from .formats import to_rows\nfrom orchestrator import __version__\nimport raylib",
        ),
    ],
)
def test_the_check_passes_a_right_import(file: str, source: str) -> None:
    assert misplaced(source, file) == []


LIGHT = (
    "core.errors",
    "core.batches",
    "core.roles",
    "core.faults",
    "recipe.schema",
    "recipe.loading",
    "cli.main",
    "cluster.forkserver",
)


@pytest.mark.parametrize("module", LIGHT)
def test_starting_up_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, orchestrator.{module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
