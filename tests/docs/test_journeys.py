"""The pages of docs/journeys, run as they stand with a real model: held-out numbers get better, and the model
still answers what it answered rightly before.

    page --blocks, in one folder--> runs/ --metrics, chat--> margins up; nine of ten right answers stay right
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.test_commands import Block, blocks, run_block
from tests.running import REPOSITORY, Sandbox, every_line, metrics, wait_until

MODEL = REPOSITORY / "build" / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(not MODEL.is_dir(), reason="no real model: run `make real-model` first"),
]
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Egypt?": "Cairo",
    "What is the opposite of hot?": "cold",
    "What is the opposite of day?": "night",
    "How many months are there in a year?": "12",
    "Which animal says meow?": "cat",
    "What is the chemical formula of water?": "H2O",
    "Which ocean is the largest?": "Pacific",
}
"""Questions, with a word of the right answer, that the model answers greedily before any training. No page's
data holds one of them."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A page whose blocks have run."""

    folder: Path
    sandbox: Sandbox
    outputs: tuple[str, ...]
    """The standard output of each block."""

    def held_out(self, run: str, name: str) -> list[float]:
        """The values of a held-out metric, from before the first step on."""
        return [
            line[name] for line in every_line(self.folder / "runs" / run / "metrics.jsonl") if name in line
        ]

    def answers(self, run: str) -> tuple[int, int]:
        """Number of the ten answers with the right word: (of the trained model, of the model before
        training)."""
        (self.folder / "ten.txt").write_text("\n".join(QUESTIONS) + "\n")
        command = f"orchestrator chat runs/{run} --against base --max-new-tokens 40 --json < ten.txt\n"
        done = run_block(Block("the ten questions", "bash", command, "run"), self.folder, self.sandbox)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["prompt"] for line in lines] == list(QUESTIONS)
        texts = [[answer["text"] for answer in line["answers"]] for line in lines]
        print(*(f"{run}: {new!r}  before: {old!r}" for new, old in texts), sep="\n")
        new, old = (
            [word in text for text, word in zip(column, QUESTIONS.values(), strict=True)]
            for column in zip(*texts, strict=True)
        )
        return sum(new), sum(old)


@contextmanager
def walked(name: str, root: Path, **more: str) -> Iterator[Walk]:
    """Runs docs/journeys/NAME.md to its end."""
    folder, sandbox = root / "here", Sandbox(root / "sandbox")
    folder.mkdir()
    (folder / MODEL.name).symlink_to(MODEL.resolve())
    outputs: list[str] = []
    try:
        for block in blocks(REPOSITORY / "docs" / "journeys" / f"{name}.md"):
            if block.runs:
                done = run_block(block, folder, sandbox, **more)
                print(f"{block.place}\n{done.stdout}")
                assert done.returncode == 0, (
                    f"{block.place} ended with "
                    f"{done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                )
                outputs.append(done.stdout)
        yield Walk(folder, sandbox, tuple(outputs))
    finally:
        sandbox.close()


def test_pairs(tmp_path: Path) -> None:
    with walked("pairs", tmp_path) as walk:
        for run in ("dpo", "lora"):
            margins, losses = walk.held_out(run, "eval/rewards/margins"), walk.held_out(run, "eval/loss")
            assert abs(margins[0]) < 1e-3 and margins[-1] > 0.1 and margins == sorted(margins), run
            assert losses[-1] < losses[0]
            right, before = walk.answers(run)
            assert before == 10 and right >= 9, run
        assert "export is in float32" in walk.outputs[2], "rounding would undo the training"


def test_reward(tmp_path: Path) -> None:
    with walked("reward", tmp_path) as walk:
        lines = metrics(walk.folder / "runs" / "grpo")
        assert len(lines) == 4 and {"reward/brief", "reward/whole"} <= set(lines[0])
        right, before = walk.answers("grpo")
        assert before == 10 and right >= 9


def test_demonstrations(tmp_path: Path) -> None:
    with walked("demonstrations", tmp_path) as walk:
        for run in ("sft", "sft-lora"):
            losses = walk.held_out(run, "eval/loss")
            assert losses[-1] < 0.8 * losses[0], run
        assert (walk.folder / "adapter-alone" / "adapter_config.json").is_file()


def test_cluster(tmp_path: Path) -> None:
    with (
        separate_ray(tmp_path) as address,
        walked("cluster", tmp_path, RAY_API_SERVER_ADDRESS=address, HOME=str(tmp_path / "home")) as walk,
    ):
        here, there = (metrics(walk.folder / "runs" / run) for run in ("here", "there"))
        assert [line["loss"] for line in here] == pytest.approx([line["loss"] for line in there], rel=1e-5)
        assert [line["step"] for line in metrics(walk.folder / "runs" / "longer")] == [1, 2, 3, 4]


@contextmanager
def separate_ray(root: Path) -> Iterator[str]:
    """Starts `ray start --head` with a token, as the page does, on free ports, and ends only that Ray. Yields
    the address of its dashboard."""
    sandbox, home = Sandbox(root / "ray"), root / "home"
    home.mkdir()
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = sandbox.environment() | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
    }
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    command = [
        ray,
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
    ]
    # jobs are started there; another Ray of this machine may hold the usual port
    command.append(f"--dashboard-agent-listen-port={agent}")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert wait_until(lambda: listens(dashboard), 120.0), "Ray's dashboard did not come up"
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
        sandbox.kill_all()
        sandbox.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
