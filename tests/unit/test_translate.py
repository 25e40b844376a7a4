"""What a user reads of a worker's failure, and whether it is one of memory."""

import pickle

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError

from orchestrator.cluster.workers import learner_failure, translate
from orchestrator.errors import ConfigError, OutOfMemory, WorkerLost


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("verb", "Traceback …", pickle.loads(pickle.dumps(cause)))


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("verb", ["build", "optim_step", "token_logprobs", "evaluate", "export", "generate", "save_state"])
def test_memory_that_ran_out_in_any_verb_leads_to_a_finer_cut_of_new_workers(cause, verb):
    failure = learner_failure(raised(cause), "learner-1", verb)
    assert isinstance(failure, OutOfMemory) and not failure.in_place
    assert failure.what == f"learner-1 ran out of memory in `{verb}`"
    assert failure.why and "\n" not in failure.why


def test_a_micro_batch_that_did_not_fit_may_be_replayed_in_place():
    located = OutOfMemory("worker 1 ran out of memory in micro-batch 0", why="can't allocate memory")
    failure = learner_failure(raised(located), "learner-1", "forward_backward")
    assert isinstance(failure, OutOfMemory) and failure.in_place


def test_a_rollout_actor_that_runs_out_of_memory_is_no_reason_to_cut_the_learners_step_finer():
    assert isinstance(translate(raised(torch.OutOfMemoryError("CUDA out of memory.")), "rollout-0", "roll_out"), WorkerLost)


@pytest.mark.parametrize("error", [raised(ValueError("a bug")), ActorDiedError()])
def test_other_failures_are_lost_workers(error):
    assert isinstance(learner_failure(error, "learner-1", "evaluate"), WorkerLost)


def test_a_message_for_the_user_stays_what_it_was():
    assert isinstance(learner_failure(raised(ConfigError("no such loss")), "learner-1", "build"), ConfigError)
