"""Notes of a plan on the model, before it is loaded: tables that rows do not fit into, weights that are not
learned, and changes by the export.

    model without storage, configuration, rows --advise--> notes, or a ConfigError
"""

import re
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.errors import ConfigError, OutputError
from orchestrator.data.dataset import PlanInput
from orchestrator.models.classes import auto_class
from orchestrator.models.forward import ScoringModel
from orchestrator.models.generation import savable
from orchestrator.models.load import check_files, load_config
from orchestrator.plan.choice import Choice
from orchestrator.plan.memory import MemoryModel
from orchestrator.recipe.schema import Recipe

POSITIONS = re.compile(
    r"(^|\.)(wpe|pos_emb|embed_positions?|position(al)?_?embeddings?|pos_embed(ding)?s?)(\.|$)"
)
"""Names of position tables in transformers' models."""


def advise(recipe: Recipe, algorithm: AlgorithmSpec, model: MemoryModel, data: PlanInput) -> list[Choice]:
    """Notes on the model. Raises ConfigError or MissingInput for a model that cannot be trained on these
    rows."""
    check_files(recipe.model)
    config, scoring = load_config(recipe.model), model.scoring
    _check_ids(recipe, scoring, data)
    notes = _positions(recipe, model, longest(recipe, algorithm, data))
    if model.pinned_rope:
        reason = (
            f"all rows have the frequencies of sequences of up to data.max_length={recipe.data.max_length}, "
            "so that the batch does not matter"
        )
        notes.append(Choice("positions", ", ".join(model.pinned_rope), reason))
    notes += _experts(recipe, scoring)
    if recipe.model.lora is not None:
        notes.append(_adapters(model))
    if model.idle and recipe.model.lora is None:
        parts = ", ".join(_parts(model.idle))
        reason = f"text does not use them, so they keep their start weights: {parts}"
        notes.append(Choice("not trained", f"{len(model.idle)} parameters", reason))
    if data.tokenizer is not None and recipe.model.path is not None:
        notes += _dry_export(recipe, config, data.tokenizer, algorithm)
    if model.unpredicted:
        notes.append(
            Choice(
                "activations",
                "by a formula",
                f"a step without storage failed ({model.unpredicted}); the probe step decides",
            )
        )
    return notes


def longest(recipe: Recipe, algorithm: AlgorithmSpec, data: PlanInput) -> int:
    """Tokens of the longest possible sequence of the run: an encoded row, a rollout of full length, or
    generation in an evaluation."""
    lengths = [g.longest for g in (*data.groups, *data.held_out)]
    if algorithm.online is not None and recipe.rollouts.environment is not None:
        lengths.append(recipe.data.max_length)  # an episode ends there
    if recipe.evaluation.generate is not None:
        lengths += [len(prompt) + recipe.evaluation.generate.max_new_tokens for prompt in data.prompts]
    return max(lengths)


def _check_ids(recipe: Recipe, scoring: ScoringModel, data: PlanInput) -> None:
    """Raises ConfigError for a token that has no row in the embedding."""
    embedding: Any = scoring.hugging_face.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    groups = (*data.groups, *data.held_out)
    highest = max(
        int(ids.max()) for g in groups for ids in (g.prompt, *(b.ids for b in g.branches)) if len(ids)
    )
    if highest >= rows:
        token = "" if data.tokenizer is None else f", {data.tokenizer.convert_ids_to_tokens(highest)!r},"
        tokens = "" if data.tokenizer is None else f"; the tokenizer has {len(data.tokenizer)} tokens"
        raise ConfigError(
            f"model.path: token {highest}{token} of the data has no row in the embedding of "
            f"{recipe.model.path or 'the model'}",
            why=f"the embedding has {rows} rows{tokens}: tokens were added to the tokenizer and not to the "
            "model",
            fix="call model.resize_token_embeddings(len(tokenizer)) in transformers and save the model, or "
            "use the tokenizer that the model was made with",
        )


def _positions(recipe: Recipe, model: MemoryModel, most: int) -> list[Choice]:
    """A note if the recipe allows sequences beyond the table of positions, or beyond the trained rotary
    positions. Raises ConfigError if a sequence is longer than a table. most: tokens of the longest
    sequence."""
    allowed = max(most, recipe.data.max_length)
    config = model.scoring.hugging_face.config.get_text_config()
    named = getattr(config, "max_position_embeddings", None)
    tables = [
        (name, size)
        for name, size in position_tables(model.scoring.hugging_face, named)
        if f"{name}.weight" not in model.idle
    ]
    for name, size in tables:
        if most > size:
            raise ConfigError(
                f"sequences of up to {most} tokens do not fit the model's {size} positions ({name})",
                why="each position needs a row of that table",
                fix=f"set data.max_length={size} or less (with rollouts.max_new_tokens and "
                "evaluation.generate.max_new_tokens below it)",
            )
    least = min((size for _, size in tables), default=None)
    if least is not None and allowed > least:
        reason = (
            f"data.max_length={allowed} allows more positions than the table has; the longest sequence here "
            f"has {most} tokens"
        )
        return [Choice("positions", f"{most} of {least}", reason)]
    if isinstance(named, int) and allowed > named and getattr(config, "rope_parameters", None):
        reason = (
            f"max_position_embeddings is {named}: rotary positions continue beyond it, where the model was "
            "not trained"
        )
        longest_here = (
            f"data.max_length={recipe.data.max_length}, the longest sequence here has {most} tokens"
        )
        return [Choice("positions", f"{allowed} of {named}", f"{reason}; {longest_here}")]
    return []


def position_tables(model: nn.Module, named: int | None) -> Iterable[tuple[str, int]]:
    """(name, number of positions) of each table of positions. Rows before the first position (OPT's two,
    RoBERTa's up to its padding) are not counted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name):
            rows = module.num_embeddings
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            yield name, named if named is not None and rows > named else rows - first
    for name, buffer in model.named_buffers():
        if POSITIONS.search(name) and buffer.ndim == 2 and torch.is_floating_point(buffer):
            yield name, buffer.shape[0]


def _adapters(model: MemoryModel) -> Choice:
    """Number of adapted layers and of trainable parameters."""
    layers = sum(name.endswith(".lora_A") for name, _ in model.scoring.named_modules())
    learns, total = model.sizes.learns, model.sizes.all
    reason = f"{learns:,} of {total:,} parameters learn ({learns / total:.2%})"
    return Choice("LoRA", f"on {layers} layers", reason)


def _experts(recipe: Recipe, scoring: ScoringModel) -> list[Choice]:
    """Notes on a mixture of experts: a balancing loss that is not learned, experts without adapters."""
    config: Any = scoring.hugging_face.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "moe_loss_weight")
    balancing = next(
        (
            (name, value)
            for name in names
            if isinstance(value := getattr(config, name, None), float) and value
        ),
        None,
    )
    notes, routed = [], sum(p.numel() for name, p in scoring.named_parameters() if ".experts." in name)
    if balancing is not None and routed:
        declared = f"the configuration has a loss that balances the experts ({balancing[0]}={balancing[1]:g})"
        notes.append(
            Choice(
                "balancing loss",
                "not learned yet",
                f"{declared}; only the objective is learned, transformers and TRL may add that loss",
            )
        )
    if recipe.model.lora is not None and routed:
        adapters = sum(
            p.numel() for name, p in scoring.named_parameters() if ".experts." in name and "lora_" in name
        )
        if not adapters:
            share = routed / max(1, sum(p.numel() for p in scoring.parameters()))
            reason = f"{share:.0%} of the weights are experts in one tensor, which is not a linear layer"
            notes.append(Choice("adapters", "none in the experts", reason))
    return notes


def _parts(names: Iterable[str]) -> list[str]:
    """The three parts of the model with most of these parameters."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + 1
    return sorted(counts, key=lambda part: -counts[part])[:3]


def _dry_export(recipe: Recipe, config: Any, tokenizer: Any, algorithm: AlgorithmSpec) -> list[Choice]:
    """Notes of a trial export without weights, so that it does not fail at the end of the run. Raises
    OutputError."""
    notes = []
    with tempfile.TemporaryDirectory(prefix="orchestrator-export-") as folder:
        for what, part in (("configuration", config), ("tokenizer", tokenizer)):
            try:
                part.save_pretrained(folder)
            except Exception as error:
                raise OutputError(
                    f"model.path: {recipe.model.path}: the export cannot write its {what}",
                    why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                    fix=f"fix the {what} in that folder: transformers reads it and does not write it",
                ) from error
    if auto_class(config, algorithm.head).__name__ != "AutoModelForSequenceClassification":
        _, changed = savable(_generation_config(recipe, config))
        if changed:
            notes.append(Choice("generation config", "changed", changed))
    return notes


def _generation_config(recipe: Recipe, config: Any) -> Any:
    """The generation configuration of the model. A folder without one gets it from the model's
    configuration."""
    try:
        revision = recipe.model.revision or "main"
        return GenerationConfig.from_pretrained(recipe.model.path, revision=revision)  # pyright: ignore
    except OSError:
        return GenerationConfig.from_model_config(config)
