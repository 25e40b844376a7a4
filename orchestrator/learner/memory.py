"""Peak memory of this process's device, measured the way each device allows."""

import os
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the kernel's resident high-water mark


def peak_bytes(device: torch.device) -> int:
    """Highest memory in use since reset_peak(): allocated bytes on a GPU, resident bytes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def current_bytes(device: torch.device) -> int:
    """Memory in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def device_bytes(device: torch.device, workers_here: int) -> int:
    """Memory this worker may use: the GPU's, or its share of the machine's RAM."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // workers_here


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def is_out_of_memory(error: BaseException) -> bool:
    """True for a GPU's or the CPU allocator's out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
