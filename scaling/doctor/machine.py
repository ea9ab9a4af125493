"""Whether one of the machines is slow, hot or broken."""

import statistics
from collections import Counter
from typing import Any

from scaling.doctor.case import Case, enough
from scaling.doctor.rule import CannotJudge, Symptom, percent, rule
from scaling.summarize import at, is_number

BEHIND = 0.1
"""Share by which the slowest rank is busier than the fastest. Equal cards differ by a few per cent; everybody waits for
the slowest, so all of it is lost on every other rank."""
OFTEN = 0.5
"""Share of the records that must agree: by chance another rank is the slowest in each."""
HOTTER_C = 15.0
"""Degrees above the mean of all ranks: more than what the place in a chassis makes."""


@rule(
    "warning",
    "one rank holds up all others",
    looks_at="the slowest and the fastest rank of each record by busy time, where communication is known; else the "
    "spread of the wait for data and of clocks over the ranks",
    threshold=f"at most {percent(BEHIND)} between them, or another rank each time (none in over {percent(OFTEN)} of "
    "the records)",
    advice="Look at that machine: its temperature and clocks, other jobs on it, its link and its storage; leave it "
    "out if it stays slow.",
)
def stragglers(case: Case) -> Symptom | None:
    if case.world_size == 1:
        return None
    case.need_gpu()
    steps = [step for step in case.run.warm if isinstance(step.get("ranks"), dict)]
    enough(steps, 5, "records of the ranks")
    named = [step for step in steps if all(isinstance(step["ranks"].get(end), dict) for end in ("slowest", "fastest"))]
    found = _slowest(named, len(steps)) if named else _waits_for_data(steps) or _slow_clock(steps)
    if found is None:
        return None
    rank, evidence = found
    return Symptom(f"{evidence}{_condition(steps, rank)}.")


def _slowest(steps: list[dict[str, Any]], of: int) -> tuple[int, str] | None:
    behind: list[tuple[dict[str, Any], float]] = []
    for step in steps:
        slowest, fastest = step["ranks"]["slowest"], step["ranks"]["fastest"]
        slow_s, fast_s = slowest.get("seconds"), fastest.get("seconds")
        if is_number(slowest.get("rank")) and is_number(slow_s) and is_number(fast_s) and fast_s > 0:
            gap = slow_s / fast_s - 1
            behind += [(slowest, gap)] if gap > BEHIND else []
    counts = Counter(slowest["rank"] for slowest, _ in behind)
    if not counts:
        return None
    rank, times = counts.most_common(1)[0]
    if times <= OFTEN * of:
        return None
    gap = statistics.median(gap for slowest, gap in behind if slowest["rank"] == rank)
    slowest = next(slowest for slowest, _ in reversed(behind) if slowest["rank"] == rank)
    where = ", ".join(f"{name} {slowest[name]}" for name in ("host", "device") if slowest.get(name) is not None)
    return rank, f"rank {rank} ({where}) was the slowest in {times} of {of} records, by {percent(gap)} at the median"


def _waits_for_data(steps: list[dict[str, Any]]) -> tuple[int, str] | None:
    late: list[tuple[float, float]] = []
    for step in steps:
        longest, mean, rank = (at(step, "ranks", "of", "data", name) for name in ("max", "mean", "highest"))
        seconds = step.get("step_seconds")
        if is_number(longest) and is_number(mean) and is_number(rank) and is_number(seconds) and seconds > 0:
            gap = (longest - mean) / seconds
            late += [(rank, gap)] if gap > BEHIND else []
    counts = Counter(rank for rank, _ in late)
    if not counts:
        return None
    rank, times = counts.most_common(1)[0]
    if times <= OFTEN * len(steps):
        return None
    gap = statistics.median(gap for other, gap in late if other == rank)
    evidence = f"rank {rank:.0f} waited longest for its data in {times} of {len(steps)} records"
    return int(rank), f"{evidence}, {percent(gap)} of a step longer than the mean"


def _slow_clock(steps: list[dict[str, Any]]) -> tuple[int, str] | None:
    lowest = Counter(at(step, "ranks", "of", "clock_mhz", "lowest") for step in steps)
    rank, _ = lowest.most_common(1)[0]
    if not is_number(rank):
        return None
    behind = [1 - low / mean for low, mean in _ends(steps, "clock_mhz", "min", "lowest", int(rank))]
    slow = [gap for gap in behind if gap > BEHIND]
    if len(slow) <= OFTEN * len(steps):
        return None
    return int(rank), f"rank {rank:.0f} had the lowest clock in {len(behind)} of {len(steps)} records"


def _condition(steps: list[dict[str, Any]], rank: int) -> str:
    """What is known of the temperature and the clocks of that rank."""
    heat = [high - mean for high, mean in _ends(steps, "temperature_c", "max", "highest", rank)]
    clocks = [1 - low / mean for low, mean in _ends(steps, "clock_mhz", "min", "lowest", rank)]
    told = ""
    if heat and statistics.median(heat) > HOTTER_C:
        told += f"; it is {statistics.median(heat):.0f} degrees hotter than the mean"
    if clocks and statistics.median(clocks) > BEHIND:
        told += f"; its clock is {percent(statistics.median(clocks))} lower than the mean"
    return told


def _ends(steps: list[dict[str, Any]], name: str, end: str, whose: str, rank: int) -> list[tuple[float, float]]:
    """The highest or lowest of all ranks and their mean, where it is that of `rank`."""
    spans = [(at(step, "ranks", "of", name, end), at(step, "ranks", "of", name, "mean"), step) for step in steps]
    return [
        (value, mean)
        for value, mean, step in spans
        if is_number(value) and is_number(mean) and mean > 0 and at(step, "ranks", "of", name, whose) == rank
    ]


SLOW_CLOCK = 0.85
"""Of the card's highest clock. Cards at their power limit run large matrix products some per cent below it; under load
less than this is heat or a cap that somebody set."""
BUSY = 0.5
"""Utilisation from which on a low clock says something: an idle card lowers it to save power."""
THROTTLED = 0.2
"""Share of the records in which the driver names such a reason: once in a while is a hot afternoon."""
HARMFUL = ("thermal", "hw_slowdown", "brake")
"""Parts of NVML's reasons that mean heat or a failing power supply. sw_power_cap alone is how a card at full load is
governed."""


@rule(
    "warning",
    "the GPU is throttled",
    looks_at="rank 0's GPU: the driver's reasons for throttling (heat, power brake), and its clock under load",
    threshold=f"in at most {percent(THROTTLED)} of the records; a clock of {percent(SLOW_CLOCK)} of its highest "
    "(median)",
    advice="Look at its cooling and its power limit (`nvidia-smi -q -d PERFORMANCE,POWER,CLOCK`): nothing in the spec "
    "helps.",
)
def throttled(case: Case) -> Symptom | None:
    case.need_gpu()
    records = [step["device"] for step in case.run.warm if isinstance(step.get("device"), dict)]
    told = [one["throttle"] for one in records if isinstance(one.get("throttle"), list)]
    loaded = [one for one in records if is_number(one.get("utilization")) and one["utilization"] >= BUSY]
    clocks = [
        one["clock_mhz"] / one["max_clock_mhz"]
        for one in loaded
        if is_number(one.get("clock_mhz")) and is_number(one.get("max_clock_mhz")) and one["max_clock_mhz"] > 0
    ]
    if max(len(told), len(clocks)) < 5:
        raise CannotJudge("the driver said too little of the GPU")
    harmful = [[reason for reason in reasons if any(word in reason for word in HARMFUL)] for reasons in told]
    often = sum(bool(reasons) for reasons in harmful) / len(told) if told else 0.0
    slow = statistics.median(clocks) if len(clocks) >= 5 else 1.0
    if often <= THROTTLED and slow >= SLOW_CLOCK:
        return None
    reasons = sorted({reason for one in harmful for reason in one}) or sorted({r for one in told for r in one})
    heat = max((one["temperature_c"] for one in records if is_number(one.get("temperature_c"))), default=None)
    return Symptom(
        f"the driver throttled it in {percent(often)} of the records ({', '.join(reasons) or 'no reason given'}); its "
        f"clock was {percent(slow)} of the highest at the median"
        + ("." if heat is None else f", its highest temperature {heat:.0f} degrees C.")
    )


@rule(
    "error",
    "the GPU reports errors",
    looks_at="new uncorrected memory errors (ECC) and XID errors of rank 0's GPU",
    threshold="not one",
    advice="Do not trust what was computed since: look at `dmesg` and `nvidia-smi -q -d ECC`, take the card out of "
    "use, and go on from a checkpoint before the error.",
)
def gpu_errors(case: Case) -> Symptom | None:
    case.need_gpu()
    seen = [
        (line["step"], at(line, "device", "ecc_errors"), at(line, "device", "xid_errors")) for line in case.run.lines
    ]
    seen = [(step, ecc, xid) for step, ecc, xid in seen if is_number(ecc) or is_number(xid)]
    enough(seen, 1, "records of the GPU's errors")
    bad = [(step, ecc or 0, xid or 0) for step, ecc, xid in seen if (ecc or 0) + (xid or 0) > 0]
    if not bad:
        return None
    ecc, xid = sum(one for _, one, _ in bad), sum(one for _, _, one in bad)
    return Symptom(f"rank 0's GPU reported {ecc:.0f} ECC and {xid:.0f} XID errors, the first up to step {bad[0][0]:,}.")


RULES = (gpu_errors, stragglers, throttled)
