"""Resident memory of this process, with and without /proc."""

import gc
import subprocess
import sys

import pytest
import torch

from orchestrator.learner import memory

CPU = torch.device("cpu")
MB = 1_000_000


def test_the_peak_includes_freed_memory_until_it_is_reset():
    memory.reset_peak(CPU)
    before = memory.current_bytes(CPU)
    block = torch.ones(50 * MB)
    assert memory.current_bytes(CPU) - before > 190 * MB
    del block
    gc.collect()
    assert memory.peak_bytes(CPU) - before > 190 * MB
    assert memory.current_bytes(CPU) - before < 50 * MB
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) - before < 50 * MB


WITHOUT_PROC = """
from pathlib import Path
import torch
from orchestrator.learner import memory
cpu = torch.device("cpu")
block = torch.ones(50_000_000)
by_proc = memory.peak_bytes(cpu)
assert by_proc > 200_000_000
memory._STATUS = memory._CLEAR_REFS = Path("/nowhere/at/all")
highest = memory.peak_bytes(cpu)
assert highest > by_proc - 5_000_000  # a process may also count its parent's memory from before the exec
del block
memory.reset_peak(cpu)
assert memory.peak_bytes(cpu) >= highest
assert memory.current_bytes(cpu) == memory.peak_bytes(cpu)
"""


def test_without_proc_peak_and_current_are_the_highest_size_since_the_start():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PROC], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_worker_has_its_share_of_the_machine():
    assert memory.device_bytes(CPU, 4) == memory.device_bytes(CPU, 1) // 4


def test_out_of_memory_is_distinguished_from_other_errors():
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(allocator.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not memory.is_out_of_memory(ValueError("memory"))
