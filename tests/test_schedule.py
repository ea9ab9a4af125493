"""The learning rate is a pure function of the step, with the conventions of the recipes that people compare against."""

import math
from itertools import pairwise
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.schedule import check_schedule, lr_factor, lr_scale
from scaling.spec.sections import WSD, Constant, Cosine, CosineWithRestarts, Linear, LRScaling

DECAYING = [
    Linear(kind="linear", warmup_steps=10, min_lr_ratio=0.2),
    Cosine(kind="cosine", warmup_steps=10, min_lr_ratio=0.2),
    WSD(kind="wsd", warmup_steps=10, decay_steps=30, min_lr_ratio=0.2),
    CosineWithRestarts(kind="cosine_with_restarts", warmup_steps=10, cycles=3, min_lr_ratio=0.2),
]
ALL = [Constant(kind="constant", warmup_steps=10), *DECAYING]


def curve(schedule: Any, max_steps: int) -> list[float]:
    return [lr_factor(schedule, step, max_steps) for step in range(max_steps)]


def test_cosine_is_minimind_s() -> None:
    # lr * (0.1 + 0.45 * (1 + cos(pi * t / T))): jingyaogong/minimind, trainer_utils.get_lr
    schedule, total = Cosine(kind="cosine", min_lr_ratio=0.1), 777
    for step in range(total):
        theirs = 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))
        assert lr_factor(schedule, step, total) == pytest.approx(theirs, rel=1e-14)


def test_cosine_after_the_warmup_is_nanogpt_s() -> None:
    # karpathy/nanoGPT, train.py, get_lr, with lr_decay_iters = max_iters as its README advises
    warmup, total, peak, least = 50, 700, 6e-4, 6e-5

    def get_lr(it: int) -> float:
        if it > total:
            return least
        decay_ratio = (it - warmup) / (total - warmup)
        return least + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (peak - least)

    schedule = Cosine(kind="cosine", warmup_steps=warmup, min_lr_ratio=0.1)
    for step in range(warmup, total + 10):
        assert peak * lr_factor(schedule, step, total) == pytest.approx(get_lr(step), rel=1e-13)


def test_values_by_hand() -> None:
    assert curve(Linear(kind="linear", min_lr_ratio=0.0), 4) == [1.0, 0.75, 0.5, 0.25]
    assert curve(Linear(kind="linear", warmup_steps=2, min_lr_ratio=0.5), 4) == [0.5, 1.0, 1.0, 0.75]
    half = math.sqrt(0.5) / 2
    expected = [1.0, 0.5 + half, 0.5, 0.5 - half]
    assert curve(Cosine(kind="cosine", min_lr_ratio=0.0), 4) == pytest.approx(expected, abs=1e-15)
    assert curve(WSD(kind="wsd", warmup_steps=1, decay_steps=2), 6) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert curve(Constant(kind="constant", warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    restarts = curve(CosineWithRestarts(kind="cosine_with_restarts", cycles=2), 8)
    assert restarts == pytest.approx(expected * 2, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: schedule.kind)
def test_the_peak_is_reached_exactly_and_never_passed(schedule: Any) -> None:
    values = curve(schedule, 100)
    assert values[9] == values[10] == max(values) == 1.0
    assert min(values) == values[0] == 0.1  # the first update moves


@pytest.mark.parametrize("schedule", DECAYING, ids=lambda schedule: schedule.kind)
def test_the_minimum_is_reached_at_max_steps_and_held(schedule: Any) -> None:
    assert lr_factor(schedule, 99, 100) > 0.2
    assert lr_factor(schedule, 99, 100) == pytest.approx(0.2, abs=0.03)
    assert all(lr_factor(schedule, step, 100) == 0.2 for step in (100, 101, 10**9))


@pytest.mark.parametrize("schedule", [one for one in ALL if one.kind != "cosine_with_restarts"], ids=lambda s: s.kind)
def test_up_then_down_without_a_jump(schedule: Any) -> None:
    values = [lr_factor(schedule, step, 100) for step in range(130)]
    assert all(a < b for a, b in pairwise(values[:10]))
    assert all(a >= b for a, b in pairwise(values[9:]))
    assert all(abs(a - b) <= 0.1 + 1e-12 for a, b in pairwise(values))  # the warm-up's own steps are the largest


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: schedule.kind)
def test_a_step_does_not_depend_on_the_ones_before(schedule: Any) -> None:
    forwards = [lr_factor(schedule, step, 100) for step in range(100)]
    assert [lr_factor(schedule, step, 100) for step in reversed(range(100))] == forwards[::-1]


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize(("warmup", "first"), [(0, 1.0), (1, 1.0), (2, 0.5), (8, 0.125)])
def test_short_and_long_warmups(kind: Any, warmup: int, first: float) -> None:
    schedule = kind(kind=kind.__name__.lower(), warmup_steps=warmup, min_lr_ratio=0.1)
    assert lr_factor(schedule, 0, 8) == first
    if warmup:
        assert lr_factor(schedule, warmup - 1, 8) == 1.0
    if warmup == 8:  # nothing is left to decay over: the peak is the last value, and is held
        assert lr_factor(schedule, 8, 8) == lr_factor(schedule, 100, 8) == 1.0
    else:
        assert lr_factor(schedule, warmup, 8) == 1.0 and lr_factor(schedule, 8, 8) == 0.1


def test_one_step() -> None:
    assert [
        lr_factor(schedule, 0, 1)
        for schedule in (Constant(kind="constant"), Cosine(kind="cosine"), Linear(kind="linear"))
    ] == [1] * 3
    assert lr_factor(WSD(kind="wsd", decay_steps=1), 0, 1) == 1.0


def test_wsd_is_flat_until_its_descent() -> None:
    values = curve(WSD(kind="wsd", warmup_steps=10, decay_steps=30, min_lr_ratio=0.2), 100)
    assert set(values[9:71]) == {1.0}
    assert all(a > b for a, b in pairwise(values[70:]))
    assert values[85] == pytest.approx(1 - 0.8 * 15 / 30)
    whole = WSD(kind="wsd", warmup_steps=10, decay_steps=90)
    line = Linear(kind="linear", warmup_steps=10)
    assert curve(whole, 100) == curve(line, 100)


def test_restarts_begin_at_the_peak() -> None:
    schedule = CosineWithRestarts(kind="cosine_with_restarts", warmup_steps=10, cycles=3, min_lr_ratio=0.2)
    values = curve(schedule, 100)
    assert [step for step in range(10, 100) if values[step] == 1.0] == [10, 40, 70]
    assert values[10:40] == values[40:70] == values[70:100]


@pytest.mark.parametrize(("cycles", "length"), [(3, 10), (7, 100), (3, 1000), (10, 10), (49, 100)])
def test_restarts_that_do_not_divide_the_length(cycles: int, length: int) -> None:
    schedule = CosineWithRestarts(kind="cosine_with_restarts", cycles=cycles)
    values = curve(schedule, length)
    starts = [0] + [step for step in range(1, length) if values[step] > values[step - 1]]
    if cycles < length:
        assert starts == [-(-length * k // cycles) for k in range(cycles)]  # the first step past each cycle's share
    for start in starts:  # at the peak but for less than one step's share of the cycle
        assert values[start] >= 0.5 * (1 + math.cos(math.pi * min(1.0, cycles / length)))
    assert values[0] == 1.0 and lr_factor(schedule, length, length) == 0.0


def test_one_cycle_is_the_cosine() -> None:
    once = CosineWithRestarts(kind="cosine_with_restarts", cycles=1, warmup_steps=5, min_lr_ratio=0.3)
    assert curve(once, 50) == curve(Cosine(kind="cosine", warmup_steps=5, min_lr_ratio=0.3), 50)


def test_very_long_runs_stay_exact() -> None:
    schedule = CosineWithRestarts(kind="cosine_with_restarts", cycles=10)
    assert lr_factor(schedule, 7 * 10**11, 10**13 // 10) == 1.0
    assert lr_factor(Linear(kind="linear"), 2**39, 2**40) == 0.5


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"warmup_steps` must be at most the steps of the run \(9\), but is 10"):
        check_schedule(Constant(kind="constant", warmup_steps=10), 9)
    with pytest.raises(UserError, match=r"warmup_steps` \+ decay_steps must be .* but is 40"):
        check_schedule(WSD(kind="wsd", warmup_steps=10, decay_steps=30), 39)
    with pytest.raises(UserError, match="cycles"):
        check_schedule(CosineWithRestarts(kind="cosine_with_restarts", cycles=11), 10)
    for schedule in ALL:
        check_schedule(schedule, 100)
    check_schedule(Constant(kind="constant", warmup_steps=10), 10)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (LRScaling(), 1.0),
        (LRScaling(rule="none", reference_world_size=1), 1.0),
        (LRScaling(rule="linear", reference_world_size=1), 4.0),
        (LRScaling(rule="linear", reference_world_size=8), 0.5),
        (LRScaling(rule="sqrt", reference_world_size=1), 2.0),
        (LRScaling(rule="linear", reference_global_batch_size=64), 8.0),
        (LRScaling(rule="sqrt", reference_global_batch_size=2048), 0.5),
        (LRScaling(rule="sqrt", reference_global_batch_size=512), 1.0),
    ],
)
def test_lr_scale(scaling: LRScaling, factor: float) -> None:
    assert lr_scale(scaling, world_size=4, global_batch=512) == factor
