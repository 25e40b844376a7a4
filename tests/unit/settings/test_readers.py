"""The table of readers agrees with the code, and keys without a reader are rejected or listed."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.algorithms.losses.preference_mix import PAIR_LOSSES
from orchestrator.algorithms.table import DEFAULTS, ONLINE_ROWS, build
from orchestrator.core.errors import ConfigError
from orchestrator.models.load import load_config
from orchestrator.recipe.keys import DEFAULT_LOSS, LOSSES, READERS, has_reference, samples_dynamically
from orchestrator.recipe.loading import dump, load
from orchestrator.recipe.pipeline import IgnoredKey
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Model, Recipe
from tests.unit.settings import observe as o
from tests.unit.settings.contexts import BASE

NAMES = tuple(AlgorithmConfig.model_fields["name"].annotation.__args__)  # pyright: ignore[reportOptionalMemberAccess]
NAMES = tuple(name for group in NAMES for name in getattr(group, "__args__", (group,)))


def recipe(**algorithm: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"train": "x"},
            "optimizer": {"learning_rate": 1},
            "algorithm": {"name": "dpo", **algorithm},
        }
    )


def changes(base: dict[str, Any], change: dict[str, Any], see: Any) -> bool:
    return see(recipe(**base)) != see(recipe(**{**base, **change}))


LOSS_KEYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "label_smoothing": (0.2, {"label_smoothing": 0.1}),
    "f_divergence": ("js", {}),
    "ipo_length_average": (False, {}),
    "simpo_gamma": (3.0, {}),
    "discopop_tau": (2.0, {}),
}


@pytest.mark.parametrize("loss", [name for name in PAIR_LOSSES if name != "sft"])
@pytest.mark.parametrize("knob", LOSS_KEYS)
def test_a_loss_reads_what_the_table_says(loss: str, knob: str) -> None:
    value, beside = LOSS_KEYS[knob]
    base = {"loss": loss, "label_smoothing": 0.1, **beside}
    if knob == "f_divergence" and loss in ("simpo", "cpo", "orpo"):
        with pytest.raises(ConfigError):  # another error gives the reason
            o.loss(recipe(**base, f_divergence=value))
        return
    cfg = recipe(**base)
    assert READERS[AlgorithmConfig][knob].reads(cfg, cfg.algorithm) == changes(base, {knob: value}, o.loss)


def test_the_tables_of_losses_are_one() -> None:
    assert set(PAIR_LOSSES) == LOSSES
    assert {name: tuple(terms) for name, terms in DEFAULTS.items()} == {
        name: terms for name, terms in DEFAULT_LOSS.items() if name in DEFAULTS
    }


POLICY_KEYS: dict[str, dict[str, Any]] = {
    "clip.low": {"clip": {"low": 0.01}},
    "clip.high": {"clip": {"high": 0.01}},
    "clip.dual": {"clip": {"dual": 1.01}},
    "entropy_bonus": {"entropy_bonus": 0.5},
    "kl.coefficient": {"kl": {"coefficient": 0.5}},
    "correction.cap": {"correction": {"cap": 1.01}},
    "correction.kind": {"correction": {"kind": "none"}},
    "gamma": {"gamma": 0.5},
    "gae_lambda": {"gae_lambda": 0.1},
    "whiten": {"whiten": False},
    "scale_by_std": {"scale_by_std": True},
}


@pytest.mark.parametrize("name", ONLINE_ROWS)
@pytest.mark.parametrize("knob", POLICY_KEYS)
def test_an_online_algorithm_reads_what_the_table_says(name: str, knob: str) -> None:
    def seen(cfg: Recipe) -> tuple[float, list[float], list[float]]:
        unscaled = (
            cfg
            if knob != "scale_by_std"
            else cfg.model_copy(
                update={"algorithm": cfg.algorithm.model_copy(update={"scale_by_std": False})}
            )
        )
        return o.loss(cfg), o.advantages(cfg), o.advantages(unscaled)

    cfg, holder = recipe(name=name), recipe(name=name).algorithm
    section, _, key = knob.rpartition(".")
    holder = getattr(cfg.algorithm, section) if section else cfg.algorithm
    if knob == "scale_by_std":
        changed = o.advantages(recipe(name=name, scale_by_std=True)) != o.advantages(
            recipe(name=name, scale_by_std=False)
        )
    else:
        changed = changes({"name": name}, POLICY_KEYS[knob], seen)
    assert READERS[type(holder)][key].reads(cfg, holder) == changed


@pytest.mark.parametrize("name", NAMES)
def test_what_an_algorithm_is_by_the_table_it_is_by_the_code(name: str) -> None:
    for kl in (0.0, 0.1):
        cfg = recipe(name=name, kl={"coefficient": kl})
        built = build(cfg.algorithm, cfg.rollouts)
        assert has_reference(cfg) == built.needs_reference
        assert (name in ONLINE) == (built.online is not None)
        assert samples_dynamically(cfg) == (built.online is not None and built.online.dynamic_sampling)


# ---- keys without a reader


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(
        BASE.replace("sft", "dpo") + "run: {epochs: 2}\ncritic: {export: true}\n"
    )
    file = tmp_path / "own.yaml"
    file.write_text(
        "extends: base.yaml\nalgorithm: {beta: 0.2, gamma: 0.5}\nrollouts:\n  temperature: 0.5\n  top_p: "
        "0.9\n"
    )
    return file


def problems(error: ConfigError) -> list[str]:
    return [line.strip() for line in error.why.splitlines() if line.strip()]


def test_every_useless_key_is_named_with_its_reader_and_its_line_in_one_error(own: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(own, ["rewards.retries=1"])
    assert refused.value.what == f"{own}: 3 keys are set that this run does not read"
    assert problems(refused.value) == [
        f"algorithm.gamma: is read only by ppo; this recipe is dpo ({own}:2)",
        f"rollouts: is read only by algorithms that learn from rollouts; this recipe is dpo ({own}:3)",
        "rewards.retries: is read only by algorithms that learn from rollouts; this recipe is dpo (override "
        "`rewards.retries=1`)",
    ]


def test_what_is_inherited_or_useless_by_a_change_is_listed_and_has_its_default(own: Path) -> None:
    own.write_text(
        "extends: base.yaml\nrun: {epochs: 3}\ntracking: {project: mine}\nrollouts: {}\nrewards: "
        "{functions: []}\n"
    )
    (stage,) = load(own, ["run.max_steps=2", "tracking.wandb=off"]).stages
    assert stage.ignored == (
        IgnoredKey("run.epochs", f"{own}:2", "not read because of override `run.max_steps=2`"),
        IgnoredKey("critic.export", f"{own.parent / 'base.yaml'}:6", "read only by ppo"),
        IgnoredKey("tracking.project", f"{own}:3", "not read because of override `tracking.wandb=off`"),
    )
    recipe = stage.recipe
    assert (recipe.run.epochs, recipe.tracking.project, recipe.critic.export) == (1.0, "orchestrator", False)
    assert not any(word in dump(recipe) for word in ("critic", "rollouts", "epochs", "project"))
    with pytest.raises(ConfigError, match="1 key is set"):
        load(own, ["tracking.wandb=off", "tracking.project=x"])


def test_another_algorithm_excuses_nothing(own: Path) -> None:
    own.write_text("extends: base.yaml\nalgorithm: {beta: 0.2}\n")
    with pytest.raises(ConfigError) as refused:
        load(own, ["algorithm.name=grpo"])
    assert problems(refused.value)[0].startswith("algorithm.beta: is read only by kto, dpo")


def test_a_change_for_all_stages_is_made_where_it_is_read_and_refused_where_nobody_reads_it() -> None:
    sft, grpo = load("tiny/grpo", ["rollouts.temperature=0.5", "evaluation.max_examples=3"]).stages
    assert (sft.recipe.rollouts.temperature, grpo.recipe.rollouts.temperature) == (1.0, 0.5)
    assert (sft.recipe.evaluation.max_examples, grpo.recipe.evaluation.max_examples) == (3, None)
    assert not sft.ignored and not grpo.ignored
    with pytest.raises(ConfigError, match=r"no stage reads critic\.export"):
        load("tiny/grpo", ["critic.export=true"])
    with pytest.raises(ConfigError, match="stage sft: 1 key is set that this run does not read"):
        load("tiny/grpo", ["sft:rollouts.temperature=0.5"])
    with pytest.raises(ConfigError, match=r"no stage reads rollouts\.max_turns"):
        load("tiny/grpo", ["rollouts={prompts: 32, samples: 8, max_turns: 3}"])


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [("gpt2", ("kv_heads", "intermediate_size")), ("llama", ()), ("bloom", ("kv_heads",))],
)
def test_a_size_that_an_architecture_does_not_have_is_refused(
    architecture: str, refused: tuple[str, ...]
) -> None:
    for key in ("kv_heads", "intermediate_size"):
        model = Model.model_validate(
            {"tiny": {"architecture": architecture, key: 2 if key == "kv_heads" else 32}}
        )
        if key in refused:
            with pytest.raises(ConfigError, match=f"model.tiny.{key}: {architecture} does not read it"):
                load_config(model)
        elif architecture == "llama":
            load_config(model)


def test_options_of_rewards_stay_as_they_are_through_the_run_folder(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    options = "{strict: false, deep: [{yes: true, none: null}], nan: .nan, text: 'off', one: 1, half: 0.5}"
    file.write_text(
        BASE.replace("sft", "grpo")
        + f"rewards: {{functions: [{{name: a, function: m:f, options: {options}}}]}}\n"
    )
    recipe = load(file).stages[0].recipe
    assert repr(recipe.rewards.functions[0].options) == (
        "{'strict': False, 'deep': [{'yes': True, 'none': None}], 'nan': nan, 'text': 'off', 'one': 1, "
        "'half': 0.5}"
    )
    kept = tmp_path / "kept.yaml"
    kept.write_text(dump(recipe))
    assert repr(load(kept).stages[0].recipe.rewards.functions) == repr(recipe.rewards.functions)
