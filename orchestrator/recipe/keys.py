"""Table of the runs that read a key of a recipe, one row for each key.

`recipe/unread.py` finds the keys of a recipe that its run does not read, so no key can be set without an
effect. A row of a section holds for all keys below it: a recipe without rollouts does not read
rollouts.samples. tests/unit/settings keeps the table complete, and compares what two values of each key
change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.core import hub
from orchestrator.core.user_code import names_code
from orchestrator.recipe import schema as c
from orchestrator.recipe.schema import Recipe

Reads = Callable[[Recipe, Any], bool]


@dataclass(frozen=True, slots=True)
class Readers:
    """One row: the recipes that read a key."""

    words: str
    """End of the sentence "is read only …"; "" if every run reads the key. Example: "by ppo"."""
    reads: Reads
    """Whether a recipe reads the key, from (recipe, the section that holds the key)."""
    parts: "tuple[Readers, ...]" = ()
    """Rows that all have to hold. A message names the first that does not."""

    def lacking(self, recipe: Recipe, holder: Any) -> "Readers":
        """The first part that does not hold for a recipe which does not read the key, or the row itself."""
        missing = next((part for part in self.parts if not part.reads(recipe, holder)), self)
        return missing if missing.words else self


PAIRS = ("dpo", "simpo", "orpo", "cpo", "online_dpo")
GRADIENTS = tuple(name for name in c.ONLINE if name != "online_dpo")
DEFAULT_LOSS = {
    "dpo": ("sigmoid",),
    "online_dpo": ("sigmoid",),
    "simpo": ("simpo",),
    "cpo": ("cpo", "sft"),
    "orpo": ("orpo", "sft"),
}
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
DIVERGING = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sigmoid_norm")
"""Losses of the difference of log-ratios, which f_divergence replaces by its link function."""
FREE = ("simpo", "cpo", "orpo", "sft")
OTHERS = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
FILES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
LOSSES = frozenset((*SMOOTHED, *DIVERGING, *FREE, *OTHERS))
"""Names of all losses of pairs, as in algorithms/losses/preference_mix.py, which needs torch."""


# ---- builders of rows


def when(condition: str, reads: Reads) -> Readers:
    """Row of a key that is read if a condition holds."""
    return Readers(f"if {condition}", reads)


def by(*names: str) -> Readers:
    """Row of a key that some algorithms read."""
    return Readers(f"by {_list(names)}", lambda recipe, _: recipe.algorithm.name in names)


def by_loss(*losses: str) -> Readers:
    """Row of a key that some losses of pairs read. An unknown loss counts as one: another error names close
    ones."""
    readers = frozenset(losses)
    return Readers(
        f"by the loss{'es' if len(losses) > 1 else ''} {_list(losses)}",
        lambda recipe, _: any(term in readers or term not in LOSSES for term in terms(recipe)),
    )


def together(words: str, *rows: Readers) -> Readers:
    """Row of a key that is read if all of the rows hold."""
    return Readers(words, lambda recipe, holder: all(row.reads(recipe, holder) for row in rows), rows)


def _list(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- conditions


def terms(recipe: Recipe) -> tuple[str, ...]:
    """Names of the losses of pairs that are summed; none for other algorithms."""
    algorithm = recipe.algorithm
    if algorithm.name not in PAIRS:
        return ()
    if algorithm.loss is None or names_code(algorithm.loss):
        return DEFAULT_LOSS[algorithm.name]
    return (algorithm.loss,) if isinstance(algorithm.loss, str) else tuple(algorithm.loss)


def is_online(recipe: Recipe) -> bool:
    """Whether the algorithm learns from rollouts."""
    return recipe.algorithm.name in c.ONLINE


def has_reference(recipe: Recipe) -> bool:
    """Whether the loss or the reward compares the policy with a reference policy."""
    if recipe.algorithm.name in GRADIENTS:
        return recipe.algorithm.kl.coefficient > 0
    return recipe.algorithm.name == "kto" or any(term not in FREE for term in terms(recipe))


def samples_dynamically(recipe: Recipe) -> bool:
    """Whether dynamic sampling is on, as in algorithms/table.py."""
    switch = recipe.algorithm.dynamic_sampling
    return (
        recipe.algorithm.name == "dapo" if switch is None else switch and recipe.algorithm.name in GRADIENTS
    )


def _is_one_file(path: str) -> bool:
    """Whether a source is a single file, without splits and subsets. A path that does not exist here may be a
    folder on the machine that runs the recipe."""
    return "://" in path or Path(path).is_file() or path.endswith(FILES)


def _is_of_critic(recipe: Recipe, model: c.Model) -> bool:
    return recipe.critic.model is not None and model is recipe.critic.model


def _is_train(recipe: Recipe, source: c.Source) -> bool:
    return isinstance(recipe.data.train, list) and any(source is entry for entry in recipe.data.train)


def _shares_columns(recipe: Recipe, data: c.Data) -> bool:
    """Whether a source has no columns of its own."""
    sources = [
        source
        for spec in (data.train, data.eval)
        if spec is not None
        for source in ([None] if isinstance(spec, str) else spec)
    ]
    return any(source is None or source.columns is None for source in sources)


def _has_rewards(recipe: Recipe, *kinds: str) -> bool:
    return any(getattr(function, kind) is not None for function in recipe.rewards.functions for kind in kinds)


ALWAYS = Readers("", lambda recipe, _: True)
ONLINE = Readers("by algorithms that learn from rollouts", lambda recipe, _: is_online(recipe))
OFFLINE = Readers("by algorithms that learn from rows", lambda recipe, _: not is_online(recipe))
GRADIENT = by(*GRADIENTS)
PAIR = by(*PAIRS)
PPO = by("ppo")
TUNED = when(
    "model.path or model.reference is set",
    lambda r, model: model.path is not None or model.reference is not None,
)
HELD_OUT = when("data.eval is set", lambda r, _: r.data.eval is not None)
SAMPLED = when("rollouts.temperature is above 0", lambda _, rollouts: rollouts.temperature > 0)
PENALISED = together("if algorithm.kl.coefficient is above 0", when("", lambda r, kl: kl.coefficient > 0))
TRACKED = when("tracking.wandb is online or offline", lambda r, _: r.tracking.wandb != "off")
ANSWERED = together("by algorithms that learn from rollouts, if data.eval is set", HELD_OUT, ONLINE)
GENERATES = when(
    "evaluation.generate is set, or reward functions get it",
    lambda r, _: is_online(r) or r.evaluation.generate is not None,
)
REWARD_CALLS = when("rewards.functions holds a component", lambda r, _: bool(r.rewards.functions))
REWARD_CODE = when("a component of rewards.functions is a function", lambda r, _: _has_rewards(r, "function"))
ROWS_OF_PAIRS = by("reward", "dpo", "simpo", "orpo", "cpo")
MARGINS = by("reward", *PAIRS)


def _rows(every_run: str, **others: Readers) -> Mapping[str, Readers]:
    """Rows of a section. every_run: keys that every run reads, separated by spaces."""
    return {**dict.fromkeys(every_run.split(), ALWAYS), **others}


READERS: Mapping[type[BaseModel], Mapping[str, Readers]] = {
    Recipe: _rows(
        "run model data algorithm batch optimizer learners reference checkpoint export evaluation tracking",
        rollouts=ONLINE,
        rewards=ONLINE,
        critic=PPO,
    ),
    c.Run: _rows(
        "name seed max_steps", epochs=when("run.max_steps is not set", lambda r, _: r.run.max_steps is None)
    ),
    c.Model: _rows(
        "path tiny lora",
        revision=when(
            "the model comes from the hub",
            lambda _, model: model.path is not None and hub.is_model_name(model.path),
        ),
        trust_remote_code=TUNED,
        chat_template=when(
            "the model's tokenizer renders or is exported",
            lambda r, m: not _is_of_critic(r, m) or r.critic.export,
        ),
        reference=when(
            "the policy is compared with a reference (online with model.lora that is the base model)",
            lambda r, m: (
                has_reference(r) and not _is_of_critic(r, m) and not (is_online(r) and m.lora is not None)
            ),
        ),
    ),
    c.TinyModel: _rows(
        "architecture hidden_size layers heads kv_heads intermediate_size max_positions vocab_size"
    ),
    c.Lora: _rows("rank alpha dropout target_modules"),
    c.Data: _rows(
        "train eval max_bad_rows max_length overlong remainder",
        columns=when("a source has no columns of its own", _shares_columns),
        append_eos=OFFLINE,
    ),
    c.Columns: _rows(
        "prompt tools chat_template_kwargs images environment",
        messages=by("sft", *c.ONLINE),
        text=by("sft", *c.ONLINE),
        completion=by("sft", "kto", *c.ONLINE),
        chosen=by("reward", "dpo", "kto", "simpo", "orpo", "cpo", *c.ONLINE),
        rejected=by("reward", "dpo", "kto", "simpo", "orpo", "cpo", *c.ONLINE),
        label=by("kto", *c.ONLINE),
        margin=by("reward", *c.ONLINE),
        answer=GENERATES,
    ),
    c.Source: _rows(
        "path columns max_rows",
        weight=when("a source is trained on", _is_train),
        split=when(
            "a source has splits: a hub data set, a folder or toy data",
            lambda _, source: not _is_one_file(source.path),
        ),
        subset=when(
            "a source has subsets: a hub data set or a folder",
            lambda _, source: not _is_one_file(source.path) and not source.path.startswith("toy:"),
        ),
        revision=when("a source is a hub data set", lambda _, source: hub.is_data_set_name(source.path)),
    ),
    c.AlgorithmConfig: _rows(
        "name",
        loss=when(
            "the algorithm is one of pairs, or the loss is a function of your own",
            lambda r, algorithm: r.algorithm.name in PAIRS or names_code(algorithm.loss),
        ),
        advantage=GRADIENT,
        beta=by("kto", *PAIRS),
        label_smoothing=by_loss(*SMOOTHED),
        f_divergence=by_loss(*DIVERGING),
        f_alpha=together(
            "if algorithm.f_divergence is alpha",
            by_loss(*DIVERGING),
            when("", lambda _, algorithm: algorithm.f_divergence == "alpha"),
        ),
        ld_alpha=PAIR,
        wpo=PAIR,
        ipo_length_average=by_loss("ipo"),
        simpo_gamma=by_loss("simpo"),
        discopop_tau=by_loss("discopop"),
        reward_centring=by("reward"),
        kto_desirable_weight=by("kto"),
        kto_undesirable_weight=by("kto"),
        reference_sync_every=together(
            "by kto, and by dpo with losses that have a reference",
            OFFLINE,
            when("", lambda r, _: has_reference(r)),
        ),
        reference_sync_alpha=when(
            "algorithm.reference_sync_every is set",
            lambda r, algorithm: (
                not is_online(r) and has_reference(r) and algorithm.reference_sync_every is not None
            ),
        ),
        epochs=ONLINE,
        normaliser=GRADIENT,
        clip=GRADIENT,
        kl=GRADIENT,
        correction=GRADIENT,
        entropy_bonus=GRADIENT,
        gamma=PPO,
        gae_lambda=PPO,
        value_clip=PPO,
        whiten=PPO,
        scale_by_std=by("grpo", "dr_grpo", "dapo", "gspo", "cispo"),
        dynamic_sampling=GRADIENT,
        max_resampled=when("algorithm.dynamic_sampling is on", lambda r, _: samples_dynamically(r)),
        mask_truncated=GRADIENT,
    ),
    c.Clip: _rows(
        "high",
        low=by(*(n for n in GRADIENTS if n != "cispo")),
        dual=by(*(n for n in GRADIENTS if n != "cispo")),
    ),
    c.Kl: _rows(
        "coefficient",
        place=PENALISED,
        estimator=PENALISED,
        ratio=together(
            "if the KL is a term of the loss", PENALISED, when("", lambda _, kl: kl.place == "loss")
        ),
        target=PENALISED,
        horizon=together(
            "if algorithm.kl.target is set", PENALISED, when("", lambda _, kl: kl.target is not None)
        ),
    ),
    c.Correction: _rows(
        "kind",
        cap=when("algorithm.correction.kind is not none", lambda _, correction: correction.kind != "none"),
        alarm=when("rollouts.max_staleness is 0", lambda r, _: r.rollouts.max_staleness == 0),
    ),
    c.Batch: _rows(
        "effective micro_batch_tokens memory_utilisation memory_limit_gb layout",
        micro_batch=when(
            "batch.micro_batch_tokens is not set", lambda _, batch: batch.micro_batch_tokens is None
        ),
    ),
    c.Optimizer: _rows(
        "learning_rate betas eps weight_decay max_grad_norm schedule warmup_steps",
        warmup_ratio=when("optimizer.warmup_steps is 0", lambda _, optimizer: not optimizer.warmup_steps),
        min_learning_rate=when(
            "optimizer.schedule is linear or cosine", lambda _, optimizer: optimizer.schedule != "constant"
        ),
    ),
    c.Learners: _rows(
        "workers gpus_per_worker cpus_per_worker zero_stage precision sync offload activation_checkpointing "
        "fused timeout_s start_timeout_s max_restarts"
    ),
    c.Offload: _rows("optimizer parameters"),
    c.Reference: _rows("cache_dir"),
    # keys of actors may stay when rollouts.replay replaces the actors
    c.Rollouts: _rows(
        "workers gpus_per_worker cpus_per_worker placement engine rows_at_once prompts samples "
        "max_new_tokens temperature stop max_staleness update transport bucket_mb environment replay "
        "timeout_s start_timeout_s max_restarts",
        batching=when(
            "rollouts.engine is transformers", lambda _, rollouts: rollouts.engine == "transformers"
        ),
        top_p=SAMPLED,
        top_k=SAMPLED,
        min_p=SAMPLED,
        max_turns=when("rollouts.environment is set", lambda _, rollouts: rollouts.environment is not None),
    ),
    c.Rewards: _rows(
        "functions max_dropped_fraction",
        timeout_s=REWARD_CALLS,
        retries=REWARD_CALLS,
        memory_limit_gb=REWARD_CODE,
        environment=REWARD_CODE,
        batch_size=when(
            "a component of rewards.functions is a model or a url",
            lambda r, _: _has_rewards(r, "model", "url"),
        ),
        normalise=by(*GRADIENTS),
    ),
    c.RewardFunction: _rows(
        "name function model url weight",
        revision=when(
            "the reward model comes from the hub",
            lambda _, function: function.model is not None and hub.is_model_name(function.model),
        ),
        options=when("function is set", lambda _, function: function.function is not None),
        headers_from=when("url is set", lambda _, function: function.url is not None),
        gpus=when("model is set", lambda _, function: function.model is not None),
    ),
    c.Critic: _rows("model learning_rate workers gpus_per_worker cpus_per_worker warmup_steps export"),
    c.Checkpoint: _rows("every keep final"),
    c.Export: _rows("dtype", lora=when("model.lora is set", lambda r, _: r.model.lora is not None)),
    c.Generation: _rows("max_new_tokens max_prompts checker"),
    c.Evaluation: _rows(
        "",
        every=HELD_OUT,
        # false asks for no evaluation at the start, so it has its effect without data.eval too
        at_start=when(
            "data.eval is set", lambda r, evaluation: r.data.eval is not None or not evaluation.at_start
        ),
        max_examples=together("by algorithms that learn from rows, if data.eval is set", HELD_OUT, OFFLINE),
        generate=together(
            "by algorithms that learn from rows and write text, if data.eval is set",
            HELD_OUT,
            OFFLINE,
            when("", lambda r, _: r.algorithm.name != "reward"),
        ),
        worst_pairs=together(f"{ROWS_OF_PAIRS.words}, if data.eval is set", HELD_OUT, ROWS_OF_PAIRS),
        max_prompts=ANSWERED,
        pass_at_k=ANSWERED,
        pass_reward=together(
            "if evaluation.pass_at_k is above 0",
            ANSWERED,
            when("", lambda _, evaluation: evaluation.pass_at_k > 0),
        ),
    ),
    c.Alerts: _rows(
        "steps restarts restarts_s goodput goodput_after_s",
        reward_drop=ONLINE,
        reward_spread=ONLINE,
        margin_growth=MARGINS,
        accuracy_gain=MARGINS,
        accuracy_enough=MARGINS,
        loss_rise=together("by algorithms that learn from rows, if data.eval is set", HELD_OUT, OFFLINE),
        kl=ONLINE,
        component_fall=ONLINE,
    ),
    c.Tracking: _rows(
        "wandb group alerts",
        **dict.fromkeys(("project", "entity", "init_timeout_s", "finish_timeout_s"), TRACKED),
    ),
}
"""Row of each key of each section."""
