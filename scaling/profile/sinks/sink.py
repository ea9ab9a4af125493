"""What every place for records can be told."""

from typing import Protocol

from scaling.records import Event, StepRecord, ValidationRecord


class Sink(Protocol):
    """A place that records are written to. All calls come from the thread that trains, `begin` first."""

    def begin(self, first_step: int, last_step: int) -> None:
        """Training goes on from `first_step` steps done, to `last_step`."""
        ...

    def step(self, record: StepRecord) -> None: ...
    def validation(self, record: ValidationRecord) -> None: ...
    def event(self, event: Event) -> None: ...

    def close(self) -> None:
        """No more records come. Also called where training was cut short."""
        ...
