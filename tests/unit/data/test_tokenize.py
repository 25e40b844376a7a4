"""Chat template and plain text to ids and loss mask; the over-long policies, counted."""

import numpy as np
import pytest

from orchestrator.core.batches import Row
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.data.packing import pack
from orchestrator.data.tokenize import Encoder, encode_rows
from orchestrator.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from orchestrator.recipe.schema import Data

WITHOUT_MARKERS = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = WITHOUT_MARKERS.replace(
    "message['content'] + eos_token", "(message['content'] if loop.last else '') + eos_token"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Sea?"},
    {"role": "assistant", "content": "Also."},
]
WHERE = "talk.jsonl:7"


def row(**fields):
    return Row(id=3, where=WHERE, source=1, **fields)


def data(**options):
    return Data(train="unused", **options)


def encode(example, kind, tokenizer=None, **options):
    return Encoder(tokenizer or byte_tokenizer(), data(**options), kind).encode(example)


def ids(text, tokenizer=None):
    return (tokenizer or byte_tokenizer())(text=text)["input_ids"]


def text(tokens):
    return byte_tokenizer().decode(tokens)


def parts(group):
    """(prompt, branches) as text; tokens that are not scored stand in square brackets."""
    branches = []
    for branch in group.branches:
        shown, last = "", True
        for token, scored in zip(branch.ids, branch.loss_mask, strict=True):
            shown += "" if scored == last else "]" if scored else "["
            shown, last = shown + text([token]), scored
        branches.append(shown if last else shown + "]")
    return text(group.prompt), tuple(branches)


def test_only_the_assistants_tokens_are_scored():
    group = encode(row(messages=TALK), "sft")
    assert parts(group) == (
        "<|system|>Be brief.<|user|>Sky?<|assistant|>",
        ("Blue.<eos>[<|user|>Sea?<|assistant|>]Also.<eos>",),
    )
    assert (group.id, group.source) == (3, 1)
    assert text([*group.prompt, *group.branches[0].ids]) == byte_tokenizer().apply_chat_template(
        TALK, tokenize=False
    )


def test_a_template_without_markers_gives_the_same_by_growing_prefixes():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITHOUT_MARKERS
    ours, marked = encode(row(messages=TALK), "sft", tokenizer), encode(row(messages=TALK), "sft")
    assert parts(ours) == parts(marked)


def test_a_last_turn_of_the_user_is_read_but_not_scored():
    group = encode(row(messages=[*TALK[1:3], {"role": "user", "content": "Why?"}]), "sft")
    assert parts(group) == ("<|user|>Sky?<|assistant|>", ("Blue.<eos>[<|user|>Why?]",))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ConfigError, match=f"{WHERE}: the chat template rewrites earlier turns"):
        encode(row(messages=TALK), "sft", tokenizer)
    assert parts(encode(row(messages=TALK[:3]), "sft", tokenizer))[1] == ("Blue.<eos>",)


def test_a_template_with_markers_may_rewrite_earlier_turns():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content'] + eos_token", "(message['content'] if loop.last else '') + eos_token"
    )
    assert parts(encode(row(messages=TALK), "sft", tokenizer))[1] == (
        "<eos>[<|user|>Sea?<|assistant|>]Also.<eos>",
    )


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("sft", {"messages": TALK}),
        ("preference", {"prompt": TALK[:2], "chosen": TALK[2:3], "rejected": TALK[4:]}),
        ("unpaired", {"prompt": TALK[:2], "completion": TALK[2:3], "label": True}),
    ],
)
def test_chat_messages_without_a_chat_template_are_refused(kind, fields):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=f"{WHERE} holds chat messages, but the tokenizer has no chat template"
    ) as failure:
        encode(row(**fields), kind, tokenizer)
    assert failure.value.exit_code == 78
    assert parts(encode(row(prompt="a", completion="b"), "sft", tokenizer)) == ("a", ("b<eos>",))


def test_a_refusal_of_a_template_names_the_row():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=rf"{WHERE}: the chat template refuses the conversation\n  why: roles must alternate"
    ):
        encode(row(messages=TALK), "sft", tokenizer)


def test_a_conversation_that_the_assistant_begins():
    group = encode(row(messages=TALK[2:3]), "sft")
    assert parts(group) == ("<|assistant|>", ("Blue.<eos>",))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITHOUT_MARKERS
    with pytest.raises(DataError, match=f"{WHERE}: no turn comes before the assistant's first"):
        encode(row(messages=TALK[2:3]), "sft", tokenizer)


def test_a_first_token_of_the_assistant_is_given_since_nothing_predicts_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert parts(encode(row(messages=TALK[2:3]), "sft", tokenizer)) == ("B", ("lue.",))


def test_no_assistant_token_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'hello' }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="no token of the conversation is the assistant's"):
        encode(row(messages=TALK), "sft", tokenizer)


def test_a_pair_of_conversations_shares_its_prompt():
    group = encode(row(prompt=TALK[:2], chosen=TALK[2:3], rejected=TALK[4:], margin=0.5), "preference")
    assert parts(group) == ("<|system|>Be brief.<|user|>Sky?<|assistant|>", ("Blue.<eos>", "Also.<eos>"))
    assert (group.label, group.margin) == (None, 0.5)


def test_plain_text_of_every_kind():
    assert parts(encode(row(prompt="p: ", completion="c"), "sft")) == ("p: ", ("c<eos>",))
    assert parts(encode(row(prompt="p", chosen="yes", rejected="no"), "preference")) == (
        "p",
        ("yes<eos>", "no<eos>"),
    )
    group = encode(row(prompt="p", completion="c", label=False), "unpaired")
    assert (parts(group), group.label) == (("p", ("c<eos>",)), 0.0)
    assert parts(encode(row(text="once"), "sft")) == ("o", ("nce<eos>",))


def test_eos_is_appended_once_or_not_at_all():
    assert parts(encode(row(prompt="p", completion="c<eos>"), "sft")) == ("p", ("c<eos>",))
    assert parts(encode(row(prompt="p", completion="c"), "sft", append_eos=False)) == ("p", ("c",))
    assert parts(encode(row(text="once"), "sft", append_eos=False)) == ("o", ("nce",))


def test_text_outside_ascii_round_trips():
    group = encode(row(prompt="größer 🦜?", completion=" 是\n"), "sft")
    assert text(group.prompt) == "größer 🦜?"
    assert text(group.branches[0].ids) == " 是\n<eos>"
    assert len(group.branches[0].ids) == len(" 是\n".encode()) + 1


def test_eos_is_scored_even_if_it_is_the_pad_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    group = encode(row(prompt="p", chosen="yes", rejected="no"), "preference", tokenizer)
    batch = pack([group], "padded")
    assert batch.targets.tolist() == [*ids("yes<eos>"), *ids("no<eos>")]
    assert (batch.segment >= 0).sum() == 9 and batch.segment[1, 4] == -1


@pytest.mark.parametrize(("completion", "prompt", "answer"), [("bc", "a", "bc<eos>"), ("b", "a", "b<eos>")])
def test_without_a_prompt_the_first_token_is_given(completion, prompt, answer):
    group = encode(row(prompt="", completion=prompt + completion), "sft")
    assert parts(group) == (prompt, (answer,))


def test_without_a_prompt_a_pair_must_share_its_first_token():
    assert parts(encode(row(prompt="", chosen="ab", rejected="ac"), "preference")) == (
        "a",
        ("b<eos>", "c<eos>"),
    )
    with pytest.raises(DataError, match=f"{WHERE}: no prompt, and the answers share no first token"):
        encode(row(prompt="", chosen="b", rejected="c"), "preference")


@pytest.mark.parametrize("fields", [{"prompt": "", "completion": "a"}, {"text": "a"}])
def test_nothing_can_predict_a_single_token(fields):
    with pytest.raises(DataError, match=f"{WHERE}: .*fewer than two tokens"):
        encode(row(**fields), "sft", append_eos=False)


def test_bos_of_the_tokenizer_leads_a_missing_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert parts(encode(row(prompt="", chosen="b", rejected="c"), "preference", tokenizer)) == (
        "<bos>",
        ("b<eos>", "c<eos>"),
    )
    assert parts(encode(row(prompt="p", chosen="b", rejected="c"), "preference", tokenizer)) == (
        "<bos>p",
        ("b<eos>", "c<eos>"),
    )


def merging_tokenizer():
    """Byte-like tokenizer of four letters that merges "a" and "b", so a prompt that ends in "a" may lose its
    end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, merges=[("a", "b")]))
    backend.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def test_a_prompt_that_is_not_a_token_prefix_is_reported_and_loses_its_end():
    rows = [
        Row(0, "f:1", 0, prompt="xxa", chosen="bc", rejected="cb"),
        Row(1, "f:2", 0, prompt="xx", chosen="ab", rejected="b"),
    ]
    encoded = encode_rows(rows, merging_tokenizer(), data(), "preference")
    assert encoded.report.not_prefix == ("f:1",)
    merged, clean = encoded.groups
    assert (merged.prompt.tolist(), [b.ids.tolist() for b in merged.branches]) == (
        [0, 0],
        [[4, 3, 5], [1, 3, 2, 5]],
    )
    assert (clean.prompt.tolist(), [b.ids.tolist() for b in clean.branches]) == ([0, 0], [[4, 5], [2, 5]])


ROWS = [
    Row(0, "f:1", 0, prompt="12", chosen="ab", rejected="c"),
    Row(1, "f:2", 0, prompt="123456", chosen="ab", rejected="cde"),
    Row(2, "f:3", 0, prompt="12", chosen="abcdefgX", rejected="abcdefgY"),
    Row(3, "f:4", 0, prompt="12345678", chosen="a", rejected="b"),
]
POLICIES = {
    "drop": ({0: ("12", ("ab<eos>", "c<eos>"))}, (4, 1, 3, 0, 0)),
    "truncate_prompt_left": (
        {
            0: ("12", ("ab<eos>", "c<eos>")),
            1: ("3456", ("ab<eos>", "cde<eos>")),
            2: ("2", ("abcdefg", "abcdefg")),
            3: ("345678", ("a<eos>", "b<eos>")),
        },
        (4, 4, 0, 3, 1),
    ),
    "truncate_end": (
        {0: ("12", ("ab<eos>", "c<eos>")), 1: ("123456", ("ab", "cd")), 2: ("12", ("abcdef", "abcdef"))},
        (4, 3, 1, 2, 1),
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_overlong_rows_by_policy(policy):
    kept, counts = POLICIES[policy]
    encoded = encode_rows(ROWS, byte_tokenizer(), data(max_length=8, overlong=policy), "preference")
    assert {g.id: parts(g) for g in encoded.groups} == kept
    report = encoded.report
    assert (report.rows, report.kept, report.dropped, report.truncated, report.identical) == counts
    assert report.lengths == tuple(g.longest for g in encoded.groups)
    assert max(report.lengths) <= 8


def test_overlong_rows_as_an_error():
    with pytest.raises(DataError, match=r"f:2: 10 tokens, data\.max_length is 8"):
        encode_rows(ROWS, byte_tokenizer(), data(max_length=8, overlong="error"), "preference")
    exact = encode_rows(ROWS, byte_tokenizer(), data(max_length=11, overlong="error"), "preference")
    assert (exact.report.kept, exact.report.quantiles()) == (
        4,
        {"min": 5, "median": 10, "p95": 10, "max": 11},
    )


def test_a_conversation_cut_before_the_assistants_turn_is_dropped():
    rows = [Row(0, "f:1", 0, messages=TALK), Row(1, "f:2", 0, messages=TALK[1:3])]
    encoded = encode_rows(rows, byte_tokenizer(), data(max_length=15, overlong="truncate_end"), "sft")
    assert [g.id for g in encoded.groups] == [1]
    assert (encoded.report.dropped, encoded.report.truncated) == (1, 0)


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="no row is left"):
        encode_rows(ROWS[3:], byte_tokenizer(), data(max_length=4, overlong="drop"), "preference")


def test_prompts_for_generation_end_where_the_assistant_begins():
    encoder = Encoder(byte_tokenizer(), data(), "sft")
    assert (
        text(encoder.prompt_tokens(row(messages=TALK)))
        == "<|system|>Be brief.<|user|>Sky?<|assistant|>Blue.<eos><|user|>Sea?<|assistant|>"
    )
    assert (
        text(encoder.prompt_tokens(row(prompt=TALK[:2], completion=TALK[2:3])))
        == "<|system|>Be brief.<|user|>Sky?<|assistant|>"
    )
    assert encoder.prompt_tokens(row(prompt="ab", completion="c")) == tuple(ids("ab"))


def test_arrays_are_typed():
    group = encode(row(messages=TALK), "sft")
    assert (group.prompt.dtype, group.branches[0].ids.dtype, group.branches[0].loss_mask.dtype) == (
        np.int64,
        np.int64,
        np.bool_,
    )
