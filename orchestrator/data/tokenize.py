"""Row -> token ids and loss mask.

These tokens are scored; a turn with `weight` 0 never is:

    messages     the assistant's turns
    completion   all tokens, also turns of tools and users in it, as in TRL
    text         every token but the first

A completion starts where the tokenized prompt and the tokenized prompt + completion diverge, as in TRL.
Padding is added later and masked by position, never by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orchestrator.core.batches import Branch, DataKind, Ints, Row, SequenceGroup
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.data.bad_rows import BadRow, check_bad
from orchestrator.data.messages import is_learned
from orchestrator.data.template import given_names, is_marked, own_template, render, training_template
from orchestrator.data.turns import OverlongCounts
from orchestrator.recipe.schema import Data


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What encoding did to the rows of a data set."""

    rows: int
    kept: int
    dropped: int
    truncated: int
    not_prefix: tuple[str, ...]
    """Places ("file:line") of rows whose prompt is not a token prefix of the completion."""
    identical: int
    """Pairs that truncation made equal."""
    lengths: tuple[int, ...]
    """Tokens of prompt + longest branch of each row that was kept."""
    bad: tuple[BadRow, ...] = ()
    """Rows that could not be encoded."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""
    turns: int = 0
    """Truncated rows that lost their oldest turns."""

    def quantiles(self) -> dict[str, int]:
        """Minimum, median, 95th percentile and maximum of the lengths."""
        values = np.array(self.lengths)
        return {
            name: int(np.quantile(values, q))
            for name, q in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
        }


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoded rows of a data set."""

    groups: tuple[SequenceGroup, ...]
    """Examples in row order; the id of a group is the id of its row."""
    report: EncodingReport


@dataclass(slots=True)
class _Counts(OverlongCounts):
    identical: int = 0
    bad: list[BadRow] = field(default_factory=list)


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, data: Data, kind: DataKind, bad: Sequence[BadRow] = ()
) -> Encoded:
    """All rows, with data.overlong applied and counted. bad: rows that were left out before.

    DataError if more than data.max_bad_rows cannot be read or encoded, or if no row remains.
    """
    encoder = Encoder(tokenizer, data, kind)
    counts, groups = _Counts(), []
    for row in rows:
        try:
            encoded = _encode(encoder, row, counts)
        except DataError as error:
            counts.bad.append(bad_row(row, error))
            continue
        group = None if encoded is None else _fit(encoded, row, data, counts)
        if group is not None:
            groups.append(group)
    check_bad([*bad, *counts.bad], data.max_bad_rows)
    if not groups:
        raise DataError(
            "no row is left after data.overlong",
            why=f"max_length is {data.max_length} tokens",
            fix="raise data.max_length",
        )
    return Encoded(
        tuple(groups),
        EncodingReport(
            rows=len(rows),
            kept=len(groups),
            dropped=counts.dropped,
            truncated=counts.truncated,
            not_prefix=tuple(
                dict.fromkeys(encoder.not_prefix)
            ),  # a row that lost turns is encoded repeatedly
            identical=counts.identical,
            lengths=tuple(g.longest for g in groups),
            bad=tuple(counts.bad),
            notes=(*encoder.notes, *counts.notes(f"data.max_length={data.max_length}")),
            turns=counts.turns,
        ),
    )


def _encode(encoder: "Encoder", row: Row, counts: _Counts) -> SequenceGroup | None:
    """The group of a row. With data.overlong=truncate_prompt_left an overlong conversation loses its oldest
    turns; None if its last exchange alone is too long."""
    group = encoder.encode(row)
    if encoder.data.overlong != "truncate_prompt_left" or group.longest <= encoder.data.max_length:
        return group
    name = "prompt" if row.messages is None else "messages"
    turns = getattr(row, name)
    if not turns or isinstance(turns, str):
        return group

    def teaches(messages: list[Any]) -> bool:
        return name == "prompt" or any(m["role"] == "assistant" and is_learned(m) for m in messages)

    def fits(group: SequenceGroup) -> bool:
        return group.longest <= encoder.data.max_length

    shortened = counts.shorten(
        turns, lambda messages: encoder.encode(replace(row, **{name: messages})), fits, teaches
    )
    return None if shortened is None else shortened[1]


def bad_row(row: Row, error: DataError) -> BadRow:
    """The bad row of an error that encoding raised."""
    what = error.what.removeprefix(f"{row.where}: ")
    return BadRow(row.where, f"{what} ({error.why})" if error.why else what)


class Encoder:
    """Tokenizes rows of one kind. not_prefix: rows whose prompt lost its end, as it is not a token prefix."""

    def __init__(self, tokenizer: Any, data: Data, kind: DataKind) -> None:
        self.tokenizer, self.data, self.kind = tokenizer, data, kind
        self.not_prefix: list[str] = []
        self.added_at_end = _added_at_end(tokenizer)
        self._doubled = 0
        self._given: set[str] = set()
        self._training: str | None = None
        self._training_looked_up = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the tokenizer and the template, once the rows are encoded."""
        notes = []
        if self._training is not None:
            notes.append(
                "conversations are encoded with TRL's training form of the chat template; the exported "
                "model keeps its own"
            )
        if unnamed := [name for name in sorted(self._given) if name not in str(self.tokenizer.chat_template)]:
            notes.append(
                f"the chat template does not name {', '.join(unnamed)}, which the rows give it: they add no "
                "token"
            )
        if self._doubled:
            bos = self.tokenizer.bos_token
            notes.append(
                f"{self._doubled} prompts begin with {bos} twice: the text holds one and the tokenizer adds "
                "one; remove it from the text"
            )
        return tuple(notes)

    def encode(self, row: Row) -> SequenceGroup:
        """The group of a row: prompt tokens, and a branch per completion.

        DataError for a row that cannot be encoded, ConfigError for a template that cannot be used.
        """
        if row.messages is not None:
            return self._conversation(row)
        if row.text is not None:
            return self._text(row)
        completions = [row.chosen, row.rejected] if self.kind == "preference" else [row.completion]
        prompt = self._tokens(row.prompt, row, generation=True)
        self._count_bos(prompt, row.prompt)
        sequences = [self._tokens(self._joined(row.prompt, c), row) for c in completions]
        if len(sequences) == 2 and sequences[0] == sequences[1]:
            raise DataError(
                f"{row.where}: chosen and rejected are the same tokens",
                why="template or tokenizer makes them equal",
                fix="remove the row",
            )
        shared = min(_common_prefix(prompt, sequence) for sequence in sequences)
        if shared < len(prompt):
            self.not_prefix.append(row.where)
        if shared == 0:  # something must predict the first token
            shared = _lead(sequences, row)
        branches = tuple(
            self._branch(row, sequence, shared, c) for sequence, c in zip(sequences, completions, strict=True)
        )
        label = None if row.label is None else float(row.label)
        prompt = np.array(sequences[0][:shared], np.int64)
        return SequenceGroup(row.id, prompt, branches, row.source, label, row.margin)

    def prompt_tokens(self, row: Row) -> tuple[int, ...]:
        """The prompt alone, ready for generation."""
        if row.messages is not None:
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            return tuple(self._tokens(row.messages[:last], row, generation=True))
        prompt = self._tokens(row.prompt, row, generation=True)
        self._count_bos(prompt, row.prompt)
        return tuple(prompt)

    def _branch(self, row: Row, sequence: list[int], shared: int, completion: Any) -> Branch:
        """A completion's tokens, the `sequence` without its first `shared` ones.

        All are scored but for turns of weight 0, which growing prefixes tell apart.
        """
        if not isinstance(completion, list) or all(is_learned(m) for m in completion):
            return _scored(sequence[shared:])
        mask, ids = [False] * shared, sequence[:shared]
        for i, message in enumerate(completion):
            after = self._tokens(row.prompt + completion[: i + 1], row)
            if after[: len(ids)] != ids or sequence[: len(after)] != after:
                raise DataError(
                    f"{row.where}: the chat template rewrites earlier turns, so the tokens of a turn with "
                    "weight 0 cannot be located"
                )
            mask += [is_learned(message)] * (len(after) - len(mask))
            ids = after
        return Branch(np.array(sequence[shared:], np.int64), np.array(mask[shared:], np.bool_))

    def _conversation(self, row: Row) -> SequenceGroup:
        """Scores the assistant's turns only, by the template's generation markers or by growing prefixes."""
        assert row.messages is not None
        ids, mask = self._assistant_mask(row, row.messages)
        first = next((i for i, scored in enumerate(mask) if scored), None)
        if first is None:
            raise DataError(
                f"{row.where}: no token of the conversation is the assistant's",
                fix="check the roles and the chat template",
            )
        first = max(first, 1)
        branch = Branch(np.array(ids[first:], np.int64), np.array(mask[first:], np.bool_))
        return SequenceGroup(row.id, np.array(ids[:first], np.int64), (branch,), row.source)

    def _assistant_mask(self, row: Row, messages: Sequence[Any]) -> tuple[list[int], list[bool]]:
        self._given |= given_names(messages, row)
        own = own_template(self.tokenizer, row)
        template = None if is_marked(own) else self._training_form(own)
        if template is None and not is_marked(own):
            return self._by_prefixes(row, messages)
        output = render(self.tokenizer, messages, row, template=template, return_assistant_tokens_mask=True)
        return list(output["input_ids"]), _weighed(
            [bool(m) for m in output["assistant_masks"]], messages, row
        )

    def _training_form(self, own: str) -> str | None:
        """TRL's training form of the template `own`; None if there is none."""
        if not self._training_looked_up:
            self._training_looked_up, self._training = True, training_template(self.tokenizer)
        templates = self.tokenizer.chat_template
        default = templates.get("default") if isinstance(templates, dict) else templates
        return self._training if own == default else None

    def _by_prefixes(self, row: Row, messages: Sequence[Any]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._tokens(messages[:i], row, generation=True)
            after = self._tokens(messages[: i + 1], row)
            if before[: len(ids)] != ids or after[: len(before)] != before:
                raise ConfigError(
                    f"{row.where}: the chat template rewrites earlier turns, so the assistant's tokens "
                    "cannot be located",
                    fix="use a template with {% generation %} markers (model.chat_template)",
                )
            mask += [False] * (len(before) - len(ids)) + [is_learned(message)] * (len(after) - len(before))
            ids = after
        return ids, mask

    def _text(self, row: Row) -> SequenceGroup:
        """Language modelling: every token but the first is scored."""
        ids = self._tokens(self._ended(row.text or ""), row)
        self._count_bos(ids, row.text)
        if len(ids) < 2:
            raise DataError(f"{row.where}: the text has fewer than two tokens", fix="remove the row")
        return SequenceGroup(row.id, np.array(ids[:1], np.int64), (_scored(ids[1:]),), row.source)

    def _joined(self, prompt: Any, completion: Any) -> Any:
        return prompt + completion if isinstance(completion, list) else prompt + self._ended(completion)

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text + eos if self.data.append_eos and not text.endswith(eos) else text

    def _tokens(self, text: Any, row: Row, *, generation: bool = False) -> list[int]:
        """Tokens of text or messages.

        What the tokenizer adds at the end of a text is cut off, since it may be an eos: data.append_eos
        decides where one belongs.
        """
        if not isinstance(text, str):
            self._given |= given_names(text, row)
            return list(render(self.tokenizer, text, row, add_generation_prompt=generation)["input_ids"])
        ids = list(self.tokenizer(text=text)["input_ids"])
        return ids[: len(ids) - len(self.added_at_end)]

    def _count_bos(self, ids: Sequence[int], text: Any) -> None:
        bos = self.tokenizer.bos_token_id
        self._doubled += isinstance(text, str) and bos is not None and list(ids[:2]) == [bos, bos]


def _added_at_end(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer writes after every text, such as an eos with add_eos_token."""
    full, bare = (
        list(tokenizer(text="a", add_special_tokens=special)["input_ids"]) for special in (True, False)
    )
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return full[starts[-1] + len(bare) :] if starts else []


def _weighed(mask: list[bool], messages: Sequence[Any], row: Row) -> list[bool]:
    """The mask of a template's markers without the turns of weight 0.

    Its runs of True are the assistant's turns, in order.
    """
    turns = [is_learned(m) for m in messages if m["role"] == "assistant"]
    if all(turns):
        return mask
    edges = np.flatnonzero(np.diff(np.array([False, *mask, False], np.int8)))
    runs = edges.reshape(-1, 2).tolist()
    if len(runs) != len(turns):
        raise DataError(
            f"{row.where}: weight 0 cannot be applied",
            why=f"the chat template marks {len(runs)} runs of tokens as the assistant's, for {len(turns)} "
            "turns",
        )
    kept = list(mask)
    for (start, end), learned in zip(runs, turns, strict=True):
        kept[start:end] = [learned] * (end - start)
    return kept


def _lead(sequences: list[list[int]], row: Row) -> int:
    """Number of tokens that stand in for a missing prompt: the first one, if all completions share it."""
    if min(len(s) for s in sequences) < 2:
        raise DataError(
            f"{row.where}: no prompt, and a completion of fewer than two tokens",
            fix="give the row a prompt, or remove it",
        )
    if len({s[0] for s in sequences}) > 1:
        raise DataError(
            f"{row.where}: no prompt, and the answers share no first token", fix="give the row a prompt"
        )
    return 1


def _scored(ids: Sequence[int]) -> Branch:
    return Branch(np.array(ids, np.int64), np.ones(len(ids), np.bool_))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """TRL's common_prefix_length. Importing trl would take seconds, which `plan` should not."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _fit(group: SequenceGroup, row: Row, data: Data, counts: _Counts) -> SequenceGroup | None:
    """Applies data.overlong; None for a row that is dropped, which is counted.

    A row is dropped, never kept without a scored token.
    """
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
    if fitted is None or not any(b.loss_mask.any() for b in fitted.branches):
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
    branches = tuple(Branch(b.ids[:room], b.loss_mask[:room]) for b in group.branches)
    return replace(group, prompt=prompt, branches=branches)
