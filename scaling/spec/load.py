"""From what the user names, and changes with `--set`, to a valid Spec, or to all that is wrong with it."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from scaling.errors import UserError
from scaling.spec.document import Document, assign, document_of
from scaling.spec.problems import SpecError, duplicates, problems, user_info
from scaling.spec.scan import JsonFault
from scaling.spec.sections import Spec
from scaling.spec.source import read_source


def load_spec(source: str, assignments: Sequence[str] = ()) -> Spec:
    """The spec that `source` (a path, a recipe's name, or -) holds after `assignments` ("a.b=VALUE"), in order.

    Raises UserError, and SpecError with a line for each problem of the spec.
    """
    return parse_spec(read_document(source, assignments))


def read_document(source: str, assignments: Sequence[str] = ()) -> Document:
    """As `load_spec`, before validation."""
    name, text = read_source(source)
    try:
        document = document_of(name, text)
    except JsonFault as fault:
        raise SpecError([f"{Document(name, text, None, {}, {}, []).place(fault.offset)}: {fault}"]) from None
    for assignment in assignments:
        assign(document, assignment)
    return document


def parse_spec(document: Document) -> Spec:
    """Validate a document."""
    doubled = [*duplicates(document), *user_info(document)]
    try:
        # As JSON, not as Python values: in strict mode only then is a list good for a tuple.
        spec = Spec.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        raise SpecError(doubled + problems(error, document)) from None
    if doubled:
        raise SpecError(doubled)
    return spec


def change_spec(spec: Spec, **sections: Any) -> Spec:
    """`spec` with these top-level values replaced (by sections, or by plain dicts of them), validated as a whole.

    Raises UserError with the validators' messages, in which a section's fields have their short names.
    """
    values = {name: getattr(spec, name) for name in Spec.model_fields} | sections
    values["$schema"] = values.pop("schema_")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        lines = [str(item["msg"]).removeprefix("Value error, ") for item in error.errors(include_url=False)]
        raise UserError("\n".join(lines)) from None
