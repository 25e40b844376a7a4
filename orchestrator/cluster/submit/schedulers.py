"""Job files for schedulers: the files of launch/ with the lines marked `#= field` filled in, and their
submission.

    Launch -> values, quoted for their place -> artefact (text)
           -> dispatch: sbatch | kubectl apply | sky jobs launch

A file of launch/ can be used as it is: a marked line holds an example, `head value  #= field`. The field's
value replaces the example; a line whose field has no value is left out.
"""

import os
import re
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from orchestrator.core.errors import (
    ConfigError,
    InternalError,
    MissingInput,
    NotEnoughResources,
    OrchestratorError,
)

TARGETS = ("slurm", "k8s", "sky")
FILES = {"slurm": "slurm.sbatch", "k8s": "kuberay.yaml", "sky": "skypilot.yaml"}
PROGRAMS = {
    "sbatch": "run this on a login node of the Slurm cluster",
    "kubectl": "install kubectl and point it at the cluster, https://kubernetes.io/docs/tasks/tools",
    "sky": "pip install 'skypilot[kubernetes]' (or your cloud's extra), then `sky check`",
}
"""Fix if a scheduler's program is not installed."""
DEADLINE_S = 600.0
"""Deadline of a submission: `sky jobs launch` may start its controller first."""

NAME_LENGTH = 47
"""Characters of a job's name: a label may have 63, and KubeRay appends some to the name of a RayJob."""
_MARKED = re.compile(r"^(?P<head>[^=:\n]*[=:] *)(?P<example>\S.*?) +#= (?P<field>[a-z_]+)$", re.MULTILINE)

Value = str | int | None


@dataclass(frozen=True, slots=True)
class Launch:
    """One run on machines that a scheduler provides."""

    recipe: str
    overrides: tuple[str, ...]
    name: str
    """Name of the job."""
    nodes: int
    """Number of machines, each with the GPUs, CPUs and memory below."""
    gpus_per_node: int
    cpus_per_node: int
    output: str
    """Run folder: an absolute path on storage that every node shares."""
    image: str
    """Container image, for k8s and sky."""
    gpu: str = "H100"
    """Kind of GPU that sky looks for."""
    memory_gb: int = 64
    """GiB of each machine."""

    def __post_init__(self) -> None:
        """ConfigError for values that no scheduler accepts."""
        if not PurePosixPath(self.output).is_absolute():
            raise ConfigError(
                f"output {self.output!r} is not an absolute path",
                fix="name a folder on storage that every node shares",
            )
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_node < 1 or self.memory_gb < 1:
            shape = (
                f"{self.nodes} nodes x ({self.gpus_per_node} GPUs, {self.cpus_per_node} CPUs, "
                f"{self.memory_gb} GiB)"
            )
            raise ConfigError(f"{shape} cannot be requested", fix="set at least 1 node, 1 CPU and 1 GiB")
        for text in (self.recipe, *self.overrides, self.output, self.image, self.gpu):
            if any(c == "\0" or 0xD800 <= ord(c) < 0xE000 for c in text):
                raise ConfigError(
                    f"{text!r} cannot be an argument of a program", why="it holds a NUL or half a character"
                )

    @property
    def command(self) -> tuple[str, ...]:
        """Command of the head; the file appends `--output DIR`."""
        return ("python", "-m", "orchestrator", "train", self.recipe, *self.overrides)

    @property
    def job_name(self) -> str:
        """The name as a DNS label, which every target accepts."""
        label = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        label = label if label[:1].isalpha() else f"run-{label}"
        return label[:NAME_LENGTH].strip("-")


def artefact(target: str, launch: Launch) -> str:
    """The text that `dispatch` submits. ConfigError for an unknown target."""
    if target not in FILES:
        raise ConfigError(f"unknown target {target!r}", fix=f"one of {', '.join(TARGETS)}")
    return _fill(_folder().joinpath(FILES[target]).read_text(), _VALUES[target](launch))


def dispatch(target: str, text: str) -> str:
    """Submits an artefact with sbatch, kubectl or sky; returns that program's output.

    sky: RAY_AUTH_TOKEN is created if the environment has none, and WANDB_API_KEY is passed on if it is set;
    both in the environment. MissingInput if the program is not installed, NotEnoughResources if it refuses,
    OrchestratorError if it does not answer by the deadline.
    """
    if target == "slurm":
        return _run(["sbatch"], text)
    if target == "k8s":
        return _run(["kubectl", "apply", "-f", "-"], text)
    if target != "sky":
        raise ConfigError(f"unknown target {target!r}", fix=f"one of {', '.join(TARGETS)}")
    environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32)} | os.environ
    names = [name for name in ("RAY_AUTH_TOKEN", "WANDB_API_KEY") if environment.get(name)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILES["sky"]
        file.write_text(text)
        options = [option for name in names for option in ("--secret", name)]
        return _run(["sky", "jobs", "launch", "--yes", "--detach-run", *options, str(file)], "", environment)


def _slurm(launch: Launch) -> dict[str, Value]:
    return {
        "name": launch.job_name,
        "nodes": launch.nodes,
        "cpus_per_node": launch.cpus_per_node,
        "gpus_per_node": launch.gpus_per_node or None,  # a cluster without GPUs refuses the line
        "output": shell_word(launch.output),
        "command": shell_array(launch.command),
    }


def _k8s(launch: Launch) -> dict[str, Value]:
    return {
        "name": yaml_string(launch.job_name),
        "output": shell_word(launch.output),
        "command": shell_array(launch.command),
        "image": yaml_string(launch.image),
        "cpus_per_node": launch.cpus_per_node,
        "gpus_per_node": launch.gpus_per_node or None,
        "memory": f"{launch.memory_gb}Gi",
        "workers": launch.nodes - 1,
    }


def _sky(launch: Launch) -> dict[str, Value]:
    return {
        "name": yaml_string(launch.job_name),
        "nodes": launch.nodes,
        "image_id": yaml_string(f"docker:{launch.image}"),
        "cpus": f"{launch.cpus_per_node}+",
        "memory_gb": f"{launch.memory_gb}+",
        "accelerators": yaml_string(f"{launch.gpu}:{launch.gpus_per_node}") if launch.gpus_per_node else None,
        "output": shell_word(launch.output),
        "command": shell_array(launch.command),
    }


_VALUES = {"slurm": _slurm, "k8s": _k8s, "sky": _sky}


def shell_word(text: str) -> str:
    """A word of bash that expands to `text`, on one line even if `text` has several."""
    if text.isprintable():
        return shlex.quote(text)
    # bytes, as \\u depends on the locale; printable characters stay readable
    escaped = (
        c if c.isprintable() and c not in "\\'" else "".join(f"\\x{byte:02x}" for byte in c.encode())
        for c in text
    )
    return f"$'{''.join(escaped)}'"


def shell_array(words: Sequence[str]) -> str:
    """The words as a bash array."""
    return f"({' '.join(shell_word(word) for word in words)})"


def yaml_string(text: str) -> str:
    """A YAML scalar for `text`, double-quoted and on one line."""
    return yaml.dump(
        text, Dumper=yaml.SafeDumper, default_style='"', width=float("inf"), allow_unicode=True
    ).removesuffix("\n")


def _fill(template: str, values: Mapping[str, Value]) -> str:
    """The template with its marked lines filled in. Every value needs a marked line, and every marked line a
    value."""
    marked = {match["field"] for match in _MARKED.finditer(template)}
    if marked != values.keys():
        raise InternalError(f"fields {sorted(values)} do not fit the marked lines {sorted(marked)}")

    def line(match: re.Match[str]) -> str:
        value = values[match["field"]]
        return _DROP if value is None else f"{match['head']}{value}"

    return _MARKED.sub(line, template).replace(f"{_DROP}\n", "")


_DROP = "\0"  # marks a line to be left out; no value can hold it


def _folder() -> Path:
    package = Path(__file__).resolve().parents[2]
    packaged = package / "_launch"  # a wheel has it inside the package, a checkout beside it
    return packaged if packaged.is_dir() else package.parent / "launch"


def _run(command: Sequence[str], text: str, environment: Mapping[str, str] | None = None) -> str:
    program = command[0]
    try:
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
    except FileNotFoundError:
        raise MissingInput(
            f"{program} is not installed here",
            fix=f"{PROGRAMS[program]}; or use --print and submit the text yourself",
        ) from None
    except subprocess.TimeoutExpired:
        raise OrchestratorError(
            f"{program} gave no answer within {DEADLINE_S:.0f} s",
            fix=f"check whether it has the job before you submit again ({_listing(program)})",
        ) from None
    if done.returncode != 0:
        raise NotEnoughResources(
            f"{program} refused the job (exit code {done.returncode})",
            why=(done.stderr or done.stdout).strip()[-2000:],
        )
    return done.stdout.strip()


def _listing(program: str) -> str:
    """The command that lists the jobs of a scheduler."""
    return {"sbatch": "squeue --me", "kubectl": "kubectl get rayjobs", "sky": "sky jobs queue"}[program]
