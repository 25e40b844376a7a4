"""Weights in buckets arrive bit for bit, and the checksum shows any damage."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.models.weight_buckets import (
    Bucket,
    CorruptWeights,
    Receiver,
    as_bytes,
    bucket_views,
    check,
    checksum,
    fill,
    plan_bucket,
)

SHAPES = [("norm.weight", (3,)), ("linear.weight", (5, 7)), ("scale", ()), ("bias", (16,))]
BIT_PATTERNS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Any bit pattern, NaN payloads and negative zeros included."""
    generator = torch.Generator().manual_seed(seed)
    bits = BIT_PATTERNS[dtype]
    limit = 2 ** (8 * bits.itemsize - 1)
    return {
        name: torch.randint(-limit, limit, shape, generator=generator).to(bits).view(dtype)
        for name, shape in SHAPES
    }


def bucket_of(named: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Bucket:
    entries, total = plan_bucket([(name, tuple(t.shape)) for name, t in named.items()], dtype)
    flat = fill(entries, total, named, torch.device("cpu"))
    return Bucket(entries, flat.numpy(), checksum(flat))


class Model(nn.Module):
    """Two buckets' worth of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 2)

    def buckets(self) -> list[Bucket]:
        return [
            bucket_of({n: p for n, p in self.named_parameters() if n.startswith(half)})
            for half in ("first", "second")
        ]


def test_layout_by_hand():
    entries, total = plan_bucket([("a", (3,)), ("b", (8,)), ("c", ()), ("d", (2, 3))], torch.float32)
    assert [(e.name, e.shape, e.dtype, e.start, e.size) for e in entries] == [
        ("a", (3,), "float32", 0, 12),
        ("b", (8,), "float32", 16, 32),
        ("c", (), "float32", 48, 4),
        ("d", (2, 3), "float32", 64, 24),
    ]
    assert total == 96
    assert plan_bucket([("a", (3,)), ("b", (9,))], torch.bfloat16)[0][1].start == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(dtype):
    sent = tensors(dtype)
    bucket = bucket_of(sent, dtype)
    bucket.data.flags.writeable = False  # like shared memory
    received = dict(bucket_views(bucket.entries, as_bytes(bucket)))
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == dtype and received[name].shape == tensor.shape
        assert torch.equal(received[name].view(BIT_PATTERNS[dtype]), tensor.view(BIT_PATTERNS[dtype]))


def test_the_wire_rounds_once_to_its_own_precision():
    sent = {"a": torch.randn(33)}
    received = dict(bucket_views(*_wired(sent, torch.bfloat16)))
    assert torch.equal(received["a"], sent["a"].to(torch.bfloat16))


def _wired(named: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[tuple, torch.Tensor]:
    bucket = bucket_of(named, dtype)
    return bucket.entries, as_bytes(bucket)


def contents() -> Iterator[torch.Tensor]:
    """Typical weights: noise, numbers that bf16 holds exactly, ones, zeros with a few other numbers."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8192, generator=generator)
    sparse = torch.zeros(8192)
    sparse[::1024] = 1.0
    yield from (noise, noise.to(torch.bfloat16).float(), torch.ones(8192), sparse)


FLATS = [t.view(torch.uint8) for t in contents()]
flats = st.sampled_from(range(len(FLATS)))
BLOCKS = [16, 64, 1024, 4096]


@given(which=flats, at=st.integers(0, 8 * 32768 - 1))
def test_a_flipped_bit_shows(which, at):
    damaged = FLATS[which].clone()
    damaged[at // 8] ^= 1 << at % 8
    assert checksum(damaged) != checksum(FLATS[which])


@given(which=flats, word=st.integers(0, 8191), other=st.integers(0, 8191), bit=st.integers(0, 31))
def test_the_same_bit_flipped_in_two_words_shows(which, word, other, bit):
    damaged = FLATS[which].clone().view(torch.int32)
    mask = 1 << bit if bit < 31 else -(2**31)
    damaged[word] ^= mask
    if other != word:
        damaged[other] ^= mask
    assert checksum(damaged.view(torch.uint8)) != checksum(FLATS[which])


@given(which=flats, size=st.sampled_from(BLOCKS), data=st.data())
def test_a_zeroed_block_shows(which, size, data):
    at = data.draw(st.integers(0, len(FLATS[which]) // size - 1)) * size
    damaged = FLATS[which].clone()
    damaged[at : at + size] = 0
    changed = not torch.equal(damaged, FLATS[which])
    assert (checksum(damaged) != checksum(FLATS[which])) == changed


@given(which=flats, size=st.sampled_from(BLOCKS), data=st.data())
def test_exchanged_blocks_show(which, size, data):
    count = len(FLATS[which]) // size
    one, other = (data.draw(st.integers(0, count - 1)) * size for _ in range(2))
    damaged = FLATS[which].clone()
    damaged[one : one + size], damaged[other : other + size] = (
        FLATS[which][other : other + size],
        FLATS[which][one : one + size],
    )
    changed = not torch.equal(damaged, FLATS[which])
    assert (checksum(damaged) != checksum(FLATS[which])) == changed


def test_blocks_of_bf16_numbers_exchanged_at_a_round_distance_show():
    """They are 256 KiB apart. A sum weighted by place misses them: the differences are multiples of 2**16."""
    flat = torch.randn(1 << 17).to(torch.bfloat16).float()
    damaged = flat.clone()
    damaged[:1024], damaged[65536:66560] = flat[65536:66560], flat[:1024]
    assert checksum(damaged.view(torch.uint8)) != checksum(flat.view(torch.uint8))


def test_a_zeroed_norm_shows():
    """The sum of 1024 ones' words, weighted by place or not, is 0 in 32 bits."""
    flat = torch.ones(4096)
    damaged = flat.clone()
    damaged[1024:2048] = 0
    assert checksum(damaged.view(torch.uint8)) != checksum(flat.view(torch.uint8))


def test_a_checksum_does_not_depend_on_the_size_of_its_chunks(monkeypatch):
    expected = checksum(FLATS[0])
    for chunk in (7, 4096):
        monkeypatch.setattr("orchestrator.models.weight_buckets._CHUNK", chunk)
        assert checksum(FLATS[0]) == expected


def test_a_checksum_by_hand():
    """Computed with Python's integers, without a tensor."""
    words, total = np.random.default_rng(0).integers(0, 2**64, 6, np.uint64), 0
    for place, word in enumerate(words.tolist(), start=1):
        mixed = signed(signed(place * 0x2545_F491_4F6C_DD1D) ^ signed(word))
        for shift, factor in ((32, 0x369D_EA0F_31A5_3F85), (29, 0x5851_F42D_4C95_7F2D), (32, 1)):
            mixed = signed((mixed ^ mixed >> shift) * factor)
        total += mixed
    assert checksum(torch.from_numpy(words.view(np.uint8))) == total % 2**64


def signed(value: int) -> int:
    """The signed 64-bit integer to which the value wraps around."""
    return (value + 2**63) % 2**64 - 2**63


def test_check_names_the_bucket_and_the_version():
    check(FLATS[0], checksum(FLATS[0]), 3, 1)
    with pytest.raises(CorruptWeights, match="bucket 1 of weight version 3 arrived damaged"):
        check(FLATS[1], checksum(FLATS[0]), 3, 1)


def test_a_receiver_holds_the_sent_weights_bit_for_bit():
    sender, model = Model(), Model()
    receiver = Receiver(model)
    assert receiver.version is None
    receiver.load(4, sender.buckets())
    assert receiver.version == 4
    for name, parameter in sender.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_receiver_of_a_damaged_bucket_holds_no_version_and_uses_nothing_of_it(damaged):
    sender, model = Model(), Model()
    receiver = Receiver(model)
    receiver.load(1, Model().buckets())
    before = {name: p.clone() for name, p in model.named_parameters()}
    buckets = sender.buckets()
    buckets[damaged].data[5] ^= 1
    with pytest.raises(CorruptWeights):
        receiver.load(2, buckets)
    assert receiver.version is None
    half = ("first", "second")[damaged]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith(half))
    receiver.load(2, sender.buckets())
    assert receiver.version == 2 and all(
        torch.equal(p, dict(model.named_parameters())[n]) for n, p in sender.named_parameters()
    )


def test_a_receiver_whose_sender_stops_early_holds_no_version():
    def stopping_early() -> Iterator[Bucket]:
        yield Model().buckets()[0]
        raise ConnectionError

    receiver = Receiver(Model())
    receiver.load(1, Model().buckets())
    with pytest.raises(ConnectionError):
        receiver.load(2, stopping_early())
    assert receiver.version is None


@pytest.mark.parametrize(
    ("name", "shape"), [("first.bias", (1,)), ("first.bias", (4, 1)), ("third.bias", (4,))]
)
def test_weights_of_another_model_are_refused_and_not_broadcast(name, shape):
    receiver = Receiver(Model())
    with pytest.raises(CorruptWeights, match=f"weights arrived for {name}"):
        receiver.load(1, [bucket_of({name: torch.zeros(shape)})])
    assert receiver.version is None
