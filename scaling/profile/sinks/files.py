"""The run's own record, in files; and one in memory, for comparisons."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from scaling.errors import StorageError
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.redact import redacted_json
from scaling.run_folder import EVENTS, METRICS, VALIDATION, strict

logger = logging.getLogger("scaling")


class JsonLines:
    """metrics.jsonl, validation.jsonl and events.jsonl, each record in its file before the next step ends.

    While the disk is full, records wait in memory for a place; closing raises StorageError for those still waiting.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / name).open("ab", buffering=0) for name in (METRICS, VALIDATION, EVENTS)}
        self._waiting: dict[str, bytes] = dict.fromkeys(self._files, b"")

    def begin(self, first_step: int, last_step: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self._write(METRICS, dataclasses.asdict(record))

    def validation(self, record: ValidationRecord) -> None:
        self._write(VALIDATION, dataclasses.asdict(record))

    def event(self, event: Event) -> None:
        # Of the three the only one with texts from outside: what a save failed of, say.
        self._write(EVENTS, redacted_json(dataclasses.asdict(event)))

    def close(self) -> None:
        lost = [name for name in self._files if self._write_out(name)]
        for file in self._files.values():
            file.close()
        if lost:
            raise StorageError(f"the run folder must have room, but {self._folder / lost[0]} is not whole; free some")

    def _write(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps(strict(record), allow_nan=False) + "\n"
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


class Memory:
    """Keeps the records in lists, for comparisons."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self.events: list[Event] = []

    def begin(self, first_step: int, last_step: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass
