"""Made sequences: a pattern that a small model learns in a few hundred steps, and no file at all."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from scaling.data.dataset import MicroBatch, from_windows
from scaling.data.hashing import GOLDEN, derive, derive_each

_ALPHABET = 256
"""Tokens in use: few, so that the pattern can be learnt in little time whatever the vocabulary."""
_RULES = 4
"""Sequences follow one of this many rules, so that the context says more than the last token alone."""
_NOISE = 1 / 16
"""Share of tokens replaced by any other: the loss has a floor above 0, as with text."""


@dataclass(frozen=True)
class SyntheticDataset:
    """Sequences x[t+1] = (a x[t] + b) mod m, with noise on what is seen of them.

    The start, the rule (a, b) and the noise are pure functions of (seed, stream, index); m is the smaller of the
    vocabulary and 256. With `masked_fraction` f, the share of masked targets is drawn for each sample from a range
    within 0 .. min(1, 2 f) whose mean is f; at least one target of each sample stays.
    """

    seed: int
    stream: int
    """0 for training and 1 for validation: other streams hold other sequences."""
    samples: int
    sequence_length: int
    vocab_size: int
    masked_fraction: float = 0.0
    bytes_per_token: float | None = None

    @property
    def fingerprint(self) -> str:
        return repr((self.stream, self.samples, self.vocab_size, self.masked_fraction))

    @property
    def terms_per_sample(self) -> int | None:
        return None if self.masked_fraction else self.sequence_length

    def __len__(self) -> int:
        return self.samples

    def read(self, indices: np.ndarray) -> MicroBatch:
        """The samples with these indices; see `Dataset.read`."""
        assert indices.min() >= 0 and indices.max() < self.samples, "index outside the dataset"
        keys = derive_each(derive(self.seed, self.stream), indices.astype(np.uint64))
        windows = self._sequences(keys)
        if not self.masked_fraction:
            return from_windows(windows)
        return from_windows(windows, _masks(keys, self.sequence_length, self.masked_fraction))

    def _sequences(self, keys: np.ndarray) -> np.ndarray:
        """Token ids, int64 [len(keys), sequence_length + 1]."""
        modulus, length = min(self.vocab_size, _ALPHABET), self.sequence_length + 1
        factors, terms = _closed_forms(modulus, length)
        rules = _uniform(derive_each(1, keys), _RULES)
        starts = _uniform(derive_each(2, keys), modulus)
        clean = (factors[rules] * starts[:, None] + terms[rules]) % modulus

        noise = _at_positions(derive_each(3, keys), length)
        noisy = (noise >> np.uint64(32)) < int(_NOISE * 2**32)
        return np.where(noisy, _uniform(noise, modulus), clean)


def _masks(keys: np.ndarray, length: int, fraction: float) -> np.ndarray:
    """Which targets are masked, bool [len(keys), length]."""
    low, high = max(0.0, 2 * fraction - 1), min(1.0, 2 * fraction)
    shares = low + (high - low) * (_uniform(derive_each(4, keys), 2**32) / 2**32)
    draws = (_at_positions(derive_each(5, keys), length) >> np.uint64(32)) / 2**32
    masked = draws < shares[:, None]
    masked[np.arange(len(keys)), draws.argmax(axis=1)] = False  # one target is always left
    return masked


@lru_cache(maxsize=8)  # the same for each batch; takes some milliseconds for long sequences
def _closed_forms(modulus: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and terms, int64 [rules, length], with x[t] = (factor[t] x[0] + term[t]) mod modulus for each rule."""
    # A factor prime to the modulus makes every step reversible, so that no sequence collapses into another.
    coprime = [a for a in range(1, 4 * modulus * _RULES + 2, 4) if math.gcd(a, modulus) == 1][:_RULES]
    tables = np.zeros((2, _RULES, length), dtype=np.int64)
    for rule, a in enumerate(coprime):
        factor, term = 1, 0
        for t in range(length):
            tables[:, rule, t] = factor, term
            factor, term = a * factor % modulus, (a * term + 2 * rule + 1) % modulus
    return tables[0], tables[1]


def _uniform(draws: np.ndarray, bound: int) -> np.ndarray:
    """Whole numbers in 0 .. bound-1 (int64; bound <= 2^32) from the low 32 bits of the draws."""
    return (((draws & np.uint64(0xFFFFFFFF)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def _at_positions(keys: np.ndarray, length: int) -> np.ndarray:
    """Independent draws for each position of each sample, uint64 [len(keys), length]."""
    steps = np.arange(length, dtype=np.uint64) * np.uint64(GOLDEN)
    return derive_each(0, keys[:, None] + steps[None, :])
