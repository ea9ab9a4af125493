"""`python -m scaling.render SPEC --world-size N`: print the config that the backend will get."""

import json
from collections.abc import Sequence
from pathlib import Path

from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.hardware import parse_gpus
from scaling.render import render
from scaling.render.shipped import write_shipped
from scaling.spec import load_spec

KINDS = {
    "single": ["backend.kind=single"],
    "ddp": ["backend.kind=ddp"],
    "fsdp": ["backend.kind=fsdp"],
    "zero1": ["backend.kind=deepspeed", "backend.zero_stage=1"],
    "zero2": ["backend.kind=deepspeed", "backend.zero_stage=2"],
    "zero3": ["backend.kind=deepspeed", "backend.zero_stage=3"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.write_shipped:
        for path in write_shipped(Path(options.write_shipped)):
            print(path)
        return 0
    if options.spec is None:
        raise UserError("SPEC must be given, but is absent; name a spec.json, a recipe, or - for stdin")
    if options.gpus and options.world_size:
        raise UserError("`--world-size` must be absent where `--gpus` is given, but both are; drop one")
    world_size = parse_gpus(options.gpus).world_size if options.gpus else options.world_size or 1
    spec = load_spec(options.spec, [*KINDS.get(options.backend, []), *options.set])
    print(json.dumps(render(spec, world_size), indent=2))
    return 0


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.render", description=__doc__)
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument("--world-size", type=positive, help="number of ranks (default 1)")
    parser.add_argument("--gpus", metavar="[NODESx]COUNTxNAME", help="such as 8xH100-80GB, in place of --world-size")
    parser.add_argument("--backend", choices=KINDS, help="another backend than the spec's")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument("--write-shipped", metavar="DIR", help="render the shipped recipes into DIR (ds_configs/)")
    return parser


if __name__ == "__main__":
    run_program(main)
