"""What an actor sees of the machine: no GPU if it was given none, its own if it was given one, whoever
started Ray."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from orchestrator.cluster.actors import (
    ALLOCATOR,
    EXPANDABLE,
    ActorResources,
    actor_class,
    grow_segments,
    keep_to_share,
    worker_environment,
)
from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import ClusterRequirements
from orchestrator.cluster.doctor.survey import alive_nodes, probe_on, survey
from orchestrator.cluster.learner_actor import LearnerActor
from orchestrator.cluster.placement import Reservation
from orchestrator.cluster.reward_pool import RewardPool
from orchestrator.core.resources import NO_GPUS, WorkerGroup
from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.sandbox import Confinement
from tests.running import Sandbox

SEEN = (*NO_GPUS, *ALLOCATOR, "OMP_NUM_THREADS")


def looker() -> type:
    """A class that returns the variables its process was started with, and the GPUs that Ray gave it. It is
    made in a function, so that Ray sends it by value: its process need not import this module, and torch with
    it."""
    names = SEEN

    class Looker:
        def look(self) -> tuple[dict[str, str], list[Any]]:
            import os

            import ray

            return {name: os.environ[name] for name in names if name in os.environ}, ray.get_gpu_ids()

    return Looker


def seen(*_: object) -> dict[str, str]:
    """The same variables, of an actor of the program."""
    return {name: os.environ[name] for name in SEEN if name in os.environ}


@pytest.fixture(scope="module", params=["0", pytest.param("1", marks=pytest.mark.slow)])
def gpu_node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray that others started on a node with a GPU and six CPUs, whose processes see that GPU; once with
    Ray's older default of hiding GPUs itself. The driver sees the GPU too."""
    sandbox = Sandbox(tmp_path_factory.mktemp("gpu"))
    variables = {"CUDA_VISIBLE_DEVICES": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": request.param}
    with pytest.MonkeyPatch.context() as patch:
        home = {"HOME": str(Path.home())}  # see tests/running.py
        for name, value in (sandbox.environment() | home | variables).items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 6,
                "num_gpus": 1,
                "object_store_memory": 80 * 2**20,
                "include_dashboard": False,
            },
        )
        try:
            patch.setenv("RAY_ADDRESS", cluster.address)
            ray.init(address=cluster.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()
            sandbox.close()


def look(resources: ActorResources) -> tuple[Mapping[str, str], list[Any]]:
    actor = actor_class(looker(), resources).remote()
    try:
        return ray.get(actor.look.remote(), timeout=60)
    finally:
        ray.kill(actor)


def test_without_a_gpu_an_actor_sees_none_and_with_one_it_sees_its_own(gpu_node: None) -> None:
    control = ray.remote(looker()).options(num_cpus=0).remote()
    inherited, _ = ray.get(control.look.remote(), timeout=60)
    ray.kill(control)
    if os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0":
        assert inherited["CUDA_VISIBLE_DEVICES"] == "0", (
            "Ray alone hides nothing: else the test would not notice an actor that was forgotten"
        )
    variables, ids = look(ActorResources(cpus=0, gpus=0))
    assert ids == [] and {name: variables[name] for name in NO_GPUS} == NO_GPUS
    for gpus in (1, 0.5):
        variables, ids = look(ActorResources(cpus=0, gpus=gpus))
        assert [str(i) for i in ids] == ["0"] and variables["CUDA_VISIBLE_DEVICES"] == "0"


def test_probes_and_reward_functions_see_none(gpu_node: None, tmp_path: Path) -> None:
    (node,) = alive_nodes()
    probe = probe_on(node.id, 0).remote(node.name)
    assert ray.get(probe.__ray_call__.remote(seen), timeout=60)["CUDA_VISIBLE_DEVICES"] == ""
    ray.kill(probe)
    (tmp_path / "mine.py").write_text("def zero(completions, **_):\n    return [0.0] * len(completions)\n")
    zero = f"{tmp_path}/mine.py:zero"
    function = RewardFunction(name="mine", function=zero)  # pyright: ignore[reportCallIssue]
    rewards = Rewards(functions=[function])  # pyright: ignore[reportCallIssue]
    with RewardPool(rewards, model_for_tokenizer=None, logs=tmp_path) as pool:
        assert (
            ray.get(pool.actors[0].actor.__ray_call__.remote(seen), timeout=60)["CUDA_VISIBLE_DEVICES"] == ""
        )
    assert Confinement.of(rewards, os.environ, None).environment.items() >= NO_GPUS.items(), (
        "the process of the function sees none either"
    )


def test_a_learner_on_a_gpu_has_its_share_of_the_nodes_threads(gpu_node: None) -> None:
    reservation = Reservation.reserve(WorkerGroup("learners", 1, 2, 1), 30)
    try:
        assert [reservation.threads(0, 2, gpus) for gpus in (1, 0.5, 0.1, 0)] == [6, 3, 2, 2]
        for gpus in (1, 0):
            threads = reservation.threads(0, 2, gpus)
            resources = ActorResources(2, gpus, threads, expandable=gpus > 0)
            actor = reservation.start(
                LearnerActor, 0, 0, None, resources, name="learner-0", resources=resources
            )
            variables = ray.get(actor.call.remote(seen), timeout=90)
            ray.kill(actor)
            assert variables["OMP_NUM_THREADS"] == str(threads)
            assert variables["CUDA_VISIBLE_DEVICES"] == ("0" if gpus else "")
            assert variables.get("PYTORCH_ALLOC_CONF") == (EXPANDABLE if gpus else None)
    finally:
        reservation.release()


def test_every_gpu_that_ray_counts_is_tried_and_one_that_does_not_compute_is_a_finding(
    gpu_node: None,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    facts = survey(None, (), (), gpus=True)
    ((device, problem),) = [(k.device, k.problem) for n in facts.nodes for k in n.kernels]
    assert device == "GPU 0" and problem is not None and problem.startswith("no kernel runs: ")
    (finding,) = [
        f
        for f in check_cluster(facts, ClusterRequirements((WorkerGroup("learners", 1, 1, 1),)))
        if f.check == "kernels"
    ]
    assert finding.level == "error" and finding.fix
    assert survey(None, (), (), gpus=False).nodes[0].kernels == ()


@pytest.mark.gpu
def test_a_learner_with_a_part_of_a_gpu_cannot_take_more() -> None:
    memory = torch.cuda.get_device_properties(0).total_memory
    keep_to_share(torch.device("cuda"), 0.1)
    try:
        torch.empty(int(0.05 * memory), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * memory), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_allocator_that_the_user_set_up_stays_as_it_is() -> None:
    assert grow_segments({}) == {"PYTORCH_ALLOC_CONF": EXPANDABLE}
    for name in ALLOCATOR:
        assert grow_segments({name: "max_split_size_mb:128"}) == {}


def test_planned_faults_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FAULTS", "[]")
    assert worker_environment(ActorResources(1, 1))["ORCHESTRATOR_FAULTS"] == "[]"
