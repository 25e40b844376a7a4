"""Names of metrics outside of metrics.jsonl: wandb groups panels by the word before the first "/", Prometheus knows no "/"."""

import re

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
    """The name of its Ray gauge; Prometheus has it with `ray_` before it. Example: loss -> orchestrator_train_loss."""
    return "orchestrator_" + re.sub(r"[^A-Za-z0-9]+", "_", grouped(name))
