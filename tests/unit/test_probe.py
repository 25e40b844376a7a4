"""The probe before training: cut finer until it fits, as far as that helps, and no further."""

import pytest

from orchestrator.algorithms import build
from orchestrator.dataset import load_data
from orchestrator.errors import NotEnoughResources
from orchestrator.learner.learner import LearnerSpec
from orchestrator.plan import make_plan
from orchestrator.recipe import load
from orchestrator.startup import probed_cut
from orchestrator.ways import first_steps, largest_micro_batch


class Workers:
    """Stands in for a LearnerGroup: says that a micro-batch takes `state(stage)` bytes and 1 MB for each position."""

    def __init__(self, spec, state):
        self.spec, self.state, self.built, self.probes = spec, state, [], 0

    def call(self, function, largest, units):
        self.probes += 1
        return [self.state(self.spec.cut.zero_stage) + 1_000_000 * largest.positions]

    def build(self, spec):
        self.spec = spec
        self.built.append(spec.cut)


@pytest.fixture(scope="module")
def planned():
    rows = "data.train=[{path: toy:preference, max_rows: 64}]"
    options = ("batch.effective=64", "learners.workers=2", "model.tiny.layers=1", "batch.memory_limit_gb=1", "batch.memory_utilisation=1")
    recipe = load("recipes/tiny/dpo.yaml", [rows, "data.eval=null", "batch.micro_batch=auto", *options]).stages[0].recipe
    algorithm = build(recipe.algorithm)
    data = load_data(recipe, algorithm)
    return make_plan(recipe, algorithm, data), data


def probed(planned, state):
    plan, data = planned
    workers, notes = Workers(LearnerSpec(plan.recipe, plan.cut, 77), state), []
    return probed_cut(plan, data, plan.cut, workers, notes.append), workers, notes


def test_what_fits_is_left_as_it_is(planned):
    cut, workers, notes = probed(planned, lambda stage: 0)
    assert (cut, workers.built) == (planned[0].cut, [])
    assert len(notes) == 1


def test_smaller_micro_batches_are_tried_first(planned):
    plan, data = planned
    room = plan.memory_limit - plan.memory.moments
    longest = largest_micro_batch(first_steps(data), plan.cut).positions
    cut, workers, _ = probed(planned, lambda stage: room - 1_000_000 * (longest - 1))
    assert cut.zero_stage == 0 and largest_micro_batch(first_steps(data), cut).positions < longest
    assert workers.spec.total_steps == 77, "the schedule stays the run's"


def test_the_next_stage_is_taken_when_micro_batches_cannot_be_smaller(planned):
    cut, workers, _ = probed(planned, lambda stage: 2_000_000_000 if stage < 3 else 0)
    assert cut.zero_stage == 3
    assert workers.probes <= 8, "the budget is not halved on and on while the largest micro-batch stays the same"


def test_what_fits_nowhere_is_refused_with_the_arithmetic(planned):
    with pytest.raises(NotEnoughResources) as error:
        probed(planned, lambda stage: 2_000_000_000)
    assert "ZeRO 3" in error.value.what and "weights" in error.value.why
