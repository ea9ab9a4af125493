"""Random numbers that are a pure function of where they are used, the same on any machine and numpy."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: the distance between the inputs of neighbours."""
_MASK = 2**64 - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values of any shape, in which each input bit changes half the output bits.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def mix_one(value: int) -> int:
    """`mix` of one value in Python's own numbers, modulo 2^64: numpy takes thirty times as long for a single one."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _FIRST & _MASK
    value = (value ^ (value >> 27)) * _SECOND & _MASK
    return value ^ (value >> 31)


def derive(*words: int) -> int:
    """One 64-bit key from whole numbers; another order or number of words gives another key."""
    key = 0
    for word in words:
        key = derive_one(key, word)
    return key


def derive_one(key: int, word: int) -> int:
    """`derive`'s last step."""
    return mix_one(word + key + GOLDEN)


def derive_each(key: int, words: np.ndarray) -> np.ndarray:
    """`derive_one` for an array of words (uint64, any shape): one key for each."""
    return mix(words + np.uint64((key + GOLDEN) & _MASK))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """Independent draws from 0 .. 1 for each key, float64 [len(keys), count]."""
    places = derive_each(0, np.arange(1, count + 1, dtype=np.uint64))
    return (derive_each(6, keys[:, None] ^ places[None, :]) >> np.uint64(11)) * 2.0**-53
