"""Synthetic data for a plan: rows of given lengths, before anything is downloaded."""

from dataclasses import dataclass

import numpy as np

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Branch, Ints, SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.core.rollouts import Prompt
from orchestrator.data.dataset import PlanInput
from orchestrator.data.order import Batches, Order
from orchestrator.data.prompts import longest_rollouts
from orchestrator.data.sources import LoadedRows
from orchestrator.data.tokenize import EncodingReport
from orchestrator.recipe.schema import Recipe

STEPS = 8
"""Effective batches of synthetic rows."""
SPREAD = 3.0
"""Shape of the gamma distribution of lengths: a long tail, as most preference data has."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and one completion together. Example: Lengths(900, 2048)."""

    mean: int
    """Mean number of tokens."""
    most: int
    """Largest number of tokens."""

    def __str__(self) -> str:
        return f"{self.mean} tokens on average, at most {self.most}"

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Lengths of a text MEAN,MAX. Raises ConfigError for other texts."""
        parts = text.split(",")
        if (
            len(parts) != 2
            or not all(p.strip().isdigit() for p in parts)
            or not 2 <= int(parts[0]) <= int(parts[1])
        ):
            raise ConfigError(
                f"--lengths {text} is not MEAN,MAX",
                why="it needs two numbers of tokens of a prompt and one completion, 2 <= MEAN <= MAX",
                fix="write e.g. --lengths 900,2048",
            )
        return cls(int(parts[0]), int(parts[1]))

    def draw(self, count: int, seed: int) -> Ints:
        """Int[count]: lengths, the same for the same seed. One of them is the largest possible."""
        drawn = np.random.default_rng(seed).gamma(SPREAD, self.mean / SPREAD, count)
        lengths = np.clip(np.rint(drawn), 2, self.most).astype(np.int64)
        lengths[0] = self.most
        return lengths


def synthetic_data(recipe: Recipe, algorithm: AlgorithmSpec, lengths: Lengths) -> PlanInput:
    """A data set of rows with such lengths. Half of a row is its prompt. Online the prompt has the tokens
    that rollouts.max_new_tokens leaves."""
    effective = recipe.batch.effective // algorithm.group_examples
    drawn = np.minimum(lengths.draw(STEPS * effective, recipe.run.seed), recipe.data.max_length)
    if algorithm.online is not None:
        spare = recipe.rollouts.max_new_tokens
        prompts = [
            Prompt(i, f"synthetic:{i + 1}", 0, np.zeros(max(1, n - spare), np.int64), None, {})
            for i, n in enumerate(drawn.tolist())
        ]
        groups = tuple(longest_rollouts(p, recipe, algorithm) for p in prompts)
        drawn = np.array([len(p.ids) + spare for p in prompts])
    else:
        groups = tuple(_group(i, n, algorithm) for i, n in enumerate(drawn.tolist()))
    count = len(groups)
    return PlanInput(
        tokenizer=None,
        loaded=LoadedRows((), (), (count,), (1.0,), ("synthetic lengths",), (str(lengths),), ""),
        report=EncodingReport(count, count, 0, 0, (), 0, tuple(drawn.tolist())),
        groups=groups,
        batches=Batches(groups, Order([count], [1.0], recipe.run.seed), effective, recipe.data.remainder),
    )


def _group(index: int, length: int, algorithm: AlgorithmSpec) -> SequenceGroup:
    """A group of `length` tokens per sequence, half of them the prompt."""
    prompt, answer = np.zeros(length // 2, np.int64), np.zeros(length - length // 2, np.int64)
    return SequenceGroup(
        index, prompt, (Branch(answer, np.ones(len(answer), np.bool_)),) * algorithm.branches, 0
    )
