"""What is wrong with a spec, in the house grammar: "place: `field` must be X, but is Y; do Z", one line a problem."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from scaling.errors import UserError
from scaling.redact import without_user_info
from scaling.spec import schema
from scaling.spec.document import Document
from scaling.spec.scan import Json, Path, dotted, quoted
from scaling.spec.schema import Schema

LINES = 40
"""Problems listed; more of them have a common cause, or are not read."""

_OTHER_NAMES = {
    "batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "gas": "gradient_accumulation_steps",
    "learning_rate": "lr",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "num_train_epochs": "epochs",
    "stage": "zero_stage",
    "offload_param": "offload_parameters",
    "sharding_strategy": "reshard_after_forward",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "block_size": "sequence_length",
    "dtype": "precision",
    "zero_optimization": "backend",
    "gradient_checkpointing": "activation_checkpointing",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "peft": "lora",
}
"""Names that DeepSpeed, Hugging Face and nano-gpt have for our keys."""


class SpecError(UserError):
    """A spec that cannot be used; `str` has one line for each of its problems."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = ["and more problems; correct these first"] if len(problems) > LINES else []
        super().__init__("\n".join([*problems[:LINES], *more]))
        self.problems = tuple(problems)


def duplicates(document: Document) -> list[str]:
    """A line for each key that stands twice, of which JSON parsers silently take the last."""
    return [
        f"{document.place(second)}: `{dotted(path)}` must stand once, "
        f"but stands at {document.place(first).removeprefix(document.name + ':')} too; drop one"
        for path, first, second in document.duplicates[: LINES + 1]  # each costs a count of lines
    ]


def user_info(document: Document) -> list[str]:
    """A line for each text with a user name or password in a URL: the spec is copied into run folders and logs."""
    found = ((path, text) for path, text in _texts(document.value, ()) if without_user_info(text) != text)
    return [
        f"{document.where(path)}: `{dotted(path)}` must have no user name or password in a URL, "
        f"but has {quoted(text)}; keep them outside of the spec"
        for path, text in islice(found, LINES + 1)
    ]


def _texts(value: Json, path: Path) -> Iterator[tuple[Path, str]]:
    """All texts, keys included."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from [((*path, key), key)] if isinstance(key, str) else []
            yield from _texts(inner, (*path, key))


def problems(error: ValidationError, document: Document) -> list[str]:
    """A line for each of pydantic's errors; those of the branches of one plain union become one."""
    found: dict[Path, str] = {}
    # More than are listed, as some fold into one; not all, as a file can hold a hundred thousand.
    items = [part for item in error.errors(include_url=False)[: 5 * LINES] for part in _split(item)]
    details = [_Detail(item, document) for item in items]
    misspelt = {(*d.path[:-1], d.meant) for d in details if d.meant}
    for detail in details:
        if detail.type == "missing" and detail.path in misspelt:
            continue  # the unknown key beside it says the same
        if any(other.union == detail.path == detail.union and other.path != detail.path for other in details):
            continue  # another branch came further, and says what is wrong inside it
        line = f"{detail.where()}: {detail.message()}"
        found.setdefault(detail.path if detail.type != "value_error" else (*detail.path, line), line)
    return list(found.values())


def placed(error: UserError, document: Document) -> SpecError:
    """A later check's error, with the place of the first field that it names."""
    return SpecError([f"{document.where(_first_field(str(error)))}: {error}"])


def _split(item: Any) -> list[Any]:
    """A section's contradictions come as the lines of one error."""
    return [{**item, "msg": line} for line in item["msg"].split("\n")] if item["type"] == "value_error" else [item]


class _Detail:
    """One of pydantic's errors: where it is in the file's terms, and what the schema says about that place."""

    def __init__(self, item: Any, document: Document) -> None:
        self.document = document
        self.type: str = item["type"]
        self.text: str = item["msg"].removeprefix("Value error, ")
        self.path, self.schema, self.union = _locate(item["loc"])
        self.parent: Schema = _locate(item["loc"][:-1])[1]
        self.meant: str | None = None
        if self.type.startswith("union_tag"):
            self.path = (*self.path, "kind")
        elif self.type == "missing" and isinstance(self.path[-1], int):
            self.path, self.schema, self.type = self.path[:-1], self.parent, "too_short"
        elif self.type == "extra_forbidden":
            key, known, section = str(self.path[-1]), list(schema.keys(self.parent)), document.get(self.path[:-1])
            section = section if isinstance(section, dict) else {}
            # Rather one that is not there: who writes `paht` beside `path` means another.
            self.meant = _near(key, [name for name in known if name not in section]) or _near(key, known)
        self.value = document.get(self.path)

    def where(self) -> str:
        if self.type == "value_error":
            return self.document.where((*self.path, *_first_field(self.text)))
        return self.document.where(self.path, key=self.type == "extra_forbidden")

    def message(self) -> str:
        """The problem without its place."""
        name = f"`{dotted(self.path)}`" if self.path else "the spec"
        match self.type:
            case "value_error":
                return _with_full_names(self.text, self.path, self.schema)
            case "extra_forbidden":
                return self.unknown_key(name)
            case "missing":
                return f"{name} must be set, to {expected(self.schema)}, but is absent; add it"
            case "union_tag_not_found" | "union_tag_invalid":
                return self.wrong_kind(name)
            case _:
                wanted = expected(self.schema, self.value)
                return f"{name} must be {wanted}, but is {shown(self.value)}; {remedy(self.schema, self.value)}"

    def unknown_key(self, name: str) -> str:
        section = self.path[:-1]
        value = self.document.get(section)
        key, known = str(self.path[-1]), list(schema.keys(self.parent))
        owner = f"`{dotted(section)}`" if section else "the spec"
        if isinstance(value, dict) and "kind" in known and "kind" in value:
            owner += f" of kind {shown(value['kind'])}"
        if self.meant:
            hint = f"did you mean `{self.meant}`?"
        elif others := self.other_kinds(key):
            hint = f"drop it, or use kind {' or '.join(others)}"
        elif elsewhere := schema.everywhere(_OTHER_NAMES.get(key, key)):
            hint = f"did you mean {' or '.join(f'`{path}`' for path in sorted(elsewhere, key=len)[:2])}?"
        else:
            hint = f"drop it, or use one of {_first(known)}"
        return f"{name} must be a key of {owner}, but is none; {hint}"

    def other_kinds(self, key: str) -> list[str]:
        """Kinds of the same section that do have `key`."""
        union = schema.spec_schema()
        for part in self.path[:-1]:
            union = schema.child(union, part)
        return [f'"{kind}"' for kind, variant in schema.kinds(union).items() if key in schema.keys(variant)]

    def wrong_kind(self, name: str) -> str:
        allowed = {"enum": list(schema.kinds(self.schema))}
        section = self.document.get(self.path[:-1])
        if isinstance(section, dict) and "kind" not in section:
            near = difflib.get_close_matches("kind", list(section), n=1)
            hint = f"did you mean it by `{quoted(near[0])}`?" if near else "add it"
            return f"{name} must be set, to {expected(allowed)}, but is absent; {hint}"
        return f"{name} must be {expected(allowed)}, but is {shown(self.value)}; {remedy(allowed, self.value)}"


def _locate(loc: Sequence[str | int]) -> tuple[Path, Schema, Path | None]:
    """pydantic's location as a path in the file, the schema there, and the innermost plain union on the way.

    pydantic's own location also names the variants and union branches that it went through.
    """
    path: Path = ()
    here, union = schema.spec_schema(), None
    rest = list(loc)
    while rest:
        options = schema.branches(here)
        if len(options) > 1:
            union = path
            rest.pop(0)
            nested = [o for o in options if "oneOf" in o or o.get("type") in ("array", "object")]
            here = nested[0] if rest and nested else here
        elif variants := schema.kinds(here):
            here = variants.get(str(rest.pop(0)), {})
        else:
            path = (*path, rest.pop(0))
            here = schema.child(here, path[-1])
    return path, here, union


def expected(shape: Schema, value: Json = None) -> str:
    """In words, what the schema allows; an upper bound only where it is small or broken."""
    words = [_expected_one(branch, value) for branch in schema.branches(shape)]
    if schema.nullable(shape) and value is not None:
        words.append("null")
    return _or(words) if words else "something else"


def _expected_one(shape: Schema, value: Json) -> str:
    if "const" in shape:
        return shown(shape["const"])
    if "enum" in shape:
        return ("one of " if len(shape["enum"]) > 1 else "") + _or([shown(option) for option in shape["enum"]])
    match shape.get("type"):
        case "integer":
            return "a whole number" + _bounds(shape, value)
        case "number":
            return "a number" + _bounds(shape, value)
        case "boolean":
            return "true or false"
        case "string":
            return "a text" + _text_rules(shape, value)
        case "array":
            items = shape["prefixItems"][0] if "prefixItems" in shape else shape.get("items", {})
            return f"a list of {_count(shape)} {_plural(expected(items))}"
        case "object" | None:
            return "an object {...}"
        case other:
            return str(other)


def _bounds(shape: Schema, value: Json) -> str:
    low, above = shape.get("minimum"), shape.get("exclusiveMinimum")
    high, below = shape.get("maximum"), shape.get("exclusiveMaximum")
    number = value if isinstance(value, int | float) else 0
    show_high = high is not None and (high <= 10_000 or number > high)
    if low is not None and show_high:
        return f" from {low} to {high:.15g}"
    words = [f"of at least {low}"] if low is not None else []
    words += [f"above {above}"] if above is not None else []
    words += [f"of at most {high:.15g}"] if high is not None and show_high else []
    words += [f"below {below}"] if below is not None else []
    return " " + " and ".join(words) if words else ""


def _text_rules(shape: Schema, value: Json) -> str:
    longest = shape.get("maxLength")
    if isinstance(value, str) and longest is not None and len(value) > longest:
        return f" of at most {longest} characters"
    return f" that matches {shape['pattern']}" if "pattern" in shape and value != "" else " that is not empty"


def _count(shape: Schema) -> str:
    low, high = shape.get("minItems", 0), shape.get("maxItems")
    if low == high:
        return str(low)
    return f"{low} to {high}" if high is not None else f"at least {low}"


def _plural(words: str) -> str:
    return re.sub(r"^an? (whole number|number|text|object)", r"\1s", words).replace("texts that is", "texts that are")


def remedy(shape: Schema, value: Json) -> str:
    """What to do about `value`, as precisely as can be said."""
    options = schema.branches(shape)
    types = {str(option.get("type")) for option in options}
    kinds = schema.kinds(shape)
    words = [w for option in options for w in option.get("enum", [option["const"]] if "const" in option else [])]
    if isinstance(value, str):
        if (near := _near_word(value, words)) is not None:
            return f"did you mean {shown(near)}?"
        if (near := _near_word(value, list(kinds))) is not None:
            return f'did you mean {{"kind": {shown(near)}}}?'
        if "boolean" in types and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return f"write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
        if (
            types & {"integer", "number"}
            and len(value) <= 60
            and re.fullmatch(r"-?[0-9.]+(e[+-]?[0-9]+)?", value, re.IGNORECASE)
        ):
            return f"write {quoted(value)} without quotes"
        if "array" in types and len(value) <= 60:
            return f"write [{shown(value)}]"
        pattern = next((option["pattern"] for option in options if "pattern" in option), None)
        if any(len(value) > option.get("maxLength", len(value)) for option in options):
            return "shorten it"
        if pattern and (near := _fitting(value, pattern)):
            return f"did you mean {shown(near)}?"
    elif value == [] and "array" in types:
        return "add an entry"
    elif "boolean" in types and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    elif types == {"string"} and not words and isinstance(value, int | float):
        return f'write "{shown(value)}"'
    elif isinstance(value, int | float) and not isinstance(value, bool):
        said = _number_remedy(value, options)
        if said:
            return said
    return _fallback(shape, options)


def _number_remedy(value: float, options: Iterable[Schema]) -> str | None:
    for shape in options:
        if shape.get("type") == "integer" and isinstance(value, float):
            return f"write {value:.0f}" if value.is_integer() and abs(value) < 1e15 else "round it"
        if value < shape.get("minimum", value) or value <= shape.get("exclusiveMinimum", value - 1):
            return "raise it"
        if value > shape.get("maximum", value) or value >= shape.get("exclusiveMaximum", value + 1):
            return "lower it"
    return None


_WRITE = {"array": "write a list, in [ ]", "string": "write a text, in double quotes", "number": "write a number"}


def _fallback(shape: Schema, options: Iterable[Schema]) -> str:
    default = shape.get("default")
    if default is not None:
        return "correct it, or drop the key for the default" + (
            "" if len(told := shown(default)) > 30 or isinstance(default, dict) else f", {told}"
        )
    wanted = next((option["required"] for option in options if option.get("required")), None)
    if wanted:
        return f"write an object that has {_first(wanted)}"
    lowest = next((option["minimum"] for option in options if option.get("type") == "integer"), None)
    if lowest is not None:
        return f"write {max(lowest, 1)}, say"
    if any("enum" in option or "const" in option for option in options):
        return "choose one"
    return _WRITE.get(next((str(option.get("type")) for option in options), ""), "correct it")


def shown(value: Json) -> str:
    """`value` as JSON, cut where it is long."""
    return quoted(json.dumps(value, ensure_ascii=False))


def _near(key: str, known: Iterable[str]) -> str | None:
    known = list(known)
    if _OTHER_NAMES.get(key) in known:
        return _OTHER_NAMES[key]
    cutoff = 0.6
    if len(key) <= 3:  # of `lr` with one letter wrong, half is right; of `lora` too, but that is longer
        known, cutoff = [name for name in known if abs(len(name) - len(key)) <= 1], 0.5
    return next(iter(difflib.get_close_matches(key[:100], known, n=1, cutoff=cutoff)), None)


def _near_word(value: str, words: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(value[:100].lower(), words, n=1, cutoff=0.5)), None)


def _fitting(value: str, pattern: str) -> str | None:
    """`value` with what such names may not hold replaced, if it then matches."""
    candidate = re.sub(r"[^A-Za-z0-9_.-]+", "-", without_user_info(value)[:100]).strip("-.")
    return candidate if re.search(pattern, candidate) else None


def _first(names: Sequence[str], characters: int = 60) -> str:
    """The names, or as many of them as keep the line readable."""
    fitting = [name for i, name in enumerate(names) if len(", ".join(names[: i + 1])) <= characters]
    return ", ".join(names) if len(fitting) == len(names) else f"{', '.join(fitting)}, ... ({len(names)} in all)"


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _first_field(message: str) -> Path:
    """The path that stands first between backquotes in a message."""
    found = re.search(r"`([\w$.-]+)`", message)
    return tuple(int(part) if part.isdecimal() else part for part in found[1].split(".")) if found else ()


def _with_full_names(message: str, path: Path, shape: Schema) -> str:
    """A section's own message, which names its fields relative to itself, with the fields' full paths."""
    known = schema.keys(shape)

    def full(found: re.Match[str]) -> str:
        name = found[1]
        return f"`{dotted((*path, *name.split('.')))}`" if name.split(".")[0] in known else found[0]

    return re.sub(r"`([\w$.]+)`", full, message)
