"""What the user can do wrong, as exceptions that carry the exit code of the run (see the table in README.md)."""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake of the user's: printed as one message without a traceback.

    `str(error)` is the message, in the form "`field` must be …, but is …; do …".
    """

    code = 2
    """Exit code of the process: the spec or the command line is wrong."""
    step: int | None = None
    """Optimizer step at which it came to light, where it was during training."""
    rank: int | None = None
    """The rank at fault, where that is known."""
    shared = False
    """Every rank raises it alike, so that rank 0 can speak for all."""


class DoesNotFit(UserError):
    """The job needs more memory than the device has."""

    code = 3


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; every rank raises it alike."""

    code = 4
    shared = True

    def __init__(self, message: str, *, step: int, rank: int | None) -> None:
        super().__init__(message)
        self.step, self.rank = step, rank


class CheckpointError(UserError):
    """A checkpoint cannot be used: damaged, or of another model."""

    code = 5


class StorageError(UserError):
    """The run folder cannot be used: full, read-only, or holding another run."""

    code = 6


class NoProgress(UserError):
    """The run was started again and again and never got to another checkpoint."""

    code = 7


class Hung(UserError):
    """A rank showed no sign of life for longer than its phase may take."""

    code = 8


class RankDied(UserError):
    """A rank is gone, and the others cannot go on without it."""

    code = 9


class Stopped(UserError):
    """Not a mistake: a signal asked the run to stop, and it has saved."""

    code = 75
    shared = True

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class StoppedUnsaved(Stopped):
    """A signal asked the run to stop, and there was no time to save."""

    code = 128 + 15  # as shells report SIGTERM, which a kill would have followed


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are messages like all others, and that takes no shortened options."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print; its own exit code is 2 as well."""
        raise UserError(f"the command line must be as in `{self.prog} --help`, but has an error: {message}; correct it")


def positive(text: str) -> int:
    """`type=positive` of a command line's option: a whole number from 1 to 2^20."""
    if not (text.isdecimal() and len(text) <= 9 and 0 < int(text) <= 2**20):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {2**20}, but is {text[:40]!r}")
    return int(text)


def write_output(path: Path | str, text: str, flag: str, remedy: str = "") -> None:
    """Write the file that a command line's `flag` names; UserError where it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        told = f"`{flag}` must be a file that can be written, but {str(path)[:200]} is not: {reason}"
        raise UserError(f"{told}; {remedy}" if remedy else told) from None


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code of the process; a UserError becomes its message on standard error.

    Entry points end with `run_program(main)`.
    """
    try:
        code = main() or 0
        sys.stdout.flush()  # here, where a reader that has gone is handled, not at interpreter exit
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 128 + 2  # as shells report SIGINT
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as shells report SIGPIPE


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the exit code of `run_command`."""
    code = run_command(main)
    gc.freeze()  # before its end the interpreter looks through all there is, several times: with torch, for a second
    sys.exit(code)
