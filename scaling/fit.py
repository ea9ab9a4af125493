"""`batch.micro_batch_size` where it is "auto" together with the accumulation: the fastest that fits, found by trying.

The planner says which micro-batches should fit on these devices, and in which order they are worth a try. Then each
rank takes one step of the real engine at full length, in a process of its own in which the other ranks do not exist
(`scaling.rehearse`). So nothing of the training is touched, no memory stays taken, and a rank that runs out leaves
nobody waiting for it: all ranks then agree on the next smaller micro-batch. The global batch never changes.
"""

import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from scaling.errors import UserError
from scaling.estimate.memory import COMMUNICATOR_BYTES, CONTEXT_BYTES, MemoryModel
from scaling.estimate.search import MARGIN, known, micro_batches, sequences_per_rank
from scaling.estimate.step import engine_of
from scaling.estimate.time import estimate_time
from scaling.hardware import GPU, Cluster, gpu_from_device_name
from scaling.host_memory import limits
from scaling.rehearse import ProcessEnded, apart, take_steps
from scaling.run import Job, device_name, resolve
from scaling.spec import Spec, change_spec
from scaling.units import format_bytes
from scaling.watch.exhausted import Exhausted, Held
from scaling.watch.signals import die_with_parent

if TYPE_CHECKING:
    from scaling.engine.process import Process

logger = logging.getLogger("scaling")

HOST_SHARE = 0.8
"""Of the host memory that is free, what the ranks of a machine may plan on together. Engineering judgement: the data
come through the rest, and what is no tensor grows as well."""


@dataclass(frozen=True)
class Candidate:
    """A micro-batch, and what is predicted for it."""

    job: Job
    needs_bytes: int
    """Of what is short: the device with all that is around tensors, or host memory with the copy that is saved."""
    allocated_bytes: int
    """Of tensors, at the peak."""
    tokens_per_s: float | None
    """Of one GPU; None where its speed is not known."""


class Trial(NamedTuple):
    """What one rank found in its step."""

    peak_bytes: int | None = None
    """The most that its tensors took; None where it was not taken to the end."""
    exhausted: dict[str, Any] | None = None
    """Why: the arguments of `Exhausted`. None where memory was not the reason."""
    problem: str = ""
    """Why, where it was something else: then nothing is known of the memory."""


def smallest(spec: Spec, world_size: int) -> Spec:
    """`spec`, whose micro-batch and accumulation are open, with the smallest micro-batch."""
    return with_micro(spec, 1, sequences_per_rank(spec, world_size))


def with_micro(spec: Spec, micro: int, per_rank: int) -> Spec:
    """`spec` with `micro` of its `per_rank` sequences of a step at a time, and the accumulation that this takes."""
    accumulation, rest = divmod(per_rank, micro)
    assert not rest, (micro, per_rank)
    sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    return change_spec(spec, batch=spec.batch.model_dump() | sizes)


def fit(spec: Spec, process: "Process", begin: Callable[[Job], None], allow_import: Sequence[str] = ()) -> Job:
    """The job of `spec`, whose micro-batch and accumulation are open, with the sizes that a step has confirmed.

    A collective call; every rank returns the same. `begin(job)` is called before each try. Raises Exhausted, on all
    ranks alike, where not even the smallest micro-batch fits.
    """
    room = min(process.gather_objects(_room(process)), key=lambda size: size or 0)
    failure: Exhausted | None = None
    for candidate in _candidates(spec, process, room, allow_import):
        begin(candidate.job)
        trials = process.gather_objects(_try(candidate.job, process))
        failures = [Exhausted(**trial.exhausted, rank=rank) for rank, trial in enumerate(trials) if trial.exhausted]
        failure = failures[0] if failures else None
        if process.is_main:
            _tell(candidate, room, trials, failure)
        if failure is None:
            return candidate.job
    assert failure is not None, "the smallest micro-batch is always tried"
    raise failure


def _tell(candidate: Candidate, room: int | None, trials: Sequence[Trial], failure: Exhausted | None) -> None:
    plan = candidate.job.plan
    of = "" if room is None else f" of {format_bytes(room)}"
    told = f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation: "
    told += f"{format_bytes(candidate.needs_bytes)}{of} predicted"
    if failure is not None:
        more = f", {format_bytes(failure.asked_bytes)} more were asked for" if failure.asked_bytes else ""
        told += f", but rank {failure.rank} ran out of memory in a step{more}"
        logger.info(told if plan.micro_batch == 1 else f"{told}; a smaller one is tried")
        return
    peaks = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    if len(peaks) < len(trials):
        problem = next(trial.problem for trial in trials if trial.peak_bytes is None)
        logger.warning(f"WARNING: {told}, not confirmed, since the step could not be taken ({problem})")
        return
    measured, expected = format_bytes(max(peaks)), format_bytes(candidate.allocated_bytes)
    logger.info(f"{told}, confirmed by a step ({measured} of tensors measured, {expected} predicted)")


# ---------------------------------------------------------------- what is worth a try


def _room(process: "Process") -> int | None:
    """Bytes that a run may take of this rank's device, or of host memory on a CPU; None where that is not known."""
    import torch

    if process.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(process.device)
        own = CONTEXT_BYTES + (COMMUNICATOR_BYTES if process.world_size > 1 else 0)
        others = max(0, total - free - own)
        return int(total * (1 - MARGIN)) - others
    shares = [limit.free_bytes / (process.local_world_size if limit.shared else 1) for limit in limits()]
    return int(HOST_SHARE * min(shares)) if shares else None


def _candidates(spec: Spec, process: "Process", room: int | None, allow_import: Sequence[str]) -> list[Candidate]:
    """In the order in which they are tried: the fastest that should fit, then ever smaller ones.

    The largest where no speed is known; the smallest of all where none should fit, as a prediction may be wrong.
    """
    per_rank = sequences_per_rank(spec, process.world_size)
    jobs = [
        resolve(with_micro(spec, micro, per_rank), process.world_size, allow_import)
        for micro in micro_batches(per_rank)
    ]
    found = _predicted(jobs, process)
    fitting = [one for one in found if room is None or one.needs_bytes <= room] or found[:1]
    first = max(fitting, key=lambda one: (one.tokens_per_s or 0.0, one.job.plan.micro_batch))
    return found[found.index(first) :: -1]


def _predicted(jobs: Sequence[Job], process: "Process") -> list[Candidate]:
    """Of jobs that differ in their batch alone."""
    # Ranks may differ in their devices, and must not in what they try: the first rank's counts.
    name = process.gather_objects(device_name(process))[0]
    gpu, on_gpu, first = gpu_from_device_name(name), process.device.type == "cuda", jobs[0]
    model = MemoryModel(first.spec, first.groups, first.rendered, first.plan, gpu, cuda=on_gpu)
    found: list[Candidate] = []
    for job in jobs:
        memory = model.at(job.plan.micro_batch, job.plan.accumulation)
        needs = memory.high_bytes if on_gpu else memory.peak_allocated_bytes + memory.staging_bytes
        found.append(Candidate(job, needs, memory.peak_allocated_bytes, _speed(job, gpu, process)))
    return found


def _speed(job: Job, gpu: GPU | None, process: "Process") -> float | None:
    nodes, rest = divmod(process.world_size, process.local_world_size)
    if gpu is not None and not rest:
        with suppress(UserError):  # a rate of this card is not known
            cluster = Cluster(nodes, process.local_world_size, gpu)
            duration = estimate_time(job.spec, job.plan, job.groups, job.rendered, cluster)
            return known(duration.tokens_per_second_per_gpu)
    return None


# ---------------------------------------------------------------- the step


def _try(job: Job, process: "Process") -> Trial:
    """One step of `job` on this rank's device, in a process of its own."""
    import torch

    threads = torch.get_num_threads()
    try:
        found = apart(_step_alone, job, str(process.device), threads, method="spawn")
        return Trial(**found)
    except ProcessEnded as error:
        if error.code == -signal.SIGKILL:  # as the kernel ends a process where no memory is left
            message = "the process that took the step was killed: perhaps for want of host memory, see dmesg"
            nothing = {"stage": "build", "message": message, "asked_bytes": None, "held": Held(), "of_host": True}
            return Trial(exhausted=nothing)
        return Trial(problem=str(error))
    except UserError as error:  # which training will raise on all ranks, where it is none of this step alone
        return Trial(problem=str(error))


def _step_alone(job: Job, device: str, threads: int) -> dict[str, Any]:
    """As the fields of a Trial; in a process that does nothing else."""
    import torch

    from scaling.engine.build import import_backend
    from scaling.engine.process import rehearsed_process
    from scaling.profile.meter import build_meter
    from scaling.profile.stock import taking_stock

    die_with_parent(of_any=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the rank, which acknowledges them
        signal.signal(number, signal.SIG_IGN)
    place = torch.device(device)
    torch.set_num_threads(threads)
    try:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        with rehearsed_process(job.plan.world_size, place) as process, taking_stock("build", place):
            import_backend(job.spec, process)
            meter = build_meter(place)
            with meter:
                take_steps(job, process, meter, 1, micro_steps=engine_of(job.spec).micro_steps)
            return {"peak_bytes": meter.report()["peak_allocated_bytes"]}
    except Exhausted as error:
        found = {"stage": error.stage, "message": error.message, "asked_bytes": error.asked_bytes, "held": error.held}
        return {"exhausted": found | {"of_host": error.of_host}}
    except UserError:
        raise  # as it is
    except Exception as error:  # a card that takes one process alone, say: training itself may work all the same
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
