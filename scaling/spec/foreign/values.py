"""Plain values of JSON and YAML: what they are, and messages about them."""

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from scaling.errors import UserError
from scaling.spec.scan import quoted


def has(values: Mapping[str, Any], path: str) -> bool:
    """Whether `values` hold a value, null too, at the dotted `path`."""
    node: Any = values
    for part in path.split("."):
        section = as_section(node)
        if section is None or part not in section:
            return False
        node = section[part]
    return True


def as_section(value: Any) -> dict[str, Any] | None:
    """`value` where it is an object of keys and values, else None."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def as_list(value: Any) -> list[Any] | None:
    """`value` where it is a list, else None."""
    return cast(list[Any], value) if isinstance(value, list) else None


def as_number(key: str, value: Any) -> float | None:
    """`value` of `key` as a finite number; YAML 1.1 reads 1e-4 as text, so text that is a number is one."""
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong(key, "a finite number", value)
    return number if isinstance(value, str) else value


def wrong(key: str, rule: str, value: Any) -> UserError:
    """The error for a value that its own library would refuse too."""
    return UserError(f"`{key}` must be {rule}, but is {short(value)}; correct it")


def short(value: Any) -> str:
    """`value` for a message."""
    if isinstance(value, dict | list):
        return f"a {'section' if isinstance(value, dict) else 'list'} of {len(cast(list[Any], value))}"
    return quoted(json.dumps(value, default=str), limit=60)
