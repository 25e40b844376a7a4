"""What a plan says of the model before it is loaded: tables that rows do not fit into, what is not learned
yet, what the export changes.

fake model, configuration, rows --advise--> notes, or ConfigError where a worker would end in an IndexError
"""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.errors import ConfigError, OutputError
from orchestrator.data.dataset import DataSet
from orchestrator.models.classes import auto_class
from orchestrator.models.forward import ScoringModel
from orchestrator.models.generation import savable
from orchestrator.models.load import check_files, load_config
from orchestrator.plan.memory import MemoryModel
from orchestrator.recipe.schema import Recipe

POSITIONS = re.compile(
    r"(^|\.)(wpe|pos_emb|embed_positions?|position(al)?_?embeddings?|pos_embed(ding)?s?)(\.|$)"
)
"""Names that transformers' models give to a table of positions."""


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the plan. Example: Note("positions", "2,048 of 1,024", "…")."""

    name: str
    value: str
    reason: str


def advise(recipe: Recipe, algorithm: AlgorithmSpec, model: MemoryModel, data: DataSet) -> list[Note]:
    """ConfigError or MissingInput for what cannot work; the rest in words."""
    check_files(recipe.model)
    config, scoring = load_config(recipe.model), model.scoring
    _check_ids(recipe, scoring, data)
    notes = _positions(recipe, model, longest(recipe, algorithm, data))
    if model.pinned_rope:
        reason = (
            f"its frequencies are those of sequences of up to data.max_length={recipe.data.max_length} "
            "for all rows: the batch must not matter"
        )
        notes.append(Note("positions", ", ".join(model.pinned_rope), reason))
    notes += _experts(recipe, scoring)
    if recipe.model.lora is not None:
        notes.append(_adapters(model))
    if model.idle and recipe.model.lora is None:
        reason = "text does not reach them, so they keep their start weights: " + ", ".join(
            _parts(model.idle)
        )
        notes.append(Note("not trained", f"{len(model.idle)} parameters", reason))
    if data.tokenizer is not None and recipe.model.path is not None:
        notes += _dry_export(recipe, config, data.tokenizer, algorithm)
    if model.unpredicted:
        notes.append(
            Note(
                "activations",
                "by a formula",
                f"a step could not be followed ({model.unpredicted}); the probe step decides",
            )
        )
    return notes


def longest(recipe: Recipe, algorithm: AlgorithmSpec, data: DataSet) -> int:
    """Tokens of the longest sequence that the run can meet: of the rows as encoded; of a rollout, of full
    length; of generation in an evaluation."""
    lengths = [g.longest for g in (*data.groups, *data.held_out)]
    if algorithm.online is not None and recipe.rollouts.environment is not None:
        lengths.append(recipe.data.max_length)  # turns go on until then
    if recipe.evaluation.generate is not None:
        lengths += [len(prompt) + recipe.evaluation.generate.max_new_tokens for prompt in data.prompts]
    return max(lengths)


def _check_ids(recipe: Recipe, scoring: ScoringModel, data: DataSet) -> None:
    """ConfigError where a token has no row in the embedding."""
    embedding: Any = scoring.hugging_face.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    groups = (*data.groups, *data.held_out)
    highest = max(
        int(ids.max()) for g in groups for ids in (g.prompt, *(b.ids for b in g.branches)) if len(ids)
    )
    if highest >= rows:
        token = "" if data.tokenizer is None else f", {data.tokenizer.convert_ids_to_tokens(highest)!r},"
        known = "" if data.tokenizer is None else f"; the tokenizer has {len(data.tokenizer)} tokens"
        raise ConfigError(
            f"model.path: token {highest}{token} of the data has no row in the embedding of "
            f"{recipe.model.path or 'the model'}",
            why=f"the embedding has {rows} rows{known}: tokens were added to the tokenizer and not to the "
            "model",
            fix="model.resize_token_embeddings(len(tokenizer)) in transformers and save it, or take the "
            "tokenizer the model was made with",
        )


def _positions(recipe: Recipe, model: MemoryModel, most: int) -> list[Note]:
    """ConfigError where a sequence is longer than a table of positions; a note where the recipe allows such,
    or where rotary positions go beyond what was trained. most: tokens of the longest sequence."""
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
                why="each position has a row of its own in a table; there is none beyond",
                fix=f"set data.max_length={size} or less (with rollouts.max_new_tokens and "
                "evaluation.generate.max_new_tokens below it)",
            )
    least = min((size for _, size in tables), default=None)
    if least is not None and allowed > least:
        reason = (
            f"data.max_length={allowed} allows more than the table of positions holds; the longest "
            f"sequence here has {most} tokens"
        )
        return [Note("positions", f"{most} of {least}", reason)]
    if isinstance(named, int) and allowed > named and getattr(config, "rope_parameters", None):
        reason = (
            f"max_position_embeddings is {named}: rotary positions go on beyond it, and the model was "
            "not trained there"
        )
        longest_here = (
            f"data.max_length={recipe.data.max_length}, the longest sequence here has {most} tokens"
        )
        return [Note("positions", f"{allowed} of {named}", f"{reason}; {longest_here}")]
    return []


def position_tables(model: nn.Module, named: int | None) -> Iterable[tuple[str, int]]:
    """(name, positions it holds) of each table of positions. Rows before the first position (OPT's two,
    RoBERTa's up to its padding) are not counted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name):
            rows = module.num_embeddings
            yield (
                name,
                named
                if named is not None and rows > named
                else rows - (0 if module.padding_idx is None else module.padding_idx + 1),
            )
    for name, buffer in model.named_buffers():
        if POSITIONS.search(name) and buffer.ndim == 2 and torch.is_floating_point(buffer):
            yield name, buffer.shape[0]


def _adapters(model: MemoryModel) -> Note:
    layers = sum(name.endswith(".lora_A") for name, _ in model.scoring.named_modules())
    learns, all_of_them = model.sizes.learns, model.sizes.all
    reason = f"{learns:,} of {all_of_them:,} parameters learn ({learns / all_of_them:.2%})"
    return Note("LoRA", f"on {layers} layers", reason)


def _experts(recipe: Recipe, scoring: ScoringModel) -> list[Note]:
    config: Any = scoring.hugging_face.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "moe_loss_weight")
    found = next(
        (
            (name, value)
            for name in names
            if isinstance(value := getattr(config, name, None), float) and value
        ),
        None,
    )
    notes, routed = [], sum(p.numel() for name, p in scoring.named_parameters() if ".experts." in name)
    if found is not None and routed:
        declared = f"the configuration declares a loss that balances the experts ({found[0]}={found[1]:g})"
        notes.append(
            Note(
                "balancing loss",
                "not learned yet",
                f"{declared}; the step is the objective's alone, transformers and TRL may add it",
            )
        )
    if recipe.model.lora is not None and routed:
        held = sum(
            p.numel() for name, p in scoring.named_parameters() if ".experts." in name and "lora_" in name
        )
        if not held:
            share = routed / max(1, sum(p.numel() for p in scoring.parameters()))
            reason = f"{share:.0%} of the weights are experts in one tensor, which is no linear layer"
            notes.append(Note("adapters", "none in the experts", reason))
    return notes


def _parts(names: Iterable[str]) -> list[str]:
    """The three parts of the model that hold most of these parameters."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + 1
    return sorted(counts, key=lambda part: -counts[part])[:3]


def _dry_export(recipe: Recipe, config: Any, tokenizer: Any, algorithm: AlgorithmSpec) -> list[Note]:
    """Saves all that an export holds but weights, so that nothing known now can fail at the end."""
    notes = []
    with tempfile.TemporaryDirectory(prefix="orchestrator-export-") as folder:
        for what, saved in (("configuration", config), ("tokenizer", tokenizer)):
            try:
                saved.save_pretrained(folder)
            except Exception as error:
                raise OutputError(
                    f"model.path: {recipe.model.path}: the export could not hold its {what}",
                    why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                    fix=f"mend the {what} in that folder: it is read by transformers, which does not write "
                    "it",
                ) from error
    if auto_class(config, algorithm.head).__name__ != "AutoModelForSequenceClassification":
        _, changed = savable(_generation_config(recipe, config))
        if changed:
            notes.append(Note("generation config", "changed", changed))
    return notes


def _generation_config(recipe: Recipe, config: Any) -> Any:
    """The one that the model will be loaded with; of a folder without one, made from its configuration."""
    try:
        return GenerationConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision or "main")  # pyright: ignore
    except OSError:
        return GenerationConfig.from_model_config(config)
