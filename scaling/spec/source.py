"""Where a spec's text comes from: a file, a recipe of the package or standard input."""

import difflib
import os
import stat
import sys
from itertools import islice
from typing import TextIO

from scaling.errors import UserError
from scaling.spec.scan import quoted

LIMIT_BYTES = 2**20
"""Far above any spec; a file beyond it is something else, and would only be slow to refuse."""


def read_source(source: str) -> tuple[str, str]:
    """The name that messages use for `source`, and its text."""
    if source == "-":
        return "<stdin>", _decode("<stdin>", _read_stdin())
    if not os.path.isfile(source) and source in recipes():
        name = f"{source}.json"
        return name, (_recipe_folder() / name).read_text("utf-8")
    name = quoted(source, limit=200)
    return name, _decode(name, _read_file(source))


def recipes() -> list[str]:
    """Names of the package's ready specs."""
    return sorted(entry.name.removesuffix(".json") for entry in _recipe_folder().iterdir() if ".json" in entry.name)


def _recipe_folder():  # its type is importlib's, and importing that is what takes the time
    from importlib.resources import files

    return files("scaling") / "recipes"


def _read_stdin() -> bytes:
    try:
        stdin: TextIO | None = sys.stdin  # None: the shell closed it (`<&-`)
        return stdin.buffer.read(LIMIT_BYTES + 1) if stdin else b""
    except OSError as error:
        raise _unreadable("<stdin>", error) from None


def _read_file(source: str) -> bytes:
    try:
        # Without blocking: opening a FIFO would wait for its writer. What was opened is then what is looked at.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise UserError(_missing(source)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(quoted(source), error) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        hint = "name a file in it" if stat.S_ISDIR(mode) else "pass - to read standard input"
        raise UserError(f"{quoted(source)}: the spec must be a regular file, but is {what}; {hint}")
    try:
        with open(handle, "rb") as file:
            return file.read(LIMIT_BYTES + 1) or b""  # None of some files in /proc: they claim to be regular, and block
    except OSError as error:  # a network file system that lost its server, say
        raise _unreadable(quoted(source), error) from None


def _unreadable(name: str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UserError(f"{name}: the spec must be readable, but is not: {reason}; correct that")


def _decode(name: str, content: bytes) -> str:
    if len(content) > LIMIT_BYTES:
        raise UserError(f"{name}: the spec must have at most {LIMIT_BYTES} bytes, but has more; shorten it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: the spec must be UTF-8, but has the byte 0x{content[error.start]:02x}; save it as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{name}: the spec must be a JSON object, but is empty; start from a recipe: {_listed()}")
    return text


def _missing(source: str) -> str:
    folder, name = os.path.split(source)
    try:
        with os.scandir(folder or ".") as entries:
            beside = [entry.name for entry in islice(entries, 10_000)]
    except OSError:
        return f"{quoted(source)}: the spec must be a file, but the folder {quoted(folder)} cannot be read; correct it"
    near = [os.path.join(folder, n) for n in difflib.get_close_matches(name, beside, cutoff=0.5)]
    near += difflib.get_close_matches(name.removesuffix(".json"), recipes(), cutoff=0.5)
    hint = f"did you mean {' or '.join(quoted(n) for n in near)}?" if near else f"the recipes are {_listed()}"
    return (
        f"{quoted(source, limit=200)}: the spec must be a JSON file, a recipe's name or -, "
        f"but there is no such file or recipe; {hint}"
    )


def _listed() -> str:
    return ", ".join(recipes())
