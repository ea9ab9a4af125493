"""Starts real training runs, as a user would, and looks at what they leave; what all fault checks share."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaling.checkpoint.store import Store, problems_of
from scaling.run_folder import CHECKPOINTS, METRICS, environment

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = Path(__file__).with_name("spec.json")
FAULTY = Path(__file__).with_name("launch.py")
"""launch/train.py with the faults that the environment asks for (see `hooks`)."""
BACKENDS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}
CURVE = ("loss", "grad_norm", "lr", "samples_seen", "tokens", "skipped")
"""What of a logged step must not depend on what happened to the run."""
_TOKEN = "FAULTS_TOKEN"


def training(
    backend: str,
    ranks: int,
    folder: Path,
    settings: Iterable[str] = (),
    *,
    arguments: Sequence[str] = (),
    script: Path = ROOT / "launch" / "train.py",
) -> list[str]:
    """The command of a run: torchrun on a port of its own, or plain python for one process."""
    words = [str(script), "--spec", str(SPEC), "--run-dir", str(folder)]
    for setting in (f"backend={json.dumps(BACKENDS[backend])}", *settings):
        words += ["--set", setting]
    if ranks == 1:
        return [sys.executable, *words, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*launcher, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *words, *arguments]


class Launch:
    """A command under way, with all processes that come of it."""

    def __init__(self, command: Sequence[str], output: Path, variables: Mapping[str, str] | None = None) -> None:
        self.token = uuid.uuid4().hex
        self.began = time.monotonic()
        self._output = output
        variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(variables or {}), _TOKEN: self.token}
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **variables}, stdout=file, stderr=file, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether the launcher is gone."""
        return self.process.poll() is not None

    def output(self) -> str:
        """All that was printed."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code, once the launcher and its ranks are gone; TimeoutExpired where they do not go."""
        code = self.process.wait(timeout_s)
        until = time.monotonic() + 30
        while self.alive():
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.process.args, timeout_s)
            time.sleep(0.02)
        return code

    def tracebacks(self) -> int:
        """Tracebacks in what was printed; torchrun's own, about a rank that failed, is none."""
        text = self.output()
        return text.count("Traceback (most recent call last)") - text.count("multiprocessing.errors.ChildFailedError:")

    def alive(self) -> list[int]:
        """Every process of this launch that runs, whoever its parent is by now."""
        found: list[int] = []
        mark = f"{_TOKEN}={self.token}".encode()
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                try:
                    if mark in Path(f"/proc/{entry}/environ").read_bytes() and _state(int(entry)) not in "ZX":
                        found.append(int(entry))
                except OSError:
                    continue
        return found

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that runs."""
        if b"torch.distributed.run" not in _read(f"/proc/{self.process.pid}/cmdline"):
            return {0: self.process.pid}
        found: dict[int, int] = {}
        for task in _listed(f"/proc/{self.process.pid}/task"):
            for child in _read(f"/proc/{self.process.pid}/task/{task}/children").split():
                for variable in _read(f"/proc/{int(child)}/environ").split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(variable[5:])] = int(child)
        return found

    def kill(self, *, everything: bool) -> None:
        """kill -9 of all processes of the launch; without `everything`, of what is left when the launcher is gone."""
        if everything and not self.ended():
            for pid in [*self.ranks().values(), self.process.pid]:
                end(pid)
        for pid in self.alive() if everything or self.ended() else []:
            end(pid)


def end(pid: int) -> None:
    """kill -9."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def train(command: Sequence[str], output: Path, variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end: its exit code (of the run, where a launcher swallowed it) and what it printed."""
    launch = Launch(command, output, variables)
    try:
        code = launch.wait()
    finally:
        launch.kill(everything=True)
    folder = Path(command[command.index("--run-dir") + 1]) if "--run-dir" in command else None
    if code == 1 and folder is not None and (folder / "exit.json").exists():
        written = json.loads((folder / "exit.json").read_text())
        code = written["code"] if written["time"] > time.time() - (time.monotonic() - launch.began) - 1 else code
    return code, launch.output()


def read_lines(folder: Path, start: int = 0) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl from byte `start` on; a line that was broken off is not one."""
    path = folder / METRICS
    if not path.exists():
        return []
    text = path.read_bytes()[start:].decode()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def curve(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> its logged line, the last where there are several."""
    return {line["step"]: line for line in read_lines(folder)}


def checkpoints(folder: Path) -> Store:
    """The checkpoints of a run folder."""
    return Store(folder / CHECKPOINTS)


def log(folder: Path) -> str:
    """What the run has told so far."""
    path = folder / "train.log"
    return path.read_text() if path.exists() else ""


def unfinished(folder: Path) -> list[str]:
    """Names in the checkpoints' folder that no finished save leaves behind."""
    return [name for name in _listed(folder / CHECKPOINTS) if name.startswith(".")]


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint, and what is wrong with folders that carry a final name."""
    store = checkpoints(folder)
    steps = store.steps()
    problems = [problem for step in steps for problem in problems_of(store.path(step))]
    return (steps[-1] if steps else None), problems


def resumed_step(log: str) -> int | None:
    """The step that a log says the run went on from."""
    found = re.search(r"resuming from \S*step-(\d+)", log)
    return int(found[1]) if found else None


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, masters and moments; and of the counters."""
    from scaling.checkpoint.format import Reader

    reader = Reader(checkpoint)
    found = {"counters": json.dumps(reader.state["counters"], sort_keys=True)}
    for key, elements in reader.elements.items():
        values = reader.read(key, 0, elements)
        found[key] = f"{values.dtype} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
    reader.close()
    return found


def differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names whose digests differ, or that only one of the two has."""
    return sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))


def curve_problems(lines: Sequence[Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Logged steps that are not, bit for bit, as in the undisturbed run."""
    problems: list[str] = []
    for line in lines:
        wanted = reference.get(line["step"])
        if wanted is None:
            problems.append(f"step {line['step']} is logged, and the undisturbed run has no such step")
            continue
        for name in CURVE:
            if line[name] != wanted[name]:
                problems.append(f"step {line['step']}: {name} is {line[name]!r}, undisturbed {wanted[name]!r}")
    return problems


@dataclass
class Row:
    """What one check found: so many trials, of which so many went as they must."""

    id: str
    """As the bar calls it: "E1", say."""
    what: str
    trials: int = 0
    passed: int = 0
    worst: float | None = None
    """The largest difference, where the check measures one."""
    problems: list[str] = field(default_factory=list)
    note: str | None = None

    def trial(self, problems: Iterable[str] = ()) -> None:
        """Count a trial; it passed if there are no problems."""
        found = list(problems)
        self.trials += 1
        self.passed += not found
        self.problems += found
        if found or self.trials % 10 == 0:
            print(f"{self.id} {self.passed}/{self.trials} {'; '.join(found)[:2000]}", flush=True)


Check = Callable[[Path, argparse.Namespace], list[Row]]
"""Makes its trials in an empty folder."""


def run(checks: Mapping[str, Check], options: argparse.Namespace, name: str) -> int:
    """Run the checks that `options.only` names, or all; see `finish`."""
    began, rows = time.monotonic(), list[Row]()
    for check in (options.only or ",".join(checks)).split(","):
        with tempfile.TemporaryDirectory(prefix=f"{name}-{check}-") as scratch:
            rows += checks[check](Path(scratch), options)
    return finish(options, name, rows, time.monotonic() - began)


def finish(options: argparse.Namespace, check: str, rows: Sequence[Row], seconds: float) -> int:
    """Write the rows to `options.out`; the exit code: 0 if all trials of all rows passed and there were some."""
    for row in rows:
        print(f"{row.id}: {row.passed} of {row.trials} {row.what}")
        row.problems = row.problems[:10]
    if options.out:
        write_result(
            options.out, check, {"seed": options.seed, "seconds": round(seconds), "rows": [asdict(row) for row in rows]}
        )
    return 0 if all(0 < row.trials == row.passed for row in rows if row.note is None or row.trials) else 1


def parser(check: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all checks have."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.faults.{check}", description=(description or "").splitlines()[0]
    )
    found.add_argument("--seed", type=int, default=7)
    found.add_argument("--out", help="write the result as JSON")
    found.add_argument("--only", help="of the checks, these alone, separated by commas")
    return found


def write_result(path: str | Path, check: str, result: Mapping[str, Any]) -> None:
    """Write what a check found, with the command that found it and the machine it ran on."""
    words = [word for word, before in zip(sys.argv[1:], sys.argv, strict=False) if "--out" not in (word, before)]
    command = " ".join(["python -m", f"benchmarks.faults.{check}", *words])
    document = {"check": check, "command": command, "environment": environment(1, "cpu"), **result}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _listed(path: str | Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
