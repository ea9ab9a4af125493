"""How the run went as a whole: its end, its starts, its saves and its pauses."""

import statistics
from itertools import pairwise
from typing import Any

from scaling.doctor.case import Case, enough, told
from scaling.doctor.robust import whole
from scaling.doctor.rule import CannotJudge, Symptom, percent, rule
from scaling.summarize import at, goodput, is_number
from scaling.units import format_bytes, format_seconds

# ---------------------------------------------------------------- its end

ENDS = {
    1: (
        "a bug",
        "Look at the traceback in train.log, and run the same command again; report it if it is none of yours.",
    ),
    2: ("the spec or the command line is wrong", "Do what the message says, and run the command again."),
    3: ("it does not fit in memory", "Use a smaller micro-batch with more accumulation, freeze more, or shard more."),
    4: ("the loss or the gradient was not finite", "Lower the learning rate, or set `on_nonfinite`."),
    5: ("a checkpoint, or weights, cannot be used", "Name an older one with `--resume RUN_DIR/checkpoints/step-…`."),
    6: (
        "the run folder cannot be used",
        "Free room on its disk, or end the run that holds it; then run the same command.",
    ),
    7: (
        "it was restarted too often without progress",
        "Find out from train.log what ends it, then remove restarts.json.",
    ),
    8: (
        "a rank hung",
        "Look at failures/ in the run folder, which has every rank's stacks; then run the same command again.",
    ),
    9: (
        "a rank died",
        "Look at failures/ and at the machine's log (`dmesg`: the OOM killer?); then run the same command.",
    ),
    143: (
        "it was stopped before it could save",
        "Raise `checkpoint.grace`, or save more often; then run the same command.",
    ),
}
"""Exit code -> what it means, and what to do (README.md has the table)."""
GOOD_ENDS = (0, 75)
"""Done; stopped by a signal, saved."""


@rule(
    "error",
    "the run ended badly",
    looks_at="exit.json (memory that ran out, and losses that are not finite, have rules of their own)",
    threshold="exit code 0, or 75 (stopped by a signal and saved)",
    advice="Do what the reason says; the same command goes on from the newest checkpoint.",
)
def ended_badly(case: Case) -> Symptom | None:
    code, reason = case.run.exit.get("code"), str(case.run.exit.get("reason") or "no reason given")
    if code is None:
        raise CannotJudge("it has not ended, or was killed: there is no exit.json")
    if code in GOOD_ENDS or code == 4 or (code == 3 and case.run.oom):
        return None
    meaning, advice = ENDS.get(code, ("a bug", ENDS[1][1]))
    rank, step = case.run.exit.get("rank"), case.run.exit.get("step")
    place = "" if rank is None else f" on rank {rank}"
    place += "" if step is None else f" after step {step:,}"
    short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…"
    return Symptom(f"exit code {code} ({meaning}){place}: {short.rstrip('.')}.", advice)


LONGEST_REASON = 300
"""Characters of exit.json's reason that are repeated."""

# ---------------------------------------------------------------- its starts

RESTARTS = 3
"""Starts after a failure. Hardware fails (Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs,
Grattafiori et al., 2024, table 5), but of eight GPUs not three times in one training."""


@rule(
    "warning",
    "the run was restarted again and again",
    looks_at="starts that follow neither a good end (exit code 0 or 75) nor nothing, and the steps that they repeated",
    threshold=f"fewer than {RESTARTS}",
    advice="Find out what ends it: failures/ and train.log of the run folder, and the log of the machine that fails.",
)
def restarts(case: Case) -> Symptom | None:
    began = _events(case, "start")
    outcomes = [event for event in case.run.events if event.get("event") in ("start", "end")]
    failed = sum(
        after["event"] == "start" and not (before["event"] == "end" and at(before, "details", "code") in GOOD_ENDS)
        for before, after in pairwise(outcomes)
    )
    if failed < RESTARTS:
        return None
    return Symptom(
        f"{failed} of {len(began)} starts came after a failure; {_repeated(case):,} logged steps were taken again."
    )


def _repeated(case: Case) -> int:
    return len(case.run.lines) - len(case.run.steps)


GOODPUT = 0.8
"""Share of the time since the first start. Start-up, validation and checkpoints of a healthy run take some per cent;
Meta reports over 90 % for Llama 3 on 16,384 GPUs (Grattafiori et al., 2024, section 3.3.4)."""
AN_HOUR_S = 3600.0
"""Seconds from which on a run's goodput says something: start-up and compilation are much of a short one."""


@rule(
    "warning",
    "much of the time went into no step that counts",
    looks_at="goodput: the time of steps that no crash undid, over the time since the first start, from an hour on",
    threshold=f"at least {percent(GOODPUT)}",
    advice="Take away the largest of these: pauses by longer intervals, repeated steps by saving more often, the "
    "rest by finding out what ends the run, and by caches of data and compilation that outlive it.",
)
def low_goodput(case: Case) -> Symptom | None:
    found = goodput(case.run)
    if found is None or found.share is None:
        raise CannotJudge("it wrote no events, or no steps")
    if found.wall_s < AN_HOUR_S:
        raise CannotJudge(f"it is {format_seconds(found.wall_s)} old, an hour is needed")
    if found.share >= GOODPUT:
        return None
    pauses = {name: _paused(case, name) for name in ("validation", "checkpoint")}
    lost = max(0.0, case.trained_s - found.useful_s)
    rest = max(0.0, found.wall_s - found.useful_s - lost - sum(pauses.values()))
    shares = {**pauses, "repeated steps": lost, f"starting and all else ({_starts(found.starts)})": rest}
    parts = ", ".join(f"{name} {percent(seconds / found.wall_s)}" for name, seconds in shares.items() if seconds > 0)
    return Symptom(f"{percent(found.share)} of {format_seconds(found.wall_s)} went into steps that count; {parts}.")


def _starts(count: int) -> str:
    """ "1 start", "3 starts"."""
    return f"{count} start{'' if count == 1 else 's'}"


# ---------------------------------------------------------------- its saves

PAUSED = 0.05
"""Share of the time of training. A save in the background pauses it for a copy to host memory: some per mille at the
default interval of 1,000 steps."""
PAUSED_AFTER = 0.01
"""What is aimed at where an interval is advised."""
CROWDED = 0.8
"""Of the time between two saves, on GPUs: one save waits for the one before. (On a CPU a save is spread over that time
on purpose.)"""
FEWEST_PAUSES = 3
"""Pauses from which on their share is judged: every run saves at its end, and a short one is mostly end."""
OLD_S = 300.0
"""Seconds of training from which on it is."""


@rule(
    "warning",
    "checkpoints are saved too often",
    looks_at="the time that training stood still for checkpoints; how long a save takes beside the time between two",
    threshold=f"at most {percent(PAUSED)} of the time of training, and {percent(CROWDED)} of the time between two "
    "saves",
    advice="Save less often, and in the background (`checkpoint.asynchronous`).",
)
def checkpoints_too_often(case: Case) -> Symptom | None:
    share = _pause_share(case, "checkpoint")
    saves = [event for event in case.run.events if event.get("event") == "checkpoint"]
    gaps = [after["wall_time"] - before["wall_time"] for before, after in pairwise(saves)]
    took = [seconds for event in saves if is_number(seconds := at(event, "details", "seconds"))]
    gap = statistics.median(gaps) if len(gaps) >= FEWEST_PAUSES else None
    slow = case.on_gpu and gap is not None and len(took) >= FEWEST_PAUSES and statistics.median(took) > CROWDED * gap
    if share <= PAUSED and not slow:
        return None
    evidence = f"training stood still for checkpoints {percent(share)} of its time"
    if slow and gap is not None:
        evidence += (
            f"; a save takes {format_seconds(statistics.median(took))} and one begins every {format_seconds(gap)}"
        )
    settings = case.spec.checkpoint
    if settings is None:
        return Symptom(f"{evidence}.")
    longer = max(share / PAUSED_AFTER, 2.0)
    changes: dict[str, Any] = {"checkpoint.interval": max(settings.interval + 1, round(settings.interval * longer))}
    changes |= {} if settings.asynchronous else {"checkpoint.asynchronous": True}
    return Symptom(f"{evidence}.", set=changes)


UNSAVED_S = 2 * 3600.0
"""Seconds of training that a crash may cost at worst: an hour on average. By Young's rule (1974) the best interval is
sqrt(2 x cost of a save x time between failures): 2 h for a save of 20 s and a failure in 15 days."""
SAVED_S = 1800.0
"""The interval that is advised."""
LOST = 0.1
"""Share of the steps' time that was taken again after crashes."""


@rule(
    "warning",
    "checkpoints are saved too rarely",
    looks_at="the longest stretch of steps without a checkpoint, times the seconds of a step; steps taken again after "
    "crashes",
    threshold=f"at most {format_seconds(UNSAVED_S)}, and {percent(LOST)} of the steps",
    advice="Save every half hour: a save in the background costs next to nothing, and a crash costs all since the "
    "last.",
)
def checkpoints_too_rare(case: Case) -> Symptom | None:
    seconds = statistics.median(case.values("step_seconds", least=1))
    settings, last = case.spec.checkpoint, case.last_step
    saves = {event["step"] for event in case.run.events if event.get("event") == "checkpoint" and event.get("step")}
    if case.run.events:
        gap = max(after - before for before, after in pairwise([0, *sorted(saves | {last})]))
    else:
        gap = last if settings is None else min(last, settings.interval)
    repeated = _repeated(case) / max(1, len(case.run.lines))
    if gap * seconds <= UNSAVED_S and repeated <= LOST:
        return None
    evidence = f"{gap:,} steps without a checkpoint are {format_seconds(gap * seconds)} of training"
    evidence += f"; {percent(repeated)} of the logged steps were taken again" if repeated else ""
    interval = whole(SAVED_S / seconds)
    if settings is not None:
        interval = min(interval, max(1, settings.interval // 2))
    return Symptom(f"{evidence}.", set={"checkpoint.interval": interval})


@rule(
    "error",
    "a checkpoint could not be saved",
    looks_at="events of saves that failed",
    threshold="not one",
    advice="Make room, or keep fewer (`checkpoint.keep_last`): until a save succeeds, all since the last is one "
    "crash from being lost.",
)
def save_failed(case: Case) -> Symptom | None:
    _events(case, "start")
    failed = [event for event in case.run.events if event.get("event") == "checkpoint_failed"]
    if not failed:
        return None
    steps = [event["step"] for event in failed if event.get("step") is not None]
    reason = at(failed[-1], "details", "reason") or at(failed[-1], "details", "message")
    size = next((at(e, "details", "bytes") for e in reversed(case.run.events) if e.get("event") == "checkpoint"), None)
    evidence = f"{len(failed)} save{'s' if len(failed) > 1 else ''} failed" + (
        f", after {told(steps)}" if steps else ""
    )
    evidence += f": {reason}" if reason else ""
    evidence += f"; a checkpoint takes {format_bytes(size)}" if is_number(size) else ""
    settings = case.spec.checkpoint
    fewer = settings is not None and (settings.keep_last is None or settings.keep_last > 2)
    return Symptom(f"{evidence}.", set={"checkpoint.keep_last": 2} if fewer else {})


VALIDATES = 0.1
"""Share of the time of training. Validation tells how training goes, so some is well spent; at a tenth a curve with
half as many points says the same."""


@rule(
    "advice",
    "validation takes much of the time",
    looks_at="the time that training stood still for validation",
    threshold=f"at most {percent(VALIDATES)} of the time of training",
    advice="Validate less often, or on fewer batches (curves on different sets cannot be compared).",
)
def validation_too_often(case: Case) -> Symptom | None:
    share = _pause_share(case, "validation")
    settings = case.spec.validation
    if share <= VALIDATES or settings is None:
        return None
    interval = round(settings.interval * share / (VALIDATES / 2))
    return Symptom(
        f"training stood still for validation {percent(share)} of its time.", set={"validation.interval": interval}
    )


def _pause_share(case: Case, name: str) -> float:
    """Of the time of training with its pauses. CannotJudge where there are too few, in too little time."""
    if not any(is_number(at(line, "pauses", name)) for line in case.run.lines):
        raise CannotJudge("no pauses are recorded")
    if case.trained_s < OLD_S:
        raise CannotJudge(f"it trained for {format_seconds(case.trained_s)}, {format_seconds(OLD_S)} are needed")
    paused = [at(line, "pauses", name) for line in case.run.lines]
    if sum(is_number(seconds) and seconds > 0 for seconds in paused) < FEWEST_PAUSES:
        return 0.0
    return _paused(case, name) / (case.trained_s + _paused(case, "validation") + _paused(case, "checkpoint"))


def _paused(case: Case, name: str) -> float:
    return sum(value for line in case.run.lines if is_number(value := at(line, "pauses", name)))


def _events(case: Case, name: str) -> list[dict[str, Any]]:
    return enough([event for event in case.run.events if event.get("event") == name], 1, f"{name} events")


RULES = (
    ended_badly,
    save_failed,
    restarts,
    low_goodput,
    checkpoints_too_often,
    checkpoints_too_rare,
    validation_too_often,
)
