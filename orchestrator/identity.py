"""What makes two runs the same run: everything that decides the result, and nothing else; and what is watched beside it.

    recipe, rows, template, tokenizer -> deciding (another value: another run)        user's files, tokens -> watched (a change is told)
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import ONLINE, Recipe
from orchestrator.episodes import Prompt
from orchestrator.records import SequenceGroup

TOKENS = "encoded tokens"
"""Name of what rows became, in `watched`."""
_ENDS = ("run.max_steps", "run.epochs")
SAMPLED = 1 << 20
"""Bytes at either end of a file of weights that stand for all of it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """deciding: JSON values by key, which are all equal where two runs are the same; watched: SHA-256 by name of what may change under a run
    that goes on (a mended reward), which is told."""

    deciding: Mapping[str, Any]
    watched: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides."""
        return hashlib.sha256(json.dumps(dict(self.deciding), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """"key: value there -> value here" for each key in which a run with `other` as deciding is another one."""
        keys = sorted(self.deciding.keys() | other.keys())
        return [f"{k}: {_shown(other, k)} -> {_shown(self.deciding, k)}" for k in keys if other.get(k) != self.deciding.get(k)]

    def only_the_end_differs(self, other: Mapping[str, Any]) -> bool:
        return all(k in _ENDS for k in self.deciding.keys() | other.keys() if other.get(k) != self.deciding.get(k))


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def identity_of(recipe: Recipe, data: str, *, tokenizer: str = "", watched: Mapping[str, str] | None = None) -> Identity:
    """data: fingerprint of the rows; tokenizer: of the tokenizer with its chat template. Workers, micro-batches, layout, ZeRO stage and tracking
    decide nothing; nor does the end of a run whose schedule does not look at it: it can be extended."""
    whole = recipe.model_dump(mode="json")
    online = _deciding_online(whole) if recipe.algorithm.name in ONLINE else {}
    model = {key: value for key, value in whole["model"].items() if key != "chat_template"}  # its text decides, wherever it lies
    free = recipe.optimizer.schedule == "constant" and not (recipe.optimizer.warmup_ratio and not recipe.optimizer.warmup_steps)
    end = {} if free else {key: whole["run"][key] for key in ("max_steps", "epochs")}
    sections = {
        "run": {"seed": whole["run"]["seed"], **end},
        "batch": {"effective": whole["batch"]["effective"]},
        "learners": {"precision": whole["learners"]["precision"]},
        "model": model,
        **{section: whole[section] for section in ("data", "algorithm", "optimizer")},
        **online,
    }
    deciding = _flat(sections) | {"rows": data, "tokenizer and chat template": tokenizer}
    if recipe.model.reference is not None and Path(recipe.model.reference).is_dir():
        deciding["weights of model.reference"] = folder_digest(Path(recipe.model.reference))
    return Identity(deciding, watched or {})


def _deciding_online(whole: Mapping[str, Any]) -> dict[str, Any]:
    """What of an online recipe decides its result: how completions are drawn and rewarded, not who does it."""
    rollouts = ("engine", "prompts", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "environment")
    return {
        "rollouts": {key: whole["rollouts"][key] for key in (*rollouts, "max_turns", "max_staleness", "update", "replay")},
        "rewards": {key: whole["rewards"][key] for key in ("functions", "normalise")},
        "critic": {key: whole["critic"][key] for key in ("model", "learning_rate", "warmup_steps")},
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys with dots; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what turns text into tokens: vocabulary and rules, and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    return hashlib.sha256(json.dumps([rules, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def tokens_digest(items: Iterable[SequenceGroup | Prompt]) -> str:
    """SHA-256 of what is learned from: tokens, masks, labels and margins, in their order."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Prompt):
            digest.update(_bytes(item.ids))
            continue
        digest.update(_bytes(item.prompt) + repr((item.label, item.margin, len(item.branches))).encode())
        for branch in item.branches:
            digest.update(_bytes(branch.ids) + np.packbits(branch.scored).tobytes())
    return digest.hexdigest()


def _bytes(ids: Any) -> bytes:
    return len(ids).to_bytes(8, "little") + np.asarray(ids, np.int64).tobytes()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 of names, sizes and both ends of the files of a model: other weights are other in their first million bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED))
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()
