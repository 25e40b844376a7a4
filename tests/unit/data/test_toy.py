"""The toy tasks: their right answers, the share of right demonstrations, the held-out prompts."""

import pytest

from orchestrator.data.formats import to_rows
from orchestrator.data.toy import LENGTH, LETTERS, NAMES, toy_rows
from orchestrator.recipe.schema import Columns

KINDS = {
    "sft": "sft",
    "preference": "preference",
    "reward": "preference",
    "unpaired": "unpaired",
    "prompts": "prompt",
    "calculator": "prompt",
    "calculator_sft": "sft",
}
WORDS = ("sft", "preference", "unpaired", "reward", "prompts")
CALCULATOR = ("calculator", "calculator_sft")
FIRST_WORDS = ["djan", "nkfe", "gfpo", "blne"]


def question(row):
    """The prompt's text."""
    messages = row.get("messages") or row["prompt"]
    return messages if isinstance(messages, str) else messages[0]["content"]


def test_every_name_is_tested_as_what_it_is():
    assert set(KINDS) == set(NAMES) == {*WORDS, *CALCULATOR}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_valid_and_the_same_every_time(name):
    rows = list(toy_rows(name, "train", 50))
    assert rows == list(toy_rows(name, "train", 50)) == list(toy_rows(name, "train", 80))[:50]
    assert all(to_rows(row, Columns(), KINDS[name]) for row in rows)


@pytest.mark.parametrize(
    ("name", "others"), [*((name, WORDS) for name in WORDS), *((name, CALCULATOR) for name in CALCULATOR)]
)
def test_held_out_prompts_are_never_trained_on(name, others):
    trained = {question(row) for other in others for row in toy_rows(other, "train", 1000)}
    held_out = {question(row) for row in toy_rows(name, "eval", 200)}
    assert len(held_out) > 120
    assert not trained & held_out


def test_rows_of_the_older_names_have_stayed_the_same():
    """A name's place in NAMES keys its generator: new ones go to the end."""
    assert [next(iter(toy_rows(name, "train", 1)))["answer"] for name in WORDS[:4]] == FIRST_WORDS


def test_a_pair_prefers_the_word_over_its_reverse():
    for row in toy_rows("preference", "train", 50):
        word = row["prompt"].removesuffix(">")
        assert (len(set(word)), set(word) <= set(LETTERS)) == (LENGTH, True)
        assert (row["chosen"], row["rejected"], row["answer"]) == (word, word[::-1], word)


def test_half_of_the_demonstrations_are_right_and_all_held_out_ones():
    rows = list(toy_rows("sft", "train", 1000))
    assert 450 <= sum(row["completion"] == row["answer"] for row in rows) <= 550
    assert {row["completion"] for row in rows if row["completion"] != row["answer"]} <= {
        row["answer"][::-1] for row in rows
    }
    assert all(row["completion"] == row["answer"] for row in toy_rows("sft", "eval", 100))


def test_labels_say_whether_the_completion_is_right():
    for row in toy_rows("unpaired", "train", 100):
        assert row["label"] == (row["completion"] == row["answer"])


def test_prompts_are_words_to_write_again():
    for row in toy_rows("prompts", "train", 50):
        assert row == {"prompt": f"{row['answer']}>", "answer": row["answer"]}
        assert len(set(row["answer"])) == LENGTH


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", CALCULATOR)
def test_the_calculators_answer_is_the_sum_of_two_numbers(name, split):
    for row in toy_rows(name, split, 200):
        a, b = map(int, question(row).split("+"))
        assert row["answer"] == str(a + b)
        assert len(f"{a}{b}{row['answer']}") == 6


def test_the_calculators_prompts_are_one_question():
    row = next(iter(toy_rows("calculator", "train", 1)))
    assert set(row) == {"prompt", "answer"} and [m["role"] for m in row["prompt"]] == ["user"]
    assert to_rows(row, Columns(), "prompt")[0]["columns"]["answer"] == row["answer"]


def test_half_of_the_calculators_demonstrations_call_it_and_the_others_guess_wrong():
    rows = list(toy_rows("calculator_sft", "train", 1000))
    calls = [row for row in rows if len(row["messages"]) == 4]
    assert 450 <= len(calls) <= 550
    for row in calls:
        turns = [(m["role"], m["content"]) for m in row["messages"][1:]]
        assert turns == [
            ("assistant", f"={question(row)};"),
            ("tool", row["answer"]),
            ("assistant", row["answer"]),
        ]
    for row in rows:
        if len(row["messages"]) == 2:
            guess = row["messages"][1]
            assert guess["role"] == "assistant" and len(guess["content"]) == 2
            assert 1 <= abs(int(guess["content"]) - int(row["answer"])) <= 9
    assert all(len(row["messages"]) == 4 for row in toy_rows("calculator_sft", "eval", 100))
