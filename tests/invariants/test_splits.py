"""An optimizer step is the same under every cut of the hardware.

Every cut runs on real Ray workers and DeepSpeed ranks and is compared with one process, one batch, plain
torch.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.core.batches import LossUnits
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.recipe.schema import Recipe
from orchestrator.run.verify import TOLERANCE, Difference, Verification, cuts_to_try, run
from tests.running import shared_ray

pytestmark = pytest.mark.timeout(600)
EFFECTIVE = 32


def write_rows(path: Path, count: int, *, equal_lengths: bool = False) -> None:
    """Rows that serve as SFT, preference and unpaired data. Their lengths differ much, so that padding,
    packing and balancing matter, or are all the same."""
    draw = random.Random(1)

    def text(low: int, high: int) -> str:
        size = high if equal_lengths else draw.randint(low, high)
        return "".join(draw.choice("abcdefgh ") for _ in range(size))

    with path.open("w") as file:
        for i in range(count):
            pair = {"prompt": "p" + text(1, 40), "chosen": "c" + text(1, 30), "rejected": "r" + text(1, 30)}
            file.write(json.dumps({**pair, "completion": pair["chosen"], "label": i % 3 > 0}) + "\n")


def recipe(data: Path, algorithm: dict, **sections: dict) -> Recipe:
    raw = {
        "model": {"tiny": {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2}},
        "data": {"train": str(data)},
        "algorithm": algorithm,
        "batch": {"effective": EFFECTIVE, "micro_batch": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3, "weight_decay": 0.01, "schedule": "cosine"},
        "learners": {"cpus_per_worker": 0.5},
    }
    return Recipe.model_validate(
        {**raw, **{name: {**raw.get(name, {}), **values} for name, values in sections.items()}}
    )


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_ray(tmp_path_factory.mktemp("shared")):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 10 * EFFECTIVE)
    return path


@pytest.fixture(scope="module")
def two_workers(ray_session: None) -> Iterator[LearnerGroup]:
    learners = Recipe.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"train": "toy:sft"},
            "algorithm": {"name": "sft"},
            "optimizer": {"learning_rate": 1},
            "learners": {"workers": 2, "cpus_per_worker": 0.5},
        }
    ).learners
    with LearnerGroup(learners) as group:
        yield group


def worst(differences: list[Difference]) -> tuple[float, float, float]:
    return (
        max(d.loss for d in differences),
        max(d.grad_norm for d in differences),
        max(d.weights for d in differences),
    )


@pytest.mark.parametrize(
    "everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["covering", "all"]
)
def test_every_cut_takes_the_same_steps(ray_session: None, data: Path, everything: bool) -> None:
    """1, 2 and 4 workers × ZeRO 0-3 × every legal sync policy: 21 engines. Each takes four steps with one of
    the two micro-batch sizes × three layouts in turn, or (slow) ten steps with all of them: 126 cuts."""
    workers = [n for n in (1, 2, 4) if n * 0.5 <= (os.cpu_count() or 1)]
    differences = list(
        run(
            recipe(data, {"name": "dpo"}),
            steps=10 if everything else 4,
            workers=workers,
            everything=everything,
        )
    )
    assert len(differences) == (42 if everything else 7) * len(workers)
    bad = [d for d in differences if not d.within(TOLERANCE["fp32"])]
    assert not bad, bad
    print(
        f"{len(differences)} cuts: loss {worst(differences)[0]:.1e}, grad norm {worst(differences)[1]:.1e}, "
        f"weights {worst(differences)[2]:.1e}"
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "sft"},
        {"name": "reward", "reward_centring": 0.01},
        {"name": "kto"},
        {"name": "dpo", "loss": "aot", "label_smoothing": 0.1},
        {"name": "dpo", "loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "ld_alpha": 0.5},
        {"name": "orpo"},
    ],
    ids=lambda a: (
        a["name"] + (f"-{a['loss']}" if isinstance(a.get("loss"), str) else "-mix" if "loss" in a else "")
    ),
)
def test_each_family_is_independent_of_the_cut(
    two_workers: LearnerGroup, data: Path, algorithm: dict
) -> None:
    proof = Verification.of(recipe(data, algorithm, learners={"workers": 2}), steps=3)
    baseline = proof.baseline()
    for cut in cuts_to_try(proof.planned, EFFECTIVE, "fp32", [2], everything=False):
        difference = baseline.difference(proof.under(cut, two_workers), cut)
        assert difference.within(TOLERANCE["fp32"]), difference


@pytest.mark.parametrize(
    "algorithm",
    [{"name": "dpo"}, pytest.param({"name": "kto"}, marks=pytest.mark.slow)],
    ids=lambda a: a["name"],
)
def test_loras_dropout_is_independent_of_the_cut(
    two_workers: LearnerGroup, data: Path, algorithm: dict
) -> None:
    """A token has the same mask in every layout, micro-batch and rank, when layers are computed again, and in
    both passes of KTO."""
    adapted = {
        "tiny": {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2},
        "lora": {"rank": 4, "dropout": 0.3},
    }
    recomputing = {"workers": 2, "activation_checkpointing": "full"}
    # with Adam's usual eps the rounding in a gradient that is almost zero would become a full step
    damped = {"learning_rate": 2e-2, "eps": 1e-3}
    proof = Verification.of(
        recipe(data, algorithm, model=adapted, learners=recomputing, optimizer=damped), steps=3
    )
    baseline = proof.baseline()
    for cut in cuts_to_try(proof.planned, EFFECTIVE, "fp32", [2], everything=False):
        difference = baseline.difference(proof.under(cut, two_workers), cut)
        assert difference.within(TOLERANCE["fp32"]), difference
    assert proof.recipe.model.lora is not None
    undropped = proof.recipe.model.lora.model_copy(update={"dropout": 0.0})
    model = proof.recipe.model.model_copy(update={"lora": undropped})
    without = replace(proof, recipe=proof.recipe.model_copy(update={"model": model}))
    assert not baseline.difference(without.baseline(), proof.planned).within(TOLERANCE["fp32"])


def test_bf16_stays_within_its_stated_bound(two_workers: LearnerGroup, data: Path) -> None:
    proof = Verification.of(
        recipe(data, {"name": "dpo"}, learners={"workers": 2, "precision": "bf16"}), steps=5
    )
    baseline = proof.baseline()
    differences = [
        baseline.difference(proof.under(cut, two_workers), cut)
        for cut in cuts_to_try(proof.planned, EFFECTIVE, "bf16", [2], everything=False)
    ]
    assert {d.cut.zero_stage for d in differences} == {1, 2, 3}
    assert all(d.within(TOLERANCE["bf16"]) for d in differences), differences
    print(f"bf16: loss {worst(differences)[0]:.1e}, weights {worst(differences)[2]:.1e}")


def average_by_micro_batch(learner: RankLearner) -> None:
    """Installs a common mistake: each micro-batch's loss is divided by its own token count, and the step's
    loss is the mean over micro-batches, weighted by their examples."""
    objective = learner.algorithm.objective

    def averaged(scores: TokenScores, units: LossUnits) -> LossSum:
        own = LossUnits(scores.examples, tuple(int(count) for count in scores.lengths().sum(0)))
        loss = objective(scores, own)
        return replace(loss, total=loss.total * scores.examples / units.examples)

    learner.algorithm = replace(learner.algorithm, objective=averaged)


@pytest.mark.parametrize("equal_lengths", [False, True], ids=["uneven rows", "equal rows"])
def test_a_wrong_normaliser_would_be_seen(
    two_workers: LearnerGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal_lengths: bool
) -> None:
    """The proof can fail: a loss averaged per micro-batch is 20 times above the tolerance. Rows of equal
    length are the control: both normalisers agree there, so nothing else causes the difference."""

    def build(spec: LearnerSpec) -> None:
        LearnerGroup.build(two_workers, spec)
        two_workers.call(average_by_micro_batch)

    monkeypatch.setattr(two_workers, "build", build)
    write_rows(tmp_path / "rows.jsonl", 2 * EFFECTIVE, equal_lengths=equal_lengths)
    proof = Verification.of(
        recipe(tmp_path / "rows.jsonl", {"name": "sft"}, learners={"workers": 2}), steps=2
    )
    (cut, *_) = cuts_to_try(proof.planned, EFFECTIVE, "fp32", [2], everything=False)
    assert cut.examples is not None and cut.examples <= EFFECTIVE // 4, (
        "each worker has several micro-batches"
    )
    difference = proof.baseline().difference(proof.under(cut, two_workers), cut)
    if equal_lengths:
        assert difference.within(TOLERANCE["fp32"]), difference
    else:
        assert difference.loss > 20 * TOLERANCE["fp32"] < difference.weights, difference
        assert difference.grad_norm > 200 * TOLERANCE["fp32"], difference
    print(difference)
