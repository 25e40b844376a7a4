"""The probe before training makes the cut finer until it fits, as long as that helps."""

import shutil
from dataclasses import replace

import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.errors import NotEnoughResources
from orchestrator.learner.probes import probe_peak
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.plan.planner import make_plan
from orchestrator.plan.ways import first_steps, largest_micro_batch
from orchestrator.recipe.loading import load
from orchestrator.run.inputs import read_data
from orchestrator.run.remembered import cache_folder
from orchestrator.run.startup import SAFE, probed_cut


class Workers:
    """Replaces a LearnerGroup. It reports that a micro-batch takes `state(stage)` bytes and 1 MB for each
    position."""

    def __init__(self, spec, state):
        self.spec, self.state, self.built, self.probes = spec, state, [], 0

    def call(self, function, *arguments):
        if function is not probe_peak:
            return ["the model and the device"]
        self.probes, largest = self.probes + 1, arguments[0]
        return [self.state(self.spec.cut.zero_stage) + 1_000_000 * largest.positions]

    def build(self, spec):
        self.spec = spec
        self.built.append(spec.cut)


LIMITS = ("batch.memory_limit_gb=4", "batch.memory_utilisation=1", "learners.activation_checkpointing=none")


@pytest.fixture(scope="module")
def planned():
    rows = "data.train=[{path: toy:preference, max_rows: 64}]"
    # more parameters than a bucket of reductions holds
    shape = ("model.tiny.hidden_size=1024", "model.tiny.layers=4", "model.tiny.vocab_size=8192")
    options = ("batch.effective=64", "learners.workers=4", *shape, *LIMITS)
    recipe = (
        load("recipes/tiny/dpo.yaml", [rows, "data.eval=null", "batch.micro_batch=auto", *options])
        .stages[0]
        .recipe
    )
    algorithm = build(recipe.algorithm)
    data = read_data(recipe, algorithm)
    # followed=False: it is probed however much memory there is
    return replace(make_plan(recipe, algorithm, data), followed=False), data


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def probed(planned, state):
    plan, data = planned
    workers, notes = Workers(LearnerSpec(plan.recipe, plan.cut, 77), state), []
    return probed_cut(plan, data, plan.cut, workers, notes.append), workers, notes


def test_a_cut_that_fits_is_kept(planned):
    cut, workers, notes = probed(planned, lambda stage: 0)
    assert (cut, workers.built) == (planned[0].cut, [])
    assert len(notes) == 1


def test_smaller_micro_batches_are_tried_first(planned):
    plan, data = planned
    room = plan.memory_limit - plan.memory.moments
    longest = largest_micro_batch(first_steps(data), plan.cut).positions
    cut, workers, _ = probed(planned, lambda stage: room - 1_000_000 * (longest - 1))
    assert cut.zero_stage == 0 and largest_micro_batch(first_steps(data), cut).positions < longest
    assert workers.spec.total_steps == 77, "the schedule does not change"


def test_the_next_stage_is_taken_when_micro_batches_cannot_be_smaller(planned):
    cut, workers, _ = probed(planned, lambda stage: 8_000_000_000 if stage < 3 else 0)
    assert cut.zero_stage == 3
    assert workers.probes <= 5 + 4, "halving stops once the largest micro-batch stays the same"


def test_a_model_that_fits_nowhere_is_refused_with_the_arithmetic(planned):
    with pytest.raises(NotEnoughResources) as error:
        probed(planned, lambda stage: 8_000_000_000)
    assert "ZeRO 3" in error.value.what and "weights" in error.value.why


def test_a_measured_peak_is_not_measured_again(planned):
    assert probed(planned, lambda stage: 0)[1].probes == 1
    cut, workers, notes = probed(planned, lambda stage: 8_000_000_000)
    assert workers.probes == 0 and cut == planned[0].cut
    assert "as measured before" in notes[0]


def test_a_cpu_run_far_below_its_limit_is_not_probed(planned):
    plan, data = planned
    roomy = replace(plan, followed=True, memory_limit=int(plan.memory.peak / SAFE) + 1)
    for variant, probes in (
        (roomy, 0),
        (replace(roomy, followed=False), 1),
        (replace(roomy, memory_limit=int(plan.memory.peak / SAFE) - 1), 1),
    ):
        workers = Workers(LearnerSpec(plan.recipe, plan.cut, 77), lambda stage: 0)
        assert probed_cut(variant, data, plan.cut, workers, lambda _: None) == plan.cut
        assert workers.probes == probes
        shutil.rmtree(cache_folder("probes"), ignore_errors=True)
