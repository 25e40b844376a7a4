"""Every key is used: two values of it are seen to do two things."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from orchestrator.core import hub
from orchestrator.models.load import load as load_model
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Model, TinyModel
from tests.running import REPOSITORY
from tests.unit.settings.contexts import BASE, NEVER_READ, context
from tests.unit.settings.exercises import EXERCISES, SNAPSHOTS, Elsewhere, Row, Unseen
from tests.unit.settings.runs import RUNS
from tests.unit.settings.schema import Leaf, leaves, legal

LEAVES = {leaf.path: leaf for leaf in leaves() if leaf.path not in NEVER_READ}
JUDGE = """import os
def ones(completions): return [1.0] * len(completions)
def twos(completions): return [2.0] * len(completions)
def hoards(completions): return [float(len(bytearray(1 << 30)) > 0)] * len(completions)
def of_variable(completions): return [float(os.environ.get("JUDGE", 0))] * len(completions)
def optional(completions, strict, x):
    assert isinstance(strict, bool) and isinstance(x, (int, float)), (strict, x)
    return [(1.0 if strict else 0.0) + (x if x == x else 0.0)] * len(completions)
"""
REMOTE = """from transformers import PretrainedConfig
class Mine(PretrainedConfig):
    model_type = "mine"
    hidden_size = 5
"""
TALKS = """from orchestrator.rollout.episodes import Turn
class Talks:
    done = False
    def reset(self, row): return [{"role": "user", "content": "go"}]
    def step(self, completion): return Turn([{"role": "tool", "content": "on"}], done=self.done)
class Quiet(Talks):
    done = True
"""


def row(i: int, name: str) -> dict:
    talk = [{"role": "user", "content": f"{name}{i}?"}, {"role": "assistant", "content": "yes"}]
    return {
        **{
            "prompt": f"{name}{i}: ",
            "completion": "longer",
            "chosen": "good",
            "rejected": "bad",
            "label": i % 2 == 0,
            "margin": 0.5,
            "answer": "a",
        },
        **{"t1": [{"name": "one"}], "t2": [{"name": "two"}], "k1": {"mood": "good"}, "k2": {"mood": "bad"}},
        **{
            "p1": "first: ",
            "p2": "second: ",
            "c1": "one",
            "c2": "two",
            "l1": True,
            "l2": False,
            "m1": 1,
            "m2": 2.0,
        },
        **{
            "talk": talk,
            "talk2": [*talk, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "no"}],
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the rows of the table name."""
    folder = tmp_path_factory.mktemp("exercise")
    (folder / "base.yaml").write_text(BASE)
    for name in ("rows", "other", "held"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i, name)) + "\n" for i in range(6)))
    (folder / "bad.jsonl").write_text((folder / "rows.jsonl").read_text() + "{\n")
    (folder / "texts.jsonl").write_text(json.dumps({"c1": "one text", "c2": "another"}) + "\n")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "talks.py").write_text(TALKS)
    for name in ("one", "two"):
        (folder / "sets" / name).mkdir(parents=True)
        (folder / "sets" / name / "train.jsonl").write_text(json.dumps(row(0, f"set {name}")) + "\n")
    inputs = (
        "{{ tools }}{{ mood }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration "
        "%}{% endfor %}"
    )
    for name, text in (("one", "{{ 1 }}"), ("two", "{{ 2 }}"), ("inputs", inputs)):
        (folder / f"{name}.jinja").write_text(text)
    (folder / "remote").mkdir()
    (folder / "remote" / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})
    )
    (folder / "remote" / "mine.py").write_text(REMOTE)
    for size, commit in zip((16, 32), SNAPSHOTS, strict=True):
        (snapshot := folder / "hub" / "models--org--name" / "snapshots" / commit).mkdir(parents=True)
        (snapshot / "config.json").write_text(
            json.dumps({"model_type": "llama", "hidden_size": size, "num_attention_heads": 4})
        )
    for name, size in (("small", 16), ("large", 32)):
        cfg = Model(tiny=TinyModel(hidden_size=size, layers=1, heads=2))
        load_model(cfg, seed=0, head="lm").model.save_pretrained(folder / name)
        load_tokenizer(cfg).save_pretrained(folder / name)
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.hidden_size == size
    return folder


def overrides(leaf: Leaf, exercise: Row, value: str) -> list[str]:
    """The key's context, what the row gives, and the value: in the place of %s, or last."""
    given = [*context(leaf.path).read, *exercise.given]
    placed = [change for change in exercise.given if "%s" in change] or [
        change for change in given if "%s" in change
    ]
    others = [change for change in given if "%s" not in change]
    return [
        *others,
        *([placed[-1].replace("%s", f"{leaf.name}: {value}")] if placed else [f"{leaf.path}={value}"]),
    ]


ALONE = [path for path, exercise in EXERCISES.items() if isinstance(exercise, Row)]


@pytest.mark.parametrize("path", ALONE)
def test_two_values_do_two_things(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JUDGE", "7")
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(folder / "hub")
    )  # read from HF_HOME when it is imported
    monkeypatch.setattr(hub, "reachable", lambda: False)
    exercise, leaf = EXERCISES[path], LEAVES[path]
    assert isinstance(exercise, Row)
    seen = [
        exercise.see(load("base.yaml", overrides(leaf, exercise, value)).stages[0].recipe)
        for value in exercise.values
    ]
    if exercise.wanted is None:
        assert seen[0] != seen[1], f"{path}: {seen[0]} with both {' and '.join(exercise.values)}"
    else:
        assert seen == [
            pytest.approx(wanted) if isinstance(wanted, float | list) and _numbers(wanted) else wanted
            for wanted in exercise.wanted
        ]


def _numbers(value: object) -> bool:
    return isinstance(value, float) or (
        isinstance(value, list) and all(isinstance(item, float) for item in value)
    )


def test_every_key_has_a_row() -> None:
    wanted = {path for path, leaf in LEAVES.items() if legal(leaf)}
    assert not wanted - EXERCISES.keys() - RUNS.keys(), (
        "exercises.py, runs.py: what do two values of these keys change?"
    )
    assert EXERCISES.keys() | RUNS.keys() <= wanted and not EXERCISES.keys() & RUNS.keys()


def test_rows_that_no_test_can_see_are_few() -> None:
    """They ask a hub, and a test may not."""
    unseen = {path for path, exercise in EXERCISES.items() if isinstance(exercise, Unseen)}
    assert unseen == {"rewards.functions[].revision"}


@pytest.mark.parametrize(
    "path", [path for path, exercise in EXERCISES.items() if isinstance(exercise, Elsewhere)]
)
def test_a_row_that_points_elsewhere_points_at_a_test_that_sets_the_key(path: str) -> None:
    exercise = EXERCISES[path]
    assert isinstance(exercise, Elsewhere)
    file, _, name = exercise.test.partition("::")
    source = (REPOSITORY / file).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), exercise.test
    assert (exercise.says or path.split(".")[-1]) in source
