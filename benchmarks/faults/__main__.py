"""All fault checks, one after the other, and the page of their results.

python -m benchmarks.faults --jobs 2   # hours on two cores, two checks at a time
python -m benchmarks.faults --fast     # the same, with few trials each
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.faults.report import RESULTS
from benchmarks.faults.runs import ROOT

LONG = {
    **{
        f"chaos-{b}-{n}": f"chaos --backend {b} --ranks {n} --kills {kills} --steps {steps}"
        for n, kills, steps in ((4, 20, 90), (2, 80, 150))
        for b in ("fsdp", "zero1", "zero2", "zero3")
    },
    **{f"moves-{name}": f"moves --only {name}" for name in ("state", "resumed", "same", "chain")},
    "moves-order": "moves --only order,changed",
    "nonfinite": "nonfinite --places 2",
    "corruption": "corruption",
    "crash-command": "crash_points --only command --trainings 8",
    "crash-savers": "crash_points --only savers",
    "specs": "specs --count 10000",
    "disk-full": "disk --only full",
    "disk": "disk --only limited,unusable,vanished,locked --rounds 100",
    "suite": "suite",
}
"""The longest first, for several at a time."""
FAST = {
    **{f"chaos-{b}-2": f"chaos --backend {b} --kills 5 --steps 60" for b in ("fsdp", "zero1", "zero2", "zero3")},
    "crash_points": "crash_points --most 100 --trainings 8",
    "disk": "disk --rounds 3",
    "corruption": "corruption",
    "nonfinite": "nonfinite --places 1",
    "specs": "specs --count 300 --commands 20",
    "moves": "moves --only chain,order,changed",
    "suite": "suite",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few trials of each, and the page is left as it is")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="checks at a time: most of their time is starting runs")
    options = parser.parse_args()
    folder = ROOT / ".cache" / "faults" if options.fast else RESULTS
    checks = FAST if options.fast else LONG

    def fails(name: str) -> bool:
        began = time.monotonic()
        check, *rest = checks[name].split()
        command = [sys.executable, "-m", f"benchmarks.faults.{check}", *rest, "--seed", str(options.seed)]
        code = subprocess.run([*command, "--out", str(folder / f"{name}.json")], cwd=ROOT).returncode
        print(f"{name}: {'failed' if code else 'passed'} after {time.monotonic() - began:.0f} s", flush=True)
        return code != 0

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [name for name, wrong in zip(checks, pool.map(fails, checks), strict=True) if wrong]
    if not options.fast:
        subprocess.run([sys.executable, "-m", "benchmarks.faults.report"], cwd=ROOT, check=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
