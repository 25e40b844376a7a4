"""Stage 0: can this host run the program at all?"""

import importlib
import os
import pkgutil
import subprocess
import sys

import torch

from gpu_stages.bench import Bench, first_line
from gpu_stages.device import copy_rate, matmul_flops, seconds

LIBRARIES = ("accelerate", "datasets", "deepspeed", "peft", "ray", "safetensors", "trl")


def run(bench: Bench) -> None:
    device = torch.device(bench.device)
    with bench.attempt("versions"):
        bench.note("versions", versions(device))
    with bench.attempt("ceilings"):
        bench.note(
            "*ceilings",
            f"matrix product {matmul_flops(device) / 1e12:.3g} TFLOP/s, copy {copy_rate(device) / 1e9:.0f} "
            "GB/s",
        )
    with bench.attempt("imports"):
        broken = broken_imports()
        bench.holds("modules that do not import", not broken, "; ".join(broken) or "0", "0")
    with bench.attempt("plan tiny/dpo"):
        plan(bench)
    with bench.attempt("one FlexAttention, compiled"):
        bench.note(
            "first compilation of FlexAttention", f"{compile_flex(device):.1f} s for forward and backward"
        )
        bench.holds("FlexAttention compiles, forward and backward", True, "yes", "yes")


def versions(device: torch.device) -> str:
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    names = (
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "deepspeed",
        "ray",
        "trl",
        "peft",
        "vllm",
        "flash-attn",
        "kernels",
    )
    text = f"Python {sys.version.split()[0]}, " + ", ".join(map(of, names))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        text += (
            f", CUDA {torch.version.cuda}, {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, "
            f"{torch.cuda.device_count()} GPUs"
        )
    return text


def broken_imports() -> list[str]:
    """Modules of this project and its libraries that cannot be imported, each with the reason."""
    import orchestrator

    modules = [
        m.name
        for m in pkgutil.walk_packages(orchestrator.__path__, "orchestrator.")
        if not m.name.endswith("__main__")
    ]
    broken = []
    for name in (*LIBRARIES, *modules):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a library raises: one message lists them all
            broken.append(f"{name}: {type(error).__name__}: {first_line(error)}")
    return broken


def plan(bench: Bench) -> None:
    """Checks that `plan tiny/dpo` ends with 0, in a process that sees every GPU of this host."""
    command = [sys.executable, "-m", "orchestrator", "plan", "tiny/dpo"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=bench.work, env={**os.environ, "COLUMNS": "200"}
    )
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    bench.holds(
        "plan tiny/dpo",
        done.returncode == 0,
        "exit 0" if done.returncode == 0 else f"exit {done.returncode}: {lines[-1][:150]}",
        "exit 0",
    )


def compile_flex(device: torch.device) -> float:
    """Seconds of the first compiled call with its backward. It needs a C compiler and Python.h on a GPU
    host."""
    from gpu_stages.pretend import compiled_flex

    flex = compiled_flex(device)
    q = torch.randn(1, 4, 512, 64, device=device, requires_grad=True)
    return seconds(lambda: flex(q, q, q).sum().backward(), device, 1, warm=False)
