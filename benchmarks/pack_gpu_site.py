"""Packs archives for a GPU host without network: `python benchmarks/pack_gpu_site.py`, or `make gpu-archive`.

    dist/gpu-site.tar.xz       the packages that a host with torch and transformers lacks, at the versions of
                               this environment
    dist/orchestrator-gpu.tar  the repository's tracked files, that archive, and HOWTO, two lines

The host is x86-64 Linux with the Python of --python. It has torch (CUDA) with its triton, numpy, safetensors,
pandas, pyarrow, aiohttp and what Hugging Face's libraries need. transformers is packed nevertheless, because
continuous batching needs options that older versions lack. Left out are Ray's Java archive, RLlib and
dashboard pages, wandb (tracking.wandb=off), documentation, tests and lint tools.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = """
accelerate annotated-doc annotated-types certifi charset-normalizer datasets dill einops hjson httpcore
httpcore2 httpx httpx2 huggingface-hub jaxtyping jsonschema jsonschema-specifications latex2sympy2-extended
math-verify msgpack multiprocess ninja pathspec peft platformdirs protobuf psutil py-cpuinfo pydantic
pydantic-core ray referencing requests rpds-py tokenizers transformers trl truststore typer typing-inspection
urllib3 wadler-lindig xxhash
"""
ON_THE_HOST = """
aiohttp anyio click filelock fsspec h11 hf-xet idna numpy packaging pandas pyarrow pyyaml regex rich
safetensors shellingham torch tqdm typing-extensions
"""
"""Packages that the host has, with their requirements: those of any transformers 5."""
SOURCES = ("deepspeed", "antlr4-python3-runtime")
"""Pure Python packages without a wheel: their installed files are copied. DeepSpeed builds its operators on
the host."""
NOT_NEEDED = ("ray/jars", "ray/rllib", "ray/dashboard/client", "bin")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 60_000_000
HOWTO = """mkdir work && tar -C work -xf orchestrator-gpu.tar && cd work
python benchmarks/gpu.py --site gpu-site.tar.xz --only 0,1,2,4 --out results.jsonl
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="Python version of the host")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    site, bundled = args.out / "gpu-site.tar.xz", args.out / "orchestrator-gpu.tar"
    with tempfile.TemporaryDirectory(prefix="gpu-site-") as folder:
        fill(Path(folder), args.python)
        pack(Path(folder), site)
    bundle(site, bundled)
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (site, bundled))
    print(f"{args.out}: {sizes}\n{HOWTO}", end="")
    if bundled.stat().st_size > LIMIT:
        sys.exit(f"more than {LIMIT / 1e6:.0f} MB")


def fill(folder: Path, python: str) -> None:
    """Puts the packages into `folder`, at the versions of this environment."""
    pins = [f"{name}=={distribution(name).version}" for name in WHEELS.split()]
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    options = [
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--only-binary=:all:",
        "--python-version",
        python,
        *platforms,
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            *options,
            "--target",
            str(folder),
            *pins,
        ],
        check=True,
    )
    for name in SOURCES:
        copy_installed(distribution(name), folder)
    for path in NOT_NEEDED:
        shutil.rmtree(folder / path, ignore_errors=True)


def copy_installed(package: Distribution, folder: Path) -> None:
    for file in package.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(package.locate_file(file)), target)


def pack(folder: Path, out: Path) -> None:
    """Writes an archive in a fixed order, without times and owners: the same packages give the same bytes."""
    with tarfile.open(out, "w:xz", preset=6) as archive:
        for path in sorted(p for p in folder.rglob("*") if "__pycache__" not in p.parts):
            archive.add(path, path.relative_to(folder), recursive=False, filter=anonymous)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
    return entry


def bundle(site: Path, out: Path) -> None:
    """Writes the files that git tracks, from the working tree, with the packages and HOWTO, uncompressed."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    with tarfile.open(out, "w") as archive:
        entry = tarfile.TarInfo("HOWTO")
        entry.size = len(HOWTO.encode())
        archive.addfile(entry, io.BytesIO(HOWTO.encode()))
        for name in filter(None, tracked):
            archive.add(ROOT / name, name, recursive=False, filter=anonymous)
        archive.add(site, site.name, filter=anonymous)


if __name__ == "__main__":
    main()
