"""What makes two runs the same run: a hash of everything that decides the result, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from orchestrator.config import ONLINE, Recipe


def fingerprint(recipe: Recipe, data_fingerprint: str, model_fingerprint: str) -> str:
    """SHA-256 of what decides the result of a run; workers, micro-batches, layout, ZeRO stage and tracking do not."""
    whole = recipe.model_dump(mode="json")
    online = _deciding_online(whole) if recipe.algorithm.name in ONLINE else {}
    deciding = {
        "run": {key: whole["run"][key] for key in ("seed", "max_steps", "epochs")},
        "effective": whole["batch"]["effective"],
        "precision": whole["learners"]["precision"],
        **{section: whole[section] for section in ("model", "data", "algorithm", "optimizer")},
        "fingerprints": [data_fingerprint, model_fingerprint],
        **online,
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _deciding_online(whole: Mapping[str, Any]) -> dict[str, Any]:
    """What of an online recipe decides its result: how completions are drawn and rewarded, not who does it."""
    rollouts = ("engine", "prompts", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "environment")
    return {
        "rollouts": {key: whole["rollouts"][key] for key in (*rollouts, "max_turns", "max_staleness", "update", "replay")},
        "rewards": {key: whole["rewards"][key] for key in ("functions", "normalise")},
        "critic": {key: whole["critic"][key] for key in ("model", "learning_rate", "warmup_steps")},
    }
