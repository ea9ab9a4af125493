"""What a recorded step computes: the "work" of an inventory file, a list of parts.

    {"blocks": [paths of alike blocks; none: what is outside of them], "forward": {…}, "backward": {…}}

Each direction has

    "products"    [batch, rows, inner, columns, how many] of matrix products
    "attention"   [tokens that are attended to, 1 if causal, 1 if of a backward pass, FLOPs] of attention kernels,
                  masking not discounted
    "other"       FLOPs of other kernels that torch's flop counter knows: convolutions, say
    "bytes"       read and written by all else
    "kernels"     their number

and each size but the last stands as [in any case, for each sequence].
"""

from collections.abc import Mapping, Sequence
from typing import Any

Direction = Mapping[str, Any]
Part = Mapping[str, Any]
DIRECTIONS = ("forward", "backward")
NEEDED_BACKWARD = 4 / 5
"""Of the products of attention's backward pass: the fifth makes the scores a second time."""


def recorded_flops(work: Sequence[Part]) -> float:
    """FLOPs of one sequence, of both passes."""
    return float(sum(max(1, len(part["blocks"])) * _flops(part[way]) for part in work for way in DIRECTIONS))


def sized(size: Sequence[int], micro_batch: int) -> int:
    """A size for so many sequences."""
    return size[0] + size[1] * micro_batch


def _flops(way: Direction) -> float:
    """Of one sequence more: what does not depend on their number is left out, and scores that are made again too."""
    products = sum(2 * count * (_volume(sizes, 2) - _volume(sizes, 1)) for *sizes, count in way["products"])
    attention = sum(flops[1] * (NEEDED_BACKWARD if back else 1) for _, _, back, flops in way["attention"])
    return products + attention + way["other"][1]


def _volume(sizes: Sequence[Sequence[int]], micro_batch: int) -> int:
    found = 1
    for size in sizes:
        found *= sized(size, micro_batch)
    return found
