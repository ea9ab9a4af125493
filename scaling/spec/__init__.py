"""spec.json: what it may say (sections), and how it is read (load)."""

from scaling.spec.document import Document
from scaling.spec.load import change_spec, load_spec, parse_spec, read_document
from scaling.spec.problems import SpecError, placed
from scaling.spec.schema import spec_schema
from scaling.spec.sections import Spec

__all__ = [
    "Document",
    "Spec",
    "SpecError",
    "change_spec",
    "load_spec",
    "parse_spec",
    "placed",
    "read_document",
    "spec_schema",
]
