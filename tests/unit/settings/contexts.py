"""For each key a recipe that reads it and, if not every run reads it, one that does not."""

from dataclasses import dataclass

SFT = ("algorithm.name=sft",)
DPO = ("algorithm.name=dpo",)
GRPO = ("algorithm.name=grpo",)
PPO = ("algorithm.name=ppo",)
KTO = ("algorithm.name=kto",)
REWARD = ("algorithm.name=reward",)
EVAL = ("data.eval=held.jsonl",)
EXACT = "rewards.functions=[{name: exact, function: exact_match%s}]"
BASE = (
    "model: {tiny: {}}\ndata: {train: rows.jsonl}\nalgorithm: {name: sft}\noptimizer: {learning_rate: 1e-3}\n"
)
"""The plainest recipe: SFT, nothing held out."""


@dataclass(frozen=True, slots=True)
class Context:
    """Overrides of BASE that decide whether a key is read."""

    read: tuple[str, ...] = ()
    """Overrides with which the key is read."""
    unread: tuple[str, ...] | None = None
    """Overrides with which it is not read; None if every run reads it."""


PLAIN = Context()


def _only(*read: str) -> Context:
    """Not read by the plainest recipe."""
    return Context(read, ())


FILE = {"train": "rows.jsonl", "eval": "held.jsonl"}


def _in(spec: str, read: str | None = None, unread: str | None = None) -> Context:
    """A key of an entry of data.train or data.eval; the key itself goes where %s stands."""
    read = read or f"path: {FILE[spec]}"
    return Context(
        (f"data.{spec}=[{{{read}, %s}}]",), None if unread is None else (f"data.{spec}=[{{{unread}, %s}}]",)
    )


def context(path: str) -> Context:
    """The context of a key: its own, or that of the longest section that has one."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        if (found := CONTEXTS.get(".".join(parts[:count]))) is not None:
            return found
    return PLAIN


OF_FUNCTION = (*GRPO, "rewards.functions=[{name: a, function: m:f, %s}]")
OF_MODEL = (*GRPO, "rewards.functions=[{name: a, model: org/rm, %s}]")
OF_URL = (*GRPO, "rewards.functions=[{name: a, url: 'http://h', %s}]")
HUB = "path: org/rows, revision: abc"
ONLINE_EVAL = (*GRPO, *EVAL)
COLUMNS = {
    "messages": (SFT, DPO),
    "text": (SFT, DPO),
    "completion": (SFT, DPO),
    "chosen": (DPO, SFT),
    "rejected": (DPO, SFT),
    "label": (KTO, SFT),
    "margin": (REWARD, DPO),
    "answer": ((*SFT, *EVAL, "evaluation.generate={}"), SFT),
}
ALL_READ = ("prompt", "tools", "chat_template_kwargs", "images", "environment")
"""Columns that every kind of data reads, or refuses."""
CONTEXTS: dict[str, Context] = {
    "run.epochs": Context((), ("run.max_steps=2",)),
    "model.path": Context(("model.tiny=null",)),
    "model.revision": Context(("model.tiny=null", "model.path=org/name"), ()),
    "model.trust_remote_code": Context(("model.tiny=null", "model.path=org/name"), ()),
    "model.reference": _only(*DPO),
    "model.lora": PLAIN,
    "export.lora": Context(("model.lora={}",), ()),
    "data.append_eos": Context((), GRPO),
    "optimizer.warmup_ratio": Context((), ("optimizer.warmup_steps=1",)),
    **dict.fromkeys(
        ("data.columns", *(f"data.columns.{name}" for name in ALL_READ)),
        Context((), ("data.train=[{path: rows.jsonl, columns: {}}]",)),
    ),
    **{f"data.columns.{name}": Context(*pair) for name, pair in COLUMNS.items()},
    **{f"data.{spec}[]": _in(spec) for spec in ("train", "eval")},
    **{f"data.{spec}[].path": Context((f"data.{spec}=[{{%s}}]",)) for spec in ("train", "eval")},
    "data.eval[].weight": Context((), ("data.eval=[{path: rows.jsonl, %s}]",)),
    **{f"data.{spec}[].split": _in(spec, "path: toy:sft", "path: rows.jsonl") for spec in ("train", "eval")},
    **{f"data.{spec}[].subset": _in(spec, "path: sets", "path: toy:sft") for spec in ("train", "eval")},
    **{f"data.{spec}[].revision": _in(spec, "path: org/rows", "path: toy:sft") for spec in ("train", "eval")},
    **{
        f"data.{spec}[].columns.{name}": Context(
            (*read, f"data.{spec}=[{{path: {FILE[spec]}, columns: {{%s}}}}]"),
            (*unread, f"data.{spec}=[{{path: {FILE[spec]}, columns: {{%s}}}}]"),
        )
        for spec in ("train", "eval")
        for name, (read, unread) in COLUMNS.items()
        if name != "answer"
    },
    "data.train[].columns.answer": Context(
        (*SFT, *EVAL, "evaluation.generate={}", "data.train=[{path: rows.jsonl, columns: {%s}}]"),
        ("data.train=[{path: rows.jsonl, columns: {%s}}]",),
    ),
    "data.eval[].columns.answer": Context(
        ("data.eval=[{path: held.jsonl, columns: {%s}}]", "evaluation.generate={}"),
        ("data.eval=[{path: held.jsonl, columns: {%s}}]",),
    ),
    **{
        f"data.{spec}[].columns.{name}": Context((f"data.{spec}=[{{path: {FILE[spec]}, columns: {{%s}}}}]",))
        for spec in ("train", "eval")
        for name in ALL_READ
    },
    "algorithm.loss": _only(*DPO),
    "algorithm.advantage": Context(GRPO, ("algorithm.name=online_dpo",)),
    "algorithm.beta": _only(*DPO),
    "algorithm.label_smoothing": Context(DPO, (*DPO, "algorithm.loss=hinge")),
    "algorithm.f_divergence": Context(DPO, (*DPO, "algorithm.loss=nca_pair")),
    "algorithm.f_alpha": Context((*DPO, "algorithm.f_divergence=alpha"), DPO),
    "algorithm.ld_alpha": _only(*DPO),
    "algorithm.wpo": _only(*DPO),
    "algorithm.ipo_length_average": Context((*DPO, "algorithm.loss=ipo"), DPO),
    "algorithm.simpo_gamma": Context(("algorithm.name=simpo",), DPO),
    "algorithm.discopop_tau": Context((*DPO, "algorithm.loss={discopop: 1}"), DPO),
    "algorithm.reward_centring": Context(REWARD, DPO),
    "algorithm.kto_desirable_weight": Context(KTO, DPO),
    "algorithm.kto_undesirable_weight": Context(KTO, DPO),
    "algorithm.reference_sync_every": Context(DPO, ("algorithm.name=online_dpo",)),
    "algorithm.reference_sync_alpha": Context((*DPO, "algorithm.reference_sync_every=2"), DPO),
    "algorithm.epochs": _only(*GRPO),
    "algorithm.normaliser": Context(GRPO, ("algorithm.name=online_dpo",)),
    "algorithm.clip": Context(GRPO, ("algorithm.name=online_dpo",)),
    "algorithm.clip.low": Context(GRPO, ("algorithm.name=cispo",)),
    "algorithm.clip.dual": Context(GRPO, ("algorithm.name=cispo",)),
    "algorithm.kl": Context((*GRPO, "algorithm.kl.coefficient=0.1"), GRPO),
    "algorithm.kl.coefficient": Context(GRPO, ("algorithm.name=online_dpo",)),
    "algorithm.kl.ratio": Context(
        (*GRPO, "algorithm.kl.coefficient=0.1"), (*GRPO, "algorithm.kl={coefficient: 0.1, place: reward}")
    ),
    "algorithm.kl.horizon": Context(
        (*GRPO, "algorithm.kl.coefficient=0.1", "algorithm.kl.target=1"),
        (*GRPO, "algorithm.kl.coefficient=0.1"),
    ),
    "algorithm.correction": _only(*GRPO),
    "algorithm.correction.cap": Context(GRPO, (*GRPO, "algorithm.correction.kind=none")),
    "algorithm.correction.alarm": Context(GRPO, (*GRPO, "rollouts.max_staleness=1")),
    "algorithm.entropy_bonus": _only(*GRPO),
    **{f"algorithm.{name}": Context(PPO, GRPO) for name in ("gamma", "gae_lambda", "value_clip", "whiten")},
    "algorithm.scale_by_std": Context(GRPO, ("algorithm.name=rloo",)),
    "algorithm.dynamic_sampling": Context(GRPO, ("algorithm.name=online_dpo",)),
    "algorithm.max_resampled": Context(("algorithm.name=dapo",), GRPO),
    "algorithm.mask_truncated": Context(GRPO, ("algorithm.name=online_dpo",)),
    "batch.micro_batch": Context((), ("batch.micro_batch_tokens=64",)),
    "optimizer.min_learning_rate": _only("optimizer.schedule=linear"),
    "rollouts": _only(*GRPO),
    "rollouts.batching": Context(GRPO, (*GRPO, "rollouts.engine=vllm")),
    **{
        f"rollouts.{name}": Context(GRPO, (*GRPO, "rollouts.temperature=0"))
        for name in ("top_p", "top_k", "min_p")
    },
    "rollouts.max_turns": Context((*GRPO, "rollouts.environment=m:C"), GRPO),
    "rewards": _only(*GRPO),
    "rewards.functions[]": Context(OF_FUNCTION, ("rewards.functions=[{name: a, function: m:f, %s}]",)),
    "rewards.functions[].name": Context(
        (*GRPO, "rewards.functions=[{function: m:f, %s}]"), ("rewards.functions=[{function: m:f, %s}]",)
    ),
    **{
        f"rewards.functions[].{name}": Context(
            (*GRPO, "rewards.functions=[{name: a, %s}]"), ("rewards.functions=[{name: a, %s}]",)
        )
        for name in ("function", "model", "url")
    },
    "rewards.functions[].revision": Context(OF_MODEL, OF_FUNCTION),
    "rewards.functions[].headers_from": Context(OF_URL, OF_FUNCTION),
    "rewards.functions[].gpus": Context(OF_MODEL, OF_FUNCTION),
    "rewards.functions[].options": Context(OF_FUNCTION, OF_URL),
    **{
        f"rewards.{name}": Context((*GRPO, EXACT % ""), GRPO)
        for name in ("timeout_s", "retries", "memory_limit_gb", "environment")
    },
    "rewards.batch_size": Context(
        (*GRPO, "rewards.functions=[{name: a, url: 'http://h'}]"), (*GRPO, EXACT % "")
    ),
    "rewards.normalise": Context(GRPO, ("algorithm.name=online_dpo",)),
    "critic": Context(PPO, GRPO),
    "critic.model": Context(PPO, GRPO),
    "critic.model.path": Context(PPO, GRPO),
    "critic.model.tiny": Context(PPO, GRPO),
    "critic.model.lora": Context((*PPO, "critic.model.tiny={}"), (*GRPO, "critic.model.tiny={}")),
    "critic.model.revision": Context((*PPO, "critic.model.path=org/name"), (*PPO, "critic.model.tiny={}")),
    "critic.model.trust_remote_code": Context(
        (*PPO, "critic.model.path=org/name"), (*PPO, "critic.model.tiny={}")
    ),
    "critic.model.reference": Context((), (*PPO, "critic.model.tiny={}")),
    "critic.model.chat_template": Context(
        (*PPO, "critic.model.tiny={}", "critic.export=true"), (*PPO, "critic.model.tiny={}")
    ),
    **{f"evaluation.{name}": _only(*EVAL) for name in ("every", "at_start")},
    "evaluation.max_examples": Context(EVAL, ONLINE_EVAL),
    "evaluation.generate": Context(EVAL, (*REWARD, *EVAL)),
    "evaluation.worst_pairs": Context((*DPO, *EVAL), EVAL),
    "evaluation.max_prompts": Context(ONLINE_EVAL, EVAL),
    "evaluation.pass_at_k": Context(ONLINE_EVAL, EVAL),
    "evaluation.pass_reward": Context((*ONLINE_EVAL, "evaluation.pass_at_k=2"), ONLINE_EVAL),
    **{
        f"tracking.{name}": Context((), ("tracking.wandb=off",))
        for name in ("project", "entity", "init_timeout_s", "finish_timeout_s")
    },
    **{
        f"tracking.alerts.{name}": _only(*GRPO)
        for name in ("reward_drop", "reward_spread", "kl", "component_fall")
    },
    "tracking.alerts.loss_rise": Context((*DPO, *EVAL), DPO),
    **{
        f"tracking.alerts.{name}": _only(*DPO)
        for name in ("margin_growth", "accuracy_gain", "accuracy_enough")
    },
}
"""Key or section -> its context; of a key without a row that of the section above it."""
NULLED = {
    "model.tiny": ("model.path=x",),
    "model.path": (),
    "critic.model.tiny": (*PPO, "critic.model.path=x"),
    "critic.model.path": (*PPO, "critic.model.tiny={}"),
    "rewards.functions[].function": OF_URL,
    "rewards.functions[].model": OF_URL,
    "rewards.functions[].url": (*GRPO, "rewards.functions=[{name: a, model: m, %s}]"),
}
"""Where exactly one of several keys is set: overrides with which the key may be null."""
NEVER_READ = ("critic.model.reference", "data.eval[].weight")
"""Keys that exist because a section stands in two places, and that no run reads in this one."""
ALWAYS_HERE = ("model.chat_template", "data.train[].weight")
"""Keys that every run reads in this place, and not in the other."""
