"""How long a rank waits for others, where the host can tell: on a CPU its own thread stands still in a collective.

Every collective that is called from Python, by FSDP2, DeepSpeed or this project, ends in
`torch.distributed.Work.wait` (torch/distributed/distributed_c10d.py), which is watched here. What a GPU waits happens
on its own streams, and what DDP waits happens below Python: both stay unknown.
"""

import threading
import time
from typing import Any

import torch.distributed as dist


class NullWaits:
    """Where waiting cannot be seen."""

    seconds: float | None = None
    """Seconds waited so far; None: not known."""

    def close(self) -> None:
        """Do nothing."""


class Waits:
    """Counts while it is open, for the thread that has made it: a checkpoint's writer has collectives of its own."""

    def __init__(self) -> None:
        self.seconds: float = 0.0
        self._real: Any = dist.Work.wait
        thread, real = threading.get_ident(), self._real

        def wait(work: Any, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(work, *arguments, **more)
            finally:
                if threading.get_ident() == thread:
                    self.seconds += time.perf_counter() - began

        dist.Work.wait = wait  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        """Leave torch as it was."""
        dist.Work.wait = self._real
