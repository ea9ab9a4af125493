"""A run as its folder tells it: read once, for what reports on it and what judges it.

Needs no torch. Of a step that was taken again after a crash the later record counts.
"""

import gc
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeGuard

from scaling.errors import UserError
from scaling.run_folder import EVENTS, EXIT, MEMORY, METRICS, OOM, VALIDATION
from scaling.watch.outcome import FAILURES, OUTCOME

UNSAID_WARM_UP = 2
"""Logged steps whose times do not count where the records have no "warm_up"."""


@dataclass(frozen=True)
class RunData:
    """All that a run folder says. Objects are as in the files; {} and [] where there is none."""

    folder: Path
    spec: dict[str, Any]
    """As resolved, every default spelt out."""
    rendered: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    """Every line of metrics.jsonl, in the order in which they were written."""
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """In the order of time; the ends of starts that failed (failures/) are among them."""
    exit: dict[str, Any]
    memory: dict[str, Any]
    """Live tensors by category at `profile.memory_step`."""
    oom: dict[str, Any]
    """What was found out when memory had run out."""

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """One record for each logged step, in the order of steps."""
        found = {line["step"]: line for line in self.lines}
        return [found[step] for step in sorted(found)]

    @cached_property
    def settled(self) -> list[dict[str, Any]]:
        """The records whose times count: those without the first steps of a start, which compile and fill caches.

        Of a run whose records do not say which those are, all but the first two; of one whose sequences grow those at
        full length, which predictions are of.
        """
        full = (None, at(self.spec, "data", "sequence_length"))
        warm = [step for place, step in enumerate(self.steps) if not step.get("warm_up", place < UNSAID_WARM_UP)]
        return [step for step in warm if step.get("sequence_length") in full]

    @property
    def warm(self) -> list[dict[str, Any]]:
        """As `settled`; the last record where there are no others."""
        return self.settled or self.steps[-1:]

    @cached_property
    def windows(self) -> list[int]:
        """Steps that each of `steps` stands for; of a run whose records do not say, those since the record before."""
        before = [0, *(step["step"] for step in self.steps)]
        return [step.get("window_steps") or step["step"] - last for step, last in zip(self.steps, before, strict=False)]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and loss, where it is finite."""
        return [(step["step"], step["loss"]) for step in self.steps if is_number(step.get("loss"))]

    def median(self, *path: str, of: Sequence[dict[str, Any]] | None = None) -> float | None:
        """The median of what stands under `path` in the records `of` (default: the warm ones); None if nowhere."""
        found = [value for value in column(self.warm if of is None else of, *path) if value is not None]
        return statistics.median(found) if found else None

    def highest(self, *path: str) -> float | None:
        """The largest value under `path` in any line."""
        found = self.column(*path) if len(self.lines) == len(self.steps) else column(self.lines, *path)
        return max((value for value in found if value is not None), default=None)

    def column(self, *path: str) -> list[float | None]:
        """What stands under `path` in each of `steps`, as `column` has it; not to be changed."""
        if path not in self._columns:
            self._columns[path] = _numbers(_below(self._enclosing(path[:-1]), path[-1]))
        return self._columns[path]

    def _enclosing(self, path: tuple[str, ...]) -> Sequence[Any]:
        """What stands under `path`, looked up once for all the columns in it."""
        if not path:
            return self.steps
        if path not in self._objects:
            self._objects[path] = _below(self._enclosing(path[:-1]), path[-1])
        return self._objects[path]

    @cached_property
    def _columns(self) -> dict[tuple[str, ...], list[float | None]]:
        return {}

    @cached_property
    def _objects(self) -> dict[tuple[str, ...], Sequence[Any]]:
        return {}


def read_run(folder: Path) -> RunData:
    """Read a run folder, of a run under way or ended. Raises UserError where it holds no run."""
    plan = _object(folder / "plan.json")
    if plan is None:
        raise UserError(f"RUN_DIR must be the folder of a run, but {str(folder)[:200]} has no plan.json; name another")
    objects = {name: _object(folder / f"{name}.json") or {} for name in ("spec", "rendered", "environment")}
    lines, validations, events = (_lines(folder / name) for name in (METRICS, VALIDATION, EVENTS))
    events = _in_order([*events, *_failures(folder)])
    exit_, memory, oom = (_object(folder / name) or {} for name in (EXIT, MEMORY, OOM))
    return RunData(
        folder,
        **objects,
        plan=plan,
        lines=lines,
        validations=validations,
        events=events,
        exit=exit_,
        memory=memory,
        oom=oom,
    )


@dataclass(frozen=True)
class Goodput:
    """How much of the time since a run first began went into steps that count."""

    useful_s: float
    """Seconds in which steps were taken that no crash undid."""
    wall_s: float
    """From the first start to the last sign of life."""
    starts: int

    @property
    def share(self) -> float | None:
        """0 to 1."""
        return min(1.0, self.useful_s / self.wall_s) if self.wall_s > 0 else None


def goodput(run: RunData) -> Goodput | None:
    """Of a run that wrote its events; None of one that did not, or that has logged nothing."""
    starts = [event["wall_time"] for event in run.events if event["event"] == "start"]
    times = [entry["wall_time"] for entry in (*run.events, *run.lines, *run.validations) if entry.get("wall_time")]
    if not starts or not run.steps:
        return None
    return Goodput(trained_s(run.steps), max(times) - min(starts), len(starts))


def trained_s(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of the steps that `lines` record, pauses left out."""
    timed = [line for line in lines if is_number(line.get("step_seconds"))]
    return sum(line["step_seconds"] * (line.get("window_steps") or 1) for line in timed)


def column(records: Sequence[dict[str, Any]], *path: str) -> list[float | None]:
    """What stands under `path` in each record; None where it is no finite number."""
    values: Sequence[Any] = records
    for key in path:
        values = _below(values, key)
    return _numbers(values)


def names(records: Sequence[dict[str, Any]], *path: str) -> list[str]:
    """The keys of the objects that stand under `path` in the records, in the order in which they come."""
    values: Sequence[Any] = records
    for key in path:
        values = _below(values, key)
    return list(dict.fromkeys(chain.from_iterable(value for value in values if type(value) is dict)))


def _below(values: Sequence[Any], key: str) -> list[Any]:
    try:
        return list(map(itemgetter(key), values))
    except (KeyError, TypeError):  # not everywhere
        return [value.get(key) if type(value) is dict else None for value in values]


def _numbers(values: Sequence[Any]) -> list[float | None]:
    """As is_number, for millions of values: of NaN and the infinities the difference is no 0."""
    return [value if type(value) in (int, float) and value - value == 0 else None for value in values]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at(value: Any, *path: str) -> Any:
    """What stands under `path` in nested objects; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _in_order(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By time. Of two ends of one start the later stands: what a failure was is known once all ranks have spoken."""
    found: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: event["wall_time"]):
        if event["event"] == "end" and found and found[-1]["event"] == "end":
            found.pop()
        found.append(event)
    return found


def _failures(folder: Path) -> list[dict[str, Any]]:
    """How the starts of a run ended that failed, as events: a process that dies cannot write one itself."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{FAILURES}/*/{OUTCOME}")):
        ended = _object(path) or {}
        details = {key: ended.get(key) for key in ("code", "reason", "rank")}
        found.append({"event": "end", "wall_time": ended["time"], "step": ended.get("step"), "details": details})
    return found


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)[:200]} must be a JSON file that can be read, but is not: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{str(path)[:200]} must hold a JSON object, but does not; name another folder")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a run may still append to."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)[:200]} must be a file that can be read, but is not: {error}") from None
    whole = text[: text.rfind("\n") + 1].splitlines()
    collects = gc.isenabled()
    gc.disable()  # it would go over all that has been read, again and again: half of the time
    try:
        found = json.loads(f"[{','.join(whole)}]")  # as one value, whose lines share the texts of their keys
    except ValueError as error:
        raise UserError(f"{str(path)[:200]} must hold a JSON object in each line, but does not: {error}") from None
    finally:
        if collects:
            gc.enable()
    if len(found) != len(whole) or not all(isinstance(line, dict) for line in found):
        raise UserError(f"{str(path)[:200]} must hold a JSON object in each line, but does not; name another folder")
    return found
