"""Counter-based random words: a number is a function of what it is for, never of how many were drawn before
it."""

import hashlib

from torch import Tensor

WORD = 0xFFFF_FFFF


def mixed(word: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser, a bijection with full avalanche, on Int64 tensors that hold 32-bit values."""
    word = word ^ (word >> 16)
    word = word.mul_(0x85EB_CA6B).bitwise_and_(WORD)
    word = word.bitwise_xor_(word >> 13)
    word = word.mul_(0xC2B2_AE35).bitwise_and_(WORD)
    return word.bitwise_xor_(word >> 16)


def hashed(*what: object) -> int:
    """64 bits from what a number is for: a hash of it, and of nothing else."""
    key = "/".join(map(str, what)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def words(seed: int) -> tuple[int, int]:
    """The two 32-bit words of a seed."""
    return seed >> 32 & WORD, seed & WORD
