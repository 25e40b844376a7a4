"""What a process sees of its machine, tested with things that each test puts there: a server, a key, a
device, a library, a marker file."""

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.cluster.doctor import node as node_facts
from orchestrator.cluster.doctor.facts import Gpu, ModelSource, UnmetRequirement
from orchestrator.cluster.doctor.node import (
    MARKER,
    missing_markers,
    remove_markers,
    server_problem,
    unmet_requirements,
    wandb_problem,
    write_marker,
)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers every request with a status; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


BROKEN = [(503, "127.0.0.1 answers 503"), (407, "127.0.0.1 answers 407")]


@pytest.mark.parametrize(("status", "problem"), [(200, None), (404, None), (401, None), *BROKEN])
def test_a_server_that_answers_is_reachable_unless_it_answers_that_it_is_broken(
    status: int, problem: str | None
) -> None:
    with answering(status) as url:
        assert server_problem(url) == problem


def test_a_server_that_is_not_there_is_named() -> None:
    with answering(200) as url:
        pass
    assert server_problem(url) == "127.0.0.1 does not answer: [Errno 111] Connection refused"


def test_a_wrong_address_and_a_server_of_another_protocol_are_reported() -> None:
    assert server_problem("wandb.example") == "wandb.example is not an address: it needs https:// before it"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as client:
                client.sendall(b"220 mail ready\r\n")
                client.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        assert (
            server_problem(f"http://127.0.0.1:{server.getsockname()[1]}")
            == "127.0.0.1 does not answer: 220 mail ready\r\n"
        )


def test_wandb_needs_a_key_and_a_key_in_netrc_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering(200) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert wandb_problem() == "no key for 127.0.0.1 is set"
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password canary\n")
        assert wandb_problem() is None
        (tmp_path / "netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", "canary")
        assert wandb_problem() is None


def put_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_devices_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(
        tmp_path,
        "echo 'NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0'; echo 'NVIDIA H100 80GB HBM3, 81559, "
        "580.65.06, 9.0'",
        monkeypatch,
    )
    assert node_facts.devices() == (Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, "580.65.06", "9.0"),) * 2
    assert (
        all(gpu.knows_bf16 for gpu in node_facts.devices()) and not Gpu("Tesla T4", 1, "", "7.5").knows_bf16
    )


def test_a_device_that_shares_the_memory_of_its_cpu_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path, "echo 'NVIDIA GB10, [N/A], 580.95.05, [N/A]'", monkeypatch)
    assert node_facts.devices() == (Gpu("NVIDIA GB10", 0, "580.95.05"),)


def test_without_a_working_driver_there_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9", monkeypatch)
    assert node_facts.devices() == ()


def test_a_library_that_is_too_old_or_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unmet_requirements() == ()
    (tmp_path / "trl-0.0.1.dist-info").mkdir()
    (tmp_path / "trl-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (unmet,) = unmet_requirements()
    assert unmet.version == "trl 0.0.1" and unmet.wanted.startswith("trl>=1.")
    monkeypatch.setattr(
        node_facts, "requires", lambda _: ["no-such-library>=3", 'vllm>=0.32; extra == "vllm"']
    )
    assert unmet_requirements() == (UnmetRequirement("no no-such-library", "no-such-library>=3"),)


def test_markers_are_seen_in_the_same_folder_only_and_removed(tmp_path: Path) -> None:
    (one, other) = (tmp_path / "one", tmp_path / "other")
    for folder in (one, other):
        (folder / "checkpoints" / "step_000001").mkdir(parents=True)
        (folder / "checkpoints" / "step_000001" / "weights").write_bytes(b"x" * 1000)
    written = write_marker(str(one), "n", "a b/c")
    assert written.error is None and written.free > 0 and written.held == 1000
    assert missing_markers(str(one), "n", ["a b/c", "d"], 0.0) == ("d",)
    assert missing_markers(str(other), "n", ["a b/c"], 0.0) == ("a b/c",)
    remove_markers(str(one), "n")
    assert not list(one.glob(f"{MARKER}*"))
    assert write_marker(str(tmp_path / "gone"), "n", "a").error == "No such file or directory"


def test_a_full_disk_is_reported_and_keeps_no_marker(tmp_path: Path) -> None:
    """A limit on the size of files takes the place of the disk: the file can be created, but not filled."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        written = write_marker(str(tmp_path), "n", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written.error == "File too large" and list(tmp_path.iterdir()) == []


def test_weights_are_absent_if_they_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(model: ModelSource) -> list[str]:
        return [a.why for a in node_facts.node_facts("n", "127.0.0.1", (model,), ()).absent]

    assert absent(ModelSource(str(tmp_path), None, hub=False)) == []
    assert absent(ModelSource(str(tmp_path / "no"), None, hub=False)) == ["no such folder here"]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = ModelSource("org/model", "0" * 40, hub=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert absent(hub) == ["not in this node's cache, and HF_HUB_OFFLINE forbids requests to the hub"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with answering(503) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert absent(hub) == ["not in this node's cache, and 127.0.0.1 answers 503"]
        snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
        assert absent(hub) == []


def test_the_interface_is_the_one_that_holds_the_address() -> None:
    assert node_facts.interface_of("127.0.0.1") == "lo"
    assert node_facts.interface_of("203.0.113.7") == ""


def test_the_cuda_of_torch_is_that_of_its_build() -> None:
    import torch

    assert node_facts.torch_cuda() == (torch.version.cuda or "")
