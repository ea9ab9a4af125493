"""End a rank at every single moment of a save: before, within and after each change to the folder of checkpoints.

    python -m benchmarks.faults.crash_points --out FILE

The moments are enumerated by a run that nothing ends (see `hooks`). Savers alone, without training, go through all of
them on every rank; the real command through those of one rank, the many writes of each file thinned out, and through a
sample on two ranks.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults import hooks, runs
from benchmarks.faults.runs import Row
from scaling.run_folder import CHECKPOINTS

SAVES, RANKS, ELEMENTS = 3, 2, 64
SETTINGS = ("max_steps=6", "checkpoint.interval=2", "checkpoint.keep_last=1", 'validation={"interval":2,"batches":1}')
_PATIENCE_S = 60.0


def savers(work: Path, options: argparse.Namespace) -> list[Row]:
    """Two processes that save a small state three times, keep one checkpoint and point to the best."""
    row = Row(
        "R3", "moments of three saves on 2 ranks, savers alone: a whole checkpoint is left, the next start ends well"
    )
    work = work / CHECKPOINTS  # the hooks watch what goes on below a folder of this name
    work.mkdir()
    problems = _both(work / "all", {"FAULT_POINTS": str(work / "points")}) + _state_problems(work / "all", SAVES)
    assert not problems, problems
    cases = [(rank, n) for rank in range(RANKS) for n in range(len(_points(work / "points", rank)))]
    row.note = (
        f"{', '.join(str(len(_points(work / 'points', rank))) for rank in range(RANKS))} moments on ranks 0 and 1"
    )
    for rank, number in random.Random(options.seed).sample(cases, min(len(cases), options.most)):
        folder = work / f"{rank}-{number}"
        name = _points(work / "points", rank)[number]
        found = _both(folder, {"FAULT_CRASH": f"{rank}:{number}"}, crash=rank)
        found += _state_problems(folder, None)
        found += _both(folder, {}) + _state_problems(folder, SAVES)
        found += [f"{left} was left behind" for left in os.listdir(folder) if left.startswith(".")]
        row.trial(f"rank {rank}, moment {number}, {name}: {problem}" for problem in found)
    return [row]


def command(work: Path, options: argparse.Namespace) -> list[Row]:
    """The real command, ended at a moment and started again."""
    one = Row("R3 command", "moments of a training run of one rank: the same command again ends as if nothing had been")
    two = Row("R3 two", "moments, a sample over both ranks of a training run, likewise")
    for row, ranks, most in ((one, 1, options.trainings), (two, 2, options.trainings // 4)):
        plain, log = work / f"plain-{ranks}", work / f"points-{ranks}"
        code, output = _train(plain, ranks, {"FAULT_POINTS": str(log)})
        assert code == 0, output
        reference, final = runs.curve(plain), runs.digests(runs.checkpoints(plain).path(6))
        cases = [(rank, n) for rank in range(ranks) for n in _thinned(_points(log, rank))]
        row.note = f"of {len(cases)} after thinning out the writes"
        for rank, number in sorted(random.Random(options.seed).sample(cases, min(len(cases), most))):
            folder = work / f"{ranks}-{rank}-{number}"
            found = _crash_and_go_on(folder, ranks, rank, number)
            found = found or runs.curve_problems(runs.read_lines(folder), reference)
            found += [f"{name} was left behind" for name in runs.unfinished(folder)]
            if not found:
                last = runs.digests(runs.checkpoints(folder).path(6))
                found = [f"{name} differs at the end" for name in runs.differing(last, final)]
            row.trial(f"rank {rank}, {_points(log, rank)[number]}: {problem}" for problem in found)
    return [one, two]


def _crash_and_go_on(folder: Path, ranks: int, rank: int, number: int) -> list[str]:
    code, output = _train(folder, ranks, {"FAULT_CRASH": f"{rank}:{number}"})
    problems = [f"the crash did not come: {output[-500:]}"] if code == 0 else []
    before, damaged = runs.newest(folder)
    log_from = len(runs.log(folder))
    code, output = _train(folder, ranks, {})
    if code:
        problems.append(f"exit code {code}: {output[-1500:]}")
    if (found := runs.resumed_step(runs.log(folder)[log_from:])) != before:
        problems.append(f"the newest was {before}, but it went on from {found}")
    return problems + damaged


CHECKS = {"savers": savers, "command": command}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runs.parser("crash_points", __doc__)
    parser.add_argument("--most", type=int, default=100_000, help="moments tried with savers alone")
    parser.add_argument("--trainings", type=int, default=100_000, help="moments tried with the real command")
    return runs.run(CHECKS, parser.parse_args(arguments), "crash_points")


def _train(folder: Path, ranks: int, variables: dict[str, str]) -> tuple[int, str]:
    arguments = runs.training("single" if ranks == 1 else "fsdp", ranks, folder, SETTINGS, script=runs.FAULTY)
    return runs.train(arguments, folder.with_suffix(".out"), variables)


def _points(log: Path, rank: int) -> list[str]:
    return log.with_name(f"{log.name}.{rank}").read_text().splitlines()


def _thinned(points: Sequence[str]) -> list[int]:
    """Numbers of the moments, of each row of writes to one file only the first three and the last three."""
    found: list[int] = []
    for number, name in enumerate(points):
        within = "write" in name and all(
            0 <= near < len(points) and points[near].split()[-1] == name.split()[-1] and "write" in points[near]
            for near in (number - 3, number + 3)
        )
        if not within:
            found.append(number)
    return found


# ---------------------------------------------------------------- savers alone


def _both(folder: Path, variables: dict[str, str], crash: int | None = None) -> list[str]:
    """Two processes that save; what was wrong with how they ended."""
    import scaling.checkpoint.saver  # noqa: F401 - forked below: imported once, and no tensor was made yet

    meeting = folder.with_name(f"{folder.name}-{time.monotonic_ns()}")
    children = [_forked(rank, folder, meeting, variables) for rank in range(RANKS)]
    problems: list[str] = []
    until = time.monotonic() + _PATIENCE_S
    for rank, pid in enumerate(children):
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
            time.sleep(0.002)
        if ended[0] == 0:
            runs.end(pid)
            os.waitpid(pid, 0)
            problems.append(f"rank {rank} did not end within {_PATIENCE_S:.0f} s")
            continue
        code = os.waitstatus_to_exitcode(ended[1])
        wanted = {0} if crash is None else {hooks.CRASH} if crash == rank else {0, 1, 3}
        if code not in wanted:
            problems.append(f"rank {rank} ended with {code}")
    meeting.unlink(missing_ok=True)
    return problems


def _forked(rank: int, folder: Path, meeting: Path, variables: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update({**variables, "RANK": str(rank)})
        with open(folder.with_name(f"{folder.name}.err{rank}"), "w") as errors:
            os.dup2(errors.fileno(), 2)
            hooks.install()
            code = _save_all(rank, folder, meeting)
    except BaseException as error:  # whatever it is: the parent reads the code
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _save_all(rank: int, folder: Path, meeting: Path) -> int:
    """Save what is not saved yet, as a run does that goes on; 3 where a save fails."""
    import datetime

    import torch
    import torch.distributed as dist

    from scaling.checkpoint.resume import newest_whole
    from scaling.checkpoint.saver import Saver
    from scaling.checkpoint.store import BEST, Store
    from scaling.engine.process import Process
    from scaling.engine.protocol import FlatShard

    torch.set_num_threads(1)
    where = dist.FileStore(str(meeting), RANKS)
    dist.init_process_group("gloo", store=where, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=30))
    process, store = Process(rank, RANKS, rank, RANKS, torch.device("cpu")), Store(folder)
    process.on_main(store.clean)
    path = newest_whole(store, process)
    done = 0 if path is None else int(path.name[5:])
    saver = Saver(store, process, asynchronous=True)

    def after(step: int) -> None:
        if step != 2:
            store.point(BEST, step)
        store.retire(1, [])

    for step in range(done + 1, SAVES + 1):
        shards = [FlatShard(name, "master", ELEMENTS, 0, _values(step), RANKS, rank) for name in ("a", "b")]
        saver.save(step, shards, {"state.json": _document(step)}, lambda step=step: after(step))
        outcome = saver.wait()
        if outcome is None or outcome.problem:
            print(outcome, file=sys.stderr, flush=True)
            return 3
    where.set(f"done {rank}", "")
    where.wait([f"done {peer}" for peer in range(RANKS)])  # who leaves first would break the other's last collective
    return 0


def _values(step: int):
    import torch

    return torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * step


def _document(step: int) -> str:
    return f'{{"step": {step}}}\n'


def _state_problems(folder: Path, newest: int | None) -> list[str]:
    """Every folder with a final name must be whole and hold its own step; the newest must be `newest`, if given."""
    from scaling.checkpoint.format import _chunks_of, _read_index
    from scaling.checkpoint.store import BEST, LATEST, Store, problems_of

    store, problems = Store(folder), []
    for step in store.steps():
        path = store.path(step)
        problems += problems_of(path)
        if (path / "state.json").read_text() != _document(step):
            problems.append(f"{path.name} holds another step")
        index = _read_index(path)
        for key, entry in index.state_dict_metadata.items():
            if _chunks_of(path, key, entry, index.storage_data)[0] != ELEMENTS:
                problems.append(f"{path.name}: {key} is not whole")
    for name in (LATEST, BEST):
        if (step := store.pointed(name)) is not None and step not in store.steps():
            problems.append(f"{name} names step {step}, which is not there")
    if newest is not None and store.steps()[-1:] != [newest]:
        problems.append(f"the steps are {store.steps()}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
