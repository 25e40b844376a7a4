"""The calculator: whole-number arithmetic alone, and episodes that reward only the right answer."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import DataError
from orchestrator.data.toy import toy_rows
from orchestrator.rollout.environment import Turn, load_environment
from orchestrator.rollout.environments.calculator import LARGEST, Calculator, evaluate

numbers = st.integers(0, 999).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*"), inner).map("".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
    ),
    max_leaves=4,  # 999**4 is below the bound
)


@given(expressions)
def test_arithmetic_is_pythons(expression):
    assert evaluate(expression) == eval(expression)  # made of numbers, + - * and parentheses above


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "12+",
        "1//2",
        "1/2",
        "2**9",
        "1.5",
        "1e9",
        "abs(1)",
        "x",
        "True",
        "__import__('os')",
        "1;2",
        "[1]",
        "1<2",
        "007",
        "+1",
        "'a'*9",
        "1 2",
    ],
)
def test_anything_else_is_no_arithmetic(expression):
    assert evaluate(expression) is None


@pytest.mark.parametrize("expression", ["9" * 40, "*".join(["999999"] * 3), f"-{LARGEST}-1"])
def test_results_are_bounded_on_the_way_too(expression):
    assert evaluate(expression) is None
    assert evaluate(f"({expression})*0") is None
    assert evaluate(str(LARGEST)) == LARGEST


@given(st.text("=0123456789+*-(); \n", max_size=80))
@example("=" + "(" * 60 + ";")
@example("=" + "-" * 60 + "1;")
def test_no_completion_breaks_an_episode(completion):
    world = Calculator()
    world.reset({"prompt": "1+1", "answer": "2"})
    turn = world.step(completion)
    assert turn.done != bool(turn.messages)
    assert turn.reward == float(turn.done and completion.strip() == "2")


def played(*turns: str) -> list[Turn]:
    world = Calculator()
    assert world.reset({"prompt": [{"role": "user", "content": "12+7"}], "answer": "19"}) == [
        {"role": "user", "content": "12+7"}
    ]
    return [world.step(turn) for turn in turns]


def test_a_call_is_answered_and_the_answer_is_paid():
    assert played("=12+7;", "19") == [Turn([{"role": "tool", "content": "19"}]), Turn(done=True, reward=1.0)]


@pytest.mark.parametrize("answer", ["18", "190", "", "19.", "=12+7", "12+7;", "=12+7;19"])
def test_a_wrong_answer_is_not_paid(answer):
    assert played(answer) == [Turn(done=True, reward=0.0)]


def test_white_space_around_a_turn_does_not_count():
    assert played(" =12+7; ", " 19\n") == [
        Turn([{"role": "tool", "content": "19"}]),
        Turn(done=True, reward=1.0),
    ]


def test_a_call_that_is_no_arithmetic_is_told():
    assert played("=12+;", "=(1)(2);", "=2**9;") == [Turn([{"role": "tool", "content": "error"}])] * 3


def test_the_prompt_may_be_text_and_needs_an_answer():
    assert Calculator().reset({"prompt": "12+7", "answer": 19}) == [{"role": "user", "content": "12+7"}]
    with pytest.raises(DataError, match="no `answer`"):
        Calculator().reset({"prompt": "12+7"})


def test_the_recipe_finds_it_and_the_toy_demonstrations_are_paid():
    environment = load_environment("orchestrator.rollout.environments.calculator:Calculator")
    paid = []
    for row in toy_rows("calculator_sft", "train", 100):
        world = environment()
        world.reset({"prompt": row["messages"][:1], "answer": row["answer"]})
        turns = [world.step(m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        assert [t.done for t in turns] == [False] * (len(turns) - 1) + [True]
        assert [m for t in turns for m in t.messages] == [m for m in row["messages"] if m["role"] == "tool"]
        paid.append(sum(t.reward for t in turns))
        assert paid[-1] == (len(turns) == 2)
    assert 0.35 < sum(paid) / len(paid) < 0.65
