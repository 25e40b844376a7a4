"""TRL's GRPOTrainer and RLOOTrainer as the outside check of the policy losses: their real code on given
log-probs.

Losses are methods, called unbound as in oracle.py. The correction weights and advantages are lines inside
`_generate_and_score_completions`, which needs a model: those lines of the installed TRL are cut out and run.
Every setting has the default of TRL's GRPOConfig() or RLOOConfig(), unless a call sets it.
"""

import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from orchestrator.algorithms.losses.interface import ExperienceTensors, TokenScores
from orchestrator.core.batches import LossUnits
from tests.parity.oracle import QUIET


@dataclass(frozen=True, slots=True)
class Rollouts:
    """B completions as TRL lays them out. Columns Float[B, T]; completion, model: Bool[B, T], places that
    hold a token, and those the model drew itself (TRL's tool_mask); advantages: Float[B]."""

    logps: Tensor
    old: Tensor
    sampled: Tensor
    reference: Tensor
    entropy: Tensor
    completion: Tensor
    model: Tensor
    advantages: Tensor

    @property
    def mask(self) -> Tensor:
        return self.completion & self.model

    @property
    def units(self) -> LossUnits:
        return LossUnits(len(self.mask), (int(self.mask.sum()),))

    def scores(self) -> TokenScores:
        """The same numbers as our flat tokens: only the scored ones, sequence by sequence."""
        rows = torch.arange(len(self.mask))[:, None].expand_as(self.mask)
        logps, old, sampled, reference, entropy, sequence, advantages = (
            column[self.mask]
            for column in (
                *(self.logps, self.old, self.sampled, self.reference, self.entropy),
                *(rows, self.advantages[:, None].expand_as(self.logps)),
            )
        )
        known = ExperienceTensors(
            advantages=advantages, sampled_logps=sampled, old_logps=old, ref_logps=reference
        )
        return TokenScores(logps, sequence, len(self.mask), 1, entropy=entropy, experience=known)

    def tracked(self) -> "Rollouts":
        """With gradients through log-probs and entropies."""
        return replace(
            self, logps=self.logps.clone().requires_grad_(), entropy=self.entropy.clone().requires_grad_()
        )


def random_rollouts(
    *lengths: int, drift: float, gap: float = 0.3, tools: bool = False, seed: int = 5
) -> Rollouts:
    """drift: deviation of log(pi/pi_old) of a token; gap: of log(pi_old/pi_sampled). tools: some tokens are
    an environment's."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.tensor(lengths)
    completion = torch.arange(int(size.max()) + 1)[None] < size[:, None]

    def noise() -> Tensor:
        return torch.randn(completion.shape, generator=draw, dtype=torch.float64)

    logps = -4.0 * torch.rand(completion.shape, generator=draw, dtype=torch.float64) - 0.01
    old = logps + drift * noise()
    model = torch.rand(completion.shape, generator=draw) > 0.3 if tools else torch.ones_like(completion)
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    return Rollouts(
        logps, old, old + gap * noise(), logps + 0.5 * noise(), noise().abs(), completion, model, advantages
    )


class _Accelerator:
    num_processes = 1
    sync_gradients = False

    @staticmethod
    def gather(values: Tensor) -> Tensor:
        return values

    @staticmethod
    def reduce(values: Tensor, reduction: str) -> Tensor:
        return values


def settings(config: type[Any], **changes: Any) -> Any:
    """TRL's own defaults with these changes; a name that its configuration lacks is an error."""
    return config(**QUIET, **changes)


def _trainer(rollouts: Rollouts, args: Any, **fields: Any) -> SimpleNamespace:
    """The fields of `self` that the losses of both trainers read, set from `args` as the constructors do."""

    def scored(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return rollouts.logps, rollouts.entropy, None

    return SimpleNamespace(
        model=torch.nn.Module().train(),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        beta=args.beta,
        args=args,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=scored,
        **fields,
    )


def _inputs(rollouts: Rollouts) -> dict[str, Tensor]:
    ids, prompt = (
        torch.ones_like(rollouts.completion, dtype=torch.long),
        torch.ones(len(rollouts.mask), 2, dtype=torch.long),
    )
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": ids,
        "completion_mask": rollouts.completion.long(),
        "advantages": rollouts.advantages,
    }


def _logged(trainer: SimpleNamespace) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def grpo(
    rollouts: Rollouts,
    *,
    correction: tuple[str, float] | None = None,
    on_policy: bool = False,
    **changes: Any,
) -> tuple[Tensor, dict[str, float]]:
    """GRPOTrainer._compute_loss with the whole effective batch as one micro-batch: the loss and what it
    logged.

    changes: of GRPOConfig(). correction: (vllm_importance_sampling_mode, clip_max) as if vLLM had sampled.
    on_policy: without old log-probs.
    """
    args = settings(GRPOConfig, **changes)
    entropy_coef = args.entropy_coef
    trainer = _trainer(
        rollouts,
        args,
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef != 0.0 or args.use_adaptive_entropy,
        use_adaptive_entropy=args.use_adaptive_entropy,
        top_entropy_quantile=args.top_entropy_quantile,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        max_completion_length=args.max_completion_length,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=args.vllm_importance_sampling_correction,
    )
    inputs = _inputs(rollouts) | {
        "tool_mask": rollouts.model.long(),
        "ref_per_token_logps": rollouts.reference,
        "num_items_in_batch": rollouts.mask.sum(),
    }
    if not on_policy:
        inputs["old_per_token_logps"] = rollouts.old
    if correction is not None:
        inputs["importance_sampling_ratio"] = importance_sampling_ratio(rollouts, *correction)
    return GRPOTrainer._compute_loss(trainer, None, inputs), _logged(trainer)


def rloo(rollouts: Rollouts, **changes: Any) -> tuple[Tensor, dict[str, float]]:
    """RLOOTrainer._compute_loss: ratios of whole completions. changes: of RLOOConfig()."""
    trainer = _trainer(rollouts, settings(RLOOConfig, **changes))
    inputs = _inputs(rollouts) | {"old_logps": (rollouts.old * rollouts.completion).sum(1)}
    return RLOOTrainer._compute_loss(trainer, None, inputs), _logged(trainer)


def _run_lines(method: Callable[..., Any], first: str, beyond: str, **names: Any) -> dict[str, Any]:
    """Runs the lines of a TRL method from the one that starts with `first` up to the one that starts with
    `beyond`."""
    lines = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(beyond))
    scope = {**vars(sys.modules[method.__module__]), **names}
    exec(textwrap.dedent("\n".join(lines[start:stop])), scope)
    return scope


def importance_sampling_ratio(rollouts: Rollouts, mode: str, clip_max: float) -> Tensor:
    """TRL's vLLM importance ratio: Float[B, T], or Float[B, 1] of the sequence modes."""
    args = settings(
        GRPOConfig,
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=clip_max,
    )
    trainer = SimpleNamespace(**{name: value for name, value in vars(args).items() if "vllm" in name})
    scope = _run_lines(
        GRPOTrainer._generate_and_score_completions,
        "mask = completion_mask if tool_mask is None",
        "# Compute the per-token log probabilities for the reference model",
        self=trainer,
        completion_mask=rollouts.completion.long(),
        tool_mask=rollouts.model.long(),
        old_per_token_logps=rollouts.old,
        sampling_per_token_logps=rollouts.sampled,
    )
    return scope["vllm_importance_sampling_ratio"]


def grpo_advantages(rewards: Tensor, scale: str) -> Tensor:
    """GRPOTrainer's advantages of rewards Float[G, n], with scale_rewards "group" or "none"."""
    scope = _run_lines(
        GRPOTrainer._generate_and_score_completions,
        'if self.multi_objective_aggregation == "sum_then_normalize":',
        'elif self.multi_objective_aggregation == "normalize_then_sum":',
        self=SimpleNamespace(
            multi_objective_aggregation=settings(GRPOConfig).multi_objective_aggregation,
            scale_rewards=scale,
            reward_weights=torch.ones(1, dtype=rewards.dtype),
        ),
        rewards_per_func=rewards.reshape(-1, 1),
        unscorable_mask=torch.zeros(rewards.numel(), dtype=torch.bool),
        num_generations=rewards.shape[1],
        device="cpu",
    )
    return scope["advantages"].view_as(rewards)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOOTrainer's leave-one-out advantages of rewards Float[G, n]."""
    scope = _run_lines(
        RLOOTrainer._generate_and_score_completions,
        "grouped_rewards = rewards.view(-1, num_generations)",
        "is_std_zero",
        self=SimpleNamespace(normalize_advantages=settings(RLOOConfig).normalize_advantages),
        rewards=rewards.flatten(),
        num_generations=rewards.shape[1],
    )
    return scope["advantages"].view_as(rewards)
