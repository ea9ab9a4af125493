"""Files of JSON objects, one a line (.jsonl), and of rows (.parquet, .arrow)."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scaling.data.cache import TokenCounts
from scaling.data.files import changed, digest_of, unreadable
from scaling.data.tables import TABLES, read_rows
from scaling.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Malformed(ValueError):
    """Why a line is not what it must be: "`field` must be …, but is …"."""


@dataclass(frozen=True)
class Line:
    """One line of a jsonl file, or one row of a table."""

    path: Path
    number: int
    """From 1."""
    size_bytes: int
    value: Any
    """The parsed object, or Malformed where it is none."""


def read_lines(path: Path, digest: str) -> Iterator[Line]:
    """The lines of a file that are not blank, or its rows; UserError for one that cannot be read, or is not of this
    SHA-256."""
    if path.suffix in TABLES:
        for number, (size_bytes, row) in enumerate(read_rows(path), 1):
            yield Line(path, number, size_bytes, row)
        if digest_of(path)[0] != digest:
            raise changed(path)
        return
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for number, content in enumerate(file, 1):
                found.update(content)
                if content.strip():
                    yield Line(path, number, len(content), _parsed(content))
    except OSError as error:
        raise unreadable(path, error) from error
    if found.hexdigest() != digest:
        raise changed(path)


def read_each(lines: Iterable[Line], read: Callable[[Any], T], malformed: str, counts: TokenCounts) -> Iterator[T]:
    """What `read` makes of each line's object. One that is Malformed is a UserError where that is to be refused, and
    else counted as left out."""
    for line in lines:
        try:
            yield read(line.value)
        except Malformed as why:
            if malformed == "refuse":
                raise UserError(
                    f'{line.path}:{line.number}: {why}; correct the line, or set `data.malformed` to "skip"'
                ) from why
            counts.left_out += 1


def tell_left_out(count: int, field: str) -> None:
    """A warning where lines were left out."""
    if count:
        logger.warning(
            f'WARNING: {count:,} lines of `{field}` are left out: they are malformed, and `data.malformed` is "skip"'
        )


def text_of(record: Any, field: str, place: str = "") -> str:
    """The text that a field has; `place` is what errors call it. Raises Malformed where it is empty or none."""
    if isinstance(record, Malformed):
        raise record
    if not isinstance(record, dict):
        raise Malformed(f"the line must be a JSON object, but is {kind_of(record)}")
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "absent" if field not in record else "empty" if isinstance(value, str) else kind_of(value)
        raise Malformed(f"`{place or field}` must be text, but is {found}")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value in ([], {}) or value is None:
        return "empty" if value is not None else "null"
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "something else")


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        return Malformed(f"the line must be UTF-8, but is not at byte {error.start}")
    except RecursionError:
        return Malformed("the line must be JSON, but is nested too deeply")
    except ValueError as error:
        return Malformed(f"the line must be JSON, but is not: {error}")
