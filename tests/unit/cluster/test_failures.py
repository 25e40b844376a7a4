"""What a user reads about a worker's failure, whether another attempt can cure it, and how many attempts
there are."""

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from safetensors import SafetensorError

from orchestrator.cluster.deadlines import Restarts
from orchestrator.cluster.failures import ErrorRecord, RemoteError, learner_failure, reports_errors, translate
from orchestrator.core.errors import (
    ConfigError,
    Exit,
    MissingInput,
    OrchestratorError,
    OutOfMemory,
    OutputError,
    WorkerFailed,
    WorkerLost,
)


def raised(cause: Exception) -> RayTaskError:
    """As Ray delivers it: of a RemoteError only what survives pickling."""
    return RayTaskError("verb", "Traceback …", pickle.loads(pickle.dumps(cause)))


@reports_errors
class Actor:
    """Takes the place of an actor's class: the decorator is what is tested."""

    def verb(self, error: Exception) -> None:
        raise error


def through_actor(error: Exception) -> RayTaskError:
    """As Ray delivers it from a method of an actor."""
    with pytest.raises((RemoteError, OrchestratorError)) as caught:
        Actor().verb(error)
    return raised(caught.value)


WAYS = pytest.mark.parametrize("way", [raised, through_actor])
FULL = OSError(errno.ENOSPC, "No space left on device")
AWAY = OSError(errno.ESTALE, "Stale file handle")


@WAYS
@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize(
    "verb", ["build", "optim_step", "token_logprobs", "evaluate", "export", "generate", "save_state"]
)
def test_memory_that_ran_out_in_any_verb_leads_to_a_finer_cut_of_new_workers(
    way: Any, cause: Exception, verb: str
) -> None:
    failure = learner_failure(way(cause), "learner-1", verb)
    assert isinstance(failure, OutOfMemory) and not failure.in_place
    assert failure.what == f"learner-1 ran out of memory in `{verb}`"
    assert failure.why and "\n" not in failure.why


def test_a_micro_batch_that_did_not_fit_may_be_replayed_in_place() -> None:
    located = OutOfMemory("worker 1 ran out of memory in micro-batch 0", why="can't allocate memory")
    failure = learner_failure(raised(located), "learner-1", "forward_backward")
    assert isinstance(failure, OutOfMemory) and failure.in_place


@WAYS
def test_a_rollout_actor_that_runs_out_of_memory_does_not_cut_the_learners_step_finer(
    way: Any,
) -> None:
    failure = translate(way(torch.OutOfMemoryError("CUDA out of memory.")), "rollout-0", "roll_out")
    assert isinstance(failure, WorkerLost) and failure.repeats is not None, (
        "at the same place a second time it ends the run"
    )


@WAYS
@pytest.mark.parametrize(
    ("cause", "verb", "kind"),
    [
        (ValueError("GenerationConfig is invalid"), "export", WorkerFailed),
        (IndexError("index out of range in self"), "forward_backward", WorkerFailed),
        (AttributeError("no attribute 'pad_token_id'"), "build", WorkerFailed),
        (KeyError("gloo"), "forward_backward", WorkerFailed),
        (ValueError("NCCL is not a legal value"), "forward_backward", WorkerFailed),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "forward_backward", WorkerFailed),
        (OSError("the reward's own"), "roll_out", WorkerFailed),
        (ModuleNotFoundError("No module named 'bitsandbytes'"), "build", ConfigError),
        (SafetensorError("Error while deserializing header: incomplete metadata"), "build", MissingInput),
        (FileNotFoundError(2, "No such file"), "build_reference", MissingInput),
        (FULL, "export", OutputError),
        (FULL, "save_state", OutputError),
        (AWAY, "build", WorkerLost),
        (ConnectionResetError("reset by peer"), "build", WorkerLost),
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:5"),
            "forward_backward",
            WorkerLost,
        ),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), "optim_step", WorkerLost),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            "forward_backward",
            WorkerLost,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), "forward_backward", WorkerLost),
    ],
    ids=lambda v: (
        v
        if isinstance(v, str)
        else f"{type(v).__name__}-{v}"[:40]
        if isinstance(v, Exception)
        else v.__name__
    ),
)
def test_only_what_another_attempt_can_cure_is_a_lost_worker(
    way: Any, cause: Exception, verb: str, kind: type[OrchestratorError]
) -> None:
    failure = learner_failure(way(cause), "learner-1", verb)
    assert type(failure) is kind
    assert (failure.exit_code == Exit.RESUMABLE) == (kind is WorkerLost)
    assert failure.what.startswith(f"learner-1 failed in `{verb}`: {type(cause).__name__}") and failure.fix


def test_the_message_names_the_place_in_our_code_and_in_the_library(tmp_path: Path) -> None:
    library = tmp_path / "site-packages" / "lib.py"
    library.parent.mkdir()
    library.write_text("def deep():\n    raise ValueError('\\x1b[36mno\\x1b[39m\\nmore lines')\n")
    space: dict[str, Any] = {}
    exec(compile(library.read_text(), str(library), "exec"), space)
    ours = "\n" * 11 + "def export(f):\n    f()\n"
    exec(compile(ours, "/somewhere/orchestrator/models/export.py", "exec"), space)

    class Exporter:
        def export(self) -> None:
            space["export"](space["deep"])

    with pytest.raises(RemoteError) as caught:
        reports_errors(Exporter)().export()
    failure = translate(raised(caught.value), "learner-0", "export")
    assert failure.what == "learner-0 failed in `export`: ValueError: no more lines"
    assert failure.why == "raised at lib.py:2 in deep, called at orchestrator/models/export.py:13 in export"
    assert "\x1b" not in str(failure)


def test_an_exception_that_cannot_be_pickled_arrives_as_what_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Odd(ValueError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    failure = translate(through_actor(Odd(1, 2)), "rollout-0", "roll_out")
    assert isinstance(failure, WorkerFailed) and "Odd: 1 and 2" in failure.what
    assert "Traceback" in capfd.readouterr().err, "the whole traceback is in the actor's log"


def test_an_exception_of_a_method_that_another_one_called_arrives_as_what_it_was() -> None:
    @reports_errors
    class Nested:
        def do(self) -> None:
            self.save_state()

        def save_state(self) -> None:
            raise FULL

    with pytest.raises(RemoteError) as caught:
        Nested().do()
    assert (caught.value.record.kinds[0], caught.value.record.errno) == ("OSError", errno.ENOSPC)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ObjectLostError("00" * 28, None, "")], ids=lambda e: type(e).__name__
)
def test_a_death_is_a_lost_worker_with_no_cause_known(error: Exception) -> None:
    failure = learner_failure(error, "learner-1", "evaluate")
    assert isinstance(failure, WorkerLost) and failure.repeats is None


def test_what_an_actor_lost_with_another_process_is_a_lost_worker() -> None:
    assert isinstance(
        learner_failure(raised(ObjectLostError("00" * 28, None, "")), "rollout-1", "load"), WorkerLost
    )


def test_an_exception_while_an_actor_starts_is_read_from_its_text() -> None:
    text = (
        'an error raised in its creation task, \x1b[36mray::A.__init__()\x1b[39m\n  File "/x/a.py", line '
        "7, in __init__\nValueError: init bad"
    )
    record = ErrorRecord.parse(text)
    assert (
        record is not None
        and record.shown == "ValueError: init bad"
        and record.where.endswith("a.py:7 in __init__")
    )
    assert ErrorRecord.parse("The actor died unexpectedly before finishing this task.") is None


def test_a_message_for_the_user_stays_what_it_was() -> None:
    assert isinstance(
        learner_failure(through_actor(ConfigError("no such loss")), "learner-1", "build"), ConfigError
    )


def test_the_same_failure_has_the_same_name_and_another_place_another_one() -> None:
    one, again = (
        translate(through_actor(RuntimeError("CUDA error: x")), "learner-0", "evaluate") for _ in range(2)
    )
    other = translate(through_actor(RuntimeError("CUDA error: x")), "learner-0", "export")
    assert isinstance(one, WorkerLost) and isinstance(again, WorkerLost) and isinstance(other, WorkerLost)
    assert one.repeats == again.repeats != other.repeats


def test_restarts_count_within_an_hour_or_while_nothing_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def counts(hours: float, marks: list[int]) -> list[int]:
        restarts, counted = Restarts(3), []
        for mark in marks:
            clock[0] += hours * 3600
            counted.append(restarts.add(mark))
        return counted

    assert counts(0.1, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert counts(2.0, [1, 2, 3, 4]) == [1, 1, 1, 1], "a long run may lose a host now and then"
    assert counts(2.0, [7, 7, 7, 7]) == [1, 2, 3, 4], "a loop ends however slow it is"
