"""The models that `chat` can load.

They are a run's export, the model that the run started from, a model folder, and an adapter with its base.

    RUN | PIPELINE | MODEL | ADAPTER | ORG/NAME@REVISION --find--> Choice --load--> ChatModel
"""

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.models.load import load_config, load_for_text, load_tokenizer
from orchestrator.observe.report.compare import run_folders
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.schema import Model

BASE = "base"
"""Value of --against for the model that a run started from."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A model to chat with."""

    name: str
    """Name as the user gave it."""
    model: Model
    adapter: Path | None = None
    """Folder with adapter_config.json, whose base is `model`."""
    start: "Choice | None" = None
    """What the run, or the adapter, started from."""
    seed: int = 0
    """Seed of a model that is made on the spot (model.tiny)."""


def find(given: str) -> Choice:
    """The model of a run, a pipeline's last stage, a model or adapter folder, or the hub (ORG/NAME@REVISION).

    MissingInput if there is none.
    """
    folder = Path(given)
    if folder.is_file():
        raise MissingInput(f"{given} is a file", fix="give a run folder (its --output) or a model folder")
    if not folder.is_dir():
        return _hub_model(given)
    if (folder / "config.json").is_file():
        return Choice(given, Model(path=given))  # pyright: ignore[reportCallIssue]
    if (folder / "adapter_config.json").is_file():
        return _adapter_model(folder)
    if (folder / "recipe.yaml").is_file():
        return _run_model(folder)
    if not list(folder.glob("*/metrics.jsonl")):
        fix = "give a run folder, or a folder with a config.json (or an adapter_config.json) and weights"
        raise MissingInput(f"{given} holds neither a run nor a model", fix=fix)
    return _run_model(run_folders(folder)[-1][1])


def _run_model(folder: Path) -> Choice:
    recipe = recipes.load(folder / "recipe.yaml").stages[-1].recipe
    if recipe.algorithm.name == "reward":
        fix = f"use it as a reward: rewards.functions=[{{name: reward, model: {folder}/export}}]"
        raise ConfigError(
            f"{folder} trained a reward model", why="it gives a score and writes no text", fix=fix
        )
    start = Choice(
        f"{folder} before training",
        recipe.model.model_copy(update={"lora": None, "reference": None}),
        seed=recipe.run.seed,
    )
    for part in ("export", "export/adapter"):
        if any((folder / part / name).is_file() for name in ("config.json", "adapter_config.json")):
            return replace(find(str(folder / part)), name=str(folder), start=start)
    fix = "run the same train command again to its end; until then chat with the model that it starts from"
    raise MissingInput(
        f"{folder} has no export yet", why="the model is exported when the run is over", fix=fix
    )


def _adapter_model(folder: Path) -> Choice:
    """An adapter as peft saves it, with the base that it names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    merged = (
        f"chat with {folder.parent}, which holds the merged model"
        if (folder.parent / "config.json").is_file()
        else None
    )
    if not base:
        raise MissingInput(
            f"{folder} does not name the model that it adapts",
            fix=merged or "set base_model_name_or_path in its adapter_config.json",
        )
    if not Path(base).is_dir() and (revision is None or Path(base).is_absolute()):
        fix = merged or (
            "put it there, or set base_model_name_or_path (for a hub model, revision too) in "
            "adapter_config.json"
        )
        raise MissingInput(f"{folder} adapts {base}, which is not there", fix=fix)
    model = Model(path=base, revision=revision)  # pyright: ignore[reportCallIssue]
    return Choice(str(folder), model, adapter=folder, start=Choice(str(base), model))


def _hub_model(given: str) -> Choice:
    path, _, revision = given.partition("@")
    if not revision:
        parent = Path(given).parent
        near = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        close = difflib.get_close_matches(given, near, n=3)
        fix = (
            f"did you mean {', '.join(close)}?"
            if close
            else "give a run folder, a model folder, or a hub model as ORG/NAME@REVISION"
        )
        raise MissingInput(f"no run or model folder {given}", fix=fix)
    return Choice(given, Model(path=path, revision=revision))  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model that writes text, on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device


def load(choice: Choice, device: torch.device) -> ChatModel:
    """Reads the weights: in fp32 on a CPU, else as they are stored. ConfigError for a reward model."""
    if any(
        name.endswith("ForSequenceClassification") for name in load_config(choice.model).architectures or ()
    ):
        raise ConfigError(
            f"{choice.name} is a reward model",
            why="it gives a score and writes no text",
            fix="give the model that it was trained to score",
        )
    tokenizer = load_tokenizer(choice.model)
    model = load_for_text(
        choice.model, seed=choice.seed, dtype=torch.float32 if device.type == "cpu" else "auto"
    )
    if choice.adapter is not None:
        model = _adapted(model, choice.adapter)
    return ChatModel(model.to(device).eval().requires_grad_(False), tokenizer, device)


def _adapted(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{adapter} is an adapter, and peft is not installed", fix='pip install "orchestrator[peft]"'
        ) from error
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "base_model_name_or_path in its adapter_config.json must be the model that it was trained on"
        raise ConfigError(f"{adapter} does not fit its base model", why=why, fix=fix) from error
