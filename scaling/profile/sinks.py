"""Where records go: files, TensorBoard, the terminal. Only rank 0 has any."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, Protocol

from scaling.errors import StorageError
from scaling.records import StepRecord, ValidationRecord
from scaling.run_folder import METRICS, VALIDATION, strict
from scaling.units import format_bytes, format_count, format_seconds

logger = logging.getLogger("scaling")


class Sink(Protocol):
    """A place that records are written to."""

    def begin(self, first_step: int, last_step: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def validation(self, record: ValidationRecord) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl and validation.jsonl, each record in its file before the next step ends.

    While the disk is full, records wait in memory for a place; closing raises StorageError for those still waiting.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / name).open("ab", buffering=0) for name in (METRICS, VALIDATION)}
        self._waiting: dict[str, bytes] = dict.fromkeys(self._files, b"")

    def begin(self, first_step: int, last_step: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self._write(METRICS, record)

    def validation(self, record: ValidationRecord) -> None:
        self._write(VALIDATION, record)

    def close(self) -> None:
        lost = [name for name in self._files if self._write_out(name)]
        for file in self._files.values():
            file.close()
        if lost:
            raise StorageError(f"the run folder must have room, but {self._folder / lost[0]} is not whole; free some")

    def _write(self, name: str, record: Any) -> None:
        line = json.dumps(strict(dataclasses.asdict(record)), allow_nan=False) + "\n"
        waited = bool(self._waiting[name])
        self._waiting[name] += line.encode()
        problem = self._write_out(name)
        if problem and not waited:
            logger.warning(f"WARNING: {self._folder / name}: {problem}; records wait in memory for room")

    def _write_out(self, name: str) -> str | None:
        """Write what waits; returns what went wrong."""
        try:
            while self._waiting[name]:  # a full disk takes a part of a line before it takes none
                self._waiting[name] = self._waiting[name][self._files[name].write(self._waiting[name]) :]
        except OSError as error:
            return error.strerror
        return None


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not everyone wants it

        # What an earlier start of this run wrote beyond the checkpoint is shown no longer.
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1 if first_step else None)

    def step(self, record: StepRecord) -> None:
        scalars: dict[str, float | None] = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/step_seconds": record.step_seconds,
            "speed/mfu": record.mfu,
            **{f"lr/{name}": lr for name, lr in record.lr.items()},
            **{f"memory/{name}": value for name, value in record.memory.items()},
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def validation(self, record: ValidationRecord) -> None:
        self._writer.add_scalar("validation/loss", record.loss, record.step)
        if record.bits_per_byte is not None:
            self._writer.add_scalar("validation/bits_per_byte", record.bits_per_byte, record.step)

    def close(self) -> None:
        self._writer.close()


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
        memory = record.memory["allocated_peak_bytes"] or record.memory["host_rss_bytes"]
        left = (self._last_step - record.step) * record.step_seconds
        lr = " ".join(f"{value:.2e}" for value in dict.fromkeys(record.lr.values()))
        parts = [
            f"step {record.step:>{len(str(self._last_step))}}/{self._last_step}",
            f"loss {record.loss:.4f}",
            f"lr {lr}",
            f"grad norm {record.grad_norm:.3f}",
            f"{format_count(record.tokens_per_second)} tokens/s",
            *([f"MFU {record.mfu:.1%}"] if record.mfu is not None else []),
            *([format_bytes(memory)] if memory is not None else []),
            f"{format_seconds(left)} left",
            *(["REFUSED: not finite, nothing was updated"] if record.skipped else []),
        ]
        logger.info("  ".join(parts))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.step)

    def validation(self, record: ValidationRecord) -> None:
        bits = "" if record.bits_per_byte is None else f"  {record.bits_per_byte:.4f} bits per byte"
        tokens = format_count(record.tokens)
        logger.info(
            f"validation after step {record.step}: loss {record.loss:.4f}{bits}  ({tokens} tokens, "
            f"{format_seconds(record.seconds)})"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Memory:
    """Keeps the records in lists, for comparisons."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []

    def begin(self, first_step: int, last_step: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def close(self) -> None:
        pass


def _progress_bar(first_step: int, last_step: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    bar.add_task("training", total=last_step, completed=first_step)
    bar.start()
    return bar
