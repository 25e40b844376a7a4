"""Ids and completion mask equal to TRL's own DPO and SFT tokenization."""

from types import SimpleNamespace

import pytest

from orchestrator.core.batches import Row
from orchestrator.data.formats import to_rows
from orchestrator.data.tokenize import encode_rows
from orchestrator.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from orchestrator.recipe.schema import Columns, Data

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green, ja größer 🦜."}
HH = "\n\nHuman: Sky?\n\nAssistant:"
PAIRS = {
    "text": [
        {"prompt": HH, "chosen": " blue", "rejected": " green<eos>"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ],
    "turns": [{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}],
    "implicit turns": [{"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]}],
}
MARKED = CHAT_TEMPLATE
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def ours(records, kind, tokenizer, **options):
    rows = [
        Row(i, f"f:{i + 1}", 0, **fields)
        for i, record in enumerate(records)
        for fields in to_rows(record, Columns(), kind)
    ]
    return encode_rows(rows, tokenizer, Data(train="unused", **options), kind).groups


def trl_pairs(records, tokenizer, folder, max_length=None):
    """TRL's preparation, called on the parts of a trainer that it reads."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder), max_length=max_length, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(records), tokenizer, args, "train"
    ).to_list()


def trl_labels(records, tokenizer, folder, *, assistant_only):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        completion_only_loss="prompt" in records[0],
    )
    args = SFTConfig(
        output_dir=str(folder),
        max_length=None,
        assistant_only_loss=assistant_only,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    data = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(records), tokenizer, args, False, None, "train"
    )
    return [(one["input_ids"], one.get("labels", one["input_ids"])) for one in data.to_list()]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_pairs_equal_trls_dpo_tokenization(name, template, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    groups, theirs = ours(PAIRS[name], "preference", tokenizer), trl_pairs(PAIRS[name], tokenizer, tmp_path)
    assert len(groups) == len(theirs) == len(PAIRS[name])
    for group, expected in zip(groups, theirs, strict=True):
        assert group.prompt.tolist() == expected["prompt_ids"]
        assert [b.ids.tolist() for b in group.branches] == [expected["chosen_ids"], expected["rejected_ids"]]
        assert all(b.loss_mask.all() for b in group.branches)


def test_a_cut_at_the_end_equals_trls_collator(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = byte_tokenizer()
    records = [
        {"prompt": "question: ", "chosen": "yes", "rejected": "by no means at all"},
        {"prompt": "sixteen letters!", "chosen": "yes", "rejected": "no"},
    ]
    (group,) = ours(records, "preference", tokenizer, max_length=16, overlong="truncate_end")
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=16)(
        trl_pairs(records, tokenizer, tmp_path, 16)
    )
    for branch, theirs, mask in zip(
        group.branches, batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True
    ):
        sequence = [*group.prompt, *branch.ids]
        assert sequence == theirs[: len(sequence)]
        assert [0] * len(group.prompt) + [1] * len(branch.ids) == mask[: len(sequence)]
        assert sum(mask) == len(branch.ids)


@pytest.mark.parametrize(
    ("records", "assistant_only"),
    [
        ([{"prompt": HH, "completion": " blue"}], False),
        ([{"prompt": [USER], "completion": [BLUE]}], False),
        ([{"messages": [USER, BLUE, USER, GREEN]}, {"messages": [BLUE]}], True),
        ([{"text": "once upon a time"}], False),
    ],
)
def test_demonstrations_equal_trls_sft_tokenization(records, assistant_only, tmp_path):
    tokenizer = byte_tokenizer()
    theirs = trl_labels(records, tokenizer, tmp_path, assistant_only=assistant_only)
    groups = ours(records, "sft", tokenizer)
    assert len(groups) == len(theirs) == len(records)
    for group, (ids, labels) in zip(groups, theirs, strict=True):
        branch = group.branches[0]
        assert [*group.prompt, *branch.ids] == ids
        scored = [-100] * len(group.prompt) + [
            int(t) if s else -100 for t, s in zip(branch.ids, branch.loss_mask, strict=True)
        ]
        assert scored[1:] == labels[1:]  # nothing predicts the first token, in TRL's shifted loss either
