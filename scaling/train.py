"""Train what a spec says: the entry point under any launcher."""

import gc
import json
import logging
import os
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scaling.batch import is_open
from scaling.checkpoint.compare import ORDER
from scaling.errors import (
    CommandLine,
    DoesNotFit,
    NonFinite,
    RankDied,
    Stopped,
    StorageError,
    UserError,
    positive,
    run_program,
)
from scaling.groups import empty_groups
from scaling.imports import GIVEN, add_allow_import, give
from scaling.inventory import inventory_of, sequences
from scaling.profile.sinks import check_tracking
from scaling.redact import redacted
from scaling.run import Job, Resume, device_name, resolve
from scaling.run import run as run_job
from scaling.run_folder import OOM, LogFormatter, RunLock, environment, log_to, open_run_folder, write_exit, write_json
from scaling.schedule import at_length, growth
from scaling.spec import Spec, load_spec, parse_spec, read_document
from scaling.spec.document import assign, document_of
from scaling.spec.sections import Recorded, curriculum_of
from scaling.units import format_bytes, format_seconds
from scaling.view import as_text, batch_line, groups_table
from scaling.watch.exhausted import Exhausted, is_exhausted, message_of
from scaling.watch.outcome import Outcome
from scaling.watch.peers import is_lost_peer
from scaling.watch.signals import StopRequest, die_with_parent
from scaling.watch.watch import Watch

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from torch import Tensor, nn

    from scaling.engine.process import Process
    from scaling.profile.sinks import Sink

logger = logging.getLogger("scaling")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of launch/train.py; returns the exit code."""
    return _launch(arguments, lambda options: load_spec(options.spec, options.set))


def run(
    spec: str | Path | Mapping[str, Any],
    *,
    model: "Callable[[], nn.Module] | None" = None,
    dataset: Any = None,
    validation: Any = None,
    loss: "Callable[[nn.Module, Any], Tensor] | None" = None,
    arguments: Sequence[str] = (),
) -> int:
    """Train a module, a data set and a loss of your own: what launch/train.py does, called by a program of yours.

    The program runs under any launcher, on every rank alike. `spec` (a path, a recipe's name or a dict) says the rest;
    what is given here takes the place of its sections.

    model: a class or function that returns the module; each backend calls it in its own place, ZeRO-3 more than once.
    dataset, validation: with `__len__` and `__getitem__`, as torch.utils.data.Dataset; items are collated as torch's
        DataLoader does it. Items {"inputs", "targets"} of token ids are text, for which `loss` may be left out.
    loss: of (module, collated items) the loss of each sample, [micro_batch], not averaged; of text the sum over the
        target tokens. What divides it, over all ranks and micro-batches, is the loop's matter.
    arguments: options of launch/train.py: "--run-dir", "runs/mine".

    Returns the exit code, for `sys.exit`. A user's mistakes are told on standard error.
    """
    given = {"model": model, "data": dataset, "objective": loss}

    def load(options: Namespace) -> Spec:
        if hasattr(model, "named_parameters") and not isinstance(model, type):
            raise UserError(
                "`model` must be a class or function that returns the module, but is a module; pass what makes it"
            )
        named = isinstance(spec, str | Path)
        document = read_document(str(spec)) if named else document_of("spec", json.dumps(spec))
        for section in (name for name, part in given.items() if part is not None):
            assign(document, f'{section}={{"kind":"factory","target":"{GIVEN}:{section}"}}')
        for assignment in options.set:
            assign(document, assignment)
        return parse_spec(document)

    give(
        model=model,
        data=lambda: dataset if validation is None else (dataset, validation),
        objective=lambda: loss,
    )
    return _launch(["--spec", str(GIVEN), "--allow-import", GIVEN, *arguments], load)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Without the garbage collector, until training begins (scaling/run.py): it would look through what torch's import
    makes again and again, for some tenths of a second, and find nothing."""
    works = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if works:
            gc.enable()


def _launch(arguments: Sequence[str] | None, load: Callable[[Namespace], Spec]) -> int:
    with _collector_at_rest():
        return _start(arguments, load)


def _start(arguments: Sequence[str] | None, load: Callable[[Namespace], Spec]) -> int:
    try:
        options = _parser().parse_args(arguments)
        spec, world_size = load(options), _announced("WORLD_SIZE", 1)
        if isinstance(spec.model, Recorded) and spec.model.inventory is None:
            from scaling.models.recorded import look_at

            look_at(spec.model, options.allow_import)
        if options.dry_run and curriculum_of(spec.data) is not None:  # its one step is of the longest
            spec = at_length(spec, spec.data.sequence_length)
        job = resolve(_with_numbers(spec, world_size), world_size, options.allow_import)
        check_tracking(spec)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank found the same
            print(error, file=sys.stderr)
        return error.code
    return _train(job, options, spec)


def _with_numbers(spec: Spec, world_size: int) -> Spec:
    """`spec`, with the smallest micro-batch where its size is still to be found."""
    if not is_open(spec.batch):
        return spec
    from scaling.fit import smallest  # with all of the planner, which few runs need

    return smallest(spec, world_size)


def _train(job: Job, options: Namespace, spec: Spec) -> int:
    """`spec`: as it was given. Where its batch is open the job has the smallest micro-batch so far."""
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
                _start_logging(process, options.log_level)
                predicted = _predicted(job, process) if process.is_main else {}
                if folder is not None:
                    if lock := _open_run_folder(folder, job, process, options.resume, predicted):
                        held.enter_context(closing(lock))
                    watch.open(folder, _name_attempt(process), process.world_size)
                if is_open(spec.batch):
                    job, predicted = _fitted(spec, job, process, folder, options, watch)
                if process.is_main:
                    _show(job, process, predicted)
                try:
                    step = _run_guarded(job, process, folder, predicted, options, watch, stop)
                finally:
                    if isinstance(sys.exc_info()[1], Stopped):
                        stop.done()  # what a launcher sends from now on is its way to end the others
        except Stopped as error:
            if watch.rank == 0 and folder is not None:
                write_exit(folder, code=error.code, reason=str(error), rank=0, step=error.step)
                print(f"{error}; run the same command again to go on")
            return error.code
        except _Ended as ended:
            return ended.code
        except UserError as error:
            code = _end(error, watch)
            if isinstance(error, NonFinite) and watch.rank == 0 and folder is not None:
                _advise(folder)
            return code
        except Exception as error:  # a bug, of ours or below us: its traceback goes to the terminal and to the log
            if is_exhausted(error):  # before there was a model: whoever holds the memory, it is not this run
                return _end(_no_room(error), watch)
            logger.exception("the run ended with an error")
            with suppress(OSError):  # a full disk has no room for exit.json either
                watch.settle(Outcome(1, redacted(f"{type(error).__name__}: {error}"), watch.rank, None))
            raise
        if watch.rank == 0:
            if folder is not None:
                write_exit(folder, code=0, reason="done", rank=0, step=step)
                _advise(folder)
            print(f"done: {folder}" if folder else "dry run done: the spec is valid, the model takes a step")
    return 0


def _advise(folder: Path) -> None:
    """Say what the doctor finds wrong with the run that ends."""
    from scaling.doctor import at_end

    for line in at_end(folder):
        logger.info(line)


def _acknowledge(received: signal.Signals, watch: Watch) -> None:
    watch.heartbeat.stopping(received)
    if watch.rank == 0:
        logger.info(f"{received.name}: the run stops after this step and saves; another one ends it at once")


def _end(error: UserError, watch: Watch) -> int:
    """Say why the run ends, once over all ranks; returns the exit code."""
    return _settle(error, watch)[0]


def _settle(error: UserError, watch: Watch) -> tuple[int, bool]:
    """As `_end`; and whether it is this error that the run ends with, as far as this rank tells it."""
    rank = watch.rank
    if rank and error.shared:
        return error.code, False
    at_fault = rank if error.rank is None else error.rank
    outcome, first = Outcome(error.code, redacted(str(error)), at_fault, error.step), True
    with suppress(OSError):  # a full disk has no room for exit.json either
        outcome, first = watch.settle(outcome, ask_others=isinstance(error, RankDied))
    if first:
        print(f"[rank {rank}] {error}" if rank else error, file=sys.stderr)
    return outcome.code, first


_WATCHDOG_FIRST_S = 600.0
"""A collective waits this much longer than a phase may take: the watchdog, which can name the rank, speaks first."""


def _run_guarded(
    job: Job,
    process: "Process",
    folder: Path | None,
    predicted: dict[str, Any],
    options: Namespace,
    watch: Watch,
    stop: StopRequest,
) -> int:
    """`run_job`, with an exhausted memory and the death of another rank told as the user's matter."""
    from scaling.profile.sinks import build_sinks

    sinks: list[Sink] = []
    if process.is_main and folder is not None:
        sinks = build_sinks(job.spec, folder, predicted, plain=options.plain)
    with _telling_of_memory(lambda: job, process, folder, watch):
        return run_job(
            job,
            process,
            sinks,
            stop_after=options.stop_after if folder else 1,
            resume=Resume(folder, options.resume, tuple(options.allow_change)) if folder else None,
            heartbeat=watch.heartbeat,
            stop_requested=lambda: stop.requested,
            time_left=lambda: stop.time_left(job.spec.checkpoint.grace if job.spec.checkpoint else None),
        )


def _fitted(
    spec: Spec, job: Job, process: "Process", folder: Path | None, options: Namespace, watch: Watch
) -> tuple[Job, dict[str, Any]]:
    """The job with the sizes that a step has confirmed, and its estimate on rank 0; the run folder says the same."""
    from scaling.fit import fit

    tried, predicted = [job], {}

    def write() -> None:
        nonlocal predicted
        predicted = _predicted(tried[-1], process)
        if folder is not None:
            _write_job(folder, tried[-1], predicted)

    def begin(next_job: Job) -> None:
        tried.append(next_job)
        process.on_main(write)

    with _telling_of_memory(lambda: tried[-1], process, folder, watch):
        return fit(spec, process, begin, options.allow_import), predicted


class _Ended(Exception):
    """How the run ends is told already."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextmanager
def _telling_of_memory(job: Callable[[], Job], process: "Process", folder: Path | None, watch: Watch) -> Iterator[None]:
    """Where memory runs out inside, write the post-mortem and say so; a lost peer becomes RankDied."""
    from scaling.profile.stock import take_stock

    try:
        yield
        return
    except (Exhausted, RuntimeError, MemoryError, OSError) as error:
        if is_lost_peer(error):
            raise RankDied(
                f"the ranks must live until the run ends, but rank {process.rank} has lost another one in "
                f"{watch.place}; run the same command again to go on from the newest checkpoint"
            ) from None
        if not isinstance(error, Exhausted) and not is_exhausted(error):
            raise
        exhausted = error if isinstance(error, Exhausted) else take_stock(error, "build", process.device)
    # At once, before this rank leaves the process group: others that lose it then find the reason.
    raise _Ended(_tell_of_memory(job(), process, folder, watch, exhausted))


def _no_room(error: Exception) -> DoesNotFit:
    return DoesNotFit(
        f"memory must be free for the run to start, but there was too little ({message_of(error)}); "
        "look at what else runs on this machine"
    )


def _tell_of_memory(job: Job, process: "Process", folder: Path | None, watch: Watch, exhausted: Exhausted) -> int:
    """Write the post-mortem, if no other rank has ended the run before; returns the exit code."""
    from scaling.postmortem import Case, facts, message, place_of, post_mortem

    beat, per_node = watch.beat, _announced("LOCAL_WORLD_SIZE", process.world_size)
    place, step = place_of(beat.phase, exhausted.stage), beat.step or None
    watch.heartbeat.beat("closing")  # this rank is on its way out, and takes the time that it needs
    rank = process.rank if exhausted.rank is None else exhausted.rank
    name, device = device_name(process), str(process.device)
    case = Case(job.spec, job.plan, job.groups, job.rendered, name, per_node, place, step, rank, device, exhausted)
    found = facts(case)
    with suppress(Exception):  # whatever fails in finding out more, what is known is told
        found = post_mortem(case)
    error = DoesNotFit(message(case, found))
    error.step, error.rank, error.shared = step, rank, exhausted.rank is not None
    code, first = _settle(error, watch)
    if first and folder is not None:
        with suppress(StorageError):
            write_json(folder / OOM, found)
    return code


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
    parser.add_argument("--plain", action="store_true", help="lines in place of the live view, on a terminal too")
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("info", "warning", "error"),
        help="the least of what is told on the terminal and in train.log (default: info); the record stays whole",
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


def _start_logging(process: "Process", level: str) -> None:
    logger.setLevel(level.upper())
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
        _write_job(folder, job, predicted)
        write_json(folder / "environment.json", environment(process.world_size, device_name(process)))
        return lock

    lock = process.on_main(enter)
    log_to(folder, process.rank)
    return lock


def _write_job(folder: Path, job: Job, predicted: dict[str, Any]) -> None:
    write_json(folder / "spec.json", job.spec.to_json())
    write_json(folder / "rendered.json", job.rendered)
    write_json(folder / "plan.json", predicted)


def _predicted(job: Job, process: "Process") -> dict[str, Any]:
    """plan.json; empty where nothing is known of what a step does."""
    model = job.spec.model
    if isinstance(model, Recorded) and inventory_of(model).ledger is None:
        return {}
    from scaling.estimate.report import run_report

    per_node = _announced("LOCAL_WORLD_SIZE", process.world_size)
    return run_report(job.spec, job.plan, job.groups, job.rendered, device_name(process), per_node)


def _show(job: Job, process: "Process", predicted: dict[str, Any]) -> None:
    spec = job.spec
    logger.info(f"{spec.name}: {spec.backend.kind} on {process.world_size} x {device_name(process)}, {spec.precision}")
    logger.info(batch_line(job.plan, sequences(job.spec)))
    if len(stages := growth(spec.data)) > 1:
        told = ", ".join(f"{length:,} tokens from step {first + 1:,}" for first, length in stages)
        logger.info(f"sequences grow: {told}; each sample is cut into as many, its tokens stay")
    if spec.lr_scaling.rule != "none":
        logger.info(f"lr_scaling: every LR is multiplied by {job.lr_scale:.6g} ({spec.lr_scaling.rule})")
    for name in empty_groups(spec.param_groups, job.groups):
        logger.info(f"group {name!r} is empty: earlier rules took all that it matches; dropped")
    logger.info(as_text(groups_table(job.groups)).rstrip())
    if not predicted:
        return
    memory, duration = predicted["memory"], predicted["time"]
    peak = (
        f"predicted: {format_bytes(memory['peak_allocated_bytes'])} of tensors at the peak, in {memory['peak_phase']}"
    )
    logger.info(peak + (f"; {format_seconds(duration['step_seconds'])} a step" if duration else ""))


if __name__ == "__main__":
    run_program(main)
