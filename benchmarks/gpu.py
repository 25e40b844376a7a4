"""Checks a GPU host in one command: correct, as fast as planned, and faster than TRL's DPOTrainer.

It takes at most eight minutes on one H100 or H200.

    # a host with this project installed
    python benchmarks/gpu.py --out results.jsonl
    # a bare host: torch and transformers, no network
    python benchmarks/gpu.py --site gpu-site.tar.xz --only 0,1,2,4 --out results.jsonl
    # the rest, added to the same file
    python benchmarks/gpu.py --site gpu-site.tar.xz --only 3,5 --out results.jsonl
    # the table, into benchmarks/results.md
    python benchmarks/gpu.py --results results.jsonl
    # every stage at small sizes, on any machine
    python benchmarks/gpu.py --device cpu

`make gpu-archive` packs this repository and what a bare host lacks. A GPU host needs a C compiler for Triton,
and no nvcc.

    0 host       versions, ceilings, every module imports, a plan, one compiled FlexAttention
    1 attention  one row under block masks == padded rows: log-probs, gradients; the number of compilations;
                 the head against fp64
    2 steps      ZeRO 0 to 3, offload, discard, an out-of-memory error: the steps of a plain large batch
    3 cluster    Ray: GRPO with both decoders, every transport of weights, a killed worker
    4 speed      DPO at real shapes against TRL on the same pairs, memory against the plan, a GRPO step
    5 profiles   kernels, idle time, the head by chunk, FlexAttention against SDPA

Each part runs in a separate process. A part that fails or passes its deadline is reported in one line, and
the other parts continue. A deadline is the stage's budget and what the stages before it left over. Exit code
1 means that a check failed (on a GPU also: a speed was missed).
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_stages.bench import Bench, Ended, Machine, append, describe, read
from gpu_stages.table import failed, table, write_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.md"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the benchmark."""

    parts: dict[str, int]
    """Modules of gpu_stages, each run in its own process, with their shares of the time."""
    budget_s: float
    """Seconds of all parts on a GPU."""
    cpu_s: float = 300.0
    """Seconds of all parts on a CPU, however busy."""


STAGES = {
    0: Stage({"host": 1}, 50),
    1: Stage({"attention": 1}, 70),
    2: Stage({"steps": 1}, 80),
    3: Stage({"cluster": 1}, 90),
    4: Stage({"speed_ours": 4, "speed_trl": 4, "speed_grpo": 2}, 150),
    5: Stage({"profiles": 1}, 30),
}


def main() -> None:
    """Exits with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only",
        type=lambda text: [int(n) for n in text.split(",")],
        default=list(STAGES),
        help="stages, e.g. 0,1,2,4",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu.jsonl",
        help="file to append JSON lines to; logs are written beside it",
    )
    parser.add_argument(
        "--site",
        type=Path,
        help="packages that this host lacks: a folder, or the archive of `make gpu-archive`",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="only write the table of FILE into benchmarks/results.md",
    )
    parser.add_argument("--part", nargs=3, metavar=("STAGE", "MODULE", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.results:
        write_page(RESULTS, read(args.results))
    elif args.part:
        run_part(args.device, args.out, int(args.part[0]), args.part[1], float(args.part[2]))
    else:
        sys.exit(run(args.device, args.only, args.out, args.site))


def run_part(device: str, out: Path, stage: int, part: str, seconds: float) -> None:
    """Runs a part in this process, in an empty working folder."""
    with os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        os.dup2(2, 1)  # what libraries print goes where their warnings go
        bench = Bench(stage, device, out, Path.cwd(), time.monotonic() + seconds, terminal)
        importlib.import_module(f"gpu_stages.{part}").run(bench)


def run(device: str, only: Sequence[int], out: Path, site: Path | None) -> int:
    """Runs all parts of these stages and prints the table. Returns the exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    before = len(read(out))
    environment = environment_of(device, unpacked(site) if site else None)
    append(
        out,
        Machine(
            device,
            *described(device, environment),
            "python " + shlex.join(sys.argv),
            datetime.date.today().isoformat(),
        ),
    )
    spare = 0.0
    for number in only:
        stage = STAGES[number]
        allowed = spare + (stage.budget_s if device == "cuda" else stage.cpu_s)
        left = sum(stage.parts.values())
        for part, share in stage.parts.items():
            allowed -= child(device, number, part, allowed * share / left, out.resolve(), environment)
            left -= share
        spare = max(0.0, allowed) if device == "cuda" else 0.0
    records = read(out)[before:]
    print("\n" + "\n".join(table(records)))
    return int(failed(records))


def child(
    device: str, stage: int, part: str, allowed: float, out: Path, environment: dict[str, str]
) -> float:
    """Runs one part to its end or its deadline, and returns the seconds it took.

    Its output goes to the terminal, its errors to a file beside `out`."""
    log = out.with_name(f"{out.stem}-{stage}-{part}.log")
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--device",
        device,
        "--out",
        str(out),
        "--part",
        str(stage),
        part,
        str(allowed),
    ]
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder,
        log.open("w") as errors,
    ):
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=errors, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(1.0, allowed))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    error = (
        None
        if code == 0
        else f"its deadline of {allowed:.0f} s passed"
        if code is None
        else f"exit code {code}: {last_line(log)}"
    )
    ended = Ended(stage, part, time.monotonic() - started, error)
    append(out, ended)
    print(describe(ended), flush=True)
    return ended.seconds


def end(process: subprocess.Popen[bytes], patience_s: float = 5.0) -> None:
    """Ends a part with all processes of its session: SIGTERM first, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def environment_of(device: str, site: Path | None) -> dict[str, str]:
    """Environment of the parts: no network, no accounts, this repository and the packages of `site`."""
    path = os.pathsep.join([*([str(site)] if site else []), str(ROOT)])
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    deepspeed = {"DS_ACCELERATOR": device, "DEEPSPEED_LOG_LEVEL": "error"}
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}  # the models are tiny there
    return {
        **os.environ,
        **quiet,
        **deepspeed,
        **threads,
        "PYTHONPATH": path,
        "TOKENIZERS_PARALLELISM": "false",
    }


def unpacked(site: Path) -> Path:
    """Unpacks an archive of packages, once per content, and returns the folder."""
    if site.is_dir():
        return site.resolve()
    digest = hashlib.sha256(site.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gpu-site-{digest}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh, tarfile.open(site) as archive:
            archive.extractall(fresh, filter="data")
            Path(fresh).rename(folder)
            Path(fresh).mkdir()
    return folder


def described(device: str, environment: dict[str, str]) -> tuple[str, str]:
    """(name of the device, versions), read in a process with the environment of the parts."""
    names = ("torch", "transformers", "deepspeed", "ray", "trl")
    listed = (
        f"print('Python ', platform.python_version(), *(f', {{n}} {{m.version(n)}}' for n in {names}), "
        "sep='')"
    )
    ask = "import platform, importlib.metadata as m; " + listed
    name = (
        "; import torch; print(torch.cuda.get_device_name())"
        if device == "cuda"
        else f"; print('CPU, {os.cpu_count()} cores')"
    )
    done = subprocess.run([sys.executable, "-c", ask + name], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"this host cannot run the benchmark: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    versions, card = done.stdout.strip().splitlines()[-2:]
    return card, versions


if __name__ == "__main__":
    main()
