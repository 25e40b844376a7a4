"""An optimizer step from recorded rollouts is the same under every cut, for each algorithm and normaliser."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.run.verify import TOLERANCE, Verification, cuts_to_try, run
from tests.running import shared_ray

pytestmark = pytest.mark.timeout(600)
SAMPLES, PROMPTS = 4, 12


def recipe(data: Path, algorithm: dict, workers: int = 2) -> Recipe:
    pairs = algorithm["name"] == "online_dpo"
    return Recipe.model_validate(
        {
            "model": {"tiny": {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2}},
            "data": {"train": str(data)},
            "algorithm": algorithm,
            "batch": {
                "effective": PROMPTS if pairs else PROMPTS * SAMPLES,
                "micro_batch": 4 if pairs else 4 * SAMPLES,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
            "learners": {"workers": workers, "cpus_per_worker": 0.5},
            "rollouts": {"prompts": PROMPTS, "samples": SAMPLES, "max_new_tokens": 24, "temperature": 0.9},
            "rewards": {"functions": [{"name": "exact", "function": "exact_match"}]},
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, path = random.Random(3), tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = (
        "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(2, 60))) + ">"
        for _ in range(5 * PROMPTS)
    )
    path.write_text("".join(json.dumps({"prompt": "p" + line, "answer": "x"}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[LearnerGroup]:
    with (
        shared_ray(tmp_path_factory.mktemp("shared")),
        LearnerGroup(recipe(data, {"name": "grpo"}).learners) as group,
    ):
        yield group


CASES = [
    *({"name": name} for name in ONLINE if name != "ppo"),
    *({"name": "grpo", "normaliser": normaliser} for normaliser in ("token", "constant")),
    {"name": "grpo", "kl": {"coefficient": 0.1}, "entropy_bonus": 0.01, "correction": {"kind": "sequence"}},
    {
        "name": "dapo",
        "kl": {"coefficient": 0.1, "estimator": "k2"},
        "clip": {"dual": 3.0},
        "correction": {"kind": "decoupled"},
    },
    {"name": "ppo", "normaliser": "sequence", "entropy_bonus": 0.01},
]


def label(case: dict) -> str:
    return "-".join(
        [
            case["name"],
            *(str(v) for k, v in case.items() if k == "normaliser"),
            *(["more"] if len(case) > 2 else []),
        ]
    )


@pytest.mark.parametrize("algorithm", CASES, ids=label)
def test_a_step_from_recorded_rollouts_is_independent_of_the_cut(
    two_workers: LearnerGroup, data: Path, algorithm: dict
) -> None:
    """2 workers x ZeRO 0-3 x every legal sync policy, each with the next of two micro-batch sizes x three
    layouts."""
    proof = Verification.of(recipe(data, algorithm), steps=3)
    baseline = proof.baseline()
    cuts = cuts_to_try(proof.planned, PROMPTS, "fp32", [2], everything=False)
    assert {c.zero_stage for c in cuts} == {0, 1, 2, 3} and {c.layout for c in cuts} == {
        "prefix_shared",
        "packed",
        "padded",
    }
    for cut in cuts:
        difference = baseline.difference(proof.under(cut, two_workers), cut)
        assert difference.within(TOLERANCE["fp32"]), difference


def test_a_critics_step_is_independent_of_the_cut(two_workers: LearnerGroup, data: Path) -> None:
    proof = Verification.of(recipe(data, {"name": "ppo"}), steps=3, role="critic")
    baseline = proof.baseline()
    for cut in cuts_to_try(proof.planned, PROMPTS, "fp32", [2], everything=False):
        difference = baseline.difference(proof.under(cut, two_workers), cut)
        assert difference.within(TOLERANCE["fp32"]), difference


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_every_cut_of_a_grpo_step_on_other_numbers_of_workers(
    two_workers: LearnerGroup, data: Path, workers: int
) -> None:
    """All micro-batch sizes and layouts on every engine. two_workers holds half of the CPUs, so these workers
    reserve little."""
    cfg = recipe(data, {"name": "grpo", "kl": {"coefficient": 0.05}}, workers)
    cfg = cfg.model_copy(update={"learners": cfg.learners.model_copy(update={"cpus_per_worker": 0.2})})
    differences = list(run(cfg, steps=3, workers=[workers], everything=True))
    assert len(differences) == 42 and all(d.within(TOLERANCE["fp32"]) for d in differences)


def test_a_wrong_normaliser_would_be_seen(two_workers: LearnerGroup, data: Path) -> None:
    """The proof can fail: a token mean instead of a mean of sequence means is far above the tolerance."""
    right, wrong = (
        Verification.of(recipe(data, {"name": "grpo", "normaliser": n}), steps=2)
        for n in ("sequence", "token")
    )
    (cut, *_) = cuts_to_try(right.planned, PROMPTS, "fp32", [2], everything=False)
    assert not right.baseline().difference(wrong.under(cut, two_workers), cut).within(TOLERANCE["fp32"])
