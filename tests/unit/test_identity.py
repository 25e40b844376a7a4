"""What a run is known by: keys, tokens, files."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.episodes import Prompt
from orchestrator.identity import Identity, folder_digest, tokenizer_digest, tokens_digest
from orchestrator.models.tiny import byte_tokenizer
from orchestrator.records import Branch, SequenceGroup


def group(ids: list[int], scored: list[bool], prompt: list[int], **more: float) -> SequenceGroup:
    return SequenceGroup(0, np.array(prompt), (Branch(np.array(ids), np.array(scored)),), **more)  # pyright: ignore[reportArgumentType]


def test_tokens_masks_labels_and_order_are_what_is_learned() -> None:
    base = [group([1, 2], [True, True], [3]), group([4], [True], [5, 6])]
    others = [
        [group([1, 9], [True, True], [3]), base[1]],
        [group([1, 2], [False, True], [3]), base[1]],
        [group([1, 2], [True, True], [3], label=1.0), base[1]],
        [group([1, 2], [True, True], [3], margin=0.5), base[1]],
        base[::-1],
        base[:1],
        [group([2], [True], [3, 1]), base[1]],
    ]
    digests = [tokens_digest(items) for items in (base, *others)]
    assert len(set(digests)) == len(digests) and tokens_digest(list(base)) == digests[0]
    assert tokens_digest([Prompt(0, "a:1", 0, np.array([1]), "x")]) != tokens_digest([Prompt(0, "a:1", 0, np.array([2]), "x")])


def test_a_tokenizer_is_its_rules_and_its_template_not_its_last_call() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    other(["a", "longer text"], truncation=True, padding=True, max_length=3)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    other.chat_template += " "
    assert tokenizer_digest(one) != tokenizer_digest(other)
    more = byte_tokenizer()
    more.add_tokens(["<new>"])
    assert tokenizer_digest(one) != tokenizer_digest(more)


def test_other_weights_of_the_same_size_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5_000_000))
    before = folder_digest(tmp_path)
    for at in (10, 4_999_999):
        content = bytearray(5_000_000)
        content[at] = 1
        file.write_bytes(content)
        assert folder_digest(tmp_path) != before


@pytest.mark.parametrize(("there", "only"), [({"run.max_steps": 1, "x": 0}, True), ({"run.max_steps": 1, "x": 1}, False), ({"x": 0}, True)])
def test_a_run_that_only_ends_elsewhere_is_known(there: dict[str, int], only: bool) -> None:
    assert Identity({"run.max_steps": 2, "x": 0}).only_the_end_differs(there) is only
