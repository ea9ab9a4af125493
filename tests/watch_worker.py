"""One rank of tests/test_watch.py: takes small steps under a watchdog, and goes wrong as it is told.

    python tests/watch_worker.py FOLDER FAULT [LIMITS as JSON]

In FOLDER each rank leaves pid-N and watchdog-N, and says in steps-N how far it is.
"""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

FAULT_STEP, STEPS = 3, 6
JUMPING = """
import time
_real, _turn = time.time, [1]
def _jumping():
    _turn[0] = -_turn[0]
    return _real() + 3600 * _turn[0]
time.time = _jumping
"""
"""A clock on the wall that goes back and forth by an hour."""


def main() -> int:
    folder, fault = Path(sys.argv[1]), sys.argv[2]
    limits = {"step": 2.0, "first_step": 60.0, **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}")}
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    from scaling.watch import watch as module
    from scaling.watch.outcome import Outcome
    from scaling.watch.peers import is_lost_peer
    from scaling.watch.signals import StopRequest, die_with_parent
    from scaling.watch.watch import Watch

    if fault == "clock":
        exec(JUMPING)
        module._PROGRAM = JUMPING + module._PROGRAM
    if fault != "orphan":
        die_with_parent()
    distributed = world_size > 1
    if distributed:
        from scaling.engine.collectives import current_collective, record_collectives

        record_collectives()
    watch = Watch(rank, limits, **({"collective": current_collective} if distributed else {}))
    watchdog = watch._watchdog
    assert watchdog is not None
    (folder / f"watchdog-{rank}").write_text(f"{watchdog.pid}\n")
    if fault in ("blind", "orphan", "unwatched"):
        watchdog.kill()
    with StopRequest(lambda received: watch.heartbeat.stopping(received)) as stop:
        collective = Collective(distributed)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch.open(folder, f"attempt-{attempt}", world_size)
        (folder / f"pid-{rank}").write_text(f"{os.getpid()}\n")
        try:
            code = train(folder, fault, rank, watch, stop, collective)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            found, _ = watch.settle(Outcome(9, "a rank is lost", None, None), ask_others=True)
            (folder / f"lost-{rank}").write_text(found.reason)
            code = found.code
        watch.heartbeat.beat("closing")
        watch.close()
        if fault != "die":
            collective.close()
    return code


def train(folder, fault, rank, watch, stop, collective) -> int:
    steps = {"forever": 10**6, "orphan": 10**6, "unwatched": 10**6, "sluggish": 10**6, "slow": 4}.get(fault, STEPS)
    for step in range(1, steps + 1):
        watch.heartbeat.beat("step", step)
        watch.heartbeat.part("data")
        (folder / f"steps-{rank}").write_text(str(step))
        last = rank == collective.world_size - 1
        if step == FAULT_STEP and last:
            go_wrong(fault)
        watch.heartbeat.part("other")
        if not (fault == "miss" and step == FAULT_STEP and last):
            spoilt = step == FAULT_STEP and last and fault in ("shape", "operation")
            stopping = collective.all_reduce(float(stop.requested), fault if spoilt else "")
            if stopping:
                (folder / f"saved-{rank}").write_text(str(step))
                if fault == "sluggish":
                    deadlock(ctypes.CDLL(None))
                stop.done()
                return 75
        time.sleep(1.2 if fault == "slow" else 0.05)
    if fault == "miss":
        collective.barrier()
    return 0


def go_wrong(fault: str) -> None:
    match fault:
        case "sleep" | "clock":
            time.sleep(600)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "gil":
            deadlock(ctypes.PyDLL(None))  # unlike CDLL it holds the lock
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            ctypes.string_at(0)


def deadlock(libc: ctypes.CDLL) -> None:
    """Wait for ever in C, where signals for Python have no effect."""
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class Collective:
    """What the ranks do together; a rank that is alone does it by itself."""

    def __init__(self, distributed: bool) -> None:
        self.world_size = 1
        if distributed:
            import torch
            import torch.distributed as dist

            self.torch, self.dist = torch, dist
            dist.init_process_group("gloo", timeout=timedelta(seconds=120))
            self.world_size = dist.get_world_size()
            self.other = dist.new_group()

    def all_reduce(self, value: float, fault: str = "") -> float:
        if self.world_size == 1:
            return value
        total = self.torch.tensor([value] * (1000 if fault == "shape" else 1))
        if fault == "operation":
            self.dist.all_gather([self.torch.zeros(1) for _ in range(self.world_size)], total)
            return 0.0
        self.dist.all_reduce(total)
        return float(total)

    def barrier(self) -> None:
        self.dist.all_reduce(self.torch.zeros(5), group=self.other)

    def close(self) -> None:
        if self.world_size > 1:
            self.dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
