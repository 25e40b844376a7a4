"""What a rollout actor holds: an engine, whose weights have a version, and the episodes that it runs."""

from collections.abc import Sequence

import torch

from orchestrator.core.errors import OrchestratorError
from orchestrator.core.rollouts import Prompt, RolloutGroup, Sampling
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.schema import Recipe
from orchestrator.rollout.engines.engine import GenerationEngine
from orchestrator.rollout.engines.transformers_engine import TransformersEngine
from orchestrator.rollout.environment import load_environment
from orchestrator.rollout.episodes import EpisodeRunner


class RolloutWorker:
    """Samples groups for prompts, with exactly the requested version of the weights."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.engine: GenerationEngine = make_engine(recipe, device)
        environment = load_environment(recipe.rollouts.environment) if recipe.rollouts.environment else None
        self.episodes = EpisodeRunner(
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
        if self.engine.version != version:
            raise OrchestratorError(
                f"the engine holds weight version {self.engine.version}, not {version}",
                fix="run the same command again; if it repeats, this is a bug: report it",
            )
        return self.episodes.run(work, sampling, version)


def make_engine(recipe: Recipe, device: torch.device) -> GenerationEngine:
    """The engine that the recipe names."""
    if recipe.rollouts.engine == "vllm":
        # vllm is an optional package, and slow to import.
        from orchestrator.rollout.engines.vllm_engine import VllmEngine

        return VllmEngine(recipe, device)
    return TransformersEngine(recipe, device)
