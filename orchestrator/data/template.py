"""The ONE place where a chat template is applied, with everything that a row gives it: messages, tools and
further variables.

rows   -> Encoder (data/tokenize.py)     -+
turns  -> Roller (rollout/episodes.py)  -+-> render -> tokens (and which of them the assistant wrote), or text
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
"""Arguments of apply_chat_template that say what is made of the text; no row may set them."""


class TemplateInputs(Protocol):
    """What a template is given beside the messages: of a Row, or of a Prompt. where: for messages to the
    user."""

    @property
    def where(self) -> str: ...
    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


def render(
    tokenizer: Any, messages: Any, row: TemplateInputs, *, template: str | None = None, **options: bool
) -> Any:
    """What tokenizer.apply_chat_template makes of the messages: a mapping with `input_ids`, or with
    tokenize=False text.

    template: instead of the tokenizer's own. ConfigError without a template or for one that is no Jinja;
    DataError, with the row's place, for whatever else a template raises: it is somebody's program, and the
    row is what it could not take.
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
            "the chat template is no Jinja",
            why=f"line {error.lineno}: {error.message}",
            fix="mend the template, or set model.chat_template",
        ) from error
    except Exception as error:
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        why = f"{kind}{' '.join(str(error).split())[:300]}"
        raise DataError(
            f"{row.where}: the chat template refuses the conversation", why=why, fix="mend or remove the row"
        ) from error


def given_names(messages: Sequence[Mapping[str, Any]], row: TemplateInputs) -> set[str]:
    """Names of what a template is given: keys of messages, `tools`, further variables; but for what every
    template has and for weights."""
    keys = {key for message in messages for key, value in message.items() if value is not None} - {
        "role",
        "content",
        "weight",
    }
    return keys | ({"tools"} if row.tools else set()) | set(row.chat_template_kwargs)


def require_template(tokenizer: Any, row: TemplateInputs) -> None:
    """ConfigError where there is no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{row.where} holds chat messages, but the tokenizer has no chat template",
            fix="set model.chat_template to a Jinja file, use a chat model, or give prompts and completions "
            "as plain text",
        )


def own_template(tokenizer: Any, row: TemplateInputs) -> str:
    """The template that the tokenizer takes for this row: one of several may be for rows with tools."""
    require_template(tokenizer, row)
    return tokenizer.get_chat_template(tools=row.tools or None)


def is_marked(template: str) -> bool:
    """True where the template marks what the assistant wrote by {% generation %}."""
    from trl.chat_template_utils import has_generation_markers

    return has_generation_markers(template)


def training_template(tokenizer: Any) -> str | None:
    """TRL's training form of the tokenizer's (default) template, which keeps earlier turns as they are and
    marks what the assistant wrote; None where TRL knows none, or none is needed. It is for encoding
    demonstrations: the tokenizer keeps its own."""
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):  # not one of those that TRL knows
        return None


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of JSON schemas or its JSON text, in a plain form; None for null, an empty
    text or list."""
    value = _parsed(value, "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRecord(f"tools must be a list of JSON schemas, or its JSON text, not {_shown(value)}")
    return plain(value, "tools")


def variables_of(value: Any) -> dict[str, Any]:
    """The column `chat_template_kwargs`: a mapping or its JSON text, in a plain form, without what is null."""
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
    taken = sorted(OWN_ARGUMENTS & value.keys())
    if taken:
        raise BadRecord(
            f"chat_template_kwargs may not set {', '.join(taken)}: these are the orchestrator's (a template "
            "is model.chat_template)"
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
        raise BadRecord(f"{name} is text, but no JSON: {str(error)[:80]}") from error


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
