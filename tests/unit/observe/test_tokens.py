"""Tokens are coloured by the loss mask, and none is invisible."""

import io

import numpy as np
from rich.console import Console

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.observe.report.tokens import PROMPT, SCORED, UNSCORED, render_group, visible

WORDS = {1: "Hi", 2: " there", 3: "yes", 4: "\n", 5: "\x1b[31m", 6: "no"}


def branch(ids: list[int], scored: list[bool]) -> Branch:
    return Branch(np.array(ids), np.array(scored))


def pair(**changes: float) -> SequenceGroup:
    branches = (branch([4, 3, 6], [False, True, True]), branch([6, 4, 5], [True, False, True]))
    return SequenceGroup(7, np.array([1, 2]), branches, **changes)  # pyright: ignore[reportArgumentType]


def styled(group: SequenceGroup) -> list[tuple[str, str]]:
    """(text, style) of every piece after the legend."""
    text = render_group(group, WORDS.__getitem__)
    start = text.plain.index("example")
    return [(text.plain[s.start : s.end], str(s.style)) for s in text.spans if s.start >= start]


def test_each_token_has_the_colour_of_its_mask() -> None:
    tokens = [(t, s) for t, s in styled(pair()) if s in (*SCORED, *UNSCORED, *PROMPT)]
    assert tokens == [
        ("Hi", PROMPT[0]), ("·there", PROMPT[1]),
        ("↵\n", UNSCORED[0]), ("yes", SCORED[1]), ("no", SCORED[0]),
        ("no", SCORED[0]), ("↵\n", UNSCORED[1]), ("\\x1b[31m", SCORED[0]),
    ]  # fmt: skip


def test_the_mask_can_be_read_without_colours() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(render_group(pair(margin=0.5), WORDS.__getitem__))
    plain = out.getvalue()
    assert "Hi·there" in plain
    assert "↵\n⟦yesno⟧\n" in plain
    assert "⟦no⟧↵\n⟦\\x1b[31m⟧" in plain
    assert "\x1b" not in plain
    assert "3 tokens, 2 scored" in plain
    assert "margin 0.5" in plain
    assert plain.startswith("⟦scored⟧: counts in the loss")


def test_branches_are_named_by_what_they_are() -> None:
    def names(group: SequenceGroup) -> list[str]:
        return [t.strip() for t, s in styled(group) if s == "bold" and "example" not in t]

    assert names(pair()) == ["prompt", "chosen", "rejected"]
    assert names(pair(label=1.0)) == ["prompt", "completion", "mismatched completion"]
    assert names(SequenceGroup(0, np.array([1]), (branch([3], [True]),))) == ["prompt", "completion"]


def test_white_space_and_control_characters_are_visible() -> None:
    assert visible(" a\t\r\n\x00\u202e<é>") == "·a→\t␍↵\n\\x00\\u202e<é>"
