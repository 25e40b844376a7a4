"""Memory of this process's device: peak, current use, total, and errors of allocators.

On a CPU, resident bytes come from Linux's /proc. Without /proc (macOS) both peak and current are the highest
resident size since the process began. Nothing can reset that: it is an upper bound.
"""

import gc
import os
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement, if the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # resets VmHWM, the kernel's resident high-water mark


def peak_bytes(device: torch.device) -> int:
    """Most memory in use since reset_peak(): allocated bytes on a GPU, resident bytes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def current_bytes(device: torch.device) -> int:
    """Memory in use now: allocated bytes on a GPU, resident bytes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def device_bytes(device: torch.device, workers_here: int) -> int:
    """Memory this worker may use: the GPU's, or its share of the machine's RAM."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // workers_here


def _resident(key: str) -> int:
    if not _STATUS.exists():
        return highest_resident()
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {key}")


def highest_resident() -> int:
    """Most resident bytes of this process since it began, on any Unix."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finish(device: torch.device) -> None:
    """Waits until the device has done all queued work. A CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """Frees dead reference cycles, and returns the allocator's unused blocks to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's allocator, the CPU's, or a library that allocates beside torch ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in _SIGNS
    )


_SIGNS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
)
