"""Bases of the sections of a recipe, and patterns that several of them use."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.errors import ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of runs, stages and reward components."""
DURATION_PATTERN = r"^[0-9]*[1-9][0-9]*[smh]$"
"""Durations. Example: 90s, 10m, 1h."""
DURATIONS = {"s": 1.0, "m": 60.0, "h": 3600.0}
"""Seconds of the units of a duration."""

KeyPath = tuple[str | int, ...]
"""Path of a value in a recipe. Example: ("data", "eval", 0, "path")."""


class Section(BaseModel):
    """Part of a recipe. Unknown keys are errors, and values cannot be changed after loading."""

    # ser_json_inf_nan: a NaN among the options of a reward is written to the recipe file as a NaN
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


class Workers(Section):
    """Base of groups of workers whose number and GPUs a plan may decide."""

    workers: Annotated[int, Field(ge=1)] | Literal["auto"]
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"]

    @property
    def count(self) -> int:
        """Number of workers. Raises ConfigError for `auto`, which only a plan replaces by a number."""
        if self.workers == "auto":
            raise self._not_planned("workers")
        return self.workers

    @property
    def gpus(self) -> float:
        """GPUs of each worker. Raises ConfigError for `auto`, as `count` does."""
        if self.gpus_per_worker == "auto":
            raise self._not_planned("gpus_per_worker")
        return self.gpus_per_worker

    def _not_planned(self, key: str) -> ConfigError:
        name = f"{type(self).__name__.lower()}.{key}"
        return ConfigError(
            f"{name} is auto",
            why="only a plan replaces auto by a number, and this recipe has not been planned",
            fix=f"set {name} to a number, or plan the recipe first",
        )
