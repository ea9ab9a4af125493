"""A spec in the making: values read from a foreign configuration, and a note for all that did not become one.

Each origin lists its keys by their dotted names in an `Origin`. A key can be read if, and only if, it is in `carried`,
so that the table is what the code does; the page docs/from-elsewhere.md shows it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling.spec.foreign.missing import missing
from scaling.spec.foreign.values import as_number, as_section, has, short, wrong

AUTO = "auto"
"""What Hugging Face's templates have where its Trainer fills in a value when it starts."""


@dataclass(frozen=True)
class Origin:
    """One kind of foreign configuration, and what becomes of each of its keys."""

    name: str
    """As `--format` has it."""
    title: str
    """What messages call it."""
    carried: Mapping[str, str]
    """Dotted key to the field of spec.json that it becomes."""
    harmless: Mapping[str, str]
    """Dotted key, or name of a section, to the reason why nothing is lost without it."""
    inert: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    """Dotted key to the values at which it changes nothing here; at any other it is noted."""
    lost: Mapping[str, str] = field(default_factory=dict[str, str])
    """Dotted key to what to do about it, where more can be said than that there is no field for it."""


@dataclass
class Draft:
    """Values and notes, as far as they have come."""

    origin: Origin
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    """Values of the carried keys that the file has, without those that are null or "auto"."""
    read: set[str] = field(default_factory=set[str])
    """Carried keys that were looked at."""
    null: set[str] = field(default_factory=set[str])
    """Carried keys that are null."""
    auto: set[str] = field(default_factory=set[str])
    """Carried keys that are "auto"."""
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    """The spec so far, as plain JSON values."""
    notes: list[str] = field(default_factory=list[str])
    """One line each, for the user."""
    defaults: list[str] = field(default_factory=list[str])
    """Fields that got the default of the foreign library, with their values."""

    def get(self, key: str) -> Any:
        """The value of a carried key, None where the file has none."""
        assert key in self.origin.carried, key
        self.read.add(key)
        return self.given.get(key)

    def number(self, key: str) -> float | None:
        """As `get`, a finite number."""
        return as_number(key, self.get(key))

    def whole(self, key: str) -> int | None:
        """As `get`, a whole number; 5e8, a common way to write bucket sizes, is one."""
        number = self.number(key)
        if number is not None and number % 1:
            raise wrong(key, "a whole number", number)
        return None if number is None else int(number)

    def flag(self, key: str) -> bool | None:
        """As `get`, true or false (YAML files also hold them as text)."""
        value = self.get(key)
        value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
        if value is not None and not isinstance(value, bool):
            raise wrong(key, "true or false", value)
        return value

    def text(self, key: str) -> str | None:
        """As `get`, text."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise wrong(key, "text", value)
        return value

    def put(self, path: str, value: Any) -> None:
        """Set a field of the spec, "optimizer.lr", say."""
        *sections, last = path.split(".")
        node = self.values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def move(self, path: str, value: Any) -> None:
        """Set a field to what was read, if anything was."""
        if value is not None:
            self.put(path, value)

    def has(self, path: str) -> bool:
        """Whether the spec has this field by now."""
        return has(self.values, path)

    def find(self, path: str) -> Any:
        """The value of a field of the spec, None where it is not set."""
        node: Any = self.values
        for part in path.split("."):
            node = (as_section(node) or {}).get(part)
        return node

    def default(self, path: str, value: Any, *keys: str) -> None:
        """Give an unset field the default of the foreign library, unless it is "auto" under one of `keys`."""
        if not self.has(path) and not self.auto.intersection(keys):
            self.put(path, value)
            self.defaults.append(f"`{path}` {json.dumps(value)}")

    def assume(self, path: str, value: Any, reason: str) -> None:
        """Give an unset field a value that the file does not say, and say so."""
        if not self.has(path):
            self.put(path, value)
            self.notes.append(f"`{path}` is assumed to be {json.dumps(value)}: {reason}; check it")

    def lose(self, key: str, reason: str) -> None:
        """Note a key that has no place in the spec."""
        self.notes.append(f"`{key}` is not carried over: {reason}")


def draft_of(origin: Origin, document: Mapping[str, Any]) -> Draft:
    """Sort the keys of `document` by what becomes of them."""
    draft = Draft(origin)
    _sort(draft, document, "")
    return draft


def _sort(draft: Draft, section: Mapping[str, Any], prefix: str) -> None:
    origin = draft.origin
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key in origin.carried:
            if value == AUTO:
                draft.auto.add(key)
            elif value is None:
                draft.null.add(key)
            else:
                draft.given[key] = value
        elif _harmless(origin, key, value) or section.get("enabled") is False:
            continue  # a section that is not enabled does nothing, whatever else it says
        elif any(known.startswith(f"{key}.") for known in (*origin.carried, *origin.inert)) and value is not None:
            inner = as_section(value)
            if inner is None:
                raise wrong(key, "a section with keys of its own", value)
            _sort(draft, inner, f"{key}.")
        else:
            draft.lose(key, origin.lost.get(key, f"it is {short(value)}, and spec.json has no field for it"))


def _harmless(origin: Origin, key: str, value: Any) -> bool:
    # Type and value: True is 1 for Python, and not for these files.
    same = [
        one for one in origin.inert.get(key, ()) if one == value and isinstance(one, bool) == isinstance(value, bool)
    ]
    off = (as_section(value) or {}).get("enabled") is False and not any(
        known.startswith(f"{key}.") for known in origin.carried
    )
    unset = value is None and key not in origin.inert
    return key in origin.harmless or bool(same) or off or unset


def finish(draft: Draft) -> tuple[dict[str, Any], list[str]]:
    """Values and all notes of a draft."""
    for key in sorted(draft.given.keys() - draft.read):
        if not any(note.startswith(f"`{key}`") for note in draft.notes):
            draft.lose(key, "the rest of the file leaves it without effect")
    if draft.defaults:
        draft.notes.append(
            f"not in the file, so as {draft.origin.title} has it by default: {', '.join(draft.defaults)}"
        )
    for key in sorted(draft.auto):
        path = draft.origin.carried[key]
        if not draft.has(path):
            draft.lose(key, f'it is "auto", which the Trainer of Hugging Face fills in when it starts; set `{path}`')
    return draft.values, [*draft.notes, *missing(draft.values)]


def leave(draft: Draft, fields: Iterable[str], owner: str) -> None:
    """Note fields that the file leaves to `owner`, and that keep the defaults of spec.json therefore."""
    if left := [f"`{path}`" for path in fields if not draft.has(path)]:
        draft.notes.append(f"left to {owner} by the file, and to the defaults of spec.json here: {', '.join(left)}")
