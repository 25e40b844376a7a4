"""Recipes: strict YAML, extends, overrides, pipelines, and errors that name the key and the line."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import ConfigError, Exit, MissingInput
from orchestrator.plan.sanity import rates_of
from orchestrator.recipe.files import builtin_recipes, find
from orchestrator.recipe.fingerprint import identity_of
from orchestrator.recipe.loading import dump, json_schema, load
from orchestrator.recipe.pipeline import references, resolve
from orchestrator.recipe.schema import AlgorithmConfig, Recipe

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = (
    "model: {tiny: {}}\ndata: {train: rows.jsonl}\nalgorithm: {name: dpo}\noptimizer: {learning_rate: 1e-5}\n"
)


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def one(path: Path, *overrides: str) -> Recipe:
    (stage,) = load(path, overrides).stages
    return stage.recipe


def refused(path: Path | str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value


def problems(error: ConfigError) -> list[str]:
    return [line.strip() for line in error.why.strip().splitlines()]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "minimal.yaml", MINIMAL)


# ---- YAML


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-5", 1e-5),
        ("1e5", 1e5),
        (".5e-3", 5e-4),
        ("5.E-3", 5e-3),
        ("+2.5e+1", 25.0),
        ("3", 3.0),
        ("0.1", 0.1),
        ("5e-7", 5e-7),
        ("010", 10.0),
    ],
)
def test_numbers_are_read_as_written(minimal: Path, text: str, number: float) -> None:
    assert one(minimal, f"optimizer.learning_rate={text}").optimizer.learning_rate == number


def test_a_whole_number_may_be_written_as_a_power_of_ten(minimal: Path) -> None:
    assert one(minimal, "run.max_steps=1e3").run.max_steps == 1000


@pytest.mark.parametrize(
    "text", ["off", "on", "yes", "no", "y", "1e-5x", "2024-01-01", "1:30", "1_000", "=", "1.2.3", "0b1", "NO"]
)
def test_what_yaml_1_1_reads_as_something_else_stays_text(minimal: Path, text: str) -> None:
    assert one(minimal, f"tracking.entity={text}").tracking.entity == text


def test_wandb_off(tmp_path: Path) -> None:
    assert one(write(tmp_path, "a.yaml", MINIMAL + "tracking: {wandb: off}\n")).tracking.wandb == "off"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True)])
def test_booleans(minimal: Path, text: str, value: bool) -> None:
    assert one(minimal, f"algorithm.wpo={text}").algorithm.wpo is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1}\nrun: {seed: 2}\n", ":2:1: the key 'run' is already set in line 1"),
        ("run:\n  seed: 1\n  name: a\n  seed: 2\n", ":4:3: the key 'seed' is already set in line 2"),
        ("data: {train: [{path: a, path: b}]}\n", ":1:26: the key 'path' is already set in line 1"),
        ("1: a\n", ":1:1: the key '1' is not text; quote it"),
        ("a: &x {b: 1}\nc: *x\n", ":2:4: aliases (*name)"),
        ("run: [1\n", ":2:1: expected ',' or ']', but got '<stream end>'"),
        ("a: !!python/object:os.system {}\n", ":1:4: could not determine a constructor"),
        ("run:\n\tseed: 1\n", ":2:1: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", ":2:1: but found another document"),
        ("", ": the file does not hold a recipe"),
        ("- 1\n", ": the file does not hold a recipe"),
        ("a: \x00\n", ": the text is not YAML"),
        ("a: " + "[" * 5000, ": the text is not YAML"),
    ],
)
def test_a_text_that_is_not_a_recipe_is_rejected_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    file = write(tmp_path, "bad.yaml", text)
    assert refused(file).what.startswith(f"{file}{message}")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"run: {name: \xe9}\n")
    what = refused(file).what
    assert what.startswith(f"{file}:") and what.endswith("byte 12")


# ---- one error for all problems


NAMES = [repr(name) for name in get_args(AlgorithmConfig.model_fields["name"].annotation)]


def test_every_problem_is_listed_with_key_value_and_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "bad.yaml",
        """run: {name: 5, sed: 3}
model: {}
learnrs: {}
learning_rate: 1
data:
  train: [{pth: x}, toy:sft]
  eval: 5
  max_bad_rows: -1
algorithm: {name: dpoo, loss: {sigmoid: true}, wpo: maybe}
batch: {micro_batch: x, effective: 0, memory_utilisation: 2}
optimizer: {betas: [1], eps: .inf}
learners: {workers: true, zero_stage: 4}
tracking:
""",
    )
    error = refused(file)
    assert error.exit_code == Exit.CONFIG
    assert error.what == f"{file}: 22 problems in the recipe"
    assert problems(error) == [
        f"run.name: must be text (got 5; {file}:1)",
        f"run.sed: unknown key, did you mean run.seed? ({file}:1)",
        f"model: set exactly one of model.path (a folder or hub name) and model.tiny ({file}:2)",
        f"data.train[0].path: required, but not set ({file}:6)",
        f"data.train[0].pth: unknown key, did you mean data.train[0].path? ({file}:6)",
        f"data.train[1]: must be a mapping of keys (got 'toy:sft'; {file}:6)",
        f"data.eval: must be text or a list (got 5; {file}:7)",
        f"data.max_bad_rows: must be at least 0 (got -1; {file}:8)",
        f"algorithm.name: must be {', '.join(NAMES[:-1])} or {NAMES[-1]} (got 'dpoo', did you mean dpo or "
        f"dapo?; {file}:9)",
        f"algorithm.loss.sigmoid: must be a number (got true; {file}:9)",
        f"algorithm.wpo: must be true or false (got 'maybe'; {file}:9)",
        f"batch.effective: must be at least 1 (got 0; {file}:10)",
        f"batch.micro_batch: must be 'auto' or a whole number (got 'x'; {file}:10)",
        f"batch.memory_utilisation: must be at most 1.0 (got 2; {file}:10)",
        f"optimizer.learning_rate: required, but not set ({file}:11)",
        f"optimizer.betas[1]: required, but not set ({file}:11)",
        f"optimizer.eps: must be a number (got inf, not finite; {file}:11)",
        f"learners.workers: must be a whole number or 'auto' (got true; {file}:12)",
        f"learners.zero_stage: must be 'auto', 0, 1, 2 or 3 (got 4; {file}:12)",
        f"tracking: must be a mapping of keys (got null; {file}:13)",
        f"learnrs: unknown key, did you mean learners? ({file}:3)",
        "learning_rate: unknown key, did you mean optimizer.learning_rate or critic.learning_rate? "
        f"({file}:4)",
    ]
    assert "pydantic" not in str(error).lower()


def test_a_missing_section_needs_no_line(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "model: {tiny: {}}\ndata: {train: x}\nalgorithm: {name: sft}\n")
    assert problems(refused(file)) == ["optimizer: required, but not set"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "learners.worker=2",
            "learners.worker: unknown key, did you mean learners.workers? (override `learners.worker=2`)",
        ),
        ("max_steps=2", "max_steps: unknown key, did you mean run.max_steps? (override `max_steps=2`)"),
        ("batch.effective=-8", "batch.effective: must be at least 1 (got -8; override `batch.effective=-8`)"),
        ("zzz.qqq=1", "zzz.qqq: unknown key (override `zzz.qqq=1`)"),
        (
            "optimiser.lr=1",
            "optimiser.lr: unknown key, did you mean optimizer.learning_rate? (override `optimiser.lr=1`)",
        ),
        (
            "bacth.efective=2",
            "bacth.efective: unknown key, did you mean batch.effective? (override `bacth.efective=2`)",
        ),
        (
            "optimiser.qqq=1",
            "optimiser.qqq: unknown key, did you mean optimizer? (override `optimiser.qqq=1`)",
        ),
    ],
)
def test_a_wrong_override_is_named(minimal: Path, override: str, problem: str) -> None:
    assert problems(refused(minimal, override)) == [problem]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.effective", "key=value"),
        ("=3", "key=value"),
        ("data.train[0].path=x", "key=value"),
        ("algorithm.name.x=1", "algorithm.name is 'dpo', which has no keys"),
        ("data.eval.0.path=x", "data.eval is a list"),
        ("sft:run.seed=1", "minimal.yaml is not a pipeline"),
        ("algorithm.loss={a: 1, a: 2}", "the key 'a' is already set in line 1"),
    ],
)
def test_an_override_that_cannot_be_set(tmp_path: Path, override: str, message: str) -> None:
    file = write(
        tmp_path,
        "minimal.yaml",
        MINIMAL.replace("train: rows.jsonl", "train: rows.jsonl, eval: [{path: e.jsonl}]"),
    )
    error = refused(file, override)
    assert override in error.what and message in error.what


# ---- overrides


def test_overrides_are_typed_and_make_missing_sections(minimal: Path) -> None:
    recipe = one(
        minimal,
        "algorithm.loss={sigmoid: 0.8, sft: 1}",
        "algorithm.loss.sigmoid=0.7",
        "data.train=[{path: toy:sft, weight: 0.5}]",
        "data.eval=toy:sft",
        "evaluation.generate.max_new_tokens=8",
        "model.lora.rank=4",
        "run.name=a",
        "run.name=b",
        "optimizer.max_grad_norm=null",
    )
    assert recipe.algorithm.loss == {"sigmoid": 0.7, "sft": 1.0}
    assert isinstance(recipe.data.train, list) and recipe.data.train[0].weight == 0.5
    assert recipe.evaluation.generate is not None and recipe.evaluation.generate.max_new_tokens == 8
    assert recipe.model.lora is not None and recipe.model.lora.rank == 4
    assert (recipe.run.name, recipe.optimizer.max_grad_norm) == ("b", None)


def test_a_value_may_hold_equal_signs_and_colons(minimal: Path) -> None:
    assert one(minimal, "data.train=C:/a=b.jsonl").data.train == "C:/a=b.jsonl"


def test_setting_a_path_takes_the_place_of_the_tiny_model_and_back(tmp_path: Path, minimal: Path) -> None:
    model = one(minimal, "model.path=org/name", "model.revision=abc").model
    assert (model.path, model.revision, model.tiny) == ("org/name", "abc", None)
    pathed = write(tmp_path, "p.yaml", MINIMAL.replace("{tiny: {}}", "{path: org/name, revision: abc}"))
    model = one(pathed, "model.tiny.layers=3").model
    assert (model.path, model.revision) == (None, None) and model.tiny is not None and model.tiny.layers == 3
    model = one(pathed, "model.path=org/other", "model.trust_remote_code=false").model
    assert (model.path, model.revision) == ("org/other", None), (
        "a revision belongs to the path it was written for"
    )
    assert one(pathed, "model.path=org/name").model.revision == "abc"
    assert one(minimal, "model.tiny=null", "model.path=x").model.tiny is None
    assert "exactly one" in problems(refused(minimal, "model.tiny=null"))[0]
    assert "exactly one" in problems(refused(pathed, "model.path=x", "model.tiny={}"))[0]


# ---- extends


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.yaml", MINIMAL + "batch: {effective: 8}\nrun: {seed: 3, name: base}\n")
    middle = (
        "extends: ../base.yaml\nalgorithm: {loss: {sigmoid: 1, sft: 1}}\nmodel: {tiny: {layers: "
        "3}}\noptimizer: {max_grad_norm: null}\n"
    )
    write(tmp_path / "sub", "middle.yaml", middle)
    top = write(
        tmp_path,
        "top.yaml",
        "extends: sub/middle.yaml\nrun: {name: top}\nalgorithm: {loss: {hinge: 1}}\nmodel: {tiny: {heads: "
        "2}}\n",
    )
    recipe = one(top)
    assert (recipe.run.name, recipe.run.seed, recipe.batch.effective, recipe.optimizer.max_grad_norm) == (
        "top",
        3,
        8,
        None,
    )
    assert recipe.algorithm.loss == {"hinge": 1.0}, (
        "a loss mix is one value: keys of the base must not leak into it"
    )
    assert recipe.model.tiny is not None and (recipe.model.tiny.layers, recipe.model.tiny.heads) == (3, 2)


def test_a_problem_names_the_file_that_holds_it(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL + "batch: {efective: 8}\n")
    top = write(tmp_path, "top.yaml", "extends: base.yaml\n\nrun: {seed: -1}\n")
    assert problems(refused(top)) == [
        f"run.seed: must be at least 0 (got -1; {top}:3)",
        f"batch.efective: unknown key, did you mean batch.effective? ({base}:5)",
    ]


def test_extends_in_a_circle(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "run: {}\nextends: a.yaml\n")
    error = refused(file)
    assert error.what.startswith(f"{tmp_path / 'b.yaml'}:2: extends: ")
    assert error.why == "a.yaml -> b.yaml -> a.yaml"
    assert "circle" in refused(write(tmp_path, "self.yaml", "extends: self.yaml\n")).what


def test_extends_a_file_that_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    file = write(tmp_path, "mine.yaml", "extends: bsae.yaml\n")
    with pytest.raises(MissingInput) as caught:
        load(file)
    assert caught.value.what.startswith(f"{file}:1: extends: file {tmp_path / 'bsae.yaml'}")
    assert caught.value.fix == f"did you mean {tmp_path / 'base.yaml'}?"


@pytest.mark.parametrize(
    ("target", "message"), [("[a.yaml]", "got ['a.yaml']"), ("pipe.yaml", "is a pipeline")]
)
def test_extends_something_else(tmp_path: Path, target: str, message: str) -> None:
    write(tmp_path, "pipe.yaml", "pipeline: []\n")
    assert message in refused(write(tmp_path, "a.yaml", f"extends: {target}\n")).what


# ---- pipelines


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    write(tmp_path, "base.yaml", MINIMAL)
    text = (
        "pipeline:\n- {name: sft, extends: base.yaml, algorithm: {name: sft}}\n- {name: dpo, extends: "
        "base.yaml, model: {path: stage:sft}}\n"
    )
    return write(tmp_path, "pipe.yaml", text)


def test_a_pipeline_is_its_stages_in_order(pipeline: Path) -> None:
    loaded = load(pipeline, ["batch.effective=8", "dpo:batch.effective=16", "sft:run.seed=5"])
    assert loaded.path == pipeline
    found = [
        (s.name, s.recipe.algorithm.name, s.recipe.batch.effective, s.recipe.run.seed) for s in loaded.stages
    ]
    assert found == [("sft", "sft", 8, 5), ("dpo", "dpo", 16, 0)]
    assert loaded.stages[1].recipe.model.path == "stage:sft" and loaded.stages[1].recipe.model.tiny is None


def test_a_model_for_all_stages_does_not_break_the_chain(pipeline: Path) -> None:
    first, second = load(pipeline, ["model.tiny.hidden_size=32", "model.lora.rank=2"]).stages
    assert first.recipe.model.tiny is not None and first.recipe.model.tiny.hidden_size == 32
    assert second.recipe.model.path == "stage:sft" and second.recipe.model.lora is not None
    assert load(pipeline, ["dpo:model.path=org/x"]).stages[1].recipe.model.path == "org/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline: []\n", "pipeline: must be a list of recipes"),
        ("pipeline:\n- {extends: base.yaml}\n", ":2: a stage is a mapping with a name"),
        ("pipeline:\n- sft\n", ":2: a stage is a mapping with a name"),
        ("pipeline:\n- {name: a b, extends: base.yaml}\n", ":2: a stage is a mapping with a name"),
        (
            "pipeline:\n- {name: a, extends: base.yaml}\n- {name: a, extends: base.yaml}\n",
            ":3: two stages are named a",
        ),
        (
            "run: {seed: 1}\npipeline:\n- {name: a, extends: base.yaml}\n",
            ":1: run: ",
        ),
        (
            "pipeline:\n- {name: a, extends: base.yaml, model: {path: stage:b}}\n- {name: b}\n",
            "stage a: model.path: stage:b is not",
        ),
        (
            "pipeline:\n- {name: a, extends: base.yaml, model: {path: stage:a}}\n",
            "stage a: model.path: stage:a is not",
        ),
        (
            "pipeline:\n- {name: a, extends: base.yaml}\n- {name: b, extends: base.yaml, rum: {}}\n",
            "stage b: 1 problem in the recipe",
        ),
    ],
)
def test_a_pipeline_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    assert message in refused(write(tmp_path, "pipe.yaml", text)).what


RLHF = """pipeline:
- {name: sft, extends: base.yaml, algorithm: {name: sft}}
- {name: reward, extends: base.yaml, model: {path: stage:sft}, algorithm: {name: reward}}
- name: ppo
  extends: base.yaml
  algorithm: {name: ppo, kl: {coefficient: 0.1}}
  model: {path: stage:sft, reference: stage:sft}
  critic: {model: {path: stage:reward}}
  rewards: {functions: [{name: mine, function: exact_match}, {name: learned, model: stage:reward}]}
"""


def test_every_place_that_takes_a_model_takes_a_stage(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    *_, ppo = load(write(tmp_path, "rlhf.yaml", RLHF)).stages
    places = {
        "model.path": "sft",
        "model.reference": "sft",
        "critic.model.path": "reward",
        "rewards.functions[1].model": "reward",
    }
    assert references(ppo.recipe) == places
    made = resolve(ppo.recipe, {"sft": Path("/run/sft/export"), "reward": Path("/run/reward/export")})
    assert references(made) == {}
    assert (made.model.path, made.model.reference) == ("/run/sft/export", "/run/sft/export")
    assert (
        made.critic.model is not None
        and made.critic.model.path == made.rewards.functions[1].model == "/run/reward/export"
    )
    assert (
        made.rewards.functions[0] == ppo.recipe.rewards.functions[0]
        and made.algorithm == ppo.recipe.algorithm
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "model: stage:reward}]",
            "model: stage:sft}]",
            "rewards.functions[1].model: stage sft does not train",
        ),
        ("path: stage:sft, ref", "path: stage:reward, ref", "model.path: stage reward trains a reward model"),
        (
            "reference: stage:sft",
            "reference: stage:reward",
            "model.reference: stage reward trains a reward model",
        ),
        (
            "model: stage:reward}]",
            "model: stage:rewrad}]",
            "rewards.functions[1].model: stage:rewrad is not",
        ),
        ("{path: stage:reward}", "{path: stage:ppo}", "critic.model.path: stage:ppo is not"),
    ],
)
def test_a_stage_that_cannot_be_what_a_key_needs(tmp_path: Path, old: str, new: str, message: str) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    assert old in RLHF
    assert message in refused(write(tmp_path, "rlhf.yaml", RLHF.replace(old, new))).what


def test_problems_of_a_stage_name_the_line_in_the_pipeline(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    file = write(tmp_path, "pipe.yaml", "pipeline:\n- name: a\n  extends: base.yaml\n  run:\n    sed: 1\n")
    assert problems(refused(file)) == [f"run.sed: unknown key, did you mean run.seed? ({file}:5)"]


def test_an_override_for_no_stage(pipeline: Path) -> None:
    error = refused(pipeline, "ppo:run.seed=1")
    assert "`ppo:run.seed=1`" in error.what and error.fix.endswith("sft, dpo")


def test_a_plain_recipe_cannot_start_from_a_stage(minimal: Path) -> None:
    assert "model.path: stage:sft" in refused(minimal, "model.path=stage:sft").what


# ---- files and built-in recipes


def test_shipped_recipes_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # names must not depend on the folder
    shipped = builtin_recipes()
    assert list(shipped) == [
        *("dpo/llama-3-8b", "dpo/qwen2.5-0.5b", "grpo/qwen2.5-1.5b-gsm8k"),
        *("start/dpo", "start/grpo", "start/lora-dpo", "start/reward", "start/sft"),
        *("tiny/demo", "tiny/dpo", "tiny/grpo", "tiny/grpo_tool", "tiny/kto"),
        *("tiny/online_dpo", "tiny/ppo", "tiny/reward", "tiny/rlhf", "tiny/rloo", "tiny/sft"),
    ]
    for name in shipped:
        first = shipped[name].read_text().splitlines()[0]
        assert first.startswith("# Random-weight toy: ") == name.startswith("tiny/")
        for stage in load(
            name, ["model.path=mine", "data.train=mine.jsonl"] if name.startswith("start/") else ()
        ).stages:
            recipe = stage.recipe
            if name.startswith("tiny/"):
                assert (recipe.learners.precision, recipe.tracking.wandb) == ("fp32", "offline")
                assert recipe.learners.workers == (
                    1 if recipe.algorithm.name == "ppo" else 2
                )  # the critic is the second learner
                assert 32 <= recipe.batch.effective <= 256 and recipe.checkpoint.every is not None
                assert isinstance(recipe.data.train, str) and recipe.data.train.startswith("toy:")
            elif name.startswith("start/"):
                assert (
                    recipe.learners.workers,
                    recipe.learners.gpus_per_worker,
                    recipe.learners.precision,
                ) == ("auto",) * 3
                assert (
                    recipe.batch.micro_batch == recipe.batch.layout == "auto"
                    and 32 <= recipe.batch.effective <= 64
                )
                usual = rates_of(recipe)
                assert usual.low <= recipe.optimizer.learning_rate <= usual.high
            else:
                assert (
                    256 <= recipe.batch.effective <= 512
                    and recipe.model.revision is not None
                    and not recipe.model.trust_remote_code
                )


def test_the_demo_starts_dpo_from_sft() -> None:
    sft, dpo = load("tiny/demo").stages
    assert (sft.name, dpo.name, dpo.recipe.model.path) == ("sft", "dpo", "stage:sft")
    assert sft.recipe.model.tiny is not None and dpo.recipe.model.tiny is None


def test_a_recipe_is_found_by_path_or_name(minimal: Path) -> None:
    assert find(minimal) == find(str(minimal)) == minimal
    assert find("tiny/dpo") == find("tiny/dpo.yaml") == ROOT / "recipes" / "tiny" / "dpo.yaml"
    assert load("tiny/dpo").stages[0].name == "tiny-dpo"


@pytest.mark.parametrize(
    ("name", "fix"), [("tiny/dppo", "tiny/dpo"), ("recipes/tiny/sfft", "tiny/sft"), ("zzzzzz", "recipes ls")]
)
def test_a_missing_recipe_suggests_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInput) as caught:
        load(name)
    assert name in caught.value.what and fix in caught.value.fix


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="folder"):
        load(tmp_path)


# ---- what is recorded


def test_fingerprint_holds_what_decides_the_result_and_nothing_else(minimal: Path) -> None:
    def of(*overrides: str, data: str = "d", tokenizer: str = "t") -> str:
        return identity_of(
            one(minimal, "data.eval=held-out.jsonl", *overrides), data, tokenizer=tokenizer
        ).fingerprint

    same = [
        *(
            "run.name=x",
            "learners.workers=4",
            "learners.zero_stage=3",
            "learners.sync=per_micro_batch",
            "batch.micro_batch=2",
        ),
        *(
            "batch.layout=padded",
            "checkpoint.every=3",
            "evaluation.every=3",
            "tracking.wandb=off",
            "learners.activation_checkpointing=full",
        ),
        *("run.max_steps=3", "run.epochs=2"),  # where a run ends is compared apart
        *(
            "data.eval=null",
            "data.max_bad_rows=3",
            "export.dtype=bf16",
            "checkpoint.final=weights",
            "evaluation.at_start=false",
        ),
    ]
    other = [
        *("run.seed=1", "model.tiny.layers=3", "data.max_length=9", "algorithm.beta=0.2"),
        *("batch.effective=8", "optimizer.weight_decay=0.1", "learners.precision=bf16"),
    ]
    assert {of(s) for s in same} == {of()}
    different = [of(), *(of(o) for o in other), of(data="x"), of(tokenizer="x")]
    assert len(set(different)) == len(different)
    assert len(of()) == 64


def test_json_schema_knows_every_section_and_refuses_other_keys() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"extends", *Recipe.model_fields}
    assert schema["additionalProperties"] is False
    json.dumps(schema)


# ---- properties

tricky = st.sampled_from(["off", "1e5", "0E0", "null", "~", "0x1", "- a", "a: b", " x", "#"])
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30) | tricky
tiny = st.fixed_dictionaries(
    {"tiny": st.fixed_dictionaries({}, optional={"layers": st.integers(1, 9), "architecture": texts})}
)
betas = st.lists(st.floats(0, 1), min_size=2, max_size=2)
positive = st.floats(1e-12, 1e12)


def trees() -> st.SearchStrategy[dict[str, Any]]:
    """Recipes as the mapping a file would hold."""
    source = st.fixed_dictionaries(
        {"path": texts},
        optional={"weight": positive, "max_rows": st.none() | st.integers(1, 99), "revision": texts},
    )
    data = texts | st.lists(source, min_size=1, max_size=3)
    model = st.fixed_dictionaries(
        {"path": texts.filter(lambda t: not t.startswith("stage:"))},
        optional={"revision": texts, "chat_template": texts},
    )
    return st.fixed_dictionaries(
        {
            "model": model | tiny,
            "data": st.fixed_dictionaries(
                {"train": data}, optional={"eval": st.none() | data, "append_eos": st.booleans()}
            ),
            "algorithm": st.fixed_dictionaries(
                {"name": st.sampled_from(["sft", "dpo", "kto"])},
                optional={"beta": positive, "loss": texts | st.dictionaries(texts, positive, max_size=3)},
            ),
            "optimizer": st.fixed_dictionaries(
                {"learning_rate": positive}, optional={"betas": betas, "max_grad_norm": st.none() | positive}
            ),
        },
        optional={
            "run": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**40), "epochs": positive}),
            "batch": st.fixed_dictionaries(
                {},
                optional={
                    "effective": st.integers(1, 4096),
                    "micro_batch": st.just("auto") | st.integers(1, 64),
                },
            ),
            "tracking": st.fixed_dictionaries(
                {},
                optional={
                    "wandb": st.sampled_from(["off", "offline", "online"]),
                    "entity": st.none() | texts,
                },
            ),
        },
    )


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        section = isinstance(value, dict) and key != "loss"
        found += leaves(value, f"{prefix}{key}.") if section else [(prefix + key, value)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@settings(max_examples=40)
@given(tree=trees())
def test_dump_and_load_give_the_same_recipe(folder: Path, tree: dict[str, Any]) -> None:
    read = of_tree(write(folder, "extended.yaml", json.dumps(tree, ensure_ascii=False)))
    assert one(write(folder, "dumped.yaml", dump(Recipe.model_validate(tree)))) == read, (
        "what the run reads, and nothing else"
    )
    assert one(write(folder, "again.yaml", dump(read))) == read


def of_tree(file: Path) -> Recipe:
    """The recipe of a file that extends the tree's: what of it is not read is left out."""
    return one(write(file.parent, "top.yaml", f"extends: {file.name}\n"))


@settings(max_examples=40)
@given(tree=trees(), edits=trees())
def test_overrides_equal_editing_the_file(folder: Path, tree: dict[str, Any], edits: dict[str, Any]) -> None:
    edits = {
        k: v for k, v in edits.items() if k != "model"
    }  # the swap of model.path and model.tiny has its own test
    tree, edits = json.loads(json.dumps([tree, edits]))
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in leaves(edits)]
    edited = {**tree, **{k: {**tree.get(k, {}), **v} for k, v in edits.items()}}
    before = write(folder, "before.yaml", json.dumps(tree, ensure_ascii=False))
    after = write(folder, "after.yaml", json.dumps(edited, ensure_ascii=False))
    assert outcome(before, *overrides) == outcome(after)


def outcome(file: Path, *overrides: str) -> Recipe | list[str]:
    """The recipe, or the keys of which nothing reads what was written."""
    try:
        return one(file, *overrides)
    except ConfigError as error:
        assert "that this run does not read" in error.what
        return sorted(problem.split(":")[0] for problem in problems(error))


@settings(max_examples=40)
@given(tree=trees(), data=st.data())
def test_a_repeated_key_is_always_refused(folder: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    numbers = count()
    once = json_with_a_key_twice(tree, -1, numbers)
    assert json.loads(once) == tree
    repeated = data.draw(st.integers(0, next(numbers) - 1))
    twice = json_with_a_key_twice(tree, repeated, count())
    assert "is already set in line 1" in refused(write(folder, "twice.yaml", twice)).what


def json_with_a_key_twice(value: Any, repeated: int, numbers: Iterator[int]) -> str:
    """The value as JSON, in which the key with number `repeated` (counted by `numbers`) stands twice."""
    if isinstance(value, list):
        return f"[{', '.join(json_with_a_key_twice(v, repeated, numbers) for v in value)}]"
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    pairs: list[str] = []
    for key, inner in value.items():
        times = 2 if next(numbers) == repeated else 1
        pairs += [
            f"{json.dumps(key, ensure_ascii=False)}: {json_with_a_key_twice(inner, repeated, numbers)}"
        ] * times
    return f"{{{', '.join(pairs)}}}"
