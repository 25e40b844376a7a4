"""A cluster of three hosts: submitted runs end as on one host, are tracked, and continue after a host is
lost.

The hosts are network namespaces with a real Ray node each (tests/hosts.py). Each node has one CPU, so every
learner runs on another node.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import NOTICED_S, Hosts, hosts
from tests.running import Finished, Sandbox, distance, exported, metrics, wait_until
from tests.wandb_server import WandbServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
    "data.train=[{path: toy:preference, max_rows: 256}]",
    "batch.effective=32",
    "evaluation.every=4",
    "checkpoint.every=4",
)
DPO = ("tiny/dpo", *SMALL, "run.max_steps=12", "learners.workers=auto")
GRPO = (
    "tiny/grpo",
    "sft:run.max_steps=40",
    "grpo:run.max_steps=4",
    "batch.effective=64",
    "grpo:rollouts.prompts=8",
    "evaluation.every=40",
)
ONE_CPU = "--num-cpus=1"


@dataclass(frozen=True, slots=True)
class Site:
    """The running hosts, and the stand-in of wandb that they reach."""

    hosts: Hosts
    wandb: WandbServer
    root: Path

    def submit(self, *words: str | Path, env: dict[str, str] | None = None) -> Finished:
        return self.hosts.inside(
            0,
            "orchestrator",
            "submit",
            *words,
            f"reference.cache_dir={self.root / 'reference'}",
            env=env,
            timeout=400.0,
        )


@contextmanager
def site(root: Path) -> Iterator[Site]:
    with hosts(root) as made, WandbServer(host=made.outside) as server:
        made.start_cluster(ONE_CPU, env=server.environment())
        yield Site(made, server, root)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("three")) as made:
        yield made


def on_one_host(root: Path, *words: str) -> Path:
    """Runs the same on this host, with one worker; its folder."""
    sandbox = Sandbox(root)
    try:
        done = sandbox.run(
            "train",
            *words,
            f"reference.cache_dir={root / 'reference'}",
            "--output",
            root / "run",
            timeout=300.0,
        )
        assert done.code == 0, done.out + done.err
    finally:
        sandbox.close()
    return root / "run"


def test_dpo_over_three_hosts_ends_as_on_one_and_is_tracked(three: Site, tmp_path: Path) -> None:
    done = three.submit(*DPO, "tracking.wandb=online", "--output", tmp_path / "run")
    assert done.code == 0, done.out + done.err
    assert "tiny-dpo SUCCEEDED" in done.out and "12/12" in done.out
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").glob("learner-*"))
    assert logs == [
        "learner-0.log",
        "learner-1.log",
        "learner-2.log",
    ]  # auto: one for every CPU of the cluster

    one = on_one_host(tmp_path / "one", *DPO, "learners.workers=1")
    assert distance(exported(one), exported(tmp_path / "run")) < 1e-5

    tracked = three.wandb.only_run
    assert tracked.series("train/global_step")[-1] == 12 and len(tracked.series("train/loss")) == 12
    assert tracked.config["batch"]["effective"] == 32 and tracked.config["plan"]["cut"]["workers"] == 3
    assert any("most_wrong_pairs" in name for name in tracked.files)
    assert tracked.exit_code == 0

    again = three.submit(*DPO, "tracking.wandb=online", "--output", tmp_path / "run")
    assert again.code == 0 and "SUCCEEDED already; nothing was submitted" in again.out


def test_grpo_over_three_hosts_ends_as_on_one(three: Site, tmp_path: Path) -> None:
    spread = (
        "learners.cpus_per_worker=1",
        "learners.workers=auto",
        "grpo:rollouts.workers=1",
        "grpo:rollouts.cpus_per_worker=1",
    )
    done = three.submit(*GRPO, *spread, "--output", tmp_path / "run")
    assert done.code == 0, done.out + done.err
    assert (
        len(list((tmp_path / "run" / "grpo" / "logs").glob("learner-*"))) == 2
    )  # the third CPU is the rollout actor's
    one = on_one_host(tmp_path / "one", *GRPO, "learners.workers=1")
    for stage in ("sft", "grpo"):
        assert distance(exported(one / stage), exported(tmp_path / "run" / stage)) < 1e-5, stage


def test_a_stopped_run_saves_and_is_resumed(three: Site, tmp_path: Path) -> None:
    words = (*DPO, "run.name=stopped", "run.max_steps=60", "checkpoint.every=60", "evaluation.every=60")
    begun = three.submit(*words, "--output", tmp_path / "run", "--no-follow")
    assert begun.code == 0 and "orchestrator stop stopped" in begun.out, begun.out + begun.err
    ledger = tmp_path / "run" / "metrics.jsonl"
    assert wait_until(lambda: ledger.is_file() and len(metrics(tmp_path / "run")) >= 3, 240.0), (
        "the run makes no progress"
    )
    stopped = three.hosts.inside(0, "orchestrator", "stop", "stopped")
    assert stopped.code == 0 and "STOPPED" in stopped.out, stopped.out + stopped.err
    done = len(metrics(tmp_path / "run"))
    assert 3 <= done < 60
    resumed = three.hosts.inside(0, "orchestrator", "resume", "stopped", timeout=300.0)
    assert resumed.code == 0 and f"step {done + 1}/60" in resumed.out, resumed.out + resumed.err
    assert f"step {done}/60" not in resumed.out
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 61))
    status = three.hosts.inside(0, "orchestrator", "status", "stopped")
    assert (
        "STOPPED" in status.out
        and "stopped.2" in status.out
        and "SUCCEEDED" in status.out
        and "60/60" in status.out
    )


def test_a_user_without_the_token_is_refused(three: Site, tmp_path: Path) -> None:
    stranger = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = three.submit(*DPO, "--output", tmp_path / "run", env=stranger)
    assert done.code == 77
    assert "401: no token was given" in done.err and "~/.ray/auth_token" in done.err
    wrong = three.submit(*DPO, "--output", tmp_path / "run", env=stranger | {"RAY_AUTH_TOKEN": "0" * 32})
    assert wrong.code == 77 and "403: the token is another cluster's" in wrong.err
    across = three.hosts.inside(
        1, "orchestrator", "status", "--address", f"http://{three.hosts.address(0)}:8265", env=stranger
    )
    assert across.code == 77 and "no token for" in across.err


def test_doctor_and_plan_use_the_facts_of_the_hosts(three: Site) -> None:
    doctor = three.hosts.inside(
        0, "orchestrator", "doctor", "tiny/dpo", "learners.workers=3", "--address", three.hosts.dashboard
    )
    assert doctor.code == 0, doctor.out + doctor.err
    assert "3 nodes answered" in doctor.out and "GB/s" in doctor.out and "Ray asks for a token" in doctor.out
    short = three.hosts.inside(
        0,
        "orchestrator",
        "doctor",
        "tiny/dpo",
        "learners.gpus_per_worker=1",
        "--address",
        three.hosts.dashboard,
    )
    assert short.code == 69 and "GPUs" in short.out and "gpus_per_worker=0" in short.out
    assert "doctor-" not in three.hosts.inside(0, "orchestrator", "status").out, "a question is not a run"
    plan = three.hosts.inside(0, "orchestrator", "plan", "tiny/dpo", "--address", three.hosts.dashboard)
    assert plan.code == 0, plan.out + plan.err
    assert "3 machines" in plan.out and "3 learners" in plan.out and "measured" in plan.out


def test_a_lost_host_is_named_and_the_rest_continue(tmp_path: Path) -> None:
    words = (*DPO, "run.max_steps=200", "checkpoint.every=10", "--output", tmp_path / "run")
    with site(tmp_path / "hosts") as three:
        reference = f"reference.cache_dir={three.root / 'reference'}"
        with three.hosts.started(0, "orchestrator", "submit", *words, reference) as following:
            ledger = tmp_path / "run" / "metrics.jsonl"
            assert wait_until(lambda: ledger.is_file() and len(metrics(tmp_path / "run")) >= 15, 240.0), (
                "the run makes no progress"
            )
            three.hosts.cut(2)
            cut_at = time.monotonic()
            out, err = following.communicate(timeout=NOTICED_S + 120.0)
            took = time.monotonic() - cut_at
        before = len(metrics(tmp_path / "run"))
        assert following.returncode == 75, out + err
        assert three.hosts.address(2) in out, out
        assert "orchestrator resume tiny-dpo" in out
        print(f"cut after {before} steps; noticed, ended and reported within {took:.1f} s")
        assert took < NOTICED_S + 15.0

        done = three.submit(*words)
        assert done.code == 0, done.out + done.err
        assert "tiny-dpo.2" in done.out and "continues in its run folder" in done.out
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 201))
    plan = (tmp_path / "run" / "plan.json").read_text()
    assert '"workers": 2' in plan and '"effective": 32' in plan
    one = on_one_host(tmp_path / "one", *DPO, "run.max_steps=200", "learners.workers=1")
    assert distance(exported(one), exported(tmp_path / "run")) < 1e-5
