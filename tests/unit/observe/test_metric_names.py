"""Names that dashboards use."""

import pytest

from orchestrator.observe.metric_names import gauge, grouped
from orchestrator.observe.report.panels import QUESTIONS


@pytest.mark.parametrize(
    ("name", "group", "prometheus"),
    [
        ("loss", "train/loss", "orchestrator_train_loss"),
        ("rewards/margins", "rewards/margins", "orchestrator_rewards_margins"),
        ("kl", "kl/mean", "orchestrator_kl_mean"),
        ("skipped", "faults/skipped_steps", "orchestrator_faults_skipped_steps"),
        ("eval/pass@4", "eval/pass@4", "orchestrator_eval_pass_4"),
        ("eval/reward/my check", "eval/reward/my check", "orchestrator_eval_reward_my_check"),
    ],
)
def test_every_name_has_a_group(name: str, group: str, prometheus: str) -> None:
    assert (grouped(name), gauge(name)) == (group, prometheus)


def test_no_metric_is_on_two_panels() -> None:
    names = [name for question in QUESTIONS for panel in question.panels for name in panel.names]
    assert len(names) == len(set(names)) == len({gauge(name) for name in names})
