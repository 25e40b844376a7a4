"""Generated toy data: the demo's word task and the calculator's task.

Word task: write a word as it is. Demonstrations answer right (the word itself) and wrong (the word backwards)
equally often, so a model that imitates them is right half of the time. Preference pairs show which answer is
wanted: that is what preference tuning is for.

Calculator: add two numbers with a tool (orchestrator/rollout/environments/calculator.py). Half of the
demonstrations call it and copy its result. The others guess a wrong sum. A reward shows which is better.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from orchestrator.core.errors import ConfigError

LETTERS = "abcdefghijklmnop"
LENGTH = 4
DEFAULT_ROWS = {"train": 2048, "eval": 256}
NAMES = ("sft", "preference", "unpaired", "reward", "prompts", "calculator", "calculator_sft")
NUMBERS = range(10, 50)
"""Numbers that the calculator's task adds: two digits each, and two in the sum."""


def toy_rows(name: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows in TRL's format. Train and eval prompts never overlap: a checksum decides the split."""
    if name not in NAMES or split not in DEFAULT_ROWS:
        raise ConfigError(
            f"`toy:{name}` with split {split!r} is not toy data",
            fix=f"use toy:{{{','.join(NAMES)}}} with split train or eval",
        )
    generator = np.random.Generator(np.random.Philox(key=[NAMES.index(name), split == "eval"]))
    make = _calculation if name.startswith("calculator") else _words
    for _ in range(count):
        yield make(name, split, generator)


def _words(name: str, split: str, generator: np.random.Generator) -> dict[str, Any]:
    """A row of the word task."""
    word = _word(generator, split)
    prompt, right, wrong = f"{word}>", word, word[::-1]
    flip = bool(generator.random() < 0.5)
    if name == "prompts":
        return {"prompt": prompt, "answer": right}
    if name == "sft":
        return {
            "prompt": prompt,
            "completion": wrong if flip and split == "train" else right,
            "answer": right,
        }
    if name == "unpaired":
        return {"prompt": prompt, "completion": wrong if flip else right, "label": not flip, "answer": right}
    return {"prompt": prompt, "chosen": right, "rejected": wrong, "answer": right}


def _word(generator: np.random.Generator, split: str) -> str:
    """A word of distinct letters, so that it differs from its reverse; a fifth, by checksum, is held out."""
    while True:
        letters = generator.choice(len(LETTERS), LENGTH, replace=False)
        held_out = int((letters * (1, 3, 5, 7)).sum()) % 5 == 0
        if held_out == (split == "eval"):
            return "".join(LETTERS[i] for i in letters)


def _calculation(name: str, split: str, generator: np.random.Generator) -> dict[str, Any]:
    """A row of the calculator's task, as messages. All held-out demonstrations call the tool."""
    a, b = _numbers(generator, split)
    question, answer = [{"role": "user", "content": f"{a}+{b}"}], str(a + b)
    guesses = bool(generator.random() < 0.5) and split == "train"
    off = int(generator.integers(1, 10)) * (-1 if a + b > 50 else 1)
    if name == "calculator":
        return {"prompt": question, "answer": answer}
    turns = (
        [("assistant", str(a + b + off))]
        if guesses
        else [("assistant", f"={a}+{b};"), ("tool", answer), ("assistant", answer)]
    )
    return {
        "messages": [*question, *({"role": role, "content": content} for role, content in turns)],
        "answer": answer,
    }


def _numbers(generator: np.random.Generator, split: str) -> tuple[int, int]:
    """Two numbers; a fifth of the pairs, by checksum, is held out."""
    while True:
        a, b = (int(n) for n in generator.integers(NUMBERS.start, NUMBERS.stop, 2))
        if ((3 * a + b) % 5 == 0) == (split == "eval"):
            return a, b
