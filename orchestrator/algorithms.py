"""The table: one row per algorithm. A new one is a function, a row, a parity test and a tiny recipe."""

import difflib
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from orchestrator.config import Algorithm as Config
from orchestrator.errors import ConfigError
from orchestrator.objectives.mixes import COUPLED, PAIR_LOSSES, REFERENCE_FREE, SFT, WITH_REFERENCE, Kto, PreferenceMix
from orchestrator.objectives.preference import Knobs
from orchestrator.objectives.reward import bradley_terry
from orchestrator.objectives.scores import Objective
from orchestrator.objectives.supervised import cross_entropy
from orchestrator.records import DataKind


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the loop needs to know of an objective.

    per: what its loss is divided by. branches: sequences per example. couples_batch: the loss of an example depends on
    the others, so it takes two passes over the effective batch. anchor: its value where policy == reference, if known.
    """

    name: str
    data: DataKind
    objective: Objective
    per: Literal["token", "pair", "example"]
    branches: int
    needs_reference: bool
    couples_batch: bool = False
    head: Literal["lm", "scalar"] = "lm"
    needs_wpo: bool = False
    anchor: float | None = None


#         default loss of each preference algorithm
DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"sigmoid": 1.0},
    "simpo": {"simpo": 1.0},
    "cpo": {"cpo": 1.0, SFT: 1.0},
    "orpo": {"orpo": 1.0, SFT: 1.0},
}


def build(cfg: Config) -> Algorithm:
    """The row of `algorithm.name` with its loss; ConfigError for an unknown loss or an impossible combination."""
    if cfg.name in DEFAULTS:
        return _preference(cfg)
    if cfg.loss is not None:
        raise ConfigError(f"algorithm.loss: {cfg.name} has one loss of its own", fix="remove algorithm.loss, or set algorithm.name=dpo")
    if cfg.name == "sft":
        return Algorithm("sft", "sft", cross_entropy, "token", 1, False)
    if cfg.name == "reward":
        objective = partial(bradley_terry, centring=cfg.reward_centring)
        return Algorithm("reward", "preference", objective, "pair", 2, False, head="scalar")
    kto = Kto(cfg.beta, cfg.kto_desirable_weight, cfg.kto_undesirable_weight)
    return Algorithm("kto", "unpaired", kto, "example", 2, True, couples_batch=True)


def _preference(cfg: Config) -> Algorithm:
    terms = _terms(cfg)
    _check(cfg, terms)
    knobs = Knobs(cfg.beta, cfg.label_smoothing, cfg.ipo_length_average, cfg.simpo_gamma, cfg.discopop_tau)
    mix = PreferenceMix(terms, knobs, cfg.f_divergence, cfg.f_alpha, cfg.ld_alpha, cfg.wpo)
    reference = any(name in WITH_REFERENCE for name in terms)
    return Algorithm(
        cfg.name,
        "preference",
        mix,
        "pair",
        2,
        reference,
        couples_batch=any(name in COUPLED for name in terms),
        needs_wpo=cfg.wpo,
        anchor=_anchor(cfg, terms),
    )


def _terms(cfg: Config) -> dict[str, float]:
    if cfg.loss is None:
        return DEFAULTS[cfg.name]
    terms = {cfg.loss: 1.0} if isinstance(cfg.loss, str) else dict(cfg.loss)
    for name in terms:
        if name not in PAIR_LOSSES:
            close = difflib.get_close_matches(name, PAIR_LOSSES, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(PAIR_LOSSES)}"
            raise ConfigError(f"algorithm.loss: there is no loss {name!r}", fix=hint)
    if not any(name != SFT for name in terms):
        raise ConfigError("algorithm.loss: only the sft term is left", fix="set algorithm.name=sft, or add a preference loss")
    return terms


def _check(cfg: Config, terms: dict[str, float]) -> None:
    if cfg.wpo and any(name in COUPLED or name == SFT for name in terms):
        raise ConfigError(
            f"algorithm.wpo cannot be combined with {', '.join(n for n in terms if n in COUPLED or n == SFT)}",
            why="its per-pair weight has no meaning for losses that sort the batch, nor for a token mean",
            fix="drop algorithm.wpo, or use the pair losses alone",
        )
    if "exo_pair" in terms and cfg.label_smoothing == 0:
        raise ConfigError(
            "algorithm.loss: exo_pair needs algorithm.label_smoothing > 0", why="its target has log(label_smoothing)", fix="set it to 0.001"
        )
    free = [name for name in terms if name in REFERENCE_FREE]
    if free and (cfg.f_divergence != "reverse_kl" or cfg.reference_sync_every is not None):
        raise ConfigError(
            f"algorithm.loss: {', '.join(free)} has no reference policy",
            why="f_divergence and reference_sync_every act on the reference",
            fix="remove them",
        )
    if cfg.reference_sync_every is not None and not any(name in WITH_REFERENCE for name in terms):
        raise ConfigError("algorithm.reference_sync_every needs a loss with a reference policy", fix="remove it")


def _anchor(cfg: Config, terms: dict[str, float]) -> float | None:
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
