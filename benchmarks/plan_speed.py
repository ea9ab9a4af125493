"""How long the planner, and what else needs no torch, takes to answer: process start to end, on this machine's clock.

    python -m benchmarks.plan_speed [--out FILE]

Exit code 0 where the best of the repeats is within the limit of each.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scaling.run_folder import environment

SINGLE, SEARCH = 0.4, 1.5
"""Seconds that one answer may take, and a search of about 1,000 candidates."""
MANY = '--set batch={"global_batch_size":5760,"micro_batch_size":1}'
"""720 sequences a rank can be cut in 30 ways: 990 candidates."""
COMMANDS: dict[str, float] = {
    "scaling.spec validate gpt2-124m": SINGLE,
    "scaling.render gpt2-124m --world-size 8": SINGLE,
    "scaling.inventory gpt2-124m": SINGLE,
    "scaling.plan --spec gpt2-124m --gpus 8xH100-80GB --as-written": SINGLE,
    "scaling.plan --spec llama-8b --gpus 8xH100-80GB --as-written": SINGLE,
    f"scaling.plan --spec llama-8b --gpus 8xH100-80GB {MANY}": SEARCH,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    options = parser.parse_args()
    rows = [measure(command, limit, options.repeats) for command, limit in COMMANDS.items()]
    good = all(row["best_s"] <= row["limit_s"] for row in rows)
    if options.out:
        report = {"environment": environment(1, "cpu"), "good": good, "rows": rows}
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


def measure(command: str, limit_s: float, repeats: int) -> dict[str, Any]:
    """The wall-clock seconds of each run of `python -m command`."""
    seconds: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command.split()], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    ordered = sorted(seconds)
    median = ordered[len(ordered) // 2]
    print(f"{ordered[0]:.2f} s at best, {median:.2f} s at the median, limit {limit_s} s: {command}", flush=True)
    return {"command": command, "limit_s": limit_s, "best_s": ordered[0], "median_s": median, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
