"""The model card of an export."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.core.files import read_lines
from orchestrator.core.format import number
from orchestrator.observe.metric_names import display_name

CURVE_POINTS = 10
CURVE = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(
    *,
    name: str,
    base: str,
    algorithm: str,
    recipe_yaml: str,
    data_fingerprint: str,
    metrics_path: Path,
    library_versions: Mapping[str, str],
    last: int | None = None,
) -> str:
    """The README.md of an exported model: Hugging Face front matter, results, curve, data, recipe, versions.

    base: hub name, folder or description of the start weights; metrics_path: the run's metrics.jsonl; last:
    last step to include, None for all.
    """
    lines = read_lines(metrics_path) if metrics_path.is_file() else []
    lines = [line for line in lines if last is None or line.get("step", 0) <= last]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(n.startswith("eval/") for n in line)]
    parts = [
        _front_matter(base, algorithm),
        f"# {name}\n\n`{base}` trained with **{algorithm}** for {steps[-1]['step'] if steps else 0} "
        "optimizer steps by orchestrator.",
        f"## Results\n\n{_results(steps, evaluations)}",
    ]
    if steps:
        parts.append(f"## Training curve\n\n{_curve(steps)}")
    parts += [
        f"## Data\n\nFingerprint of the training data (SHA-256 of its content): `{data_fingerprint}`",
        f"## Recipe\n\n{_fenced(recipe_yaml, 'yaml')}",
        "## Versions\n\n" + _table(("library", "version"), [(n, v) for n, v in library_versions.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, algorithm: str) -> str:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", algorithm],
    }
    if algorithm == "reward":
        front["pipeline_tag"] = "text-classification"
    if HUB_NAME.fullmatch(base) and not Path(base).exists():  # a folder would be a dead link
        front["base_model"] = base
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _results(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        head = ("held-out metric", f"step {first['step']}", f"step {last['step']}")
        return _table(
            head,
            [
                (f"eval/{display_name(n, last)}", _cell(first.get(n)), _cell(v))
                for n, v in last.items()
                if n.startswith("eval/")
            ],
        )
    if steps:
        return _table(
            ("metric at the last step", "value"), [(n, _cell(steps[-1][n])) for n in CURVE if n in steps[-1]]
        )
    return "No metrics were recorded."


def _curve(steps: Sequence[Mapping[str, Any]]) -> str:
    names = [n for n in CURVE if any(n in line for line in steps)]
    count = min(CURVE_POINTS, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    return _table(
        ("step", *names), [(str(line["step"]), *(_cell(line.get(n)) for n in names)) for line in chosen]
    )


def _cell(value: Any) -> str:
    return "–" if value is None else number(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fenced(text: str, language: str) -> str:
    """A code block with a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
