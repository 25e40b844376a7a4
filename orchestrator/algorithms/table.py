"""The table: one row per algorithm. A new one needs a function, a row, a parity test and a tiny recipe."""

import difflib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from orchestrator.algorithms.losses import advantages
from orchestrator.algorithms.losses.advantages import AdvantageEstimator, by_group
from orchestrator.algorithms.losses.interface import Objective
from orchestrator.algorithms.losses.kto import Kto
from orchestrator.algorithms.losses.logprobs import HeadSpec
from orchestrator.algorithms.losses.policy import Level, Normaliser, PolicyGradient
from orchestrator.algorithms.losses.preference import PreferenceParams
from orchestrator.algorithms.losses.preference_mix import (
    COUPLED,
    PAIR_LOSSES,
    REFERENCE_FREE,
    SFT,
    WITH_REFERENCE,
    PreferenceMix,
)
from orchestrator.algorithms.losses.reward import bradley_terry
from orchestrator.algorithms.losses.supervised import cross_entropy
from orchestrator.algorithms.losses.value import ValueLoss
from orchestrator.algorithms.own import OwnLoss, own_advantage
from orchestrator.core.batches import DataKind
from orchestrator.core.errors import ConfigError
from orchestrator.core.user_code import names_code
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Recipe, Rollouts


@dataclass(frozen=True, slots=True)
class OnlineSpec:
    """What the online loop needs to know beyond the objective."""

    advantage: AdvantageEstimator | None
    """Advantages from rewards; None: the best and the worst sample of a prompt become a preference pair."""
    critic: bool = False
    """Values come from a separate learner."""
    dynamic_sampling: bool = False
    """Groups of equal rewards, which teach nothing, are replaced."""


@dataclass(frozen=True, slots=True)
class AlgorithmSpec:
    """What a loop needs to know of an algorithm."""

    name: str
    data: DataKind
    objective: Objective
    loss_unit: Literal["token", "pair", "example", "sequence"]
    """Unit whose global count the loss is divided by."""
    branches: int
    """Sequences per example. Example: 2 for a preference pair, 8 for GRPO with eight samples of a prompt."""
    needs_reference: bool
    couples_batch: bool = False
    """The loss of an example depends on the others: it takes two passes over the effective batch."""
    head: Literal["lm", "scalar", "value"] = "lm"
    """Head of the model."""
    head_spec: HeadSpec = field(default_factory=HeadSpec)
    """Scores that the head has to compute."""
    loss_at_reference: float | None = None
    """Loss at policy == reference, if it is known. Example: ln 2 for DPO."""
    online: OnlineSpec | None = None
    """Set for algorithms that learn from rollouts."""

    @property
    def group_examples(self) -> int:
        """Examples that a sequence group counts in batch.effective: each completion of a prompt, or one for a
        pair or a row."""
        return self.branches if self.loss_unit == "sequence" else 1

    def keeps_reference(self, recipe: Recipe) -> bool:
        """True if a worker holds a reference policy while it learns.

        TR-DPO's moves; that of rollouts is frozen, and no cache can hold its log-probs beforehand. With LoRA
        the base weights are the reference: no second copy.
        """
        if recipe.algorithm.reference_sync_every is not None:
            return True
        return self.online is not None and self.needs_reference and recipe.model.lora is None


DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"sigmoid": 1.0},
    "simpo": {"simpo": 1.0},
    "cpo": {"cpo": 1.0, SFT: 1.0},
    "orpo": {"orpo": 1.0, SFT: 1.0},
}
"""Default loss of each preference algorithm."""


def _clip(
    level: Level, normaliser: Normaliser, low: float, high: float, *, kl_ratio: bool = False
) -> PolicyGradient:
    return PolicyGradient("clip", level, normaliser, clip_low=low, clip_high=high, kl_ratio=kl_ratio)


_CISPO = PolicyGradient("cispo", "token", "token", clip_high=5.0, kl_ratio=True)
_SCALED = by_group(advantages.group_normalised)
_CENTRED = by_group(advantages.group_centred)
_LEAVE_ONE_OUT = by_group(advantages.leave_one_out)
_REINFORCE_PP = advantages.by_reinforce_pp
_BASELINE = advantages.by_reinforce_pp_baseline

ONLINE_ROWS: dict[str, tuple[PolicyGradient, OnlineSpec]] = {
    # loss: level of the ratio, normaliser, clip                   advantages
    "grpo": (_clip("token", "sequence", 0.2, 0.2, kl_ratio=True), OnlineSpec(_SCALED)),
    "dr_grpo": (_clip("token", "constant", 0.2, 0.2, kl_ratio=True), OnlineSpec(_CENTRED)),
    "dapo": (_clip("token", "token", 0.2, 0.28, kl_ratio=True), OnlineSpec(_SCALED, dynamic_sampling=True)),
    "gspo": (_clip("sequence", "sequence", 3e-4, 4e-4, kl_ratio=True), OnlineSpec(_SCALED)),
    "cispo": (_CISPO, OnlineSpec(_SCALED)),
    "rloo": (_clip("trajectory", "sequence", 0.2, 0.2), OnlineSpec(_LEAVE_ONE_OUT)),
    "reinforce_pp": (_clip("token", "token", 0.2, 0.2), OnlineSpec(_REINFORCE_PP)),
    "reinforce_pp_baseline": (_clip("token", "token", 0.2, 0.2), OnlineSpec(_BASELINE)),
    "ppo": (_clip("token", "token", 0.2, 0.2), OnlineSpec(None, critic=True)),  # GAE is built from the recipe
}
"""Loss and advantages of the policy-gradient algorithms; keys of the recipe override them."""


def build(cfg: AlgorithmConfig, rollouts: Rollouts | None = None) -> AlgorithmSpec:
    """The row of `algorithm.name`; ConfigError for an unknown loss or an impossible combination.

    rollouts: section of an online recipe. Its samples per prompt and its temperature are part of the row.
    """
    if names_code(cfg.loss):
        usual = build(cfg.model_copy(update={"loss": None}), rollouts)
        return replace(usual, objective=OwnLoss.load(str(cfg.loss), usual.objective), loss_at_reference=None)
    if cfg.name in ONLINE:
        return _online(cfg, rollouts or Rollouts())  # pyright: ignore[reportCallIssue]
    if cfg.name in DEFAULTS:
        return _preference(cfg)
    if cfg.loss is not None:
        raise ConfigError(
            f"algorithm.loss: the loss of {cfg.name} is fixed",
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
    """Notes for the plan on a KL term that has no effect; empty if there is nothing to note."""
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
    """The row of PPO's value model."""
    return AlgorithmSpec("critic", "prompt", ValueLoss(cfg.value_clip), "token", 1, False, head="value")


def _online(cfg: AlgorithmConfig, rollouts: Rollouts) -> AlgorithmSpec:
    if rollouts.temperature == 0.0:
        raise ConfigError(
            "rollouts.temperature=0 cannot be used for training",
            why="all greedy samples of a prompt are equal, so no sample is better than another",
            fix="set a temperature above 0, such as 1; evaluation is greedy at any temperature",
        )
    if cfg.name == "online_dpo":
        # as in TRL, the pairs' loss is taken at temperature 1: rollouts.temperature only explores
        head_spec = HeadSpec(want_wpo=cfg.wpo)
        pairs = _preference(cfg.model_copy(update={"name": "dpo"}))
        return replace(pairs, name=cfg.name, data="prompt", head_spec=head_spec, online=OnlineSpec(None))
    if cfg.loss is not None:
        raise ConfigError(
            f"algorithm.loss: the loss of {cfg.name} is fixed",
            fix="remove algorithm.loss, or set algorithm.name=online_dpo",
        )
    reference = cfg.kl.coefficient > 0
    if cfg.kl.target is not None and not reference:
        raise ConfigError(
            "algorithm.kl.target needs algorithm.kl.coefficient > 0",
            why="the controller changes the coefficient by factors",
            fix="set algorithm.kl.coefficient=0.05",
        )
    loss, online = ONLINE_ROWS[cfg.name]
    return AlgorithmSpec(
        cfg.name,
        "prompt",
        _policy_loss(loss, cfg, rollouts),
        "sequence",
        rollouts.samples,
        reference,
        head_spec=HeadSpec(temperature=rollouts.temperature, want_entropy=True),
        online=_online_spec(online, cfg),
    )


def _policy_loss(loss: PolicyGradient, cfg: AlgorithmConfig, rollouts: Rollouts) -> PolicyGradient:
    """The loss of a table's row with the recipe's keys."""
    return replace(
        loss,
        normaliser=loss.normaliser if cfg.normaliser == "auto" else cfg.normaliser,
        constant=float(rollouts.max_new_tokens),
        clip_low=loss.clip_low if cfg.clip.low is None else cfg.clip.low,
        clip_high=loss.clip_high if cfg.clip.high is None else cfg.clip.high,
        dual=cfg.clip.dual,
        kl_coefficient=cfg.kl.coefficient if cfg.kl.place == "loss" else 0.0,
        kl_estimator="k3" if cfg.kl.estimator == "auto" else cfg.kl.estimator,
        kl_ratio=(loss.kl_ratio and cfg.kl.estimator != "k2") if cfg.kl.ratio is None else cfg.kl.ratio,
        entropy_bonus=cfg.entropy_bonus,
        correction=cfg.correction.kind,
        cap=cfg.correction.cap,
    )


def _online_spec(online: OnlineSpec, cfg: AlgorithmConfig) -> OnlineSpec:
    """The advantages of a table's row with the recipe's keys."""
    advantage = online.advantage
    if cfg.advantage is not None:
        advantage = own_advantage(cfg.advantage)
    elif online.critic:
        advantage = advantages.by_gae(cfg.gamma, cfg.gae_lambda, whitened=cfg.whiten)
    elif cfg.scale_by_std is not None and advantage in (_SCALED, _CENTRED):
        advantage = _SCALED if cfg.scale_by_std else _CENTRED
    dynamic = online.dynamic_sampling if cfg.dynamic_sampling is None else cfg.dynamic_sampling
    return OnlineSpec(advantage, online.critic, dynamic)


def _preference(cfg: AlgorithmConfig) -> AlgorithmSpec:
    terms = _terms(cfg)
    _check(cfg, terms)
    params = PreferenceParams(
        cfg.beta, cfg.label_smoothing, cfg.ipo_length_average, cfg.simpo_gamma, cfg.discopop_tau
    )
    mix = PreferenceMix(terms, params, cfg.f_divergence, cfg.f_alpha, cfg.ld_alpha, cfg.wpo)
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
            raise ConfigError(f"algorithm.loss: {name!r} is not a loss", fix=hint)
    if not any(name != SFT for name in terms):
        raise ConfigError(
            "algorithm.loss: sft is the only term",
            fix="set algorithm.name=sft, or add a preference loss",
        )
    return terms


def _check(cfg: AlgorithmConfig, terms: dict[str, float]) -> None:
    if cfg.wpo and any(name in COUPLED or name == SFT for name in terms):
        raise ConfigError(
            "algorithm.wpo cannot be combined with "
            f"{', '.join(n for n in terms if n in COUPLED or n == SFT)}",
            why="its weight per pair has no meaning for a loss that sorts the batch, nor for a token mean",
            fix="remove algorithm.wpo, or these losses",
        )
    if "exo_pair" in terms and cfg.label_smoothing == 0:
        raise ConfigError(
            "algorithm.loss: exo_pair needs algorithm.label_smoothing > 0",
            why="its target contains log(label_smoothing)",
            fix="set algorithm.label_smoothing=0.001",
        )
    free = [name for name in terms if name in REFERENCE_FREE]
    if free and (cfg.f_divergence != "reverse_kl" or cfg.reference_sync_every is not None):
        raise ConfigError(
            f"algorithm.loss: {', '.join(free)} has no reference policy",
            why="f_divergence and reference_sync_every act on the reference",
            fix="remove these keys",
        )
    if cfg.reference_sync_every is not None and not any(name in WITH_REFERENCE for name in terms):
        raise ConfigError(
            "algorithm.reference_sync_every needs a loss with a reference policy", fix="remove the key"
        )


def _loss_at_reference(cfg: AlgorithmConfig, terms: dict[str, float]) -> float | None:
    """Loss at policy == reference, where every log-ratio is 0: ln 2 for DPO. None if a term has no closed
    form."""
    ln2, eps = math.log(2.0), cfg.label_smoothing
    half_beta = 0.5 / cfg.beta
    closed_form = {
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
    if cfg.wpo or any(name not in closed_form for name in terms):
        return None
    return sum(weight * closed_form[name] for name, weight in terms.items())
