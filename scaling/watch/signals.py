"""Signals that ask a rank to stop, and the death of the process above it."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from scaling.watch.processes import launcher_name

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_S = 1.0
"""One request arrives more than once: from the terminal or the scheduler, and again from the launcher."""
_SET_PDEATHSIG = 1  # <linux/prctl.h>


class StopRequest:
    """SIGTERM or SIGINT: the first asks for a stop, the second, more than a second later, ends the process at once.

    The second has its default action, in the kernel, so that it works on a rank that is stuck in a C call too. Under
    DeepSpeed's launcher a SIGTERM after a SIGINT is its way to pass on Ctrl-C, rank after rank; it never counts. Under
    torchrun it is what a second Ctrl-C becomes, and counts. Processes forked from this one ignore both signals.

    A context manager, for the main thread; it puts back the handlers that it found.
    """

    def __init__(self, notify: Callable[[signal.Signals], None] = lambda received: None) -> None:
        """`notify(signal)` is called once, in another thread, as soon as the first arrives."""
        self.received: signal.Signals | None = None
        """The first signal."""
        self.received_at: float | None = None
        """When it came, by time.monotonic."""
        self._notify = notify
        self._reader, self._writer = socket.socketpair()
        self._closed = threading.Event()
        self._owner = os.getpid()
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._found: dict[signal.Signals, Any] = {}
        self._found_fd = -1

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Other ranks may have been, and this one not: agree on it."""
        return self.received is not None

    def time_left(self, grace_s: float | None) -> float | None:
        """Seconds of `grace_s` that are left since the request; None without a request, or without a limit."""
        if grace_s is None or self.received_at is None:
            return None
        return self.received_at + grace_s - time.monotonic()

    def done(self) -> None:
        """What a stop asks for is done: ignore what a launcher may still send on the way out. In the main thread."""
        self._closed.set()
        self._listener.join()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> "StopRequest":
        self._writer.setblocking(False)
        self._found = {number: signal.signal(number, _handled) for number in _SIGNALS}
        # Python's own handlers wait for the main thread, which may be in a collective for long.
        self._found_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._in_child)
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._writer.shutdown(socket.SHUT_RDWR)  # wakes the listener
        self._listener.join()
        signal.set_wakeup_fd(self._found_fd)
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def _listen(self) -> None:
        """Wait for the first signal; give the second its effect once echoes of the first are over."""
        while self.received is None:
            byte = self._reader.recv(1)
            if not byte:
                return
            if byte[0] in _SIGNALS:
                self.received_at = time.monotonic()
                self.received = signal.Signals(byte[0])
        self._notify(self.received)
        if self._closed.wait(_ECHO_S):
            return
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        for number in _SIGNALS:
            # signal.signal is for the main thread alone.
            libc.signal(number, signal.SIG_IGN if self._is_echo(number) else signal.SIG_DFL)

    def _is_echo(self, number: signal.Signals) -> bool:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return self.received == signal.SIGINT and number == signal.SIGTERM and not by_torchrun

    def _in_child(self) -> None:
        """A worker of a data loader, say: its end is its owner's business, and its signals are not the owner's."""
        if os.getppid() == self._owner and signal.getsignal(signal.SIGTERM) is _handled:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def _handled(number: int, frame: FrameType | None) -> None:
    """Nothing: the byte in the pipe is what counts, but only signals with a handler in Python leave one."""


def die_with_parent(*, of_any: bool = False) -> None:
    """Have the kernel kill this process when its launcher dies, which would leave it running (torchrun does).

    Only where a known launcher is the direct parent, or `of_any`: a shell that ends, of a run under nohup, must not
    take it along. Linux only. The watchdog sees to launchers further up.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or (launcher_name(parent) is None and not of_any):
        return
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
