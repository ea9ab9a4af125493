"""`python -m scaling.spec`: check a spec, or print the JSON Schema of specs. Needs neither torch nor a GPU."""

import json
import sys

from scaling.batch import legal_world_sizes, resolve_batch
from scaling.errors import CommandLine, UserError, run_command
from scaling.groups import Group, resolve_groups
from scaling.inventory import parameters
from scaling.spec import Spec, parse_spec, placed, read_document, spec_schema

_FEW_RANKS, _MANY_RANKS = 64, 2**16
"""World sizes that the summary looks at, and up to which a batch must fit one: more than any job has had."""


def main() -> int | None:
    """Run the command that the command line names."""
    line = CommandLine(prog="python -m scaling.spec", description="Check specs; print their JSON Schema.")
    commands = line.add_subparsers(dest="command", metavar="COMMAND")
    check = commands.add_parser("validate", help="check a spec: exit code 0, or 2 and all that is wrong with it")
    check.add_argument("spec", metavar="SPEC", help="path of a JSON file, name of a recipe, or - for standard input")
    check.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="assignments", help="change a value (JSON)"
    )
    commands.add_parser("schema", help="print the JSON Schema (draft 2020-12) of spec.json")
    arguments = line.parse_args()
    if arguments.command == "validate":
        print(validate(arguments.spec, arguments.assignments))
    elif arguments.command == "schema":
        print(json.dumps(spec_schema(), indent=2))
    else:
        line.print_help()


def validate(source: str, assignments: list[str]) -> str:
    """One line about a valid spec. Beyond `load_spec` this checks what the spec says about its model and batch."""
    document = read_document(source, assignments)
    spec = parse_spec(document)
    try:
        groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
        if not legal_world_sizes(spec, _FEW_RANKS) and not legal_world_sizes(spec, _MANY_RANKS):
            resolve_batch(spec, 1)  # raises, and says what is nearest
    except UserError as error:
        raise placed(error, document) from None
    return f"{document.name} is valid: {_summary(spec, groups)}"


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
    sys.exit(run_command(main))
