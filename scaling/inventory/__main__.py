"""`python -m scaling.inventory SPEC` or `--model NAME|PATH`: every parameter of a model, without torch.

For `model.kind` "factory" and "huggingface" the model is built first, with torch, on tensors without values, a step of
it is recorded, and the file that `model.inventory` names is written.
Name, shape, elements, bytes in fp32 (as masters and checkpoints hold them) and the group that it is in.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from scaling.errors import CommandLine, UserError, run_program, write_output
from scaling.estimate.models import bare_document
from scaling.groups import Group, group_of, resolve_groups
from scaling.imports import add_allow_import, check_allowed
from scaling.inventory import parameters
from scaling.inventory.recorded import Parameter
from scaling.spec import Document, Spec, parse_spec, placed, read_document
from scaling.spec.sections import FactoryModel, Recorded
from scaling.units import format_bytes, format_count
from scaling.view import Sheet, print_sheet

SCHEMA_VERSION = 1
FP32 = 4
"""Bytes of one element."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    document, notes = _document(options)
    spec = parse_spec(document)
    if isinstance(spec.model, Recorded):
        _record(spec, document, options)
    found = parameters(spec.model, spec.lora)
    try:
        groups = resolve_groups(spec.param_groups, spec.optimizer, found)
    except UserError as error:
        raise placed(error, document) from None
    if options.json != "-":
        for note in notes:
            print(note)
        print_sheet(_parameters_sheet(spec, found, groups))
        print()
        print_sheet(_groups_sheet(groups))
    if options.json:
        _write(options.json, json.dumps(inventory_report(spec, found, groups), indent=1))
    return 0


def _document(options: Namespace) -> tuple[Document, list[str]]:
    if (options.spec is None) == (options.model is None):
        what = "neither is" if options.spec is None else "both are"
        raise UserError(f"exactly one of `SPEC` and `--model` must be given, but {what}; give one")
    if options.spec is not None:
        return read_document(options.spec, options.set), []
    return bare_document(options.model, 1, 1, options.set)  # neither length nor batch changes a parameter


def _record(spec: Spec, document: Document, options: Namespace) -> None:
    assert isinstance(spec.model, Recorded)
    if spec.model.inventory is None:
        raise UserError(
            "`model.inventory` must be the file to write, but is null; name one: `--set model.inventory=own.json`"
        )
    if isinstance(spec.model, FactoryModel):
        check_allowed(spec.model.target, options.allow_import, "model.target")
    try:
        from scaling.recording import write_inventory
    except ImportError as error:
        raise UserError(
            f'`model.kind` must be "decoder" or "vla" where torch is not installed ({error}), but is '
            f"{spec.model.kind!r}; pip install '.[train]', or take the file from where it is"
        ) from None
    tell = _tell if options.json != "-" else _silent
    try:
        write_inventory(spec, options.allow_import, tell)
    except UserError as error:
        raise placed(error, document) from None
    tell(f"written: {spec.model.inventory}")


def _tell(line: str) -> None:
    print(line, flush=True)


def _silent(_: str) -> None:
    pass


def inventory_report(spec: Spec, found: Sequence[Parameter], groups: Sequence[Group]) -> dict[str, Any]:
    """The inventory as plain JSON values."""
    owners = group_of(groups)
    return {
        "schema_version": SCHEMA_VERSION,
        "spec": spec.name,
        "parameters": [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "elements": parameter.elements,
                "bytes": parameter.elements * FP32,
                "group": owners[parameter.name].name,
                "frozen": owners[parameter.name].frozen,
            }
            for parameter in found
        ],
        "groups": [
            {
                "name": group.name,
                "tensors": group.tensors,
                "elements": group.parameters,
                "bytes": group.parameters * FP32,
                "frozen": group.frozen,
            }
            for group in groups
        ],
        "elements": {"total": _elements(groups), "trained": _elements(groups, frozen=False)},
    }


def _elements(groups: Sequence[Group], *, frozen: bool = True) -> int:
    return sum(group.parameters for group in groups if frozen or not group.frozen)


def _parameters_sheet(spec: Spec, found: Sequence[Parameter], groups: Sequence[Group]) -> Sheet:
    owners = group_of(groups)
    rows = [
        [
            parameter.name,
            " x ".join(f"{size:,}" for size in parameter.shape),
            f"{parameter.elements:,}",
            format_bytes(parameter.elements * FP32),
            owners[parameter.name].name,
            _word(owners[parameter.name]),
        ]
        for parameter in found
    ]
    return Sheet(f"parameters of {spec.name}", ["name", ">shape", ">elements", ">fp32", "group", ""], rows)


def _groups_sheet(groups: Sequence[Group]) -> Sheet:
    trained, total = _elements(groups, frozen=False), _elements(groups)
    sums = [("trained", trained), ("frozen", total - trained), ("all", total)]
    rows = [
        [group.name, str(group.tensors), f"{group.parameters:,}", format_bytes(group.parameters * FP32), _word(group)]
        for group in groups
    ]
    caption = ", ".join(f"{name} {format_count(count)} ({format_bytes(count * FP32)})" for name, count in sums)
    return Sheet("groups", ["group", ">tensors", ">elements", ">fp32", ""], rows, caption)


def _word(group: Group) -> str:
    return "frozen" if group.frozen else "trained"


def _write(path: str, text: str) -> None:
    if path == "-":
        print(text)
        return
    write_output(path, text + "\n", "--json")


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.inventory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument(
        "--model", metavar="NAME|PATH", help="in place of a spec: a recipe's model, a known size, a config.json's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="as JSON, in FILE or in place of the table"
    )
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
