"""The demo's task, generated: write a word as it is, or backwards.

Demonstrations answer right (the word itself) and wrong (the word backwards) equally often, so a model that imitates
them is right half of the time; preference pairs say which one is wanted. That is what preference tuning is for.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from orchestrator.errors import ConfigError

LETTERS = "abcdefghijklmnop"
LENGTH = 4
DEFAULT_ROWS = {"train": 2048, "eval": 256}
NAMES = ("sft", "preference", "unpaired", "reward")


def toy_rows(name: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows in TRL's format. Train and eval words never overlap: they differ in a checksum of their letters."""
    if name not in NAMES or split not in DEFAULT_ROWS:
        raise ConfigError(f"there is no toy data `toy:{name}` with split {split!r}", fix=f"use toy:{{{','.join(NAMES)}}} with split train or eval")
    generator = np.random.Generator(np.random.Philox(key=[NAMES.index(name), split == "eval"]))
    for _ in range(count):
        word = _word(generator, split)
        prompt, right, wrong = f"{word}>", word, word[::-1]
        flip = bool(generator.random() < 0.5)
        if name == "sft":
            yield {"prompt": prompt, "completion": wrong if flip and split == "train" else right, "answer": right}
        elif name == "unpaired":
            yield {"prompt": prompt, "completion": wrong if flip else right, "label": not flip, "answer": right}
        else:
            yield {"prompt": prompt, "chosen": right, "rejected": wrong, "answer": right}


def _word(generator: np.random.Generator, split: str) -> str:
    """A word of distinct letters (so it differs from its reverse); every fifth, by checksum, is held out."""
    while True:
        letters = generator.choice(len(LETTERS), LENGTH, replace=False)
        held_out = int((letters * (1, 3, 5, 7)).sum()) % 5 == 0
        if held_out == (split == "eval"):
            return "".join(LETTERS[i] for i in letters)
