"""Checks that a GPU computes: a product of two matrices on it, compared with the CPU's. A wrong driver, a
wrong build of torch or a broken card fails it."""

import json
import os
import subprocess
import sys

import torch

from orchestrator.cluster.doctor.deadlines import GPU_CHECK_S
from orchestrator.cluster.doctor.facts import Kernel

SIDE = 256
"""Rows and columns of the matrices."""


def product_problem(device: torch.device) -> str | None:
    """Why a product of two matrices on the device is not what it is on the CPU; None if it is.

    The numbers are small integers, so every order of adding and every precision gives the same bits.
    """
    left = (torch.arange(SIDE * SIDE) % 7 - 3).view(SIDE, SIDE)
    right = (torch.arange(SIDE * SIDE) % 5 - 2).view(SIDE, SIDE)
    try:
        product = (left.float().to(device) @ right.float().to(device)).cpu()
    except (RuntimeError, AssertionError) as error:
        # no such device, no kernel for it, or torch was built without it
        return f"no kernel runs: {str(error).strip().splitlines()[0]}"
    wrong = int((product != (left @ right).float()).sum())
    return f"{wrong} of {SIDE * SIDE} numbers of a product are wrong" if wrong else None


def try_visible_gpus() -> list[Kernel]:
    """One product on each GPU that this process sees."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [Kernel("torch", f"it can use no GPU: {str(error).strip().splitlines()[0]}")]
    devices = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    return [Kernel(f"GPU {device.index}", product_problem(device)) for device in devices]


def try_gpus_in_child() -> tuple[Kernel, ...]:
    """try_visible_gpus() in a child process, so that this one keeps no memory of a GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the user hides them
        return ()
    command = [sys.executable, "-m", "orchestrator.cluster.doctor.smoke"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_CHECK_S, check=True)
    except subprocess.TimeoutExpired:
        return (Kernel("GPUs", f"no answer within {GPU_CHECK_S:.0f} s"),)
    except subprocess.CalledProcessError as error:  # killed by the driver, for example
        lines = error.stderr.strip().splitlines() or [f"the process ended with {error.returncode}"]
        return (Kernel("GPUs", lines[-1]),)
    return tuple(Kernel(device, problem) for device, problem in json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps([[kernel.device, kernel.problem] for kernel in try_visible_gpus()]))
