"""From a spec to a finished training run: `resolve` for all that needs no torch, `run` for the rest."""

import gc
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.batch import resolve_batch
from scaling.errors import CheckpointError, UserError
from scaling.estimate.flops import train_flops_per_token
from scaling.groups import Group, check_features, resolve_groups
from scaling.hardware import gemm_ceiling, gpu_from_device_name
from scaling.imports import check_allowed
from scaling.inventory import attended_length, inventory_of, layers_of, parameters
from scaling.records import BatchPlan, Progress, ValidationRecord
from scaling.redact import redacted, redacted_json
from scaling.render import render
from scaling.run_folder import CHECKPOINTS, MEMORY, METRICS, SNAPSHOTS, count_start, versions
from scaling.schedule import check_growth, check_schedule, growth, length_at, lr_scale
from scaling.spec import Spec
from scaling.spec.sections import (
    DPO,
    PPO,
    Factory,
    FactoryData,
    FactoryModel,
    Recorded,
    Vla,
    caches_features,
    curriculum_of,
)
from scaling.watch.heartbeat import Heartbeat, NullHeartbeat

if TYPE_CHECKING:  # torch takes seconds to import: a wrong spec is refused before
    from scaling.checkpoint.keeper import Checkpoints, NoCheckpoints
    from scaling.checkpoint.weights import WeightSource
    from scaling.data.dataset import Dataset
    from scaling.engine.process import Process
    from scaling.engine.protocol import Engine
    from scaling.objectives import Objective
    from scaling.profile.gradients import GradientNorms
    from scaling.profile.observers import Observer
    from scaling.profile.recorder import Recorder, Yardsticks
    from scaling.profile.sinks import Sink
    from scaling.rollouts import Rollouts

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

    @property
    def flops_per_token(self) -> float | None:
        """Of training, forward and backward; None where it is not known."""
        return self.flops_per_token_at(attended_length(self.spec))

    def flops_per_token_at(self, length: int) -> float | None:
        """In sequences of so many tokens; a recorded model is known at the length that it was recorded at."""
        model = self.spec.model
        if isinstance(model, Recorded) and (inventory_of(model).ledger is None or length != attended_length(self.spec)):
            return None
        frozen = {name for group in self.groups if group.frozen for name in group.names}
        features = caches_features(self.spec.data)
        return train_flops_per_token(model, length, frozen, self.spec.lora, features=features)


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
    parts = [("model", spec.model), ("objective", spec.objective), ("data", spec.data)]
    if isinstance(spec.objective, PPO):
        parts.append(("objective.reward", spec.objective.reward))
    for section, part in parts:
        if isinstance(part, FactoryModel | Factory | FactoryData):
            check_allowed(part.target, allow_import, f"{section}.target")
    plan = resolve_batch(spec, world_size)
    scale = lr_scale(spec.lr_scaling, world_size=world_size, global_batch=plan.global_batch)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora), lr_scale=scale)
    check_features(spec, groups)
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
    is. Raises UserError and its kin, and Exhausted where memory runs out once the engine is being built.
    """
    spec = job.spec
    from scaling.data.build import build_datasets
    from scaling.engine.build import build_engine
    from scaling.models.build import model_recipe
    from scaling.objectives import build_objective
    from scaling.profile.stock import taking_stock

    sticks = yardsticks(job, process)
    dataset, held_out = build_datasets(spec, job.allow_import)
    own = isinstance(spec.data, FactoryData) and not getattr(dataset, "is_text", False)
    objective = build_objective(
        spec.objective, job.allow_import, from_logits=isinstance(spec.model, Recorded), by_sample=own
    )
    max_steps = _number_of_steps(spec, job.plan, len(dataset))
    last_step = min(stop_after or max_steps, max_steps)
    identity = _identity(job, process, dataset.fingerprint, getattr(dataset, "facts", None))
    start = None if resume is None else _starting_point(job, process, resume, identity)
    weights = _initial_weights(spec, process) if start is None else None
    with taking_stock("build", process.device):  # the recipe may hold a whole model: it is kept nowhere
        recipe = model_recipe(spec, job.allow_import, filled=True)
        engine = build_engine(spec, job.rendered, recipe, job.groups, process)
        del recipe
    snapshot = _memory_snapshot(job, process, resume)
    with closing(engine), taking_stock("save", process.device, engine, snapshot):
        with taking_stock("build" if start is None else "restore", process.device, engine, snapshot):
            progress = _first_state(engine, start, weights)
            folder = None if resume is None else resume.folder
            dataset, held_out = _compared(job, process, engine, dataset, held_out, heartbeat, folder, start is None)
            dataset, held_out = _seen(job, process, engine, dataset, held_out, heartbeat)
            rollouts = _rollouts(job, process, engine, heartbeat, folder)
        with closing(_keeper(job, process, engine, resume, identity)) as keeper:
            observers = _observers(job, process, engine, keeper, folder, progress.step)
            recorder = make_recorder(
                job, process, engine, sinks, observers, sticks, progress.step, last_step, heartbeat
            )
            course = _course(job, process, recorder, progress.step, last_step)
            with closing(recorder), course, _told_to(keeper, recorder), _spared_by_gc():
                _train(
                    job,
                    process,
                    engine,
                    keeper,
                    recorder,
                    progress,
                    objective,
                    (dataset, held_out),
                    rollouts,
                    (max_steps, last_step),
                    stop_requested,
                    time_left,
                )
    return max(last_step, progress.step)


def _compared(
    job: Job,
    process: "Process",
    engine: "Engine",
    dataset: "Dataset",
    held_out: "Dataset | None",
    heartbeat: Heartbeat | None,
    folder: Path | None,
    begins: bool,
) -> "tuple[Dataset, Dataset | None]":
    """Training and validation samples; of pairs with what the model that training starts from makes of them."""
    if not isinstance(job.spec.objective, DPO):
        return dataset, held_out
    from scaling.data.preference import PreferenceDataset
    from scaling.reference import with_reference

    found: list[Dataset | None] = []
    for part, samples in (("train", dataset), ("validation", held_out)):
        if isinstance(samples, PreferenceDataset):
            samples = with_reference(
                *(samples, part, engine, process, heartbeat or NullHeartbeat()),
                micro_batch=job.plan.micro_batch,
                from_logits=isinstance(job.spec.model, Recorded),
                folder=folder,
                begins=begins,
            )
        found.append(samples)
    assert found[0] is not None
    return found[0], found[1]


def _seen(
    job: Job,
    process: "Process",
    engine: "Engine",
    dataset: "Dataset",
    held_out: "Dataset | None",
    heartbeat: Heartbeat | None,
) -> "tuple[Dataset, Dataset | None]":
    """Training and validation samples; where features are kept, with what vision makes of their images."""
    if not caches_features(job.spec.data):
        return dataset, held_out
    from scaling.data.episodes import EpisodeDataset
    from scaling.features import with_features

    assert isinstance(dataset, EpisodeDataset) and isinstance(held_out, EpisodeDataset | None)
    beat, micro_batch = heartbeat or NullHeartbeat(), job.plan.micro_batch
    found = with_features([dataset, held_out], engine, process, beat, job.spec, micro_batch)
    assert found[0] is not None
    return found[0], found[1]


def _rollouts(
    job: Job, process: "Process", engine: "Engine", heartbeat: Heartbeat | None, folder: Path | None
) -> "Rollouts | None":
    """What answers prompts for ppo; None for other objectives. The reference is what training starts from, whatever
    this run has become of it."""
    spec, plan = job.spec, job.plan
    if not isinstance(spec.objective, PPO):
        return None
    from scaling.models.build import model_recipe
    from scaling.objectives.policy import build_reward
    from scaling.rollouts import Rollouts, reference_weights

    weights = _initial_weights(spec, process)
    shapes = {p.name: p.shape for p in parameters(spec.model, spec.lora)}
    try:
        reference = reference_weights(engine, model_recipe(spec, job.allow_import), weights, shapes)
    finally:
        if weights is not None:
            weights.close()
    cycle = spec.objective.rollout_steps * spec.objective.epochs
    return Rollouts(
        engine,
        process,
        spec.objective,
        plan,
        spec.seed,
        build_reward(spec.objective, job.allow_import),
        reference,
        heartbeat or NullHeartbeat(),
        folder,
        # The newest checkpoint may be two intervals old: one being written.
        kept=2 + -(-2 * spec.checkpoint.interval // cycle) if spec.checkpoint else 2,
    )


def _memory_snapshot(job: Job, process: "Process", resume: Resume | None) -> Path | None:
    """Where the allocator's snapshot goes when memory runs out; None where the spec asks for none."""
    if resume is None or not job.spec.profile.memory_snapshot:
        return None
    return resume.folder / SNAPSHOTS / f"oom-rank{process.rank}.pickle"


@contextmanager
def _told_to(keeper: "Checkpoints | NoCheckpoints", recorder: "Recorder") -> Iterator[None]:
    """Have the recorder hear of saves, as long as it writes."""
    nobody, keeper.tell = keeper.tell, recorder.event
    try:
        yield
    finally:
        keeper.tell = nobody


@contextmanager
def _course(job: Job, process: "Process", recorder: "Recorder", first_step: int, last_step: int) -> Iterator[None]:
    """Write that the run starts, after `first_step` steps, and how it ends, as far as this process can tell."""
    hosts = list(dict.fromkeys(process.gather_objects(socket.gethostname())))
    backend = job.spec.backend.model_dump(mode="json", exclude_defaults=True)
    recorder.event("start", first_step, world_size=process.world_size, backend=backend, hosts=hosts)
    try:
        yield
    except UserError as error:
        recorder.event("end", error.step, code=error.code, reason=redacted(str(error)), rank=0)
        raise
    except Exception as error:  # what it comes to (memory, a lost peer, a bug), exit.json says
        recorder.event("end", None, code=1, reason=type(error).__name__, rank=0)
        raise
    recorder.event("end", last_step, code=0, reason="done", rank=0)


@contextmanager
def _spared_by_gc() -> Iterator[None]:
    """Keep the garbage collector from all that exists now: a pass over it takes 0.1 s, in whichever step it falls.

    From here on it works, if it was at rest while the run started (scaling/train.py).
    """
    gc.collect()
    gc.freeze()
    gc.enable()
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
    rollouts: "Rollouts | None",
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
        terms=None if (each := datasets[0].terms_per_sample) is None else each * plan.global_batch,
    )
    length = length_at(spec.data) if curriculum_of(spec.data) else None
    policy = NonFinitePolicy(spec.on_nonfinite, spec.nonfinite_limit)
    if policy.action == "rollback" and progress.step == 0:
        keeper.save(engine, progress)  # something to go back to
    passed_over: set[int] = set(progress.skipped)
    while True:
        places = progress.first_samples(plan, course.last_step)
        if rollouts is not None:
            batches = rollouts.batches(datasets[0], places, partial(recorder.event, "rollout"))
        else:
            batches = step_batches(
                datasets[0],
                seed=spec.seed,
                micro_batch=plan.micro_batch,
                accumulation=plan.accumulation,
                rank=process.rank,
                world_size=process.world_size,
                first_samples=places,
                device=process.device,
                pieces=length and (plan.sequence_length // length(step) for step in count(progress.step)),
            )
        try:
            with closing(batches):
                validate = _validator(job, process, engine, objective, datasets[1], recorder.heartbeat, rollouts)
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
            recorder.event("rollback", back.step)
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
    rollouts: "Rollouts | None",
) -> Callable[[int], ValidationRecord]:
    from scaling.data.loader import validation_batches
    from scaling.loop import measure_validation

    def validate(step: int) -> ValidationRecord:
        assert job.spec.validation is not None and held_out is not None
        samples = job.spec.validation.batches * job.plan.global_batch
        if rollouts is not None:
            return rollouts.validate(held_out, samples, step)
        share = validation_batches(
            held_out,
            samples=samples,
            micro_batch=job.plan.micro_batch,
            rank=process.rank,
            world_size=process.world_size,
        )
        return measure_validation(
            engine, objective, share, process, heartbeat, step=step, bytes_per_token=held_out.bytes_per_token
        )

    return validate


def make_recorder(
    job: Job,
    process: "Process",
    engine: "Engine",
    sinks: "Sequence[Sink]",
    observers: "Sequence[Observer]",
    yardsticks: "Yardsticks",
    first_step: int,
    last_step: int,
    heartbeat: Heartbeat | None,
) -> "Recorder":
    """The recorder of a run on this rank; a collective call."""
    from scaling.profile.recorder import Recorder
    from scaling.profile.waits import Waits

    profile = job.spec.profile
    return Recorder(
        sinks,
        job.plan,
        process,
        yardsticks,
        interval=profile.interval,
        first_step=first_step,
        last_step=last_step,
        heartbeat=heartbeat,
        waits=Waits(process.device, below_python=engine.waits_below_python),
        device_interval_s=profile.device_interval,
        observers=observers,
        gradient_norms=_gradient_norms(job, process) if profile.log_gradients else None,
        length=length_at(job.spec.data) if curriculum_of(job.spec.data) else None,
    )


def _gradient_norms(job: Job, process: "Process") -> "GradientNorms":
    from scaling.profile.gradients import GradientNorms

    spec = job.spec
    group_of = {name: group.name for group in job.groups if not group.frozen for name in group.names}
    # In the order of the model, for whoever reads the record.
    groups = {p.name: group_of[p.name] for p in parameters(spec.model, spec.lora) if p.name in group_of}
    return GradientNorms(layers_of(spec.model, groups), groups, process.device)


def _observers(
    job: Job,
    process: "Process",
    engine: "Engine",
    keeper: "Checkpoints | NoCheckpoints",
    folder: Path | None,
    first_step: int,
) -> "list[Observer]":
    """What the spec wants to have looked at, of the steps to come; nothing where there is no folder to write to."""
    from scaling.labels import labelled_in_midst
    from scaling.profile.observers import Attribution, SnapshotWriter, Tracer

    profile, rank, device = job.spec.profile, process.rank, process.device
    found: list[Observer] = []
    if folder is None:
        return found
    if profile.memory_snapshot and device.type == "cuda":
        found.append(SnapshotWriter(folder, rank, first_step + profile.interval))
    if profile.trace_steps is not None and first_step < profile.trace_steps[1]:
        found.append(Tracer(folder, rank, device, *profile.trace_steps))
    if profile.memory_step is not None:
        path = folder / MEMORY if process.is_main else None
        labelled = partial(labelled_in_midst, engine, apart=keeper.staging)
        found.append(Attribution(path, device, profile.memory_step, labelled))
    return found


# ---------------------------------------------------------------- checkpoints


def _identity(job: Job, process: "Process", data: str, data_facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint says of the job that it is of; `compare` looks at two of them.

    `data`: the fingerprint of the samples; `data_facts`: what whoever uses the model must know of them.
    """
    import torch

    return {
        "spec": redacted_json(job.spec.to_json()),
        "shapes": {p.name: list(p.shape) for p in parameters(job.spec.model, job.spec.lora)},
        "trainable": [name for group in job.groups if not group.frozen for name in group.names],
        "global_batch": job.plan.global_batch,
        "sequence_length": job.plan.sequence_length,
        "seed": job.spec.seed,
        "data": data,
        "data_facts": data_facts,
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
    """What `initialize_from` or `initialize_parts` name, open, and found to be of this model; before anything large is
    built."""
    from scaling.checkpoint.parts import open_parts
    from scaling.checkpoint.weights import find_weights, open_weights

    if spec.initialize_parts and isinstance(spec.model, Vla):
        try:
            return open_parts(spec.initialize_parts, spec.model)
        except CheckpointError as error:
            error.shared = True  # every rank reads the same files
            raise
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
    check_growth(spec.data, steps)
    return steps


def yardsticks(job: Job, process: "Process") -> "Yardsticks":
    """What the speed of the run is told against. Raises UserError where `profile.hardware` is of no use."""
    from scaling.profile.recorder import Yardsticks

    path, device = job.spec.profile.hardware, device_name(process)
    measured = None if path is None else gemm_ceiling(path, job.spec.precision, device)
    spec = job.spec
    shorter = {n: job.flops_per_token_at(n) for _, n in growth(spec.data) if curriculum_of(spec.data)}
    return Yardsticks(job.flops_per_token, _peak_flops(spec, process), measured, shorter)


def _peak_flops(spec: Spec, process: "Process") -> float | None:
    """Dense peak of this card in the spec's precision; None where it is not known."""
    gpu = gpu_from_device_name(device_name(process)) if process.device.type == "cuda" else None
    return None if gpu is None else gpu.peak_flops(spec.precision)


def device_name(process: "Process") -> str:
    """What the driver calls the card; "cpu" without one."""
    import torch

    return torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"
