"""Train what a spec says: the entry point under any launcher."""

import logging
import os
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scaling.checkpoint.compare import ORDER
from scaling.errors import CommandLine, DoesNotFit, RankDied, Stopped, UserError, positive, run_command
from scaling.groups import empty_groups
from scaling.imports import add_allow_import
from scaling.redact import redacted
from scaling.run import Job, Resume, device_name, resolve, run
from scaling.run_folder import LogFormatter, RunLock, environment, log_to, open_run_folder, write_exit, write_json
from scaling.spec import load_spec
from scaling.units import format_bytes, format_seconds
from scaling.view import as_text, batch_line, groups_table
from scaling.watch.outcome import Outcome
from scaling.watch.peers import is_lost_peer
from scaling.watch.signals import StopRequest, die_with_parent
from scaling.watch.watch import Watch

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from scaling.engine.process import Process
    from scaling.profile.sinks import Sink

logger = logging.getLogger("scaling")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of launch/train.py; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        spec = load_spec(options.spec, options.set)
        job = resolve(spec, _announced("WORLD_SIZE", 1), options.allow_import)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank found the same
            print(error, file=sys.stderr)
        return error.code
    return _train(job, options)


def _train(job: Job, options: Namespace) -> int:
    from scaling.engine.process import process_from_environment

    folder = None if options.dry_run else Path(options.run_dir or f"runs/{job.spec.name}")
    die_with_parent()
    limits = job.spec.timeouts.model_dump()
    with (
        ExitStack() as held,  # the lock on the run folder goes last, after exit.json
        closing(Watch(_announced("RANK", 0), limits, collective=_collective)) as watch,
        StopRequest(lambda received: _acknowledge(received, watch)) as stop,
    ):
        try:
            with process_from_environment(max(limits.values()) + _WATCHDOG_FIRST_S) as process:
                _start_logging(process)
                predicted = _predicted(job, process) if process.is_main else {}
                if folder is not None:
                    if lock := _open_run_folder(folder, job, process, options.resume, predicted):
                        held.enter_context(closing(lock))
                    watch.open(folder, _name_attempt(process), process.world_size)
                if process.is_main:
                    _show(job, process, predicted)
                try:
                    step = _run_guarded(job, process, folder, options, watch, stop)
                finally:
                    if isinstance(sys.exc_info()[1], Stopped):
                        stop.done()  # what a launcher sends from now on is its way to end the others
        except Stopped as error:
            if watch.rank == 0 and folder is not None:
                write_exit(folder, code=error.code, reason=str(error), rank=0, step=error.step)
                print(f"{error}; run the same command again to go on")
            return error.code
        except UserError as error:
            return _end(error, watch)
        except Exception as error:  # a bug, of ours or below us: its traceback goes to the terminal and to the log
            logger.exception("the run ended with an error")
            with suppress(OSError):  # a full disk has no room for exit.json either
                watch.settle(Outcome(1, redacted(f"{type(error).__name__}: {error}"), watch.rank, None))
            raise
        if watch.rank == 0:
            if folder is not None:
                write_exit(folder, code=0, reason="done", rank=0, step=step)
            print(f"done: {folder}" if folder else "dry run done: the spec is valid, the model takes a step")
    return 0


def _acknowledge(received: signal.Signals, watch: Watch) -> None:
    watch.heartbeat.stopping(received)
    if watch.rank == 0:
        logger.info(f"{received.name}: the run stops after this step and saves; another one ends it at once")


def _end(error: UserError, watch: Watch) -> int:
    """Say why the run ends, once over all ranks; returns the exit code."""
    rank = watch.rank
    if rank and error.shared:
        return error.code
    at_fault = rank if error.rank is None else error.rank
    outcome, first = Outcome(error.code, redacted(str(error)), at_fault, error.step), True
    with suppress(OSError):  # a full disk has no room for exit.json either
        outcome, first = watch.settle(outcome, ask_others=isinstance(error, RankDied))
    if first:
        print(f"[rank {rank}] {error}" if rank else error, file=sys.stderr)
    return outcome.code


_WATCHDOG_FIRST_S = 600.0
"""A collective waits this much longer than a phase may take: the watchdog, which can name the rank, speaks first."""


def _run_guarded(
    job: Job, process: "Process", folder: Path | None, options: Namespace, watch: Watch, stop: StopRequest
) -> int:
    """`run`, with an exhausted memory and the death of another rank told as the user's matter."""
    import torch

    from scaling.profile.sinks import JsonLines, TensorBoard, Terminal

    sinks: list[Sink] = []
    if process.is_main and folder is not None:
        sinks = [JsonLines(folder), Terminal()]
        sinks += [TensorBoard(folder)] if job.spec.tracking.tensorboard else []
    try:
        return run(
            job,
            process,
            sinks,
            stop_after=options.stop_after if folder else 1,
            resume=Resume(folder, options.resume, tuple(options.allow_change)) if folder else None,
            heartbeat=watch.heartbeat,
            stop_requested=lambda: stop.requested,
            time_left=lambda: stop.time_left(job.spec.checkpoint.grace if job.spec.checkpoint else None),
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if is_lost_peer(error):
            raise RankDied(
                f"the ranks must live until the run ends, but rank {process.rank} has lost another one in "
                f"{watch.place}; run the same command again to go on from the newest checkpoint"
            ) from None
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        plan = job.plan
        raise DoesNotFit(
            f"`batch.micro_batch_size` must be one that fits in memory, but {plan.micro_batch} does not on "
            f"{process.device} ({str(error).splitlines()[0]}); lower it (accumulation makes up for it), set "
            '`activation_checkpointing` to "full", or shard more'
        ) from None


def _collective() -> dict[str, Any]:
    """Which collective this rank is in; nothing before torch is there (to import it here might wait for the hang)."""
    module = sys.modules.get("scaling.engine.collectives")
    return module.current_collective() if module else {}


def _name_attempt(process: "Process") -> str:
    """A name for this start of the run, the same on all ranks."""
    return str(process.gather_objects(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}")[0])


def _announced(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else otherwise  # process_from_environment refuses what is no number


def _parser() -> CommandLine:
    parser = CommandLine(prog="train.py", description="Train what a spec says.")
    parser.add_argument("--spec", required=True, metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field (JSON value); repeatable"
    )
    parser.add_argument("--run-dir", type=_folder, metavar="DIR", help="the run folder (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the run folder's newest whole checkpoint"
        " if it has one (auto, the default), from nothing (never), or from the checkpoint or run folder PATH",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        choices=sorted(ORDER),
        help=f"resume although FIELD ({', '.join(ORDER)}) is not as in the checkpoint; repeatable",
    )
    parser.add_argument("--stop-after", type=positive, metavar="STEP", help="save after this step and end")
    parser.add_argument("--dry-run", action="store_true", help="validate, build, take one step, write nothing")
    add_allow_import(parser)
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def _folder(text: str) -> str:
    if not text:  # an unset variable of a script, say
        raise ArgumentTypeError("must be a folder, but is empty")
    return text


class _Stdout(logging.StreamHandler[TextIO]):
    """Writes to what sys.stdout is at the time: while a progress bar is shown, rich puts itself there."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def _start_logging(process: "Process") -> None:
    logger.setLevel(logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    if process.is_main:
        handler = _Stdout()
        handler.setFormatter(LogFormatter("%(message)s"))
        logger.addHandler(handler)


def _open_run_folder(
    folder: Path, job: Job, process: "Process", resume: str, predicted: dict[str, Any]
) -> RunLock | None:
    """Rank 0 makes the folder, or enters it, and returns its lock; where it cannot, every rank raises the same."""

    def enter() -> RunLock:
        lock = open_run_folder(folder, resume=resume, saves=job.spec.checkpoint is not None)
        write_json(folder / "spec.json", job.spec.to_json())
        write_json(folder / "rendered.json", job.rendered)
        write_json(folder / "environment.json", environment(process.world_size, device_name(process)))
        write_json(folder / "plan.json", predicted)
        return lock

    lock = process.on_main(enter)
    log_to(folder, process.rank)
    return lock


def _predicted(job: Job, process: "Process") -> dict[str, Any]:
    from scaling.estimate.report import run_report

    per_node = _announced("LOCAL_WORLD_SIZE", process.world_size)
    return run_report(job.spec, job.plan, job.groups, job.rendered, device_name(process), per_node)


def _show(job: Job, process: "Process", predicted: dict[str, Any]) -> None:
    spec = job.spec
    logger.info(f"{spec.name}: {spec.backend.kind} on {process.world_size} x {device_name(process)}, {spec.precision}")
    logger.info(batch_line(job.plan))
    if spec.lr_scaling.rule != "none":
        logger.info(f"lr_scaling: every LR is multiplied by {job.lr_scale:.6g} ({spec.lr_scaling.rule})")
    for name in empty_groups(spec.param_groups, job.groups):
        logger.info(f"group {name!r} is empty: earlier rules took all that it matches; dropped")
    logger.info(as_text(groups_table(job.groups)).rstrip())
    memory, duration = predicted["memory"], predicted["time"]
    peak = (
        f"predicted: {format_bytes(memory['peak_allocated_bytes'])} of tensors at the peak, in {memory['peak_phase']}"
    )
    logger.info(peak + (f"; {format_seconds(duration['step_seconds'])} a step" if duration else ""))


if __name__ == "__main__":
    sys.exit(run_command(main))
