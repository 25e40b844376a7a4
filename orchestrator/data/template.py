"""The ONE place where a chat template is applied, with all that a row gives it: messages, tools, variables.

rows  --> Encoder (data/tokenize.py)           --+
turns --> EpisodeRunner (rollout/episodes.py)  --+--> render --> tokens (and the assistant's mask), or text
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from orchestrator.core.errors import ConfigError, DataError
from orchestrator.data.bad_rows import BadRecord
from orchestrator.data.values import plain

OWN_ARGUMENTS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
    }
    | {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Arguments of apply_chat_template that a row may not set."""


class TemplateInputs(Protocol):
    """What a template is given beside the messages: a Row or a Prompt."""

    @property
    def where(self) -> str:
        """Place of the row, for messages to the user."""
        ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


def render(
    tokenizer: Any, messages: Any, row: TemplateInputs, *, template: str | None = None, **options: bool
) -> Any:
    """The messages as a mapping with `input_ids`, or with tokenize=False as text.

    template: replaces the tokenizer's own. ConfigError without a template, or for one that is not Jinja. A
    template is a program: whatever else it raises becomes a DataError with the row's place, as it could not
    take that row.
    """
    from jinja2 import TemplateSyntaxError

    require_template(tokenizer, row)
    if not messages:
        raise DataError(
            f"{row.where}: no turn comes before the assistant's first",
            fix="begin the conversation with a user turn",
        )
    options = {"tokenize": True, "return_dict": True} | options
    try:
        return tokenizer.apply_chat_template(
            messages, tools=row.tools or None, chat_template=template, **row.chat_template_kwargs, **options
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            "the chat template is not valid Jinja",
            why=f"line {error.lineno}: {error.message}",
            fix="fix the template, or set model.chat_template",
        ) from error
    except Exception as error:
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        why = f"{kind}{' '.join(str(error).split())[:300]}"
        raise DataError(
            f"{row.where}: the chat template refuses the conversation", why=why, fix="fix or remove the row"
        ) from error


def given_names(messages: Sequence[Mapping[str, Any]], row: TemplateInputs) -> set[str]:
    """Names that a row gives the template: keys of messages, `tools`, variables.

    Keys that every template reads, and weights, are left out.
    """
    keys = {key for message in messages for key, value in message.items() if value is not None} - {
        "role",
        "content",
        "weight",
    }
    return keys | ({"tools"} if row.tools else set()) | set(row.chat_template_kwargs)


def require_template(tokenizer: Any, row: TemplateInputs) -> None:
    """ConfigError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{row.where} holds chat messages, but the tokenizer has no chat template",
            fix="set model.chat_template to a Jinja file, use a chat model, or give prompts and completions "
            "as plain text",
        )


def own_template(tokenizer: Any, row: TemplateInputs) -> str:
    """The tokenizer's template for this row: rows with tools may have a separate one."""
    require_template(tokenizer, row)
    return tokenizer.get_chat_template(tools=row.tools or None)


def is_marked(template: str) -> bool:
    """True if the template marks the assistant's text by {% generation %}."""
    from trl.chat_template_utils import has_generation_markers

    return has_generation_markers(template)


def training_template(tokenizer: Any) -> str | None:
    """TRL's training form of the tokenizer's (default) template; None if TRL has none, or none is needed.

    It keeps earlier turns as they are and marks the assistant's text. It is used to encode demonstrations
    only: the tokenizer keeps its own template.
    """
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):  # TRL has no training form of it
        return None


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`, a list of JSON schemas or its JSON text, in a plain form; None if it is empty."""
    value = _parsed(value, "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRecord(f"tools must be a list of JSON schemas, or its JSON text, not {_shown(value)}")
    return plain(value, "tools")


def variables_of(value: Any) -> dict[str, Any]:
    """The column `chat_template_kwargs`, a mapping or its JSON text, in a plain form without nulls."""
    value = _parsed(value, "chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and name.isidentifier() for name in value
    ):
        raise BadRecord(
            "chat_template_kwargs must be a mapping of names to values, or its JSON text, not "
            f"{_shown(value)}"
        )
    reserved = sorted(OWN_ARGUMENTS & value.keys())
    if reserved:
        raise BadRecord(
            f"chat_template_kwargs may not set {', '.join(reserved)}: the orchestrator sets these "
            "(a template is model.chat_template)"
        )
    return {
        name: plain(entry, f"chat_template_kwargs.{name}")
        for name, entry in value.items()
        if entry is not None
    }


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{name} is text, but not JSON: {str(error)[:80]}") from error


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
