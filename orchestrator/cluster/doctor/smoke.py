"""Does a GPU compute? One small product on it, compared with the CPU's: what a driver, a build of torch or a
broken card gets wrong."""

import json
import os
import subprocess
import sys

import torch

from orchestrator.cluster.doctor.facts import Kernel

SIDE = 256
PATIENCE_S = 120.0
"""For a process that imports torch and wakes every GPU of a node."""


def trouble_on(device: torch.device) -> str | None:
    """Why a product of two matrices on the device is not what it is on the CPU; None where it is. The numbers
    are small integers, so that every order of adding and every precision gives the same bits."""
    one = (torch.arange(SIDE * SIDE) % 7 - 3).view(SIDE, SIDE)
    other = (torch.arange(SIDE * SIDE) % 5 - 2).view(SIDE, SIDE)
    try:
        found = (one.float().to(device) @ other.float().to(device)).cpu()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no such device, no kernel for it, or torch was built without it
        return f"no kernel runs: {str(error).strip().splitlines()[0]}"
    wrong = int((found != (one @ other).float()).sum())
    return f"{wrong} of {SIDE * SIDE} numbers of a product are wrong" if wrong else None


def all_here() -> list[Kernel]:
    """One product on each GPU that this process sees."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [Kernel("torch", f"it can use no GPU: {str(error).strip().splitlines()[0]}")]
    return [Kernel(f"GPU {i}", trouble_on(torch.device("cuda", i))) for i in range(torch.cuda.device_count())]


def in_a_process() -> tuple[Kernel, ...]:
    """all_here() in a process of its own, so that this one keeps no memory of a GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the user hides them
        return ()
    command = [sys.executable, "-m", "orchestrator.cluster.doctor.smoke"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    except subprocess.TimeoutExpired:
        return (Kernel("GPUs", f"no answer within {PATIENCE_S:.0f} s"),)
    except subprocess.CalledProcessError as error:  # killed by the driver, for example
        return (
            Kernel(
                "GPUs",
                (error.stderr.strip().splitlines() or [f"the process ended with {error.returncode}"])[-1],
            ),
        )
    return tuple(Kernel(device, trouble) for device, trouble in json.loads(said))


if __name__ == "__main__":
    print(json.dumps([[kernel.device, kernel.trouble] for kernel in all_here()]))
