"""A line for each record."""

import logging
import sys
from typing import Any

from scaling.records import Event, StepRecord, ValidationRecord
from scaling.units import format_bytes, format_count, format_seconds

logger = logging.getLogger("scaling")


class Terminal:
    """A line for each record, in train.log too; on a terminal also a bar that moves at every record."""

    def __init__(self) -> None:
        self._last_step = 0
        self._bar: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        self._last_step = last_step
        if sys.stdout.isatty():
            self._bar = _progress_bar(first_step, last_step)

    def step(self, record: StepRecord) -> None:
        logger.info(step_line(record, self._last_step))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.step)

    def validation(self, record: ValidationRecord) -> None:
        logger.info(validation_line(record))

    def event(self, event: Event) -> None:
        pass  # whoever makes it has a line of its own in the log

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def step_line(record: StepRecord, last_step: int) -> str:
    """A step as a line of the log."""
    memory = record.memory["allocated_peak_bytes"] or record.memory["host_rss_bytes"]
    left = (last_step - record.step) * record.step_seconds
    lr = " ".join(f"{value:.2e}" for value in dict.fromkeys(record.lr.values()))
    parts = [
        f"step {record.step:>{len(str(last_step))}}/{last_step}",
        f"loss {record.loss:.4f}",
        f"lr {lr}",
        f"grad norm {record.grad_norm:.3f}",
        *([f"length {record.sequence_length}"] if record.sequence_length is not None else []),
        f"{format_count(record.tokens_per_second)} tokens/s",
        *([f"MFU {record.mfu:.1%}"] if record.mfu is not None else []),
        *([format_bytes(memory)] if memory is not None else []),
        f"{format_seconds(left)} left",
        *(["REFUSED: not finite, nothing was updated"] if record.skipped else []),
    ]
    return "  ".join(parts)


def validation_line(record: ValidationRecord) -> str:
    """A validation as a line of the log."""
    bits = "" if record.bits_per_byte is None else f"  {record.bits_per_byte:.4f} bits per byte"
    bits += "".join(f"  {name} {value:.4f}" for name, value in record.measures.items())
    tokens = format_count(record.tokens)
    return (
        f"validation after step {record.step}: loss {record.loss:.4f}{bits}  ({tokens} {record.unit}, "
        f"{format_seconds(record.seconds)})"
    )


def _progress_bar(first_step: int, last_step: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    bar.add_task("training", total=last_step, completed=first_step)
    bar.start()
    return bar
