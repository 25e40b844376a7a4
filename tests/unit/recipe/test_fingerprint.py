"""What a run is known by: keys, tokens, files."""

from pathlib import Path

import numpy as np

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.core.rollouts import Prompt
from orchestrator.models.tiny import byte_tokenizer
from orchestrator.recipe.fingerprint import folder_digest, identity_of, tokenizer_digest, tokens_digest
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Optimizer, Recipe
from orchestrator.run.folder import End


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
    assert tokens_digest([Prompt(0, "a:1", 0, np.array([1]), "x")]) != tokens_digest(
        [Prompt(0, "a:1", 0, np.array([2]), "x")]
    )


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


PLACES = ("here", "there", "other")


def recipe(*overrides: str, base: str = "tiny/dpo") -> Recipe:
    return load(base, overrides).stages[-1].recipe


def test_places_decide_nothing_and_weights_do(tmp_path: Path) -> None:
    """Of the policy, the reference, a critic, a reward model, a recording, and code: as they lie, moved, and
    with another content."""
    for place in PLACES:
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "model" / "config.json").write_text("{}")
        (tmp_path / place / "model" / "model.safetensors").write_bytes(b"1" if place == "other" else b"0")
        (tmp_path / place / "rows.jsonl").write_text("x" if place == "other" else "y")
        (tmp_path / place / "judge.py").write_text("")

    def of(base: str, *overrides: str) -> list[str]:
        return [
            identity_of(
                recipe(*(o.replace("@", str(tmp_path / at)) for o in overrides), base=base), "rows"
            ).fingerprint
            for at in PLACES
        ]

    cases = [
        ("tiny/dpo", "model={path: @/model}"),
        ("tiny/dpo", "model.reference=@/model"),
        ("tiny/ppo", "critic.model={path: @/model}"),
        ("tiny/ppo", "rewards.functions=[{name: r, model: @/model}]"),
        ("tiny/grpo", "rollouts.replay=@/rows.jsonl"),
    ]
    for base, *overrides in cases:
        here, there, other = of(base, *overrides)
        assert here == there != other, overrides
    unseen = [
        ("tiny/grpo", "rewards.functions=[{name: r, function: @/judge.py:f}]"),
        ("tiny/dpo", "data.train=@/rows.jsonl", "data.eval=@/rows.jsonl"),
    ]
    for base, *overrides in unseen:
        assert len(set(of(base, *overrides))) == 1, "code is watched, rows have a fingerprint of their own"


def test_the_mixture_of_sources_decides() -> None:
    mixtures = [
        [(10, 1.0), (5, 1.0)],
        [(5, 1.0), (10, 1.0)],
        [(10, 1.0), (5, 2.0)],
        [(15, 1.0)],
        [(15, 2.0)],
        (),
    ]
    prints = [identity_of(recipe(), "rows", sources=mixture).fingerprint for mixture in mixtures]
    assert prints[3] == prints[5] and len(set(prints)) == 5


def test_a_longer_run_is_the_same_where_its_rates_are() -> None:
    """Found by the rates themselves, whatever the schedule is called: a cosine that has not left its warm-up
    is the same still."""
    constant, cosine = (
        Optimizer(learning_rate=1.0, warmup_steps=3),
        Optimizer(learning_rate=1.0, warmup_steps=3, schedule="cosine"),
    )
    assert End(constant, 20).other_rates(10, 10) is None
    assert End(cosine, 20).other_rates(4, 10) is None
    said = End(cosine, 20).other_rates(10, 10)
    assert said is not None and said.startswith(
        "6 of the 10 optimizer steps that are done had another learning rate: the last one 0.0495, in a"
    )
    assert End(cosine, 10, each=2).other_rates(5, 10) == said
