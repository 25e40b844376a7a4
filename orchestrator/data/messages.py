"""Checks chat messages and brings them into one form.

{"role": …, "content": …}        stays
{"from": …, "value": …}          is renamed, as in TRL; `human` and `gpt` become `user` and `assistant`
content: [{"type": "text", …}]   becomes the joined text; a part of another type is an error
weight: 0 or 1                   OpenAI's key: whether a turn is learned (SFT); other values are an error
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.bad_rows import BadRecord
from orchestrator.data.values import plain

SHAREGPT = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a column in one form. name: the column, for the reason in BadRecord."""
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} must be a non-empty list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def is_learned(message: Mapping[str, Any]) -> bool:
    """False if the weight of a turn is 0."""
    return message.get("weight") != 0


def check_weights(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    """BadRecord if a turn of a conversation has weight 1 and is not the assistant's."""
    for i, message in enumerate(messages):
        if message.get("weight") == 1 and message["role"] != "assistant":
            raise BadRecord(
                f"{name}[{i}].weight is 1, but only the assistant's turns of a conversation are learned, "
                f"not the {message['role']}'s"
            )


def refuse_weights(messages: Any, name: str) -> None:
    """BadRecord if a turn of an answer has weight 0: the loss scores an answer as a whole."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if not is_learned(message):
            raise BadRecord(
                f"{name}[{i}].weight is 0, but this loss scores an answer as a whole; weights are for SFT"
            )


def unicode(value: str, name: str) -> str:
    """The text; BadRecord for half of a surrogate pair, which JSON can hold and no tokenizer accepts."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} holds half of a surrogate pair at character {error.start}") from error
    return value


def _message(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRecord(f"{name} needs a role and content")
    message = _renamed(plain(value, name), name)
    if not isinstance(message.get("role"), str):
        raise BadRecord(f"{name} needs a role and content")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{name}.content")
    if message.get("tool_calls"):
        message.setdefault("content", None)
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRecord(f"{name}.content must be text")
    unicode(content or "", f"{name}.content")
    weight = message.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1)
    ):
        raise BadRecord(f"{name}.weight must be 0 or 1, not {weight!r}")
    return message


def _renamed(message: dict[str, Any], name: str) -> dict[str, Any]:
    if "role" in message or "from" not in message:
        return message
    role = SHAREGPT.get(message["from"], message["from"]) if isinstance(message["from"], str) else None
    if role not in ROLES:
        raise BadRecord(f"{name}.from is {message['from']!r}, not one of {', '.join([*SHAREGPT, *ROLES])}")
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): entry for key, entry in message.items()} | {"role": role}


def _joined(parts: list[Any], name: str) -> str:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRecord(f"{name} has a part of type {kind!r}: models read text only")
    return "".join(part["text"] for part in parts)
