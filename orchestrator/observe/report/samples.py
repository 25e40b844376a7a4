"""Samples of a run as cards of the report, and a choice of the most telling ones."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from orchestrator.core.format import number
from orchestrator.observe.metric_names import MARGINS

Line = Mapping[str, Any]
Item = TypeVar("Item")
MAX_SAMPLES = 24
"""Most samples of a kind on the page; samples.jsonl has all."""
EACH = 8
"""Samples in each of the three parts of spread(): worst, middle and best."""


def spread(items: Sequence[Item], key: Callable[[Item], float], each: int = EACH) -> list[Item]:
    """The worst, the middle and the best `each` items by `key`, worst first; all if there are not more."""
    ordered = sorted(items, key=key)
    if len(ordered) <= 3 * each:
        return ordered
    middle = (len(ordered) - each) // 2
    return ordered[:each] + ordered[middle : middle + each] + ordered[-each:]


def reward_of(sample: Line) -> float:
    """A rollout's total reward."""
    return (sample.get("scores") or {}).get("reward") or 0.0


def _score(sample: Line) -> float:
    """The score that decides whether a generation is right: the checker's, else its reward."""
    scores = sample.get("scores") or {}
    return scores.get("correct", scores.get("reward")) or 0.0


def sample_sections(samples: Sequence[Line]) -> list[tuple[str, str, str]]:
    """(title, HTML, lead) of each kind of sample; the HTML is empty if there are none."""
    pairs = sorted((s for s in samples if s.get("kind") == "pair"), key=lambda s: _margin(s)[1] or 0.0)
    generations = [s for s in samples if s.get("kind") == "generation"]
    rollouts = spread([s for s in samples if s.get("kind") == "rollout"], reward_of)
    wrong = [s for s in generations if not _score(s)]
    right = [s for s in generations if _score(s)]
    mixed = [s for both in zip(right, wrong, strict=False) for s in both]  # right and wrong in turn
    mixed += right[len(wrong) :] + wrong[len(right) :]
    scored = (
        f" {len(right)} of {len(generations)} correct."
        if any(s.get("answer") is not None for s in generations)
        else ""
    )
    return [
        (
            _most_wrong(pairs),
            _cards(pairs, _pair),
            f"Held-out pairs of the last evaluation with the lowest margin.{_shown(pairs)}",
        ),
        (
            "Generations",
            _cards(mixed, _generation),
            f"Greedy answers to held-out prompts.{scored}{_shown(mixed)}",
        ),
        (
            "Rollouts",
            _cards(rollouts, _generation),
            "The last rollout batch: the worst, the middle and the best completions by reward.",
        ),
    ]


def _margin(sample: Line) -> tuple[str, float | None]:
    """(what the margin is of, its value) of a pair. Earlier versions recorded the value only."""
    scores = sample.get("scores") or {}
    for basis, name in MARGINS.items():
        if name in scores:
            return basis, scores[name]
    return "", scores.get("margin")


def _most_wrong(pairs: Sequence[Line]) -> str:
    basis = _margin(pairs[0])[0] if pairs else ""
    return f"Most-wrong pairs by {basis}" if basis else "Most-wrong pairs"


def _shown(samples: Sequence[Line]) -> str:
    return (
        f" {MAX_SAMPLES} of {len(samples)} are shown; samples.jsonl has all."
        if len(samples) > MAX_SAMPLES
        else ""
    )


def _cards(samples: Sequence[Line], render_one: Any) -> str:
    return f"<div class=samples>{''.join(map(render_one, samples[:MAX_SAMPLES]))}</div>" if samples else ""


def _text(title: str, value: Any, style: str = "") -> str:
    if value is None:
        return ""
    shown = escape(str(value).strip("\n"))
    return f'<div class="text {style}"><span>{title}</span><pre dir=auto>{shown}</pre></div>'


def _pair(sample: Line) -> str:
    margin = _margin(sample)[1]
    head = "" if margin is None else f"<p class=score>margin <b>{number(margin)}</b></p>"
    texts = (
        _text("prompt", sample.get("prompt"))
        + _text("chosen", sample.get("chosen"), "good")
        + _text("rejected", sample.get("rejected"), "bad")
    )
    return f"<article>{head}{texts}</article>"


def _generation(sample: Line) -> str:
    scores = sample.get("scores") or {}
    if "reward" in scores:
        shown = ", ".join(
            f"{escape(name)} <b>{number(value)}</b>" for name, value in scores.items() if value is not None
        )
        head, style = f"<p class=score>{shown}</p>", "good" if (scores["reward"] or 0.0) > 0 else "bad"
    else:
        correct = scores.get("correct")
        head = (
            "" if correct is None else f"<p class=score>{'✓ correct' if correct else '✗ not the answer'}</p>"
        )
        style = "" if correct is None else "good" if correct else "bad"
    texts = (
        _text("prompt", sample.get("prompt"))
        + _text("completion", sample.get("completion"), style)
        + _text("answer", sample.get("answer"))
    )
    return f"<article>{head}{texts}</article>"
