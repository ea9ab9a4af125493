"""What is wrong with a run, by which numbers, and what to change.

    python -m scaling.doctor RUN_DIR [RUN_DIR …] [--json [FILE]] [--verbose]
    python -m scaling.doctor --rules

Exit code 0, whether or not something was found: it is advice. 2: a folder holds no run, or the command line is wrong.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from scaling.doctor import Diagnosis, diagnose
from scaling.doctor.show import as_json, lines, rules_page
from scaling.errors import CommandLine, UserError, run_program, write_output
from scaling.summarize import read_run
from scaling.view import print_lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.rules:
        print(rules_page(), end="")
        return 0
    if not options.run:
        raise UserError("RUN_DIR must be the folder of a run, but is absent; name one or more")
    diagnoses = [(Path(folder), diagnose(read_run(Path(folder)))) for folder in options.run]
    if options.json != "-":
        for number, (folder, diagnosis) in enumerate(diagnoses):
            if number:
                print()
            print_lines(lines(folder, diagnosis, verbose=options.verbose))
    if options.json:
        _write(diagnoses, options)
    return 0


def _write(diagnoses: Sequence[tuple[Path, Diagnosis]], options: Namespace) -> None:
    documents = [as_json(folder, diagnosis) for folder, diagnosis in diagnoses]
    text = json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, allow_nan=False)
    if options.json == "-":
        print(text)
        return
    write_output(options.json, text + "\n", "--json")


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.doctor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN_DIR", nargs="*", help="the folder of a run, under way or ended")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="as JSON, in FILE or in place of the lines; of several a list",
    )
    parser.add_argument("--verbose", action="store_true", help="name the rules that had too little data too, and why")
    parser.add_argument("--rules", action="store_true", help="print all rules, as Markdown")
    return parser


if __name__ == "__main__":
    run_program(main)
