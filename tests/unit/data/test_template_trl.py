"""Rows with tools, template variables and ShareGPT names: tokens and masks equal those that TRL prepares."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl

from orchestrator.core.batches import DataKind, Row, SequenceGroup
from orchestrator.core.errors import DataError
from orchestrator.data.formats import to_rows
from orchestrator.data.tokenize import Encoder, encode_rows
from orchestrator.models.tiny import byte_tokenizer
from orchestrator.recipe.schema import Columns, Data

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PARAMETERS = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "stock", "description": "How many there are", "parameters": PARAMETERS},
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "stock", "arguments": {"item": "chair"}}}],
}
ASKED, TOLD = (
    {"role": "user", "content": "How many chairs?"},
    {"role": "tool", "name": "stock", "content": "14"},
)
SAID, GUESSED = (
    {"role": "assistant", "content": "There are 14."},
    {"role": "assistant", "content": "About 3."},
)
AGAIN = [ASKED, SAID, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
THOUGHT = [
    m if m["role"] == "user" else {**m, "content": f"<think>\nhm\n</think>\n\n{m['content']}"} for m in AGAIN
]
QUIET = {"enable_thinking": False}


def tokenizer_of(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def ours(record: dict[str, Any], kind: DataKind, tokenizer: Any) -> SequenceGroup:
    (fields,) = to_rows(record, Columns(), kind)
    return encode_rows(
        [Row(0, "f:1", 0, **fields)], tokenizer, Data(train="unused", max_length=8192), kind
    ).groups[0]


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }


def trl_sft(record: dict[str, Any], tokenizer: Any, folder: Path) -> tuple[list[int], list[int]]:
    """(ids, labels) of SFTTrainer with the training template that it chooses itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    talk = "prompt" not in record
    template = get_training_chat_template(tokenizer) if talk else None
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=template, completion_only_loss=not talk
    )
    args = SFTConfig(assistant_only_loss=talk, **options(folder))
    (made,) = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list([copy.deepcopy(record)]), tokenizer, args, False, None, "train"
    ).to_list()
    return made["input_ids"], made["labels"]


SFT = {
    "tools, completion": ("qwen3", {"prompt": [ASKED], "completion": [CALL, TOLD, SAID], "tools": TOOLS}),
    "tools as text": ("qwen3", {"prompt": [ASKED], "completion": [CALL], "tools": json.dumps(TOOLS)}),
    "tools, conversation": ("qwen3", {"messages": [ASKED, CALL, TOLD, SAID], "tools": TOOLS}),
    "tools, Qwen 2.5": ("qwen2_5", {"messages": [ASKED, CALL, TOLD, SAID], "tools": TOOLS}),
    "variables": ("qwen3", {"prompt": [ASKED], "completion": [SAID], "chat_template_kwargs": QUIET}),
    "several turns": ("qwen3", {"messages": AGAIN}),
    "several thoughts": ("qwen3", {"messages": THOUGHT}),
    "Llama 3": ("llama3", {"messages": AGAIN}),
    "Gemma": ("gemma", {"messages": AGAIN}),
    "ShareGPT": ("qwen3", {"conversations": [{"from": m["role"], "value": m["content"]} for m in AGAIN]}),
}


@pytest.mark.parametrize("name", SFT)
def test_demonstrations_equal_trls(name: str, tmp_path: Path) -> None:
    template, record = SFT[name]
    tokenizer = tokenizer_of(template)
    group, (ids, labels) = ours(record, "sft", tokenizer), trl_sft(record, tokenizer, tmp_path)
    (branch,) = group.branches
    assert [*group.prompt, *branch.ids] == ids
    scored = [False] * len(group.prompt) + branch.loss_mask.tolist()
    assert [token if on else -100 for token, on in zip(ids, scored, strict=True)] == labels
    assert 0 < sum(scored) < len(ids)


def test_what_is_exported_is_the_tokenizers_own_template() -> None:
    tokenizer = tokenizer_of("qwen3")
    own = tokenizer.chat_template
    encoder = Encoder(tokenizer, Data(train="unused"), "sft")
    encoder.encode(Row(0, "f:1", 0, messages=THOUGHT))
    assert tokenizer.chat_template == own
    assert any("TRL's training form" in note for note in encoder.notes)
    asked = tokenizer.decode(encoder.prompt_tokens(Row(0, "f:1", 0, messages=THOUGHT)))
    assert asked.count("<think>") == 0, "a prompt for generation is what the exported template writes"


PAIRS = {
    "tools": {"prompt": [ASKED], "chosen": [CALL], "rejected": [GUESSED], "tools": TOOLS},
    "tools as text": {"prompt": [ASKED], "chosen": [CALL], "rejected": [GUESSED], "tools": json.dumps(TOOLS)},
    "variables": {"prompt": [ASKED], "chosen": [SAID], "rejected": [GUESSED], "chat_template_kwargs": QUIET},
    "no prompt": {"chosen": [ASKED, SAID], "rejected": [ASKED, GUESSED], "tools": TOOLS},
}
SHAREGPT = {
    "prompt": [{"from": "human", "value": ASKED["content"]}],
    "chosen": [{"from": "gpt", "value": SAID["content"]}],
    "rejected": [{"from": "gpt", "value": GUESSED["content"]}],
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5"])
def test_pairs_equal_trls_dpo_and_reward(name: str, template: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    tokenizer, record = tokenizer_of(template), PAIRS[name]
    group = ours(record, "preference", tokenizer)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    rows = Dataset.from_list([copy.deepcopy(record)])
    (pair,) = DPOTrainer._prepare_dataset(
        trainer, rows, tokenizer, DPOConfig(**options(tmp_path)), "train"
    ).to_list()
    assert group.prompt.tolist() == pair["prompt_ids"]
    assert [b.ids.tolist() for b in group.branches] == [pair["chosen_ids"], pair["rejected_ids"]]
    (whole,) = RewardTrainer._prepare_dataset(
        trainer, rows, tokenizer, RewardConfig(**options(tmp_path)), "train"
    ).to_list()
    assert [[*group.prompt, *b.ids] for b in group.branches] == [whole["chosen_ids"], whole["rejected_ids"]]


def test_sharegpt_pairs_are_what_trls_conversion_makes_of_the_same_roles() -> None:
    tokenizer = tokenizer_of("qwen3")
    named = {"prompt": [ASKED], "chosen": [SAID], "rejected": [GUESSED]}
    for one, other in zip(
        ours(SHAREGPT, "preference", tokenizer).branches,
        ours(named, "preference", tokenizer).branches,
        strict=True,
    ):
        assert one.ids.tolist() == other.ids.tolist()


def test_unpaired_rows_equal_trls_kto(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    tokenizer = tokenizer_of("qwen3")
    record = {"prompt": [ASKED], "completion": [CALL], "label": True, "tools": TOOLS}
    group = ours(record, "unpaired", tokenizer)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    args = KTOConfig(**options(tmp_path))
    (made,) = KTOTrainer._prepare_dataset(
        trainer, Dataset.from_list([record]), tokenizer, args, "train"
    ).to_list()
    assert (group.prompt.tolist(), group.branches[0].ids.tolist()) == (
        made["prompt_ids"],
        made["completion_ids"],
    )


# ---- tokenizers and templates with a will of their own


def with_ends(*, bos: bool = False, eos: bool = False) -> Any:
    """A byte tokenizer that adds them to every text, as Llama's and those with add_eos_token do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    single = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_a_tokenizer_that_ends_every_text_ends_no_prompt_and_no_completion_twice() -> None:
    tokenizer, row = with_ends(bos=True, eos=True), Row(0, "f:1", 0, prompt="p", completion="c")
    encoder = Encoder(tokenizer, Data(train="unused"), "sft")
    group = encoder.encode(row)
    assert (tokenizer.decode(group.prompt), tokenizer.decode(group.branches[0].ids)) == ("<bos>p", "c<eos>")
    assert tokenizer.decode(encoder.prompt_tokens(row)) == "<bos>p" and encoder.not_prefix == []
    bare = Encoder(tokenizer, Data(train="unused", append_eos=False), "sft").encode(row)
    assert tokenizer.decode(bare.branches[0].ids) == "c"
    assert tokenizer.decode(encoder.encode(Row(0, "f:1", 0, text="once")).branches[0].ids) == "once<eos>"


def test_a_second_bos_is_counted_and_noted() -> None:
    rows = [
        Row(i, f"f:{i}", 0, prompt=prompt, completion="c")
        for i, prompt in enumerate(["<bos>a", "b", "<bos>c"])
    ]
    (note,) = encode_rows(rows, with_ends(bos=True), Data(train="unused"), "sft").report.notes
    assert note.startswith("2 prompts begin with <bos> twice")
    assert encode_rows(rows, byte_tokenizer(), Data(train="unused"), "sft").report.notes == ()


def test_names_that_the_template_lacks_are_noted() -> None:
    """Gemma's lacks tools, Qwen 2.5's lacks reasoning: the rows would be learned without them."""
    row = Row(
        0,
        "f:1",
        0,
        messages=[ASKED, {**SAID, "reasoning_content": "hm", "weight": 1}],
        tools=TOOLS,
        chat_template_kwargs=QUIET,
    )
    notes = {
        template: encode_rows(
            [row], tokenizer_of(template), Data(train="unused", max_length=8192), "sft"
        ).report.notes
        for template in ("gemma", "qwen2_5", "qwen3")
    }

    def missing(template: str) -> list[str]:
        found = [re.search(r"does not name ([\w, ]+), which", note) for note in notes[template]]
        return [match[1] for match in found if match is not None]

    assert missing("gemma") == ["enable_thinking, reasoning_content, tools"]
    assert missing("qwen2_5") == ["enable_thinking, reasoning_content"]
    assert missing("qwen3") == []


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ messages[0].nothing.more }}", "'dict object' has no attribute"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ],
)
def test_what_a_template_raises_is_a_bad_row(template: str, reason: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 2 %}" + template + "{% endif %}" + tokenizer.chat_template
    )
    rows = [Row(i, f"f:{i + 1}", 0, messages=talk) for i, talk in enumerate([AGAIN[:2], AGAIN, AGAIN[:2]])]
    words = (
        r"1 bad rows, data\.max_bad_rows allows 0[\s\S]*f:2: the chat template refuses the "
        rf"conversation \({reason}"
    )
    with pytest.raises(DataError, match=words) as caught:
        encode_rows(rows, tokenizer, Data(train="unused"), "sft")
    assert caught.value.exit_code == 65
    encoded = encode_rows(rows, tokenizer, Data(train="unused", max_bad_rows=1), "sft")
    assert [g.id for g in encoded.groups] == [0, 2] and [b.where for b in encoded.report.bad] == ["f:2"]


def test_bad_records_and_bad_encodings_count_together() -> None:
    from orchestrator.data.bad_rows import BadRow

    pair = Row(0, "f:2", 0, prompt=[ASKED], chosen=[SAID], rejected=[{**SAID, "content": "There are 14. "}])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos_token", "(message['content'] | trim) + eos_token"
    )
    good = Row(1, "f:3", 0, prompt=[ASKED], chosen=[SAID], rejected=[GUESSED])
    with pytest.raises(
        DataError, match=r"2 bad rows[\s\S]*f:1: no[\s\S]*f:2: chosen and rejected are the same tokens"
    ):
        encode_rows(
            [pair, good], tokenizer, Data(train="unused", max_bad_rows=1), "preference", [BadRow("f:1", "no")]
        )
    assert (
        len(encode_rows([pair, good], tokenizer, Data(train="unused", max_bad_rows=1), "preference").groups)
        == 1
    )
