"""Names of metrics outside of metrics.jsonl: wandb groups panels by the word before the first "/", and
Prometheus allows no "/"."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.core.reports import SOURCE

_RENAMED = {
    "kl": "kl/mean",
    "kl_coefficient": "kl/coefficient",
    "skipped": "faults/skipped_steps",
    "reward/dropped_groups": "faults/dropped_groups",
    "perf/peak_memory_gb": "memory/peak_gb",
}


def grouped(name: str) -> str:
    """The name with a group in front. Example: loss -> train/loss, as Hugging Face's trainers report it."""
    return _RENAMED.get(name) or (name if "/" in name else f"train/{name}")


def gauge(name: str) -> str:
    """The name of the metric's Ray gauge; Prometheus puts `ray_` in front.

    Example: loss -> orchestrator_train_loss.
    """
    return "orchestrator_" + re.sub(r"[^A-Za-z0-9]+", "_", grouped(name))


MARGINS: Mapping[str, str] = {
    "implicit reward": "implicit_reward_margin",
    "log-prob per token": "logp_per_token_margin",
    "reward": "reward_margin",
}
"""What ranks held-out pairs -> name of a pair's score in samples.jsonl and in wandb's table."""


REWARD_FIGURES = frozenset(
    f"reward/{name}"
    for name in (
        *("mean", "std", "max", "group_std", "no_signal_ratio"),
        *("dropped_groups", "groups_wanted", "groups_learned", "groups_with_signal"),
    )
)
"""Reward metrics of every online run. Any other reward/NAME is a component that the recipe names."""


def components(metrics: Iterable[str]) -> tuple[str, ...]:
    """Full names of the reward components among training metrics. Example: reward/brief, reward/right."""
    return tuple(
        n for n in metrics if n.startswith("reward/") and n.count("/") == 1 and n not in REWARD_FIGURES
    )


def unknown(name: str, value: float | None) -> bool:
    """Whether the value of a metric is not known; it is shown as –.

    NaN means "not known", except for loss and gradient norm, whose NaN is a result.
    """
    return value is None or (math.isnan(value) and name not in ("loss", "grad_norm"))


def ranked_by(metrics: Iterable[str]) -> str | None:
    """What an evaluation with these metrics ranked pairs by, in words. None if it ranked no pairs, or if an
    earlier version recorded it without this information."""
    emitted = set(metrics)
    if "eval/preference_accuracy" not in emitted:
        return None
    if "eval/logp_accuracy" in emitted:
        return "implicit reward"
    if "eval/logp_margin" in emitted:
        return None
    return "log-prob per token" if "eval/logps/chosen" in emitted else "reward"


def display_name(name: str, metrics: Iterable[str]) -> str:
    """The name of a held-out metric in a table.

    Example: eval/preference_accuracy -> preference_accuracy (by implicit reward)
    """
    short = name.removeprefix("eval/")
    basis = (
        ranked_by(metrics)
        if short == "preference_accuracy"
        else "log-prob per token"
        if short == "logp_accuracy"
        else None
    )
    return short if basis is None else f"{short} (by {basis})"


def named(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The metrics with source names in place of source numbers. Metrics of single sources are left out if
    there is only one source."""
    renamed: dict[str, float] = {}
    for key, value in metrics.items():
        metric, mark, number = key.partition(SOURCE)
        if not mark:
            renamed[key] = value
        elif len(names) > 1:
            renamed[f"{metric}/{names[int(number)]}"] = value
    return renamed
