"""The live view of a run on a terminal: one screen under the log, redrawn by a thread of its own."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.profile.sinks.guard import tell_failure
from scaling.profile.sinks.screen import About, Line, Story, lines
from scaling.profile.sinks.terminal import step_line, validation_line
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.redact import redacted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

logger = logging.getLogger("scaling")

SHORTEST_S, IDLE_S = 0.5, 2.0
"""Between two drawings; and between two where nothing has come, for the clock to move."""
_LOG_ROWS = 4
"""Of the terminal that are left to the lines of the log above the view, and to the cursor below it."""
_MOST_READ = 500
"""Losses of earlier starts of the run that are shown."""


class Live:
    """One screen that follows the run, below the lines of the log; its own lines go to train.log alone.

    The training thread puts records down and goes on; a thread draws. Nothing is to be put right at the end but
    sys.stdout: the cursor stays visible, and the screen is the terminal's usual one, even after a kill. If drawing
    fails, the lines come to the terminal instead.
    """

    def __init__(self, about: About, metrics: Path | None = None, console: "Console | None" = None) -> None:
        """`metrics`: the file with the losses of earlier starts of this run."""
        self._story = Story(about)
        self._metrics = metrics
        self._console = console
        self._lock = threading.RLock()  # a signal may log a warning while this thread has it
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Any = None
        self._warnings = _Warnings(self._warn)
        self._consoles: list[logging.Handler] = []

    def begin(self, first_step: int, last_step: int) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        story = self._story
        story.first_step, story.last_step, story.began = first_step, last_step, time.time()
        if first_step and self._metrics is not None:
            for loss, step in earlier_losses(self._metrics, first_step):
                story.loss(loss, step)
        self._console = self._console or Console(highlight=False)
        # What is written to standard error is shown above the view where it would come to the same terminal.
        self._live = RichLive(
            console=self._console,
            auto_refresh=False,
            vertical_overflow="crop",
            redirect_stderr=sys.stderr.isatty(),
        )
        logger.addHandler(self._warnings)
        self._consoles = [one for one in logger.handlers if _is_terminal(one)]
        for handler in self._consoles:
            handler.addFilter(_not_in_view)
        self._draw()
        self._live.start()
        self._console.show_cursor(True)
        self._thread = threading.Thread(target=self._work, name="sink Live", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        logger.info(step_line(record, self._story.last_step), extra=_IN_VIEW)
        with self._lock:
            self._story.step(record)
        self._news.set()

    def validation(self, record: ValidationRecord) -> None:
        logger.info(validation_line(record))
        with self._lock:
            self._story.validate(record)
        self._news.set()

    def event(self, event: Event) -> None:
        with self._lock:
            self._story.event(event)
        self._news.set()

    def close(self) -> None:
        self._closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(2.0)
        self._leave()

    def _warn(self, text: str) -> None:
        with self._lock:
            self._story.warnings.append(text)
        self._news.set()

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                self._news.wait(IDLE_S)
                self._news.clear()
                self._draw(refresh=True)
                self._closing.wait(SHORTEST_S)
            self._draw(refresh=True)
        except Exception as error:  # the terminal is gone, or a number is not one
            self._leave()
            tell_failure("the live view", error)

    def _leave(self) -> None:
        """Give the terminal back to the lines of the log. The last view stays on it."""
        logger.removeHandler(self._warnings)
        for handler in self._consoles:
            handler.removeFilter(_not_in_view)
        if self._live is not None:
            self._live.stop()

    def _draw(self, *, refresh: bool = False) -> None:
        """Make the view and show it. It is kept as what is written, so that a line of the log costs no drawing."""
        console = self._console
        assert console is not None
        width, height = console.size
        width -= 1  # some terminals go to the next line after the last column
        with self._lock:
            view = lines(
                self._story,
                width,
                height - _LOG_ROWS,
                time.time(),
                ascii_only=console.options.ascii_only,
            )
        self._live.update(_Frame(_segments(view, width)), refresh=refresh)


_IN_VIEW = {"in_view": True}


def _not_in_view(record: logging.LogRecord) -> bool:
    return not getattr(record, "in_view", False)


def _is_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


class _Warnings(logging.Handler):
    """Keeps warnings in the view, where the log has scrolled on."""

    def __init__(self, warn: Any) -> None:
        super().__init__(logging.WARNING)
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        first_line = (record.getMessage().splitlines() or [""])[0]
        self._warn(f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {redacted(first_line)}")


class _Frame:
    """A drawn view, as rich writes it."""

    def __init__(self, segments: "list[Segment]") -> None:
        self._segments = segments

    def __rich_console__(self, console: "Console", options: Any) -> "Iterable[Segment]":
        return self._segments


def _segments(view: list[Line], width: int) -> "list[Segment]":
    from rich.segment import Segment
    from rich.style import Style

    found: list[Segment] = []
    for line in view:
        pieces = [Segment(_printable(text), Style.parse(style)) for text, style in line if text]
        found += Segment.adjust_line_length(pieces, min(width, sum(piece.cell_length for piece in pieces)))
        found.append(Segment.line())
    return found[:-1]


def _printable(text: str) -> str:
    """Without what would move the cursor."""
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)


def earlier_losses(metrics: Path, until: int) -> list[tuple[float, int]]:
    """(loss, step) of some hundred of the lines up to a step, spread evenly."""
    try:
        rows = metrics.read_bytes().splitlines()
    except OSError:
        return []
    found: list[tuple[float, int]] = []
    for row in rows[:: len(rows) // _MOST_READ + 1]:
        try:
            line = json.loads(row)
            loss, step = line["loss"], line["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(loss, float) and isinstance(step, int) and step <= until:
            found.append((loss, step))
    return found
