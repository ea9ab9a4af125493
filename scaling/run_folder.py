"""The folder of one run: what is written where (README.md has the list)."""

import fcntl
import hashlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling.errors import NoProgress, StorageError
from scaling.redact import redacted, redacted_json
from scaling.spec.scan import quoted

METRICS, VALIDATION, EVENTS, EXIT = "metrics.jsonl", "validation.jsonl", "events.jsonl", "exit.json"
MEMORY, OOM, SNAPSHOTS = "memory.json", "oom.json", "memory"
LOCK, RESTARTS, CHECKPOINTS = "run.lock", "restarts.json", "checkpoints"
PACKAGES = ("scaling", "torch", "deepspeed", "pydantic", "numpy", "tokenizers")


def open_run_folder(folder: Path, *, resume: str, saves: bool) -> "RunLock":
    """Make `folder` or enter it, for this process alone until the lock is closed. For rank 0.

    StorageError where it cannot be written to, where another run is at work in it, or where it holds a run that
    `resume` ("auto", "never" or a path), or a run that saves nothing, would mix with.

    A new folder is its owner's alone (mode 0700): weights, logs and paths of the data are often confidential, and the
    usual umask lets everybody on a cluster read. The files in it follow the umask, so that sharing a run is one
    `chmod` of its folder; one that exists before keeps its mode, which is how to share from the start.
    """
    if "\0" in str(folder):
        raise StorageError(f"`--run-dir` must be a path, but {quoted(str(folder))} has a NUL in it; drop it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RunLock(folder / LOCK)
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        holds_a_run = (folder / METRICS).exists() and (folder / METRICS).stat().st_size > 0
        if holds_a_run and (resume == "never" or not saves):
            why = "" if resume == "never" else " and no checkpoint to go on from, since `checkpoint` is null"
            raise StorageError(
                f"`--run-dir` must be a folder without a run in it, but {quoted(str(folder), limit=200)} has "
                f"{METRICS}{why}; name another folder, or move that one away"
            )
        for name in (EXIT, OOM):  # of an earlier start
            (folder / name).unlink(missing_ok=True)
        mend_lines(folder / METRICS)
        mend_lines(folder / VALIDATION)
        mend_lines(folder / EVENTS)
        (folder / METRICS).touch()
        if saves:  # found out now, not at the first save
            probe = folder / CHECKPOINTS / ".incomplete-probe"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()
    except OSError as error:
        lock.close()
        raise _not_writable(folder, error) from None
    except StorageError:
        lock.close()
        raise
    return lock


class RunLock:
    """Holds a run folder for one process. The kernel lets go of it however the process ends."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError where another process holds it, and OSError where the file cannot be opened."""
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
        began = time.monotonic()
        while not self._acquire():
            holder = self._holder()
            # One who has just got it has not written its name yet.
            patience = _NAMELESS_S if not holder else _DYING_S if _is_dying(holder) else 0.0
            if time.monotonic() >= began + patience:
                self._file.close()
                raise StorageError(
                    f"`--run-dir` must be a folder that no other run is at work in, but {path.parent} is held by "
                    f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')} since "
                    f"{holder.get('since', 'an unknown time')}; wait for it, stop it, or name another folder"
                )
            time.sleep(0.05)
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go."""
        self._file.close()

    def _acquire(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: go by what the last holder wrote
            holder = self._holder()
            same_host = holder.get("host") == socket.gethostname()
            return not holder or (same_host and not Path(f"/proc/{holder.get('pid')}").exists())
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            self._file.seek(0)
            found = json.loads(self._file.read(1000))
            return found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        except (OSError, ValueError):
            return {}


_NAMELESS_S = 1.0
_DYING_S = 10.0
"""A killed process lets go of its locks only once its memory is freed: seconds, for a large one."""


def _is_dying(holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lock on this host is gone, or as good as gone."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        stat = Path(f"/proc/{holder.get('pid')}/stat").read_text()
        status = Path(f"/proc/{holder.get('pid')}/status").read_text()
    except OSError:
        return True
    fields = stat.rpartition(")")[2].split()
    # A killed process still shows as running while its memory is freed, which comes before its files are closed.
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    killed = any(signals >> (signal.SIGKILL - 1) & 1 for signals in pending)
    return fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING) or killed


_PF_EXITING = 0x4
"""Of the flags in /proc/PID/stat (proc(5), include/linux/sched.h): the process is on its way out."""


def mend_lines(path: Path) -> None:
    """Cut off the last line of a JSON-lines file if it was broken off: what is appended must not join it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        back = min(size, 1 << 20)
        file.seek(size - back)
        tail = file.read(back)
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - back + tail.rfind(b"\n") + 1)


def count_start(folder: Path, *, newest: int | None, limit: int | None, spec: dict[str, Any]) -> None:
    """Take note of a start from checkpoint `newest`; NoProgress after `limit` restarts that got no further.

    A start counts as a restart where the one before it neither ended well nor was stopped by a signal. Another spec, or
    removing restarts.json, begins the count anew.
    """
    path = folder / RESTARTS
    digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = before["newest"] == newest and before["spec"] == digest
        restarts = before["restarts"] + 1 if same and not before["ended_well"] else 0
    except (OSError, ValueError, KeyError, TypeError):
        restarts = 0
    if limit is not None and restarts >= limit:
        where = "before its first checkpoint" if newest is None else f"with step {newest} as its newest checkpoint"
        raise NoProgress(
            f"`checkpoint.restart_limit` must not be reached, but the run was started again {restarts} times {where}; "
            f"find out from {folder / 'train.log'} what ends it, then remove {path}"
        )
    write_json(path, {"newest": newest, "restarts": restarts, "spec": digest, "ended_well": False})


def _note_good_end(folder: Path) -> None:
    path = folder / RESTARTS
    if path.exists():
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "ended_well": True})


def _not_writable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"`--run-dir` must be a folder that can be written to, but {quoted(str(folder))} is not ({error.strerror}); "
        "name another folder"
    )


def strict(value: Any) -> Any:
    """`value` with null for what JSON has no word for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all, readable by people, without secrets (scaling/redact.py)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(redacted_json(value), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"the run folder must have room, but {path} failed ({error.strerror}); free some") from None


def write_exit(folder: Path, *, code: int, reason: str, rank: int, step: int | None) -> None:
    """How the run ended, for scripts: launchers swallow exit codes (torchrun returns 1 for any failure)."""
    if code in (0, 75):
        _note_good_end(folder)
    write_json(folder / EXIT, {"code": code, "reason": reason, "rank": rank, "step": step, "time": time.time()})


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions, commit and device of this run; no environment variable is recorded, some hold secrets."""
    return {
        "versions": versions(),
        "commit": _commit(),
        "world_size": world_size,
        "device": device,
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that a run depends on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}


class LogFormatter(logging.Formatter):
    """Leaves secrets out of messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def log_to(folder: Path, rank: int) -> None:
    """Send the log of this rank to its file: train.log for rank 0, train-rank3.log for rank 3."""
    handler = _LogFile(folder / ("train.log" if rank == 0 else f"train-rank{rank}.log"), delay=True)
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    logging.getLogger("scaling").addHandler(handler)


class _LogFile(logging.FileHandler):
    """Says nothing about a full disk, at each line anew: the terminal has the lines, and whoever saves warns."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None
