"""One rank of tests/test_rehearse.py: the steps of a rehearsal with real peers, its memory counted in the same way.

torchrun --nproc_per_node=2 tests/rehearse_worker.py OUT SPEC [--set …]
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.engine.build import import_backend
from scaling.engine.process import process_from_environment
from scaling.profile.meter import build_meter
from scaling.rehearse import take_steps
from scaling.run import resolve
from scaling.spec import load_spec

NOTHING = torch.zeros(1)
"""Made before anything is counted."""


class OneThreadGloo(distributed_c10d.ProcessGroupGloo):
    """Gloo with one thread, where a finished collective is one whose tensors have been let go, too."""

    made: list["OneThreadGloo"] = []

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        options = distributed_c10d.ProcessGroupGloo._Options()
        options._devices = [distributed_c10d.ProcessGroupGloo.create_default_device()]
        options._threads, options._timeout = 1, timeout
        super().__init__(store, rank, size, options)
        self.made.append(self)

    def settle(self) -> None:
        self.allreduce([NOTHING]).wait()


class Settled(TorchDispatchMode):
    """Waits after each collective until gloo's thread holds none of its tensors.

    The thread wakes who waits for a collective before it lets go of the tensors: on a busy machine they would now and
    then be counted for a little longer. NCCL has no such thread.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            for group in OneThreadGloo.made:
                group.settle()
        return result


def main() -> None:
    out, path, *assignments = sys.argv[1:]
    distributed_c10d.ProcessGroupGloo = OneThreadGloo
    with process_from_environment() as process:
        job = resolve(load_spec(path, assignments), process.world_size)
        import_backend(job.spec, process)
        meter = build_meter(process.device)
        with meter, Settled():
            take_steps(job, process, meter, 2)
        if process.is_main:
            Path(out).write_text(json.dumps(meter.report()))


if __name__ == "__main__":
    main()
