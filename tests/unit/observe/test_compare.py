"""Runs side by side, from recipe.yaml and metrics.jsonl."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.core.errors import MissingInput
from orchestrator.observe.report.compare import Value, differences, read_run, run_folders, table, to_json

RECIPE = """run: {name: NAME}
optimizer: {learning_rate: RATE}
tracking: {wandb: WANDB}
data:
  train: rows.jsonl
  eval: [{path: toy:sft, split: EVAL}]
rewards: {functions: []}
"""


def line(step: int, loss: float, speed: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "perf/tokens_per_s": speed,
        "time/data": 0.5,
        "time/optim": 1.5,
        "time/idle/learners": 9.0,
        **more,
    }


OFFLINE = [
    {"step": 0, "eval/loss": 0.7, "eval/exact_match": 0.0},
    line(1, 0.6, 100.0, kl=0.1),
    line(2, 0.2, 300.0, kl=0.3),
    {"step": 2, "eval/loss": 0.3, "eval/exact_match": 0.9},
    line(3, 0.4, 200.0, kl=None),
    {"step": 3, "eval/loss": 0.5, "eval/exact_match": 0.8},
]
ONLINE = [
    {"step": 0, "eval/reward/mean": 0.1, "eval/reward/exact": 0.1, "eval/pass@4": 0.5},
    {"step": 1, "loss": -0.5, "reward/mean": 0.2, "reward/std": 0.4, "time/step": 4.0, "time/learn": 3.0},
    {"step": 2, "loss": -0.1, "reward/mean": 0.6, "reward/std": 0.4, "time/step": 5.0, "time/learn": 3.0},
]


def make_run(
    folder: Path, lines: list[dict[str, Any]], rate: str = "0.1", wandb: str = "off", split: str = "eval"
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    text = (
        RECIPE.replace("NAME", folder.name)
        .replace("RATE", rate)
        .replace("WANDB", wandb)
        .replace("EVAL", split)
    )
    (folder / "recipe.yaml").write_text(text)
    return folder


def shown(*folders: Path) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(table([read_run(folder.name, folder) for folder in folders]))
    return console.export_text()


def test_last_and_best_of_every_metric_that_has_a_best(tmp_path: Path) -> None:
    run = read_run("a", make_run(tmp_path / "a", OFFLINE))
    assert run.metrics["eval/loss"] == Value(0.5, 0.3, 2)
    assert run.metrics["eval/exact_match"] == Value(0.8, 0.9, 2)
    assert run.metrics["loss"] == Value(0.4, 0.2, 2)
    assert run.metrics["kl"] == Value(0.3, None, None), (
        "more is neither better nor worse, and null is no number"
    )
    assert (run.steps, run.tokens_per_s, run.seconds) == (3, 200.0, 6.0), "idle time is not spent twice"


def test_an_online_run(tmp_path: Path) -> None:
    run = read_run("a", make_run(tmp_path / "a", ONLINE))
    assert run.metrics["reward/mean"] == Value(0.6, 0.6, 2)
    assert run.metrics["loss"] == Value(-0.1, None, None), "a policy gradient's loss measures nothing"
    assert run.metrics["eval/reward/exact"].final == 0.1 and run.metrics["eval/pass@4"].best == 0.5
    assert "reward/std" not in run.metrics
    assert run.seconds == 9.0


def test_wall_time_and_restarts_are_the_last_steps(tmp_path: Path) -> None:
    lines = [
        line(1, 0.6, 1.0, **{"perf/elapsed_s": 10.0, "faults/restarts": 0}),
        line(2, 0.5, 1.0, **{"perf/elapsed_s": 95.0, "faults/restarts": 2}),
    ]
    folder = make_run(tmp_path / "a", lines)
    run = read_run("a", folder)
    assert (run.wall_seconds, run.restarts, run.seconds) == (95.0, 2, 4.0)
    rows = {row.split("  ")[0].strip(): row.split()[-1] for row in shown(folder).splitlines() if row.strip()}
    assert (rows["wall time"], rows["restarts"]) == ("1m35s", "2")
    old = read_run("b", make_run(tmp_path / "b", OFFLINE))
    assert (old.wall_seconds, old.restarts) == (None, None)


def test_only_keys_that_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", OFFLINE), make_run(tmp_path / "b", OFFLINE, rate="0.2", split="train")]
    differing = differences([read_run(folder.name, folder) for folder in runs])
    assert differing == {
        "run.name": ["a", "b"],
        "optimizer.learning_rate": [0.1, 0.2],
        "data.eval[0].split": ["eval", "train"],
    }
    assert differences([read_run("a", runs[0])]) == {}


def test_brackets_of_names_and_values_are_not_markup(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "[a]", OFFLINE), make_run(tmp_path / "b", OFFLINE, split="'[/inst]'")]
    assert "[a]" in shown(*runs) and "[/inst]" in shown(*runs)


def test_values_are_read_as_a_recipe_is(tmp_path: Path) -> None:
    assert read_run("a", make_run(tmp_path / "a", OFFLINE)).settings["tracking.wandb"] == "off"


def test_a_pipeline_stands_for_its_stages_in_their_order(tmp_path: Path) -> None:
    root = tmp_path / "pipe"
    for name, start in (("a_last", "reward"), ("reward", "sft"), ("sft", None)):
        folder = make_run(root / name, OFFLINE)
        if start:
            (folder / "recipe.yaml").write_text(f"model: {{path: {root / start / 'export'}}}\n")
    assert [name for name, _ in run_folders(root)] == ["pipe/sft", "pipe/reward", "pipe/a_last"]
    assert run_folders(root / "sft") == [("sft", root / "sft")]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="holds no run"):
        run_folders(tmp_path)


def test_the_table_and_the_json_say_the_same(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one", OFFLINE), make_run(tmp_path / "two", ONLINE, rate="0.2")]
    text = shown(*folders)
    rows = {row.split("  ")[0].strip(): row for row in text.splitlines()}
    assert rows["optimizer.learning_rate"].split()[1:] == ["0.1", "0.2"]
    assert "0.8 (best 0.9 at 2)" in rows["eval/exact_match"]
    assert rows["steps"].split()[1:] == ["3", "2"] and rows["time in steps"].split()[-2:] == ["6s", "9s"]
    assert "rewards.functions" not in text, "it is the same in both"
    document = json.loads(json.dumps(to_json([read_run(f.name, f) for f in folders])))
    assert document["differences"]["optimizer.learning_rate"] == [0.1, 0.2]
    assert document["runs"][0]["metrics"]["eval/exact_match"] == {"final": 0.8, "best": 0.9, "best_step": 2}
    assert "settings" not in document["runs"][0]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 0.7}\n{"step": 1, "lo')
    run = read_run("a", folder)
    assert (run.steps, run.tokens_per_s, run.seconds) == (0, None, 0.0)
    assert "0.7" in shown(folder)


def test_preference_accuracy_says_what_it_ranks_by_and_what_a_run_lacks_is_a_dash(tmp_path: Path) -> None:
    pairs = [
        {"step": i, "eval/preference_accuracy": v, "eval/logp_accuracy": 0.5, "eval/logps/chosen": -9.0}
        for i, v in ((0, None), (2, 0.75))
    ]
    free = [{"step": 2, "eval/preference_accuracy": 0.6, "eval/logps/chosen": -9.0}]
    dpo, simpo = make_run(tmp_path / "dpo", pairs), make_run(tmp_path / "simpo", free)
    assert [read_run("a", folder).ranked_by for folder in (dpo, simpo)] == [
        "implicit reward",
        "log-prob per token",
    ]
    lines = [row.split() for row in shown(dpo, simpo).splitlines()]
    assert [
        *[
            "eval/preference_accuracy",
            "(by",
            "implicit",
            "reward,",
            "log-prob",
            "per",
            "token)",
            "0.75",
            "0.6",
        ]
    ] in lines
    assert ["eval/logp_accuracy", "0.5", "–"] in lines
