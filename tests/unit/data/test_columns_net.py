"""The net under all columns: each column a row may have, at each stage that reads rows, is in the tokens, in
the mask, handed over, listed as unused, or refused by name. The table is that of docs/your-own.md. Stages are
run through the recipe, as a user does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.batches import SequenceGroup
from orchestrator.core.errors import DataError
from orchestrator.core.rollouts import Completion, Rollout, RolloutGroup, Sampling
from orchestrator.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Columns
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.environments.calculator import Calculator
from orchestrator.rollout.episodes import EpisodeRunner
from orchestrator.rollout.rewards.component import RewardCall
from orchestrator.run.inputs import read_data, read_prompts

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% if mood is defined %}<|system|>mood={{ mood "
    "}}{% endif %}" + CHAT_TEMPLATE
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "stock", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
TOKENIZER = byte_tokenizer()
TOKENIZER.chat_template = TEMPLATE


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = [say("user", "Sky?")]
GOOD, BAD = say("assistant", "Blue."), say("assistant", "Green.")
TALK = [*ASKED, GOOD, say("user", "Sea?"), BAD]


@dataclass(frozen=True)
class Seen:
    """What a stage makes of its first row."""

    prompt: str
    """Text before the first scored token."""
    scored: tuple[str, ...] = ()
    """Learned text of each branch."""
    unused: tuple[str, ...] = ()
    handed: Mapping[str, Any] = field(default_factory=dict)
    """Columns that reach rewards or environments."""
    facts: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A built-in recipe, and the row that it is run on."""

    recipe: str
    row: Mapping[str, Any]
    overrides: tuple[str, ...] = ()


GENERATE = "evaluation.generate={max_new_tokens: 4}"
STAGES = {
    "sft": Stage("tiny/sft", {"messages": TALK}),
    "sft, completion": Stage("tiny/sft", {"prompt": ASKED, "completion": [GOOD]}),
    "reward": Stage("tiny/reward", {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}),
    "dpo": Stage("tiny/dpo", {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}),
    "kto": Stage("tiny/kto", {"prompt": ASKED, "completion": [GOOD], "label": True}),
    "evaluation": Stage("tiny/sft", {"prompt": ASKED, "completion": [GOOD], "answer": "Blue."}, (GENERATE,)),
    "online": Stage("tiny/grpo", {"prompt": ASKED, "answer": "Blue."}),
    "environment": Stage("tiny/grpo_tool", {"prompt": [say("user", "1+1")], "answer": "2"}),
}


@pytest.fixture(scope="module")
def see(tmp_path_factory: pytest.TempPathFactory):
    """Runs a stage over one row with further columns."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "t.jinja").write_text(TEMPLATE)

    results: dict[str, Seen] = {}

    def run(name: str, row: Mapping[str, Any], *overrides: str) -> Seen:
        key = json.dumps([name, row, overrides])
        if key not in results:
            results[key] = fresh(name, row, *overrides)
        return results[key]

    def fresh(name: str, row: Mapping[str, Any], *overrides: str) -> Seen:
        stage = STAGES[name]
        file, other = folder / "rows.jsonl", folder / "other.jsonl"
        file.write_text(json.dumps({**stage.row, **row}) + "\n")
        other.write_text(json.dumps(stage.row).replace("Sky?", "Rain?") + "\n")
        train, held_out = (other, file) if name == "evaluation" else (file, None)
        changes = [
            f"data.train={train}",
            f"data.eval={held_out or 'null'}",
            f"model.chat_template={folder / 't.jinja'}",
        ]
        if stage.recipe.startswith("tiny/grpo"):
            changes = [f"grpo:{change}" for change in (*changes, *overrides)]
            recipe = load(stage.recipe, [*changes, "grpo:data.max_length=2048"]).stages[-1].recipe
            tiny = recipe.model.model_copy(
                update={"path": None, "tiny": load("tiny/sft").stages[0].recipe.model.tiny}
            )
            return _online(recipe.model_copy(update={"model": tiny}))
        recipe = (
            load(stage.recipe, [*changes, *stage.overrides, *overrides, "data.max_length=2048"])
            .stages[0]
            .recipe
        )
        return _offline(recipe, held_out=name == "evaluation")

    return run


def _offline(recipe: Any, *, held_out: bool) -> Seen:
    data = read_data(recipe, build(recipe.algorithm))
    if held_out:
        return Seen(TOKENIZER.decode(data.prompts[0]), (), data.unused, {"answer": data.answers[0]})
    (group,) = data.groups
    return Seen(
        TOKENIZER.decode(group.prompt), _learned(group), data.unused, facts=(group.label, group.margin)
    )


def _learned(group: SequenceGroup) -> tuple[str, ...]:
    branches = (
        group.branches[:1] if group.label is not None else group.branches
    )  # KTO's second one is for its KL term
    return tuple(TOKENIZER.decode(branch.ids[branch.loss_mask]) for branch in branches)


class Wise:
    """A decoder that calls the calculator first, then answers."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Any, sampling: Sampling) -> list[tuple[Completion, ...]]:
        self.asked += requests
        text = "=1+1;<eos>" if len(self.asked) == 1 else "2<eos>"
        ids = np.array(TOKENIZER(text=text)["input_ids"])
        return [(Completion(ids, np.zeros(len(ids), np.float32), "stop"),) for _ in requests]


def _online(recipe: Any) -> Seen:
    prompts = read_prompts(recipe, build(recipe.algorithm, recipe.rollouts))
    prompt = prompts.batches.groups[0]
    if recipe.rollouts.environment is None:
        group = RolloutGroup(
            prompt,
            0,
            (Rollout(0, 0, prompt.ids, prompt.ids > 0, np.zeros(len(prompt.ids), np.float32), "stop", "x"),),
        )
        call = RewardCall.of([group])
        return Seen(
            TOKENIZER.decode(prompt.ids),
            (),
            prompts.longest.unused,
            {name: values[0] for name, values in call.columns.items()},
        )
    rows: list[Mapping[str, Any]] = []

    class Noting(Calculator):
        def reset(self, row: Mapping[str, Any]) -> Any:
            rows.append(row)
            return super().reset(row)

    decoder = Wise()
    (group,) = EpisodeRunner(decoder, prompts.tokenizer, Noting, 4).run([(0, prompt)], Sampling(1, 100), 0)
    handed = {name: value for name, value in rows[0].items() if name != "prompt"}
    prompt_text = TOKENIZER.decode(decoder.asked[0].prompt)
    assert TOKENIZER.decode(decoder.asked[1].prompt) == f"{prompt_text}=1+1;<eos><|tool|>2<|assistant|>", (
        "later turns hold no second header"
    )
    return Seen(
        prompt_text,
        tuple(TOKENIZER.decode(r.ids[r.loss_mask]) for r in group.rollouts),
        prompts.longest.unused,
        handed,
    )


HANDED = ("online", "environment")
OFFLINE = ("sft", "sft, completion", "reward", "dpo", "kto")
STATED = "2026-11-27T17:05:00"

COLUMNS: dict[str, dict[str, Any]] = {
    "tools": {"tools": TOOLS},
    "tools, as JSON text": {"tools": json.dumps(TOOLS)},
    "tools, null": {"tools": None},
    "tools, empty": {"tools": []},
    "chat_template_kwargs": {"chat_template_kwargs": {"mood": "gay", "unknown": None}},
    "images": {"images": ["sky.png"]},
    "image": {"image": {"bytes": "AA==", "path": None}},
    "environment": {"environment": "calculator"},
    "margin": {"margin": 0.5},
    "answer": {"answer": "Blue."},
    "any other": {"made at": STATED},
}
TABLE: dict[str, dict[str, str]] = {
    "tools": dict.fromkeys(STAGES, "tokens"),
    "tools, as JSON text": dict.fromkeys(STAGES, "tokens"),
    "tools, null": dict.fromkeys(STAGES, "no trace"),
    "tools, empty": dict.fromkeys(STAGES, "no trace"),
    "chat_template_kwargs": dict.fromkeys(STAGES, "tokens"),
    "images": dict.fromkeys(STAGES, "refused"),
    "image": dict.fromkeys(STAGES, "refused"),
    "environment": {**dict.fromkeys(STAGES, "refused"), "environment": "handed over"},
    "margin": {
        **dict.fromkeys(STAGES, "unused"),
        "reward": "loss",
        "online": "unused",
        "environment": "handed over",
    },
    "answer": {**dict.fromkeys(OFFLINE, "unused"), **dict.fromkeys(("evaluation", *HANDED), "handed over")},
    "any other": {**dict.fromkeys(STAGES, "unused"), "environment": "handed over"},
}
WORDS = {
    "tokens": "in the tokens",
    "no trace": "no trace",
    "refused": "refused",
    "unused": "listed as unused",
    "loss": "in the loss",
    "handed over": "handed over",
}
"""Entries of the table as the page spells them."""


def page_table() -> str:
    """The table of docs/your-own.md: `python -c "from tests.unit.data.test_columns_net import page_table as
    t; print(t())"`"""
    head = f"| | {' | '.join(STAGES)} |\n|{'---|' * (len(STAGES) + 1)}\n"
    return head + "".join(
        f"| `{name}` | {' | '.join(WORDS[row[stage]] for stage in STAGES)} |\n" for name, row in TABLE.items()
    )


def test_the_page_has_the_table() -> None:
    assert page_table() in (ROOT / "docs/your-own.md").read_text()


IN_TOKENS = {
    "tools": json.dumps(TOOLS),
    "tools, as JSON text": json.dumps(TOOLS),
    "chat_template_kwargs": "mood=gay",
}


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == COLUMNS.keys() and all(row.keys() == STAGES.keys() for row in TABLE.values())
    covered = {name for row in COLUMNS.values() for name in row} | {
        name for stage in STAGES.values() for name in stage.row
    }
    assert set(Columns.model_fields) - covered == {"text"}, "a new field of data.columns needs a row here"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_at_every_stage(see, column: str, stage: str) -> None:
    row, wanted = COLUMNS[column], TABLE[column][stage]
    (name,) = row
    if wanted == "refused":
        field_name = "images" if name == "image" else name
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*data\.columns\.{field_name}=null"):
            see(stage, row)
        without = see(stage, row, f"data.columns.{field_name}=null")
        assert (
            name in without.unused and name not in without.handed and without.prompt == see(stage, {}).prompt
        )
        return
    seen, bare = see(stage, row), see(stage, {})
    assert seen.scored == bare.scored
    if wanted == "tokens":
        assert seen.prompt == f"<|system|>{IN_TOKENS[column]}{bare.prompt}" and name not in seen.unused
        return
    assert seen.prompt == bare.prompt
    assert (name in seen.unused) == (wanted == "unused")
    assert seen.facts == ((None, 0.5) if wanted == "loss" else bare.facts)
    if wanted == "handed over":
        assert seen.handed[name] == row[name]


def test_templates_are_applied_in_one_place() -> None:
    """A second caller would drop what a row gives its template."""
    package = ROOT / "orchestrator"
    calls = [
        f.relative_to(package).as_posix()
        for f in package.rglob("*.py")
        if ".apply_chat_template(" in f.read_text()
    ]
    assert calls == ["data/template.py"]


@pytest.mark.parametrize("stage", STAGES)
def test_null_leaves_a_column_out(see, stage: str) -> None:
    for column, name in (
        ("tools", "tools"),
        ("chat_template_kwargs", "chat_template_kwargs"),
        ("answer", "answer"),
        ("margin", "margin"),
    ):
        if stage in ("evaluation", "environment") and name == "answer":
            continue  # they need one
        seen = see(stage, COLUMNS[column], f"data.columns.{name}=null")
        assert seen.prompt == see(stage, {}).prompt and name not in seen.handed
        assert name in seen.unused


def test_a_turn_of_weight_0_is_not_learned(see) -> None:
    turns = [
        say("user", "Sky?"),
        say("assistant", "Green.", weight=0),
        say("user", "Sure?"),
        say("assistant", "Blue.", weight=1),
    ]
    assert see("sft", {"messages": turns}).scored == ("Blue.<eos>",)
    assert see("sft, completion", {"completion": turns[1:]}).scored == (
        "<|user|>Sure?<|assistant|>Blue.<eos>",
    )
    assert see("sft, completion", {"prompt": turns[:3], "completion": turns[3:]}).scored == ("Blue.<eos>",)


@pytest.mark.parametrize(
    ("stage", "row", "reason"),
    [
        (
            "sft",
            {"messages": [*ASKED, say("assistant", "Blue.", weight=0.5)]},
            r"messages\[1\]\.weight must be 0 or 1, not 0\.5",
        ),
        (
            "sft",
            {"messages": [*ASKED, say("assistant", "Blue.", weight=True)]},
            r"messages\[1\]\.weight must be 0 or 1, not True",
        ),
        (
            "sft",
            {"messages": [*ASKED, say("assistant", "Blue.", weight=0)]},
            "every assistant turn has weight 0",
        ),
        (
            "sft",
            {"messages": [say("user", "Sky?", weight=1), GOOD]},
            r"messages\[0\]\.weight is 1, but only the assistant's turns",
        ),
        (
            "sft, completion",
            {"completion": [say("assistant", "Blue.", weight=0)]},
            "every turn of the completion has weight 0",
        ),
        ("dpo", {"chosen": [say("assistant", "Blue.", weight=0)]}, r"chosen\[0\]\.weight is 0"),
        ("reward", {"rejected": [say("assistant", "Blue?", weight=0)]}, r"rejected\[0\]\.weight is 0"),
        ("kto", {"completion": [say("assistant", "Blue.", weight=0)]}, r"completion\[0\]\.weight is 0"),
    ],
)
def test_a_weight_that_cannot_be_applied_is_refused(
    see, stage: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        see(stage, row)


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_in_content_are_refused_and_text_parts_are_text(see, stage: str) -> None:
    name = next(key for key in ("messages", "prompt") if key in STAGES[stage].row)
    question = STAGES[stage].row[name][0]
    rest = STAGES[stage].row[name][1:]
    parts = {
        "role": "user",
        "content": [
            {"type": "text", "text": question["content"][:1]},
            {"type": "text", "text": question["content"][1:]},
        ],
    }
    assert see(stage, {name: [parts, *rest]}) == see(stage, {})
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(DataError, match=rf"{name}\[0\]\.content has a part of type 'image_url'"):
        see(stage, {name: [picture, *rest]})


@pytest.mark.parametrize("stage", STAGES)
def test_sharegpt_names_are_read_at_every_stage(see, stage: str) -> None:
    """`from` and `value` in each column of messages, and `conversations` in the place of `messages`."""
    names = {"user": "human", "assistant": "gpt"}
    row = {
        key: [{"from": names[m["role"]], "value": m["content"]} for m in value]
        if isinstance(value, list)
        else value
        for key, value in STAGES[stage].row.items()
    }
    assert see(stage, row) == see(stage, {})
    if "messages" in row:
        assert see(stage, {"messages": None, "conversations": row["messages"]}) == see(stage, {})
        with pytest.raises(DataError, match=r"messages\[0\]\.from is 'bing', not one of human, gpt"):
            see(stage, {"messages": [{"from": "bing", "value": "x"}]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "no json"}, "tools is text, but not JSON"),
        ({"tools": {"name": "stock"}}, "tools must be a list of JSON schemas"),
        ({"tools": ["stock"]}, "tools must be a list of JSON schemas"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs may not set tokenize"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs may not set chat_template"),
    ],
)
def test_a_value_that_no_template_can_take_is_refused(see, row: dict[str, Any], reason: str) -> None:
    for stage in STAGES:
        with pytest.raises(DataError, match=reason):
            see(stage, row)
