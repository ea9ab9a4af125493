"""Statistics that a few odd values do not move."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

MAD_TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution times this is its standard deviation: 1 / quantile(3/4)."""
MOST_FOR_SLOPE = 100
"""Points that a slope is taken over: it looks at every pair of them."""


def spread(values: Sequence[float]) -> float:
    """How far values lie from their median: a standard deviation by the median absolute deviation."""
    middle = statistics.median(values)
    return MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in values)


def noise(values: Sequence[float]) -> float:
    """The standard deviation of values around a smooth course, whatever that is (after Gasser et al., 1986).

    A value less the mean of its neighbours has no trend left, and 3/2 of the noise's variance; doubled, 6 times it.
    """
    bends = [before - 2 * value + after for before, value, after in zip(values, values[1:], values[2:], strict=False)]
    return MAD_TO_SIGMA * statistics.median(abs(bend) for bend in bends) / math.sqrt(6) if bends else 0.0


def slope(values: Sequence[float]) -> float:
    """Change from one value to the next: the median over all pairs (Theil, 1950; Sen, 1968)."""
    stride = -(-len(values) // MOST_FOR_SLOPE)
    points = list(enumerate(values))[::stride]
    rates = [(y - x) / (j - i) for place, (i, x) in enumerate(points) for j, y in points[place + 1 :]]
    return statistics.median(rates) if rates else 0.0


def off_trend(values: Sequence[float]) -> float:
    """How far values swing around a straight line through them: `spread` of what is left."""
    rate = slope(values)
    return spread([value - rate * index for index, value in enumerate(values)])


def above_before(values: Sequence[float], window: int) -> list[tuple[int, float, float]]:
    """Place, value and the median of the `window` values before it, of each that has as many."""
    return [(i, values[i], statistics.median(values[i - window : i])) for i in range(window, len(values))]


def parts(values: Sequence[float], count: int) -> list[float]:
    """Medians of `count` equal stretches, in order."""
    edges = [round(len(values) * i / count) for i in range(count + 1)]
    return [statistics.median(values[begin:end]) for begin, end in pairwise(edges)]


def rounded(value: float, digits: int = 1) -> float:
    """`value` to as many significant digits: a number to type."""
    return float(f"{value:.{digits - 1}e}")


def whole(value: float) -> int:
    """The largest number not above `value` that is 1, 2 or 5 times a power of ten, at least 1: an interval to type."""
    value = max(1.0, value)
    unit = 10 ** math.floor(math.log10(value))
    return next(factor * unit for factor in (5, 2, 1) if factor * unit <= value)
