"""The order of the samples: which sample of the dataset stands at which place of the whole training run."""

import numpy as np

from scaling.data.hashing import derive, derive_each, mix

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
    samples = np.arange(first, first + count, dtype=np.uint64)
    epochs, values = samples // np.uint64(size), samples % np.uint64(size)
    keys = derive_each(derive(seed), epochs)
    half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits, rounded up

    values = _feistel(values, keys, half)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """A permutation of 0 .. 4^half - 1 for each key, applied to the value beside that key."""
    low_bits, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = values >> shift, values & low_bits
    for round_number in range(_ROUNDS):
        round_keys = derive_each(round_number, keys)
        left, right = right, left ^ (mix(right ^ round_keys) & low_bits)
    return (left << shift) | right
