"""The hub is tested once, and a hub that is not reachable costs seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.core import hub

OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent-cache"}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.reachable.cache_clear()
    yield monkeypatch
    hub.reachable.cache_clear()


def test_the_hub_is_reachable_if_its_port_or_its_proxy_listens(environment):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        environment.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
        hub.reachable.cache_clear()
        environment.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.reachable()
        environment.delenv("HF_HUB_OFFLINE")
        hub.reachable.cache_clear()
        environment.setenv("HF_ENDPOINT", "http://hub.invalid")
        environment.setenv("http_proxy", f"127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable(), "the proxy is tested instead"
    hub.reachable.cache_clear()
    environment.delenv("http_proxy")
    environment.setenv("HF_ENDPOINT", OFFLINE["HF_ENDPOINT"])
    assert not hub.reachable()


@pytest.mark.parametrize(
    ("recipe", "change", "what"),
    [
        (
            "recipes/dpo/llama-3-8b.yaml",
            "data.max_length=2048",
            "data set OpenRLHF/preference_dataset_mixture2_and_safe_pku cannot be fetched",
        ),
        (
            "recipes/dpo/qwen2.5-0.5b.yaml",
            "data.train=toy:preference",
            "model Qwen/Qwen2.5-0.5B-Instruct cannot be fetched",
        ),
    ],
)
def test_a_plan_without_a_network_names_what_it_lacks_within_seconds(recipe, change, what, tmp_path):
    environment = (
        {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        | OFFLINE
        | {"HF_HOME": str(tmp_path)}
    )
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "plan",
        recipe,
        change,
        "data.eval=null",
        "--gpu",
        "h100-80g",
    ]
    started = os.times().children_user
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode and what in ended.stderr + ended.stdout, ended.stdout + ended.stderr
    assert "--lengths MEAN,MAX" in ended.stderr + ended.stdout
    assert "Retrying" not in ended.stderr + ended.stdout
    assert os.times().children_user - started < 60


@pytest.mark.parametrize(
    ("path", "model", "data_set"),
    [
        ("Qwen/Qwen2.5-0.5B", True, True),
        ("gsm8k", False, True),
        ("here/folder", False, False),
        ("./org/name", False, False),
        ("/models/name", False, False),
        ("~/name", False, False),
        ("a/b/c", False, False),
        ("stage:sft", False, False),
        ("toy:sft", False, False),
        ("s3://bucket/rows", False, False),
        ("rows.jsonl", False, False),
    ],
)
def test_one_rule_says_what_is_on_the_hub(
    path: str, model: bool, data_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "folder").mkdir(parents=True)
    assert (hub.is_model_name(path), hub.is_data_set_name(path)) == (model, data_set)
