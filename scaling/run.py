"""From a spec to a finished training run: `resolve` for all that needs no torch, `run` for the rest."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.batch import resolve_batch
from scaling.errors import CheckpointError, UserError
from scaling.estimate.flops import train_flops_per_token
from scaling.groups import Group, resolve_groups
from scaling.hardware import gpu_from_device_name
from scaling.imports import check_allowed
from scaling.inventory import parameters
from scaling.records import BatchPlan, Progress, ValidationRecord
from scaling.redact import redacted_json
from scaling.render import render
from scaling.run_folder import CHECKPOINTS, METRICS, count_start, versions
from scaling.schedule import check_schedule, lr_scale
from scaling.spec import Spec
from scaling.spec.sections import Factory, FactoryModel, Recorded
from scaling.watch.heartbeat import Heartbeat

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from scaling.checkpoint.keeper import Checkpoints, NoCheckpoints
    from scaling.checkpoint.weights import WeightSource
    from scaling.data.dataset import Dataset
    from scaling.engine.process import Process
    from scaling.engine.protocol import Engine
    from scaling.objectives import Objective
    from scaling.profile.recorder import Recorder
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
    allow_import: tuple[str, ...] = ()
    """Packages that the spec may take code from."""


@dataclass(frozen=True)
class Resume:
    """Where the checkpoints of a run are, and which of them it goes on from."""

    folder: Path
    """The run folder."""
    choice: str = "auto"
    """"auto": the newest whole one, if there is any; "never"; or the path of one."""
    allow_change: tuple[str, ...] = ()
    """Fields that may differ from the checkpoint although the data then come in another order."""


def resolve(spec: Spec, world_size: int, allow_import: Sequence[str] = ()) -> Job:
    """Everything that follows from a spec and a number of ranks alone. Raises UserError; needs no torch."""
    for section, part in (("model", spec.model), ("objective", spec.objective)):
        if isinstance(part, FactoryModel | Factory):
            check_allowed(part.target, allow_import, f"{section}.target")
    plan = resolve_batch(spec, world_size)
    scale = lr_scale(spec.lr_scaling, world_size=world_size, global_batch=plan.global_batch)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora), lr_scale=scale)
    return Job(spec, plan, render(spec, world_size), groups, scale, tuple(allow_import))


def run(
    job: Job,
    process: "Process",
    sinks: "Sequence[Sink]" = (),
    *,
    stop_after: int | None = None,
    resume: Resume | None = None,
    heartbeat: Heartbeat | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    time_left: Callable[[], float | None] = lambda: None,
) -> int:
    """Train `job` in this process group, on every rank alike, up to step `stop_after` of its schedule (default: all).

    Returns the number of steps done. Without `resume` nothing is read or saved; `heartbeat` hears where in the run it
    is. Raises UserError and its kin, and torch's OutOfMemoryError.
    """
    spec = job.spec
    if isinstance(spec.model, Recorded):
        raise UserError(
            f'`model.kind` must be "decoder" or "vla" to be trained, but is "{spec.model.kind}", which can be planned '
            "and rehearsed so far; write it as a decoder"
        )
    from scaling.data.build import build_datasets
    from scaling.engine.build import build_engine
    from scaling.models.build import model_recipe
    from scaling.objectives import build_objective

    objective = build_objective(spec.objective, job.allow_import)
    dataset, held_out = build_datasets(spec)
    max_steps = _number_of_steps(spec, job.plan, len(dataset))
    last_step = min(stop_after or max_steps, max_steps)
    identity = _identity(job, process, dataset.fingerprint)
    start = None if resume is None else _starting_point(job, process, resume, identity)
    weights = _initial_weights(spec, process) if start is None else None
    recipe = model_recipe(spec)
    engine = build_engine(spec, job.rendered, recipe, job.groups, process)
    with closing(engine):
        progress = _first_state(engine, start, weights)
        with closing(_keeper(job, process, engine, resume, identity)) as keeper:
            recorder = _recorder(job, process, sinks, progress.step, last_step, heartbeat)
            with closing(recorder), _spared_by_gc():
                _train(
                    job,
                    process,
                    engine,
                    keeper,
                    recorder,
                    progress,
                    objective,
                    (dataset, held_out),
                    (max_steps, last_step),
                    stop_requested,
                    time_left,
                )
    return max(last_step, progress.step)


@contextmanager
def _spared_by_gc() -> Iterator[None]:
    """Keep the garbage collector from all that exists now: a pass over it takes 0.1 s, in whichever step it falls."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _train(
    job: Job,
    process: "Process",
    engine: "Engine",
    keeper: "Checkpoints | NoCheckpoints",
    recorder: "Recorder",
    progress: Progress,
    objective: "Objective",
    datasets: "tuple[Dataset, Dataset | None]",
    steps: tuple[int, int],
    stop_requested: Callable[[], bool],
    time_left: Callable[[], float | None],
) -> None:
    from scaling.data.loader import step_batches
    from scaling.loop import Course, train
    from scaling.nonfinite import GoBack, NonFinitePolicy

    spec, plan = job.spec, job.plan
    course = Course(
        plan,
        spec.seed,
        spec.schedule,
        max_steps=steps[0],
        last_step=steps[1],
        validation_interval=spec.validation.interval if spec.validation else None,
        save_best=spec.checkpoint is not None and spec.checkpoint.best,
    )
    policy = NonFinitePolicy(spec.on_nonfinite, spec.nonfinite_limit)
    if policy.action == "rollback" and progress.step == 0:
        keeper.save(engine, progress)  # something to go back to
    passed_over: set[int] = set(progress.skipped)
    while True:
        batches = step_batches(
            datasets[0],
            seed=spec.seed,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            rank=process.rank,
            world_size=process.world_size,
            first_samples=progress.first_samples(plan, course.last_step),
            device=process.device,
        )
        try:
            with closing(batches):
                validate = _validator(job, process, engine, objective, datasets[1], recorder.heartbeat)
                train(
                    engine,
                    objective,
                    batches,
                    process,
                    recorder,
                    keeper,
                    policy,
                    course,
                    progress,
                    validate=validate,
                    stop_requested=stop_requested,
                    time_left=time_left,
                )
            return
        except GoBack as back:
            recorder.forget()
            passed_over.add(back.first_sample)
            progress = replace(keeper.go_back(engine), skipped=tuple(sorted(passed_over)))
            logger.warning(f"going back to step {progress.step}; the samples of step {back.step} will be passed over")


def _validator(
    job: Job,
    process: "Process",
    engine: "Engine",
    objective: "Objective",
    held_out: "Dataset | None",
    heartbeat: Heartbeat,
) -> Callable[[int], ValidationRecord]:
    from scaling.data.loader import validation_batches
    from scaling.loop import measure_validation

    def validate(step: int) -> ValidationRecord:
        assert job.spec.validation is not None and held_out is not None
        share = validation_batches(
            held_out,
            samples=job.spec.validation.batches * job.plan.global_batch,
            micro_batch=job.plan.micro_batch,
            rank=process.rank,
            world_size=process.world_size,
        )
        return measure_validation(
            engine, objective, share, process, heartbeat, step=step, bytes_per_token=held_out.bytes_per_token
        )

    return validate


def _recorder(
    job: Job,
    process: "Process",
    sinks: "Sequence[Sink]",
    first_step: int,
    last_step: int,
    heartbeat: Heartbeat | None,
) -> "Recorder":
    from scaling.profile.recorder import Recorder

    return Recorder(
        sinks,
        job.plan,
        process.device,
        interval=job.spec.profile.interval,
        first_step=first_step,
        last_step=last_step,
        flops_per_token=_flops_per_token(job),
        peak_flops=_peak_flops(job.spec, process),
        heartbeat=heartbeat,
    )


# ---------------------------------------------------------------- checkpoints


def _identity(job: Job, process: "Process", data: str) -> dict[str, Any]:
    """What a checkpoint says of the job that it is of; `compare` looks at two of them."""
    import torch

    return {
        "spec": redacted_json(job.spec.to_json()),
        "shapes": {p.name: list(p.shape) for p in parameters(job.spec.model, job.spec.lora)},
        "trainable": [name for group in job.groups if not group.frozen for name in group.names],
        "global_batch": job.plan.global_batch,
        "sequence_length": job.plan.sequence_length,
        "seed": job.spec.seed,
        "data": data,
        "world_size": process.world_size,
        "backend": job.spec.backend.kind,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "origin": None,
    }


def _starting_point(job: Job, process: "Process", resume: Resume, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, found whole and fitting; None to start from the beginning. Logs what it finds.

    Sets the identity's `origin`: the checkpoint of another run that this one began from.
    """
    from scaling.checkpoint.compare import compare
    from scaling.checkpoint.format import read_state
    from scaling.checkpoint.resume import choose, mention_extras
    from scaling.checkpoint.store import Store

    store = Store(resume.folder / CHECKPOINTS)
    process.on_main(store.clean)
    folder, identity["origin"] = choose(store, resume.choice, process)
    limit = job.spec.checkpoint.restart_limit if job.spec.checkpoint else None
    newest = None if folder is None else read_state(folder)["step"]
    process.on_main(lambda: count_start(resume.folder, newest=newest, limit=limit, spec=identity["spec"]))
    if folder is None:
        metrics = resume.folder / METRICS
        if process.is_main and metrics.exists() and metrics.stat().st_size:
            logger.warning(f"{resume.folder} has no checkpoint yet: the run begins again at step 1")
        return None
    found = compare(read_state(folder), identity, resume.allow_change)
    if found.impossible:
        error = CheckpointError("\n".join(found.impossible))
        error.shared = True
        raise error
    if process.is_main:
        mention_extras(folder)
        logger.info(f"resuming from {folder}")
        for changes, meaning in (
            (found.harmless, "changed, harmless"),
            (found.continues, "changed: the curve goes on otherwise"),
            (found.allowed, "changed, as allowed: the data come in another order"),
        ):
            for change in changes:
                logger.info(f"  {meaning}: {change}")
    return folder


def _initial_weights(spec: Spec, process: "Process") -> "WeightSource | None":
    """What `initialize_from` names, open, and found to be of this model; before anything large is built."""
    from scaling.checkpoint.weights import find_weights, open_weights

    if spec.initialize_from is None:
        return None
    path = Path(spec.initialize_from)
    if not path.exists():
        error = CheckpointError(f"`initialize_from` must be a file or folder, but {path} does not exist; correct it")
        error.shared = True
        raise error
    found = process.gather_objects(process.on_main(lambda: find_weights(path)))[0]
    assert isinstance(found, Path)
    logger.info(f"weights from {found}, with a fresh optimizer")
    try:
        return open_weights(found, spec.model, spec.lora)
    except CheckpointError as error:
        error.shared = True
        raise


def _first_state(engine: "Engine", start: Path | None, weights: "WeightSource | None") -> Progress:
    """Fill the engine. Optimizer state is made now in any case: memory that lacks is found at once."""
    from scaling.checkpoint.keeper import restore

    if start is not None:
        return restore(engine, start)
    with engine.loading(engine.counters()):
        if weights is not None:
            names = weights.names()  # without adapters, if those are to begin afresh
            for shard in engine.state():
                if shard.kind == "master" and shard.name in names:
                    shard.values.copy_(weights.read(shard.name, shard.start, shard.values.numel()))
            weights.close()
    return Progress()


def _keeper(
    job: Job, process: "Process", engine: "Engine", resume: Resume | None, identity: dict[str, Any]
) -> "Checkpoints | NoCheckpoints":
    from scaling.checkpoint.keeper import Checkpoints, NoCheckpoints
    from scaling.checkpoint.store import Store

    if resume is None or job.spec.checkpoint is None:
        return NoCheckpoints()
    keeper = Checkpoints(Store(resume.folder / CHECKPOINTS), job.spec.checkpoint, process, identity)
    keeper.reserve(engine)
    return keeper


# ---------------------------------------------------------------- numbers


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
    return train_flops_per_token(job.spec.model, job.plan.sequence_length, frozen, job.spec.lora)


def _peak_flops(spec: Spec, process: "Process") -> float | None:
    """Dense peak of this card in the spec's precision; None where it is not known."""
    gpu = gpu_from_device_name(device_name(process)) if process.device.type == "cuda" else None
    return None if gpu is None else gpu.peak_flops(spec.precision)


def device_name(process: "Process") -> str:
    """What the driver calls the card; "cpu" without one."""
    import torch

    return torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"
