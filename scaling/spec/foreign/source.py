"""The text of a foreign configuration to plain values, and which kind it is."""

import json
import os
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.spec.foreign.values import as_section
from scaling.spec.scan import quoted

LIMIT_BYTES = 2**20
"""Far above any configuration; YAML's anchors aside, a file beyond it is something else."""


def read_foreign(path: str) -> dict[str, Any]:
    """The object in a JSON or YAML file; UserError where there is none."""
    name = quoted(path, limit=200)
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no file"
        raise UserError(f"`{name}` must be a JSON or YAML file, but is {what}; name a configuration")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"`{name}` must be readable, but is not: {error.strerror}; correct that") from None
    if len(content) > LIMIT_BYTES:
        raise UserError(f"`{name}` must have at most {LIMIT_BYTES} bytes, but has {len(content)}; name a configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"`{name}` must be UTF-8, but is not; save it as UTF-8") from None
    value = _parse(name, text)
    section = as_section(value)
    if section is None:
        what = "empty" if value is None else f"a {type(value).__name__}"
        raise UserError(f"`{name}` must be an object of keys and values, but is {what}; name a configuration")
    return {str(key): one for key, one in section.items()}


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"`{name}` must be valid JSON, but is not{where}; correct it") from None
    try:
        import yaml  # here alone: no other command needs it
    except ImportError:
        raise UserError(f"`{name}` must be JSON where PyYAML is absent, but is YAML; pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark is not None else ""
        raise UserError(f"`{name}` must be JSON or YAML, but is neither{where}; correct it") from None
