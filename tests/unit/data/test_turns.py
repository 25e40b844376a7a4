"""An overlong conversation loses whole turns, the oldest first; never a header or the last user's turn."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from orchestrator.core.batches import Row
from orchestrator.core.errors import DataError
from orchestrator.data.tokenize import encode_rows
from orchestrator.data.turns import shorter, with_fewer_turns
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.schema import Data, Model, TinyModel

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt "
    "%}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [
    SYSTEM,
    *(say(role, f"{role} says {i} " + "x" * 10) for i in range(4) for role in ("user", "assistant")),
]
ASKED = [*TALK[:-1]]
"""Ends with the user's fourth turn."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded = load_tokenizer(Model(tiny=TinyModel()))  # pyright: ignore[reportCallIssue]
    loaded.chat_template = TEMPLATE
    return loaded


def data(max_length: int, overlong: str = "truncate_prompt_left") -> Data:
    return Data.model_validate({"train": "x", "max_length": max_length, "overlong": overlong})


def pair(prompt: object, i: int = 0) -> Row:
    return Row(
        i, f"f:{i}", 0, prompt=prompt, chosen=[say("assistant", "yes")], rejected=[say("assistant", "no")]
    )


def test_exchanges_go_from_the_oldest_to_the_last_but_one() -> None:
    candidates = shorter(ASKED)
    assert [len(messages) for messages in candidates] == [6, 4, 2]
    for messages in candidates:
        assert messages[0] == SYSTEM and messages[1]["role"] == "user" and messages[-1] == ASKED[-1]
    assert shorter([SYSTEM, ASKED[-1]]) == [] == shorter([SYSTEM])
    tool = [
        say("user", "a"),
        say("assistant", "b"),
        say("tool", "c"),
        say("assistant", "d"),
        say("user", "e"),
    ]
    assert shorter(tool) == [[say("user", "e")]], "a tool's answer goes with the turn that asked for it"


def test_the_longest_that_fits_is_kept() -> None:
    for room in range(1, 8):
        shortened = with_fewer_turns(ASKED, len, lambda n, room=room: n <= room)
        assert shortened == (
            None
            if room < 2
            else (shorter(ASKED)[{2: 2, 3: 2, 4: 1, 5: 1, 6: 0, 7: 0}[room]], room - room % 2)
        )


@pytest.mark.parametrize("kind", ["preference", "sft", "messages", "unpaired"])
@pytest.mark.parametrize("room", range(60, 240, 20))
def test_no_header_is_cut_at_any_length(tokenizer: PreTrainedTokenizerBase, kind: str, room: int) -> None:
    answer = [say("assistant", "yes")]
    row = {
        "preference": pair(ASKED),
        "sft": Row(0, "f:0", 0, prompt=ASKED, completion=answer),
        "messages": Row(0, "f:0", 0, messages=TALK),
        "unpaired": Row(0, "f:0", 0, prompt=ASKED, completion=answer, label=True),
    }[kind]
    short = Row(
        1,
        "f:1",
        0,
        prompt=[say("user", "a")],
        completion=answer,
        chosen=answer,
        rejected=[say("assistant", "no")],
        label=True,
    )
    short = Row(1, "f:1", 0, messages=[say("user", "a"), *answer]) if kind == "messages" else short
    data_kind: Any = {"messages": "sft"}.get(kind, kind)
    encoded = encode_rows([row, short], tokenizer, data(room), data_kind)
    report = encoded.report
    assert (
        report.dropped + report.truncated == (1 if room < 230 else report.truncated)
        and report.turns == report.truncated
    )
    for group in encoded.groups:
        for branch in group.branches:
            text = str(tokenizer.decode([*group.prompt, *branch.ids]))
            assert (
                text.startswith(("<system>be brief</><user>", "<user>a</>"))
                and text.endswith("</>")
                and group.longest <= room
            )
            assert text.count("<") == 2 * text.count("</>") and (group.id == 1 or "user says 3" in text)


def test_a_last_turn_that_does_not_fit_drops_the_row_with_a_note(tokenizer: PreTrainedTokenizerBase) -> None:
    long = pair([*ASKED[:-1], say("user", "y" * 300)])
    report = encode_rows([long, pair([say("user", "a")], 1)], tokenizer, data(120), "preference").report
    assert (report.kept, report.dropped, report.truncated, report.turns) == (1, 1, 0, 0)
    (note,) = report.notes
    assert note.startswith("1 conversation dropped") and note.endswith("data.max_length=120")
    with pytest.raises(DataError, match="no row is left"):
        encode_rows([long], tokenizer, data(120), "preference")


def test_plain_text_keeps_its_last_tokens_and_other_policies_cut_no_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = Row(0, "f:0", 0, prompt="p" * 200 + ":", chosen="yes", rejected="no")
    (group,) = encode_rows([text], tokenizer, data(50), "preference").groups
    assert group.longest == 50 and str(tokenizer.decode(group.prompt)).endswith("p:")
    with pytest.raises(DataError, match="120"):
        encode_rows([pair(ASKED)], tokenizer, data(120, "error"), "preference")


def test_a_conversation_keeps_what_teaches(tokenizer: PreTrainedTokenizerBase) -> None:
    """A last exchange of weight 0, or without an answer, is not kept alone."""
    silent = [*TALK[:-1], {**TALK[-1], "weight": 0}]
    for messages, room in ((silent, 80), (ASKED, 80)):
        encoded = encode_rows(
            [Row(0, "f:0", 0, messages=messages), Row(1, "f:1", 0, messages=TALK[-2:])],
            tokenizer,
            data(room),
            "sft",
        )
        assert (encoded.report.dropped, encoded.report.bad) == (1, ())
