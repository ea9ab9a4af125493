"""The parts of RESULTS.md that are not of benchmarks.run: beside other toolkits; what the loop and its record cost."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.units import format_seconds

PLAIN_BAR, RIVAL_BAR = 0.99, 1.05
"""What our tokens/s are to be at least: beside the plain loop's, and beside the best of RIVALS."""
RIVALS = ("trainer", "accelerate", "fabric")


def documents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each result in `folder`."""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict):
            yield path.name, document


def sections(read: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Lines about those of the documents that benchmarks.peers, benchmarks.overhead and benchmarks.profiler wrote."""
    for heading, key, tell in (
        ("Beside other toolkits", "jobs", _peers),
        ("What the loop costs", "overhead_seconds", _overhead),
        ("What recording costs", "stopwatch", _recording),
    ):
        found = [(name, document) for name, document in read if key in document]
        if found:
            yield from (f"## {heading}", "")
        for name, document in found:
            where = document["environment"]
            commit, versions = (where["commit"] or "unknown")[:12], where["versions"]
            place = where.get("cpu") or where["device"]
            if where["device"] == "cpu":
                place += f", {where['cores']} cores, no GPU"
            yield f"{name}: {place}; commit {commit}; torch {versions['torch']}."
            yield ""
            yield from tell(document)
            yield ""


def _peers(document: dict[str, Any]) -> Iterator[str]:
    rows = [row for job in document["jobs"] for row in job["rows"]]
    turns, starts = (max(len(row.get(name, ())) for row in rows) for name in ("turns", "starts"))
    yield f"Same weights, samples, optimizer and batch; {starts} starts of each; the median of {turns} turns that lie"
    yield "side by side, and between which two the middle half of them lies. Memory is of the rank with the most."
    for job in document["jobs"]:
        ranks = "1 rank" if job["ranks"] == 1 else f"{job['ranks']} ranks"
        yield ""
        yield f"**{job['shape']}, {ranks}** on the {job['device'].upper()}, {job['tokens_per_step']:,} tokens a step;"
        yield f"{_apart(job)}."
        yield ""
        yield "| | tokens/s | of ours | CPU time, of ours | peak memory | to the first step | lines one writes |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        yield from map(_peer, job["rows"])
        yield ""
        yield from _verdicts(job)


def _apart(job: dict[str, Any]) -> str:
    apart = max(row.get("losses_apart", 0.0) for row in job["rows"])
    if not job["same_losses"]:
        return f"**the first losses are {apart:.0e} apart: not the same work**"
    return f"the first losses are within {apart:.0e} of ours"


def _peer(row: dict[str, Any]) -> str:
    if "tokens_per_second" not in row:
        return f"| {row['peer']} | did not run: {row['why_not']} | | | | | |"
    ratio = row["of_ours"]
    speed = "" if row["peer"] == "ours" else f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    cost = "" if row["peer"] == "ours" else f"{row['cpu_of_ours']['median']:.3f}"
    start = format_seconds(row["start_seconds"])
    cells = (
        row["peer"],
        f"{row['tokens_per_second']:,.0f}",
        speed,
        cost,
        f"{_peak(row) / 2**20:,.0f} MiB",
        start,
        row["lines"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _peak(row: dict[str, Any]) -> int:
    """Bytes of the rank with the most: of the GPU's allocator where there is one, else of resident memory."""
    return row["peak_bytes"].get("allocated", row["peak_bytes"]["resident"])


def _verdicts(job: dict[str, Any]) -> Iterator[str]:
    """Whether the bars hold."""
    ratios = {row["peer"]: row["of_ours"]["median"] for row in job["rows"] if "of_ours" in row}
    if "plain" in ratios:
        yield _verdict("of the plain loop's", 1 / ratios["plain"], PLAIN_BAR)
    if rivals := {name: ratios[name] for name in RIVALS if name in ratios}:
        best = max(rivals, key=rivals.__getitem__)
        yield _verdict(f"of {best}'s, the best of {', '.join(rivals)}", 1 / rivals[best], RIVAL_BAR)
        peaks = {row["peer"]: _peak(row) for row in job["rows"] if "peak_bytes" in row}
        leanest = min(rivals, key=lambda name: peaks[name])
        share, held = peaks["ours"] / peaks[leanest], "reached" if peaks["ours"] <= peaks[leanest] else "**missed**"
        yield f"- Our peak of memory is {share:.2f} of {leanest}'s, the leanest; 1 is the aim: {held}."


def _verdict(beside: str, ours: float, bar: float) -> str:
    return f"- Our tokens/s are {ours:.2f} {beside}; {bar} is the aim: {'reached' if ours >= bar else '**missed**'}."


def _overhead(document: dict[str, Any]) -> Iterator[str]:
    ours, bare, loop, limit = (
        f"{document[name] * 1e3:.3f} ms"
        for name in ("ours_median_seconds", "bare_median_seconds", "overhead_seconds", "limit_seconds")
    )
    yield f"With a model of one weight, on one rank, a step of ours takes {ours}, of a bare loop {bare}: the loop costs"
    yield f"{loop}; the aim is less than {limit}."


def _recording(document: dict[str, Any]) -> Iterator[str]:
    overhead, stopwatch = document["overhead"], document["stopwatch"]
    ranks = "1 rank" if document["ranks"] == 1 else f"{document['ranks']} ranks"
    median, low, high, apart = (
        f"{share:+.2%}".replace("%", " %")
        for share in (*(overhead[name] for name in ("median", "low", "high")), stopwatch["apart"])
    )
    seconds, pairs = f"{overhead['step_seconds'] * 1e3:.0f} ms", len(overhead["ratios"])
    yield f"{document['spec']}, {ranks}: recording takes {median} of a step of {seconds} (the median of {pairs} pairs,"
    yield f"half of them within {low} and {high}); tokens/s as told are {apart} from a stopwatch's."
