"""Identity of a run: the values that decide its result, and the files that are watched beside them.

    recipe, rows, weights, template, tokenizer -> deciding   another value is another run
    files of the user, tokens                  -> watched    a change is reported

Contents decide, and places do not: data, models and the run folder may be moved. run/folder.py compares the
end of a run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.core.batches import SequenceGroup
from orchestrator.core.rollouts import Prompt
from orchestrator.recipe.schema import ONLINE, Model, Recipe, RewardFunction

TOKENS = "encoded tokens"
"""Name in `watched` of the tokens that rows were encoded to."""
MAY_CHANGE = (
    "run.max_steps and run.epochs (the run is extended), data.eval, evaluation.*, tracking.*, checkpoint.*, "
    "export.*, run.name, workers and all of learners.* but precision, and the paths of data, model and run "
    "folder"
)
"""What may change when a run is continued, for messages."""
SAMPLED_BYTES = 1 << 20
"""Bytes at each end of a file of weights that are hashed instead of the whole file."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Values that tell whether two runs are the same run."""

    deciding: Mapping[str, Any]
    """JSON values by key. Two runs are the same run if all are equal. Example: {"algorithm.beta": 0.1}."""
    watched: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name of contents that may change when a run is continued, such as a fixed reward function. A
    change is reported."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the deciding values."""
        return hashlib.sha256(
            json.dumps(dict(self.deciding), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Texts "key: other value -> own value" for each deciding key that differs from `other`."""
        keys = sorted(self.deciding.keys() | other.keys())
        return [
            f"{k}: {_shown(other, k)} -> {_shown(self.deciding, k)}"
            for k in keys
            if other.get(k) != self.deciding.get(k)
        ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def identity_of(
    recipe: Recipe,
    data: str,
    *,
    tokenizer: str = "",
    sources: Sequence[tuple[int, float]] = (),
    watched: Mapping[str, str] | None = None,
) -> Identity:
    """Identity of a run. Workers, micro-batches, layout, ZeRO stage, evaluation and tracking decide nothing.

    data: fingerprint of the rows. tokenizer: digest of the tokenizer with its chat template. sources: (rows,
    weight) of each source.
    """
    values = recipe.model_dump(mode="json")
    online = _deciding_online(recipe, values) if recipe.algorithm.name in ONLINE else {}
    encoding = ("max_length", "overlong", "remainder", "append_eos")
    sections = {
        "run": {"seed": values["run"]["seed"]},
        "batch": {"effective": values["batch"]["effective"]},
        "learners": {"precision": values["learners"]["precision"]},
        "model": _model(recipe.model),
        "data": {key: values["data"][key] for key in encoding},
        "algorithm": _algorithm(values["algorithm"]),
        "optimizer": values["optimizer"],
        **online,
    }
    mixture = (
        {"rows and weight of each source": [list(source) for source in sources]} if len(sources) > 1 else {}
    )
    weight = {"weight of the source": sources[0][1]} if len(sources) == 1 and sources[0][1] != 1.0 else {}
    deciding = _flat(sections) | {"rows": data, "tokenizer and chat template": tokenizer} | mixture | weight
    return Identity(deciding, watched or {})


def _algorithm(values: dict[str, Any]) -> dict[str, Any]:
    """Code of the user's own without its folder."""
    own = {key: _named(values[key]) for key in ("loss", "advantage") if isinstance(values[key], str)}
    return {key: value for key, value in (values | own).items() if key != "advantage" or value is not None}


def _model(model: Model) -> dict[str, Any]:
    """Identity of a model: the weights of a folder, or the name and revision on the hub."""
    values = model.model_dump(mode="json")
    return {
        "tiny": values["tiny"],
        "lora": values["lora"],
        **_weights("path", model.path, model.revision),
        **_weights("reference", model.reference),
    }


def _weights(key: str, place: str | None, revision: str | None = None) -> dict[str, Any]:
    if place is not None and Path(place).is_dir():
        return {f"{key} (its weights)": folder_digest(Path(place))}
    return {key: place, **({"revision": revision} if revision is not None else {})}


def _deciding_online(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """Deciding values of an online recipe: how completions are sampled and rewarded, not on which workers."""
    drawn = (
        "engine",
        "prompts",
        "samples",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "max_turns",
    )
    rollouts = {key: values["rollouts"][key] for key in (*drawn, "max_staleness", "update")} | {
        "environment": _named(recipe.rollouts.environment)
    }
    replay = recipe.rollouts.replay
    rollouts["replay"] = (
        file_digest(Path(replay)) if replay is not None and Path(replay).is_file() else replay
    )
    critic = {key: values["critic"][key] for key in ("learning_rate", "warmup_steps")}
    return {
        "rollouts": rollouts,
        "rewards": {
            "functions": [_component(f) for f in recipe.rewards.functions],
            "normalise": values["rewards"]["normalise"],
        },
        "critic": critic | {"model": None if recipe.critic.model is None else _model(recipe.critic.model)},
    }


def _component(function: RewardFunction) -> dict[str, Any]:
    """Identity of a reward component, without the place of its code, model or server. Code and address are
    watched."""
    kind = (
        {"function": _named(function.function)}
        if function.function is not None
        else {"url": True}
        if function.url is not None
        else {}
    )
    model = _weights("model", function.model, function.revision) if function.model is not None else {}
    return {"name": function.name, "weight": function.weight, "options": function.options, **kind, **model}


def _named(code: str | None) -> str | None:
    """`folder/file.py:name` without the folder."""
    place, colon, name = (code or "").rpartition(":")
    return f"{Path(place).name}:{name}" if colon and place.endswith(".py") else code


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted key. Lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return leaves


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    return hashlib.sha256(json.dumps([rules, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def tokens_digest(items: Iterable[SequenceGroup | Prompt]) -> str:
    """SHA-256 of training data: tokens, masks, labels and margins, in their order."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Prompt):
            digest.update(_bytes(item.ids))
            continue
        digest.update(_bytes(item.prompt) + repr((item.label, item.margin, len(item.branches))).encode())
        for branch in item.branches:
            digest.update(_bytes(branch.ids) + np.packbits(branch.loss_mask).tobytes())
    return digest.hexdigest()


def _bytes(ids: Any) -> bytes:
    return len(ids).to_bytes(8, "little") + np.asarray(ids, np.int64).tobytes()


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 of names, sizes and both ends of a model's configuration and weight files. Other weights differ
    within their first million bytes."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
