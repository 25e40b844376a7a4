"""From a raw record to a Row: TRL's formats, recognised and validated; every refusal says why."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import Columns
from orchestrator.records import DataKind, Row

HH_TURN = "\n\nAssistant:"


class BadRecord(ValueError):
    """A record that cannot be used; the text is the reason shown to the user."""


def to_rows(record: Any, columns: Columns, kind: DataKind) -> list[dict[str, Any]]:
    """Row fields of one record: one dict, or two where a preference pair is unpaired for KTO. Raises BadRecord."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record must be an object, this is {type(record).__name__}")
    fields = _mapped(record, columns)
    if kind == "sft":
        return [_sft(fields)]
    if kind == "preference":
        return [_preference(fields)]
    if kind == "prompt":
        return [_prompt(fields, record)]
    if "label" not in fields and "chosen" in fields and "rejected" in fields:
        pair = _preference(fields)
        return [_unpaired({"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}) for side in ("chosen", "rejected")]
    return [_unpaired(fields)]


def describe(row: Row) -> str:
    """The format in words, for the data report."""
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


def _mapped(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    fields = {name: record[name] for name in Columns.model_fields if record.get(name) is not None}
    for name, theirs in columns.model_dump(exclude_none=True).items():
        if theirs not in record:
            raise BadRecord(f"column {theirs!r} (mapped to {name}) is missing")
        fields[name] = record[theirs]
    return fields


def _sft(fields: dict[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages")
        if not any(m["role"] == "assistant" for m in messages):
            raise BadRecord("messages hold no assistant turn, so nothing would be learned")
        return {"messages": messages, **_extra(fields)}
    if "completion" in fields:
        prompt, completion = _texts(fields, ("prompt", "completion"))
        return {"prompt": prompt, "completion": completion, **_extra(fields)}
    if "text" in fields:
        return {"text": _text(fields["text"], "text"), **_extra(fields)}
    if "chosen" in fields:
        raise BadRecord("a preference pair in a data set for SFT; to learn the chosen answers set data.columns.completion=chosen")
    raise BadRecord(f"needs messages, prompt + completion, or text; has {_names(fields)}")


def _preference(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise BadRecord(f"{name!r} is missing; has {_names(fields)}")
    if "prompt" in fields:
        prompt, chosen, rejected = _texts(fields, ("prompt", "chosen", "rejected"))
    else:
        prompt, chosen, rejected = _implicit_prompt(fields["chosen"], fields["rejected"])
    if chosen == rejected:
        raise BadRecord("chosen and rejected are equal")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **_extra(fields)}


def _unpaired(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("prompt", "completion", "label"):
        if name not in fields:
            raise BadRecord(f"{name!r} is missing; has {_names(fields)}")
    if not isinstance(fields["label"], bool):
        raise BadRecord(f"label must be true or false, not {fields['label']!r}")
    prompt, completion = _texts(fields, ("prompt", "completion"))
    return {"prompt": prompt, "completion": completion, "label": fields["label"], **_extra(fields)}


def _prompt(fields: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The question alone (of `messages`, the turns before the assistant's last), and the rest of the record as columns."""
    if "prompt" in fields:
        (prompt,) = _texts(fields, ("prompt",))
        if not prompt:
            raise BadRecord("prompt is empty")
    elif "messages" in fields:
        messages = _messages(fields["messages"], "messages")
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        prompt = messages[:last]
        if not prompt:
            raise BadRecord("messages hold no turn before the assistant's")
    else:
        raise BadRecord(f"needs prompt, or messages; has {_names(fields)}")
    extra = {name: value for name, value in record.items() if name not in ("prompt", "messages")}
    extra |= {name: value for name, value in fields.items() if name not in ("prompt", "messages")}
    return {"prompt": prompt, "columns": extra, **_extra({k: v for k, v in fields.items() if k == "answer"})}


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Splits off the prompt that both answers begin with.

    Messages: the shared leading turns. Strings: TRL's extract_prompt takes the longest common prefix, words of the
    answers included ("The " of "The sea" and "The sky"); here it is cut back to the last "\\n\\nAssistant:" turn of
    Anthropic's HH format, or without one to the last line break.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        a, b = _messages(chosen, "chosen"), _messages(rejected, "rejected")
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
        raise BadRecord("no prompt, and chosen and rejected share no beginning that ends a line or an 'Assistant:' turn")
    return a[:cut], _text(a[cut:], "chosen"), _text(b[cut:], "rejected")


def _shared(chosen: Any, rejected: Any) -> int:
    """Length of the common prefix: TRL's extract_prompt but for its edges (nothing, or one of the two, is shared)."""
    from trl.data_utils import extract_prompt

    shorter, longer = sorted((chosen, rejected), key=len)
    if chosen[0] != rejected[0]:
        return 0
    if longer[: len(shorter)] == shorter:
        return len(shorter)
    return len(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"])


def _texts(fields: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The named fields, all strings or all message lists; only the prompt may be empty text."""
    values = [fields.get(name, "") for name in names]
    if any(isinstance(v, list) for v in values):
        if not all(isinstance(v, list) for v in values):
            raise BadRecord(f"{', '.join(names)} mix strings and message lists")
        return [_messages(v, name) for v, name in zip(values, names, strict=True)]
    return [_text(v, name, may_be_empty=name == "prompt") for v, name in zip(values, names, strict=True)]


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be text or a list of messages, not {type(value).__name__}")
    if not value.strip() and not (may_be_empty and not value):
        raise BadRecord(f"{name} is empty")
    return _unicode(value, name)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} must be a non-empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{name}[{i}] needs a role and content")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRecord(f"{name}[{i}].content must be text")
        _unicode(message.get("content") or "", f"{name}[{i}].content")
    return [dict(m) for m in value]


def _unicode(value: str, name: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} holds half of a surrogate pair at character {error.start}") from error
    return value


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if "answer" in fields:
        extra["answer"] = str(fields["answer"])
    if "margin" in fields:
        margin = fields["margin"]
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not math.isfinite(margin):
            raise BadRecord(f"margin must be a finite number, not {margin!r}")
        extra["margin"] = float(margin)
    return extra


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "none of the known columns"
