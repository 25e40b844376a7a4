"""A probe keeps listening when a client hangs up, a wrong product of a GPU is noticed, and the rates of all
network cards are added up."""

import os
import socket
import struct
import threading
from contextlib import closing
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from orchestrator.cluster.doctor.facts import Kernel, PairRate
from orchestrator.cluster.doctor.probe import Listener, connection_problem, serve_nonce
from orchestrator.cluster.doctor.smoke import product_problem, try_gpus_in_child, try_visible_gpus
from orchestrator.cluster.doctor.survey import pair_rates
from orchestrator.cluster.network import INTERFACES, use_interface_of


def test_a_client_that_hangs_up_does_not_end_the_listener() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    hasty = socket.create_connection(address)
    # so that closing resets the connection
    hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hasty.close()
    with closing(server):
        threading.Thread(target=serve_nonce, args=(server, b"nonce"), daemon=True).start()
        assert connection_problem(Listener("n", *address), b"nonce") is None
        assert connection_problem(Listener("n", *address), b"other") == "something else answers there"


class OneBadNumber(TorchFunctionMode):
    """A device whose products of floats have one number that is off by the last bit."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__) and result.is_floating_point():
            result[5, 7] = torch.nextafter(result[5, 7], torch.tensor(float("inf")))
        return result


def test_a_product_is_compared_to_the_last_bit() -> None:
    assert product_problem(torch.device("cpu")) is None
    with OneBadNumber():
        assert product_problem(torch.device("cpu")) == "1 of 65536 numbers of a product are wrong"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    problem = product_problem(torch.device("cuda"))
    assert problem is not None and problem.startswith("no kernel runs: ")
    (kernel,) = try_visible_gpus()
    assert kernel.problem is not None and kernel.problem.startswith("it can use no GPU: ")
    assert try_gpus_in_child() == (Kernel("torch", kernel.problem),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert try_gpus_in_child() == ()


def test_a_pair_of_nodes_sends_with_all_ranks_and_each_rank_as_the_slower_side_does() -> None:
    names = ("a 0", "a 1", "b 0", "b 1", "c 0", "c 1")
    rates = {
        "a 0": {1: 3.0, 2: 1.0},
        "a 1": {1: 4.0, 2: 1.0},
        "b 0": {0: 2.0, 2: 1.0},
        "b 1": {0: 5.0, 2: 1.0},
    }
    rates |= {"c 0": {0: 1.0, 1: 1.0}, "c 1": {0: 1.0, 1: 9.0}}
    assert pair_rates(names, ("a", "b", "c"), rates) == (
        PairRate("a", "b", 2.0 + 4.0),
        PairRate("a", "c", 2.0),
        PairRate("b", "c", 2.0),
    )
    assert pair_rates(names, ("a", "b", "c"), {}) == ()


def test_gloo_and_nccl_use_the_nodes_address_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in INTERFACES:
        monkeypatch.setenv(name, "mine")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    use_interface_of("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("mine", "=lo")
