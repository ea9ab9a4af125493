"""What sections of the page are made of, as plain values; page.js shows each kind. None is what holds nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from scaling.report.words import NOT_KNOWN, told
from scaling.view import Sheet

Block = dict[str, Any]


def section(name: str, title: str, blocks: Sequence[Block | None], *, alarm: bool = False) -> Block | None:
    """A section of those blocks that hold something; None where none does."""
    kept = [block for block in blocks if block]
    tables: list[Block] = []
    for block in [*kept, {"kind": "end"}]:  # of an odd number of tables side by side the last has the width to itself
        if block["kind"] == "table" and not block["wide"]:
            tables.append(block)
        else:
            if len(tables) % 2:
                tables[-1]["wide"] = True
            tables = []
    return {"id": name, "title": title, "blocks": kept, "alarm": alarm} if kept else None


def charts(found: Sequence[Block | None]) -> Block | None:
    """Charts side by side."""
    kept = [chart for chart in found if chart]
    narrow = [chart for chart in kept if not chart.get("wide")]
    if len(narrow) % 2:
        narrow[-1]["wide"] = True
    return {"kind": "charts", "charts": kept} if kept else None


def stack(
    title: str, unit: str, sides: dict[str, dict[str, Any] | None], names: dict[str, str], *, values: bool = False
) -> Block | None:
    """Bars of parts, one for each side that is known; with `values` each part's value below its bar."""
    known = {side: parts for side, parts in sides.items() if parts and any(parts.values())}
    order = dict.fromkeys(name for parts in known.values() for name in parts)  # the same in all bars
    rows = [
        {"name": side, "parts": [[name, name_of(name, names), parts[name]] for name in order if parts.get(name)]}
        for side, parts in known.items()
    ]
    return {"kind": "stack", "title": title, "unit": unit, "rows": rows, "values": values} if rows else None


def parts_table(title: str, sides: dict[str, dict[str, Any] | None], form: Callable[[Any], str]) -> Block | None:
    """A row for each part that is more than nothing on some side, a column for each side that is known."""
    known = {side: parts for side, parts in sides.items() if parts}
    keys = list(dict.fromkeys(name for parts in known.values() for name, value in parts.items() if value))
    if not keys:
        return None
    rows = [[name_of(name, {}), *(told(parts.get(name), form) for parts in known.values())] for name in keys]
    rows.append(["in all", *(form(sum(value or 0 for value in parts.values())) for parts in known.values())])
    found = table(Sheet(title, ["", *(f">{side}" for side in known)], rows))
    return found and {**found, "keys": [*keys, None]}


def name_of(part: str, names: dict[str, str]) -> str:
    """What people call a part."""
    return names.get(part, part.replace("_", " "))


def table(sheet: Sheet, *, wide: bool = False) -> Block | None:
    """A table of texts, without the columns in which nothing is known; `wide`: with the page's width to itself."""
    kept = [i for i in range(len(sheet.columns)) if any(row[i] not in ("", NOT_KNOWN) for row in sheet.rows)]
    if not kept:
        return None
    columns = [sheet.columns[i] for i in kept]
    rows = [[row[i] for i in kept] for row in sheet.rows]
    return {
        "kind": "table",
        "title": sheet.title,
        "columns": columns,
        "rows": rows,
        "note": sheet.caption,
        "wide": wide,
    }


def text(words: str, style: str = "") -> Block | None:
    """A paragraph; `style` "quote" is for what a program has said."""
    return {"kind": "text", "text": words, "style": style} if words else None


def document(title: str, value: Any, own: Sequence[str] | None = None) -> Block | None:
    """JSON, closed at first; `own`: the paths of what is not as it would be without being said."""
    note = "" if own is None else "Defaults are dimmed."
    return {"kind": "document", "title": title, "value": value, "own": own, "note": note} if value else None


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> what stands there, of all in nested objects and lists that is neither, and of empty ones."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for key, item in inner:
        found |= leaves(item, f"{path}.{key}" if path else str(key))
    return found or {path: value}
