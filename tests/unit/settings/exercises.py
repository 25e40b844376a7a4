"""Table of two values for each key, and what they change.

`Row`: `see` finds the effect of each value in a recipe, without Ray. `Run` (runs.py): two runs leave the
effect in their folders. `Elsewhere`: another test sets the key to more than one value.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.algorithms.table import build
from orchestrator.cluster.rollout_pool import _start_s
from orchestrator.recipe.schema import Recipe
from tests.unit.settings import observe as o
from tests.unit.settings.contexts import EXACT, GRPO


@dataclass(frozen=True, slots=True)
class Row:
    """Two values of a key whose effect a recipe shows."""

    see: Callable[[Recipe], Any]
    """Computes the effect of a recipe."""
    values: tuple[str, str]
    """The values as YAML."""
    wanted: tuple[Any, Any] | None = None
    """The effect of each value; None: they only differ."""
    given: tuple[str, ...] = ()
    """Overrides beside the key's context."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another test that sets the key to more than one value."""

    test: str
    """The test as "file::name"."""
    says: str = ""
    """Name that the test uses for the key; default: the last part of the key."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """A key of which no test can compare two values."""

    why: str
    """What would be needed."""


SEQUENCE = (
    "rollouts.max_new_tokens=6",
    "rollouts.samples=2",
    "model.tiny.hidden_size=32",
    "model.tiny.layers=1",
)
"""Rollouts that take little time."""
TALK = (f"rollouts.stop={list(string.ascii_letters + string.digits)}", "rollouts.max_new_tokens=400")
"""Turns that end early."""
SERVER = "rewards.functions=[{name: a, url: 'http://127.0.0.1:PORT/score'}]"
ALONE = ("tracking.alerts.steps=2", "tracking.alerts.accuracy_gain=1")
"""An early alert of margins that grow alone."""
FUNCTION = "rewards.functions=[{name: a, function: '%s'}]"


LIVE = "tests/faults/test_runs_that_live.py"


def _drawn(
    values: tuple[str, str],
    see: Callable[[Recipe], Any] = o.drawn,
    wanted: tuple[Any, Any] | None = None,
    *given: str,
) -> Row:
    return Row(see, values, wanted, (*SEQUENCE, *given))


def _group(what: str, at: int) -> Callable[[Recipe], Any]:
    """Workers (0), CPUs (1) or GPUs (2) of each of a worker group."""
    return lambda recipe: o.groups(recipe)[what][at]


def _alert(title: str) -> Callable[[Recipe], Any]:
    """When an alert is first given of a history, if it is."""
    return lambda recipe: next((step for step, found in o.alerts(recipe) if found == title), None)


def _tiny(see: Callable[[Recipe], Any], of: Callable[[Recipe], Recipe]) -> dict[str, Row]:
    """Rows of a made-up model, by the architecture's own configuration."""
    named = {
        "hidden_size": ("hidden_size", ("32", "64"), (32, 64)),
        "layers": ("num_hidden_layers", ("1", "3"), (1, 3)),
        "heads": ("num_attention_heads", ("2", "4"), (2, 4)),
        "kv_heads": ("num_key_value_heads", ("1", "2"), (1, 2)),
        "intermediate_size": ("intermediate_size", ("16", "48"), (16, 48)),
        "max_positions": ("max_position_embeddings", ("128", "256"), (128, 256)),
        "vocab_size": ("vocab_size", ("300", "320"), (300, 320)),
        "architecture": ("model_type", ("qwen2", "gemma"), ("qwen2", "gemma")),
    }

    def seen(name: str) -> Callable[[Recipe], Any]:
        return lambda recipe: getattr(see(of(recipe)), name)

    return {key: Row(seen(name), values, wanted) for key, (name, values, wanted) in named.items()}


def _lora(of: Callable[[Recipe], Recipe]) -> dict[str, Row]:
    return {
        "rank": Row(lambda r: o.adapter(of(r)).r, ("2", "4"), (2, 4)),
        "alpha": Row(lambda r: o.adapter(of(r)).lora_alpha, ("8", "3.2e1"), (8.0, 32.0)),
        "dropout": Row(lambda r: o.adapter(of(r)).lora_dropout, ("0", "0.5"), (0.0, 0.5)),
        "target_modules": Row(
            lambda r: o.parameters(of(r))[1],
            ("[q_proj]", "[k_proj, v_proj]"),
            (("q_proj",), ("k_proj", "v_proj")),
        ),
    }


def _columns(see: Callable[[Recipe], Any]) -> dict[str, Row]:
    """Each pair of values names two columns of rows.jsonl."""
    names = {
        "messages": ("talk", "talk2"),
        "prompt": ("p1", "p2"),
        "completion": ("c1", "c2"),
        "chosen": ("c1", "c2"),
        "rejected": ("c1", "c2"),
    }
    rows = {name: Row(see, values) for name, values in names.items()}
    return rows | {
        "label": Row(
            lambda r: [g.label for g in o.data(r).groups[:2]], ("l1", "l2"), ([1.0, 1.0], [0.0, 0.0])
        )
    }


MARGINS = Row(lambda r: [g.margin for g in o.data(r).groups[:2]], ("m1", "m2"), ([1.0, 1.0], [2.0, 2.0]))
HELD = ("data.eval=held.jsonl",)
SPOKEN = ("model.chat_template=inputs.jinja",)
"""Rows whose template shows what it is given beside the messages."""


def _inputs(see: Callable[[Recipe], Any], place: str) -> dict[str, Row]:
    """place: of `{messages: talk, %s}`, an override."""
    return {
        "tools": Row(see, ("t1", "t2"), None, (*SPOKEN, place)),
        "chat_template_kwargs": Row(see, ("k1", "k2"), None, (*SPOKEN, place)),
        "images": Row(o.refusal, ("null", "p1"), ("read", "DataError"), (place,)),
        "environment": Row(o.refusal, ("null", "p1"), ("read", "DataError"), (place,)),
    }


TALKING = "{path: %s, columns: {messages: talk, %%s}}"
ANSWERS = Row(lambda r: o.answers(r)[0], ("c1", "c2"), ("one", "two"), HELD)
TEXTS = "data.%s=[{path: texts.jsonl, columns: {%%s}}]"
SEEN_HELD = _columns(o.held_out) | {
    "label": Row(lambda r: [g.label for g in o.data(r).held_out[:2]], ("l1", "l2"), ([1.0, 1.0], [0.0, 0.0]))
}
SOURCES: dict[str, Row] = {
    "path": Row(o.shown, ("rows.jsonl", "other.jsonl")),
    "max_rows": Row(lambda r: o.counts(r)[0], ("2", "3"), (2, 3)),
    "split": Row(o.shown, ("train", "eval")),
}
HELD_SOURCES: dict[str, Row] = {
    "path": Row(o.held_out, ("held.jsonl", "other.jsonl")),
    "max_rows": Row(lambda r: len(o.data(r).held_out), ("2", "3"), (2, 3)),
    "split": Row(o.held_out, ("train", "eval")),
}
FOLLOWS = "tests/unit/trainers/test_offline.py::test_the_reference_follows_the_policy_every_n_steps"
BRIDGE = "tests/invariants/test_weight_bridge.py"
SNAPSHOTS = ("a" * 40, "b" * 40)

EXERCISES: dict[str, Row | Elsewhere | Unseen] = {
    # ---- run, model
    "run.seed": Row(o.order, ("0", "1")),
    "run.epochs": Row(o.steps, ("1", "2.5"), (1, 3), ("batch.effective=4", "data.remainder=drop")),
    "model.tiny": Row(
        lambda r: o.config(r).hidden_size, ("{hidden_size: 32}", "{hidden_size: 64}"), (32, 64)
    ),
    "model.lora": Row(lambda r: o.parameters(r)[0], ("null", "{}")),
    "model.revision": Row(lambda r: o.config(r).hidden_size, SNAPSHOTS, (16, 32)),
    "model.trust_remote_code": Row(
        o.knows_its_config, ("false", "true"), (False, True), ("model.path=remote",)
    ),
    "critic.model": Row(
        lambda r: o.config(o.critic_of(r)).hidden_size, ("{path: small}", "{path: large}"), (16, 32)
    ),
    "critic.model.tiny": Row(
        lambda r: o.config(o.critic_of(r)).hidden_size, ("{hidden_size: 32}", "{hidden_size: 64}"), (32, 64)
    ),
    "critic.model.lora": Row(lambda r: o.parameters(o.critic_of(r))[0], ("null", "{}")),
    "critic.model.revision": Row(lambda r: o.config(o.critic_of(r)).hidden_size, SNAPSHOTS, (16, 32)),
    "critic.model.trust_remote_code": Row(
        lambda r: o.knows_its_config(o.critic_of(r)),
        ("false", "true"),
        (False, True),
        ("critic.model.path=remote",),
    ),
    "model.path": Row(lambda r: o.config(r).hidden_size, ("small", "large"), (16, 32)),
    "model.chat_template": Row(o.template, ("one.jinja", "two.jinja"), ("{{ 1 }}", "{{ 2 }}")),
    "model.reference": Row(o.reference_weights, ("small", "large")),
    **{f"model.tiny.{key}": row for key, row in _tiny(o.config, lambda r: r).items()},
    **{f"critic.model.tiny.{key}": row for key, row in _tiny(o.config, o.critic_of).items()},
    **{f"model.lora.{key}": row for key, row in _lora(lambda r: r).items()},
    **{f"critic.model.lora.{key}": row for key, row in _lora(o.critic_of).items()},
    "critic.model.path": Row(lambda r: o.config(o.critic_of(r)).hidden_size, ("small", "large"), (16, 32)),
    "critic.model.chat_template": Row(
        lambda r: o.template(o.critic_of(r)), ("one.jinja", "two.jinja"), ("{{ 1 }}", "{{ 2 }}")
    ),
    # ---- data
    "data.train": Row(o.shown, ("rows.jsonl", "other.jsonl")),
    "data.eval": Row(o.held_out, ("held.jsonl", "other.jsonl")),
    "data.max_bad_rows": Row(o.counts, ("1", "2"), ((6, 6, 1), (6, 6, 1)), ("data.train=bad.jsonl",)),
    "data.max_length": Row(o.shown, ("9", "12"), None, ("data.overlong=truncate_end",)),
    "data.overlong": Row(o.shown, ("truncate_end", "truncate_prompt_left"), None, ("data.max_length=10",)),
    "data.remainder": Row(o.last_batch, ("carry", "use"), (4, 2), ("batch.effective=4",)),
    "data.append_eos": Row(o.shown, ("true", "false")),
    **{f"data.columns.{key}": row for key, row in _columns(o.shown).items()},
    "data.columns.text": Row(o.shown, ("c1", "c2"), None, ("data.train=texts.jsonl",)),
    "data.train[].columns.text": Row(o.shown, ("c1", "c2"), None, (TEXTS % "train",)),
    "data.eval[].columns.text": Row(o.held_out, ("c1", "c2"), None, (TEXTS % "eval",)),
    "data.columns.margin": MARGINS,
    "data.columns.answer": ANSWERS,
    **{f"data.train[].columns.{key}": row for key, row in _columns(o.shown).items()},
    "data.train[].columns.margin": MARGINS,
    "data.train[].columns.answer": Row(
        lambda r: [row.answer for row in o.data(r).loaded.rows[:1]], ("c1", "c2"), (["one"], ["two"])
    ),
    **{f"data.eval[].columns.{key}": row for key, row in SEEN_HELD.items()},
    "data.eval[].columns.margin": Row(
        lambda r: [g.margin for g in o.data(r).held_out[:1]], ("m1", "m2"), ([1.0], [2.0])
    ),
    "data.eval[].columns.answer": Row(lambda r: o.answers(r)[0], ("c1", "c2"), ("one", "two")),
    **{f"data.train[].{key}": row for key, row in SOURCES.items()},
    **{f"data.eval[].{key}": row for key, row in HELD_SOURCES.items()},
    "data.train[].weight": Row(o.steps, ("1", "2"), (1, 3), ("batch.effective=4", "data.remainder=drop")),
    "data.train[].subset": Row(o.shown, ("one", "two")),
    "data.eval[].subset": Row(o.held_out, ("one", "two")),
    **{
        f"data.columns.{key}": row
        for key, row in _inputs(o.shown, "data.columns={messages: talk, %s}").items()
    },
    **{
        f"data.train[].columns.{key}": row
        for key, row in _inputs(o.shown, f"data.train=[{TALKING % 'rows.jsonl'}]").items()
    },
    **{
        f"data.eval[].columns.{key}": row
        for key, row in _inputs(o.held_out, f"data.eval=[{TALKING % 'held.jsonl'}]").items()
    },
    **{
        f"data.{spec}[].revision": Row(o.refusal, ("null", "abc"), ("ConfigError", "MissingInput"))
        for spec in ("train", "eval")
    },
    "data.train[].columns": Row(o.shown, ("{prompt: p1}", "{prompt: p2}")),
    "data.eval[].columns": Row(o.held_out, ("{prompt: p1}", "{prompt: p2}")),
    # ---- algorithm
    "algorithm.name": Row(o.needs_reference, ("sft", "dpo"), (False, True)),
    "algorithm.loss": Row(o.loss, ("hinge", "{sigmoid: 0.5, ipo: 1}")),
    "algorithm.advantage": Row(
        o.advantages,
        ("tests.unit.settings.own:ones", "tests.unit.settings.own:twos"),
        ([1.0] * 8 + [0.0] * 8, [2.0] * 8 + [0.0] * 8),
    ),
    "algorithm.beta": Row(o.loss, ("0.1", "0.5")),
    "algorithm.label_smoothing": Row(o.loss, ("0", "0.1")),
    "algorithm.f_divergence": Row(o.loss, ("reverse_kl", "js")),
    "algorithm.f_alpha": Row(o.loss, ("0.5", "0.9")),
    "algorithm.ld_alpha": Row(o.loss, ("0.2", "0.8")),
    "algorithm.wpo": Row(o.loss, ("true", "false")),
    "algorithm.ipo_length_average": Row(o.loss, ("true", "false")),
    "algorithm.simpo_gamma": Row(o.loss, ("0.5", "1.5")),
    "algorithm.discopop_tau": Row(o.loss, ("0.05", "0.5")),
    "algorithm.reward_centring": Row(o.loss, ("0", "0.1")),
    "algorithm.kto_desirable_weight": Row(o.loss, ("1", "2")),
    "algorithm.kto_undesirable_weight": Row(o.loss, ("1", "2")),
    "algorithm.reference_sync_every": Elsewhere(FOLLOWS, "reference_sync"),
    "algorithm.reference_sync_alpha": Elsewhere(FOLLOWS, "reference_sync"),
    "algorithm.normaliser": Row(o.loss, ("token", "sequence")),
    "algorithm.clip.low": Row(o.loss, ("0.1", "0.5")),
    "algorithm.clip.high": Row(o.loss, ("0.1", "0.5")),
    "algorithm.clip.dual": Row(o.loss, ("1.1", "2")),
    "algorithm.kl.coefficient": Row(o.loss, ("0.1", "0.5")),
    "algorithm.kl.place": Row(o.loss, ("loss", "reward")),
    "algorithm.kl.estimator": Row(o.loss, ("k2", "k3")),
    "algorithm.kl.ratio": Row(o.loss, ("true", "false")),
    "algorithm.correction.kind": Row(o.loss, ("none", "token")),
    "algorithm.correction.cap": Row(o.loss, ("1.5", "8")),
    "algorithm.entropy_bonus": Row(o.loss, ("0", "0.1")),
    "algorithm.gamma": Row(o.advantages, ("1", "0.5")),
    "algorithm.gae_lambda": Row(o.advantages, ("0.95", "0.1")),
    "algorithm.whiten": Row(o.advantages, ("true", "false")),
    "algorithm.scale_by_std": Row(o.advantages, ("true", "false")),
    "algorithm.value_clip": Row(o.value_loss, ("0.2", "null")),
    "algorithm.mask_truncated": _drawn(
        ("true", "false"), o.scored_tokens, (0, 8), "rollouts.max_new_tokens=2", "rollouts.top_k=1"
    ),
    # ---- batch, optimizer, learners
    "batch.micro_batch": Row(o.micro_batch, ("4", "auto"), ((4, None), (None, 1))),
    "batch.micro_batch_tokens": Row(o.micro_batch, ("512", "2048"), ((None, 512), (None, 2048))),
    "batch.memory_utilisation": Row(
        o.room,
        ("0.5", "1"),
        (40 * 10**9, 80 * 10**9),
        ("learners.gpus_per_worker=1", "batch.memory_limit_gb=80"),
    ),
    "batch.memory_limit_gb": Row(o.room, ("10", "20"), (8 * 10**9, 16 * 10**9)),
    "optimizer.learning_rate": Row(o.schedule, ("1e-3", "2e-3"), ([1e-3] * 4, [2e-3] * 4)),
    "optimizer.schedule": Row(
        o.schedule, ("constant", "linear"), ([1e-3] * 4, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    ),
    "optimizer.warmup_steps": Row(o.schedule, ("0", "2"), ([1e-3] * 4, [0.0, 0.5e-3, 1e-3, 1e-3])),
    "optimizer.warmup_ratio": Row(o.schedule, ("0", "0.3"), ([1e-3] * 4, [0.0, 0.5e-3, 1e-3, 1e-3])),
    "optimizer.min_learning_rate": Row(o.schedule, ("0", "1e-3")),
    "optimizer.betas": Row(o.stepped, ("[0.9, 0.999]", "[0.5, 0.9]")),
    "optimizer.eps": Row(o.stepped, ("1e-8", "0.1")),
    "optimizer.weight_decay": Row(o.stepped, ("0", "0.1")),
    "optimizer.max_grad_norm": Row(
        lambda r: (o.deepspeed(r)["gradient_clipping"], o.stepped(r)),
        ("null", "0.5"),
        None,
        ("learners.zero_stage=1",),
    ),
    "learners.gpus_per_worker": Row(_group("learners", 2), ("0", "0.5"), (0.0, 0.5)),
    "learners.cpus_per_worker": Row(_group("learners", 1), ("1", "0.5"), (1.0, 0.5)),
    "learners.zero_stage": Row(o.stages, ("1", "3"), ((1,), (3,))),
    "learners.sync": Row(o.syncs, ("no_sync", "per_micro_batch"), ({"no_sync"}, {"per_micro_batch"})),
    "learners.precision": Row(
        lambda r: o.deepspeed(r).get("bf16"), ("fp32", "bf16"), (None, {"enabled": True})
    ),
    "learners.offload.optimizer": Row(
        lambda r: (o.offload_stage(r), o.deepspeed(r)["zero_optimization"].get("offload_optimizer")),
        ("none", "cpu"),
        ((0, None), (1, {"device": "cpu", "pin_memory": True})),
    ),
    "learners.offload.parameters": Row(
        lambda r: (o.offload_stage(r), o.deepspeed(r)["zero_optimization"].get("offload_param")),
        ("none", "cpu"),
        ((0, None), (3, {"device": "cpu", "pin_memory": True})),
    ),
    "learners.activation_checkpointing": Row(o.checkpointing, ("none", "full"), (("none",), ("full",))),
    "learners.fused": Row(o.stages, ("false", "true"), ((0, 1, 2, 2, 3), (0, 1, 2, 2))),
    "learners.timeout_s": Row(lambda r: o.deadlines(r)[0], ("60", "600"), (60.0, 600.0)),
    "learners.start_timeout_s": Row(lambda r: o.deadlines(r)[1], ("900", "1800"), (960.0, 1860.0)),
    "checkpoint.final": Elsewhere(f"{LIVE}::test_weights_alone_are_a_third_and_cannot_be_extended"),
    "export.dtype": Elsewhere(f"{LIVE}::test_moved_extended_and_evaluated_otherwise_it_is_the_same_run"),
    "export.lora": Elsewhere(f"{LIVE}::test_lora_is_exported_as_the_recipe_says"),
    "learners.max_restarts": Elsewhere(
        "tests/end_to_end/test_settings.py::test_a_lost_worker_is_replaced_as_often_as_the_recipe_says"
    ),
    # ---- rollouts, rewards, critic
    "rollouts.gpus_per_worker": Row(_group("rollouts", 2), ("0", "0.5"), (0.0, 0.5)),
    "rollouts.cpus_per_worker": Row(_group("rollouts", 1), ("1", "0.5"), (1.0, 0.5)),
    "rollouts.placement": Row(
        lambda r: sorted(o.groups(r)), ("separate", "colocated"), (["learners", "rollouts"], ["learners"])
    ),
    "rollouts.engine": Row(o.engine, ("transformers", "vllm"), None, SEQUENCE),
    "rollouts.batching": Elsewhere(
        "tests/unit/rollout/test_paged_decoder.py::test_the_recipe_and_the_device_name_the_decoder"
    ),
    "rollouts.max_staleness": Elsewhere(
        "tests/faults/test_online_recovery.py::test_generation_runs_one_version_ahead_and_never_more"
    ),
    "rollouts.update": Elsewhere(
        "tests/faults/test_online_recovery.py::test_weights_may_change_between_the_requests_of_a_batch"
    ),
    "rollouts.transport": Elsewhere(f"{BRIDGE}::test_the_transport_follows_from_the_recipe"),
    "rollouts.replay": Elsewhere(
        "tests/end_to_end/test_online.py::test_a_recorded_run_is_learned_again_to_the_last_bit"
    ),
    "rollouts.timeout_s": Elsewhere(
        f"{BRIDGE}::test_an_actor_that_hangs_in_a_broadcast_is_named_and_replaced"
    ),
    "rollouts.max_restarts": Elsewhere(
        f"{BRIDGE}::test_an_actor_that_hangs_in_a_broadcast_is_named_and_replaced"
    ),
    "rollouts.start_timeout_s": Row(_start_s, ("null", "7"), (180.0, 7.0)),
    "algorithm.correction.alarm": Elsewhere(
        "tests/unit/trainers/test_online.py::test_a_gap_above_the_alarm_is_noted"
    ),
    "algorithm.dynamic_sampling": Row(
        lambda r: build(r.algorithm, r.rollouts).online.dynamic_sampling, ("true", "false"), (True, False)
    ),
    "algorithm.max_resampled": Elsewhere(
        "tests/unit/trainers/test_online.py::test_dynamic_sampling_replaces_groups_without_signal_and_consumes_what_it_drew"
    ),
    "rewards.normalise": Elsewhere("tests/unit/trainers/test_online.py::test_running_rewards_follow_numpy"),
    "rewards.functions[].revision": Unseen("a reward model on the hub is needed, and there is no hub"),
    "evaluation.generate": Row(lambda r: len(o.answers(r)), ("null", "{}"), (0, 6)),
    "evaluation.generate.checker": Elsewhere(
        "tests/unit/trainers/test_evaluation.py::test_generations_are_checked_and_shown"
    ),
    "tracking.alerts": Row(
        lambda r: len(o.alerts(r)) > 0, ("null", "{goodput: 1, goodput_after_s: 0, steps: 1}"), (False, True)
    ),
    "rollouts.rows_at_once": _drawn(("1", "8"), lambda r: r.rollouts.rows, (1, 8)),
    "rollouts.temperature": _drawn(("0.5", "2")),
    "rollouts.top_p": _drawn(("1e-3", "1"), o.is_settled, (True, False)),
    "rollouts.top_k": _drawn(("1", "200"), o.is_settled, (True, False)),
    "rollouts.min_p": _drawn(("0.99", "0")),
    "rollouts.stop": _drawn(("[]", "['a', 'e', 'i', 'o', 'u', 'A', 'E', ' ', '1', '2', 'é', '.', ',']")),
    "rollouts.max_turns": _drawn(("1", "3"), o.turns, (1, 3), "rollouts.environment=talks.py:Talks", *TALK),
    "rollouts.environment": _drawn(("talks.py:Quiet", "talks.py:Talks"), o.turns, (1, 8), *TALK),
    "rewards.timeout_s": Row(o.asked, ("1", "2"), ((3, 1.0), (3, 2.0)), SEQUENCE),
    "rewards.retries": Row(o.asked, ("0", "4"), ((1, 60.0), (5, 60.0)), SEQUENCE),
    "rewards.max_dropped_fraction": Row(
        o.half_dropped, ("0.4", "0.5"), ("ended", "went on"), (*SEQUENCE, EXACT % "")
    ),
    "rewards.memory_limit_gb": Row(o.reward, ("0.5", "4"), None, (FUNCTION % "judge.py:hoards",)),
    "rewards.environment": Row(
        o.reward, ("[]", "[JUDGE]"), ([0.0, 0.0], [7.0, 7.0]), (FUNCTION % "judge.py:of_variable",)
    ),
    "rewards.batch_size": Row(
        lambda r: [count for *_, count in o.http(r)], ("1", "8"), ([1, 1], [2]), (*SEQUENCE, SERVER)
    ),
    "rewards.functions[].function": Row(
        o.reward, ("judge.py:ones", "judge.py:twos"), ([1.0, 1.0], [2.0, 2.0])
    ),
    "rewards.functions[].options": Row(
        o.reward,
        ("{strict: false, x: .nan}", "{strict: true, x: 2}"),
        ([0.0, 0.0], [3.0, 3.0]),
        (*GRPO, "rewards.functions=[{name: a, function: 'judge.py:optional', %s}]"),
    ),
    "rewards.functions[].weight": Row(o.combined, ("1", "0.5"), ([1.0, 1.0], [0.5, 0.5]), SEQUENCE),
    "rewards.functions[].url": Row(
        lambda r: o.http(r)[0][0],
        ("'http://127.0.0.1:PORT/a'", "'http://127.0.0.1:PORT/b'"),
        ("/a", "/b"),
        SEQUENCE,
    ),
    "rewards.functions[].headers_from": Row(
        lambda r: o.http(r)[0][1],
        ("{X-Key: KEY}", "{X-Key: OTHER}"),
        ("k1", "k2"),
        (*GRPO, *SEQUENCE, "rewards.functions=[{name: a, url: 'http://127.0.0.1:PORT/a', %s}]"),
    ),
    "rewards.functions[].model": Elsewhere(
        "tests/faults/test_reward_pool.py::test_a_reward_model_scores_as_a_direct_forward", "model"
    ),
    "rewards.functions[].gpus": Elsewhere(
        "tests/faults/test_reward_pool.py::test_a_reward_model_without_enough_gpus_is_reported_at_once",
        "gpus",
    ),
    "critic.workers": Row(_group("critic", 0), ("1", "2"), (1, 2)),
    "critic.gpus_per_worker": Row(_group("critic", 2), ("0", "0.5"), (0.0, 0.5)),
    "critic.cpus_per_worker": Row(_group("critic", 1), ("1", "0.5"), (1.0, 0.5)),
    "critic.learning_rate": Row(
        lambda r: o.schedule(o.critic_of(r)), ("1e-2", "1e-1"), ([1e-2] * 4, [1e-1] * 4)
    ),
    # ---- tracking
    **{
        f"tracking.{key}": Elsewhere(
            "tests/unit/settings/test_tracking_keys.py::test_a_run_stands_where_the_recipe_says"
        )
        for key in ("project", "entity", "group", "init_timeout_s", "finish_timeout_s")
    },
    "tracking.alerts.steps": Row(
        _alert("goodput low"), ("1", "4"), (1, 4), ("tracking.alerts.goodput_after_s=0",)
    ),
    "tracking.alerts.reward_drop": Row(
        _alert("reward collapse"), ("0.5", "100"), None, ("tracking.alerts.steps=2",)
    ),
    "tracking.alerts.reward_spread": Row(
        _alert("rewards without spread"), ("0.5", "0"), None, ("tracking.alerts.steps=2",)
    ),
    "tracking.alerts.margin_growth": Row(_alert("margin without accuracy"), ("0.1", "0.8"), None, ALONE),
    "tracking.alerts.accuracy_gain": Row(
        _alert("margin without accuracy"), ("0.001", "1"), None, ("tracking.alerts.steps=2",)
    ),
    "tracking.alerts.accuracy_enough": Row(_alert("margin without accuracy"), ("0.1", "0.9"), None, ALONE),
    "tracking.alerts.loss_rise": Row(_alert("held-out loss rose"), ("0.01", "0.5"), (2, None)),
    "tracking.alerts.kl": Row(_alert("far from the reference"), ("0.5", "100"), None),
    "tracking.alerts.component_fall": Row(
        _alert("a component falls"), ("0.2", "0.9"), None, ("tracking.alerts.steps=2",)
    ),
    "tracking.alerts.restarts": Row(_alert("repeated restarts"), ("2", "3"), (0, None)),
    "tracking.alerts.restarts_s": Row(
        _alert("repeated restarts"), ("100", "1000"), (None, 0), ("tracking.alerts.restarts=2",)
    ),
    "tracking.alerts.goodput": Row(
        _alert("goodput low"), ("0.5", "0.3"), (1, None), ("tracking.alerts={steps: 1, goodput_after_s: 0}",)
    ),
    "tracking.alerts.goodput_after_s": Row(
        _alert("goodput low"), ("0", "500"), (2, 6), ("tracking.alerts.steps=2",)
    ),
}
