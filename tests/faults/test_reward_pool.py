"""A whole reward pool on a real local Ray: rewards are exact, failures are named, and every wait is
bounded."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.cluster.reward_pool import RewardPool
from orchestrator.core.errors import ConfigError, NotEnoughResources, RewardsFailed
from orchestrator.core.rollouts import BatchRewards, Prompt, Rollout, RolloutGroup
from orchestrator.models.export import export
from orchestrator.models.load import load, load_tokenizer
from orchestrator.recipe.schema import Model, RewardFunction, Rewards, TinyModel
from orchestrator.rollout.rewards.component import RewardFailure
from orchestrator.rollout.rewards.reward_model import RewardModel, same_tokenizer
from tests.running import Shared, shared_ray, wait_until

pytestmark = pytest.mark.timeout(240)

SOURCE = """
import asyncio, os, subprocess, sys, time

poisoned = lambda completions: any("poison" in c for c in completions)

def length(completions, scale=1.0): return [scale * len(c) for c in completions]
async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [len(c) / 3 for c in completions]
def raises(completions):
    if poisoned(completions): raise ValueError("cannot parse")
    return length(completions)
def sleeps(completions):
    if poisoned(completions): time.sleep(600)
    return length(completions)
def ends(completions):
    if poisoned(completions): os._exit(7)
    return length(completions)
def hoards(completions):
    if poisoned(completions): len(bytearray(20 << 30))
    return length(completions)
def nan(completions): return [float("nan") if "poison" in c else len(c) for c in completions]
def none(completions): return [None if "poison" in c else len(c) for c in completions]
def few(completions): return length(completions)[: -1 if poisoned(completions) else None]
def shows(completions):
    print("seen", dict(os.environ), open("/proc/self/environ", "rb").read())
    print(subprocess.run(["env"], capture_output=True, text=True).stdout, file=sys.stderr)
    return length(completions)
def waits(completions, scale=1.0):
    time.sleep(1.5)
    return length(completions, scale)
"""
SECRET = "geheim-51c0"
TINY = Model(tiny=TinyModel())  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_API_KEY", SECRET)  # before Ray, whose processes inherit it
        with shared_ray(tmp_path_factory.mktemp("rewards")) as shared:
            (shared.root / "mine.py").write_text(SOURCE)
            yield shared


@pytest.fixture
def scored(shared: Shared, tmp_path: Path) -> Callable[..., BatchRewards]:
    """Scores groups with functions of mine.py, given by name: one pool, one batch."""

    def score(groups: Sequence[RolloutGroup], *names: str, **options: Any) -> BatchRewards:
        functions = [RewardFunction(name=n, function=f"{shared.root}/mine.py:{n}") for n in names]
        with RewardPool(
            Rewards(functions=functions, **options), model_for_tokenizer=None, logs=tmp_path / "logs"
        ) as pool:
            return pool.score(groups)

    return score


def group(i: int, *completions: str, tokenizer: Any = None, **columns: Any) -> RolloutGroup:
    encode = tokenizer.encode if tokenizer is not None else lambda text: list(text.encode())
    eos = [tokenizer.eos_token_id] if tokenizer is not None else []
    text = f"question {i}"
    rollouts = []
    for k, completion in enumerate(completions):
        ids = np.array(encode(completion) + eos, np.int64)
        rollouts.append(
            Rollout(
                k, 0, ids, np.ones(len(ids), np.bool_), np.zeros(len(ids), np.float32), "stop", completion
            )
        )
    return RolloutGroup(
        Prompt(i, f"q.jsonl:{i + 1}", 0, np.array(encode(text), np.int64), text, columns), i, tuple(rollouts)
    )


GROUPS = [group(0, "a", "bb"), group(1, "ccc", "poison"), group(2, "dddd")]
RIGHT = {0: [1.0, 2.0], 2: [4.0]}


def values(scoring: BatchRewards) -> dict[int, list[float]]:
    return {g.group.prompt.id: g.rewards.tolist() for g in scoring.groups}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "ValueError at mine.py:11: cannot parse"),
        ("sleeps", "did not answer within 2 s"),
        ("ends", "exit code 7"),
        ("hoards", "MemoryError"),
        ("nan", "nan of q.jsonl:2, sample 1 is nan"),
        ("none", "none of q.jsonl:2, sample 1 is None"),
        ("few", "1 rewards for 2"),
    ],
)
def test_a_poisoned_group_is_dropped_by_name_and_the_others_keep_exact_rewards(
    scored, name: str, message: str
) -> None:
    started = time.monotonic()
    scoring = scored(GROUPS, name, timeout_s=6.0, retries=1, max_dropped_fraction=0.5)
    assert values(scoring) == RIGHT
    (dropped,) = scoring.dropped
    assert dropped.startswith(f"q.jsonl:2: reward {name}") and message in dropped
    assert time.monotonic() - started < 40


def test_too_many_dropped_groups_end_the_run_with_the_reasons(scored) -> None:
    with pytest.raises(RewardsFailed, match="1 of 3 groups") as caught:
        scored(GROUPS, "raises", timeout_s=5.0)
    assert "q.jsonl:2: reward raises failed (ValueError at mine.py:11: cannot parse)" in str(caught.value)


def test_all_components_run_at_the_same_time_and_are_added_up(shared: Shared, tmp_path: Path) -> None:
    mine = f"{shared.root}/mine.py"
    config = Rewards(
        functions=[
            RewardFunction(name="first", function=f"{mine}:waits", weight=2.0),
            RewardFunction(name="half", function=f"{mine}:waits", weight=-1.0, options={"scale": 0.5}),
            RewardFunction(name="third", function=f"{mine}:later"),
            RewardFunction(name="right", function="last_number"),
            RewardFunction(
                name="long",
                function="trl:get_soft_overlong_punishment",
                options={"max_completion_len": 4, "soft_punish_cache": 2},
            ),
        ]
    )
    groups = [group(0, "a 4", "5", answer="4"), group(1, "<think>x</think>7", answer="7")]
    with RewardPool(config, model_for_tokenizer=None, logs=tmp_path) as pool:
        started = time.monotonic()
        first, second = (scoring := pool.score(groups)).groups
        assert time.monotonic() - started < 4.2  # 1.5 s each, at the same time
    assert {name: part.tolist() for name, part in first.parts.items()} == {
        "first": [3.0, 1.0],
        "half": [1.5, 0.5],
        "third": [1.0, np.float32(1 / 3)],
        "right": [1.0, 0.0],
        "long": [-0.5, 0.0],
    }
    assert first.rewards.tolist() == [6 - 1.5 + 1 + 1 - 0.5, np.float32(2 - 0.5 + float(np.float32(1 / 3)))]
    assert second.rewards.tolist() == [np.float32(34 - 8.5 + float(np.float32(17 / 3)) + 1 - 1)]
    assert (
        set(scoring.seconds) == {f.name for f in config.functions} and 1.5 <= scoring.seconds["first"] < 2.9
    )


def test_no_secret_of_the_driver_reaches_a_function_or_its_log(
    scored, shared: Shared, tmp_path: Path
) -> None:
    assert os.environ["MY_API_KEY"] == SECRET
    assert values(scored([group(0, "a")], "shows")) == {0: [1.0]}
    shown = (tmp_path / "logs" / "reward-shows.log").read_text()
    assert "seen" in shown and "PATH=" in shown and SECRET not in shown
    assert "RAY_" not in shown


def test_nothing_is_left_when_a_pool_closes_or_its_actor_dies(shared: Shared) -> None:
    config = Rewards(functions=[RewardFunction(name="length", function=f"{shared.root}/mine.py:length")])
    before = sandboxes()
    with RewardPool(config, model_for_tokenizer=None, logs=None) as pool:
        (running,) = sandboxes() - before
        pool.score(GROUPS[:1])
    assert wait_until(lambda: running not in sandboxes(), 5)
    with RewardPool(config, model_for_tokenizer=None, logs=None) as pool:
        (running,) = sandboxes() - before
        os.kill(parent(running), signal.SIGKILL)
        assert wait_until(lambda: running not in sandboxes(), 5)


def test_an_actor_that_is_killed_is_started_again(shared: Shared) -> None:
    config = Rewards(
        functions=[RewardFunction(name="length", function=f"{shared.root}/mine.py:length")], retries=1
    )
    with RewardPool(config, model_for_tokenizer=None, logs=None) as pool:
        import ray

        assert values(pool.score(GROUPS[:1])) == {0: [1.0, 2.0]}
        ray.kill(pool.actors[0].actor)
        started = time.monotonic()
        assert values(pool.score(GROUPS[:1])) == {0: [1.0, 2.0]}
        assert time.monotonic() - started < 20


def test_a_function_that_cannot_be_loaded_or_placed_is_reported_at_once(shared: Shared) -> None:
    (shared.root / "broken.py").write_text("import no_such_package\ndef f(completions): ...")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError at broken\.py:1"):
        RewardPool(
            Rewards(functions=[RewardFunction(name="f", function=f"{shared.root}/broken.py:f")]),
            model_for_tokenizer=None,
            logs=None,
        )
    with pytest.raises(ConfigError, match="did you mean length"):
        RewardPool(
            Rewards(functions=[RewardFunction(name="f", function=f"{shared.root}/mine.py:lenght")]),
            model_for_tokenizer=None,
            logs=None,
        )
    assert time.monotonic() - started < 20


# reward models


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export as of a `reward` run, with its own weights."""
    loaded = load(TINY, seed=7, head="scalar")
    weights = dict(loaded.model.named_parameters())
    return export(
        weights,
        base=loaded.model,
        tokenizer=loaded.tokenizer,
        directory=tmp_path_factory.mktemp("rm") / "export",
        card="",
        dtype="float32",
    )


def direct(folder: Path, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Value of the head at the last token, one sequence at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, 0])


def test_a_reward_model_scores_as_a_direct_forward(shared: Shared, reward_folder: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    groups = [
        group(0, "short", "a much longer answer", tokenizer=tokenizer),
        group(1, "x", tokenizer=tokenizer),
    ]
    expected = [direct(reward_folder, g.prompt.ids, r.ids) for g in groups for r in g.rollouts]
    assert len({round(v, 4) for v in expected}) == 3
    function = RewardFunction(name="rm", model=str(reward_folder), weight=2.0)
    with RewardPool(Rewards(functions=[function], batch_size=2), model_for_tokenizer=TINY, logs=None) as pool:
        scoring = pool.score(groups)
    parts = np.concatenate([g.parts["rm"] for g in scoring.groups])
    assert np.abs(parts - expected).max() < 1e-6
    assert np.array_equal(np.concatenate([g.rewards for g in scoring.groups]), 2 * parts)
    from_text = RewardModel(function, policy=None, batch_size=64, device=torch.device("cpu"))
    assert not from_text.reads_ids and np.abs(np.array(from_text.score(groups)) - expected).max() < 1e-6


def test_the_policys_ids_are_read_only_if_the_tokenizers_are_the_same(
    reward_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(TINY)
    function = RewardFunction(name="rm", model=str(reward_folder))
    exported = RewardModel(function, policy=TINY, batch_size=4, device=torch.device("cpu"))
    assert exported.reads_ids
    other = load_tokenizer(TINY)
    other.add_tokens(["one more"])
    assert not same_tokenizer(tokenizer, other)
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    changed = TINY.model_copy(update={"chat_template": str(tmp_path / "template.jinja")})
    assert not RewardModel(function, policy=changed, batch_size=4, device=torch.device("cpu")).reads_ids


def test_a_sequence_that_is_too_long_has_no_reward(reward_folder: Path) -> None:
    model = RewardModel(
        RewardFunction(name="rm", model=str(reward_folder)),
        policy=TINY,
        batch_size=4,
        device=torch.device("cpu"),
    )
    right, wrong = model.score([group(0, "fits", "x" * 2000, tokenizer=load_tokenizer(TINY))])
    assert isinstance(right, float) and isinstance(wrong, RewardFailure)
    assert "q.jsonl:1, sample 1" in wrong.reason and "reads 1024" in wrong.reason


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    loaded = load(TINY, seed=0, head="lm")
    weights = dict(loaded.model.named_parameters())
    folder = export(
        weights,
        base=loaded.model,
        tokenizer=loaded.tokenizer,
        directory=tmp_path / "lm",
        card="",
        dtype="float32",
    )
    with pytest.raises(ConfigError, match="is not a reward model"):
        RewardModel(
            RewardFunction(name="rm", model=str(folder)),
            policy=TINY,
            batch_size=4,
            device=torch.device("cpu"),
        )


def test_a_reward_model_without_enough_gpus_is_reported_at_once(shared: Shared, reward_folder: Path) -> None:
    config = Rewards(functions=[RewardFunction(name="rm", model=str(reward_folder), gpus=64)])
    with pytest.raises(NotEnoughResources, match="64 GPUs"):
        RewardPool(config, model_for_tokenizer=TINY, logs=None)


def test_http_stands_beside_functions(shared: Shared) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import json

            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"rewards": [10 * len(c) for c in request["completions"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    functions = [
        RewardFunction(name="far", url=f"http://127.0.0.1:{server.server_port}/"),
        RewardFunction(name="near", function=f"{shared.root}/mine.py:length"),
    ]
    with RewardPool(Rewards(functions=functions), model_for_tokenizer=None, logs=None) as pool:
        assert values(pool.score(GROUPS[:1])) == {0: [11.0, 22.0]}
        server.shutdown()
        server.server_close()
        started = time.monotonic()
        pool.rewards = pool.rewards.model_copy(update={"timeout_s": 0.5, "retries": 1})
        with pytest.raises(RewardsFailed, match=r"reward far: http://127\.0\.0\.1"):
            pool.score(GROUPS[:1])
        assert time.monotonic() - started < 5


def sandboxes() -> set[int]:
    """Living processes of reward functions on this machine."""
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"orchestrator.rollout.rewards.sandbox" in line:
            pids.add(int(folder.name))
    return pids


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
