"""JSON with the place of every value: what the `json` module leaves out, and what messages about a spec need.

Stricter than `json`: no NaN, bounded depth and digits, no NUL and no lone surrogate in a text; duplicate keys are kept.
"""

import math
import re
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder

from scaling.redact import without_user_info

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Path = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""

DEPTH = 64
"""Nesting beyond any spec, and far from Python's and pydantic's own limits."""
DIGITS = 1000
"""Length of a number: below the 4300 digits at which Python refuses to convert, above any number that a spec means."""

_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r"[A-Za-z0-9_.+-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<real>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_STRINGS = JSONDecoder()
_WORDS: dict[str, Json] = {"true": True, "false": False, "null": None}
_OTHER_WORDS = {"True": "true", "False": "false", "None": "null", "yes": "true", "no": "false", "nil": "null"}


class JsonFault(ValueError):
    """The first place where the text is not JSON; `str` is a message in the house grammar, without the place."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass
class Scanned:
    """One JSON text, read."""

    value: Json = None
    values: dict[Path, int] = field(default_factory=dict[Path, int])
    """Where each value begins, as an offset into the text."""
    keys: dict[Path, int] = field(default_factory=dict[Path, int])
    """Where each key of an object stands."""
    duplicates: list[tuple[Path, int, int]] = field(default_factory=list[tuple[Path, int, int]])
    """Keys that stand twice: the path and both offsets. `value` has the last."""


def quoted(text: str, limit: int = 60) -> str:
    """`text` for a message: cut where it is long, with nothing that a terminal would act on, and no URL's password."""
    text = without_user_info(text)
    cut = text if len(text) <= limit else f"{text[: limit // 2]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def dotted(path: Path) -> str:
    """`path` as a user writes it."""
    return ".".join(quoted(str(part)) for part in path)


def scan(text: str) -> Scanned:
    """Read `text`, or raise JsonFault."""
    scanner = _Scanner(text)
    scanner.found.value = scanner.value(())
    scanner.skip()
    if scanner.at < len(text):
        raise JsonFault(
            scanner.at, f"the spec must end here, but goes on with `{quoted(text[scanner.at])}`; drop the rest"
        )
    return scanner.found


class _Scanner:
    """A position in a text, moved on by the methods that each read one construct."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found = Scanned()

    def value(self, path: Path) -> Json:
        self.skip()
        if len(path) > DEPTH:
            raise JsonFault(self.at, f"the spec must nest at most {DEPTH} deep, but is deeper here; flatten it")
        self.found.values[path] = self.at
        match self.text[self.at : self.at + 1]:
            case "{":
                return self.object(path)
            case "[":
                return self.array(path)
            case '"':
                return self.string(f"`{dotted(path)}`")
            case _:
                return self.scalar(path)

    def object(self, path: Path) -> Json:
        found: dict[str, Json] = {}
        self.at += 1
        if self.take("}"):
            return found
        while True:
            self.skip()
            start = self.at
            if self.text[start : start + 1] != '"':
                self.fail("a key in double quotes" if found else "a key in double quotes or `}`")
            key = self.string("a key")
            inner = (*path, key)
            if key in found:
                self.found.duplicates.append((inner, self.found.keys[inner], start))
            self.found.keys[inner] = start
            if not self.take(":"):
                self.fail("`:` and a value")
            found[key] = self.value(inner)
            if self.take("}"):
                return found
            if not self.take(","):
                self.fail("`,` or `}`")

    def array(self, path: Path) -> Json:
        found: list[Json] = []
        self.at += 1
        if self.take("]"):
            return found
        while True:
            found.append(self.value((*path, len(found))))
            if self.take("]"):
                return found
            if not self.take(","):
                self.fail("`,` or `]`")

    def string(self, name: str) -> str:
        start = self.at
        try:
            value, self.at = _STRINGS.raw_decode(self.text, start)
        except JSONDecodeError as error:
            reason = error.msg.removesuffix(" at").removesuffix(" starting").lower()
            raise JsonFault(error.pos, f"{name} must be a JSON text, but is not: {reason}; correct it") from None
        if _UNUSABLE.search(value):
            raise JsonFault(start, f"{name} must be text, but has a NUL or half a surrogate pair in it; drop that")
        return value

    def scalar(self, path: Path) -> Json:
        name = f"`{dotted(path)}`" if path else "the spec"
        found = _TOKEN.match(self.text, self.at)
        token = found[0] if found else ""
        number = _NUMBER.fullmatch(token)
        if token not in _WORDS and not number:
            self.fail(f"the value of {name}" if path else "a JSON object")
        if number and len(token) > DIGITS:
            raise JsonFault(self.at, f"{name} must have at most {DIGITS} digits, but has {len(token)}; shorten it")
        if number and number["real"] and not math.isfinite(float(token)):
            raise JsonFault(self.at, f"{name} must be finite, but is {quoted(token)}; lower it")
        self.at += len(token)
        if not number:
            return _WORDS[token]
        return float(token) if number["real"] else int(token)

    def skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at

    def take(self, mark: str) -> bool:
        self.skip()
        taken = self.text.startswith(mark, self.at)
        self.at += taken
        return taken

    def fail(self, wanted: str) -> None:
        """Raise the fault of finding something else than `wanted` here."""
        self.skip()
        rest = self.text[self.at : self.at + 80]
        token = _TOKEN.match(rest)
        there = f"`{quoted(token[0] if token else rest[:1])}` does" if rest else "the text ends"
        raise JsonFault(self.at, f"{wanted} must stand here, but {there}; {self.remedy(rest, wanted)}")

    def remedy(self, rest: str, wanted: str) -> str:
        token = _TOKEN.match(rest)
        word = token[0] if token else ""
        if not rest:
            return "close what is open"
        if wanted.startswith("`:`"):
            return "put it between key and value"
        if rest[0] in "}]" and self.text[: self.at].rstrip().endswith(","):
            return "drop the comma before it"
        if rest.startswith(("//", "/*", "#")):
            return "drop the comment: JSON has none"
        if rest[0] in "'\u2018\u2019\u201c\u201d":
            return 'use "straight double quotes"'
        if word in _OTHER_WORDS and not wanted.startswith("`,`"):
            return f"write {_OTHER_WORDS[word]}"
        if word.lstrip("+-").lower() in ("nan", "inf", "infinity"):
            return "write a finite number"
        if wanted.startswith("the value") and word and (word[0].isdigit() or word[0] in "+-."):
            return "write a number as JSON does, such as 0.5 or 1e-4"
        if wanted.startswith("`,`"):
            return "put the comma before it"
        return f'write "{quoted(word)}"' if word else "add what is missing, or drop this"
