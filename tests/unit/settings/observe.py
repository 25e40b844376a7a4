"""What a setting changes, seen without Ray: losses, advantages, tokens, drawn completions, DeepSpeed's
configuration, rewards, alerts.

Every function takes a recipe and gives something that can be compared. Where it can, it runs what a run would
run.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.algorithms.losses.advantages import Episodes
from orchestrator.algorithms.losses.interface import ExperienceTensors, TokenScores
from orchestrator.algorithms.schedule import learning_rate
from orchestrator.algorithms.table import build, critic
from orchestrator.cluster.deadlines import Deadlines
from orchestrator.cluster.placement import demands
from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import OrchestratorError
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.core.rollouts import Prompt, RewardedGroup, RolloutGroup
from orchestrator.data.dataset import DataSet
from orchestrator.learner.engine import deepspeed_config
from orchestrator.models.load import load, load_config, load_tokenizer
from orchestrator.observe.alerts import AlertRules
from orchestrator.plan.hardware import Hardware, hypothetical_hardware, this_machine
from orchestrator.plan.ways import given, lowest_stage, memory_limit, modes_of, ways_of
from orchestrator.recipe.schema import ONLINE, Alerts, Recipe, RewardFunction
from orchestrator.rollout.rewards.combine import score_with_retries, sum_components
from orchestrator.rollout.rewards.component import RewardCall, RewardFailure
from orchestrator.rollout.rewards.http import HttpReward
from orchestrator.rollout.rewards.sandbox import Confinement, Sandbox
from orchestrator.rollout.worker import RolloutWorker, make_engine
from orchestrator.run.inputs import read_data, read_prompts
from orchestrator.run.online import critic_recipe, sampling_of
from orchestrator.trainers.experience import sequences

# ---- losses


def _tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIR_SCORES = TokenScores(
    logps=_tensor(-1.0, -2.0, -0.5, -0.3, -0.7, -1.1, -0.4, -0.6, -1.3, -0.2),
    sequence=torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3]),
    examples=2,
    branches=2,
    ref_logps=_tensor(-1.2, -1.5, -0.6, -0.5, -0.9, -0.8, -0.7, -0.5, -1.0, -0.9),
    label=_tensor(1.0, 0.0),
    margin=_tensor(0.2, 0.1),
    wpo=_tensor(*(-0.1 * i for i in range(10))),
    rewards=torch.tensor([[0.4, 0.1], [-0.2, 0.3]], dtype=torch.float64),
)
"""Two pairs of unequal lengths; the second is one of an unwanted completion, for KTO."""
ROLLOUT_SCORES = TokenScores(
    logps=_tensor(-1.0, -2.0, -3.0, -0.5, -0.4, -0.9, -0.6),
    sequence=torch.tensor([0, 0, 1, 1, 2, 2, 2]),
    examples=1,
    branches=3,
    entropy=_tensor(1.0, 2.0, 4.0, 0.5, 0.2, 0.1, 0.7),
    values=_tensor(0.1, 0.9, -0.4, 0.2, 0.0, 0.3, 0.1),
    experience=ExperienceTensors(
        advantages=_tensor(1.0, 1.0, -2.0, -2.0, -2.0, -2.0, -2.0),
        sampled_logps=_tensor(-2.5, -0.5, -3.0, -0.1, -4.0, -0.2, -0.6),
        old_logps=_tensor(-1.9, -2.2, -4.2, -0.9, -0.05, -0.3, -0.5),
        ref_logps=_tensor(-1.0, -2.7, -2.3, -0.2, -0.9, -0.9, -0.8),
        values=_tensor(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        returns=_tensor(2.0, 2.0, -2.0, -2.0, -2.0, -2.0, -2.0),
    ),
)
"""Completions that are likelier than they were and good, likelier and bad, less likely and bad: each bound of
the ratio is met."""
ROLLOUT_UNITS = LossUnits(1, (2, 2, 3))


def loss(recipe: Recipe) -> float:
    """The objective of fixed scores."""
    algorithm = build(recipe.algorithm, recipe.rollouts)
    policy_gradient = recipe.algorithm.name in ONLINE and recipe.algorithm.name != "online_dpo"
    scores, units = (
        (ROLLOUT_SCORES, ROLLOUT_UNITS) if policy_gradient else (PAIR_SCORES, LossUnits(2, (4, 6)))
    )
    return float(algorithm.objective(scores, units).total)


def value_loss(recipe: Recipe) -> float:
    """The critic's, of fixed values."""
    return float(critic(recipe.algorithm).objective(ROLLOUT_SCORES, ROLLOUT_UNITS).total)


def advantages(recipe: Recipe) -> list[float]:
    """Of two groups of two completions with fixed rewards, penalties and values."""
    online = build(recipe.algorithm, recipe.rollouts).online
    assert online is not None and online.advantage is not None
    rewards = torch.tensor([[1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)
    episodes = Episodes(
        rewards, _tensor(*[0.0] * 8), (2, 2, 2, 2), values=_tensor(*(0.1 * i for i in range(8)))
    )
    found, returns = online.advantage(episodes)
    return [*found.tolist(), *([] if returns is None else returns.tolist())]


def needs_reference(recipe: Recipe) -> bool:
    return build(recipe.algorithm, recipe.rollouts).needs_reference


# ---- data


@lru_cache(maxsize=8)
def _data(key: str) -> DataSet:
    recipe = Recipe.model_validate_json(key)
    return read_data(recipe, build(recipe.algorithm))


def data(recipe: Recipe) -> DataSet:
    return _data(recipe.model_dump_json())


def shown(recipe: Recipe) -> list[str]:
    """The first training examples as text: prompt | completion | completion."""
    found = data(recipe)
    decode = found.tokenizer.decode
    return [" | ".join([decode(g.prompt), *(decode(b.ids) for b in g.branches)]) for g in found.groups[:2]]


def held_out(recipe: Recipe) -> list[str]:
    found = data(recipe)
    return [
        " | ".join([found.tokenizer.decode(g.prompt), *(found.tokenizer.decode(b.ids) for b in g.branches)])
        for g in found.held_out[:2]
    ]


def counts(recipe: Recipe) -> tuple[int, int, int]:
    """(rows, kept, bad)."""
    found = data(recipe)
    return len(found.loaded.rows), len(found.groups), len(found.loaded.bad)


def prompts(recipe: Recipe) -> list[str]:
    """Of an online recipe, with the columns that rewards see."""
    found = read_prompts(recipe, build(recipe.algorithm, recipe.rollouts))
    prompt = found.batches.at(0)[0]
    return [found.tokenizer.decode(prompt.ids), json.dumps(dict(prompt.columns), sort_keys=True)]


def order(recipe: Recipe) -> tuple[int, ...]:
    """Examples of the first steps."""
    batches = data(recipe).batches
    return tuple(g.id for at in (0, recipe.batch.effective) for g in batches.at(at))


def steps(recipe: Recipe) -> int:
    """Of a run without run.max_steps."""
    return data(recipe).batches.steps_in(recipe.run.epochs)


def answers(recipe: Recipe) -> tuple[str, ...]:
    """What greedy generation is compared with."""
    return data(recipe).answers


def last_batch(recipe: Recipe) -> int:
    """Examples of the batch at the end of an epoch of 6 rows in batches of 4."""
    return len(data(recipe).batches.at(4))


# ---- models


def config(recipe: Recipe) -> Any:
    return load_config(recipe.model)


def parameters(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """(trainable, their layers): of an adapter."""
    model = load(recipe.model, seed=0, head="lm").model
    learned = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(size for _, size in learned), tuple(
        sorted({name.split(".lora")[0].split(".")[-1] for name, _ in learned})
    )


def adapter(recipe: Recipe) -> Any:
    """peft's own configuration of it."""
    return load(recipe.model, seed=0, head="lm").model.peft_config["default"]  # pyright: ignore[reportIndexIssue]


def template(recipe: Recipe) -> str:
    return load_tokenizer(recipe.model).chat_template


def reference_weights(recipe: Recipe) -> str:
    """Fingerprint of the policy that the loss compares with."""
    return load(recipe.model, seed=0, head="lm", reference=True).fingerprint


def refusal(recipe: Recipe) -> str:
    """The kind of error that says why the data cannot be read."""
    try:
        read_data(recipe, build(recipe.algorithm))
    except OrchestratorError as error:
        return type(error).__name__
    return "read"


def knows_its_config(recipe: Recipe) -> bool:
    """False where a model folder's own code would have to run, and may not."""
    try:
        return load_config(recipe.model).hidden_size == 5
    except (ValueError, OrchestratorError):
        return False


# ---- how a step is cut and taken


def deepspeed(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration at the lowest stage that the recipe allows."""
    stage, sync = ways_of(recipe)[0]
    return deepspeed_config(recipe.learners, recipe.optimizer, stage, sync, 10**6)


def schedule(recipe: Recipe) -> list[float]:
    """Learning rates of a run of four steps."""
    return [learning_rate(recipe.optimizer, step, 4) for step in range(4)]


def stepped(recipe: Recipe) -> float:
    """A weight of 1 after two optimizer steps with gradients 3 and 0.2, by ZeRO 0's optimizer."""
    from orchestrator.learner.optimizer import GuardedAdamW

    weight = torch.nn.Parameter(torch.ones(1))
    o = recipe.optimizer
    adam = GuardedAdamW(
        [weight],
        max_norm=o.max_grad_norm or 0.0,
        lr=o.learning_rate,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
    )
    for gradient in (3.0, 0.2):
        weight.grad = torch.full((1,), gradient)
        adam.step()
    return float(weight)


def room(recipe: Recipe) -> int:
    """Bytes that a worker may use on a GPU of 80 GB."""
    return memory_limit(recipe, hypothetical_hardware(1, "h100-80g"))


def room_here(recipe: Recipe, hardware: Hardware | None = None) -> int:
    return memory_limit(recipe, hardware or this_machine())


def micro_batch(recipe: Recipe) -> tuple[int | None, int | None]:
    """(examples, positions) of a micro-batch as the recipe says."""
    from orchestrator.core.batches import Cut

    cut = given(recipe, build(recipe.algorithm), Cut(1, None, None, "padded", 0, "no_sync"))
    return cut.examples, cut.positions


def stages(recipe: Recipe) -> tuple[int, ...]:
    return tuple(stage for stage, _ in ways_of(recipe))


def syncs(recipe: Recipe) -> set[str]:
    return {sync for _, sync in ways_of(recipe)}


def checkpointing(recipe: Recipe) -> tuple[str, ...]:
    return modes_of(recipe)


def offload_stage(recipe: Recipe) -> int:
    return lowest_stage(recipe.learners)


def groups(recipe: Recipe) -> dict[str, tuple[int, float, float]]:
    """What each worker group asks of the cluster: workers, CPUs and GPUs of each."""
    online = build(recipe.algorithm, recipe.rollouts).online
    found = demands(recipe, critic=online is not None and online.critic, rollouts=online is not None)
    return {group.what: (group.workers, group.cpus, group.gpus) for group in found}


def critic_of(recipe: Recipe) -> Recipe:
    """What PPO's value model is trained with."""
    return critic_recipe(recipe)


def deadlines(recipe: Recipe) -> tuple[float, float]:
    """Of the learners: a verb's, and the one that collectives have."""
    found = Deadlines(recipe.learners.start_timeout_s, recipe.learners.timeout_s)
    return found.of("forward_backward"), found.collective_s


# ---- rollouts and rewards


def rolled_out(recipe: Recipe, prompts: int = 2) -> tuple[RolloutGroup, ...]:
    """Groups that an actor's worker draws for made-up prompts, here."""
    worker = RolloutWorker(recipe, torch.device("cpu"))
    worker.engine.commit(0)
    conversational = recipe.rollouts.environment is not None
    text: Any = [{"role": "user", "content": "1+2"}] if conversational else "ab"
    work = [
        (i, Prompt(i, f"made:{i}", 0, np.array([5, 6, 7 + i], np.int64), text, {"answer": "3"}))
        for i in range(prompts)
    ]
    return worker.roll_out(work, sampling_of(recipe), 0)


def drawn(recipe: Recipe) -> list[list[int]]:
    return [r.ids.tolist() for group in rolled_out(recipe) for r in group.rollouts]


def is_settled(recipe: Recipe) -> bool:
    """True where nothing is left to draw: all samples of a prompt are the same."""
    return all(len({tuple(r.ids.tolist()) for r in group.rollouts}) == 1 for group in rolled_out(recipe))


def scored_tokens(recipe: Recipe) -> int:
    """Tokens that count in the loss, of completions that were all cut off."""
    scored = [
        RewardedGroup(group, np.zeros(len(group.rollouts), np.float32), {}) for group in rolled_out(recipe)
    ]
    made = sequences(scored, mask_truncated=recipe.algorithm.mask_truncated)
    return sum(int(b.loss_mask.sum()) for g in made for b in g.branches)


def turns(recipe: Recipe) -> int:
    return max(r.turns for group in rolled_out(recipe) for r in group.rollouts)


def engine(recipe: Recipe) -> str:
    """Who decodes; vLLM is an optional package, and says so where it is not there."""
    try:
        return type(make_engine(recipe, torch.device("cpu"))).__name__
    except OrchestratorError as error:
        return error.what


CALL = RewardCall(["p", "q"], ["a", "bb"], [[1], [1, 2]], ["made:0, sample 0", "made:0, sample 1"], {})


def reward(recipe: Recipe) -> list[Any]:
    """What the first function gives in its own process, or the reason why it gives none."""
    with Sandbox(recipe.rewards.functions[0], Confinement.of(recipe.rewards, os.environ, None)) as sandbox:
        try:
            return [
                outcome.reason if isinstance(outcome, RewardFailure) else outcome
                for outcome in sandbox.score(CALL, recipe.rewards.timeout_s)
            ]
        except RewardFailure as failure:
            return [failure.reason]


class _Flaky:
    """A component that fails the first times, and counts how often it was asked and how long it may take."""

    name = "flaky"

    def __init__(self, failures: int) -> None:
        self.failures, self.asked, self.limit = failures, 0, 0.0

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[float]:
        self.asked, self.limit = self.asked + 1, max(self.limit, timeout_s)
        if self.asked <= self.failures:
            raise RewardFailure("not yet")
        return [1.0 for group in groups for _ in group.rollouts]


def asked(recipe: Recipe) -> tuple[int, float]:
    """(times, seconds) that a reward which always fails is given."""
    flaky = _Flaky(99)
    score_with_retries(
        flaky,
        rolled_out(recipe, prompts=1),
        timeout_s=recipe.rewards.timeout_s,
        retries=recipe.rewards.retries,
    )  # pyright: ignore[reportArgumentType]
    return flaky.asked, flaky.limit


def combined(recipe: Recipe) -> Any:
    """The total reward where every component gives 1, or what is said where half of the groups have none."""
    drawn_groups = rolled_out(recipe)
    judged = {
        f.name: score_with_retries(_Flaky(0), drawn_groups, timeout_s=1.0, retries=0)
        for f in recipe.rewards.functions
    }  # pyright: ignore[reportArgumentType]
    return sum_components(drawn_groups, recipe.rewards, judged).groups[0].rewards.tolist()


def half_dropped(recipe: Recipe) -> str:
    """Whether a batch of which one group of two has no reward ends the run."""
    drawn_groups = rolled_out(recipe)
    whole = score_with_retries(_Flaky(0), drawn_groups, timeout_s=1.0, retries=0)  # pyright: ignore[reportArgumentType]
    lame = replace(whole, rewards={0: whole.rewards[0]}, reasons={1: "none"})
    try:
        sum_components(drawn_groups, recipe.rewards, {f.name: lame for f in recipe.rewards.functions})
    except OrchestratorError:
        return "ended"
    return "went on"


def http(recipe: Recipe) -> list[tuple[str, str | None, int]]:
    """(path, the header X-Key, completions) of each request that a component with a url makes."""
    with _server() as (port, seen):
        function = recipe.rewards.functions[0]
        there = function.model_copy(update={"url": str(function.url).replace("PORT", str(port))})
        component = HttpReward(
            there, batch_size=recipe.rewards.batch_size, environment={"KEY": "k1", "OTHER": "k2"}, retry=False
        )
        component.score(rolled_out(recipe, prompts=1), 10.0)
    return sorted(seen)


@contextmanager
def _server() -> Iterator[tuple[int, list[tuple[str, str | None, int]]]]:
    seen: list[tuple[str, str | None, int]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("X-Key"), len(request["completions"])))
            body = json.dumps({"rewards": [1.0] * len(request["completions"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        server.server_close()


def function(recipe: Recipe) -> RewardFunction:
    return recipe.rewards.functions[0]


# ---- alerts


def alerts(recipe: Recipe) -> list[tuple[int, str]]:
    """(step, title) of what is said of a fixed history: rewards that fall and become equal, margins that grow
    alone, little time in steps, restarts, a component that falls while the rest rises, a held-out loss that
    rises."""
    limits = recipe.tracking.alerts
    if limits is None:
        return []
    rules, traded = AlertRules(limits), AlertRules(limits)
    said = [(0, alert.title) for alert in rules.started(0, [0.0, 10.0, 400.0])]
    for step in range(1, 13):
        metrics = {
            "reward/mean": 1.0 if step < 5 else 0.3,
            "kl": 0.1 * step,
            "reward/std": 0.5 if step < 9 else 0.02,
            "rewards/margins": 0.1 * step,
            "rewards/accuracies": 0.5 + 0.004 * step,
            "perf/goodput": 0.4,
            "perf/elapsed_s": 100.0 * step,
        }
        said += [(step, alert.title) for alert in rules.step(StepReport(step, metrics))]
    for step in range(1, 7):
        parts = {
            "reward/mean": 0.1 * step,
            "reward/std": 0.1,
            "reward/easy": 0.2 * step,
            "reward/hard": 0.9 - 0.1 * step,
        }
        said += [(step, alert.title) for alert in traded.step(StepReport(step, parts))]
        said += [
            (step, alert.title)
            for alert in rules.evaluation(EvaluationReport(step, {"eval/loss": 0.9 + 0.1 * step}))
        ]
    return said


def alert_limits(recipe: Recipe) -> Alerts:
    assert recipe.tracking.alerts is not None
    return recipe.tracking.alerts


# ---- files


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}
