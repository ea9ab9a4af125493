"""The training loop: one for every way of distributing the work, none of which it knows."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from scaling.data.dataset import MicroBatch
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.objectives import Objective
from scaling.profile.recorder import Recorder, StepResult
from scaling.records import IGNORED, ValidationRecord
from scaling.schedule import lr_factor
from scaling.spec.sections import AnySchedule


def train(
    engine: Engine,
    objective: Objective,
    batches: Iterator[list[MicroBatch]],
    process: Process,
    recorder: Recorder,
    *,
    schedule: AnySchedule,
    max_steps: int,
    stop_after: int,
    validation_interval: int | None = None,
    validate: Callable[[int], ValidationRecord] | None = None,
) -> None:
    """Take `stop_after` optimizer steps of a schedule of `max_steps`.

    `validate(steps done)` runs every `validation_interval` steps and after the last.
    Raises NonFinite, on all ranks alike, when the loss or the gradient of any rank is not finite.
    """
    engine.module.train()
    for step in range(stop_after):
        lr = _set_learning_rates(engine.param_groups, lr_factor(schedule, step, max_steps))
        with recorder.clock.phase("data"):
            micro_batches = next(batches)
        loss_scale = engine.loss_scale
        result = _train_step(engine, objective, micro_batches, process, recorder)
        done = step + 1
        recorder.step(done, result, lr=lr, loss_scale=loss_scale)
        if validate and validation_interval and (done % validation_interval == 0 or done == stop_after):
            with recorder.pause():
                recorder.validation(validate(done))


def _train_step(
    engine: Engine, objective: Objective, micro_batches: list[MicroBatch], process: Process, recorder: Recorder
) -> StepResult:
    clock, device = recorder.clock, process.device
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches)
    targets = process.sum_over_ranks(torch.tensor(float(targets), device=device)).clamp(min=1.0)
    # Gradients are averaged over ranks; each rank's share of the sum is therefore scaled up by their number.
    scale = process.world_size / targets
    total = torch.full((), 0.0, device=device)
    for index, batch in enumerate(micro_batches):
        with engine.micro_step(last=index == len(micro_batches) - 1):
            with clock.phase("forward"):
                loss = objective(engine.module, _to(batch, device))
            with clock.phase("backward"):
                engine.backward(loss * scale)
        total += loss.detach()
    with clock.phase("optimizer"):
        norm = engine.step()
    loss, bad_ranks = _over_ranks(total, process)
    return StepResult(loss / targets, norm, bad_ranks)


def measure_validation(
    engine: Engine,
    objective: Objective,
    batches: Iterator[MicroBatch],
    process: Process,
    *,
    step: int,
    bytes_per_token: float | None,
) -> ValidationRecord:
    """The mean loss over the target tokens of `batches` on all ranks; every rank must bring as many batches."""
    began = time.perf_counter()
    engine.module.eval()
    sums = torch.full((2,), 0.0, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            loss = objective(engine.module, _to(batch, process.device))
            # A wait for the device at each batch; validation is a pause anyway.
            sums += torch.tensor([float(loss), float((batch.targets != IGNORED).sum())], dtype=torch.float64)
    engine.module.train()
    total, tokens = process.sum_over_ranks(sums.to(process.device)).tolist()
    loss = total / max(1.0, tokens)
    bits_per_byte = None if bytes_per_token is None else loss / 0.6931471805599453 / bytes_per_token
    return ValidationRecord(step, loss, bits_per_byte, int(tokens), time.perf_counter() - began)


def _over_ranks(total: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    """The summed loss of all ranks, and which ranks' own was not finite, in one collective."""
    values = torch.full((1 + process.world_size,), 0.0, device=total.device)
    values[0] = total
    values[1 + process.rank] = (~total.isfinite()).float()
    process.sum_over_ranks(values)
    return values[0], values[1:]


def _set_learning_rates(groups: list[dict[str, Any]], factor: float) -> dict[str, float]:
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return {group["name"]: group["lr"] for group in groups}


def _to(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return MicroBatch(batch.inputs.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True))
