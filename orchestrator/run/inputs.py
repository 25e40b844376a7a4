"""A recipe's rows and prompts, encoded by its own model's tokenizer."""

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.data.dataset import DataSet, load_data
from orchestrator.data.prompts import PromptSet, load_prompts
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.schema import Recipe
from orchestrator.rollout.rewards.columns import columns_read


def read_data(recipe: Recipe, algorithm: AlgorithmSpec) -> DataSet:
    """Rows of an offline recipe."""
    return load_data(recipe, algorithm, load_tokenizer)


def read_prompts(recipe: Recipe, algorithm: AlgorithmSpec) -> PromptSet:
    """Prompts of an online recipe."""
    return load_prompts(recipe, algorithm, load_tokenizer, columns_read(recipe.rewards))
