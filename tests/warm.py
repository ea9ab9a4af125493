"""A process that has imported torch, and forks itself for each command that it is given: a start costs next to nothing.

A start from nothing takes 5 s of a core, more than most tests. What is forked is a process like any other, with the
interpreter's own end; commands that are about starting, launchers, signals or memory get one from nothing
(processes.run). One server for each process of the tests, which ends with it.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("numpy", "rich.table", "scaling.train", "scaling.run", "scaling.loop", "scaling.engine.build"),
    *("scaling.checkpoint.keeper", "deepspeed", "peft"),
)


class Channel:
    """JSON objects, a line each, over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._read = b""

    def send(self, **message: object) -> None:
        """Write one."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict | None:
        """The next one; None where none comes within so many seconds, or the other end is closed."""
        while b"\n" not in self._read:
            if not select.select([self.connection], [], [], timeout)[0]:
                return None
            more = self.connection.recv(1 << 16)
            if not more:
                return None
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


class Server:
    """The server's other end. Commands run at the same time as far as one likes."""

    def __init__(self) -> None:
        mine, its = socket.socketpair()
        command = [sys.executable, __file__, str(its.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[its.fileno()])
        its.close()
        self._channel = Channel(mine)
        self._ended: dict[int, int] = {}

    def start(self, words: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> int:
        """Run `python words…`, which adds to the two files. Returns the process's id."""
        files = {"stdout": str(stdout), "stderr": str(stderr)}
        self._channel.send(words=words, environment=environment, folder=str(folder), **files)
        while True:
            answer = self._channel.receive()
            assert answer is not None, "the server has ended"
            if "started" in answer:
                self._ended.pop(answer["started"], None)
                return answer["started"]
            self._ended[answer["ended"]] = answer["code"]

    def wait(self, timeout: float) -> None:
        """Until one more has ended, or not longer than so many seconds."""
        if (answer := self._channel.receive(timeout)) is not None:
            self._ended[answer["ended"]] = answer["code"]

    def code(self, pid: int) -> int | None:
        """The exit code, less than 0 for a signal; None while it runs."""
        return self._ended.get(pid)


def serve(channel: Channel) -> dict:
    """Fork for each request; returns in the forked processes alone, with theirs."""
    woken, wake = os.pipe()  # through which select hears of children that have ended
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([channel.connection, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                channel.send(ended=found[0], code=os.waitstatus_to_exitcode(found[1]))
        if channel.connection not in ready:
            continue
        request = channel.receive()
        if request is None:
            os._exit(0)  # the tests are over
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(woken)
            os.close(wake)
            channel.connection.close()
            return request
        channel.send(started=pid)


def become(request: dict) -> None:
    """Be the process that was asked for, up to its main program."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if paths := os.environ.get("PYTHONPATH"):
        sys.path[1:1] = [path for path in paths.split(os.pathsep) if path]
    for number, place in ((1, "stdout"), (2, "stderr")):
        opened = os.open(request[place], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def run_main(words: list[str]) -> None:
    """As `python words…` does."""
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent.absolute())
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import gc
    import importlib

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's, which ends the server by and by
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    for name in PRELOADED:
        importlib.import_module(name)
    del sys.path[0]
    gc.freeze()
    given = serve(Channel(socket.socket(fileno=int(sys.argv[1]))))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(given)
    try:
        run_main(given["words"])
    finally:
        gc.freeze()  # or the interpreter's end would look through all that was imported, for a second or two
