"""Settings of every test: no network, one thread per process, property tests without time limits."""

import atexit
import os
import shutil
import tempfile

# Set before torch, ray or wandb are imported: they read these variables once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# the user's cache of measurements stays out of the tests
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

SHAPED = ("orchestrator.algorithms.losses", "orchestrator.models.attention", "orchestrator.models.rows")
"""Modules whose annotated shapes are checked at each call, in pytest's own process. Not those whose functions
run under torch.compile or are computed again in the backward."""
install_import_hook(SHAPED, "beartype.beartype")  # before any of them is imported

settings.register_profile("orchestrator", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("orchestrator")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
