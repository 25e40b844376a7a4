"""Reference log-probs on disk: by content, resumable, equal for every cut, checked against live ones."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.core.batches import Branch, Cut, SequenceGroup
from orchestrator.core.errors import DataError
from orchestrator.data.micro_batches import cut_step
from orchestrator.trainers import reference_cache as reference
from orchestrator.trainers.reference_cache import ReferenceCache, content_key
from tests.unit.trainers.conftest import pairs

CUT = Cut(1, 4, None, "prefix_shared", 0, "no_sync")
GROUPS = pairs(11)


def quiet(done, of):
    pass


def cut(groups):
    return cut_step(groups, CUT)


@pytest.fixture(scope="module")
def score():
    """The frozen reference policy on one rank, without a process group."""
    import torch

    from orchestrator.learner.reference import RankReference
    from tests.unit.trainers.conftest import recipe

    frozen = RankReference(recipe(), torch.device("cpu"))

    def live(batch):
        return tuple(frozen.token_logprobs(rank) for rank in batch.micro_batches)

    return live


class Counting:
    """Scores like `score`, counts examples, and is interrupted before the part after `parts`."""

    def __init__(self, score, parts=10**9):
        self.score, self.parts, self.examples = score, parts, []

    def __call__(self, batch):
        if self.parts == 0:
            raise KeyboardInterrupt
        self.parts -= 1
        self.examples += [g.id for g in batch.groups]
        return self.score(batch)


def test_everything_is_computed_once(tmp_path, score):
    first, second = Counting(score), Counting(score)
    reported = []
    assert (
        ReferenceCache(tmp_path / "c").fill(GROUPS, cut, first, lambda done, of: reported.append((done, of)))
        == 11
    )
    assert reported == [(11, 11)]
    assert ReferenceCache(tmp_path / "c").fill(GROUPS, cut, second, quiet) == 0
    assert (sorted(first.examples), second.examples) == (list(range(11)), [])


def test_an_interrupted_pass_continues_where_it_stopped(tmp_path, score, monkeypatch):
    monkeypatch.setattr(reference, "PART_EXAMPLES", 4)
    interrupted, rest = Counting(score, parts=2), Counting(score)
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache(tmp_path).fill(GROUPS, cut, interrupted, quiet)
    cache = ReferenceCache(tmp_path)
    assert cache.fill(GROUPS, cut, rest, quiet) == 3
    assert (interrupted.examples, rest.examples) == (list(range(8)), [8, 9, 10])
    whole = ReferenceCache(tmp_path / "whole")
    whole.fill(GROUPS, cut, score, quiet)
    for a, b in zip(*(c.attach(cut(GROUPS)).micro_batches[0] for c in (cache, whole)), strict=True):
        np.testing.assert_allclose(a.ref_logprobs, b.ref_logprobs, atol=2e-6)


def test_a_part_that_was_not_finished_is_not_read(tmp_path, score):
    (tmp_path / ".tmp-0123-99").write_bytes(b"half of a file")
    assert ReferenceCache(tmp_path).fill(GROUPS, cut, score, quiet) == 11


def test_a_truncated_part_is_named_in_the_error(tmp_path, score):
    ReferenceCache(tmp_path).fill(GROUPS, cut, score, quiet)
    (part,) = tmp_path.glob("part-*")
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(DataError, match=part.name):
        ReferenceCache(tmp_path)


def test_equal_rows_are_one_record(tmp_path, score):
    twins = [GROUPS[0], replace(GROUPS[0], id=99)]
    cache = ReferenceCache(tmp_path)
    cache.fill(twins, cut, score, quiet)
    columns = cache.attach(cut(twins)).micro_batches[0][0]
    half = len(columns.targets) // 2
    assert len(load_file(next(tmp_path.glob("part-*")))) == 1
    ordered = columns.ref_logprobs[reference.by_sequence(columns)]
    assert ordered[:half].tolist() == ordered[half:].tolist()


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
@pytest.mark.parametrize(("workers", "examples", "positions"), [(1, 11, None), (3, 2, None), (2, None, 40)])
def test_attached_values_are_the_live_ones_in_any_cut_and_layout(
    tmp_path, score, layout, workers, examples, positions
):
    cache = ReferenceCache(tmp_path)
    cache.fill(GROUPS, cut, score, quiet)
    batch = cut_step(GROUPS, Cut(workers, examples, positions, layout, 0, "no_sync"))
    live, attached = score(batch), cache.attach(batch)
    assert attached.groups == batch.groups and attached.units == batch.units
    for rank, values in zip(attached.micro_batches, live, strict=True):
        for mb, value in zip(rank, values, strict=True):
            if mb.weight:
                np.testing.assert_allclose(mb.ref_logprobs, value, atol=1e-5)
            else:
                assert mb.ref_logprobs.tolist() == [0.0] * len(mb.targets)


def test_the_recheck_returns_the_largest_difference(tmp_path, score):
    cache = ReferenceCache(tmp_path)
    cache.fill(GROUPS, cut, score, quiet)
    assert cache.recheck(GROUPS, cut, score, 1e-5) == 0.0
    one_by_one = Cut(1, 1, None, "padded", 0, "no_sync")
    assert 0.0 < cache.recheck(GROUPS, lambda groups: cut_step(groups, one_by_one), score, 1e-5) < 1e-5


@pytest.mark.parametrize("wrong", [0.01, -3.0, float("nan")])
def test_the_recheck_finds_a_value_that_was_changed(tmp_path, score, wrong):
    ReferenceCache(tmp_path).fill(GROUPS, cut, score, quiet)
    (part,) = tmp_path.glob("part-*")
    values = load_file(part)
    values[content_key(GROUPS[3])][1] += wrong
    save_file(values, part)
    cache = ReferenceCache(tmp_path)
    with pytest.raises(DataError, match="differ from live ones") as error:
        cache.recheck(GROUPS, cut, score, 1e-3)
    assert str(tmp_path) in error.value.why and "remove" in error.value.fix
    assert cache.recheck(GROUPS[4:], cut, score, 1e-3) < 1e-5


def test_the_recheck_finds_a_record_of_another_length(tmp_path, score):
    ReferenceCache(tmp_path).fill(GROUPS, cut, score, quiet)
    (part,) = tmp_path.glob("part-*")
    values = load_file(part)
    values[content_key(GROUPS[3])] = values[content_key(GROUPS[3])][:-1].copy()
    save_file(values, part)
    with pytest.raises(DataError):
        ReferenceCache(tmp_path).recheck(GROUPS, cut, score, 1e-3)


def group(prompt=(1, 2), chosen=(3, 4), rejected=(5,), scored=(True, True), **rest):
    branches = (
        Branch(np.array(chosen), np.array(scored)),
        Branch(np.array(rejected), np.ones(len(rejected), np.bool_)),
    )
    return SequenceGroup(rest.pop("id", 0), np.array(prompt), branches, **rest)


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": (1, 9)},
        {"prompt": (1, 2, 3), "chosen": (4,), "scored": (True,)},
        {"chosen": (3, 9)},
        {"chosen": (3, 4, 5), "scored": (True, True, True), "rejected": ()},
        {"rejected": (6,)},
        {"scored": (False, True)},
    ],
    ids=["prompt", "boundary", "chosen", "branch boundary", "rejected", "mask"],
)
def test_the_key_changes_with_every_token_and_with_the_mask(changed):
    assert content_key(group(**changed)) != content_key(group())


def test_the_key_ignores_fields_that_the_model_does_not_read():
    assert content_key(group(id=7, source=3, label=1.0, margin=0.5)) == content_key(group())


def test_an_unknown_example_is_an_error_and_not_zero(tmp_path, score):
    cache = ReferenceCache(tmp_path)
    cache.fill(GROUPS[:5], cut, score, quiet)
    with pytest.raises(KeyError):
        cache.attach(cut(GROUPS))
