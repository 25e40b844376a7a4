import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.cluster.submit import schedulers as launchers
from orchestrator.cluster.submit.schedulers import (
    FILES,
    TARGETS,
    Launch,
    artefact,
    dispatch,
    shell_word,
    yaml_string,
)
from orchestrator.core.errors import ConfigError, MissingInput, NotEnoughResources, OrchestratorError

REPOSITORY = Path(__file__).resolve().parents[3]
LAUNCH = REPOSITORY / "launch"
# what an argument of a program can hold
ARGUMENTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
AWKWARD = (
    'a.b=it\'s "$HOME" `x` $(x) \\',
    "x=a\nb\r\t\x85\u2028\ufeff\x1b",
    "y=#= command",
    "data=[{path: 'ü💥.jsonl', weight: 2}]",
    "",
    " ",
)


def launch(
    *overrides: str, output: str = "/shared/runs/one", gpus: int = 8, nodes: int = 4, name: str = "one"
) -> Launch:
    return Launch(
        "tiny/dpo",
        overrides,
        name,
        nodes,
        gpus,
        96,
        output,
        "registry.example/orchestrator:0.1.0",
        gpu="H200",
        memory_gb=512,
    )


def expanded(words: str) -> list[str]:
    """The words into which bash expands a part of a command line, in a locale without Unicode."""
    script = f"printf '%s\\0' {words}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


def on_line(text: str, start: str) -> str:
    """The rest of the only line that starts with `start`."""
    (line,) = [line.strip() for line in text.split("\n") if line.strip().startswith(start)]
    return line.removeprefix(start)


def started_by_slurm(text: str) -> list[str]:
    return [*expanded(on_line(text, "COMMAND=")[1:-1]), "--output", *expanded(on_line(text, "OUTPUT="))]


def started_by_kuberay(text: str) -> list[str]:
    return started_by_slurm(next(iter(yaml.safe_load_all(text)))["data"]["train.sh"])


def started_by_sky(text: str) -> list[str]:
    return started_by_slurm(yaml.safe_load(text)["run"])


STARTED: dict[str, Callable[[str], list[str]]] = {
    "slurm": started_by_slurm,
    "k8s": started_by_kuberay,
    "sky": started_by_sky,
}


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60)
@given(overrides=st.lists(ARGUMENTS, max_size=3).map(tuple), folder=ARGUMENTS)
@example(overrides=AWKWARD, folder="with 'space' and\nline")
def test_the_started_command_is_the_requested_one_whatever_the_text(
    target: str, overrides: tuple[str, ...], folder: str
) -> None:
    asked = launch(*overrides, output=f"/shared/{folder}")
    assert STARTED[target](artefact(target, asked)) == [
        "python",
        "-m",
        "orchestrator",
        "train",
        "tiny/dpo",
        *overrides,
        "--output",
        f"/shared/{folder}",
    ]


@given(ARGUMENTS)
def test_a_quoted_word_stands_on_one_line_and_a_scalar_reads_back(text: str) -> None:
    assert len(shell_word(text).splitlines()) == 1 and len(yaml_string(text).split("\n")) == 1
    assert yaml.safe_load(f"key: {yaml_string(text)}") == {"key": text}


@pytest.mark.parametrize("target", TARGETS)
def test_only_marked_lines_change(target: str) -> None:
    """So a template can be edited by hand at the same places, and no mark is overlooked."""
    template = (LAUNCH / FILES[target]).read_text().split("\n")
    filled = artefact(target, launch("a.b=c")).split("\n")
    assert len(template) == len(filled)
    for before, after in zip(template, filled, strict=True):
        marked = re.search(r"  #= [a-z_]+$", before) is not None
        assert (before != after) == marked, before
        assert not marked or "#=" not in after


@pytest.mark.parametrize(
    ("target", "word"), [("slurm", "gpus-per-node"), ("k8s", "nvidia.com/gpu"), ("sky", "accelerators:")]
)
def test_without_gpus_none_is_requested(target: str, word: str) -> None:
    assert word in artefact(target, launch()) and word not in artefact(target, launch(gpus=0))


def test_sizes_are_where_each_scheduler_expects_them() -> None:
    slurm = artefact("slurm", launch())
    for directive in ("--nodes=4", "--gpus-per-node=8", "--cpus-per-task=96", "--job-name=one"):
        assert f"\n#SBATCH {directive}\n" in slurm
    cluster = list(yaml.safe_load_all(artefact("k8s", launch())))[1]["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (
        3,
        3,
        3,
    )  # the head is the fourth node
    for spec in (cluster["headGroupSpec"], workers):
        resources = spec["template"]["spec"]["containers"][0]["resources"]
        assert (
            resources["limits"]
            == resources["requests"]
            == {"cpu": 96, "memory": "512Gi", "nvidia.com/gpu": 8}
        )
    sky = yaml.safe_load(artefact("sky", launch()))
    assert (
        sky["num_nodes"],
        sky["resources"]["accelerators"],
        sky["resources"]["cpus"],
        sky["resources"]["memory"],
    ) == (4, "H200:8", "96+", "512+")
    assert sky["resources"]["image_id"] == "docker:registry.example/orchestrator:0.1.0"


@given(st.text(max_size=80))
@example("7B run: Llama_3 / ÄÖ")
@example("")
def test_a_job_name_is_a_dns_label(name: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", launch(name=name).job_name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "runs/one"}, "absolute"),
        ({"nodes": 0}, "0 nodes"),
        ({"gpus_per_node": -1}, "-1 GPUs"),
        ({"overrides": ("a=\0",)}, "NUL"),
        ({"overrides": ("a=\ud800",)}, "half a character"),
    ],
)
def test_values_that_no_scheduler_accepts_are_refused(change: dict[str, object], reason: str) -> None:
    fields = {
        "recipe": "r",
        "overrides": (),
        "name": "n",
        "nodes": 1,
        "gpus_per_node": 1,
        "cpus_per_node": 1,
        "output": "/o",
        "image": "i",
    }
    with pytest.raises(ConfigError, match=reason):
        Launch(**(fields | change))  # pyright: ignore[reportArgumentType]


def test_an_unknown_target_is_refused() -> None:
    for use in (lambda: artefact("lsf", launch()), lambda: dispatch("lsf", "")):
        with pytest.raises(ConfigError, match=r"unknown target 'lsf'(.|\n)*slurm, k8s, sky"):
            use()


def program(folder: Path, name: str, body: str) -> None:
    """A stand-in for a scheduler's command, which records how it was called."""
    path = folder / name
    path.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >{folder}/arguments\ncat >{folder}/stdin\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "name", "arguments"), [("slurm", "sbatch", ""), ("k8s", "kubectl", "apply\n-f\n-")]
)
def test_the_text_goes_to_the_scheduler_as_it_is(
    programs: Path, target: str, name: str, arguments: str
) -> None:
    program(programs, name, "echo ' accepted '")
    assert dispatch(target, "the text\n") == "accepted"
    assert (programs / "stdin").read_text() == "the text\n"
    assert (programs / "arguments").read_text().strip() == arguments


def test_sky_gets_secrets_by_name_and_their_values_in_the_environment(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "sky", f'cp "${{@: -1}}" {programs}/text; env >{programs}/environment')
    monkeypatch.setenv("WANDB_API_KEY", "wandb-canary")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    dispatch("sky", "the text\n")
    arguments = (programs / "arguments").read_text().split("\n")
    assert arguments[:2] == ["jobs", "launch"] and (programs / "text").read_text() == "the text\n"
    assert arguments.count("--secret") == 2 and {"RAY_AUTH_TOKEN", "WANDB_API_KEY"} < set(arguments)
    token = re.search(
        r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", (programs / "environment").read_text(), re.MULTILINE
    )
    assert token is not None and token[1] not in arguments and "wandb-canary" not in "".join(arguments)
    assert "RAY_AUTH_TOKEN" not in os.environ, "the token must not stay in this process"
    monkeypatch.delenv("WANDB_API_KEY")
    dispatch("sky", "the text\n")
    assert "WANDB_API_KEY" not in (programs / "arguments").read_text()


@pytest.mark.parametrize(("target", "name"), [("slurm", "sbatch"), ("k8s", "kubectl"), ("sky", "sky")])
def test_a_scheduler_that_is_not_installed_is_named_with_the_fix(
    target: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingInput, match=f"{name} is not installed here(.|\n)*fix: .*--print"):
        dispatch(target, "text")


def test_a_refusal_has_the_schedulers_output(programs: Path) -> None:
    program(programs, "sbatch", "echo 'error: invalid partition' >&2; exit 1")
    with pytest.raises(NotEnoughResources, match=r"exit code 1(.|\n)*invalid partition"):
        dispatch("slurm", "text")


def test_a_scheduler_that_hangs_is_given_up_at_the_deadline(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "sbatch", "exec sleep 60")
    monkeypatch.setattr(launchers, "DEADLINE_S", 0.3)
    with pytest.raises(OrchestratorError, match=r"no answer within(.|\n)*squeue --me"):
        dispatch("slurm", "text")


def test_the_templates_are_found_in_a_wheel_as_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "orchestrator"
    for name in ("__init__.py", "core/errors.py", "cluster/submit/schedulers.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text((REPOSITORY / "orchestrator" / name).read_text())
    (package / "_launch").symlink_to(LAUNCH)
    code = (
        "from orchestrator.cluster.submit import schedulers as l; print(l.__file__, l.artefact('slurm', "
        f"l.{launch()!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{package / 'cluster/submit/schedulers.py'} {artefact('slurm', launch())}\n"
