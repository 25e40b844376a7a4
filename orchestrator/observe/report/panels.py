"""The charts of report.html, the wandb workspaces and the Grafana dashboard, by the question they answer.

Names are those of metrics.jsonl (metric_names.py has the others). A run shows the charts whose metrics it
emits.
"""

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.observe.metric_names import REWARD_FIGURES


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart, of named metrics or of a family."""

    title: str
    steps: tuple[str, ...] = ()
    """Metrics of training steps."""
    held_out: tuple[str, ...] = ()
    """Metrics of evaluations, without `eval/`."""
    smooth: bool = True
    """Long series get a running mean over a pale line."""
    from_zero: bool = False
    """The y axis starts at 0."""
    family: str = ""
    """Prefix of metrics whose last part the recipe names: reward components, sources. Example: reward/."""

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of all its metrics."""
        return (*self.steps, *(f"eval/{name}" for name in self.held_out))

    def among(self, emitted: Collection[str]) -> tuple[str, ...]:
        """The panel's metrics among those that a run emits."""
        if self.family:
            return tuple(name for name in emitted if self._of_family(name.removeprefix("eval/")))
        return tuple(name for name in self.names if name in emitted)

    def _of_family(self, name: str) -> bool:
        last = name.removeprefix(self.family)
        return name != last and "/" not in last and name not in REWARD_FIGURES


@dataclass(frozen=True, slots=True)
class Question:
    """A section of a dashboard."""

    title: str
    panels: tuple[Panel, ...]


def per_source(title: str, family: str) -> Panel:
    """The panel of a metric that is also recorded for each source of the data."""
    return Panel(f"{title} per source", family=f"{family}/")


def _both(title: str, *names: str) -> Panel:
    return Panel(title, names, names)


PASS_AT = tuple(f"pass@{k}" for k in (1, 2, 4, 8, 16))
"""Metrics of evaluation.pass_at_k."""
PHASES = tuple(
    f"time/{phase}"
    for phase in (
        "generate",
        "score",
        "experience",
        "data",
        "reference",
        "forward_backward",
        "optim",
        "publish",
    )
)

QUESTIONS: tuple[Question, ...] = (
    Question(
        "Is it learning?",
        (
            _both("Reward", "reward/mean"),
            Panel("Reward components", family="reward/"),
            per_source("Reward", "reward/mean"),
            Panel("pass@k", held_out=PASS_AT),
            _both("Loss", "loss"),
            per_source("Loss", "loss"),
            Panel("Preference accuracy", held_out=("preference_accuracy", "logp_accuracy")),
            per_source("Preference accuracy", "preference_accuracy"),
            Panel("Exact match", held_out=("exact_match",)),
            _both("Reward accuracy", "rewards/accuracies"),
            per_source("Reward accuracy", "rewards/accuracies"),
            _both("Reward margin", "rewards/margins"),
            per_source("Reward margin", "rewards/margins"),
            _both("Rewards", "rewards/chosen", "rewards/rejected"),
            _both("Log-probs", "logps/chosen", "logps/rejected"),
        ),
    ),
    Question(
        "Is it stable?",
        (
            Panel("Gradient norm", ("grad_norm",)),
            Panel("Learning rate", ("learning_rate",), smooth=False),
            Panel("KL from the reference", ("kl",)),
            Panel("Entropy", ("policy/entropy",)),
            Panel("Spread of rewards", ("reward/std", "reward/group_std")),
            Panel("Groups without a signal", ("reward/no_signal_ratio",)),
            Panel(
                "Completion length",
                ("completions/mean_length", "completions/max_length"),
                ("completions/mean_length",),
            ),
            Panel(
                "Completions cut off or empty",
                ("completions/clipped_ratio", "completions/empty_ratio"),
                from_zero=True,
            ),
            Panel("Clipped ratios", ("policy/clip_fraction",), from_zero=True),
            Panel("Generator against learner, nat per token", ("policy/train_rollout_gap",)),
            Panel("Explained variance of the critic", ("value/explained_variance",)),
        ),
    ),
    Question(
        "Is it fast?",
        (
            Panel("Tokens per second", ("perf/tokens_per_s", "perf/learn_tokens_per_s"), from_zero=True),
            Panel("Model FLOPs utilisation (%)", ("perf/mfu",), from_zero=True),
            Panel("Seconds per phase", PHASES, from_zero=True),
            Panel("Seconds without work", ("time/idle/learners", "time/idle/rollouts"), from_zero=True),
            Panel("Share of padding", ("perf/padding",), from_zero=True),
            Panel("Peak memory (GB)", ("perf/peak_memory_gb",), from_zero=True),
        ),
    ),
    Question(
        "Is it healthy?",
        (
            Panel("Goodput", ("perf/goodput",), smooth=False, from_zero=True),
            Panel("Restarts", ("faults/restarts",), smooth=False, from_zero=True),
            Panel("Skipped steps", ("skipped",), smooth=False, from_zero=True),
            Panel(
                "Groups without a reward",
                ("reward/dropped_groups",),
                ("unscored",),
                smooth=False,
                from_zero=True,
            ),
            Panel("Age of rollouts, versions", ("policy/staleness",), from_zero=True),
            Panel("Seconds per weight update", ("weights/seconds",), from_zero=True),
        ),
    ),
)


def board(emitted: Collection[str]) -> tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]:
    """(question, ((panel, metrics), ...)) for runs that emit these metrics. Empty panels and questions are
    left out."""
    asked = (
        (question.title, tuple((panel.title, panel.among(emitted)) for panel in question.panels))
        for question in QUESTIONS
    )
    filled = ((title, tuple((panel, names) for panel, names in panels if names)) for title, panels in asked)
    return tuple((title, panels) for title, panels in filled if panels)
