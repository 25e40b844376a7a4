"""The model card: front matter the Hub can read, results and a short curve."""

import json
from pathlib import Path

import yaml

from orchestrator.observe.report.model_card import model_card


def card(folder: Path, **changes: object) -> str:
    facts = {
        "name": "my-run",
        "base": "org/model",
        "algorithm": "dpo",
        "recipe_yaml": "run: {name: my-run}\n",
        "data_fingerprint": "abc123",
        "metrics_path": folder / "metrics.jsonl",
        "library_versions": {"torch": "2.13.0"},
    }
    return model_card(**(facts | changes))  # pyright: ignore[reportArgumentType]


def front(text: str) -> dict[str, object]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def write(folder: Path, steps: int, evaluations: dict[int, float]) -> None:
    lines = [{"step": s, "eval/loss": v} for s, v in evaluations.items() if s == 0]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 1.0 / step, "grad_norm": 2.0})
        lines += [{"step": s, "eval/loss": v} for s, v in evaluations.items() if s == step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows(text: str, heading: str) -> list[list[str]]:
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]


def test_the_hub_can_read_the_front_matter(tmp_path: Path) -> None:
    expected = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", "dpo"],
        "base_model": "org/model",
    }
    assert front(card(tmp_path)) == expected
    assert "base_model" not in front(card(tmp_path, base="a random-weight llama model"))
    assert "base_model" not in front(card(tmp_path, base="/runs/sft/export"))
    assert front(card(tmp_path, algorithm="reward"))["pipeline_tag"] == "text-classification"


def test_results_before_and_after_and_a_short_curve(tmp_path: Path) -> None:
    write(tmp_path, 200, {0: 0.7, 100: 0.5, 200: 0.25})
    text = card(tmp_path)
    assert rows(text, "Results") == [
        ["held-out metric", "step 0", "step 200"],
        ["---"] * 3,
        ["eval/loss", "0.7", "0.25"],
    ]
    curve = rows(text, "Training curve")
    assert curve[0] == ["step", "loss", "grad_norm"]
    assert len(curve) == 2 + 10
    assert (curve[2], curve[-1]) == (["1", "1", "2"], ["200", "0.005", "2"])
    assert "200 optimizer steps" in text
    assert rows(text, "Versions")[2:] == [["torch", "2.13.0"]]
    assert "`abc123`" in text


def test_short_runs_and_runs_without_metrics(tmp_path: Path) -> None:
    assert "No metrics were recorded." in card(tmp_path)
    write(tmp_path, 1, {})
    assert rows(card(tmp_path), "Results")[2:] == [["loss", "1"], ["grad_norm", "2"]]
    assert len(rows(card(tmp_path), "Training curve")) == 3


def test_a_recipe_cannot_end_its_code_block(tmp_path: Path) -> None:
    text = card(tmp_path, recipe_yaml="a: |\n  ```\n  # not a heading\n")
    assert "````yaml\na: |\n  ```\n  # not a heading\n````" in text


def test_what_is_not_known_is_a_dash_and_a_preference_says_what_it_is_read_from(tmp_path: Path) -> None:
    names = ("eval/preference_accuracy", "eval/logp_accuracy")
    lines = [{"step": 0, **dict.fromkeys(names, None)}, {"step": 3, **dict.fromkeys(names, 0.75)}]
    lines.append({"step": 3, "loss": 0.5, "rewards/accuracies": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card(tmp_path)
    assert ["eval/preference_accuracy (by implicit reward)", "–", "0.75"] in rows(text, "Results")
    assert rows(text, "Training curve")[-1] == ["3", "0.5", "–"]
