"""Reward functions: names, arguments, which answers count, what is tried again and how parts add up."""

import functools
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.core.errors import ConfigError, Exit, MissingInput, OrchestratorError, RewardsFailed
from orchestrator.recipe.schema import RewardFunction
from orchestrator.rollout.rewards.combine import (
    ComponentRewards,
    check_any,
    score_with_retries,
    sum_components,
)
from orchestrator.rollout.rewards.component import (
    RewardCall,
    RewardFailure,
    check_rewards,
    invoke,
    validate_rewards,
)
from orchestrator.rollout.rewards.lookup import resolve
from tests.unit.rollout.reward_cases import batch, function, group, rewards

HERE = Path(__file__)
SOURCE = """
import pathlib
pathlib.Path({marker!r}).touch()
def length(completions, scale=1.0): return [scale * len(c) for c in completions]
async def later(prompts, completions, **columns): return [1.0 for _ in completions]
if True:
    from math import sqrt as root
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with mine.py and package/inner.py, which leave a marker when they are imported."""
    (tmp_path / "package").mkdir()
    for name in ("mine.py", "package/inner.py", "package/__init__.py"):
        (tmp_path / name).write_text(SOURCE.format(marker=str(tmp_path / "imported")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "written",
    [
        *(
            "exact_match",
            "last_number",
            "mine.py:length",
            "mine:later",
            "package.inner:length",
            "package:root",
        ),
        *("trl:think_format_reward", "math:sqrt", "json:dumps"),
    ],
)
def test_names_are_found_without_importing_anything(folder: Path, written: str) -> None:
    check_rewards(rewards(function("a", written)))
    assert not (folder / "imported").exists()
    assert not {"mine", "package"} & set(sys.modules)


@pytest.mark.parametrize(
    ("written", "options", "kind", "words"),
    [
        ("exact_mach", {}, ConfigError, ["exact_mach", "did you mean exact_match?"]),
        ("exact_match", {"x": 1}, ConfigError, ["takes no options"]),
        ("mine.py:lenght", {}, ConfigError, ["mine.py defines no lenght", "did you mean length?"]),
        ("mime.py:length", {}, MissingInput, ["no file mime.py", "did you mean mine.py?"]),
        ("mime:length", {}, ConfigError, ["'mime'", "did you mean mine:length?"]),
        ("package.iner:length", {}, ConfigError, ["package.iner"]),
        ("package.inner:lenth", {}, ConfigError, ["did you mean length?"]),
        ("mine.py:length", {"scal": 2}, ConfigError, ["no option scal", "did you mean scale?"]),
        ("mine.py:length", {"completions": 2}, ConfigError, ["completions", "itself gives it"]),
        ("trl:think_format", {}, ConfigError, ["trl.rewards has no think_format", "think_format_reward"]),
        ("trl:get_soft_overlong_punishment", {}, ConfigError, ["max_completion_len, soft_punish_cache"]),
        ("trl:get_repetition_penalty_reward", {"ngram": 2}, ConfigError, ["no option ngram", "ngram_size"]),
        ("broken.py:f", {}, ConfigError, ["broken.py:2 is not Python"]),
    ],
)
def test_a_wrong_name_or_option_is_an_error_before_anything_starts(
    folder, written, options, kind, words
) -> None:
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(kind) as caught:
        check_rewards(rewards(function("a", written, options=options)))
    for word in words:
        assert word in str(caught.value)
    assert not (folder / "imported").exists()


def test_a_missing_math_verify_is_an_error() -> None:
    try:
        import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ConfigError, match="pip install 'math-verify"):
            check_rewards(rewards(function("a", "trl:accuracy_reward")))
    else:
        accuracy = function("a", "trl:accuracy_reward")
        check_rewards(rewards(accuracy))
        call = RewardCall.of(
            [group(0, [r"\boxed{\frac{1}{2}}", r"\boxed{3}"], columns={"answer": r"$\frac{1}{2}$"})]
        )
        assert invoke("a", resolve(accuracy), call.for_trl()) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ([function("a", "exact_match"), function("a", "last_number")], "the name a is taken"),
        ([function("environment", "exact_match")], "the name environment is taken"),
        ([function("a", "exact_match", weight=float("nan"))], "the weight is nan"),
        ([RewardFunction(name="a", url="ftp://host/x")], "http:// or https://"),
        ([RewardFunction(name="a", url="http://me:pw@host/x")], "user or a password"),
        (
            [
                RewardFunction(
                    name="a", url="http://host/x", headers_from={"Authorization": "NOT_SET_ANYWHERE"}
                )
            ],
            "NOT_SET_ANYWHERE",
        ),
        ([RewardFunction(name="a", model="/no/such/folder")], "/no/such/folder"),
    ],
)
def test_other_mistakes_of_a_component(components, words: str) -> None:
    with pytest.raises(OrchestratorError, match=words) as caught:
        check_rewards(rewards(*components))
    assert "pw" not in str(caught.value)


def test_an_invalid_header_is_an_error_that_hides_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_TOKEN", "geh\nheim")
    with pytest.raises(ConfigError) as caught:
        check_rewards(
            rewards(RewardFunction(name="a", url="http://host/", headers_from={"Authorization": "THE_TOKEN"}))
        )
    assert "THE_TOKEN" in str(caught.value) and "heim" not in str(caught.value)


def test_built_in_rewards_and_trls_own(folder: Path) -> None:
    groups = [
        group(0, ["it is 4", "5"], columns={"answer": "4"}),
        group(1, ["<think>x</think>7"], columns={"answer": 7}),
    ]
    call = RewardCall.of(groups)
    assert invoke("a", resolve(function("a", "last_number")), call) == [1.0, 0.0, 1.0]
    assert invoke("a", resolve(function("a", "exact_match")), call) == [0.0, 0.0, 0.0]
    assert invoke("a", resolve(function("a", "trl:think_format_reward")), call.for_trl()) == [0.0, 0.0, 1.0]
    soft = resolve(
        function(
            "a", "trl:get_soft_overlong_punishment", options={"max_completion_len": 8, "soft_punish_cache": 4}
        )
    )
    assert invoke("a", soft, call.for_trl()) == [-0.75, 0.0, -1.0]  # 7, 1 and 17 tokens
    assert invoke("a", resolve(function("a", "mine.py:length", options={"scale": 0.5})), call) == [
        3.5,
        0.5,
        8.5,
    ]
    assert invoke("a", resolve(function("a", "mine.py:later")), call) == [1.0, 1.0, 1.0]
    chat = [
        group(
            0,
            [[{"role": "assistant", "content": "3"}, {"role": "tool", "content": "9"}]],
            columns={"answer": "3"},
        )
    ]
    assert invoke("a", resolve(function("a", "last_number")), RewardCall.of(chat)) == [1.0]


def test_a_function_sees_what_trl_gives_and_only_what_it_takes() -> None:
    groups = [
        group(0, ["a", "b"], columns={"answer": "x", "prompt": "left out", "completion_ids": "left out"}),
        group(1, ["c"], columns={"level": 3}, text=[{"role": "user", "content": "hi"}]),
    ]
    call = RewardCall.of(groups)
    seen = invoke("a", lambda **given: given, call)
    assert seen == {
        "prompts": ["question 0", "question 0", [{"role": "user", "content": "hi"}]],
        "completions": ["a", "b", "c"],
        "completion_ids": [[97], [98], [99]],
        "answer": ["x", "x", None],
        "level": [None, None, 3],
    }
    assert invoke("a", lambda completions, level: (completions, level), call) == (
        ["a", "b", "c"],
        [None, None, 3],
    )
    bound = functools.partial(lambda completions, answer: answer, answer="mine")
    assert invoke("a", bound, call) == "mine"
    with pytest.raises(RewardFailure, match="missing a required argument: 'solution'"):
        invoke("a", lambda completions, solution: [], call)
    assert [len(c) for c in call.chunks(2)] == [2, 1]
    assert list(call.chunks(2))[1].columns == {"answer": [None], "level": [3]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([True, 0], [1.0, 0.0]),
        ((0.25, -3), [0.25, -3.0]),
        (np.array([1, 2], np.int32), [1.0, 2.0]),
        (np.array([0.5, 2], np.float16), [0.5, 2.0]),
        (torch.tensor([0.5, 2.0]), [0.5, 2.0]),
        ([torch.tensor(0.5), np.float32(2)], [0.5, 2.0]),
        ([np.bool_(True), Fraction(1, 4)], [1.0, 0.25]),
    ],
)
def test_every_kind_of_number_counts(answer, expected) -> None:
    assert validate_rewards("a", answer, ["s0", "s1"]) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "nan, not a finite"),
        (float("-inf"), "-inf, not a finite"),
        (1e39, "not a finite"),  # infinite in fp32
        (10**400, "not a finite"),
        (None, "None, not a number"),
        ("1.0", "str '1.0', not a number"),
        (1j, "not a number"),
        ([1.0], "list"),
        (torch.tensor(float("nan")), "nan"),
        (np.float64("inf"), "inf"),
    ],
)
def test_one_bad_value_is_a_failure_of_its_sample_alone(value, words: str) -> None:
    right, wrong = validate_rewards("len", [0.5, value], ["q.jsonl:1, sample 0", "q.jsonl:7, sample 3"])
    assert right == 0.5
    assert isinstance(wrong, RewardFailure)
    assert "reward len of q.jsonl:7, sample 3" in wrong.reason and words in wrong.reason


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], "1 rewards for 2"),
        ([1.0] * 3, "3 rewards for 2"),
        (None, "None, not a list"),
        ("ab", "str"),
        ({"a": 1}, "dict"),
        (1.0, "float"),
    ],
)
def test_an_answer_that_is_not_a_list_of_the_right_length(answer, words: str) -> None:
    with pytest.raises(RewardFailure, match=words) as caught:
        validate_rewards("len", answer, ["s0", "s1"])
    assert "reward len" in str(caught.value)


class Scripted:
    """A component that behaves as given, and records the prompts of each call."""

    name = "a"

    def __init__(self, behave) -> None:
        self.behave, self.asked = behave, []

    def score(self, groups, timeout_s):
        self.asked.append([g.prompt.id for g in groups])
        return [o for g in groups for o in self.behave(g, len(groups), timeout_s)]


def test_a_batch_that_fails_as_a_whole_is_scored_group_by_group() -> None:
    def behave(group, together, _):
        if together > 1 or group.prompt.id == 1:
            raise RewardFailure("reward a failed", why=f"poison {group.prompt.id}")
        return [float(len(r.completion)) for r in group.rollouts]

    component = Scripted(behave)
    result = score_with_retries(component, batch(["x", "yy"], ["p"], ["zzz"]), timeout_s=5, retries=2)
    assert component.asked == [[0, 1, 2], [0], [1], [2], [1]]
    assert {i: r.tolist() for i, r in result.rewards.items()} == {0: [1.0, 2.0], 2: [3.0]}
    assert result.reasons == {1: "reward a failed (poison 1)"}


def test_only_groups_with_a_bad_sample_are_asked_again() -> None:
    calls = []

    def behave(group, together, _):
        calls.append(group.prompt.id)
        bad = group.prompt.id == 0 and calls.count(0) == 1
        return [RewardFailure("bad") if bad and r.sample == 1 else 1.0 for r in group.rollouts]

    component = Scripted(behave)
    result = score_with_retries(component, batch(["x", "y"], ["z"]), timeout_s=5, retries=3)
    assert component.asked == [[0, 1], [0]]
    assert not result.reasons and len(result.rewards) == 2


def test_without_retries_a_failed_batch_is_lost() -> None:
    def behave(*_):
        raise RewardFailure("down")

    component = Scripted(behave)
    assert score_with_retries(component, batch(["x"], ["y"]), timeout_s=5, retries=0).reasons == {
        0: "down",
        1: "down",
    }
    assert len(component.asked) == 1


def test_groups_that_hang_do_not_take_the_time_of_all_and_rounds_are_bounded() -> None:
    def behave(group, together, timeout_s):
        if together > 1 or group.prompt.id < 3:
            time.sleep(timeout_s)
            raise RewardFailure("late")
        return [1.0]

    started = time.monotonic()
    result = score_with_retries(Scripted(behave), batch(*[["x"]] * 8), timeout_s=0.4, retries=1)
    assert set(result.reasons) == {0, 1, 2} and set(result.rewards) == {3, 4, 5, 6, 7}
    assert time.monotonic() - started < 1.5


def parts(name: str, *values, reasons=None) -> dict[str, ComponentRewards]:
    return {
        name: ComponentRewards(
            {i: np.array(v, np.float32) for i, v in enumerate(values) if v is not None}, reasons or {}, 0.5
        )
    }


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    config = rewards(function("a", "exact_match", weight=2.0), function("b", "last_number", weight=-0.5))
    groups = [group(0, ["x", "y"], environment=[0.25, -1.0]), group(1, ["z", "z"])]
    scoring = sum_components(groups, config, parts("a", [1, 2], [3, 4]) | parts("b", [2, 4], [0, 1]))
    first, second = scoring.groups
    assert first.rewards.tolist() == [2 - 1 + 0.25, 4 - 2 - 1.0] and second.rewards.tolist() == [6.0, 7.5]
    assert {n: p.tolist() for n, p in first.parts.items()} == {
        "a": [1, 2],
        "b": [2, 4],
        "environment": [0.25, -1.0],
    }
    assert set(second.parts) == {"a", "b"} and first.rewards.dtype == np.float32
    assert scoring.dropped == () and scoring.seconds == {"a": 0.5, "b": 0.5}


def test_a_group_that_one_component_failed_is_dropped_and_named() -> None:
    config = rewards(function("a", "exact_match"), function("b", "last_number"), max_dropped_fraction=0.5)
    components = parts("a", [1], None, reasons={1: "reward a is None"}) | parts("b", [1], [1])
    scoring = sum_components(batch(["x"], ["y"]), config, components)
    assert [g.group.prompt.id for g in scoring.groups] == [0]
    assert scoring.dropped == ("q.jsonl:2: reward a is None",)


def test_too_many_dropped_groups_end_the_run() -> None:
    components = parts("a", [1], None, reasons={1: "reward a is None"})
    with pytest.raises(RewardsFailed, match="1 of 2 groups") as caught:
        sum_components(
            batch(["x"], ["y"]), rewards(function("a", "exact_match"), max_dropped_fraction=0.4), components
        )
    assert "q.jsonl:2: reward a is None" in str(caught.value) and caught.value.exit_code == Exit.SOFTWARE


def test_a_reason_that_many_groups_share_is_printed_once() -> None:
    components = parts(
        "a", *[None] * 6, reasons={i: "reward a is None" if i < 5 else "reward a is nan" for i in range(6)}
    )
    with pytest.raises(RewardsFailed, match="6 of 6 groups") as caught:
        sum_components(batch(*[["x"]] * 6), rewards(function("a", "exact_match")), components)
    assert caught.value.why.splitlines() == [
        "q.jsonl:1, q.jsonl:2, q.jsonl:3 and 2 more: reward a is None",
        "       q.jsonl:6: reward a is nan",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [([1.0, None], "sample 1 no reward"), ([1.0, float("nan")], "sample 1 the reward nan")],
)
def test_an_environment_that_gave_half_a_reward_drops_the_group(given, words: str) -> None:
    scoring = sum_components([group(0, ["x", "y"], environment=given)], rewards(max_dropped_fraction=1), {})
    assert scoring.groups == () and words in scoring.dropped[0]


def test_sums_that_overflow_and_batches_without_any_reward() -> None:
    config = rewards(function("a", "exact_match", weight=1e10), max_dropped_fraction=1)
    assert "not finite" in sum_components(batch(["x"]), config, parts("a", [1e30])).dropped[0]
    with pytest.raises(ConfigError, match="nothing gives a reward"):
        check_any(batch(["x"]), rewards())
    only = sum_components([group(0, ["x"], environment=[2.0])], rewards(), {})
    assert only.groups[0].rewards.tolist() == [2.0]
