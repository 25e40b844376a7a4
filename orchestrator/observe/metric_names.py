"""Names of metrics outside of metrics.jsonl: wandb groups panels by the word before the first "/", Prometheus
knows no "/"."""

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
    """The name with a group before it. Example: loss -> train/loss, as Hugging Face's trainers report it."""
    return _RENAMED.get(name) or (name if "/" in name else f"train/{name}")


def gauge(name: str) -> str:
    """The name of its Ray gauge; Prometheus has it with `ray_` before it. Example: loss ->
    orchestrator_train_loss."""
    return "orchestrator_" + re.sub(r"[^A-Za-z0-9]+", "_", grouped(name))


MARGINS: Mapping[str, str] = {
    "implicit reward": "implicit_reward_margin",
    "log-prob per token": "logp_per_token_margin",
    "reward": "reward_margin",
}
"""By what held-out pairs are ranked -> the score of a pair in samples.jsonl and in wandb's table."""


REWARD_FIGURES = frozenset(
    f"reward/{name}"
    for name in (
        *("mean", "std", "max", "group_std", "no_signal_ratio"),
        *("dropped_groups", "groups_wanted", "groups_learned", "groups_with_signal"),
    )
)
"""What every online run says of its rewards; any other reward/NAME is a component that the recipe names."""


def components(metrics: Iterable[str]) -> tuple[str, ...]:
    """The reward components among training metrics, by their whole names. Example: reward/brief,
    reward/right."""
    return tuple(
        n for n in metrics if n.startswith("reward/") and n.count("/") == 1 and n not in REWARD_FIGURES
    )


def unknown(name: str, value: float | None) -> bool:
    """Whether nothing is known of a metric: shown as –. NaN says that of every one but loss and gradient
    norm, of which it is the news."""
    return value is None or (math.isnan(value) and name not in ("loss", "grad_norm"))


def ranked_by(metrics: Iterable[str]) -> str | None:
    """What an evaluation with these metrics ranked pairs by, in words; None where it ranked none, or was
    recorded before this was told."""
    emitted = set(metrics)
    if "eval/preference_accuracy" not in emitted:
        return None
    if "eval/logp_accuracy" in emitted:
        return "implicit reward"
    if "eval/logp_margin" in emitted:
        return None
    return "log-prob per token" if "eval/logps/chosen" in emitted else "reward"


def spoken(name: str, metrics: Iterable[str]) -> str:
    """The name of a held-out metric in a table. Example: preference_accuracy -> preference_accuracy (by
    implicit reward)"""
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
    """The metrics with the names of the sources for their numbers; those by source are left out where there
    is only one name."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        metric, mark, number = key.partition(SOURCE)
        if not mark:
            found[key] = value
        elif len(names) > 1:
            found[f"{metric}/{names[int(number)]}"] = value
    return found
