"""The rank's side of its watchdog: start it, tell it where the run is, answer what it asks, say goodbye."""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scaling.watch.blame import place
from scaling.watch.heartbeat import Beat, Heartbeat, HeartbeatReader, unnamed_file
from scaling.watch.outcome import HUNG, Outcome, await_outcome, settle
from scaling.watch.processes import launchers_of

LIMITS: Mapping[str, float] = {
    "startup": 3600.0,
    "first_step": 1800.0,
    "step": 600.0,
    "validation": 600.0,
    "save": 1800.0,
    "closing": 600.0,
}
"""Phase -> seconds without a sign of life after which a rank hangs. Each part of each micro-batch is a sign."""
_OTHERS_S = 2.0
"""How long a rank that has lost a peer waits to learn which: its watchdog says so within half a second."""
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from scaling.watch.watchdog import main; main()"


class Watch:
    """A watchdog beside this process, from the construction to `close`; one at a time.

    While it is there, SIGUSR1 makes this process dump its Python stacks for the watchdog, and SIGFPE ends it with exit
    code 8, even when it is stopped or a C call holds Python's lock.
    """

    def __init__(
        self,
        rank: int,
        limits: Mapping[str, float] = LIMITS,
        *,
        collective: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`collective()` says which collective this rank is in, see `Report`: keys "waiting" and "joined"."""
        self.rank = rank
        self._collective = collective
        self._files = unnamed_file(), unnamed_file()
        self.heartbeat = Heartbeat(self._files[0])
        self._folder: Path | None = None
        self._attempt = ""
        self._dump_stacks()
        self._socket, theirs = socket.socketpair()
        config = {
            "rank": rank,
            "pid": os.getpid(),
            "limits": {**LIMITS, **limits},
            "launchers": launchers_of(os.getpid()),
            "beat": self._files[0],
            "stacks": self._files[1],
            "socket": theirs.fileno(),
        }
        with theirs:
            self._watchdog = self._start(config)
        self._listener = threading.Thread(target=self._answer, name="watch", daemon=True)
        self._listener.start()

    def open(self, folder: Path, attempt: str, world_size: int) -> None:
        """From now on the watchdogs of all ranks work together, in `folder`, which they share.

        `attempt`: a name for this start of the run, the same on all ranks and never used before in this folder.
        """
        self._folder, self._attempt = folder.absolute(), attempt
        self._tell({"folder": str(self._folder), "attempt": attempt, "world_size": world_size})

    @property
    def place(self) -> str:
        """Where in the run this rank is, in words."""
        return place(self.beat)

    @property
    def beat(self) -> Beat:
        """The latest sign of life of this rank."""
        return HeartbeatReader(self._files[0]).read()

    def settle(self, outcome: Outcome, *, ask_others: bool = False) -> tuple[Outcome, bool]:
        """Say how the run ended, unless another rank has; returns what counts, and whether it is this.

        `ask_others`: the fault is another rank's, whose watchdog may be about to say more. Writes exit.json, once there
        is a folder. Raises OSError where it cannot be written to.
        """
        if self._folder is None:
            return outcome, True
        if ask_others and (found := await_outcome(self._folder, self._attempt, _OTHERS_S)):
            return found, False
        return settle(self._folder, self._attempt, outcome)

    def close(self) -> None:
        """Say goodbye: how the run ends is known. The watchdog ends first, and leaves nothing behind."""
        if self._watchdog is None:
            return
        self._tell({"goodbye": True})
        try:
            self._watchdog.wait(2)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()
            self._watchdog.wait()
        self._watchdog = None
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the listener
        self._listener.join()
        self._socket.close()
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.disable()
        _libc().signal(HUNG, None)
        for file in self._files:
            os.close(file)

    def _start(self, config: dict[str, Any]) -> "subprocess.Popen[bytes] | None":
        root = Path(__file__).resolve().parents[2]
        return subprocess.Popen(
            # Isolated and without site-packages: it starts in a twentieth of a second, whatever is installed.
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(root), json.dumps(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(config["beat"], config["stacks"], config["socket"]),
            start_new_session=True,  # Ctrl-C and the launcher's signals to the group are for the rank
        )

    def _dump_stacks(self) -> None:
        """Let signals dump the stacks of all threads, without Python's lock."""
        # On Linux and BSD alike the number of SIGFPE is the exit code that is wanted, and _exit takes the number of the
        # signal as its argument: a handler that needs no Python. faulthandler dumps the stacks, then calls it.
        faulthandler.disable()
        libc = _libc()
        libc.signal(HUNG, ctypes.cast(libc._exit, ctypes.c_void_p))
        faulthandler.enable(self._files[1], all_threads=True)
        faulthandler.register(signal.SIGUSR1, self._files[1], all_threads=True, chain=False)

    def _answer(self) -> None:
        """Say which collective this rank is in, whenever the watchdog asks; in a thread."""
        while True:
            try:
                question = self._socket.recv(64)
            except OSError:
                return
            if not question:
                return
            try:
                answer = self._collective()
            except Exception as error:  # private parts of torch: a failure there must not touch the run
                answer = {"error": repr(error)}
            self._tell({"collective": answer})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the watchdog may have been killed: the run goes on without
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return libc
