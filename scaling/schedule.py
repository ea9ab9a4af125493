"""The learning rate as a pure function of the step: nothing is stepped, nothing is saved, nothing drifts on resume.

Steps are optimizer steps and start at 0: step s is the update about to be applied, and a run of T = max_steps applies
the steps 0 .. T-1. With W = warmup_steps, a factor on each group's peak LR:

    s < W        (s + 1) / W              the first update already moves; step W-1 trains at the peak
    W <= s < T   curve(p), p = (s - W) / (T - W)    in [0, 1): step W is at the peak, p = 1 would be step T
    s >= T       the curve's end

So a decaying curve reaches min_lr_ratio exactly at s = T, one step after the last that is applied; the last update,
T-1, stands 1 / (T - W) of the way short of it. After the warm-up that is the convention of nanoGPT's get_lr
(decay_ratio = (it - warmup) / (lr_decay_iters - warmup), with lr_decay_iters = T), of MiniMind's (cos(pi t / T)) and of
Hugging Face's schedules. If the warm-up fills the whole run there is no curve, and the factor stays 1 afterwards.
"""

import math
from bisect import bisect
from collections.abc import Callable
from typing import assert_never

from scaling.errors import UserError
from scaling.spec import Spec, change_spec
from scaling.spec.sections import (
    WSD,
    AnySchedule,
    Constant,
    Cosine,
    CosineWithRestarts,
    Data,
    Linear,
    LRScaling,
    curriculum_of,
)


def lr_factor(schedule: AnySchedule, step: int, max_steps: int) -> float:
    """The LR of optimizer step `step` (0-based) over the peak LR, in 0 .. 1. See the module for the convention.

    Steps from `max_steps` on hold the curve's end. The schedule must fit into `max_steps` (see `check_schedule`).
    """
    assert step >= 0 and max_steps >= 1, (step, max_steps)
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    length = max_steps - warmup
    if isinstance(schedule, Constant) or length <= 0:
        return 1.0
    if step >= max_steps:
        return schedule.min_lr_ratio
    done = step - warmup
    match schedule:
        case Linear():
            return _descend(done / length, schedule.min_lr_ratio)
        case Cosine():
            return _descend(_half_cosine(done / length), schedule.min_lr_ratio)
        case CosineWithRestarts():
            # In whole numbers, so that a restart is never missed by a rounding: p x cycles, modulo 1. Where the cycles
            # do not divide the length, each starts at the first step past its share (as Hugging Face's
            # get_cosine_with_hard_restarts_schedule_with_warmup).
            return _descend(_half_cosine(done * schedule.cycles % length / length), schedule.min_lr_ratio)
        case WSD():
            descent = max(0, step - (max_steps - schedule.decay_steps))
            return _descend(descent / schedule.decay_steps, schedule.min_lr_ratio)
        case _:
            assert_never(schedule)


def check_schedule(schedule: AnySchedule, max_steps: int) -> None:
    """Raise UserError where `schedule` does not fit into `max_steps`: for runs whose length comes from `epochs`."""
    decay = schedule.decay_steps if isinstance(schedule, WSD) else 0
    needed = schedule.warmup_steps + decay
    if needed > max_steps:
        raise UserError(
            f"`schedule.warmup_steps`{' + decay_steps' if decay else ''} must be at most the steps of the run "
            f"({max_steps}), but is {needed}; shorten it or train longer"
        )
    if isinstance(schedule, CosineWithRestarts) and schedule.cycles > max(1, max_steps - schedule.warmup_steps):
        raise UserError(
            "`schedule.cycles` must be at most the steps after the warm-up "
            f"({max_steps - schedule.warmup_steps}), but is {schedule.cycles}; use fewer cycles or train longer"
        )


def lr_scale(lr_scaling: LRScaling, *, world_size: int, global_batch: int) -> float:
    """The factor on every peak LR for a job of this size: none 1, linear r, sqrt the root of r.

    r is this job's world size over reference_world_size, or its global batch (sequences) over
    reference_global_batch_size, whichever the spec gives. linear: Goyal et al. 2017 (arXiv:1706.02677), for SGD;
    sqrt: Malladi et al. 2022 (arXiv:2205.10287), for Adam.
    """
    if lr_scaling.rule == "none":
        return 1.0
    if lr_scaling.reference_world_size is not None:
        ratio = world_size / lr_scaling.reference_world_size
    else:
        assert lr_scaling.reference_global_batch_size is not None, "the spec wants exactly one reference"
        ratio = global_batch / lr_scaling.reference_global_batch_size
    return ratio if lr_scaling.rule == "linear" else math.sqrt(ratio)


def _descend(done: float, floor: float) -> float:
    """From exactly 1 at done = 0 down to `floor` at done = 1."""
    return 1.0 - (1.0 - floor) * done


def _half_cosine(progress: float) -> float:
    """How far half a cosine has come down at `progress`: 0 at 0, 1/2 at 1/2, 1 at 1."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


# ---------------------------------------------------------------- the length of sequences


def growth(data: Data) -> tuple[tuple[int, int], ...]:
    """(first step that has it, 0-based; tokens in each sequence) of every length, in rising order."""
    grows, longest = curriculum_of(data), data.sequence_length
    if grows is None:
        return ((0, longest),)
    shortest, most = grows.min_length, longest // grows.min_length  # exact: the spec refuses others
    small = [factor for factor in range(1, math.isqrt(most) + 1) if most % factor == 0]
    lengths = [shortest * factor for factor in sorted({*small, *(most // factor for factor in small)})]
    # At the first step s at which shortest + (longest - shortest) s / steps, the straight line, has come so far; of two
    # at one step the longer.
    starts = [-(-(length - shortest) * grows.steps // (longest - shortest)) for length in lengths]
    return tuple(dict(zip(starts, lengths, strict=True)).items())


def length_at(data: Data) -> Callable[[int], int]:
    """What says how many tokens there are in each sequence of a step (0-based)."""
    stages = growth(data)
    starts = [start for start, _ in stages]
    return lambda step: stages[bisect(starts, step) - 1][1]


def at_length(spec: Spec, length: int) -> Spec:
    """`spec` with all of its sequences as long as that, from the first step on."""
    data = spec.data.model_dump() | {"sequence_length": length}
    if curriculum_of(spec.data) is not None:
        data["sequence_curriculum"] = None
    return change_spec(spec, data=data)


def check_growth(data: Data, max_steps: int) -> None:
    """Raise UserError where sequences do not come to their full length: for runs whose length comes from `epochs`."""
    grows = curriculum_of(data)
    if grows is not None and grows.steps > max_steps:
        raise UserError(
            f"`data.sequence_curriculum.steps` must be at most the steps of the run ({max_steps}), but is "
            f"{grows.steps}; shorten it or train longer"
        )
