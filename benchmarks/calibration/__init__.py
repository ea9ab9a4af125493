"""Predicted beside measured, one row for each job: gathered from what runs, rehearsals, traces and benchmarks leave.

A row: "id", "origin", "what", "backend", "world_size", "device", "fitted" (a constant of the planner was fitted on it:
marked and never scored), "predicted" and "measured" ("bytes", "parts" by category, "seconds"; null is what nobody
knows), "versions".
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.run_folder import METRICS
from scaling.units import GiB

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """The rows in a run folder, or in the JSON of scaling.rehearse, scaling.plan --trace or a benchmark.

    Raises UserError where it is none of these.
    """
    try:
        if path.is_dir():
            return list(_of_run(path))
        return list(_of_document(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"a source must be a run folder, or JSON of a rehearsal, a plan with --trace or a benchmark, but {path} is "
            f"not ({type(error).__name__}: {error}); drop it"
        ) from None


def read_rows(path: Path) -> list[Row]:
    """Rows that were gathered before."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One a line; of rows with the same id the last."""
    kept = {row["id"]: row for row in rows}
    lines = [json.dumps(row) for row in sorted(kept.values(), key=lambda row: (row["origin"], row["what"]))]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# ---------------------------------------------------------------- where rows come from


def _of_run(folder: Path) -> Iterator[Row]:
    """One row; none where the run measured nothing that was predicted, as on a CPU."""
    spec, plan, environment = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("spec.json", "plan.json", "environment.json")
    )
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    peaks = [line["memory"]["allocated_peak_bytes"] for line in lines if line["memory"]["allocated_peak_bytes"]]
    duration = plan["time"]
    # The first line has what is made once: compiled code, the allocator's pools.
    later = [line["step_seconds"] for line in lines[1:]]
    known = duration is not None and bool(later)
    predicted = _side(plan["memory"]["peak_allocated_bytes"], seconds=duration["step_seconds"] if known else None)
    measured = _side(max(peaks, default=None), seconds=statistics.median(later) if known else None)
    if measured["bytes"] is not None or measured["seconds"] is not None:
        words = [spec["name"], f"micro {plan['micro_batch_size']}", spec["activation_checkpointing"], spec["precision"]]
        yield _row(
            "run", " ".join(words), spec["backend"], plan["world_size"], plan["device"],
            predicted, measured, environment["versions"],
        )  # fmt: skip


def _of_document(document: Any) -> Iterator[Row]:
    """Of whichever command the document is."""
    if isinstance(document, list):
        for one in document:
            yield from _of_document(one)
    elif "rehearsed" in document:
        yield _of_rehearsal(document)
    elif "traced" in document:
        yield of_trace(document["traced"])
    elif "memory" in document and "rows" in document:
        yield from _of_published(document)
    elif "tiny" in document:
        yield from _of_gpu_memory(document)
    elif "seed" in document:
        yield from _of_ledger(document)
    elif "error" not in document:  # a cell of a matrix that failed
        raise ValueError("it has none of their keys")


def _of_rehearsal(report: Row) -> Row:
    predicted, measured = report["predicted"], report["memory"]
    words = [report["spec"], f"micro {report['micro_batch_size']}", report["activation_checkpointing"]]
    return _row(
        "rehearsal", " ".join([*words, report["precision"]]), report["backend"], report["world_size"],
        report["environment"]["device"], _side(predicted["peak_allocated_bytes"], predicted["parts"]),
        _side(measured["peak_allocated_bytes"], measured["parts"] or None), report["environment"]["versions"],
    )  # fmt: skip


def of_trace(found: Row) -> Row:
    """The row of what scaling.trace returns."""
    predicted, measured = found["predicted"], found["memory"]
    words = [found["spec"], f"micro {found['micro_batch_size']}", found["activation_checkpointing"], found["precision"]]
    return _row(
        "trace", " ".join(words), found["backend"], found["world_size"], f"{found['tensors']} tensors, cpu kernels",
        _side(predicted["peak_allocated_bytes"], predicted["parts"]),
        _side(measured["peak_allocated_bytes"], measured["parts"]), found["versions"],
    )  # fmt: skip


def _of_ledger(document: Row) -> Iterator[Row]:
    """benchmarks.ledger: parts stand there as shares of what was counted."""
    for row in document["rows"]:
        if "error" in row:
            continue
        backend = row["name"].split()[1]
        shares = {part: share * row["counted"] for part, share in row["parts"].items()}
        yield _row(
            "ledger", row["name"], backend, row["world_size"], document["environment"]["device"],
            _side(row["played"], shares), _side(row["counted"], dict.fromkeys(shares, 0)),
            document["environment"]["versions"],
        )  # fmt: skip


def _of_gpu_memory(document: Row) -> Iterator[Row]:
    for row in document["rows"]:
        if "error" not in row:
            timed = bool(row.get("predicted_seconds") and row.get("step_seconds"))
            yield _row(
                "gpu_memory", row["name"], row["backend"], row["world_size"], row["device"],
                _side(row["predicted_bytes"], seconds=row["predicted_seconds"] if timed else None),
                _side(row["measured_bytes"], seconds=row["step_seconds"] if timed else None),
                document["environment"]["versions"],
            )  # fmt: skip


def _of_published(document: Row) -> Iterator[Row]:
    """benchmarks.published: rows of grade A. Speeds stand there as tokens a second."""
    for row in document["memory"]["rows"]:
        if "error" in row and row["grade"] == "A":
            measured = row["mem_peak_GiB"] * GiB
            sides = _side(measured * (1 + row["error"])), _side(measured)
            yield _row("published, memory", row["what"], "others'", None, row["source"], *sides, None, row)
    for row in document["rows"]:
        if row["grade"] == "A":
            sides = _side(None, seconds=1 / row["predicted"]), _side(None, seconds=1 / row["published"])
            yield _row("published, time", row["what"], "others'", None, row["hardware"], *sides, None, row)


def _side(count: float | None, parts: Row | None = None, seconds: float | None = None) -> Row:
    return {"bytes": count, "parts": parts, "seconds": seconds}


def _row(
    origin: str,
    what: str,
    backend: Row | str,
    world_size: int | None,
    device: str,
    predicted: Row,
    measured: Row,
    versions: Row | None,
    marks: Row | None = None,
) -> Row:
    """`marks`: a row of benchmarks.published, which knows whether a constant was fitted on it."""
    name = backend if isinstance(backend, str) else backend_name(backend)
    key = json.dumps([origin, what, backend, world_size, device, measured["bytes"], versions])
    return {
        "id": marks["id"] if marks else hashlib.sha256(key.encode()).hexdigest()[:12],
        "origin": origin,
        "what": what,
        "backend": name,
        "world_size": world_size,
        "device": device,
        "fitted": bool(marks and marks["fitted"]),
        "predicted": predicted,
        "measured": measured,
        "versions": versions,
    }


def backend_name(backend: Row) -> str:
    """A spec's backend in one word: "zero3-offload"."""
    offloads = any(backend.get(key) for key in ("offload_optimizer", "offload_parameters", "cpu_offload"))
    name = f"zero{backend['zero_stage']}" if "zero_stage" in backend else backend["kind"]
    name = "hsdp" if name == "fsdp" and backend.get("replicate", 1) > 1 else name
    return name + ("-offload" if offloads else "")


# ---------------------------------------------------------------- what is printed


def table(rows: Sequence[Row]) -> list[Row]:
    """Errors of memory and of speed, predicted over measured less one, by origin and backend; those of a category are
    shares of the whole peak. Rows that a constant was fitted on stand apart.
    """
    found: list[Row] = []
    for fitted in (False, True):
        own = [row for row in rows if row["fitted"] == fitted]
        for quantity in ("memory", "speed"):
            for origin in sorted({row["origin"] for row in own}):
                part = [row for row in own if row["origin"] == origin]
                names = sorted({row["backend"] for row in part})
                for name in ["all", *names] if len(names) > 1 else names:
                    chosen = [row for row in part if name in ("all", row["backend"])]
                    errors = [error for row in chosen if (error := _error(row, quantity)) is not None]
                    found += _line(errors, fitted, quantity, origin, name)
    scored = [row for row in rows if not row["fitted"] and row["predicted"]["parts"] and row["measured"]["parts"]]
    for origin in sorted({row["origin"] for row in scored}):
        part = [row for row in scored if row["origin"] == origin]
        for name in sorted({name for row in part for name in row["predicted"]["parts"]}):
            errors = [_part_error(row, name) for row in part]
            found += _line(errors, False, "category", origin, name)
    return found


def _error(row: Row, quantity: str) -> float | None:
    predicted, measured = row["predicted"], row["measured"]
    if quantity == "speed":  # which is what runs are compared by: the inverse of seconds
        known = predicted["seconds"] is not None and measured["seconds"] is not None
        return measured["seconds"] / predicted["seconds"] - 1 if known else None
    known = predicted["bytes"] is not None and measured["bytes"] is not None
    return predicted["bytes"] / measured["bytes"] - 1 if known else None


def _part_error(row: Row, name: str) -> float:
    predicted, measured = row["predicted"]["parts"].get(name, 0), row["measured"]["parts"].get(name, 0)
    return (predicted - measured) / row["measured"]["bytes"]


def _line(errors: Sequence[float], fitted: bool, quantity: str, origin: str, name: str) -> list[Row]:
    if not errors:
        return []
    sizes = sorted(map(abs, errors))
    return [
        {
            "quantity": quantity,
            "origin": origin,
            "of": name,
            "fitted": fitted,
            "rows": len(sizes),
            "median": statistics.median(sizes),
            "p90": sizes[-(-9 * len(sizes) // 10) - 1],
            "worst": sizes[-1],
            "bias": statistics.median(errors),
        }
    ]
