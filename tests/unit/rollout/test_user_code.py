"""Reward files and environments do what Python files do; mistakes are errors before anything is placed."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import ConfigError, MissingInput, OrchestratorError
from orchestrator.core.user_code import load_module
from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.environment import load_environment
from orchestrator.rollout.rewards.component import RewardCall
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.rewards.sandbox import Confinement, Sandbox
from orchestrator.rollout.trial import try_user_code
from tests.unit.rollout.reward_cases import function

FILES = {
    "scored.py": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass "
    "Scored:\n    score: float\n"
    "def score(completions, **columns): return [Scored(len(c)).score for c in completions]\n",
    "pool.py": "from concurrent.futures import ProcessPoolExecutor\ndef one(text): return len(text)\n"
    "def pooled(completions, **columns):\n    with ProcessPoolExecutor(2) as pool: return "
    "list(pool.map(one, completions))\n",
    "folder/sibling.py": "import beside\ndef score(completions): return [beside.size(c) for c in "
    "completions]\n",
    "folder/beside.py": "def size(text): return len(text)\n",
    "pack/__init__.py": "",
    "pack/inner/__init__.py": "",
    "pack/inner/relative.py": "from ..tools import size\ndef score(completions): return [size(c) for c in "
    "completions]\n",
    "pack/tools.py": "def size(text): return len(text)\n",
    "bare/relative.py": "from .tools import size\ndef score(completions): return [size(c) for c in "
    "completions]\n",
    "bare/tools.py": "def size(text): return len(text)\n",
    "odd/json.py": "import json\ndef score(completions): return [len(c) for c in completions]\n",
    "two-words.py": "class Scorer:\n    @staticmethod\n    def score(completions): return [len(c) for c in "
    "completions]\n",
}
SCORES = (
    *(
        "scored.py:score",
        "pool.py:pooled",
        "folder/sibling.py:score",
        "pack/inner/relative.py:score",
        "pack.inner.relative:score",
    ),
    *("bare/relative.py:score", "two-words.py:Scorer.score"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the files; sys.modules is restored afterwards."""
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)
    yield tmp_path
    sys.modules.clear()
    sys.modules.update(modules)


def component(written: str, **options: Any) -> Rewards:
    return Rewards(functions=[function("mine", written, **options)])


@pytest.mark.parametrize("written", [SCORES[0], SCORES[1], SCORES[2], SCORES[5]])
def test_a_reward_file_may_do_what_a_python_file_does(folder: Path, written: str, tmp_path: Path) -> None:
    check_rewards(component(written))
    with Sandbox(
        function("mine", written), Confinement.of(Rewards(), {"PATH": "/usr/bin:/bin"}, tmp_path / "log")
    ) as sandbox:
        outcomes = sandbox.score(RewardCall(["p"] * 2, ["a", "bbb"], [[1], [2]], ["x", "y"]), 60)
    assert outcomes == [1.0, 3.0]


def test_a_file_with_the_name_of_a_module_takes_nothing_from_it(folder: Path) -> None:
    import json

    mine = load_module(str(folder / "odd" / "json.py"))
    assert mine.score(["ab"]) == [2] and sys.modules["json"] is json and load_module("odd/json.py") is mine
    assert sys.path.index(str(folder)) < sys.path.index(str(folder / "odd")), "the working folder comes first"


def test_environments_load_the_same_way(folder: Path) -> None:
    world = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport "
        "beside\n@dataclass\nclass World:\n"
    )
    world += (
        "    n: int = 0\n    def reset(self, row): return []\n    def step(self, text): return "
        "beside.size(text)\n"
    )
    (folder / "folder" / "world.py").write_text(world)
    assert load_environment("folder/world.py:World")().step("abc") == 3  # type: ignore[comparison-overlap]


# ---- a trial before anything is placed


GOOD_WORLD = "class World:\n    def reset(self, row): return []\n    def step(self, text): return None\n"


def test_what_works_passes_in_seconds(folder: Path) -> None:
    (folder / "world.py").write_text(GOOD_WORLD)
    started = time.monotonic()
    try_user_code(
        Rewards(functions=[function(f"f{i}", written) for i, written in enumerate(SCORES)]),
        "world.py:World",
        ["answer"],
    )
    assert time.monotonic() - started < 100
    try_user_code(component("exact_match"), None, ["answer"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package\ndef f(completions): ...", "No module named 'no_such_package'"),
        ("raise RuntimeError('needs a licence')\ndef f(completions): ...", "needs a licence"),
        ("f = 3", "is a int, not a function"),
        ("import sys\nsys.exit(4)\ndef f(completions): ...", "it called sys.exit(4)"),
        (
            "import os\nprint('bye')\nos._exit(4)\ndef f(completions): ...",
            "its process ended with exit code 4: bye",
        ),
        ("def f(completions, solution): ...", "needs solution, which it is not given"),
        (
            "import functools\ndef g(completions, label, verbose): ...\nf = functools.partial(g, verbose=1)",
            "needs label, which it is not given",
        ),
    ],
)
def test_a_function_that_cannot_work_is_an_error(folder: Path, source: str, reason: str) -> None:
    (folder / "bad.py").write_text(source + "\n")
    with pytest.raises(ConfigError) as caught:
        try_user_code(component("bad.py:f"), None, ["answer"])
    assert (
        reason in f"{caught.value.what} {caught.value.why}"
        and "bad.py:f" in caught.value.what
        and caught.value.fix
    )


def test_a_misspelt_argument_is_an_error_with_the_right_name(folder: Path) -> None:
    (folder / "bad.py").write_text("def f(completion, **columns): ...\n")
    with pytest.raises(ConfigError, match="needs completion") as caught:
        try_user_code(component("bad.py:f"), None, ["answer"])
    assert caught.value.fix.startswith("did you mean completions?")


@pytest.mark.parametrize(
    ("spec", "source", "reason"),
    [
        ("nofile.py:World", "", "no file nofile.py"),
        ("world.py:World", "import no_such_package\n" + GOOD_WORLD, "No module named 'no_such_package'"),
        ("world.py:Word", GOOD_WORLD, "no class Word with reset and step"),
        ("world.py:World", "def broken(:\n", "SyntaxError"),
        (
            "world.py:World",
            GOOD_WORLD.replace("self, text", "self, text, turn"),
            "step of world.py:World cannot be called",
        ),
        (
            "world.py:World",
            GOOD_WORLD + "    def __init__(self, url): ...\n",
            "the class of world.py:World cannot be called",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_an_error(
    folder: Path, spec: str, source: str, reason: str
) -> None:
    (folder / "world.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        try_user_code(Rewards(), spec, None)
    assert reason in f"{caught.value.what} {caught.value.why}"


def test_a_missing_column_that_the_checkers_need_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="exact_match needs the column answer") as caught:
        try_user_code(component("exact_match"), None, ["solution"])
    assert "solution" in caught.value.why and "data.columns.answer" in caught.value.fix


@pytest.mark.parametrize("name", ["trainer_state", "log_metric", "log_extra"])
@pytest.mark.parametrize("form", ["completions, {0}", "completions, *, {0}", "{0}, completions, **columns"])
def test_what_only_trls_trainers_give_is_refused_by_name(folder: Path, name: str, form: str) -> None:
    (folder / "trl_like.py").write_text(f"def f({form.format(name)}): return [1.0 for c in completions]\n")
    with pytest.raises(ConfigError, match=f"needs {name}, which only TRL's trainers give"):
        check_rewards(component("trl_like.py:f"))
    (folder / "trl_like.py").write_text(
        f"def f(completions, {name}=None, **columns): return [1.0 for c in completions]\n"
    )
    check_rewards(component("trl_like.py:f"))


def test_a_missing_file_is_missing_input(folder: Path) -> None:
    with pytest.raises(OrchestratorError) as caught:
        check_rewards(component("nofile.py:f"))
    assert isinstance(caught.value, MissingInput) and isinstance(function("mine", "x:y"), RewardFunction)
