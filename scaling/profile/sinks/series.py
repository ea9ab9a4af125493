"""Curves of a whole run in little memory, and as characters."""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .,:-=+*#"


class Series:
    """The finite values of a run. Once there are too many, each two neighbours become their mean."""

    def __init__(self, most: int = 512) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self._most = most
        self._means: list[float] = []
        self._each = 1
        """Values behind each mean."""
        self._sum, self._count = 0.0, 0
        """Of those that are not enough for a mean yet."""

    def add(self, value: float) -> None:
        """Take note of a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self.first = value if self.first is None else self.first
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._most:
            self._means = [sum(pair) / 2 for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def columns(self, width: int) -> list[float]:
        """The curve in `width` values, each the mean over its share of the run; none before the first."""
        means = [*self._means, *([self._sum / self._count] if self._count else [])]
        if len(means) <= width:
            return [means[i * len(means) // width] for i in range(width)] if means else []
        edges = [round(i * len(means) / width) for i in range(width + 1)]
        return [sum(means[a:b]) / (b - a) for a, b in pairwise(edges)]


def chart(values: Sequence[float], height: int, blocks: str = BLOCKS) -> list[str]:
    """`values` as columns of `height` characters, the lowest of them still to be seen; rows from the top."""
    if not values:
        return [""] * height
    low, high = min(values), max(values)
    steps = 8 * height - 1
    levels = [1 + round(steps * (value - low) / (high - low)) if high > low else 1 for value in values]
    return [
        "".join(blocks[min(8, max(0, level - 8 * (height - 1 - row)))] for level in levels) for row in range(height)
    ]
