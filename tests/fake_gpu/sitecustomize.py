"""On PYTHONPATH, this makes every Python process, Ray's workers too, believe that its machine has a GPU:
torch.cuda.is_available() is true.

FAKE_GPU_FOR=NAME tells it only to modules whose name starts with NAME; the others are told the truth.
"""

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

ONLY = os.environ.get("FAKE_GPU_FOR", "")


class _Patching(importlib.abc.MetaPathFinder):
    """Lets torch.cuda be imported as ever, then replaces its is_available."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            truth = module.is_available
            module.is_available = lambda: (
                True if sys._getframe(1).f_globals.get("__name__", "").startswith(ONLY) else truth()
            )  # type: ignore[attr-defined]

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Patching())
