"""Texts of many lengths put into samples of one length."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which texts share a sample: each list has the numbers of texts whose lengths add up to `capacity` at most.

    Best fit, the longest first (Johnson, "Near-optimal bin packing algorithms", 1973): a text goes where it leaves the
    least room. Every length must be in 1 .. capacity. The same on every machine.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    samples: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    """Numbers of the samples that have so much room left."""
    rooms = 0
    """Bit r is set where a sample has room r: the least room that is enough is found at once."""
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            sample = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sample = capacity, len(samples)
            samples.append([])
        samples[sample].append(text)
        with_room[room - length].append(sample)
        rooms |= 1 << (room - length)
    return samples
