"""Records in TRL's formats become row fields; every refusal gives its reason."""

import json
import re

import pytest

from orchestrator.core.batches import Row
from orchestrator.data.formats import BadRecord, describe, to_rows
from orchestrator.recipe.schema import Columns

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
PLAIN = Columns()

FORMATS = {
    "messages": ("sft", {"messages": [USER, BLUE]}, {"messages": [USER, BLUE]}, "conversation"),
    "completion": (
        "sft",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b"},
        "prompt-completion, text",
    ),
    "no prompt": ("sft", {"completion": "b"}, {"prompt": "", "completion": "b"}, "prompt-completion, text"),
    "turns": (
        "sft",
        {"prompt": [USER], "completion": [BLUE]},
        {"prompt": [USER], "completion": [BLUE]},
        "prompt-completion, conversational",
    ),
    "text": ("sft", {"text": "once"}, {"text": "once"}, "text"),
    "pair": (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "preference, text",
    ),
    "pair of turns": (
        "preference",
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        "preference, conversational",
    ),
    "implicit turns": (
        "preference",
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        "preference, conversational",
    ),
    "unpaired": (
        "unpaired",
        {"prompt": "p", "completion": "c", "label": False},
        {"prompt": "p", "completion": "c", "label": False},
        "unpaired, text",
    ),
    "unpaired turns": (
        "unpaired",
        {"prompt": [USER], "completion": [BLUE], "label": True},
        {"prompt": [USER], "completion": [BLUE], "label": True},
        "unpaired, conversational",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_trl_format(name):
    kind, record, fields, description = FORMATS[name]
    assert to_rows(record, PLAIN, kind) == [fields]
    assert describe(Row(0, "f:1", 0, **fields)) == description


@pytest.mark.parametrize("name", FORMATS)
def test_trl_agrees_on_what_is_conversational(name):
    from trl.data_utils import is_conversational

    _, record, _, description = FORMATS[name]
    ours = "convers" in description
    assert ours == is_conversational(record)


def test_a_pair_is_unpaired_for_kto_as_trl_does():
    from datasets import Dataset
    from trl.data_utils import unpair_preference_dataset

    pairs = [{"prompt": f"p{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(3)]
    ours = [row for pair in pairs for row in to_rows(pair, PLAIN, "unpaired")]
    theirs = unpair_preference_dataset(Dataset.from_list(pairs)).to_list()
    assert sorted(ours, key=json.dumps) == sorted(theirs, key=json.dumps)
    assert ours[:2] == [
        {"prompt": "p0", "completion": "good0", "label": True},
        {"prompt": "p0", "completion": "bad0", "label": False},
    ]


HH = "\n\nHuman: What is over the sea?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " The sky.", HH + " The sun and The moon.", HH),
        (HH + " Birds.", HH + " Clouds.", HH),
        (HH + "A", HH + "B", HH),
        (
            HH + " No.\n\nHuman: Yes?\n\nAssistant: I think so.",
            HH + " No.\n\nHuman: Yes?\n\nAssistant: I do not.",
            None,
        ),
        (HH + " It is", HH + " It is blue.", HH),
        (HH + " Yes.\nBirds fly.", HH + " Yes.\nClouds do.", HH),
        ("Q: sky?\nA: blue", "Q: sky?\nA: black", "Q: sky?\n"),
        ("Q\nA", "Q\nA and more", "Q\n"),
    ],
)
def test_the_implicit_prompt_ends_where_the_turn_ends(chosen, rejected, prompt):
    prompt = prompt if prompt is not None else HH + " No.\n\nHuman: Yes?\n\nAssistant:"
    (fields,) = to_rows({"chosen": chosen, "rejected": rejected}, PLAIN, "preference")
    assert fields["prompt"] == prompt
    assert prompt + fields["chosen"] == chosen
    assert prompt + fields["rejected"] == rejected


def test_implicit_prompt_of_several_turns_keeps_all_shared_turns():
    again = {"role": "user", "content": "Sure?"}
    (fields,) = to_rows(
        {"chosen": [USER, BLUE, again, BLUE], "rejected": [USER, BLUE, again, GREEN]}, PLAIN, "preference"
    )
    assert fields == {"prompt": [USER, BLUE, again], "chosen": [BLUE], "rejected": [GREEN]}


def test_columns_are_renamed_and_extras_kept():
    columns = Columns(prompt="question", chosen="good", rejected="bad", margin="gap")
    record = {"question": "p", "good": "a", "bad": "b", "gap": 2, "answer": 7, "unknown": None}
    assert to_rows(record, columns, "preference") == [
        {"prompt": "p", "chosen": "a", "rejected": "b", "answer": "7", "margin": 2.0}
    ]


REFUSED = [
    ("sft", [1], "must be an object, this is list"),
    (
        "sft",
        {"body": "x"},
        "no messages, prompt + completion, or text; columns are body; data.columns.text=body?",
    ),
    ("sft", {"prompt": "x"}, "no messages, prompt + completion, or text; columns are prompt"),
    ("sft", {"prompt": "p", "completion": " \n"}, "completion is empty"),
    ("sft", {"prompt": "p", "completion": 3}, "completion must be text or a list of messages, not int"),
    (
        "sft",
        {"prompt": "p", "completion": [BLUE]},
        "prompt text, completion message lists: write all as text or all as messages",
    ),
    ("sft", {"text": ""}, "text is empty"),
    ("sft", {"messages": []}, "messages must be a non-empty list"),
    ("sft", {"messages": [USER]}, "no assistant turn"),
    ("sft", {"messages": [{"content": "x"}]}, "messages[0] needs a role"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": 5}]}, "messages[1].content must be text"),
    (
        "sft",
        {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        "messages[1].content holds half of a surrogate pair",
    ),
    ("sft", {"text": "ab\ud83d"}, "text holds half of a surrogate pair at character 2"),
    ("sft", {"prompt": "p", "chosen": "a", "rejected": "b"}, "a preference pair in a data set for SFT"),
    ("preference", {"prompt": "p", "chosen": "a"}, "no 'rejected'; columns are prompt, chosen"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": None}, "no 'rejected'"),
    ("preference", {"chosen": HH + " a", "rejected": HH + " a"}, "chosen and rejected are equal"),
    ("preference", {"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "chosen and rejected are equal"),
    (
        "preference",
        {"chosen": [USER], "rejected": [USER, BLUE]},
        "one of chosen and rejected is the beginning of the other",
    ),
    (
        "preference",
        {"chosen": [USER, BLUE, USER, GREEN], "rejected": [USER, BLUE]},
        "one of chosen and rejected is the beginning",
    ),
    ("preference", {"chosen": [BLUE], "rejected": [GREEN]}, "share no leading message"),
    (
        "preference",
        {
            "chosen": HH + " No.\n\nHuman: Yes?\n\nAssistant:",
            "rejected": HH + " No.\n\nHuman: Yes?\n\nAssistant: Yes.",
        },
        "chosen is empty",
    ),
    ("preference", {"chosen": HH, "rejected": HH + " a"}, "chosen is empty"),
    ("preference", {"chosen": "The sea", "rejected": "The sky"}, "share no beginning"),
    ("preference", {"chosen": "a", "rejected": "b"}, "share no beginning"),
    (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "2"},
        "margin must be a finite number, not '2'",
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")},
        "margin must be a finite number",
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True},
        "margin must be a finite number",
    ),
    ("unpaired", {"prompt": "p", "completion": "c"}, "no 'label'; columns are prompt, completion"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 1}, "label must be true or false, not 1"),
]


@pytest.mark.parametrize(("kind", "record", "reason"), REFUSED)
def test_a_bad_record_is_refused_with_its_reason(kind, record, reason):
    with pytest.raises(BadRecord, match=re.escape(reason)):
        to_rows(record, PLAIN, kind)


def test_a_mapped_column_that_is_missing_is_named():
    with pytest.raises(BadRecord, match=r"column 'good' \(mapped to chosen\) is missing"):
        to_rows({"chosen": "a", "rejected": "b"}, Columns(chosen="good"), "preference")
