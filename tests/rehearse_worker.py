"""One rank of tests/test_rehearse.py: the steps of a rehearsal with real peers, its memory counted in the same way.

torchrun --nproc_per_node=2 tests/rehearse_worker.py OUT SPEC [--set …]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scaling.engine.process import process_from_environment
from scaling.profile.meter import build_meter
from scaling.rehearse import take_steps
from scaling.run import resolve
from scaling.spec import load_spec


def main() -> None:
    out, path, *assignments = sys.argv[1:]
    with process_from_environment() as process:
        job = resolve(load_spec(path, assignments), process.world_size)
        meter = build_meter(process.device)
        with meter:
            take_steps(job, process, meter, 2)
        if process.is_main:
            Path(out).write_text(json.dumps(meter.report()))


if __name__ == "__main__":
    main()
