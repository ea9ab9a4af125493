"""The JSON Schema of a spec, and the way through it: which keys, kinds and values stand at a path.

Messages and `--set` learn the rules from the schema, so that no rule of the sections is written twice.
"""

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from scaling.spec.scan import Json, Path
from scaling.spec.sections import Spec

Schema = dict[str, Any]


class _Untitled(GenerateJsonSchema):
    """Leaves out the titles, which repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def spec_schema() -> Schema:
    """JSON Schema (draft 2020-12) of spec.json, as it is shipped: making it takes 60 ms, at each start."""
    return json.loads(resources.files("scaling.spec").joinpath("schema.json").read_text(encoding="utf-8"))


def made_schema() -> Schema:
    """The same, of the sections as they are."""
    schema = Spec.model_json_schema(by_alias=True, schema_generator=_Untitled)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def branches(schema: Schema) -> list[Schema]:
    """What a value may be, with references followed and null left out: one entry, or those of a plain union."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return branches(spec_schema()["$defs"][name])
    if "anyOf" in schema:
        return [branch for option in schema["anyOf"] for branch in branches(option)]
    return [] if schema.get("type") == "null" else [schema]


def nullable(schema: Schema) -> bool:
    """Whether null is allowed."""
    return schema.get("type") == "null" or any(nullable(option) for option in schema.get("anyOf", ()))


def kinds(schema: Schema) -> dict[str, Schema]:
    """The variants of a section told apart by its `kind`; empty where it has none."""
    tagged = [branch for branch in branches(schema) if "oneOf" in branch]
    return {kind: branches({"$ref": ref})[0] for b in tagged for kind, ref in b["discriminator"]["mapping"].items()}


def keys(schema: Schema, value: Json = None) -> dict[str, Schema]:
    """The keys of the object that `schema` allows; of the variant that `value` names, or else of all its variants."""
    variants = kinds(schema)
    kind = value.get("kind") if isinstance(value, dict) else None
    if variants:
        chosen = [variants[kind]] if isinstance(kind, str) and kind in variants else list(variants.values())
    else:
        chosen = branches(schema)
    return {key: sub for variant in chosen for key, sub in variant.get("properties", {}).items()}


def child(schema: Schema, part: str | int, value: Json = None) -> Schema:
    """The schema of what stands at `part` of `value`; empty, which allows anything, where there is none."""
    if isinstance(part, str):
        return keys(schema, value).get(part, {})
    for branch in branches(schema):
        listed = branch.get("prefixItems", [])
        if part < len(listed) or "items" in branch:
            return listed[part] if part < len(listed) else branch["items"]
    return {}


def everywhere(key: str) -> list[str]:
    """Dotted paths of all sections' keys that have this name."""
    return sorted({".".join(map(str, path)) for path in _paths(spec_schema(), ()) if path[-1] == key})


def _paths(schema: Schema, path: Path) -> Iterator[Path]:
    for key, sub in keys(schema).items():
        yield (*path, key)
        yield from _paths(sub, (*path, key))
