"""Every prediction that has a measurement beside it, and the errors by origin, backend and category.

    python -m benchmarks.calibration [--add PATH …] [--trace] [--rows FILE] [--out FILE]

Rows lie in rows.jsonl; `--add` gathers more from run folders, rehearsals' reports, `scaling.plan --trace --json` and
results of benchmarks, `--trace` makes those that a machine without a GPU can: the real engine at real sizes on tensors
without values. The results of the ledger, of GPUs and of published runs are read where they lie.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.calibration import Row, of_trace, read_rows, rows_of, table, write_rows
from scaling import parity
from scaling.errors import run_program
from scaling.spec import load_spec
from scaling.trace import trace

ROWS = Path(__file__).parent / "rows.jsonl"
RESULTS = Path(__file__).parent.parent / "results"
READ = ("ledger-cpu.json", "gpu-memory.json", "published.json")
"""Of RESULTS, as far as they are there."""
NAMES = ("ddp", "fsdp", "fsdp-keep", "hsdp", "zero1", "zero2", "zero3")
MATRIX: list[tuple[str, str, int, str]] = [
    # recipe, backend, ranks, checkpointing
    *[("gpt2-124m", name, 8, mode) for name in NAMES for mode in ("none", "full")],
    *[("gpt2-124m", name, 32, "selective") for name in ("fsdp", "zero2")],
    *[("llama-8b", "fsdp", 8, mode) for mode in ("none", "selective", "full")],
    *[("llama-8b", name, 8, "full") for name in ("zero1", "zero2", "zero3")],
]
"""What `--trace` traces."""


def main() -> int:
    options = _parser().parse_args()
    rows = read_rows(options.rows)
    for path in options.add:
        rows += rows_of(path)
    if options.trace:
        for row in _traces(options.only):
            rows.append(row)
            write_rows(options.rows, rows)
    if options.add:
        write_rows(options.rows, rows)
    rows = list({row["id"]: row for row in rows}.values())
    rows += [row for name in READ if (RESULTS / name).exists() for row in rows_of(RESULTS / name)]
    lines = table(rows)
    print(f"{'':<8}{'quantity':<10}{'origin':<19}{'of':<16}rows    median      p90    worst     bias")
    for line in lines:
        mark = "fitted" if line["fitted"] else "scored"
        print(
            f"{mark:<8}{line['quantity']:<10}{line['origin']:<19}{line['of']:<16}{line['rows']:>4} "
            f"{line['median']:>9.3%} {line['p90']:>8.2%} {line['worst']:>8.2%} {line['bias']:>+8.2%}"
        )
    if options.out:
        options.out.write_text(json.dumps(lines, indent=1) + "\n")
    return 0


def _traces(only: str) -> Iterator[Row]:
    for recipe, name, ranks, mode in MATRIX:
        told = f"{recipe} {name} x{ranks} {mode}"
        if only in told:
            settings = [f"backend={json.dumps(parity.BACKENDS[name])}", f"activation_checkpointing={mode}"]
            row = of_trace(trace(load_spec(recipe, settings), ranks))
            print(f"{row['predicted']['bytes'] / row['measured']['bytes'] - 1:+.3%}  {told}", flush=True)
            yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="PATH", help="gather rows from these")
    parser.add_argument("--trace", action="store_true", help="trace the matrix of recipes and gather its rows")
    parser.add_argument("--only", default="", metavar="WORD", help="of the matrix, cells with this in their name")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="where rows lie")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table as JSON")
    return parser


if __name__ == "__main__":
    run_program(main)
