"""Room for workers is counted per machine, and known devices can be planned for without them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.capacity import check_totals
from orchestrator.cluster.doctor.facts import (
    AllReduce,
    ClusterFacts,
    Gpu,
    Limits,
    NodeCapacity,
    NodeFacts,
    SilentNode,
    of_cluster,
)
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.resources import WorkerGroup
from orchestrator.plan.hardware import DEVICES, Hardware, Machine, hypothetical_hardware

LEARNERS = WorkerGroup("learners", 0, 1.0, 1.0)


def test_a_worker_needs_its_share_on_one_machine() -> None:
    hardware = Hardware((Machine(16, 3, 1), Machine(16, 1, 1)))
    assert hardware.room_for(LEARNERS) == 4
    assert (
        hardware.room_for(WorkerGroup("learners", 0, 1.0, 2.0)) == 1
    )  # the third and the fourth GPU are on two machines
    assert hardware.room_for(WorkerGroup("learners", 0, 10.0, 1.0)) == 2


def test_shares_that_are_not_exact_in_binary_fit() -> None:
    tenths = WorkerGroup("learners", 3, 0.1, 0.0)
    assert tenths.fit(1.0, 0.0) == 10 and 1.0 // 0.1 == 9.0
    check_totals([tenths], {"CPU": 0.3})
    with pytest.raises(NotEnoughResources, match=r"the cluster has 0\.2 CPUs") as refused:
        check_totals([tenths], {"CPU": 0.2})
    assert refused.value.fix.startswith("set learners.workers=2")


def test_other_groups_take_their_place_first() -> None:
    hardware = hypothetical_hardware(2, "h100-80g")
    rollouts = WorkerGroup("rollouts", 4, 1.0, 1.0)
    assert hardware.room_for(LEARNERS, [rollouts]) == 12
    with pytest.raises(NotEnoughResources, match="17 rollouts") as refused:
        hardware.room_for(LEARNERS, [WorkerGroup("rollouts", 17, 1.0, 1.0)])
    assert "2 × 96 CPUs, 8 GPUs of 80.0 GB" in refused.value.why


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=4),
    st.integers(0, 6),
    st.sampled_from([(1.0, 0.0), (0.5, 0.25), (1.0, 1.0), (2.0, 2.0)]),
)
def test_what_has_room_fits(machines: list[tuple[int, int]], actors: int, each: tuple[float, float]) -> None:
    hardware = Hardware(tuple(Machine(cpus, gpus, 1) for cpus, gpus in machines))
    others = [WorkerGroup("rollouts", actors, 1.0, 0.0)]
    group = WorkerGroup("learners", 0, *each)
    if sum(cpus for cpus, _ in machines) < actors:
        with pytest.raises(NotEnoughResources):
            hardware.room_for(group, others)
        return
    room = hardware.room_for(group, others)
    assert room * each[0] + actors <= sum(cpus for cpus, _ in machines)
    assert room * each[1] <= sum(gpus for _, gpus in machines)
    assert room <= hardware.room_for(group)


def test_the_table_is_plausible_and_closed() -> None:
    assert all(
        int(name.rsplit("-", 1)[1].removesuffix("g")) * 10**9 == device.memory
        for name, device in DEVICES.items()
    )
    hardware = hypothetical_hardware(4, "H100-80G", network_gbit=400)
    assert (len(hardware.machines), hardware.gpu_memory, hardware.link) == (4, 80_000_000_000, 50e9)
    assert hypothetical_hardware(1, "a100-40g").link == 300e9
    with pytest.raises(ConfigError, match="h100-80g") as refused:
        hypothetical_hardware(1, "h100")
    assert "--address" in refused.value.fix


def test_a_cluster_is_planned_with_what_was_measured() -> None:
    def node(name: str, memory: int) -> NodeFacts:
        return NodeFacts(
            name,
            "10.0.0.1",
            {},
            (Gpu("H100", memory),),
            8,
            1,
            1,
            Limits(None, None, None),
            False,
            "eth0",
            (1, 2),
        )

    reduced = AllReduce("nccl", ("a", "b"), 1_000_000, 0.5)
    facts = ClusterFacts(
        (node("a", 80), node("b", 40)),
        (NodeCapacity("a", 4, 1), NodeCapacity("b", 8, 1), NodeCapacity("silent", 8, 8)),
        all_reduce=reduced,
    )
    hardware = of_cluster(facts)
    assert hardware.machines == (Machine(4, 1, 8, 80), Machine(8, 1, 8, 40))
    assert (hardware.gpu_memory, hardware.link, hardware.source) == (40, 2_000_000.0, "measured")


def test_a_cluster_of_which_no_node_answers_is_an_error() -> None:
    with pytest.raises(NotEnoughResources, match="no node of the cluster answered") as refused:
        of_cluster(
            ClusterFacts(
                (), (NodeCapacity("a", 4, 0),), silent=(SilentNode("a", "no answer to `now` within 90 s"),)
            )
        )
    assert refused.value.why == "a: no answer to `now` within 90 s"
