"""A simulated robot: an arm of two links on a table of coloured discs, and a demonstrator who moves its tip to one.

Many tables at a time, in numpy. Everything is a pure function of a seed, the numbers of the tables and the actions.
Lengths are in units of the table's half width: it reaches from -1 to 1 both ways, and the arm stands in its middle.
"""

from dataclasses import dataclass, replace

import numpy as np

from scaling.data.hashing import derive, derive_each, uniform

CAMERAS = ("overhead", "wrist")
"""The whole table; and what is near the tip, from straight above."""
STATE_DIM, ACTION_DIM = 6, 2
"""Position of the tip, cosines and sines of both joints; how far the tip is to move, both ways."""
COLOURS = {"red": (220, 50, 40), "green": (40, 180, 70), "blue": (50, 90, 230), "yellow": (235, 200, 40)}
DISCS = 3
"""On a table, each of another colour."""
DISC_RADIUS, TIP_RADIUS, ARM_WIDTH = 0.14, 0.05, 0.05
LONGEST_MOVE = 0.12
"""Of the tip, in one step."""
REACHED = 0.08
"""The tip is on a disc where it is as near as this to its middle."""
MOST_STEPS = 40
"""After which a trial has failed: twice what a demonstrator takes across the table, or more."""
_TABLE, _ARM, _TIP = (245, 245, 240), (150, 150, 155), (30, 30, 30)
_WRIST_SIGHT = 0.4
"""From the middle of the wrist's picture to its edge."""
_LINK = 0.5
_NEAREST, _FARTHEST = 0.3, 0.85
"""Discs lie as far as this from the arm's foot."""
_APART = 0.4
"""Between the middles of discs, and between them and where the tip starts, at least."""
_PLACES = 64
"""Places that are drawn for discs and tip; the first that fit are taken."""


@dataclass(frozen=True)
class Tables:
    """Some tables at one moment."""

    tip: np.ndarray
    """[tables, 2]."""
    discs: np.ndarray
    """Middles, [tables, DISCS, 2]."""
    colours: np.ndarray
    """Indices into COLOURS, int64 [tables, DISCS]."""
    wanted: np.ndarray
    """Which disc the instruction names, int64 [tables]."""

    def __len__(self) -> int:
        return len(self.tip)

    @property
    def goal(self) -> np.ndarray:
        """The middle of the disc that is named, [tables, 2]."""
        return self.discs[np.arange(len(self)), self.wanted]


def start(seed: int, numbers: np.ndarray) -> Tables:
    """The tables of these numbers (integers, each another table) as they are at first."""
    keys = derive_each(derive(seed, 0x61726D), numbers.astype(np.uint64))
    draws = uniform(keys, 2 * _PLACES + len(COLOURS) + 1)
    radius = np.sqrt(_NEAREST**2 + (_FARTHEST**2 - _NEAREST**2) * draws[:, :_PLACES])
    angle = 2 * np.pi * draws[:, _PLACES : 2 * _PLACES]
    places = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=2)
    chosen = np.stack([_first_apart(own, DISCS + 1) for own in places])
    colours = np.argsort(draws[:, 2 * _PLACES : -1], axis=1)[:, :DISCS]
    wanted = np.minimum((draws[:, -1] * DISCS).astype(np.int64), DISCS - 1)
    return Tables(chosen[:, 0], chosen[:, 1:], colours, wanted)


def some(tables: Tables, which: np.ndarray) -> Tables:
    """The tables with these indices."""
    return Tables(tables.tip[which], tables.discs[which], tables.colours[which], tables.wanted[which])


def instructions(tables: Tables) -> list[str]:
    """What the arm is told, for each table."""
    names = list(COLOURS)
    named = tables.colours[np.arange(len(tables)), tables.wanted]
    return [f"touch the {names[colour]} disc" for colour in named.tolist()]


def move(tables: Tables, actions: np.ndarray) -> Tables:
    """The tables a step later; `actions` [tables, ACTION_DIM] are cut to LONGEST_MOVE and to the arm's reach."""
    there = tables.tip + _cut(actions.astype(np.float64), LONGEST_MOVE)
    return replace(tables, tip=_cut(there, 2 * _LINK))


def demonstrate(tables: Tables) -> np.ndarray:
    """What the demonstrator does: straight to the disc that is named, [tables, ACTION_DIM]."""
    return _cut(tables.goal - tables.tip, LONGEST_MOVE)


def reached(tables: Tables) -> np.ndarray:
    """Whether the tip is on the disc that is named, bool [tables]."""
    return np.linalg.norm(tables.goal - tables.tip, axis=1) <= REACHED


def state(tables: Tables) -> np.ndarray:
    """What the arm knows of itself, fp32 [tables, STATE_DIM]."""
    _, first, second = _joints(tables.tip)
    parts = (tables.tip, np.cos(first), np.sin(first), np.cos(second), np.sin(second))
    return np.concatenate([part.reshape(len(tables), -1) for part in parts], axis=1).astype(np.float32)


def pictures(tables: Tables, size: int) -> np.ndarray:
    """What the cameras see, uint8 [tables, cameras, size, size, 3]."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    grid = np.stack(np.meshgrid(line, -line), axis=2)  # x to the right, y upwards
    wrist = tables.tip[:, None, None] + _WRIST_SIGHT * grid
    overhead = np.broadcast_to(grid, wrist.shape)
    return np.stack([_seen(tables, points, 2 / size) for points in (overhead, wrist)], axis=1)


# ---------------------------------------------------------------- geometry and light


def _seen(tables: Tables, points: np.ndarray, blur: float) -> np.ndarray:
    """The colour at each point [tables, height, width, 2] of a table; edges are as wide as `blur`."""
    image = np.full((*points.shape[:3], 3), _TABLE, np.float64)
    elbow, _, _ = _joints(tables.tip)
    foot = np.zeros_like(elbow)

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:
        share = np.clip(0.5 - distance / blur, 0, 1)[..., None]
        image[:] = share * colour + (1 - share) * image

    for ends in ((foot, elbow), (elbow, tables.tip)):
        paint(_from_line(points, *ends) - ARM_WIDTH / 2, np.array(_ARM))
    palette = np.array(list(COLOURS.values()))
    for disc in range(DISCS):
        middle = tables.discs[:, disc, None, None]
        colour = palette[tables.colours[:, disc]][:, None, None]
        paint(np.linalg.norm(points - middle, axis=3) - DISC_RADIUS, colour)
    paint(np.linalg.norm(points - tables.tip[:, None, None], axis=3) - TIP_RADIUS, np.array(_TIP))
    return image.round().astype(np.uint8)


def _from_line(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of each point [tables, height, width, 2] from its table's line between two ends [tables, 2]."""
    along = (end - start)[:, None, None]
    from_start = points - start[:, None, None]
    share = (from_start * along).sum(axis=3) / np.maximum((along**2).sum(axis=3), 1e-12)
    return np.linalg.norm(from_start - np.clip(share, 0, 1)[..., None] * along, axis=3)


def _joints(tip: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The elbow [tables, 2] and the angles of both joints [tables] for a tip; of two ways the elbow is on the left."""
    reach = np.linalg.norm(tip, axis=1)
    second = -2 * np.arccos(np.clip(reach / (2 * _LINK), 0, 1))
    first = np.arctan2(tip[:, 1], tip[:, 0]) - second / 2
    return _LINK * np.stack((np.cos(first), np.sin(first)), axis=1), first, second


def _cut(vectors: np.ndarray, longest: float) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * np.minimum(1, longest / np.maximum(length, 1e-12))


def _first_apart(places: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of these places [_PLACES, 2] that are apart from those taken before."""
    taken: list[np.ndarray] = []
    for place in places:
        if all(np.linalg.norm(place - other) >= _APART for other in taken):
            taken.append(place)
        if len(taken) == count:
            return np.stack(taken)
    raise AssertionError("a table has room for more discs than these")
