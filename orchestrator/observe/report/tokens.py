"""A sequence group as coloured text that shows which tokens are in the loss."""

from collections.abc import Callable

from rich.text import Text

from orchestrator.core.batches import Branch, SequenceGroup

SCORED = ("black on green3", "black on pale_green3")
UNSCORED = ("grey70 on grey23", "grey70 on grey30")
PROMPT = ("grey62", "grey50")
"""Two styles each, used in turn, so that token borders show."""
SHOWN = {" ": "·", "\n": "↵\n", "\t": "→\t", "\r": "␍"}


def render_group(group: SequenceGroup, decode: Callable[[int], str]) -> Text:
    """The prompt and each branch, token by token. decode: text of one token id.

    Tokens in the loss also stand in ⟦ ⟧, so that the mask can be read without colours.
    """
    text = Text()
    _legend(text)
    text.append(f"\nexample {group.id}", "bold")
    details = [
        f"source {group.source}",
        f"{group.shared_tokens} tokens (the prompt once)",
        f"{group.scored_tokens} scored",
    ]
    details += [
        f"{name} {value:g}"
        for name, value in (("label", group.label), ("margin", group.margin))
        if value is not None
    ]
    text.append("  " + ", ".join(details), "dim")
    _title(text, "prompt", f"{len(group.prompt)} tokens")
    for place, token in enumerate(group.prompt.tolist()):
        text.append(visible(decode(token)), PROMPT[place % 2])
    for name, branch in zip(_names(group), group.branches, strict=True):
        _title(text, name, f"{len(branch.ids)} tokens, {int(branch.loss_mask.sum())} scored")
        _branch(text, branch, decode)
    text.append("\n")
    return text


def visible(token: str) -> str:
    """The token with marks for white space and escapes for control characters."""
    return "".join(
        SHOWN.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in token
    )


def _branch(text: Text, branch: Branch, decode: Callable[[int], str]) -> None:
    in_loss = False
    for place, (token, scored) in enumerate(zip(branch.ids.tolist(), branch.loss_mask.tolist(), strict=True)):
        if scored != in_loss:
            text.append("⟦" if scored else "⟧", "bold green")
        text.append(visible(decode(token)), (SCORED if scored else UNSCORED)[place % 2])
        in_loss = scored
    if in_loss:
        text.append("⟧", "bold green")


def _legend(text: Text) -> None:
    text.append("⟦", "bold green").append("scored", SCORED[0]).append("⟧", "bold green").append(
        ": counts in the loss   "
    )
    text.append("not scored", UNSCORED[0]).append(": read, but not in the loss   ")
    text.append("prompt", PROMPT[0]).append("\n· space   ↵ line end   → tab\n", "dim")


def _title(text: Text, name: str, details: str) -> None:
    text.append(f"\n\n{name}", "bold").append(f"  {details}\n", "dim")


def _names(group: SequenceGroup) -> tuple[str, ...]:
    if len(group.branches) < 2:  # no branch: a prompt whose completions are sampled
        return ("completion",) * len(group.branches)
    if group.label is not None:  # KTO: the second branch is another row's completion, for the KL term
        return ("completion", *("mismatched completion" for _ in group.branches[1:]))
    return ("chosen", "rejected", *(f"branch {k + 1}" for k in range(2, len(group.branches))))
