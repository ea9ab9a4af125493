"""Train what a spec says: the entry point under any launcher, and `run` for those who call it from Python."""

import logging
import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scaling.batch import resolve_batch
from scaling.errors import CommandLine, DoesNotFit, NonFinite, StorageError, UserError, run_command
from scaling.estimate.flops import train_flops_per_token
from scaling.groups import Group, empty_groups, resolve_groups
from scaling.hardware import gpu_from_device_name
from scaling.inventory import parameters
from scaling.records import BatchPlan
from scaling.render import render
from scaling.run_folder import create_run_folder, environment, log_to, write_exit, write_json
from scaling.schedule import check_schedule, lr_scale
from scaling.spec import Spec, load_spec
from scaling.view import as_text, batch_line, groups_table

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from scaling.engine.process import Process
    from scaling.profile.sinks import Sink

logger = logging.getLogger("scaling")


@dataclass(frozen=True)
class Job:
    """A spec resolved for a number of ranks."""

    spec: Spec
    plan: BatchPlan
    rendered: dict[str, Any]
    """The very dict that the engine gets."""
    groups: tuple[Group, ...]
    lr_scale: float


def resolve(spec: Spec, world_size: int) -> Job:
    """Everything that follows from a spec and a number of ranks alone. Raises UserError; needs no torch."""
    plan = resolve_batch(spec, world_size)
    scale = lr_scale(spec.lr_scaling, world_size=world_size, global_batch=plan.global_batch)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model), lr_scale=scale)
    return Job(spec, plan, render(spec, world_size), groups, scale)


def run(job: Job, process: "Process", sinks: "Sequence[Sink]" = (), *, stop_after: int | None = None) -> int:
    """Train `job` in this process group, on every rank alike, for `stop_after` steps of its schedule (default: all).

    Returns the number of steps done. Raises UserError and its kin, and torch's OutOfMemoryError.
    """
    import torch

    from scaling.data.build import build_datasets
    from scaling.data.loader import step_batches, validation_batches
    from scaling.engine.build import build_engine
    from scaling.loop import measure_validation, train
    from scaling.models.decoder import decoder_recipe
    from scaling.objectives import build_objective
    from scaling.profile.recorder import Recorder

    spec, plan = job.spec, job.plan
    dataset, held_out = build_datasets(spec)
    max_steps = _number_of_steps(spec, plan, len(dataset))
    last_step = min(stop_after or max_steps, max_steps)
    recipe = decoder_recipe(spec.model, spec.objective, spec.seed)
    engine = build_engine(spec, job.rendered, recipe, job.groups, process)
    # Dropout differs between ranks, and is the same in every run of the same size.
    torch.manual_seed(spec.seed + process.rank)
    objective = build_objective(spec.objective)
    batches = step_batches(
        dataset,
        seed=spec.seed,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=process.rank,
        world_size=process.world_size,
        first_step=0,
        last_step=last_step,
        device=process.device,
    )
    recorder = Recorder(
        sinks,
        plan,
        process.device,
        interval=spec.profile.interval,
        last_step=last_step,
        flops_per_token=_flops_per_token(job),
        peak_flops=_peak_flops(spec, process),
    )

    def validate(step: int):
        assert spec.validation is not None and held_out is not None
        share = validation_batches(
            held_out,
            samples=spec.validation.batches * plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=process.rank,
            world_size=process.world_size,
        )
        return measure_validation(
            engine, objective, share, process, step=step, bytes_per_token=held_out.bytes_per_token
        )

    with closing(recorder), closing(engine), closing(batches):  # pyright: ignore[reportArgumentType]
        train(
            engine,
            objective,
            batches,
            process,
            recorder,
            schedule=spec.schedule,
            max_steps=max_steps,
            stop_after=last_step,
            validation_interval=spec.validation.interval if spec.validation else None,
            validate=validate if spec.validation else None,
        )
    return last_step


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
    opened, rank, step = False, 0, None
    try:
        with process_from_environment() as process:
            rank = process.rank
            _start_logging(process)
            if folder is not None:
                _open_run_folder(folder, job, process)
                opened = True
            _show(job, process)
            step = _run_guarded(job, process, folder)
    except UserError as error:
        # Every rank raises a non-finite step alike; other errors may be this rank's alone.
        if rank == 0 or not isinstance(error, NonFinite):
            print(f"[rank {rank}] {error}" if rank else error, file=sys.stderr)
        if folder is not None and opened and (rank == 0 or not isinstance(error, NonFinite)):
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
        print(f"done: {folder}" if folder else "dry run done: the spec is valid, the model is built and takes a step")
    return 0


def _run_guarded(job: Job, process: "Process", folder: Path | None) -> int:
    """`run`, with an exhausted memory told as the user's matter."""
    import torch

    from scaling.profile.sinks import JsonLines, TensorBoard, Terminal

    sinks: list[Sink] = []
    if process.is_main and folder is not None:
        sinks = [JsonLines(folder), Terminal()]
        sinks += [TensorBoard(folder)] if job.spec.tracking.tensorboard else []
    try:
        return run(job, process, sinks, stop_after=None if folder else 1)
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


def _open_run_folder(folder: Path, job: Job, process: "Process") -> None:
    """Rank 0 makes the folder; where it cannot, every rank raises the same."""
    problem: str | None = None
    if process.is_main:
        try:
            create_run_folder(folder)
            write_json(folder / "spec.json", job.spec.to_json())
            write_json(folder / "rendered.json", job.rendered)
            write_json(folder / "environment.json", environment(process.world_size, _device_name(process)))
        except StorageError as error:
            problem = str(error)
    problem = process.gather_objects(problem)[0]  # pyright: ignore[reportAssignmentType]
    if problem is not None:
        raise StorageError(problem)
    log_to(folder, process.rank)


def _show(job: Job, process: "Process") -> None:
    spec = job.spec
    logger.info(f"{spec.name}: {spec.backend.kind} on {process.world_size} x {_device_name(process)}, {spec.precision}")
    logger.info(batch_line(job.plan))
    if spec.lr_scaling.rule != "none":
        logger.info(f"lr_scaling: every LR is multiplied by {job.lr_scale:.6g} ({spec.lr_scaling.rule})")
    for name in empty_groups(spec.param_groups, job.groups):
        logger.info(f"group {name!r} is empty: earlier rules took all that it matches; dropped")
    logger.info(as_text(groups_table(job.groups)).rstrip())


def _number_of_steps(spec: Spec, plan: BatchPlan, samples: int) -> int:
    if spec.max_steps is not None:
        return spec.max_steps
    assert spec.epochs is not None
    steps = int(spec.epochs * samples / plan.global_batch)
    if steps < 1:
        raise UserError(
            f"`epochs` must give at least one step of {plan.global_batch} samples, but {spec.epochs:g} epochs of "
            f"{samples} give none; train longer or lower `batch.global_batch_size`"
        )
    check_schedule(spec.schedule, steps)
    return steps


def _flops_per_token(job: Job) -> float:
    frozen = {name for group in job.groups if group.frozen for name in group.names}
    return train_flops_per_token(job.spec.model, job.plan.sequence_length, frozen)


def _peak_flops(spec: Spec, process: "Process") -> float | None:
    """Dense peak of this card in the spec's precision; None where it is not known."""
    gpu = gpu_from_device_name(_device_name(process)) if process.device.type == "cuda" else None
    return None if gpu is None else gpu.peak_flops(spec.precision)


def _device_name(process: "Process") -> str:
    import torch

    return torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(run_command(main))
