"""Train what a spec says: the entry point under any launcher."""

import logging
import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from scaling.checkpoint.compare import ORDER
from scaling.errors import CommandLine, DoesNotFit, UserError, positive, run_command
from scaling.groups import empty_groups
from scaling.run import Job, Resume, device_name, resolve, run
from scaling.run_folder import RunLock, environment, log_to, open_run_folder, write_exit, write_json
from scaling.spec import load_spec
from scaling.view import as_text, batch_line, groups_table

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from scaling.engine.process import Process
    from scaling.profile.sinks import Sink

logger = logging.getLogger("scaling")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of launch/train.py; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        spec = load_spec(options.spec, options.set)
        job = resolve(spec, _announced_world_size())
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank found the same
            print(error, file=sys.stderr)
        return error.code
    return _train(job, options)


def _train(job: Job, options: Namespace) -> int:
    from scaling.engine.process import process_from_environment

    folder = None if options.dry_run else Path(options.run_dir or f"runs/{job.spec.name}")
    rank, step = 0, None
    with ExitStack() as held:  # the lock on the run folder goes last, after exit.json
        opened = False
        try:
            with process_from_environment() as process:
                rank = process.rank
                _start_logging(process)
                if folder is not None:
                    if lock := _open_run_folder(folder, job, process, options.resume):
                        held.enter_context(closing(lock))
                    opened = True
                _show(job, process)
                step = _run_guarded(job, process, folder, options)
        except UserError as error:
            speaks = rank == 0 or not error.shared
            if speaks:
                print(f"[rank {rank}] {error}" if rank else error, file=sys.stderr)
            if folder is not None and opened and speaks:
                at_fault = rank if error.rank is None else error.rank
                write_exit(folder, code=error.code, reason=str(error), rank=at_fault, step=error.step)
            return error.code
        except Exception as error:  # a bug, of ours or below us: its traceback goes to the terminal and to the log
            logger.exception("the run ended with an error")
            if folder is not None and opened:
                write_exit(folder, code=1, reason=f"{type(error).__name__}: {error}", rank=rank, step=None)
            raise
        if rank == 0:
            if folder is not None:
                write_exit(folder, code=0, reason="done", rank=0, step=step)
            print(f"done: {folder}" if folder else "dry run done: the spec is valid, the model takes a step")
    return 0


def _run_guarded(job: Job, process: "Process", folder: Path | None, options: Namespace) -> int:
    """`run`, with an exhausted memory told as the user's matter."""
    import torch

    from scaling.profile.sinks import JsonLines, TensorBoard, Terminal

    sinks: list[Sink] = []
    if process.is_main and folder is not None:
        sinks = [JsonLines(folder), Terminal()]
        sinks += [TensorBoard(folder)] if job.spec.tracking.tensorboard else []
    resume = Resume(folder, options.resume, tuple(options.allow_change)) if folder else None
    try:
        return run(job, process, sinks, stop_after=options.stop_after if folder else 1, resume=resume)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        plan = job.plan
        raise DoesNotFit(
            f"`batch.micro_batch_size` must be one that fits in memory, but {plan.micro_batch} does not on "
            f"{process.device} ({str(error).splitlines()[0]}); lower it (accumulation makes up for it), set "
            '`activation_checkpointing` to "full", or shard more'
        ) from None


def _announced_world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1  # process_from_environment refuses what is no number


def _parser() -> CommandLine:
    parser = CommandLine(prog="train.py", description="Train what a spec says.")
    parser.add_argument("--spec", required=True, metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field (JSON value); repeatable"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the run folder (default: runs/NAME)")
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
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


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
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _open_run_folder(folder: Path, job: Job, process: "Process", resume: str) -> RunLock | None:
    """Rank 0 makes the folder, or enters it, and returns its lock; where it cannot, every rank raises the same."""

    def enter() -> RunLock:
        lock = open_run_folder(folder, resume=resume, saves=job.spec.checkpoint is not None)
        write_json(folder / "spec.json", job.spec.to_json())
        write_json(folder / "rendered.json", job.rendered)
        write_json(folder / "environment.json", environment(process.world_size, device_name(process)))
        return lock

    lock = process.on_main(enter)
    log_to(folder, process.rank)
    return lock


def _show(job: Job, process: "Process") -> None:
    spec = job.spec
    logger.info(f"{spec.name}: {spec.backend.kind} on {process.world_size} x {device_name(process)}, {spec.precision}")
    logger.info(batch_line(job.plan))
    if spec.lr_scaling.rule != "none":
        logger.info(f"lr_scaling: every LR is multiplied by {job.lr_scale:.6g} ({spec.lr_scaling.rule})")
    for name in empty_groups(spec.param_groups, job.groups):
        logger.info(f"group {name!r} is empty: earlier rules took all that it matches; dropped")
    logger.info(as_text(groups_table(job.groups)).rstrip())


if __name__ == "__main__":
    sys.exit(run_command(main))
