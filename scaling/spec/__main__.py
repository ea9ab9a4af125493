"""`python -m scaling.spec`: check a spec, import one, or print their JSON Schema. Needs neither torch nor a GPU."""

import argparse
import json
import re
import sys
from pathlib import Path

from scaling.batch import legal_world_sizes, resolve_batch
from scaling.errors import CommandLine, UserError, positive, run_program, write_output
from scaling.groups import Group, check_features, resolve_groups
from scaling.inventory import parameters
from scaling.spec import Spec, SpecError, parse_spec, placed, read_document
from scaling.spec.document import document_of
from scaling.spec.foreign import ORIGINS, import_foreign
from scaling.spec.foreign.source import read_foreign
from scaling.spec.schema import made_schema

_FEW_RANKS, _MANY_RANKS = 64, 2**16
"""World sizes that the summary looks at, and up to which a batch must fit one: more than any job has had."""


def main() -> int | None:
    """Run the command that the command line names."""
    line = CommandLine(prog="python -m scaling.spec", description="Check and import specs; print their JSON Schema.")
    commands = line.add_subparsers(dest="command", metavar="COMMAND")
    check = commands.add_parser("validate", help="check a spec: exit code 0, or 2 and all that is wrong with it")
    check.add_argument("spec", metavar="SPEC", help="path of a JSON file, name of a recipe, or - for standard input")
    check.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="assignments", help="change a value (JSON)"
    )
    commands.add_parser("schema", help="print the JSON Schema (draft 2020-12) of spec.json")
    add_import(commands.add_parser("import", help="a foreign configuration as spec.json, with notes on what it lacks"))
    arguments = line.parse_args()
    if arguments.command == "validate":
        print(validate(arguments.spec, arguments.assignments))
    elif arguments.command == "schema":
        print(json.dumps(made_schema(), indent=2))
    elif arguments.command == "import":
        return import_file(arguments.file, arguments.format, arguments.num_processes, arguments.out)
    else:
        line.print_help()
    return None


def validate(source: str, assignments: list[str]) -> str:
    """One line about a valid spec. Beyond `load_spec` this checks what the spec says about its model and batch."""
    document = read_document(source, assignments)
    spec = parse_spec(document)
    try:
        groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
        check_features(spec, groups)
        if not legal_world_sizes(spec, _FEW_RANKS) and not legal_world_sizes(spec, _MANY_RANKS):
            resolve_batch(spec, 1)  # raises, and says what is nearest
    except UserError as error:
        raise placed(error, document) from None
    return f"{document.name} is valid: {_summary(spec, groups)}"


def add_import(line: argparse.ArgumentParser) -> None:
    """The options of `import`."""
    line.add_argument(
        "file", metavar="FILE", help="JSON or YAML of DeepSpeed, accelerate, the Trainer, nanoGPT, MiniMind"
    )
    line.add_argument("--out", metavar="FILE", help="write it there, in place of standard output")
    line.add_argument("--format", choices=list(ORIGINS), help="whose it is; default: recognised by its keys")
    line.add_argument(
        "--num-processes", type=positive, metavar="N", help="ranks that it was for, which fixes the global batch"
    )


def import_file(path: str, origin: str | None, processes: int | None, out: str | None) -> int:
    """Print or write the spec that a foreign configuration comes to, and its notes on standard error.

    Returns the exit code: 0 for a spec that is complete and valid, 2 for one that is not yet.
    """
    values, notes = import_foreign(read_foreign(path), origin, processes)
    if "name" not in values:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem).strip("-_.")[:100] or "imported"
        values = {"name": name, **values}
        notes = [note for note in notes if not note.startswith("`name` must still be filled in")]
        notes.append(f"`name` is a placeholder, {name}: change it to what the run is to be called")
    order = list(Spec.model_fields)
    text = json.dumps({name: values[name] for name in sorted(values, key=order.index)}, indent=2)
    document = document_of(out or "<spec>", text)
    try:
        parse_spec(document)
        code = 0
    except SpecError as error:
        absent = {note.split("`")[1] for note in notes if "must still be filled in" in note}
        absent |= {path.partition(".")[0] for path in absent}
        # What is absent has its note already.
        notes += [line for line in error.problems if not any(f"`{path}`" in line for path in absent)]
        code = 2
    if out is not None:
        write_output(out, text + "\n", "--out")
    else:
        print(text)
    for note in notes:
        print(note, file=sys.stderr)
    return code


def _summary(spec: Spec, groups: tuple[Group, ...]) -> str:
    total = sum(group.parameters for group in groups)
    frozen = sum(group.parameters for group in groups if group.frozen)
    sizes = legal_world_sizes(spec, _FEW_RANKS)
    ranks = ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "") if sizes else f"over {_FEW_RANKS}"
    length = f"{spec.max_steps} steps" if spec.max_steps is not None else f"{spec.epochs:g} epochs"
    return (
        f"{spec.model.kind} of {total:,} parameters{f' ({frozen:,} frozen)' if frozen else ''}, {spec.data.kind} data, "
        f"{spec.backend.kind}, {spec.precision}, {length}; world size {ranks}"
    )


if __name__ == "__main__":
    run_program(main)
