"""Where workers live: a local or existing Ray cluster, and one placement group per worker group."""

import os
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.config import Learners
from orchestrator.errors import NotEnoughResources

OBJECT_STORE_BYTES = 256 * 1024 * 1024


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), or starts a local Ray without a dashboard."""
    if ray.is_initialized():
        return
    with _own_signals():
        _init()


def _init() -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
        **quiet,
    )
    _protect_token()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's handlers: Ray puts its crash handler in their place, and SIGTERM would abort the run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)


def _protect_token() -> None:
    """Ray writes its token with the umask's mode; only the owner may read it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


@dataclass(frozen=True, slots=True)
class Placement:
    """The reserved resources of one worker group: a bundle per rank."""

    group: PlacementGroup
    bundle: Mapping[str, float]

    @classmethod
    def reserve(cls, learners: Learners) -> "Placement":
        """Reserves a bundle per worker; NotEnoughResources at once when the cluster cannot hold them."""
        connect()
        bundle = _bundle(learners)
        _check_capacity(learners.workers, bundle, ray.cluster_resources())
        group = placement_group([dict(bundle)] * learners.workers, strategy="PACK")
        try:
            ray.get(group.ready(), timeout=learners.start_timeout_s)
        except GetTimeoutError:
            remove_placement_group(group)
            raise NotEnoughResources(
                f"{learners.workers} workers x {_words(bundle)} were not free within {learners.start_timeout_s:.0f} s",
                why=f"free now: {_words(_of_interest(ray.available_resources(), bundle))}",
                fix="wait for the other jobs, ask for fewer learners.workers, or raise learners.start_timeout_s",
            ) from None
        return cls(group, bundle)

    def actor(self, kind: type, rank: int, *, name: str, environment: Mapping[str, str]) -> Any:
        """A remote class bound to the bundle of `rank`; call .remote(...) on it."""
        return ray.remote(kind).options(
            num_cpus=self.bundle["CPU"],
            num_gpus=self.bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
            runtime_env={"env_vars": dict(environment)},
            max_restarts=0,
            max_concurrency=1,
        )

    def release(self) -> None:
        remove_placement_group(self.group)


def check_capacity(learners: Learners) -> None:
    """NotEnoughResources where the cluster cannot hold the workers; told before Ray starts where that is this machine."""
    bundle = _bundle(learners)
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _check_capacity(learners.workers, bundle, {"CPU": float(os.cpu_count() or 1), "GPU": _visible_gpus(bundle)})
        return
    connect()
    _check_capacity(learners.workers, bundle, ray.cluster_resources())


def _bundle(learners: Learners) -> dict[str, float]:
    bundle = {"CPU": learners.cpus_per_worker}
    if learners.gpus_per_worker:
        bundle["GPU"] = learners.gpus_per_worker
    return bundle


def _visible_gpus(bundle: Mapping[str, float]) -> float:
    if "GPU" not in bundle:
        return 0.0
    import torch

    return float(torch.cuda.device_count())


def _check_capacity(workers: int, bundle: Mapping[str, float], total: Mapping[str, float]) -> None:
    for resource, each in bundle.items():
        has = total.get(resource, 0.0)
        if has < workers * each:
            raise NotEnoughResources(
                f"the cluster has {has:g} {resource}s, {workers} workers x {each:g} need {workers * each:g}",
                fix=f"set learners.workers to {int(has // each)} or fewer"
                + (f", or learners.cpus_per_worker={has / workers:.2g}" if resource == "CPU" and has else ""),
            )


def _of_interest(resources: Mapping[str, float], bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in bundle}


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
