"""The device of a stage: synchronisation, best rates, memory."""

import gc
import time
from collections.abc import Callable

import torch


def settle(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    work: Callable[[], object], device: torch.device, repeats: int = 3, *, warm: bool = True
) -> float:
    """Seconds of the quickest repetition, after one that is not counted."""
    if warm:
        work()
    best = float("inf")
    for _ in range(repeats):
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        best = min(best, time.perf_counter() - started)
    return best


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a square matrix product: bf16 and 8192 wide on a GPU, fp32 and 1024 wide on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / seconds(lambda: a @ a, device)


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU is relative to: the data sheet's dense bf16 rate (TRL's table), or the measured matrix
    product if the card is not in the table."""
    if device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        sheet = get_peak_flops(torch.cuda.get_device_name(device), "bfloat16")
        if sheet is not None:
            return sheet
    return matmul_flops(device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy within the device reads and writes."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / seconds(lambda: target.copy_(source), device)


def release(device: torch.device) -> None:
    """Frees what dead engines and tracebacks held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reserved(device: torch.device) -> int:
    """Most bytes that the allocator has reserved on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
