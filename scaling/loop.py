"""The training loop: one for every way of distributing the work, none of which it knows."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scaling.checkpoint.keeper import Keeper
from scaling.data.dataset import Samples
from scaling.data.hashing import derive
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.errors import Stopped, StoppedUnsaved
from scaling.nonfinite import NonFinitePolicy
from scaling.objectives import Objective
from scaling.profile.clock import Clock
from scaling.profile.gradients import GradientNorms
from scaling.profile.recorder import Landed, Recorder, StepResult
from scaling.records import BatchPlan, Progress, ValidationRecord
from scaling.schedule import lr_factor
from scaling.spec.sections import AnySchedule
from scaling.units import format_seconds
from scaling.watch.heartbeat import Heartbeat


@dataclass(frozen=True)
class Course:
    """What is to be done when: the part of a job that the loop follows."""

    plan: BatchPlan
    seed: int
    schedule: AnySchedule
    max_steps: int
    """Where the schedule ends."""
    last_step: int
    """Where this run ends."""
    validation_interval: int | None
    save_best: bool
    """Save after each validation that is better than all before."""
    terms: int | None = None
    """Of the loss of each step, over all ranks; None where ranks have to tell each other."""


def train(
    engine: Engine,
    objective: Objective,
    batches: Iterator[list[Samples]],
    process: Process,
    recorder: Recorder,
    keeper: Keeper,
    policy: NonFinitePolicy,
    course: Course,
    progress: Progress,
    *,
    validate: Callable[[int], ValidationRecord],
    stop_requested: Callable[[], bool],
    time_left: Callable[[], float | None],
) -> None:
    """Take the optimizer steps of `course` that `progress` has not.

    `validate(steps done)` runs every `validation_interval` steps and after the last. Raises, on all ranks alike,
    NonFinite or GoBack where the loss or the gradient of any rank is not finite, and Stopped when any rank was asked to
    stop: after saving, unless that needs more than the seconds of `time_left()`.
    """
    engine.module.train()

    def settled(landed: list[Landed]) -> bool:
        """Act on what steps found; returns whether to stop."""
        for step in landed:
            policy.take(step, is_main=process.is_main)
            if step.save_failed:
                keeper.check()
        return any(step.stop for step in landed)

    while progress.step < course.last_step:
        recorder.begin(progress.step + 1)
        _seed_step(course.seed, progress.step, process)
        lr = _set_learning_rates(engine.param_groups, lr_factor(course.schedule, progress.step, course.max_steps))
        with recorder.clock.phase("data"):
            micro_batches = next(batches)
        loss_scale, first_sample = engine.loss_scale, progress.first_sample(course.plan)
        requests = (stop_requested(), keeper.failed)
        norms = recorder.norms_of(progress.step + 1)
        result = train_step(engine, objective, micro_batches, process, recorder.clock, requests, norms, course.terms)
        progress = progress.after(course.plan)
        stop = settled(recorder.step(progress, first_sample, result, lr=lr, loss_scale=loss_scale))
        keeper.poll()

        last = progress.step == course.last_step
        interval = course.validation_interval
        validates = interval is not None and (progress.step % interval == 0 or last)
        if validates or stop or last or keeper.due(progress.step):
            # A state that is saved, or measured, must be known to be sound.
            stop = settled(recorder.drain()) or stop
            improved = False
            if validates:
                recorder.heartbeat.beat("validation")
                with recorder.pause("validation"):
                    record = validate(progress.step)
                    recorder.validation(record)
                improved = progress.best is None or record.loss < progress.best[1]
                progress = replace(progress, best=(progress.step, record.loss)) if improved else progress
            if stop and not last:
                _check_time(process, keeper, time_left(), progress.step)
            if stop or last or keeper.due(progress.step) or (improved and course.save_best):
                recorder.heartbeat.beat("save")
                with recorder.pause("checkpoint"):
                    keeper.save(engine, progress)
        if stop and not last:
            keeper.finish()
            raise Stopped(f"stopped by a signal after step {progress.step}, which is saved", step=progress.step)
    recorder.heartbeat.beat("save")
    keeper.finish()
    recorder.heartbeat.beat("closing")


def _check_time(process: Process, keeper: Keeper, left: float | None, step: int) -> None:
    """StoppedUnsaved, on all ranks, where one of them would be killed before its save has ended."""
    found = process.gather_objects((left, keeper.needs_s))
    lefts = [seconds for seconds, _ in found if seconds is not None]
    needs = [seconds for _, seconds in found if seconds is not None]
    if lefts and needs and max(needs) > min(lefts):
        raise StoppedUnsaved(
            f"stopped by a signal after step {step}, which is not saved: saving takes {format_seconds(max(needs))}, "
            f"and of `checkpoint.grace` {format_seconds(max(0.0, min(lefts)))} are left; the newest checkpoint stands",
            step=step,
        )


def _seed_step(seed: int, step: int, process: Process) -> None:
    """Make all that is random in a step (dropout) a function of the seed, the step and the rank: none is ever saved.

    Not by `torch.manual_seed`, which where CUDA is not in use formats two stack traces at each call: most of a
    millisecond in which nothing is computed (torch/cuda/__init__.py, `_lazy_call`).
    """
    value = derive(seed, step, process.rank) >> 1
    torch.default_generator.manual_seed(value)
    if process.device.type == "cuda":
        torch.cuda.manual_seed(value)


def train_step(
    engine: Engine,
    objective: Objective,
    micro_batches: list[Samples],
    process: Process,
    clock: Clock,
    requests: tuple[bool, bool],
    norms: GradientNorms | None = None,
    known_terms: int | None = None,
) -> StepResult:
    """One optimizer step over the micro-batches of this rank. `requests`: to stop; to look at a save that failed.

    `norms`: what is to be told of the gradient's parts, if anything. `known_terms`: of all ranks' samples.
    """
    device = process.device
    counted = _begin_count(micro_batches, known_terms, process)
    terms = scale = 1.0
    total, told = None, None
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with engine.micro_step(last=last):
            with clock.phase("forward"):
                loss = objective(engine.module, _to(batch, device))
            own = loss.detach().float()
            total = own if total is None else total + own
            if last:
                told = engine.begin_sum(_own_row(total, requests, process))
            if index == 0:
                # Gradients are averaged over ranks, so each rank's share of the sum is scaled up by their number.
                terms = counted()
                scale = process.world_size / terms
            # Less 0 of the loss, which is NaN where it is not finite: then no gradient is either, on any rank, and the
            # engine refuses the update.
            weight = torch.rsub(own, scale, alpha=0)
            with clock.backward(loss):
                engine.backward(loss, weight)
            del loss, own  # of the first `total` is all there is: no later micro-step is to hold more than the second
    assert told is not None
    with clock.phase("optimizer"):
        parts = None if norms is None else norms.over_ranks(engine.gradient_norms(), process)
        norm = engine.step()
    return StepResult(told(), terms, norm, parts)


def _begin_count(
    micro_batches: list[Samples], known: int | None, process: Process
) -> Callable[[], Tensor] | Callable[[], float]:
    """What is returned has the number of terms of all ranks, but at least 1."""
    if known is not None:
        return lambda: max(1.0, known)
    own = torch.tensor(float(sum(batch.terms for batch in micro_batches)), device=process.device)
    count = process.begin_sum(own)  # while the first forward pass runs
    return lambda: count().clamp_(min=1.0)


def measure_validation(
    engine: Engine,
    objective: Objective,
    batches: Iterator[Samples],
    process: Process,
    heartbeat: Heartbeat,
    *,
    step: int,
    bytes_per_token: float | None,
) -> ValidationRecord:
    """The mean loss over the terms (target tokens) of `batches` on all ranks; every rank must bring as many batches."""
    began = time.perf_counter()
    engine.module.eval()
    measure = getattr(objective, "measures", lambda module, batch: {"loss": objective(module, batch)})
    sums: dict[str, float] = {"terms": 0.0}
    unit = Samples.unit
    with torch.no_grad():
        for batch in batches:
            heartbeat.part()
            unit = batch.unit
            sums["terms"] += batch.terms
            for name, found in measure(engine.module, _to(batch, process.device)).items():
                # A wait for the device at each batch; validation is a pause anyway.
                sums[name] = sums.get(name, 0.0) + float(found)
    engine.module.train()
    everywhere = torch.tensor([*sums.values()], dtype=torch.float64, device=process.device)
    totals = dict(zip(sums, process.sum_over_ranks(everywhere).tolist(), strict=True))
    terms = totals.pop("terms")
    means = {name: total / max(1.0, terms) for name, total in totals.items()}
    loss = means.pop("loss")
    bits_per_byte = None if bytes_per_token is None else loss / 0.6931471805599453 / bytes_per_token
    seconds = time.perf_counter() - began
    return ValidationRecord(step, loss, bits_per_byte, int(terms), seconds, time.time(), unit, means)


def _own_row(total: Tensor, requests: tuple[bool, bool], process: Process) -> Tensor:
    """What this rank adds to the row of all: its requests, and its summed loss at a place of its own."""
    row = torch.full((2 + process.world_size,), 0.0)
    if any(requests):
        row[:2] = torch.tensor(requests)
    row = row.to(total.device, non_blocking=True)
    row[2 + process.rank] = total
    return row


def _set_learning_rates(groups: list[dict[str, Any]], factor: float) -> dict[str, float]:
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return {group["name"]: group["lr"] for group in groups}


def _to(batch: Samples, device: torch.device) -> Samples:
    if device.type == "cpu":
        return batch
    return batch.each(lambda tensor: tensor.to(device, non_blocking=True))
