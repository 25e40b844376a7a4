"""Tracking of runs: in wandb (a stand-in for its service), in Prometheus, and the names of dashboards."""

import math
import re
import urllib.request
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cluster.metrics_sink import RayMetricsSink
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.metric_names import gauge, grouped
from orchestrator.observe.report.panels import QUESTIONS
from orchestrator.observe.wandb_sink import EVALUATION_STEP, STEP, TABLE_ROWS
from tests.running import FEW, Shared, every_line, metrics, shared_ray, wait_until
from tests.wandb_server import RecordedRun, WandbServer

pytestmark = pytest.mark.timeout(600)

STEPS = 6
DPO = (
    f"data.train={FEW % 'preference'}",
    "data.eval=[{path: toy:preference, split: eval, max_rows: 8}]",
    f"run.max_steps={STEPS}",
    "batch.effective=16",
    "batch.micro_batch=8",
    "learners.workers=1",
    "checkpoint.every=2",
    "evaluation.every=2",
    "optimizer.warmup_steps=0",
    "tracking.wandb=online",
    "tracking.group=watched",
)
PPO = (
    "run.max_steps=3",
    "batch.effective=16",
    "rollouts.prompts=16",
    "rollouts.workers=1",
    "algorithm.epochs=1",
    "critic.warmup_steps=0",
    "data.eval=[{path: toy:prompts, split: eval, max_rows: 8}]",
    "evaluation.every=3",
    "evaluation.pass_at_k=4",
    "checkpoint.every=3",
    "tracking.wandb=off",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("tracking")) as shared:
        yield shared


@dataclass(frozen=True, slots=True)
class Tracked:
    """A DPO run whose driver was killed with -9 while it wrote the checkpoint of step 4.

    It was started again with another micro-batch.
    """

    folder: Path
    server: WandbServer

    @property
    def run(self) -> RecordedRun:
        return self.server.only_run


@pytest.fixture(scope="module")
def tracked(shared: Shared) -> Iterator[Tracked]:
    folder = shared.root / "watched"
    command = ("train", "tiny/dpo", *DPO, *shared.overrides(), "--output", folder)
    with WandbServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        killed = shared.sandbox.run(
            *command, faults=[{"site": "checkpoint.manifest", "step": 4, "action": "kill"}]
        )
        assert killed.code == -9, killed.err
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
        finished = shared.sandbox.run(*command, "batch.micro_batch=4")
        assert finished.code == 0, finished.err
        yield Tracked(folder, server)


def test_a_resumed_run_is_one_run_in_wandb_without_gaps_or_repeats(tracked: Tracked) -> None:
    run = tracked.run
    assert (run.starts, run.exit_code) == (2, 0)
    assert run.series(STEP) == sorted(run.series(STEP))
    steps = [row[STEP] for row in run.history if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert run.series(EVALUATION_STEP) == [0, 2, 4, 6]
    restarts = run.series("faults/restarts")
    assert (restarts[:2], restarts[-2:]) == ([0, 0], [1, 1])
    for line in metrics(tracked.folder):
        (row,) = (row for row in run.history if row[STEP] == line["step"] and "train/loss" in row)
        assert row["train/loss"] == line["loss"]
        assert row["rewards/margins"] == line["rewards/margins"]


def test_the_config_holds_recipe_plan_and_versions_and_no_secret(tracked: Tracked) -> None:
    run = tracked.run
    assert (run.name, run.group, run.job_type, run.tags) == ("tiny-dpo", "watched", "dpo", ["dpo"])
    assert run.config["batch"]["effective"] == 16
    assert run.config["algorithm"]["beta"] == 0.1
    assert run.config["batch"]["micro_batch"] == 4, "the value of the second start"
    assert run.config["plan"]["arithmetic"].startswith("16 pairs = ")
    assert run.config["plan"]["memory"]["total"] > 0
    assert {"torch", "transformers", "deepspeed", "ray", "trl"} <= run.config["versions"].keys()
    assert "recipe" not in run.config["plan"]
    everything = repr(run.config).encode() + b"".join(run.files.values())
    recorded = b"".join(path.read_bytes() for path in tracked.folder.rglob("*") if path.is_file())
    assert tracked.server.key.encode() not in everything + recorded
    assert "wandb-metadata.json" not in run.files


def test_tables_are_uploaded_and_bounded(tracked: Tracked) -> None:
    columns, rows = tracked.run.table("eval/most_wrong_pairs")
    assert columns == ["step", "prompt", "chosen", "rejected", "implicit_reward_margin"]
    assert 0 < len(rows) <= TABLE_ROWS
    assert {row[0] for row in rows} == {STEPS}
    columns, rows = tracked.run.table("eval/generations")
    assert columns == ["step", "prompt", "completion", "answer", "correct"]
    assert len(rows) == 8


def test_summaries_hold_the_best_value(tracked: Tracked) -> None:
    losses = tracked.run.series("eval/loss")
    assert tracked.run.summary["eval/loss"] == {
        "min": pytest.approx(min(losses)),
        "last": pytest.approx(losses[-1]),
    }
    assert tracked.run.summary["train/loss"] == tracked.run.series("train/loss")[-1]


def scrape(run: str, wanted: Collection[str], deadline_s: float = 60.0) -> dict[str, float]:
    """Gauges of a run, from the node's metrics agent, once it has all of `wanted`.

    Drivers report to the agent every ten seconds.
    """
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    gauges: dict[str, float] = {}
    sample = re.compile(rf'^ray_(orchestrator_\w+){{[^}}]*run="{run}"[^}}]*}} (\S+)$', re.MULTILINE)

    def complete() -> bool:
        with urllib.request.urlopen(url, timeout=10) as answer:
            gauges.update((name, float(value)) for name, value in sample.findall(answer.read().decode()))
        return gauges.keys() >= set(wanted)

    assert wait_until(complete, deadline_s), f"never came: {set(wanted) - gauges.keys()}"
    return gauges


def test_a_gauge_reaches_prometheus_and_infinity_does_not(shared: Shared) -> None:
    """Ray's metrics agent runs without a dashboard too."""
    sink = RayMetricsSink("a-pipeline", "dpo", "second")
    sink.step(StepReport(7, {"grad_norm": math.inf, "loss": 0.25}))
    sink.evaluation(EvaluationReport(7, {"eval/loss": 0.5}))
    expected = {
        "orchestrator_train_loss": 0.25,
        "orchestrator_train_global_step": 7.0,
        "orchestrator_eval_loss": 0.5,
    }
    assert scrape("a-pipeline", expected.keys()) == expected


@pytest.fixture(scope="module")
def online(shared: Shared, tracked: Tracked) -> Path:
    """A PPO run from the DPO run's export."""
    outcome, _ = shared.train_last("tiny/ppo", tracked.folder / "export", "ppo", *PPO)
    return outcome.folder


@pytest.mark.slow
def test_prometheus_sees_every_metric_of_a_run(online: Path) -> None:
    emitted = {
        gauge(name): value
        for line in every_line(online / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    }
    assert scrape("tiny-ppo", emitted.keys()) == pytest.approx({**emitted, gauge("global_step"): 3.0})


@pytest.mark.slow
def test_no_panel_asks_for_a_metric_that_no_run_has(tracked: Tracked, online: Path) -> None:
    emitted = {
        name
        for folder in (tracked.folder, online)
        for line in every_line(folder / "metrics.jsonl")
        for name in line
    }
    panels = [name for question in QUESTIONS for panel in question.panels for name in panel.names]
    unknown = {re.sub(r"pass@\d+", "pass@4", name) for name in panels} - emitted
    assert not unknown
    assert len({grouped(name) for name in emitted}) == len(emitted)
