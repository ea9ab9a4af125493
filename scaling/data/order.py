"""The order of the samples: which sample of the dataset stands at which place of the whole training run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from scaling.data.hashing import derive, derive_each, derive_one, mix, mix_one

_FEW = 8
"""So many samples are looked up one by one in Python's own numbers: 11 us each where `size` is a power of 4, for which
numpy takes 110 us however few they are, and 44 us each where it is one more, for which numpy takes 1,400."""
_ROUNDS = 8
"""Luby and Rackoff prove four enough for large sets; small ones want more (NIST SP 800-38G takes 8 to 10)."""


def sample_indices(first: int, count: int, size: int, seed: int) -> np.ndarray:
    """Dataset indices of the global samples first .. first+count-1: int64 [count], each in 0 .. size-1.

    A pure function of (seed, epoch, global sample index), where global sample g belongs to epoch g // size: each epoch
    has a permutation of its own, and nothing depends on world size, micro-batch or where a run was resumed.

    Neither state nor memory grow with `size`: a Feistel network (Luby and Rackoff, "How to construct pseudorandom
    permutations from pseudorandom functions", 1988) permutes the smallest power of 4 that holds `size`, and cycle
    walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) brings that down to `size` itself: a
    value that falls outside is permuted again until it is inside, after 4 permutations or fewer on average.
    """
    assert first >= 0 and count >= 0 and 0 < size <= 2**62, (first, count, size)
    if count <= _FEW:
        return np.array([_index(sample, size, seed) for sample in range(first, first + count)], dtype=np.int64)
    samples = np.arange(first, first + count, dtype=np.uint64)
    epochs, values = samples // np.uint64(size), samples % np.uint64(size)
    keys = derive_each(derive(seed), epochs)
    half = np.uint64(_half(size))

    values = _feistel(values, keys, half, derive_each, mix)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half, derive_each, mix)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _index(sample: int, size: int, seed: int) -> int:
    """`sample_indices` of one sample."""
    epoch, value = divmod(sample, size)
    key, half = derive(seed, epoch), _half(size)
    value = _feistel(value, key, half, derive_one, mix_one)
    while value >= size:
        value = _feistel(value, key, half, derive_one, mix_one)
    return value


def _half(size: int) -> int:
    """Half the bits of an index, rounded up."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _feistel(values: Any, keys: Any, half: Any, derived: Callable[[int, Any], Any], mixed: Callable[[Any], Any]) -> Any:
    """A permutation of 0 .. 4^half - 1 for each key, applied to the value beside that key: of numbers or of arrays."""
    low_bits = type(half)(2 ** int(half) - 1)
    left, right = values >> half, values & low_bits
    for round_number in range(_ROUNDS):
        left, right = right, left ^ (mixed(right ^ derived(round_number, keys)) & low_bits)
    return (left << half) | right
