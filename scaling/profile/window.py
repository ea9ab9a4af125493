"""What a device's samples come to between two records: means, peaks, new errors and energy. Knows no driver."""

import math
from collections.abc import Mapping
from typing import Any

MEANS = ("utilization", "power_watts", "clock_mhz")
PEAKS = ("used_bytes", "process_bytes", "temperature_c", "max_clock_mhz")
UNKNOWN: dict[str, Any] = dict.fromkeys((*PEAKS, *MEANS, "throttle", "ecc_errors", "xid_errors", "energy_joules"))
"""What is told of a device that says nothing."""


class Window:
    """Samples since the last `take`. A sample maps the names of `UNKNOWN` to values, as far as they are known.

    In a sample "throttle" is any collection of reasons; "ecc_errors" and "xid_errors" count since the driver was loaded
    and since the watch began; "energy_joules" counts from anywhere.
    """

    def __init__(self, interval_s: float) -> None:
        """`interval_s`: how often samples are meant to come."""
        self._interval_s = interval_s
        self._levels = _Levels()
        self._ecc, self._xid = _Count(None), _Count(0)
        self._energy = _Energy()
        self._latest: Mapping[str, Any] | None = None
        self.heard_s = -math.inf
        """When the latest sample was taken."""

    @property
    def patience_s(self) -> float:
        """A sample older than this says nothing of the present. Drivers that are busy have been slow by seconds."""
        return 2 * self._interval_s + 10

    def add(self, at_s: float, sample: Mapping[str, Any]) -> None:
        """A sample of the time `at_s`."""
        self.heard_s, self._latest = at_s, sample
        self._levels.add(sample)
        self._ecc.add(sample.get("ecc_errors"))
        self._xid.add(sample.get("xid_errors"))
        self._energy.add(at_s, sample.get("energy_joules"), sample.get("power_watts"))

    def take(self, now_s: float) -> dict[str, Any]:
        """What the samples since the last `take` come to; where there are none, what the latest says."""
        if self._levels.empty:
            if self._latest is None or now_s - self.heard_s > self.patience_s:
                self._energy.lose()
                return dict(UNKNOWN)
            self._levels.add(self._latest)
        levels, self._levels = self._levels.values(), _Levels()
        return {
            **levels,
            "ecc_errors": self._ecc.take(),
            "xid_errors": self._xid.take(),
            "energy_joules": self._energy.take(now_s, reach_s=2 * self._interval_s),
        }


class _Levels:
    """Running means and peaks, and all reasons for throttling."""

    def __init__(self) -> None:
        self.empty = True
        self._sums = dict.fromkeys(MEANS, 0.0)
        self._counts = dict.fromkeys(MEANS, 0)
        self._peaks: dict[str, Any] = dict.fromkeys(PEAKS)
        self._reasons: set[str] | None = None

    def add(self, sample: Mapping[str, Any]) -> None:
        self.empty = False
        for name in MEANS:
            if (value := sample.get(name)) is not None:
                self._sums[name] += value
                self._counts[name] += 1
        for name in PEAKS:
            if (value := sample.get(name)) is not None:
                highest = self._peaks[name]
                self._peaks[name] = value if highest is None else max(highest, value)
        if (reasons := sample.get("throttle")) is not None:
            self._reasons = (self._reasons or set()) | set(reasons)

    def values(self) -> dict[str, Any]:
        means = {name: self._sums[name] / count if count else None for name, count in self._counts.items()}
        return {**self._peaks, **means, "throttle": None if self._reasons is None else sorted(self._reasons)}


class _Count:
    """New events, from a count that may start anew when a driver is reset."""

    def __init__(self, before: int | None) -> None:
        """`before`: the count at the beginning; None: what the first sample says."""
        self._count = before
        self._new = 0
        self._known = False

    def add(self, count: int | None) -> None:
        self._known = count is not None
        if count is None:
            return
        if self._count is not None:
            self._new += count - self._count if count >= self._count else count
        self._count = count

    def take(self) -> int | None:
        new, self._new = self._new, 0
        return new if new or self._known else None


class _Energy:
    """Joules from a counter, or from power by the trapezoidal rule where the counter says nothing.

    Records may follow each other faster than samples. What was used since the latest sample is then estimated from its
    power, and set off against what the next one says: single windows are estimates, their sum is what was measured.
    """

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._counter: float | None = None
        self._power: float | None = None
        self._rate = 0.0
        self._total = 0.0
        self._told: float | None = 0.0
        """How much of the total, estimates included, has been taken; None: unknown energy lies between."""

    def add(self, at_s: float, counter: float | None, power: float | None) -> None:
        if self._at_s is not None:
            seconds = at_s - self._at_s
            joules = self._since(seconds, counter, power)
            if joules is None:
                self.lose()
            else:
                self._total += joules
                self._rate = joules / seconds if seconds > 0 else 0.0
        self._at_s, self._counter, self._power = at_s, counter, power
        if power is not None:
            self._rate = power

    def lose(self) -> None:
        """Nothing is known of some of the time since the last `take`."""
        self._told = None

    def take(self, now_s: float, reach_s: float) -> float | None:
        """Joules since the last time; of at most `reach_s` after the latest sample."""
        if self._at_s is None or (self._counter is None and self._power is None):
            self.lose()
            return None
        total = self._total + self._rate * min(max(0.0, now_s - self._at_s), reach_s)
        if self._told is None:
            self._told = total
            return None
        told, self._told = self._told, max(self._told, total)
        return self._told - told

    def _since(self, seconds: float, counter: float | None, power: float | None) -> float | None:
        """Joules since the latest sample; None where neither is known at both ends."""
        if counter is not None and self._counter is not None and counter >= self._counter:
            return counter - self._counter
        if power is not None and self._power is not None:
            return (power + self._power) / 2 * seconds
        return None
