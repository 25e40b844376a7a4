"""The first steps of every tiny recipe are the recorded ones: whoever changes a number sees it here.

To record others on purpose: `python tools/loss_compare.py record tests/golden`. Digits vary by processor and
build of torch; `python tools/loss_compare.py compare A B` compares two checkouts on one machine exactly.
"""

from pathlib import Path

import pytest

from tools.loss_compare import RECIPES, Curve, differences, read, record

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_steps_are_the_recorded_ones(recipe: str) -> None:
    assert list(differences(read(HERE / f"{recipe}.json"), record(recipe), rel=1e-5)) == []


def test_another_digit_is_a_difference() -> None:
    one = [Curve("sft", [{"loss": 1.0, "grad_norm": 2.0}], "a", 3.0)]
    other = [Curve("sft", [{"loss": 1.0 + 1e-7, "grad_norm": 2.1}], "b", 3.0)]
    exact, rough = (list(differences(one, other, rel)) for rel in (0.0, 1e-5))
    assert len(exact) == 3 and "sha256" in exact[2]
    assert rough == ["sft step 1: grad_norm 2.0 and 2.1"]


def test_every_curve_moves() -> None:
    """A recipe whose gradient stands still would prove nothing. PPO's policy rests for two batches, while its
    critic learns."""
    for recipe in RECIPES:
        for curve in read(HERE / f"{recipe}.json"):
            norms = {step["grad_norm"] for step in curve.steps if step.get("grad_norm", 0.0) > 0}
            assert len(norms) >= (2 if curve.stage == "ppo" else 4), (recipe, curve.stage)
