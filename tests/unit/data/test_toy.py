"""The demo's task: what is right, how often demonstrations are, and that held-out words are held out."""

import pytest

from orchestrator.config import Columns
from orchestrator.data.rows import to_rows
from orchestrator.data.toy import LENGTH, LETTERS, NAMES, toy_rows

KINDS = {"sft": "sft", "preference": "preference", "reward": "preference", "unpaired": "unpaired"}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_valid_and_the_same_every_time(name):
    rows = list(toy_rows(name, "train", 50))
    assert rows == list(toy_rows(name, "train", 50)) == list(toy_rows(name, "train", 80))[:50]
    assert all(to_rows(row, Columns(), KINDS[name]) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_words_are_never_trained_on(name):
    trained = {row["answer"] for other in NAMES for row in toy_rows(other, "train", 1000)}
    held_out = {row["answer"] for row in toy_rows(name, "eval", 200)}
    assert len(held_out) > 150
    assert not trained & held_out


def test_a_pair_prefers_the_word_over_its_reverse():
    for row in toy_rows("preference", "train", 50):
        word = row["prompt"].removesuffix(">")
        assert (len(set(word)), set(word) <= set(LETTERS)) == (LENGTH, True)
        assert (row["chosen"], row["rejected"], row["answer"]) == (word, word[::-1], word)


def test_half_of_the_demonstrations_are_right_and_all_held_out_ones():
    rows = list(toy_rows("sft", "train", 1000))
    assert 450 <= sum(row["completion"] == row["answer"] for row in rows) <= 550
    assert {row["completion"] for row in rows if row["completion"] != row["answer"]} <= {row["answer"][::-1] for row in rows}
    assert all(row["completion"] == row["answer"] for row in toy_rows("sft", "eval", 100))


def test_labels_say_whether_the_completion_is_right():
    for row in toy_rows("unpaired", "train", 100):
        assert row["label"] == (row["completion"] == row["answer"])
