"""Deadlines in numbers: a verb that moves state has the time that its bytes take, and NCCL gives up after the
driver."""

from orchestrator.cluster.deadlines import COLLECTIVE_GRACE_S, Deadlines


def test_only_verbs_that_move_state_have_time_for_its_bytes() -> None:
    large = Deadlines(start_s=180, verb_s=600, parameters=70_000_000_000)
    assert large.of("forward_backward") == large.of("discard") == 600
    assert large.of("save_state") == large.of("load_state") == 600 + 840e9 / 100e6
    assert large.of("build") == large.of("export") == large.of("put_buckets") == 600 + 280e9 / 100e6
    assert Deadlines(180, 600).of("save_state") == 600


def test_collectives_give_up_after_every_deadline_of_the_driver() -> None:
    for deadlines in (Deadlines(180, 600, 70_000_000_000), Deadlines(180, 600), Deadlines(900, 60)):
        assert (
            deadlines.collective_s == max(deadlines.start_s, deadlines.of("save_state")) + COLLECTIVE_GRACE_S
        )
