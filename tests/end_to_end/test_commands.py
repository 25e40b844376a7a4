"""Every command that needs no workers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import FEW, Finished, Sandbox

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("commands"))
    yield sandbox
    sandbox.close()


def succeeded(finished: Finished) -> str:
    assert finished.code == 0, finished.err
    return finished.out


def test_plan_as_json(sandbox: Sandbox) -> None:
    overrides = (
        f"data.train={FEW % 'preference'}",
        "data.eval=null",
        "batch.effective=48",
        "batch.micro_batch=6",
        "run.max_steps=9",
    )
    plan = json.loads(succeeded(sandbox.run("plan", "tiny/dpo", *overrides, "--json")))
    assert plan["arithmetic"] == "48 pairs = 2 workers × 4 micro-batches × 6 pairs"
    assert plan["micro_batches"] == 4
    assert plan["total_steps"] == 9
    assert plan["nearest"] == []
    cut = {
        "workers": 2,
        "examples": 6,
        "positions": None,
        "layout": "prefix_shared",
        "zero_stage": 0,
        "sync": "no_sync",
        "one_row": False,
    }
    assert plan["cut"] == cut
    named = ("hardware", "layout", "ZeRO stage", "sync", "checkpointing", "micro-batch", "disk")
    assert {c["name"]: bool(c["reason"]) for c in plan["choices"]} == dict.fromkeys(named, True)
    assert plan["data"]["rows"] == plan["data"]["kept"] == 64
    assert sum(count for _, count in plan["data"]["histogram"]) == 64
    parts = {name: value for name, value in plan["memory"].items() if name != "total"}
    assert 0 < max(parts.values()) <= plan["memory"]["total"] < plan["memory_limit"]
    assert plan["recipe"]["learners"]["workers"] == 2


@pytest.mark.slow
def test_plan_names_batches_that_divide(sandbox: Sandbox) -> None:
    said = succeeded(
        sandbox.run(
            "plan",
            "tiny/dpo",
            f"data.train={FEW % 'preference'}",
            "data.eval=null",
            "batch.micro_batch=5",
            "--recipe",
        )
    )
    assert "batch.effective 60 or 70" in said
    assert "predicted memory per worker" in said
    assert "architecture: llama" in said, "the resolved recipe"


@pytest.mark.slow
def test_plan_of_a_pipeline(sandbox: Sandbox) -> None:
    said = succeeded(sandbox.run("plan", "tiny/demo"))
    assert "200 optimizer steps of sft" in said
    assert "dpo is planned when what it takes from other stages has been trained (sft)" in said


def test_evaluate_names_what_only_a_run_makes(sandbox: Sandbox) -> None:
    finished = sandbox.run("evaluate", "tiny/rlhf")
    assert finished.code == 78
    assert (
        "rewards.functions[0].model, critic.model.path of tiny/rlhf are made by stages of a run"
        in finished.err
    )
    assert "the run folder of that stage" in finished.err


def test_inspect_shows_the_first_batch_and_what_is_to_be_said_of_the_data(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    said = succeeded(
        sandbox.run(
            "inspect", "tiny/dpo", f"data.train={FEW % 'preference'}", "data.eval=null", "--examples", "2"
        )
    )
    assert said.count("5 scored") == 4 and said.startswith("unused columns: answer\n"), "two pairs"
    rows = "".join(
        f'{{"prompt": "p{i}", "chosen": "good", "rejected": "bad", "annotator": {i}}}\n' for i in range(16)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    said = succeeded(
        sandbox.run(
            "inspect", "tiny/dpo", f"data.train={tmp_path}/rows.jsonl", "data.eval=null", "batch.effective=8"
        )
    )
    assert said.startswith("unused columns: annotator\n")


def test_recipes(sandbox: Sandbox, tmp_path: Path) -> None:
    listed = succeeded(sandbox.run("recipes", "ls"))
    for name in ("tiny/dpo", "tiny/sft", "tiny/kto", "tiny/reward", "tiny/demo"):
        assert name in listed
    assert "extends: base.yaml" in succeeded(sandbox.run("recipes", "show", "tiny/dpo"))
    succeeded(sandbox.run("recipes", "cp", "tiny/demo", tmp_path / "mine"))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "base.yaml",
        "demo.yaml",
        "dpo.yaml",
        "sft.yaml",
    ]
    again = sandbox.run("recipes", "cp", "tiny/demo", tmp_path / "mine")
    assert again.code == 73 and "exists already" in again.err
    wrong = sandbox.run("recipes", "show", "tiny/dpu")
    assert wrong.code == 66 and "tiny/dpo" in wrong.err


def test_config_schema(sandbox: Sandbox) -> None:
    schema = json.loads(succeeded(sandbox.run("config", "schema")))
    assert {"extends", "run", "model", "data", "algorithm", "batch", "optimizer", "learners"} <= schema[
        "properties"
    ].keys()


def test_report(sandbox: Sandbox, tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss": 0.7 - 0.01 * step, "grad_norm": 1.0, "learning_rate": 1e-3}
        for step in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = succeeded(sandbox.run("report", tmp_path))
    assert said.strip() == str(tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text()
    missing = sandbox.run("report", tmp_path / "nowhere")
    assert missing.code == 66 and "nowhere" in missing.err and "Traceback" not in missing.err


def test_plans_for_machines_that_are_not_there(sandbox: Sandbox) -> None:
    told = sandbox.run(
        "plan",
        "tiny/dpo",
        "batch.effective=64",
        "--gpu",
        "h100-80g",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--json",
    )
    plan = json.loads(told.out)
    assert plan["cut"]["workers"] == 8 and plan["recipe"]["learners"]["gpus_per_worker"] == 1
    assert plan["memory_limit"] == int(80e9 * plan["recipe"]["batch"]["memory_utilisation"])
    assert {"hardware", "communication"} <= {choice["name"] for choice in plan["choices"]}
    alone = sandbox.run("plan", "tiny/dpo", "--nodes", "2")
    assert alone.code == 78 and "--gpu" in alone.err


def test_a_schedulers_artefact_is_printed_filled_in(sandbox: Sandbox, tmp_path: Path) -> None:
    told = sandbox.run(
        "submit",
        "tiny/dpo",
        "batch.effective=32",
        "--to",
        "slurm",
        "--print",
        "--nodes",
        "3",
        "--output",
        tmp_path,
    )
    assert told.code == 0 and "#SBATCH --nodes=3" in told.out and f"OUTPUT={tmp_path}" in told.out
    assert "python -m orchestrator train tiny/dpo batch.effective=32" in told.out
    wrong = sandbox.run("submit", "tiny/dpo", "--to", "pbs", "--print")
    assert wrong.code == 78 and "slurm, k8s, sky" in wrong.err
