"""How a step differs over ranks: each sends a few numbers along at recorded steps, and rank 0 says who is slow."""

import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.profile.clock import COMMUNICATION, PHASES

PLACES = (
    *PHASES,
    COMMUNICATION,
    "allocated_peak_bytes",
    "host_rss_bytes",
    "power_watts",
    "temperature_c",
    "clock_mhz",
    "energy_joules",
)
"""What each rank sends, in this order."""
BUSY = "busy"


def own_numbers(found: Mapping[str, Any]) -> list[float]:
    """What this rank sends of what it has found; NaN for what it does not know."""
    return [math.nan if found.get(name) is None else float(found[name]) for name in PLACES]


def told(numbers: Sequence[Sequence[float]], names: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """`StepRecord.ranks` of what each rank has sent, in the order of ranks; None for a single one.

    `names`: host and device of each rank.
    """
    if len(numbers) < 2:
        return None
    columns = {name: [row[place] for row in numbers] for place, name in enumerate(PLACES) if name != "energy_joules"}
    phases = zip(*(columns[name] for name in PHASES), strict=True)
    # Where waiting is not taken out of the phases, they take all ranks as long as the slowest one.
    columns[BUSY] = [sum(row) + 0 * waited for row, waited in zip(phases, columns[COMMUNICATION], strict=True)]
    spreads = {name: spread(values) for name, values in columns.items()}
    found: dict[str, Any] = {"count": len(numbers), "of": {name: one for name, one in spreads.items() if one}}
    for word, end in (("slowest", "highest"), ("fastest", "lowest")):
        busy = spreads[BUSY]
        found[word] = None if busy is None else _named(busy[end], columns[BUSY], names)
    return found


def total_energy(numbers: Sequence[Sequence[float]]) -> float | None:
    """Joules of all ranks' GPUs; None where one of them does not know."""
    total = sum(row[PLACES.index("energy_joules")] for row in numbers)
    return total if math.isfinite(total) else None


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Least, mean and most, and which ranks have them, of the ranks that know; None if there are no two."""
    known = [(value, rank) for rank, value in enumerate(values) if math.isfinite(value)]
    if len(known) < 2:
        return None
    (least, lowest), (most, highest) = min(known), max(known)
    mean = sum(value for value, _ in known) / len(known)
    return {"min": least, "mean": mean, "max": most, "lowest": lowest, "highest": highest}


def own_name(device: str) -> tuple[str, str]:
    """Host and device of this rank."""
    return socket.gethostname(), device


def _named(rank: int, busy: Sequence[float], names: Sequence[tuple[str, str]]) -> dict[str, Any]:
    host, device = names[rank]
    return {"rank": rank, "host": host, "device": device, "seconds": busy[rank]}
