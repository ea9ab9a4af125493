"""All fault checks, one after the other, and the page of their results.

python -m benchmarks.faults            # hours on two cores
python -m benchmarks.faults --fast     # the same, with few trials each
"""

import argparse
import subprocess
import sys

from benchmarks.faults.report import RESULTS
from benchmarks.faults.runs import ROOT

LONG = {
    **{
        f"chaos-{b}-{n}": f"chaos --backend {b} --ranks {n} --kills {100 if n == 2 else 25}"
        for n in (2, 4)
        for b in ("fsdp", "zero1", "zero2", "zero3")
    },
    "crash_points": "crash_points",
    "disk": "disk",
    "corruption": "corruption",
    "nonfinite": "nonfinite --places 5",
    "moves": "moves",
    "suite": "suite",
}
FAST = {
    **{f"chaos-{b}-2": f"chaos --backend {b} --kills 5 --steps 60" for b in ("fsdp", "zero1", "zero2", "zero3")},
    "crash_points": "crash_points --most 100 --trainings 8",
    "disk": "disk --rounds 3",
    "corruption": "corruption",
    "nonfinite": "nonfinite --places 1",
    "moves": "moves --only chain,order,changed",
    "suite": "suite",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few trials of each, and the page is left as it is")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    failed = []
    for name, words in (FAST if options.fast else LONG).items():
        out = ROOT / ".cache" / "faults" if options.fast else RESULTS
        check, *rest = words.split()
        command = [sys.executable, "-m", f"benchmarks.faults.{check}", *rest, "--seed", str(options.seed)]
        if subprocess.run([*command, "--out", str(out / f"{name}.json")], cwd=ROOT).returncode:
            failed.append(name)
    if not options.fast:
        subprocess.run([sys.executable, "-m", "benchmarks.faults.report"], cwd=ROOT, check=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
