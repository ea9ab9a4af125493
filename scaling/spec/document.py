"""A spec before it is validated: its JSON, the place of each value, and what `--set` changed in it."""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from scaling.errors import UserError
from scaling.spec import schema
from scaling.spec.scan import DEPTH, Json, JsonFault, Path, dotted, quoted, scan


@dataclass
class Document:
    """One spec as it was written."""

    name: str
    """What messages call it: a file's path as given, a recipe's file name, or <stdin>."""
    text: str
    value: Json
    values: dict[Path, int]
    keys: dict[Path, int]
    duplicates: list[tuple[Path, int, int]]
    flags: dict[Path, str] = field(default_factory=dict[Path, str])
    """The `--set` that each changed path has its value from."""

    def place(self, offset: int) -> str:
        """`name:line:column`."""
        line = self.text.count("\n", 0, offset) + 1
        return f"{self.name}:{line}:{offset - self.text.rfind(chr(10), 0, offset)}"

    def where(self, path: Path, *, key: bool = False) -> str:
        """Where the value at `path` comes from (with `key`: where its key stands); else what encloses it."""
        for end in range(len(path), -1, -1):
            part = path[:end]
            if part in self.flags:
                return f"--set {quoted(self.flags[part])}"
            places = self.keys if key and part == path and part else self.values
            if part in places:
                return self.place(places[part])
            made_for = next((flag for inner, flag in self.flags.items() if part and inner[:end] == part), None)
            if made_for is not None:
                return f"--set {quoted(made_for)}"
        return self.name

    def get(self, path: Path) -> Json:
        """The value at `path`, None where there is none."""
        value = self.value
        for part in path:
            value = _get(value, part)
        return value


def document_of(name: str, text: str) -> Document:
    """Read `text` as JSON; raises JsonFault."""
    found = scan(text)
    return Document(name, text, found.value, found.values, found.keys, found.duplicates)


def assign(document: Document, assignment: str) -> None:
    """Apply one `--set A.B=VALUE`. Only its form is checked here: what it makes of the spec is validated with the rest.

    A section that is absent or null starts from its default, so that `schedule.warmup_steps=10` needs no kind.
    """
    target, equals, text = assignment.partition("=")
    parts = target.split(".")
    if not equals or not all(parts) or len(parts) > DEPTH:
        raise UserError(f"`--set` must be A.B=VALUE, but is `{quoted(assignment)}`; name a value of the spec")
    node, shape, path = document.value, schema.spec_schema(), ()
    for part, following in pairwise(parts):
        step = _step(node, part, path, assignment)
        shape = schema.child(shape, step, node)
        path = (*path, step)
        node = _entered(node, step, shape, following)
    last = _step(node, parts[-1], path, assignment)
    value = _value(text, assignment)
    if last == "kind" and isinstance(node, dict):
        _drop_other_kinds_keys(document, path, node, schema.kinds(shape), value)
    _put(node, last, value)
    _forget(document, (*path, last))
    document.flags[(*path, last)] = assignment


def _step(node: Json, part: str, path: Path, assignment: str) -> str | int:
    """`part` as a key of the object, or as an index of the list (its length appends), that `node` is."""
    here = f"`{dotted(path)}`" if path else "the spec"
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(
            f"--set {quoted(assignment)}: {here} must be an object or a list to have `{quoted(part)}`, "
            f"but is {quoted(str(node))}; set {here} itself"
        )
    if not re.fullmatch("[0-9]{1,6}", part) or int(part) > len(node):
        raise UserError(
            f"--set {quoted(assignment)}: {here} must be indexed by 0 to {len(node)} (which appends), "
            f"but is by `{quoted(part)}`; correct it"
        )
    return int(part)


def _entered(node: Json, step: str | int, shape: schema.Schema, following: str) -> Json:
    """The child of `node` at `step`, made where it is absent or null."""
    inner = _get(node, step)
    if inner is None:
        inner = _default(shape)
        if inner is None:
            inner = _empty(following)
        _put(node, step, inner)
    return inner


def _empty(following: str) -> Json:
    return [] if following.isdecimal() else {}


def _get(node: Json, step: str | int) -> Json:
    match node, step:
        case dict(), str():
            return node.get(step)
        case list(), int() if step < len(node):
            return node[step]
        case _:
            return None


def _default(shape: schema.Schema) -> Json:
    """A fresh copy of the default of a key, without the nulls that only say "absent"."""

    def copy(value: Json) -> Json:
        if isinstance(value, dict):
            return {key: copy(inner) for key, inner in value.items() if inner is not None}
        return [copy(inner) for inner in value] if isinstance(value, list) else value

    return copy(shape.get("default"))


def _put(node: Json, step: str | int, value: Json) -> None:
    match node, step:
        case dict(), str():
            node[step] = value
        case list(), int():
            node[step:] = [value, *node[step + 1 :]]
        case _:
            raise AssertionError(f"{step!r} is no step into {type(node)}")


def _value(text: str, assignment: str) -> Json:
    try:
        return scan(text).value
    except JsonFault as fault:
        if text.lstrip()[:1] in ("[", "{", '"'):  # meant as JSON; a glob that begins with [ can be written in quotes
            raise UserError(f"--set {quoted(assignment)}: the value must be JSON, but is not: {fault}") from None
        return text


def _drop_other_kinds_keys(
    document: Document, path: Path, section: dict[str, Json], kinds: dict[str, schema.Schema], kind: Json
) -> None:
    """Take what the new kind does not know out of the section, unless a `--set` put it there: that is a mistake."""
    if not isinstance(kind, str) or kind not in kinds or path in document.flags:
        return
    known = schema.keys(kinds[kind])
    for key in list(section):
        inner = (*path, key)
        if key not in known and not any(flagged[: len(inner)] == inner for flagged in document.flags):
            del section[key]
            _forget(document, inner)


def _forget(document: Document, path: Path) -> None:
    """The places of what stood at and below `path` are no longer those of its value."""
    for places in (document.values, document.keys, document.flags):
        for inner in [inner for inner in places if inner[: len(path)] == path]:
            del places[inner]
