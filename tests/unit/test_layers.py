"""The floor plan: imports go downwards, rooms on one floor do not know each other, each foreign framework has one home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orchestrator"

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "errors", "config", "records", "episodes", "roles", "faults", "facts", "words", "stopping"}),
    frozenset(
        {"objectives", "checkpoints", "strict_yaml", "stages", "keys", "validation", "findings", "node_facts", "hardware", "state_bytes", "hub"}
    ),
    frozenset({"data", "models", "observe", "algorithms", "recipe", "reference_page", "identity", "upload", "settle", "remembered"}),
    frozenset({"learner", "rollout", "cut", "dataset", "memory_model", "launchers", "chat_models", "stage_exports"}),
    frozenset({"prompts", "ways", "model_advice", "extension", "disk", "starting", "chat"}),
    frozenset({"plan", "sketch", "starting_recipe"}),
    frozenset({"controllers", "cluster", "plan_view", "sense"}),
    frozenset({"startup", "resume", "run_folder", "submission", "status"}),
    frozenset({"job"}),
    frozenset({"run_offline", "run_online", "preflight", "from_run"}),
    frozenset({"assemble", "verify"}),
    frozenset({"cluster_commands", "chat_command"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
CUDA = {
    "hardware.py": "counts what there is, for plans",
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
"""Who may name torch.cuda, and what for. Nobody asks whether the machine has a GPU: the device that is computed on is a parameter."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = FLOORS[0]
"""The records and errors are one vocabulary, so they may name each other."""

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
            # `from orchestrator import faults` names a room, `from orchestrator.core.errors import X` does not
            yield from ((f"{base}.{alias.name}" if base == "orchestrator" else base, node.lineno) for alias in node.names)


def misplaced(source: str, file: str) -> list[str]:
    """What is wrong with the imports of `file` (its path below orchestrator/): "file:line: reason"."""
    path = Path(file)
    room, is_package = path.parts[0].removesuffix(".py"), path.stem == "__init__"
    if room not in FLOOR_OF:
        return [f"{file}: room {room} is not on the floor plan"]
    parts = path.with_suffix("").parts[:-1] if is_package else path.with_suffix("").parts
    found: list[str] = []
    for name, line in imported(source, ".".join(("orchestrator", *parts)), is_package):
        top, _, rest = name.partition(".")
        home = HOMES.get(top)
        if home is not None and not (file == home or (home.endswith("/") and file.startswith(home))):
            found.append(f"{file}:{line}: {top} may only be imported in {home}")
        if top != "orchestrator" or not rest:
            continue
        other = rest.split(".")[0]
        other = other if other in FLOOR_OF or (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists() else "__init__"
        if other == room or (other in GROUND and room in GROUND):
            continue
        if other not in FLOOR_OF:
            found.append(f"{file}:{line}: room {other} is not on the floor plan")
        elif FLOOR_OF[other] == FLOOR_OF[room]:
            found.append(f"{file}:{line}: {room} and {other} are rooms on one floor and must not import each other")
        elif FLOOR_OF[other] > FLOOR_OF[room]:
            found.append(f"{file}:{line}: {room} imports {other}, which is above it")
    return list(dict.fromkeys(found))


def test_every_import_goes_downwards_and_frameworks_stay_at_home() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    problems = [p for file in files for p in misplaced(file.read_text(), file.relative_to(PACKAGE).as_posix())]
    assert not problems, "\n" + "\n".join(problems)


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
            found += [(alias.name, node.lineno) for alias in node.names if alias.name.startswith("torch.cuda")]
    return found


def test_nobody_asks_whether_the_machine_has_a_gpu() -> None:
    named = {file.relative_to(PACKAGE).as_posix(): names_cuda(file.read_text()) for file in PACKAGE.rglob("*.py")}
    asking = [f"{file}:{line}" for file, uses in named.items() for name, line in uses if name in ("is_available", "is_initialized")]
    assert not asking, f"they ask about the machine, not about the device they compute on: {asking}"
    assert {file for file, uses in named.items() if uses} == set(CUDA)


@pytest.mark.parametrize(
    "source",
    ["import torch\ntorch.cuda.is_available()", "from torch.cuda import is_available", "from torch import cuda", "import torch.cuda as gpu"],
)
def test_the_check_sees_cuda_by_any_name(source: str) -> None:
    assert names_cuda(source)


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("data/tokenize.py", "from orchestrator.models.load import load", "one floor"),
        ("data/tokenize.py", "def f():\n    from orchestrator.controllers import offline", "above it"),
        ("data/tokenize.py", "from orchestrator import plan", "above it"),
        ("data/tokenize.py", "from ..learner import engine", "above it"),
        ("data/tokenize.py", "from .. import cli", "above it"),
        ("observe/__init__.py", "from ..models import load", "one floor"),
        ("data/tokenize.py", "import ray.util", "ray may only"),
        ("learner/rank_learner.py", "import deepspeed", "deepspeed may only"),
        ("trainers/offline.py", "from wandb import init", "wandb may only"),
        ("attic/x.py", "import os", "not on the floor plan"),
    ],
)
def test_the_check_sees_a_wrong_import(file: str, source: str, reason: str) -> None:
    (problem,) = misplaced(source, file)
    assert reason in problem


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/micro_batches.py", "from orchestrator.data.packing import pack"),
        ("observe/report.py", "from orchestrator.run.checkpoints import read"),
        ("learner/engine.py", "def f():\n    import deepspeed.comm"),
        ("core/batches.py", "from orchestrator.core.errors import DataError"),
        ("data/tokenize.py", "from .rows import to_rows\nfrom orchestrator import __version__\nimport raylib"),
    ],
)
def test_the_check_passes_a_right_import(file: str, source: str) -> None:
    assert misplaced(source, file) == []


@pytest.mark.parametrize("module", ["errors", "config", "records", "roles", "faults", "recipe", "cli"])
def test_starting_up_loads_no_heavy_library(module: str) -> None:
    if not (PACKAGE / f"{module}.py").exists() and not (PACKAGE / module).is_dir():
        pytest.skip(f"orchestrator/{module} is not there")
    code = f"import sys, orchestrator.{module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
