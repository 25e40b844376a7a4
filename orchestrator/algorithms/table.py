"""The table: one row per algorithm. A new one is a function, a row, a parity test and a tiny recipe."""

import difflib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from orchestrator.algorithms.losses import advantages, estimators
from orchestrator.algorithms.losses.estimators import AdvantageEstimator
from orchestrator.algorithms.losses.interface import Objective
from orchestrator.algorithms.losses.logprobs import HeadSpec
from orchestrator.algorithms.losses.policy import Level, Normaliser, PolicyGradient
from orchestrator.algorithms.losses.preference import PreferenceParams
from orchestrator.algorithms.losses.preference_mix import (
    COUPLED,
    PAIR_LOSSES,
    REFERENCE_FREE,
    SFT,
    WITH_REFERENCE,
    Kto,
    PreferenceMix,
)
from orchestrator.algorithms.losses.reward import bradley_terry
from orchestrator.algorithms.losses.supervised import cross_entropy
from orchestrator.algorithms.losses.value import ValueLoss
from orchestrator.algorithms.own import ADVANTAGE, LOSS, OwnLoss, own_advantage
from orchestrator.core.batches import DataKind
from orchestrator.core.errors import ConfigError
from orchestrator.core.user_code import load_function, names_code
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Recipe, Rollouts


@dataclass(frozen=True, slots=True)
class Online:
    """What the online loop needs to know beyond the objective.

    advantage: advantages from rewards; None: the best and the worst sample of each prompt become a preference
    pair. critic: values come from a learner of their own. dynamic_sampling: groups of equal rewards teach
    nothing and are replaced.
    """

    advantage: AdvantageEstimator | None
    critic: bool = False
    dynamic_sampling: bool = False


@dataclass(frozen=True, slots=True)
class AlgorithmSpec:
    """What the loop needs to know of an objective.

    loss_unit: what its loss is divided by. branches: sequences per example. couples_batch: the loss of an
    example depends on the others, so it takes two passes over the effective batch. head, head_spec: what the
    model has to give. loss_at_reference: the loss where policy == reference, if known. online: set for
    algorithms that learn from rollouts.
    """

    name: str
    data: DataKind
    objective: Objective
    loss_unit: Literal["token", "pair", "example", "sequence"]
    branches: int
    needs_reference: bool
    couples_batch: bool = False
    head: Literal["lm", "scalar", "value"] = "lm"
    head_spec: HeadSpec = field(default_factory=HeadSpec)
    loss_at_reference: float | None = None
    online: Online | None = None

    @property
    def group_examples(self) -> int:
        """What one sequence group counts in batch.effective: the completions of a prompt are one group, a
        pair or a row is one."""
        return self.branches if self.loss_unit == "sequence" else 1

    def keeps_reference(self, recipe: Recipe) -> bool:
        """True where a worker holds a reference policy of its own while it learns: TR-DPO's moving one, or a
        frozen one for rollouts, which no cache can know beforehand. With LoRA the base weights are the
        reference: no second copy."""
        if recipe.algorithm.reference_sync_every is not None:
            return True
        return self.online is not None and self.needs_reference and recipe.model.lora is None


#         default loss of each preference algorithm
DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"sigmoid": 1.0},
    "simpo": {"simpo": 1.0},
    "cpo": {"cpo": 1.0, SFT: 1.0},
    "orpo": {"orpo": 1.0, SFT: 1.0},
}


@dataclass(frozen=True, slots=True)
class OnlineSpec:
    """A line of the table of policy-gradient algorithms: its loss and its advantages, where the recipe does
    not say otherwise."""

    loss: PolicyGradient
    advantage: AdvantageEstimator | None = None
    critic: bool = False
    dynamic_sampling: bool = False


def _clip(
    level: Level, per: Normaliser, low: float, high: float, *, kl_ratio: bool = False
) -> PolicyGradient:
    return PolicyGradient("clip", level, per, clip_low=low, clip_high=high, kl_ratio=kl_ratio)


_SCALED = estimators.by_group(advantages.group_normalised)
_CENTRED = estimators.by_group(advantages.group_centred)

ONLINE_ROWS: dict[str, OnlineSpec] = {
    #                              ratio of     divided by   clip          advantages
    "grpo": OnlineSpec(_clip("token", "sequence", 0.2, 0.2, kl_ratio=True), _SCALED),
    "dr_grpo": OnlineSpec(_clip("token", "constant", 0.2, 0.2, kl_ratio=True), _CENTRED),
    "dapo": OnlineSpec(_clip("token", "token", 0.2, 0.28, kl_ratio=True), _SCALED, dynamic_sampling=True),
    "gspo": OnlineSpec(_clip("sequence", "sequence", 3e-4, 4e-4, kl_ratio=True), _SCALED),
    "cispo": OnlineSpec(PolicyGradient("cispo", "token", "token", clip_high=5.0, kl_ratio=True), _SCALED),
    "rloo": OnlineSpec(
        _clip("trajectory", "sequence", 0.2, 0.2), estimators.by_group(advantages.leave_one_out)
    ),
    "reinforce_pp": OnlineSpec(_clip("token", "token", 0.2, 0.2), estimators.reinforce_pp),
    "reinforce_pp_baseline": OnlineSpec(_clip("token", "token", 0.2, 0.2), estimators.reinforce_pp_baseline),
    "ppo": OnlineSpec(_clip("token", "token", 0.2, 0.2), critic=True),
}


def build(cfg: AlgorithmConfig, rollouts: Rollouts | None = None) -> AlgorithmSpec:
    """The row of `algorithm.name` with its loss; ConfigError for an unknown loss or an impossible
    combination.

    rollouts: of an online recipe: its samples per prompt and its temperature are part of the row.
    """
    if names_code(cfg.loss):
        load_function(LOSS, str(cfg.loss))
        usual = build(cfg.model_copy(update={"loss": None}), rollouts)
        return replace(usual, objective=OwnLoss(str(cfg.loss), usual.objective), loss_at_reference=None)
    if cfg.name in ONLINE:
        return _online(cfg, rollouts or Rollouts())  # pyright: ignore[reportCallIssue]
    if cfg.name in DEFAULTS:
        return _preference(cfg)
    if cfg.loss is not None:
        raise ConfigError(
            f"algorithm.loss: {cfg.name} has one loss of its own",
            fix="remove algorithm.loss, or set algorithm.name=dpo",
        )
    if cfg.name == "sft":
        return AlgorithmSpec("sft", "sft", cross_entropy, "token", 1, False)
    if cfg.name == "reward":
        objective = partial(bradley_terry, centring=cfg.reward_centring)
        return AlgorithmSpec("reward", "preference", objective, "pair", 2, False, head="scalar")
    kto = Kto(cfg.beta, cfg.kto_desirable_weight, cfg.kto_undesirable_weight)
    return AlgorithmSpec("kto", "unpaired", kto, "example", 2, True, couples_batch=True)


def kl_notes(algorithm: AlgorithmSpec) -> tuple[str, ...]:
    """What is odd about the KL term of a loss, for the plan; nothing where nothing is."""
    loss = algorithm.objective
    if (
        not isinstance(loss, PolicyGradient)
        or not loss.kl_coefficient
        or loss.kl_estimator != "k1"
        or loss.kl_ratio
    ):
        return ()
    return (
        "algorithm.kl: k1 in the loss has no gradient in expectation; set kl.ratio=true, kl.estimator=k2 or "
        "k3, or kl.place=reward",
    )


def critic(cfg: AlgorithmConfig) -> AlgorithmSpec:
    """PPO's value model: the row of its learner."""
    return AlgorithmSpec("critic", "prompt", ValueLoss(cfg.value_clip), "token", 1, False, head="value")


def _online(cfg: AlgorithmConfig, rollouts: Rollouts) -> AlgorithmSpec:
    if rollouts.temperature == 0.0:
        raise ConfigError(
            "rollouts.temperature=0 cannot be trained with",
            why="greedy samples of a prompt are all the same, so none is better than another, and their "
            "probability says nothing",
            fix="set a temperature above 0, such as 1; evaluation is greedy whatever it is",
        )
    if cfg.name == "online_dpo":
        head_spec = HeadSpec(
            want_wpo=cfg.wpo
        )  # the pairs' loss is that of the model itself, as in TRL: the temperature only explores
        pairs = _preference(cfg.model_copy(update={"name": "dpo"}))
        return replace(pairs, name=cfg.name, data="prompt", head_spec=head_spec, online=Online(None))
    if cfg.loss is not None:
        raise ConfigError(
            f"algorithm.loss: {cfg.name} has one loss of its own",
            fix="remove algorithm.loss, or set algorithm.name=online_dpo",
        )
    head_spec = HeadSpec(temperature=rollouts.temperature, want_entropy=True)
    row = ONLINE_ROWS[cfg.name]
    loss = replace(
        row.loss,
        normaliser=row.loss.normaliser if cfg.normaliser == "auto" else cfg.normaliser,
        constant=float(rollouts.max_new_tokens),
        clip_low=row.loss.clip_low if cfg.clip.low is None else cfg.clip.low,
        clip_high=row.loss.clip_high if cfg.clip.high is None else cfg.clip.high,
        dual=cfg.clip.dual,
        kl_coefficient=cfg.kl.coefficient if cfg.kl.place == "loss" else 0.0,
        kl_estimator="k3" if cfg.kl.estimator == "auto" else cfg.kl.estimator,
        kl_ratio=(row.loss.kl_ratio and cfg.kl.estimator != "k2") if cfg.kl.ratio is None else cfg.kl.ratio,
        entropy_bonus=cfg.entropy_bonus,
        correction=cfg.correction.kind,
        cap=cfg.correction.cap,
    )
    advantage = estimators.gae(cfg.gamma, cfg.gae_lambda, whiten=cfg.whiten) if row.critic else row.advantage
    if cfg.advantage is not None:
        load_function(ADVANTAGE, cfg.advantage)
        advantage = own_advantage(cfg.advantage)
    if cfg.scale_by_std is not None and advantage in (_SCALED, _CENTRED):
        advantage = _SCALED if cfg.scale_by_std else _CENTRED
    dynamic = row.dynamic_sampling if cfg.dynamic_sampling is None else cfg.dynamic_sampling
    reference = cfg.kl.coefficient > 0
    if cfg.kl.target is not None and not reference:
        what = "algorithm.kl.target needs algorithm.kl.coefficient > 0"
        raise ConfigError(
            what, why="the controller changes it by factors", fix="set algorithm.kl.coefficient=0.05"
        )
    online = Online(advantage, row.critic, dynamic)
    return AlgorithmSpec(
        cfg.name, "prompt", loss, "sequence", rollouts.samples, reference, head_spec=head_spec, online=online
    )


def _preference(cfg: AlgorithmConfig) -> AlgorithmSpec:
    terms = _terms(cfg)
    _check(cfg, terms)
    knobs = PreferenceParams(
        cfg.beta, cfg.label_smoothing, cfg.ipo_length_average, cfg.simpo_gamma, cfg.discopop_tau
    )
    mix = PreferenceMix(terms, knobs, cfg.f_divergence, cfg.f_alpha, cfg.ld_alpha, cfg.wpo)
    reference = any(name in WITH_REFERENCE for name in terms)
    return AlgorithmSpec(
        cfg.name,
        "preference",
        mix,
        "pair",
        2,
        reference,
        couples_batch=any(name in COUPLED for name in terms),
        head_spec=HeadSpec(want_wpo=cfg.wpo),
        loss_at_reference=_loss_at_reference(cfg, terms),
    )


def _terms(cfg: AlgorithmConfig) -> dict[str, float]:
    if cfg.loss is None:
        return DEFAULTS[cfg.name]
    terms = {cfg.loss: 1.0} if isinstance(cfg.loss, str) else dict(cfg.loss)
    for name in terms:
        if name not in PAIR_LOSSES:
            close = difflib.get_close_matches(name, PAIR_LOSSES, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(PAIR_LOSSES)}"
            raise ConfigError(f"algorithm.loss: there is no loss {name!r}", fix=hint)
    if not any(name != SFT for name in terms):
        raise ConfigError(
            "algorithm.loss: only the sft term is left",
            fix="set algorithm.name=sft, or add a preference loss",
        )
    return terms


def _check(cfg: AlgorithmConfig, terms: dict[str, float]) -> None:
    if cfg.wpo and any(name in COUPLED or name == SFT for name in terms):
        raise ConfigError(
            "algorithm.wpo cannot be combined with "
            f"{', '.join(n for n in terms if n in COUPLED or n == SFT)}",
            why="its per-pair weight has no meaning for losses that sort the batch, nor for a token mean",
            fix="drop algorithm.wpo, or use the pair losses alone",
        )
    if "exo_pair" in terms and cfg.label_smoothing == 0:
        raise ConfigError(
            "algorithm.loss: exo_pair needs algorithm.label_smoothing > 0",
            why="its target has log(label_smoothing)",
            fix="set it to 0.001",
        )
    free = [name for name in terms if name in REFERENCE_FREE]
    if free and (cfg.f_divergence != "reverse_kl" or cfg.reference_sync_every is not None):
        raise ConfigError(
            f"algorithm.loss: {', '.join(free)} has no reference policy",
            why="f_divergence and reference_sync_every act on the reference",
            fix="remove them",
        )
    if cfg.reference_sync_every is not None and not any(name in WITH_REFERENCE for name in terms):
        raise ConfigError(
            "algorithm.reference_sync_every needs a loss with a reference policy", fix="remove it"
        )


def _loss_at_reference(cfg: AlgorithmConfig, terms: dict[str, float]) -> float | None:
    """Loss at policy == reference, where every log-ratio is 0: ln 2 for DPO."""
    ln2, eps = math.log(2.0), cfg.label_smoothing
    half_beta = 0.5 / cfg.beta
    known = {
        "sigmoid": ln2,
        "robust": ln2,
        "hinge": 1.0,
        "ipo": half_beta**2,
        "exo_pair": -ln2 - 0.5 * (math.log1p(-eps) + math.log(eps)) if eps > 0 else 0.0,
        "nca_pair": 2.0 * ln2,
        "bco_pair": 2.0 * ln2,
        "sppo_hard": 2.0 * half_beta**2,
        "aot": ln2,
        "aot_unpaired": ln2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * ln2 + 0.5,
        "sigmoid_norm": ln2,
    }
    if cfg.wpo or any(name not in known for name in terms):
        return None
    return sum(weight * known[name] for name, weight in terms.items())
