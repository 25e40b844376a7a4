"""The counter against a backend that records its arguments."""

import torch

from orchestrator.learner.traffic import CollectiveCounter


class Backend:
    """The four collectives of DeepSpeed's backend that move gradients and parameters, with the same parameter
    names."""

    def __init__(self) -> None:
        self.calls = []

    def all_reduce(self, tensor, op=None, group=None, async_op=False):
        self.calls.append(("all_reduce", tensor, async_op))
        return "work"

    def reduce(self, tensor, dst, op=None, group=None, async_op=False):
        self.calls.append(("reduce", tensor, dst))

    def reduce_scatter_function(self, output_tensor, input_tensor, op=None, group=None, async_op=False):
        self.calls.append(("reduce_scatter", output_tensor, input_tensor))

    def all_gather_function(self, output_tensor, input_tensor, group=None, async_op=False):
        self.calls.append(("all_gather", output_tensor, input_tensor))


def test_counts_bytes_by_kind_and_starts_again_after_take():
    backend = Backend()
    counter = CollectiveCounter.install(backend)
    whole, half = torch.zeros(1000), torch.zeros(500)
    backend.all_reduce(whole)
    backend.reduce(tensor=half, dst=0)
    backend.reduce_scatter_function(half, whole)
    backend.all_gather_function(whole, half)
    backend.all_gather_function(output_tensor=whole.bfloat16(), input_tensor=half)
    assert counter.take() == (4000 + 2000 + 4000, 4000 + 2000)
    assert counter.take() == (0, 0)


def test_collectives_still_happen_with_their_arguments_and_results():
    backend = Backend()
    CollectiveCounter.install(backend)
    tensor = torch.zeros(1000)
    assert backend.all_reduce(tensor, async_op=True) == "work"
    assert (
        backend.calls[0][0] == "all_reduce" and backend.calls[0][1] is tensor and backend.calls[0][2] is True
    )


def test_flags_and_norms_are_not_traffic():
    backend = Backend()
    counter = CollectiveCounter.install(backend)
    backend.all_reduce(torch.zeros(64))
    assert counter.take() == (0, 0)
    backend.all_reduce(torch.zeros(65))
    assert counter.take() == (260, 0)


def test_installed_twice_counts_once():
    backend = Backend()
    counter = CollectiveCounter.install(backend)
    assert CollectiveCounter.install(backend) is counter
    backend.all_reduce(torch.zeros(1000))
    assert counter.take() == (4000, 0)
