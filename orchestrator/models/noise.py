"""Counter-based random numbers: each is a function of its purpose, not of how many were drawn before."""

import hashlib

from torch import Tensor

WORD = 0xFFFF_FFFF


def mixed(word: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser, a bijection with full avalanche. word: Int64 tensor of 32-bit values."""
    word = word ^ (word >> 16)
    word = word.mul_(0x85EB_CA6B).bitwise_and_(WORD)
    word = word.bitwise_xor_(word >> 13)
    word = word.mul_(0xC2B2_AE35).bitwise_and_(WORD)
    return word.bitwise_xor_(word >> 16)


def hashed(*purpose: object) -> int:
    """64-bit hash of a number's purpose, e.g. (seed, step, layer)."""
    key = "/".join(map(str, purpose)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def words(seed: int) -> tuple[int, int]:
    """The two 32-bit words of a seed."""
    return seed >> 32 & WORD, seed & WORD
