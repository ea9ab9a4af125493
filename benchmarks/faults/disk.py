"""Storage that is full, read-only, absent, gone in mid-run, or another run's: what does a run make of it?

    python -m benchmarks.faults.disk --out FILE

Small file systems are mounted where this is run as root; elsewhere those checks are listed as not run.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Row
from scaling.errors import StorageError
from scaling.run_folder import CHECKPOINTS, open_run_folder

STEPS = 60
SETTINGS = (f"max_steps={STEPS}", "checkpoint.interval=6")


def full(work: Path, options: argparse.Namespace) -> list[Row]:
    """A file system that fills within a save, and has room again, or has not."""
    row = Row(
        "R8 tmpfs", "disks that fill mid-save: training goes on, warns, loses no checkpoint, ends with the right code"
    )
    if not _can_mount(work):
        row.note = "not run: no right to mount"
        return [row]
    references = {ranks: _reference(work, ranks) for ranks in (1, 2)}
    cases = [(room, place, ranks) for place in (CHECKPOINTS, ".") for room in (True, False) for ranks in (1, 2)]
    for room, place, ranks in cases:
        folder = work / f"{place.strip('.')}{room}{ranks}"
        (folder / place).mkdir(parents=True)
        with _mounted(folder / place, "14m"):
            problems = _fill_mid_save(folder, folder / place, ranks, room=room)
            problems += runs.curve_problems(runs.read_lines(folder), references[ranks])
        row.trial(f"{place}, {ranks} ranks, room {'comes' if room else 'does not come'} back: {p}" for p in problems)
    return [row]


def _fill_mid_save(folder: Path, disk: Path, ranks: int, *, room: bool) -> list[str]:
    """Train; from the third save on the disk is full, for two saves or for ever."""
    launch = runs.Launch(runs.training("fsdp", ranks, folder, SETTINGS), folder.with_suffix(".out"))
    filler, problems = disk / "filler", []
    try:
        if not _until(launch, lambda: len(runs.checkpoints(folder).steps()) >= 2):
            return [f"it ended before its second checkpoint: {launch.output()[-1000:]}"]
        if not _until(launch, lambda: bool(runs.unfinished(folder))):
            return ["it ended before its third checkpoint"]
        _fill(filler)
        _until(launch, lambda: _warnings(launch) >= 2)
        step, damaged = runs.newest(folder)
        if step is None or damaged:
            problems.append(f"while the disk was full: newest checkpoint {step}, damaged {damaged}")
        if room:
            filler.unlink()
        code = launch.wait()
    finally:
        launch.kill(everything=True)
    warnings = _warnings(launch)
    if not warnings:
        problems.append("no warning")
    wanted = 0 if room else 6
    if ranks > 1 and code == 1:  # torchrun's own
        code = _written_code(folder, launch)
    if code != wanted:
        problems.append(f"exit code {code}, not {wanted}: {launch.output()[-1500:]}")
    # Where the whole run folder is on the full disk, records wait for room, and are lost with the process.
    problems += _common_problems(folder, launch, lines=room or disk != folder)
    newest = runs.newest(folder)[0]
    if newest is None or newest < (step or 0) or (room and newest != STEPS):
        problems.append(f"the newest checkpoint at the end is {newest}; it was {step}")
    return problems


def limited(work: Path, _options: argparse.Namespace) -> list[Row]:
    """Rank 1 alone can write no large file, for two saves."""
    row = Row("R8 rank", "saves in which one rank alone cannot write: none is published, training goes on to exit 0")
    control = Row("R8 rank control", "without the limit the same run warns of nothing")
    for backend, first in (("fsdp", 2), ("zero2", 1)):
        folder = work / backend
        command = runs.training(backend, 2, folder, (*SETTINGS, "checkpoint.keep_last=null"), script=runs.FAULTY)
        variables = {"FAULT_FILE_SIZE": f"1:50000:{first}:{first + 1}"}
        launch = runs.Launch(command, folder.with_suffix(".out"), variables)
        code = launch.wait()
        problems = _common_problems(folder, launch)
        missing = set(range(6, STEPS + 1, 6)) - set(runs.checkpoints(folder).steps())
        if code or missing != {6 * first, 6 * first + 6} or _warnings(launch) != 2:
            problems.append(f"exit code {code}, {missing} not saved, {_warnings(launch)} warnings: {launch.output()}")
        if "rank 1" not in launch.output():
            problems.append("the rank is not named")
        row.trial(f"{backend}: {problem}" for problem in problems)
    launch = runs.Launch(runs.training("fsdp", 2, work / "c", SETTINGS, script=runs.FAULTY), work / "c.out")
    code = launch.wait()
    control.trial([f"exit code {code}, {_warnings(launch)} warnings"] if code or _warnings(launch) else [])
    return [row, control]


def unusable(work: Path, _options: argparse.Namespace) -> list[Row]:
    """Run folders that cannot be written to."""
    row = Row("R9", "run folders that cannot be used: refused before the first step, exit code 6, one line")
    (work / "file").write_text("")
    (work / "link").symlink_to("link")
    places = [(work / "file", 1), (work / "file" / "run", 2), (Path("/proc/run"), 1), (work / "link" / "run", 1)]
    for place, ranks in places:
        row.trial(_refusal(runs.training("single" if ranks == 1 else "fsdp", ranks, place, SETTINGS), work / "out"))
    if _can_mount(work):
        (work / "ro").mkdir()
        with _mounted(work / "ro", "1m"):
            subprocess.run(["mount", "-o", "remount,ro", str(work / "ro")], check=True)
            row.trial(_refusal(runs.training("single", 1, work / "ro" / "run", SETTINGS), work / "out"))
        (work / "half" / CHECKPOINTS).mkdir(parents=True)
        with _mounted(work / "half" / CHECKPOINTS, "1m"):
            subprocess.run(["mount", "-o", "remount,ro", str(work / "half" / CHECKPOINTS)], check=True)
            row.trial(_refusal(runs.training("single", 1, work / "half", SETTINGS), work / "out"))
    (work / "mine").mkdir(mode=0o555)
    # What makes root write wherever it likes is taken from it; another user might not reach this interpreter.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    row.trial(_refusal([*drop, *runs.training("single", 1, work / "mine" / "run", SETTINGS)], work / "out"))
    return [row]


def _refusal(command: list[str], output: Path) -> list[str]:
    launch = runs.Launch(command, output)
    code, text = launch.wait(), launch.output()
    told = [line for line in text.splitlines() if "`--run-dir` must be" in line]
    problems = [] if code == 6 or "torch.distributed.run" in command else [f"exit code {code}"]
    if len(told) != 1 or launch.tracebacks():
        problems.append(f"it said {text[-1500:]}")
    if "step   " in text:
        problems.append("it trained")
    return [f"{' '.join(command[-8:])}: {problem}" for problem in problems]


def vanished(work: Path, _options: argparse.Namespace) -> list[Row]:
    """A file system that is taken away in mid-run."""
    row = Row(
        "R9 mount", "mounts that vanish in mid-run: it says so, saves nowhere else, goes on, ends with exit code 6"
    )
    if not _can_mount(work):
        row.note = "not run: no right to mount"
        return [row]
    for place in (CHECKPOINTS, "."):
        folder = work / f"run{place.strip('.')}"
        (folder / place).mkdir(parents=True)
        with _mounted(folder / place, "40m"):
            launch = runs.Launch(runs.training("single", 1, folder, SETTINGS), folder.with_suffix(".out"))
            saved = _until(launch, lambda at=folder: len(runs.checkpoints(at).steps()) >= 2)
            subprocess.run(["umount", "-l", str(folder / place)], check=True)
            code = launch.wait()
        problems = [] if saved else ["it ended too soon"]
        if code != 6 or not _warnings(launch) or launch.tracebacks():
            problems.append(f"exit code {code}, {_warnings(launch)} warnings: {launch.output()[-2500:]}")
        if runs.checkpoints(folder).steps():
            problems.append("it saved below the place where the mount was")
        row.trial(f"{place}: {problem}" for problem in problems)
    return [row]


def locked(work: Path, options: argparse.Namespace) -> list[Row]:
    """Many starts on one run folder at once."""
    rounds = Row("R10", f"rounds of {options.starts} starts at once on one folder: one wins, the others name it")
    freed = Row("R10 kill", "kills of the winner: the next start has the folder at once")
    real = Row(
        "R10 command", "starts of the real command on a folder where a run is at work: exit code 6, its pid named"
    )
    chance = random.Random(options.seed)
    for number in range(options.rounds):
        problems, free = _race(work / str(number), options.starts, chance)
        rounds.trial(problems)
        freed.trial(free)
    launch = runs.Launch(runs.training("single", 1, work / "real", ("max_steps=100000",)), work / "real.out")
    try:
        assert _until(launch, lambda: bool(runs.read_lines(work / "real"))), launch.output()
        others = [runs.Launch(launch.process.args, work / f"other-{i}.out") for i in range(3)]  # pyright: ignore
        for other in others:
            code, wanted = other.wait(), f"held by process {launch.process.pid} on {socket.gethostname()}"
            real.trial([] if code == 6 and wanted in other.output() else [f"{code}: {other.output()[-800:]}"])
        if launch.ended():
            real.problems.append("the run at work was ended by them")
    finally:
        launch.kill(everything=True)
    code, output = runs.train(
        [
            *runs.training("single", 1, work / "real", ("max_steps=100000",)),
            "--stop-after",
            str(max(runs.curve(work / "real")) + 3),
        ],
        work / "real.out",
    )
    freed.trial([f"the command after kill -9: {code} {output[-500:]}"] if code else [])
    return [rounds, freed, real]


def _race(folder: Path, starts: int, chance: random.Random) -> tuple[list[str], list[str]]:
    """Problems of the race, and of what follows kill -9 of its winner."""
    folder.mkdir()
    gate, opened = os.pipe()
    contenders = [_contender(folder / "run", gate) for _ in range(starts)]
    os.close(gate)
    os.close(opened)  # they are let go by the end of the pipe
    answers = {pid: os.read(reading, 4000).decode() for pid, reading in contenders}
    winners = [pid for pid, answer in answers.items() if answer == "won"]
    wanted = [f"held by process {winner} on {socket.gethostname()} since 2" for winner in winners]
    problems = [] if len(winners) == 1 else [f"{len(winners)} have won"]
    problems += [f"{text[:300]}" for text in answers.values() if text != "won" and not any(w in text for w in wanted)][
        :3
    ]
    free: list[str] = []
    for pid, reading in contenders:
        if pid in winners:
            time.sleep(chance.uniform(0, 0.01))
            runs.end(pid)
            began = time.monotonic()
            try:
                open_run_folder(folder / "run", resume="auto", saves=True).close()
            except StorageError as error:
                free.append(str(error))
            if time.monotonic() - began > 2:
                free.append(f"it took {time.monotonic() - began:.1f} s")
        os.waitpid(pid, 0)
        os.close(reading)
    return problems, free


def _contender(folder: Path, gate: int) -> tuple[int, int]:
    """A process that opens the run folder when the gate opens: its id, and where it tells the outcome."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.set_inheritable(writing, False)
        for descriptor in _inherited_writers(gate):
            os.close(descriptor)
        os.read(gate, 1)
        try:
            lock = open_run_folder(folder, resume="auto", saves=True)
            os.write(writing, b"won")
            signal.pause()
            lock.close()
        except StorageError as error:
            os.write(writing, str(error).encode())
        code = 0
    finally:
        os._exit(code)


def _inherited_writers(gate: int) -> list[int]:
    """The gate's other end, which a contender must not keep open."""
    pipe = os.readlink(f"/proc/self/fd/{gate}")
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) != gate and os.readlink(f"/proc/self/fd/{name}") == pipe:
                found.append(int(name))
    return found


CHECKS = {"full": full, "limited": limited, "unusable": unusable, "vanished": vanished, "locked": locked}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runs.parser("disk", __doc__)
    parser.add_argument("--starts", type=int, default=100, help="starts at once on one run folder")
    parser.add_argument("--rounds", type=int, default=20, help="how often")
    return runs.run(CHECKS, parser.parse_args(arguments), "disk")


def _reference(work: Path, ranks: int) -> dict[int, dict[str, Any]]:
    folder = work / f"reference-{ranks}"
    code, output = runs.train(runs.training("fsdp", ranks, folder, SETTINGS), folder.with_suffix(".out"))
    assert code == 0, output
    return runs.curve(folder)


def _common_problems(folder: Path, launch: runs.Launch, *, lines: bool = True) -> list[str]:
    problems = [f"{name} was left behind" for name in runs.unfinished(folder)]
    problems += runs.newest(folder)[1]
    if lines and (missing := set(range(1, STEPS + 1)) - set(runs.curve(folder))):
        problems.append(f"steps {sorted(missing)[:5]} are not in metrics.jsonl")
    if launch.tracebacks():
        problems.append(f"a traceback: {launch.output()[-1500:]}")
    return problems


def _written_code(folder: Path, launch: runs.Launch) -> int | None:
    try:
        return json.loads((folder / "exit.json").read_text())["code"]
    except (OSError, ValueError):
        return 6 if "exitcode  : 6" in launch.output() else None  # as torchrun shows it: nothing could be written


def _warnings(launch: runs.Launch) -> int:
    return launch.output().count("NO CHECKPOINT OF STEP")


def _until(launch: runs.Launch, happened: Any) -> bool:
    while not happened():
        if launch.ended():
            return bool(happened())
        time.sleep(0.001)
    return True


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _can_mount(work: Path) -> bool:
    if os.geteuid() != 0:
        return False
    place = work / "probe"
    place.mkdir(exist_ok=True)
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if found.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return found.returncode == 0


@contextlib.contextmanager
def _mounted(place: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
