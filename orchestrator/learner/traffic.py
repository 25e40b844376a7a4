"""Counts the bytes that a rank sends through collectives, to compare them with the plan's prediction."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_SMALL = 256
"""Largest collective in bytes that is not counted: norms, overflow flags and the like. The weights of a tiny
model's norms, which form a separate group for the decay, are larger."""


class CollectiveCounter:
    """Counts bytes of gradient reductions and parameter gathers on DeepSpeed's communication backend."""

    def __init__(self) -> None:
        self.reduced = 0
        self.gathered = 0

    @classmethod
    def install(cls, backend: Any) -> "CollectiveCounter":
        """The counter of this process's DeepSpeed backend. The first call wraps the backend's methods."""
        existing = getattr(backend, "_orchestrator_counter", None)
        if existing is not None:
            return existing
        counter = cls()
        backend.all_reduce = counter._counted(backend.all_reduce, 0, "reduced")
        backend.reduce = counter._counted(backend.reduce, 0, "reduced")
        backend.reduce_scatter_function = counter._counted(backend.reduce_scatter_function, 1, "reduced")
        backend.all_gather_function = counter._counted(backend.all_gather_function, 0, "gathered")
        backend._orchestrator_counter = counter
        return counter

    def take(self) -> tuple[int, int]:
        """(reduced, gathered) bytes since the last call."""
        counts = (self.reduced, self.gathered)
        self.reduced = self.gathered = 0
        return counts

    def _counted(self, function: Callable[..., Any], position: int, kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else list(kwargs.values())[position - len(args)]
            if isinstance(tensor, Tensor):
                size = tensor.numel() * tensor.element_size()
                if size > _SMALL:
                    setattr(self, kind, getattr(self, kind) + size)
            return function(*args, **kwargs)

        return counted
