"""TensorBoard's event files."""

import os
import re
import socket
import time
from pathlib import Path
from typing import IO, Any

from scaling.profile.sinks.scalars import step_scalars, validation_scalars
from scaling.records import Event, StepRecord, ValidationRecord


class TensorBoard:
    """Event files in the run folder, each record in its file before the call returns.

    torch's SummaryWriter has a thread, which prints a traceback where the disk is full and raises it records later, and
    a queue that is waited for; a run keeps this sink in the background anyway, and writes there and then.
    """

    def __init__(self, folder: Path) -> None:
        # Slow to import, and not everyone wants it; now, and not when training has begun.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2  # what is in them is made when they are loaded
        self._summaries: Any = summary_pb2
        self._make_writer = RecordWriter
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        # As tensorboard's own writer has it, whose readers go by the name.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (self._folder / name).open("wb")
        self._writer = self._make_writer(self._file)
        self._write(file_version="brain.Event:2")
        if first_step:
            # What an earlier start of this run wrote beyond the checkpoint is shown no longer.
            log = self._events.SessionLog
            self._write(step=first_step + 1, session_log=log(status=log.START))

    def step(self, record: StepRecord) -> None:
        self._add(step_scalars(record), record.step, record.wall_time)

    def validation(self, record: ValidationRecord) -> None:
        self._add(validation_scalars(record), record.step, record.wall_time)

    def event(self, event: Event) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, scalars: dict[str, float], step: int, wall_time: float) -> None:
        values = [
            self._summaries.Summary.Value(tag=re.sub(r"[^-/\w.]", "_", name), simple_value=value)
            for name, value in scalars.items()
        ]
        self._write(step=step, wall_time=wall_time, summary=self._summaries.Summary(value=values))

    def _write(self, **fields: Any) -> None:
        assert self._file is not None, "begin comes first"
        event = self._events.Event(**{"wall_time": time.time(), **fields})
        self._writer.write(event.SerializeToString())
        self._file.flush()
