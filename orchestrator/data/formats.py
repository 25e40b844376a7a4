"""From a raw record to the fields of a Row: TRL's formats, recognised and validated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.core.batches import DataKind, Row
from orchestrator.data.bad_rows import BadRecord
from orchestrator.data.hints import lacking
from orchestrator.data.messages import check_weights, is_learned, messages_of, refuse_weights, unicode
from orchestrator.data.template import tools_of, variables_of
from orchestrator.data.values import plain, without_nulls
from orchestrator.recipe.schema import Columns

HH_TURN = "\n\nAssistant:"
SHAREGPT_COLUMN = "conversations"
PICTURES = ("images", "image")
"""TRL's columns of pictures. A text called `image` may be anything, such as a container image."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Columns that a run reads beside those that its kind of data needs."""

    margin: bool = True
    answer: bool = True
    environment: bool = False
    """Rows may name an environment."""
    others: frozenset[str] | None = None
    """Further columns of prompts; None: all of them."""


EVERYTHING = Reads()


def to_rows(
    record: Any, columns: Columns, kind: DataKind, reads: Reads = EVERYTHING, *, filled: bool = False
) -> list[dict[str, Any]]:
    """Row fields of one record: one dict, or two if a preference pair is unpaired for KTO. Raises BadRecord.

    filled: the record comes from a table, where each mapping has the keys of all others, with null for those
    that it lacks.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record must be an object, this is {type(record).__name__}")
    fields = _mapped(record, columns, kind, reads)
    if filled:
        fields = {name: without_nulls(value) for name, value in fields.items()}
    try:
        return _of_kind(fields, record, columns, kind)
    except _Lacking as missing:
        raise BadRecord(lacking(missing.wanted, str(missing), record)) from None


class _Lacking(BadRecord):
    """A record that lacks columns of its kind."""

    def __init__(self, needs: str, *wanted: str) -> None:
        super().__init__(needs)
        self.wanted = wanted


def _of_kind(
    fields: dict[str, Any], record: Mapping[str, Any], columns: Columns, kind: DataKind
) -> list[dict[str, Any]]:
    if kind == "sft":
        return [_sft(fields)]
    if kind == "preference":
        return [_preference(fields)]
    if kind == "prompt":
        return [_prompt(fields, record, columns)]
    if "label" not in fields and "chosen" in fields and "rejected" in fields:
        pair = _preference(fields)
        shared = {name: value for name, value in pair.items() if name not in ("chosen", "rejected", "margin")}
        return [
            _unpaired({**shared, "completion": pair[side], "label": side == "chosen"})
            for side in ("chosen", "rejected")
        ]
    return [_unpaired(fields)]


def used_columns(
    fields: Mapping[str, Any], record: Mapping[str, Any], columns: Columns, reads: Reads
) -> set[str]:
    """Columns of the record that `fields` were made from and that the run reads."""
    names = columns.model_dump()
    used = {theirs for name, theirs in names.items() if name in fields and theirs in record}
    if "messages" in fields and record.get(str(columns.messages)) is None:
        used.add(SHAREGPT_COLUMN)
    if "completion" in fields and columns.completion not in record:  # unpaired
        used |= {str(columns.chosen), str(columns.rejected)}
    if not reads.answer:
        used.discard(str(columns.answer))
    if "columns" in fields:
        handed = fields["columns"].keys()
        named = handed if reads.others is None else handed & reads.others
        used |= {names.get(name) or name for name in named}
        if record.get(str(columns.prompt)) is None:
            used |= {
                str(columns.messages) if record.get(str(columns.messages)) is not None else SHAREGPT_COLUMN
            }
    return used


def describe(row: Row) -> str:
    """The format of a row, for the data report. Example: preference, conversational"""
    if row.chosen is not None:
        return f"preference, {'conversational' if isinstance(row.chosen, list) else 'text'}"
    if row.messages is not None:
        return "conversation"
    if row.text is not None:
        return "text"
    if row.completion is None:
        return f"prompt, {'conversational' if isinstance(row.prompt, list) else 'text'}"
    form = "conversational" if isinstance(row.completion, list) else "text"
    return f"unpaired, {form}" if row.label is not None else f"prompt-completion, {form}"


def _mapped(record: Mapping[str, Any], columns: Columns, kind: DataKind, reads: Reads) -> dict[str, Any]:
    """The record's values by the recipe's names, without nulls. BadRecord for what the run cannot use."""
    fields: dict[str, Any] = {}
    for name, theirs in columns.model_dump().items():
        if theirs is None:
            continue
        if theirs != name and theirs not in record:
            raise BadRecord(
                f"column {theirs!r} (mapped to {name}) is missing; columns are {', '.join(map(str, record))}"
            )
        if record.get(theirs) is not None:
            fields[name] = record[theirs]
    if "messages" not in fields and columns.messages is not None and record.get(SHAREGPT_COLUMN) is not None:
        fields["messages"] = record[SHAREGPT_COLUMN]
    _refuse(fields, record, columns, reads)
    if kind == "prompt":  # all of it may go to rewards
        return fields
    return {
        name: value
        for name, value in fields.items()
        if name != "environment" and (name != "margin" or reads.margin)
    }


def _refuse(fields: dict[str, Any], record: Mapping[str, Any], columns: Columns, reads: Reads) -> None:
    """BadRecord for pictures, and for the name of an environment if the run has none."""
    pictures = fields.pop("images", None)
    if columns.images is not None and not pictures:
        pictures = next(
            (
                record[name]
                for name in PICTURES
                if record.get(name) and not (name == "image" and isinstance(record[name], str))
            ),
            None,
        )
    if pictures:
        raise BadRecord("it has images, and models read text only; data.columns.images=null leaves them out")
    if fields.get("environment") is not None and not reads.environment:
        raise BadRecord(
            "it names an environment, and the run has no rollouts.environment; "
            "data.columns.environment=null leaves the column out"
        )


def _sft(fields: dict[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        messages = messages_of(fields["messages"], "messages")
        turns = [m for m in messages if m["role"] == "assistant"]
        if not turns:
            raise BadRecord("messages hold no assistant turn, so nothing would be learned")
        if not any(is_learned(m) for m in turns):
            raise BadRecord("every assistant turn has weight 0, so nothing would be learned")
        check_weights(messages, "messages")
        return {"messages": messages, **_template(fields), **_extra(fields)}
    if "completion" in fields:
        prompt, completion = _texts(fields, ("prompt", "completion"))
        if isinstance(completion, list) and not any(is_learned(m) for m in completion):
            raise BadRecord("every turn of the completion has weight 0, so nothing would be learned")
        return {"prompt": prompt, "completion": completion, **_template(fields, completion), **_extra(fields)}
    if "text" in fields:
        return {"text": _text(fields["text"], "text"), **_extra(fields)}
    if "chosen" in fields:
        raise BadRecord(
            "a preference pair in a data set for SFT; to learn the chosen answers set "
            "data.columns.completion=chosen"
        )
    wanted = ("completion",) if "prompt" in fields else ("messages", "text", "prompt", "completion")
    raise _Lacking("no messages, prompt + completion, or text", *wanted)


def _preference(fields: dict[str, Any]) -> dict[str, Any]:
    if missing := [name for name in ("chosen", "rejected") if name not in fields]:
        raise _Lacking(f"no {' and no '.join(map(repr, missing))}", *missing)
    if "prompt" in fields and not _is_redundant(fields):
        prompt, chosen, rejected = _texts(fields, ("prompt", "chosen", "rejected"))
    else:
        prompt, chosen, rejected = _implicit_prompt(fields["chosen"], fields["rejected"])
    if chosen == rejected:
        raise BadRecord("chosen and rejected are equal")
    refuse_weights(chosen, "chosen")
    refuse_weights(rejected, "rejected")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        **_template(fields, chosen),
        **_extra(fields),
    }


def _is_redundant(fields: Mapping[str, Any]) -> bool:
    """True if a text prompt repeats the first user turn of both answers, which are conversations.

    This is UltraFeedback's form.
    """
    if not isinstance(fields["prompt"], str) or not all(
        isinstance(fields[name], list) and fields[name] for name in ("chosen", "rejected")
    ):
        return False
    firsts = [
        next((m["content"] for m in messages_of(fields[name], name) if m["role"] == "user"), None)
        for name in ("chosen", "rejected")
    ]
    return all(isinstance(first, str) and first.strip() == fields["prompt"].strip() for first in firsts)


def _unpaired(fields: dict[str, Any]) -> dict[str, Any]:
    if missing := [name for name in ("prompt", "completion", "label") if name not in fields]:
        raise _Lacking(f"no {' and no '.join(map(repr, missing))}", *missing)
    if not isinstance(fields["label"], bool):
        raise BadRecord(f"label must be true or false, not {fields['label']!r}")
    prompt, completion = _texts(fields, ("prompt", "completion"))
    refuse_weights(completion, "completion")
    return {
        "prompt": prompt,
        "completion": completion,
        "label": fields["label"],
        **_template(fields, completion),
        **_extra(fields),
    }


def _prompt(fields: dict[str, Any], record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The prompt, and the other values of the record as columns.

    The prompt of `messages` ends before the assistant's last turn.
    """
    if "prompt" in fields:
        (prompt,) = _texts(fields, ("prompt",))
        if not prompt:
            raise BadRecord("prompt is empty")
    elif "messages" in fields:
        messages = messages_of(fields["messages"], "messages")
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        prompt = messages[:last]
        if not prompt:
            raise BadRecord("messages hold no turn before the assistant's")
    else:
        raise _Lacking("no prompt, and no messages", "prompt", "messages")
    template = _template(fields)
    left_out = {"prompt", "messages"} | {
        name for name, theirs in columns.model_dump().items() if theirs is None
    }
    left_out |= set(PICTURES) if columns.images is None else set()
    others = {name: value for name, value in record.items() if name not in left_out}
    others |= {name: value for name, value in fields.items() if name not in left_out}
    return {
        "prompt": prompt,
        "columns": {str(name): plain(value, str(name)) for name, value in others.items()} | template,
        **template,
        **_extra({k: v for k, v in fields.items() if k == "answer"}),
    }


def _template(fields: Mapping[str, Any], answer: Any = ()) -> dict[str, Any]:
    """Fields that a chat template gets beside messages; empty for a row of text, which needs no template."""
    if isinstance(answer, str):
        return {}
    tools, variables = tools_of(fields.get("tools")), variables_of(fields.get("chat_template_kwargs"))
    return {
        **({"tools": tools} if tools else {}),
        **({"chat_template_kwargs": variables} if variables else {}),
    }


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Splits off the prompt that both answers begin with.

    Of messages it is the shared leading turns. Of strings TRL's extract_prompt takes the longest common
    prefix, which may hold words of the answers ("The " of "The sea" and "The sky"). Here that prefix is cut
    back to the last "\\n\\nAssistant:" turn of Anthropic's HH format, or else to the last line break.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        a, b = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        if a == b:
            raise BadRecord("chosen and rejected are equal")
        if a[0] != b[0]:
            raise BadRecord("no prompt, and chosen and rejected share no leading message")
        shared = _shared(a, b)
        if not a[shared:] or not b[shared:]:
            raise BadRecord("one of chosen and rejected is the beginning of the other")
        return a[:shared], a[shared:], b[shared:]
    a, b = _text(chosen, "chosen"), _text(rejected, "rejected")
    if a == b:
        raise BadRecord("chosen and rejected are equal")
    prompt = a[: _shared(a, b)]
    turn, line = prompt.rfind(HH_TURN), prompt.rfind("\n")
    cut = turn + len(HH_TURN) if turn >= 0 else line + 1
    if cut <= 0:
        raise BadRecord(
            "no prompt, and chosen and rejected share no beginning that ends a line or an 'Assistant:' turn"
        )
    return a[:cut], _text(a[cut:], "chosen"), _text(b[cut:], "rejected")


def _shared(chosen: Any, rejected: Any) -> int:
    """Length of the common prefix, by TRL's extract_prompt.

    Its edge cases are handled here: nothing is shared, or one of the two is a prefix of the other.
    """
    from trl.data_utils import extract_prompt

    shorter, longer = sorted((chosen, rejected), key=len)
    if chosen[0] != rejected[0]:
        return 0
    if longer[: len(shorter)] == shorter:
        return len(shorter)
    return len(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"])


def _mixed(names: Sequence[str], values: Sequence[Any]) -> str:
    conversations, texts = (
        [n for n, v in zip(names, values, strict=True) if isinstance(v, list) is listed]
        for listed in (True, False)
    )
    leave_out = f"; data.columns.{texts[0]}=null leaves it out" if texts == ["prompt"] else ""
    return (
        f"{' and '.join(texts)} text, {' and '.join(conversations)} message lists: "
        f"write all as text or all as messages{leave_out}"
    )


def _texts(fields: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The named fields, all strings or all message lists; only the prompt may be empty text."""
    values = [fields.get(name, "") for name in names]
    if any(isinstance(v, list) for v in values):
        if not all(isinstance(v, list) for v in values):
            raise BadRecord(_mixed(names, values))
        return [messages_of(v, name) for v, name in zip(values, names, strict=True)]
    return [_text(v, name, may_be_empty=name == "prompt") for v, name in zip(values, names, strict=True)]


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be text or a list of messages, not {type(value).__name__}")
    if not value.strip() and not (may_be_empty and not value):
        raise BadRecord(f"{name} is empty")
    return unicode(value, name)


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if "answer" in fields:
        extra["answer"] = str(plain(fields["answer"], "answer"))
    if "margin" in fields:
        margin = fields["margin"]
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not math.isfinite(margin):
            raise BadRecord(f"margin must be a finite number, not {margin!r}")
        extra["margin"] = float(margin)
    return extra
