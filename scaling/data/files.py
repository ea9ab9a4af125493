"""From the globs of a spec to files."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from scaling.data.tables import saved_files
from scaling.errors import UserError

PYTHON_STDLIB = "python-stdlib"
"""The special entry of a text dataset: text that every machine has."""


def matching_files(patterns: Sequence[str], field: str, *, with_stdlib: bool, with_saved: bool = False) -> list[Path]:
    """The files that the globs match, sorted within each glob, each file once; `field` is what errors call the list.

    Globs are relative to the working folder, `**` matches folders at any depth. A folder that `datasets` has saved
    stands for its files where `with_saved`. UserError for a glob that matches nothing.
    """
    found: dict[Path, None] = {}  # a dict and not a set: it keeps the order
    for pattern in patterns:
        if with_stdlib and pattern == PYTHON_STDLIB:
            matches = _standard_library()
        else:
            found_names = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
            matches = [name for name in found_names if name.is_file()]
            if with_saved:
                saved = {file: None for name in found_names if name.is_dir() for file in saved_files(name, field)}
                # A glob that matches such a folder and what is in it means the rows alone.
                folders = {file.parent for file in saved}
                matches = [*(name for name in matches if name.parent not in folders), *saved]
        if not matches:
            raise UserError(
                f'`{field}` must match files, but "{pattern}" matches none in {Path.cwd()}; '
                "correct it, or start from the folder that it is relative to"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def refuse_shared_files(train: Sequence[Path], validation: Sequence[Path]) -> None:
    """UserError where a file is in both lists: a loss measured on training data would look too good."""
    resolved = {path.resolve() for path in train}
    for path in validation:
        if path.resolve() in resolved:
            raise UserError(
                f"`data.validation` must not share files with data.train, but {path} is in both; "
                "narrow one of them, or set `data.validation` to a fraction"
            )


def digest_of(path: Path) -> tuple[str, int]:
    """SHA-256 of a file's content, hexadecimal, and its size in bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise unreadable(path, error) from error


def changed(path: Path) -> UserError:
    """What to raise for a file that is not what it was when we first looked at it."""
    return UserError(f"data file {path} must not change while it is read, but did; start again when it is complete")


def unreadable(path: Path, error: OSError) -> UserError:
    """What to raise for an input file that the system does not let us read."""
    return UserError(
        f"data file {path} must be readable, but is not: {error.strerror or error}; correct that or leave it out"
    )


def is_standard_library(path: Path) -> bool:
    """Whether the file was found as part of the standard library."""
    return path.is_relative_to(_library_folder())


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _standard_library() -> list[Path]:
    """Its .py files, without installed packages, in an order that does not depend on where Python is installed."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(_library_folder()):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)
