"""orchestrator: aligns language models with an effective batch that no hardware can change.

The public names are listed here and documented in docs/python.md. Each is imported when it is first used, so
that `import orchestrator` loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.algorithms.losses.advantages import Episodes as Episodes
    from orchestrator.algorithms.losses.interface import LossSum as LossSum
    from orchestrator.algorithms.losses.interface import TokenScores as TokenScores
    from orchestrator.core.batches import LossUnits as LossUnits
    from orchestrator.core.errors import OrchestratorError as OrchestratorError
    from orchestrator.core.reports import EvaluationReport as EvaluationReport
    from orchestrator.core.reports import StepReport as StepReport
    from orchestrator.recipe.schema import Recipe as Recipe
    from orchestrator.run.api import load_recipe as load_recipe
    from orchestrator.run.api import train as train
    from orchestrator.run.session import Session as Session

__version__ = "0.1.0"

PUBLIC = {
    "Episodes": "algorithms.losses.advantages",
    "EvaluationReport": "core.reports",
    "LossSum": "algorithms.losses.interface",
    "LossUnits": "core.batches",
    "OrchestratorError": "core.errors",
    "Recipe": "recipe.schema",
    "Session": "run.session",
    "StepReport": "core.reports",
    "TokenScores": "algorithms.losses.interface",
    "load_recipe": "run.api",
    "train": "run.api",
}
"""Public name -> module that holds it."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
