"""How a run ended, when several processes see it end at once: the first word stands.

RUN/failures/ATTEMPT/ holds what is known of one failure: report and Python stacks of each rank, and `outcome.json`.
An attempt is one start of the run on all its ranks; a restart is another one.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

EXIT, FAILURES, OUTCOME, ALARM = "exit.json", "failures", "outcome.json", "alarm"
HUNG, DIED = 8, 9


class Outcome(NamedTuple):
    """The end of a run that failed."""

    code: int
    reason: str
    rank: int | None
    """The rank at fault, where that is known."""
    step: int | None


def settle(folder: Path, attempt: str, outcome: Outcome) -> tuple[Outcome, bool]:
    """Say how an attempt at the run in `folder` ended; returns what stands, and whether it is this.

    Whoever comes first has the word, and writes exit.json. Raises OSError where the folder cannot be written to.
    """
    place = failure_folder(folder, attempt)
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**outcome._asdict(), "time": time.time()}, indent=2) + "\n"
    if not _create(place / OUTCOME, text):
        return settled(folder, attempt) or outcome, False
    write_whole(folder / EXIT, text)
    return outcome, True


def settled(folder: Path, attempt: str) -> Outcome | None:
    """The outcome of an attempt; None while it has none."""
    found = read_json(failure_folder(folder, attempt) / OUTCOME)
    return None if found is None else Outcome(found["code"], found["reason"], found["rank"], found["step"])


def await_outcome(folder: Path, attempt: str, seconds: float) -> Outcome | None:
    """The outcome of an attempt, which another process may be about to write; None if none comes within `seconds`."""
    end = time.monotonic() + seconds
    while (found := settled(folder, attempt)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return found


def failure_folder(folder: Path, attempt: str) -> Path:
    """Where what is known of the failure of an attempt lies. Made only when there is one."""
    return folder / FAILURES / attempt


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file, or not all of it yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _create(path: Path, text: str) -> bool:
    """Write `path`, whole, unless it exists; returns whether it was written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(text)
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)
