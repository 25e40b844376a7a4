"""Row -> token ids and loss mask.

Scored are: the assistant's turns of `messages`; the whole of a completion, as TRL has it, the turns of tools
and users in it included; every token but the first of plain text. A turn with `weight` 0 is not. A completion
starts where the tokenized prompt and the tokenized prompt + completion diverge, as in TRL. Padding is added
later and masked by position, never by id.
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
from orchestrator.data.turns import said_of, with_fewer_turns
from orchestrator.recipe.schema import Data


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What encoding did: rows kept, dropped, truncated; not_prefix: rows whose prompt is not a token prefix
    of the completion; identical: pairs that truncation made equal; lengths: tokens of prompt + longest branch
    of kept rows; turns: rows of the truncated that lost their oldest turns whole; bad: rows that could not be
    encoded; notes: what else the user should know."""

    rows: int
    kept: int
    dropped: int
    truncated: int
    not_prefix: tuple[str, ...]
    identical: int
    lengths: tuple[int, ...]
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    turns: int = 0

    def quantiles(self) -> dict[str, int]:
        """Minimum, median, 95th percentile and maximum of the lengths."""
        values = np.array(self.lengths)
        return {
            name: int(np.quantile(values, q))
            for name, q in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
        }


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
    turns: int = 0
    last_turns: int = 0
    bad: list[BadRow] = field(default_factory=list)


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, data: Data, kind: DataKind, bad: Sequence[BadRow] = ()
) -> Encoded:
    """All rows, with the over-long policy applied and counted. bad: rows that are left out already.

    DataError where more than data.max_bad_rows are bad together with those that cannot be encoded, or nothing
    is left.
    """
    encoder = Encoder(tokenizer, data, kind)
    counts, groups = _Counts(), []
    for row in rows:
        try:
            whole = encoder.encode(row)
            if (
                data.overlong == "truncate_prompt_left"
                and whole.longest > data.max_length
                and (turns := row.messages or row.prompt)
            ):
                whole = whole if isinstance(turns, str) else _with_fewer_turns(encoder, row, counts)
        except DataError as error:
            counts.bad.append(bad_row(row, error))
            continue
        group = None if whole is None else _fit(whole, row, data, counts)
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
            ),  # a row that lost turns was encoded more than once
            identical=counts.identical,
            lengths=tuple(g.longest for g in groups),
            bad=tuple(counts.bad),
            notes=(
                *encoder.notes,
                *said_of(counts.turns, counts.last_turns, f"data.max_length={data.max_length}"),
            ),
            turns=counts.turns,
        ),
    )


def _with_fewer_turns(encoder: "Encoder", row: Row, counts: _Counts) -> SequenceGroup | None:
    """The group of an overlong conversation without its oldest turns; None, and counted as dropped, where its
    last one is too long."""
    name = "prompt" if row.messages is None else "messages"

    def teaches(left: list[Any]) -> bool:
        return name == "prompt" or any(m["role"] == "assistant" and is_learned(m) for m in left)

    def fits(group: SequenceGroup) -> bool:
        return group.longest <= encoder.data.max_length

    found = with_fewer_turns(
        getattr(row, name), lambda left: encoder.encode(replace(row, **{name: left})), fits, teaches
    )
    if found is None:
        counts.dropped += 1
        counts.last_turns += 1
        return None
    counts.truncated += 1
    counts.turns += 1
    return found[1]


def bad_row(row: Row, error: DataError) -> BadRow:
    """The row that could not be encoded, with the reason."""
    what = error.what.removeprefix(f"{row.where}: ")
    return BadRow(row.where, f"{what} ({error.why})" if error.why else what)


class Encoder:
    """Tokenizes rows of one kind. not_prefix collects the rows whose prompt end had to be left out."""

    def __init__(self, tokenizer: Any, data: Data, kind: DataKind) -> None:
        self.tokenizer, self.data, self.kind = tokenizer, data, kind
        self.not_prefix: list[str] = []
        self.added_at_end = _added_at_end(tokenizer)
        self._doubled = 0
        self._given: set[str] = set()
        self._training: str | None = None
        self._asked = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the tokenizer and the template the user should know, after the rows were encoded."""
        found = []
        if self._training is not None:
            found.append(
                "conversations are encoded with TRL's training form of the chat template; the exported "
                "model keeps its own"
            )
        if unnamed := [name for name in sorted(self._given) if name not in str(self.tokenizer.chat_template)]:
            found.append(
                f"the chat template does not name {', '.join(unnamed)}, which the rows give it: no token "
                "comes of it"
            )
        if self._doubled:
            bos = self.tokenizer.bos_token
            found.append(
                f"{self._doubled} prompts begin with {bos} twice: the text holds one and the tokenizer adds "
                "one; take it out of the text"
            )
        return tuple(found)

    def encode(self, row: Row) -> SequenceGroup:
        """The group of a row: prompt tokens, and a branch per completion. DataError for a row that cannot be
        encoded, ConfigError where the template is at fault."""
        if row.messages is not None:
            return self._conversation(row)
        if row.text is not None:
            return self._text(row)
        completions = [row.chosen, row.rejected] if self.kind == "preference" else [row.completion]
        prompt = self._tokens(row.prompt, row, generation=True)
        self._count_bos(prompt, row.prompt)
        wholes = [self._tokens(self._joined(row.prompt, c), row) for c in completions]
        if len(wholes) == 2 and wholes[0] == wholes[1]:
            raise DataError(
                f"{row.where}: chosen and rejected are the same tokens",
                why="template or tokenizer makes them equal",
                fix="remove it",
            )
        shared = min(_common_prefix(prompt, whole) for whole in wholes)
        if shared < len(prompt):
            self.not_prefix.append(row.where)
        if shared == 0:  # something must predict the first token
            shared = _lead(wholes, row)
        branches = tuple(
            self._branch(row, whole, shared, c) for whole, c in zip(wholes, completions, strict=True)
        )
        label = None if row.label is None else float(row.label)
        return SequenceGroup(
            row.id, np.array(wholes[0][:shared], np.int64), branches, row.source, label, row.margin
        )

    def prompt_tokens(self, row: Row) -> tuple[int, ...]:
        """The prompt alone, ready for generation."""
        if row.messages is not None:
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            return tuple(self._tokens(row.messages[:last], row, generation=True))
        prompt = self._tokens(row.prompt, row, generation=True)
        self._count_bos(prompt, row.prompt)
        return tuple(prompt)

    def _branch(self, row: Row, whole: list[int], shared: int, completion: Any) -> Branch:
        """A completion's tokens, all scored but for turns of weight 0, told apart by growing prefixes."""
        if not isinstance(completion, list) or all(is_learned(m) for m in completion):
            return _scored(whole[shared:])
        mask, ids = [False] * shared, whole[:shared]
        for i, message in enumerate(completion):
            after = self._tokens(row.prompt + completion[: i + 1], row)
            if after[: len(ids)] != ids or whole[: len(after)] != after:
                raise DataError(
                    f"{row.where}: the chat template rewrites earlier turns, so that weight 0 has no tokens "
                    "of its own"
                )
            mask += [is_learned(message)] * (len(after) - len(mask))
            ids = after
        return Branch(np.array(whole[shared:], np.int64), np.array(mask[shared:], np.bool_))

    def _conversation(self, row: Row) -> SequenceGroup:
        """Loss on the assistant's turns only, by the template's generation markers or by growing prefixes."""
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
        """TRL's, where `own` is the template that it is the form of."""
        if not self._asked:
            self._asked, self._training = True, training_template(self.tokenizer)
        known = self.tokenizer.chat_template
        return self._training if own == (known.get("default") if isinstance(known, dict) else known) else None

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
                    "cannot be told apart",
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
        """Of text without what the tokenizer adds at the end, which may be an eos: data.append_eos says where
        one belongs."""
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
    whole, bare = (
        list(tokenizer(text="a", add_special_tokens=special)["input_ids"]) for special in (True, False)
    )
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    return whole[starts[-1] + len(bare) :] if starts else []


def _weighed(mask: list[bool], messages: Sequence[Any], row: Row) -> list[bool]:
    """The mask of a template's markers without the turns of weight 0: its runs are the assistant's turns, in
    order."""
    turns = [is_learned(m) for m in messages if m["role"] == "assistant"]
    if all(turns):
        return mask
    edges = np.flatnonzero(np.diff(np.array([False, *mask, False], np.int8)))
    runs = edges.reshape(-1, 2).tolist()
    if len(runs) != len(turns):
        raise DataError(
            f"{row.where}: weight 0 cannot be honoured",
            why=f"the chat template marks {len(runs)} runs of tokens as the assistant's, and it has "
            f"{len(turns)} turns",
        )
    kept = list(mask)
    for (start, end), learned in zip(runs, turns, strict=True):
        kept[start:end] = [learned] * (end - start)
    return kept


def _lead(wholes: list[list[int]], row: Row) -> int:
    """Tokens that stand in for a missing prompt: the first one, bos or not, if all completions begin with it."""
    if min(len(w) for w in wholes) < 2:
        raise DataError(
            f"{row.where}: no prompt, and a completion of fewer than two tokens",
            fix="give the row a prompt, or remove it",
        )
    if len({w[0] for w in wholes}) > 1:
        raise DataError(
            f"{row.where}: no prompt, and the answers share no first token", fix="give the row a prompt"
        )
    return 1


def _scored(ids: Sequence[int]) -> Branch:
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
    """Applies data.overlong; a completion is never cut to nothing in silence: then the row is dropped and
    counted."""
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
