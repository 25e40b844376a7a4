"""Row -> token ids and loss mask: the ONE place where a chat template is applied.

A completion starts where the tokenized prompt and the tokenized prompt + completion diverge, as in TRL. Only the
model's own tokens are scored; padding is added later and masked by position, never by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestrator.config import Data
from orchestrator.errors import ConfigError, DataError
from orchestrator.records import Branch, DataKind, Ints, Row, SequenceGroup


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What encoding did: rows kept, dropped, truncated; not_prefix: rows whose prompt is not a token prefix of the
    completion; identical: pairs that truncation made equal; lengths: tokens of prompt + longest branch of kept rows."""

    rows: int
    kept: int
    dropped: int
    truncated: int
    not_prefix: tuple[str, ...]
    identical: int
    lengths: tuple[int, ...]

    def quantiles(self) -> dict[str, int]:
        """Minimum, median, 95th percentile and maximum of the lengths."""
        values = np.array(self.lengths)
        return {name: int(np.quantile(values, q)) for name, q in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))}


@dataclass(frozen=True, slots=True)
class Encoded:
    """groups: what can be trained on, in row order; a group's id is its row's."""

    groups: tuple[SequenceGroup, ...]
    report: EncodingReport


@dataclass(slots=True)
class _Counts:
    dropped: int = 0
    truncated: int = 0
    identical: int = 0


def encode_rows(rows: Sequence[Row], tokenizer: Any, data: Data, kind: DataKind) -> Encoded:
    """All rows, with the over-long policy applied and counted. DataError where nothing is left."""
    encoder = Encoder(tokenizer, data, kind)
    counts, groups = _Counts(), []
    for row in rows:
        group = _fit(encoder.encode(row), row, data, counts)
        if group is not None:
            groups.append(group)
    if not groups:
        raise DataError("no row is left after data.overlong", why=f"max_length is {data.max_length} tokens", fix="raise data.max_length")
    lengths = tuple(g.longest for g in groups)
    report = EncodingReport(len(rows), len(groups), counts.dropped, counts.truncated, tuple(encoder.not_prefix), counts.identical, lengths)
    return Encoded(tuple(groups), report)


class Encoder:
    """Tokenizes rows of one kind. not_prefix collects the rows whose prompt end had to be left out."""

    def __init__(self, tokenizer: Any, data: Data, kind: DataKind) -> None:
        self.tokenizer, self.data, self.kind = tokenizer, data, kind
        self.not_prefix: list[str] = []

    def encode(self, row: Row) -> SequenceGroup:
        """The group of a row: prompt tokens, and a branch per completion."""
        if row.messages is not None:
            return self._conversation(row)
        if row.text is not None:
            return self._text(row)
        completions = [row.chosen, row.rejected] if self.kind == "preference" else [row.completion]
        prompt = self._tokens(row.prompt, row, generation=True)
        wholes = [self._tokens(self._joined(row.prompt, c), row) for c in completions]
        shared = min(_common_prefix(prompt, whole) for whole in wholes)
        if shared < len(prompt):
            self.not_prefix.append(row.where)
        if shared == 0:  # something must predict the first token
            shared = _lead(wholes, row)
        branches = tuple(_branch(whole[shared:]) for whole in wholes)
        label = None if row.label is None else float(row.label)
        return SequenceGroup(row.id, np.array(wholes[0][:shared], np.int64), branches, row.source, label, row.margin)

    def prompt_tokens(self, row: Row) -> tuple[int, ...]:
        """The prompt alone, ready for generation."""
        if row.messages is not None:
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            return tuple(self._tokens(row.messages[:last], row, generation=True))
        return tuple(self._tokens(row.prompt, row, generation=True))

    def _conversation(self, row: Row) -> SequenceGroup:
        """Loss on the assistant's turns only, by the template's generation markers or by growing prefixes."""
        assert row.messages is not None
        ids, mask = self._assistant_mask(row)
        first = next((i for i, scored in enumerate(mask) if scored), None)
        if first is None:
            raise DataError(f"{row.where}: no token of the conversation is the assistant's", fix="check the roles and the chat template")
        first = max(first, 1)
        branch = Branch(np.array(ids[first:], np.int64), np.array(mask[first:], np.bool_))
        return SequenceGroup(row.id, np.array(ids[:first], np.int64), (branch,), row.source)

    def _assistant_mask(self, row: Row) -> tuple[list[int], list[bool]]:
        from trl.chat_template_utils import has_generation_markers

        template = self._chat_template(row)
        if has_generation_markers(template):
            output = self._render(row.messages, row, return_assistant_tokens_mask=True)
            return list(output["input_ids"]), [bool(m) for m in output["assistant_masks"]]
        messages, ids, mask = row.messages, [], []
        assert messages is not None
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._tokens(messages[:i], row, generation=True)
            after = self._tokens(messages[: i + 1], row)
            if before[: len(ids)] != ids or after[: len(before)] != before:
                raise ConfigError(
                    f"{row.where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart",
                    fix="use a template with {% generation %} markers (model.chat_template)",
                )
            mask += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
            ids = after
        return ids, mask

    def _text(self, row: Row) -> SequenceGroup:
        """Language modelling: every token but the first is scored."""
        ids = self._tokens(self._ended(row.text or ""), row)
        if len(ids) < 2:
            raise DataError(f"{row.where}: the text has fewer than two tokens", fix="remove the row")
        return SequenceGroup(row.id, np.array(ids[:1], np.int64), (_branch(ids[1:]),), row.source)

    def _joined(self, prompt: Any, completion: Any) -> Any:
        return prompt + completion if isinstance(completion, list) else prompt + self._ended(completion)

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text + eos if self.data.append_eos and not text.endswith(eos) else text

    def _tokens(self, text: Any, row: Row, *, generation: bool = False) -> list[int]:
        if isinstance(text, str):
            return list(self.tokenizer(text=text)["input_ids"])
        return list(self._render(text, row, add_generation_prompt=generation)["input_ids"])

    def _render(self, messages: Any, row: Row, **options: bool) -> Any:
        from jinja2 import TemplateError

        self._chat_template(row)
        if not messages:
            raise DataError(f"{row.where}: no turn comes before the assistant's first", fix="begin the conversation with a user turn")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except TemplateError as error:
            raise DataError(f"{row.where}: the chat template refuses the conversation", why=str(error), fix="mend or remove the row") from error

    def _chat_template(self, row: Row) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{row.where} holds chat messages, but the tokenizer has no chat template",
                fix="set model.chat_template to a Jinja file, use a chat model, or give prompts and completions as plain text",
            )
        return self.tokenizer.chat_template


def _lead(wholes: list[list[int]], row: Row) -> int:
    """Tokens that stand in for a missing prompt: the first one, bos or not, if all completions begin with it."""
    if min(len(w) for w in wholes) < 2:
        raise DataError(f"{row.where}: no prompt, and a completion of fewer than two tokens", fix="give the row a prompt, or remove it")
    if len({w[0] for w in wholes}) > 1:
        raise DataError(f"{row.where}: no prompt, and the answers share no first token", fix="give the row a prompt")
    return 1


def _branch(ids: Sequence[int]) -> Branch:
    return Branch(np.array(ids, np.int64), np.ones(len(ids), np.bool_))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """TRL's common_prefix_length, kept here because importing trl takes seconds and `plan` should not."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _fit(group: SequenceGroup, row: Row, data: Data, counts: _Counts) -> SequenceGroup | None:
    """Applies data.overlong; a completion is never cut to nothing in silence: then the row is dropped and counted."""
    if any(not len(b.ids) for b in group.branches):
        counts.dropped += 1
        return None
    if group.longest <= data.max_length:
        return group
    if data.overlong == "error":
        raise DataError(
            f"{row.where}: {group.longest} tokens, data.max_length is {data.max_length}",
            fix="raise data.max_length, or set data.overlong to drop, truncate_prompt_left or truncate_end",
        )
    if data.overlong == "drop":
        counts.dropped += 1
        return None
    fitted = _truncated(group, data)
    if fitted is None or not any(b.scored.any() for b in fitted.branches):
        counts.dropped += 1
        return None
    counts.truncated += 1
    if len(fitted.branches) == 2 and np.array_equal(fitted.branches[0].ids, fitted.branches[1].ids):
        counts.identical += 1
    return fitted


def _truncated(group: SequenceGroup, data: Data) -> SequenceGroup | None:
    """truncate_prompt_left keeps the prompt's last tokens (at least one), then both policies cut the end."""
    prompt: Ints = group.prompt
    if data.overlong == "truncate_prompt_left":
        room = data.max_length - max(len(b.ids) for b in group.branches)
        prompt = prompt[-max(1, room) :]
    room = data.max_length - len(prompt)
    if room < 1:
        return None
    branches = tuple(Branch(b.ids[:room], b.scored[:room]) for b in group.branches)
    return replace(group, prompt=prompt, branches=branches)
