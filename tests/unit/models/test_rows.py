"""Every column of a micro-batch arrives on the device, through one buffer."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from orchestrator.core.batches import Branch, Experience, MicroBatch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.models.ragged_attention import blocks_of
from orchestrator.models.rows import ALIGNMENT, NARROW, MicroBatchTensors, to_device

CPU = torch.device("cpu")
DRAW = np.random.default_rng(0)


def experience(size: int, *, full: bool) -> Experience:
    columns = [DRAW.random(size, np.float32) for _ in range(6)]
    return (
        Experience(*columns) if full else Experience(*columns[:2], old_logprobs=None, ref_logprobs=columns[3])
    )


def micro_batch(*, rl: bool = False, full: bool = True) -> MicroBatch:
    def branch(size: int) -> Branch:
        return Branch(
            DRAW.integers(0, 99, size), np.ones(size, np.bool_), experience(size, full=full) if rl else None
        )

    groups = [
        SequenceGroup(i, DRAW.integers(0, 99, 3 + i), (branch(2 + i), branch(5)), label=1.0, margin=0.5 * i)
        for i in range(3)
    ]
    return pack(groups, "prefix_shared")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rl", [False, True])
def test_every_column_arrives(rl, full):
    rows = micro_batch(rl=rl, full=full)
    tensors = MicroBatchTensors.of(rows, CPU)
    for name in MicroBatchTensors.__dataclass_fields__:
        if name in ("layout", "one_row", "branches", "experience", "ragged"):
            continue
        column, tensor = getattr(rows, name), getattr(tensors, name)
        assert (column is None) == (tensor is None), name
        if column is not None:
            np.testing.assert_array_equal(tensor.numpy(), column, err_msg=name)
            assert tensor.dtype == (torch.int32 if name in NARROW else torch.from_numpy(column).dtype)
    if tensors.ragged is not None:
        np.testing.assert_array_equal(tensors.ragged.at.numpy(), np.flatnonzero(rows.segment >= 0))
    assert (tensors.experience is None) == (not rl)
    if tensors.experience is not None:
        assert rows.experience is not None
        for name, theirs in zip(
            Experience.__dataclass_fields__, tensors.experience.__dataclass_fields__, strict=True
        ):
            column, tensor = getattr(rows.experience, name), getattr(tensors.experience, theirs)
            assert (column is None) == (tensor is None)
            assert column is None or np.array_equal(tensor.numpy(), column)


def test_columns_share_one_aligned_buffer_that_is_a_copy():
    columns = [
        np.arange(3, dtype=np.int32),
        None,
        np.ones((2, 5), np.float32),
        np.zeros(0, np.int64),
        np.array([True]),
    ]
    for column in columns:
        if column is not None:
            column.setflags(write=False)  # like arrays from Ray
    tensors = to_device(columns, CPU)
    assert tensors[1] is None
    present = [t for t in tensors if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in present}) == 1
    assert all(t.storage_offset() * t.element_size() % ALIGNMENT == 0 for t in present)
    present[0].add_(1)
    assert columns[0] is not None and columns[0].tolist() == [0, 1, 2]
    assert present[1].shape == (2, 5) and present[2].numel() == 0


def test_the_memory_model_can_build_it_without_storage():
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = MicroBatchTensors.of(micro_batch(), CPU)
        assert isinstance(tensors.input_ids + 1, FakeTensor)


def test_tokens_are_found_in_their_rows_and_in_their_blocks():
    rows = micro_batch()
    ragged = MicroBatchTensors.of(rows, CPU).ragged
    assert ragged is not None
    np.testing.assert_array_equal(rows.segment.ravel()[ragged.at.numpy()] >= 0, True)
    assert len(ragged.at) == rows.tokens
    for block in ragged.blocks:
        square = torch.zeros(len(block) * block.length, dtype=torch.long)
        square[ragged.within[block.tokens]] = (
            1 + torch.from_numpy(rows.input_ids.ravel())[ragged.at[block.tokens]]
        )
        own = np.where(rows.segment >= 0, 1 + rows.input_ids, 0)[block.rows, : block.length]
        np.testing.assert_array_equal(square.view(own.shape).numpy(), own)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rows_without_padding_or_mask_are_not_ragged(layout):
    branch = Branch(np.arange(9), np.ones(9, np.bool_))
    sizes = (3, 30) if layout == "padded" else (3, 3)
    rows = pack([SequenceGroup(i, np.arange(size), (branch, branch)) for i, size in enumerate(sizes)], layout)
    assert MicroBatchTensors.of(rows, CPU).ragged is None


@pytest.mark.parametrize(
    ("lengths", "starts"),
    [([5], [0]), ([100, 90, 81, 79, 50, 20, 8], [0, 3, 4, 5]), ([40, 3, 1], [0]), ([60, 70], [0, 1])],
)
def test_blocks_hold_rows_of_similar_length(lengths, starts):
    blocks = blocks_of(lengths)
    assert [b.rows.start for b in blocks] == starts
    assert [i for b in blocks for i in range(b.rows.start, b.rows.stop)] == list(range(len(lengths)))
    assert all(
        b.length == max(lengths[b.rows]) and b.tokens.stop - b.tokens.start == sum(lengths[b.rows])
        for b in blocks
    )
    assert blocks[-1].tokens.stop == sum(lengths)
