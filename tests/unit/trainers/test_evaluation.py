"""Held-out metrics against literal numbers: checkers, accuracies by source, the most wrong pairs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.batches import Branch, Cut, SequenceGroup
from orchestrator.core.reports import LearnReport, Mean
from orchestrator.data.answers import matches
from orchestrator.data.micro_batches import cut_step
from orchestrator.recipe.schema import Evaluation, Generation
from orchestrator.trainers.evaluation import Evaluator, HeldOut
from orchestrator.trainers.ranking import Ranking
from tests.unit.trainers.conftest import pairs, recipe


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("abcd", "abcd", True),
        (" abcd\n", "abcd", True),
        ("abcd.", "abcd", False),
        ("ABCD", "abcd", False),
        ("", "", True),
        ("ab cd", "abcd", False),
    ],
)
def test_exact_match(completion, answer, right):
    assert matches(completion, answer, "exact_match") is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so the answer is 42", "42", True),
        ("first 3, then 42.", "42", True),
        ("42, not 41", "42", False),
        ("it costs $1,234,567.", "1234567", True),
        ("1234567", "#### 1,234,567", True),
        ("-7", "-7", True),
        ("7", "-7", False),
        ("it is -1,200.50 dollars", "-1200.5", True),
        ("3.0", "3", True),
        ("10-7", "7", True),
        ("5 - 3", "3", True),
        ("x=-3", "-3", True),
        ("pages 3-4", "4", True),
        ("1, 2, 3", "3", True),
        ("1,2,3", "3", True),
        ("no number", "3", False),
        ("", "3", False),
        ("no number", "none either", False),
    ],
)
def test_last_number(completion, answer, right):
    assert matches(completion, answer, "last_number") is right


class Fixed:
    """A learner whose log-prob sums are given by example id."""

    def __init__(self, margins, completions=()):
        self.margins, self.completions = margins, list(completions)

    def evaluate(self, batch):
        sums = tuple(
            tuple(
                np.array([[m, 0.0] for m in (self.margins[int(i)] for i in mb.examples)], np.float32)
                for mb in rank
            )
            for rank in batch.micro_batches
        )
        means = {"rewards/accuracies": Mean(3.0, 4.0)}
        return LearnReport(0.5, means, 1, 1, 1, 1, 1, 1.0), sums

    def generate(self, prompts, max_new_tokens):
        assert max_new_tokens == 5
        return self.completions[: len(prompts)]


CUT = Cut(2, 2, None, "padded", 0, "no_sync")


def words(ids):
    return "".join(map(chr, ids))


BY_REWARD = Ranking("reward")
BY_DPO = Ranking.of(recipe(), build(recipe().algorithm))


def evaluator(
    policy, groups, sources=("a",), prompts=(), answers=(), attach=lambda b: b, ranking=BY_REWARD, **config
):
    held_out = HeldOut(tuple(groups), sources, tuple(prompts), tuple(answers))
    return Evaluator(held_out, Evaluation(**config), policy, attach, words, ranking)


def test_accuracies_and_margins_in_all_and_by_source():
    groups = [replace(g, source=s) for g, s in zip(pairs(5), [0, 0, 1, 1, 1], strict=True)]
    policy = Fixed({0: 1.0, 1: -1.0, 2: 2.0, 3: 0.5, 4: 0.0})
    report = evaluator(policy, groups, ("easy", "hard")).evaluate(CUT, 7)
    assert report.step == 7
    assert report.metrics == pytest.approx(
        {
            "eval/loss": 0.5,
            "eval/rewards/accuracies": 0.75,
            "eval/preference_accuracy": 0.7,
            "eval/preference_accuracy/easy": 0.5,
            "eval/preference_accuracy/hard": 2.5 / 3,
        }
    )


def test_a_tie_is_half_right_and_one_source_has_no_separate_metric():
    report = evaluator(Fixed({0: 0.0, 1: 1.0}), pairs(2)).evaluate(CUT, 0).metrics
    assert report["eval/preference_accuracy"] == 0.75
    assert not [name for name in report if name.startswith("eval/preference_accuracy/")]


def test_of_ties_alone_the_accuracy_is_nan_and_no_pair_is_shown():
    report = evaluator(Fixed({0: 0.0, 1: 0.0}), pairs(2)).evaluate(CUT, 0)
    assert math.isnan(report.metrics["eval/preference_accuracy"]) and report.samples == ()


def test_pairs_rank_by_log_prob_per_token_without_a_reference():
    """The sum of log-probs would prefer the shorter answer, whatever its text."""
    long, short = np.arange(20), np.arange(2)
    group = SequenceGroup(
        0, np.array([1]), (Branch(long, np.ones(20, bool)), Branch(short, np.ones(2, bool)))
    )

    class Sums(Fixed):
        def evaluate(self, batch):
            return super().evaluate(batch)[0], tuple(
                tuple(np.array([[-20.0, -4.0]], np.float32) for _ in rank) for rank in batch.micro_batches
            )

    report = evaluator(Sums({0: 0.0}), [group], ranking=Ranking("log-prob per token")).evaluate(CUT, 0)
    assert report.metrics["eval/preference_accuracy"] == 1.0, "-1 nat a token against -2"
    assert report.samples[0].scores == {"logp_per_token_margin": pytest.approx(1.0)}
    assert "eval/logp_accuracy" not in report.metrics


@pytest.mark.parametrize("layout", ["prefix_shared", "padded", "packed"])
def test_pairs_rank_by_implicit_reward_with_a_reference(one_rank, layout):
    policy = one_rank()
    cut = Cut(1, 3, None, layout, 0, "no_sync")
    held_out = evaluator(policy, pairs(7), attach=policy.with_live_reference, ranking=BY_DPO)
    before = held_out.evaluate(cut, 0)
    assert math.isnan(before.metrics["eval/preference_accuracy"]) and math.isnan(
        before.metrics["eval/rewards/accuracies"]
    )
    assert before.samples == () and 0.0 < before.metrics["eval/logp_accuracy"] < 1.0, (
        "the accuracy of the policy alone is known before"
    )
    for step in range(3):
        policy.forward_backward(
            policy.with_live_reference(cut_step(pairs(7), Cut(1, 8, None, "padded", 0, "no_sync"))), step
        )
        policy.optim_step(step)
    after = held_out.evaluate(cut, 3)
    assert after.metrics["eval/preference_accuracy"] == after.metrics["eval/rewards/accuracies"]
    margins = [sample.scores["implicit_reward_margin"] for sample in after.samples]
    assert margins == sorted(margins) and np.mean(margins) == pytest.approx(
        after.metrics["eval/rewards/margins"], rel=1e-5
    )


def test_the_most_wrong_pairs_come_first_and_ties_by_id():
    report = evaluator(Fixed({0: 1.0, 1: -2.0, 2: -3.0, 3: -2.0, 4: 5.0}), pairs(5), worst_pairs=4).evaluate(
        CUT, 3
    )
    assert [s.scores["reward_margin"] for s in report.samples] == [-3.0, -2.0, -2.0, 1.0]
    groups = pairs(5)
    for sample, which in zip(report.samples, (2, 1, 3, 0), strict=True):
        group = groups[which]
        assert (sample.step, sample.kind) == (3, "pair")
        assert (sample.prompt, sample.chosen, sample.rejected) == (
            words(group.prompt),
            words(group.branches[0].ids),
            words(group.branches[1].ids),
        )


def test_no_worst_pairs_if_none_are_requested():
    assert evaluator(Fixed({0: 1.0}), pairs(1), worst_pairs=0).evaluate(CUT, 0).samples == ()


@pytest.mark.parametrize("kind", ["single answers", "labelled answers"])
def test_only_pairs_have_preferences(kind):
    groups = pairs(2, labelled=kind == "labelled answers")
    if kind == "single answers":
        groups = [replace(g, branches=g.branches[:1]) for g in groups]
    report = evaluator(Fixed({0: 1.0, 1: 1.0}), groups).evaluate(CUT, 0)
    assert report.metrics.keys() == {"eval/loss", "eval/rewards/accuracies"} and not report.samples


def test_generations_are_checked_and_shown():
    completions = [[ord("4")], [ord("x")], [ord(c) for c in "is 6"]]
    prompts, answers = [(50,), (51,), (52,)], ["4", "5", "6"]
    config = {"generate": Generation(max_new_tokens=5, checker="last_number")}
    report = evaluator(Fixed({}, completions), (), prompts=prompts, answers=answers, **config).evaluate(
        CUT, 2
    )
    assert report.metrics == pytest.approx({"eval/exact_match": 2 / 3})
    assert [(s.kind, s.prompt, s.completion, s.answer, s.scores["correct"]) for s in report.samples] == [
        ("generation", "2", "4", "4", 1.0),
        ("generation", "3", "x", "5", 0.0),
        ("generation", "4", "is 6", "6", 1.0),
    ]


def test_nothing_held_out_gives_no_metrics():
    assert evaluator(Fixed({}), ()).evaluate(CUT, 0).metrics == {}


@pytest.mark.parametrize("layout", ["prefix_shared", "padded"])
@pytest.mark.parametrize("examples", [7, 2])
def test_a_real_learner_is_evaluated_alike_in_any_cut(one_rank, layout, examples):
    policy = one_rank()
    groups = pairs(7)
    held_out = evaluator(policy, groups, attach=policy.with_live_reference, ranking=BY_DPO)
    report = held_out.evaluate(Cut(1, examples, None, layout, 0, "no_sync"), 0).metrics
    whole = held_out.evaluate(Cut(1, 7, None, "padded", 0, "no_sync"), 0).metrics
    assert report.keys() == whole.keys()
    assert report == pytest.approx(whole, rel=1e-4, abs=1e-5, nan_ok=True)


def test_a_reward_model_prefers_by_its_rewards(one_rank):
    policy = one_rank(recipe(name="reward"))
    metrics = evaluator(policy, pairs(7)).evaluate(Cut(1, 3, None, "padded", 0, "no_sync"), 0).metrics
    assert metrics["eval/preference_accuracy"] == pytest.approx(metrics["eval/rewards/accuracies"])


def test_a_pair_of_one_token_answers():
    one = np.array([5])
    group = SequenceGroup(3, one, (Branch(one, np.array([True])), Branch(one, np.array([True]))))
    assert evaluator(Fixed({3: 0.25}), [group]).evaluate(CUT, 0).metrics["eval/preference_accuracy"] == 1.0
