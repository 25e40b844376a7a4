"""What a rollout actor holds: an engine, its weights by version, and the episodes that it plays."""

from collections.abc import Sequence

import torch

from orchestrator.core.rollouts import Prompt, RolloutGroup, Sampling
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.schema import Recipe
from orchestrator.rollout.engines.engine import GenerationEngine
from orchestrator.rollout.engines.transformers_engine import TransformersEngine
from orchestrator.rollout.environment import load_environment
from orchestrator.rollout.episodes import EpisodeRunner


class RolloutWorker:
    """One actor's share: groups for prompts, with exactly the version that was asked for."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.engine: GenerationEngine = make_engine(recipe, device)
        environment = load_environment(recipe.rollouts.environment) if recipe.rollouts.environment else None
        self.roller = EpisodeRunner(
            self.engine,
            load_tokenizer(recipe.model),
            environment,
            recipe.rollouts.max_turns,
            recipe.rewards.retries,
        )

    def roll_out(
        self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int
    ) -> tuple[RolloutGroup, ...]:
        """A group for each (draw, prompt); the engine must hold `version`."""
        assert self.engine.version == version, f"the actor holds weights {self.engine.version}, not {version}"
        return self.roller.roll_out(work, sampling, version)


def make_engine(recipe: Recipe, device: torch.device) -> GenerationEngine:
    """The engine that the recipe names."""
    if recipe.rollouts.engine == "vllm":
        from orchestrator.rollout.engines.vllm_engine import (
            VllmEngine,
        )  # an optional package, and slow to import

        return VllmEngine(recipe, device)
    return TransformersEngine(recipe, device)
