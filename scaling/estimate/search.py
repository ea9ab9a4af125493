"""Every way to run a spec on a machine, each estimated, ranked by predicted speed among those that fit.

The global batch, and all that changes the training itself, stay as the spec has them: what varies is how a step is cut
(micro-batch and accumulation), where things lie (backend, ZeRO stage, offload, replicas) and what is made again
(activation checkpointing). A *structure* is all of that but the micro-batch.
"""

import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from scaling.batch import resolve_batch
from scaling.errors import UserError
from scaling.estimate.memory import MemoryModel
from scaling.estimate.results import MemoryEstimate, TimeEstimate
from scaling.estimate.time import estimate_time
from scaling.estimate.workers import mapped
from scaling.groups import Group, check_features, resolve_groups
from scaling.hardware import Cluster
from scaling.inventory import parameters
from scaling.records import BatchPlan
from scaling.render import render
from scaling.spec import Spec, change_spec
from scaling.spec.sections import DDP, FSDP, Batch, DeepSpeed, Single
from scaling.units import GiB

MARGIN = 0.02
"""Share of the card's memory left free by default: what other processes and the driver may want on top of the band
around an estimate. A judgement, not a measurement."""
CHECKPOINTING = ("none", "selective", "full")
MOST_MICRO = 1024
"""No larger micro-batch is tried: a rank's products are far past the size at which they are fast."""
MOST_REFUSED = 64
"""Micro-batches up to this that do not divide a rank's sequences are listed as rejected."""
MOST_RANKS = 2**20

_FIELDS = {section.__name__.lower(): section.model_fields for section in (Single, DDP, FSDP, DeepSpeed)}
"""Fields of each kind of backend."""


@dataclass(frozen=True)
class Candidate:
    """One way to run the spec."""

    spec: Spec
    plan: BatchPlan
    memory: MemoryEstimate
    time: TimeEstimate
    fits: bool | None
    """None where the card's memory is not known."""
    changes: dict[str, Any]
    """What `--set` needs to get here from the spec: dotted field -> value, in this order."""
    reason: str = ""
    """One sentence: what it costs, or why it does not fit."""

    @property
    def speed(self) -> float | None:
        """Tokens per second and GPU; None where the card's speed is not known."""
        return known(self.time.tokens_per_second_per_gpu)


@dataclass(frozen=True)
class Rejected:
    """What was not estimated, since it cannot be run at all."""

    changes: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    cluster: Cluster
    usable_bytes: int | None
    """Memory of a card, less the margin; None where it is not known."""
    groups: tuple[Group, ...]
    as_written: Candidate | None
    """None where its micro-batch is "auto", or where it cannot run on this many GPUs."""
    candidates: tuple[Candidate, ...]
    """Ranked, best first; those that do not fit come last, the nearest to fitting first."""
    rejected: tuple[Rejected, ...]
    pareto: tuple[int, ...]
    """Places in `candidates` of those that fit and that no other beats in both device memory and speed, leanest
    first."""
    seconds: float

    @property
    def best(self) -> Candidate | None:
        """The first candidate, if it fits (or if nobody can say)."""
        return self.candidates[0] if self.candidates and self.candidates[0].fits is not False else None


def known(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def search(spec: Spec, cluster: Cluster, margin: float = MARGIN, *, only_as_written: bool = False) -> Found:
    """Estimate every candidate of `spec` on `cluster`. `margin`: the share of a card's memory that is left free.

    Raises UserError where no micro-batch gives the global batch on so many ranks, or the groups are wrong.
    """
    with _no_gc():
        return _search(spec, cluster, margin, only_as_written=only_as_written)


@contextmanager
def _no_gc() -> Iterator[None]:
    """Played steps make objects by the hundred thousand and no cycles: looking for some would take a third of the
    time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # both: what is there now is old, and not looked through as soon as it may be
        if was:
            gc.enable()


def _search(spec: Spec, cluster: Cluster, margin: float, *, only_as_written: bool) -> Found:
    began = time.perf_counter()
    usable = usable_bytes(cluster, margin)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    check_features(spec, groups)
    per_rank = sequences_per_rank(spec, cluster.world_size)
    written, rejected = _as_written(spec, cluster, groups, usable)
    found: list[Candidate] = []
    if not only_as_written:
        batches = {micro: cut_batch(spec, micro, per_rank) for micro in micro_batches(per_rank)}
        ways = list(structures(spec, cluster, rejected))
        estimates = mapped(_all_estimates, [structure for structure, _ in ways], (batches, cluster, groups))
        for (structure, changes), estimated in zip(ways, estimates, strict=True):
            if isinstance(estimated, str):
                rejected.append(Rejected(changes, estimated))
            else:
                found += _candidates(structure, changes, batches, estimated, usable)
        rejected += _illegal(spec, per_rank)
    ranked = sorted(found, key=_rank)
    fastest = ranked[0] if ranked and ranked[0].fits is not False else None
    explained = tuple(_explained(candidate, fastest, usable) for candidate in ranked)
    if written is not None:
        written = _explained(written, fastest, usable)
    seconds = time.perf_counter() - began
    return Found(cluster, usable, groups, written, explained, tuple(rejected), _pareto(explained), seconds)


def usable_bytes(cluster: Cluster, margin: float) -> int | None:
    """Bytes of a card that a run may take; None where its memory is not known."""
    memory = cluster.gpu.memory_bytes
    return None if memory is None else math.floor(memory * (1 - margin))


def sequences_per_rank(spec: Spec, world_size: int) -> int:
    """Sequences of the global batch that each rank gets; UserError with what is nearest where they are not whole."""
    if world_size > MOST_RANKS:
        raise UserError(f"`--gpus` must be at most {MOST_RANKS} in all, but is {world_size}; lower it")
    batch = {"micro_batch_size": 1, "gradient_accumulation_steps": "auto"}
    if spec.batch.global_batch_tokens is None and not isinstance(spec.batch.global_batch_size, int):
        batch = {}  # it follows from the other two, which are numbers then
    plan = resolve_batch(change_spec(spec, batch=spec.batch.model_dump() | batch, backend={"kind": "ddp"}), world_size)
    return plan.micro_batch * plan.accumulation


def micro_batches(per_rank: int) -> list[int]:
    """The micro-batches into which so many sequences can be cut, as far as any is tried; in rising order."""
    return [one for one in range(1, min(per_rank, MOST_MICRO) + 1) if per_rank % one == 0]


def first_fit(spec: Spec, cluster: Cluster, margin: float) -> Candidate | None:
    """Any candidate that fits, with the smallest micro-batch, the leanest checkpointing first; None if none does."""
    usable = usable_bytes(cluster, margin)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    batches = {1: cut_batch(spec, 1, sequences_per_rank(spec, cluster.world_size))}
    for structure, changes in structures(spec, cluster, [], CHECKPOINTING[-1:]):
        with suppress(UserError):  # what cannot be estimated is no help either
            estimates = _estimates(structure, (batches, cluster, groups))
            candidate = next(_candidates(structure, changes, batches, estimates, usable))
            if candidate.fits:
                return candidate
    return None


# ---------------------------------------------------------------- what there is to try


def structures(
    spec: Spec, cluster: Cluster, rejected: list[Rejected], checkpointing: Sequence[str] = CHECKPOINTING
) -> Iterator[tuple[Spec, dict[str, Any]]]:
    """Each structure as a valid spec, with the changes that lead to it; what cannot be is added to `rejected`."""
    seen: list[Any] = []
    for backend in _backends(spec, cluster):
        try:
            sound = change_spec(spec, backend=backend)
        except UserError as error:
            rejected.append(Rejected({f"backend.{name}": value for name, value in backend.items()}, str(error)))
            continue
        if sound.backend in seen:
            continue
        seen.append(sound.backend)
        for mode in checkpointing:
            structure = change_spec(sound, activation_checkpointing=mode)
            yield structure, changes_to(structure, spec)


def _backends(spec: Spec, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """The backends to try, as plain sections; the spec's own first, where it can run."""
    world_size = cluster.world_size
    if _runs(spec, world_size):
        yield spec.backend.model_dump()
    if world_size == 1:
        yield _like_own(spec, {"kind": "single"})
    else:
        yield _like_own(spec, {"kind": "ddp"})
        for replicate in (count for count in range(1, cluster.nodes + 1) if cluster.nodes % count == 0):
            for reshard in (True, False):  # each replica is cut over whole nodes, whose own links are the fast ones
                sharding = {"kind": "fsdp", "reshard_after_forward": reshard, "cpu_offload": False}
                yield from _policies(spec, sharding | {"replicate": replicate}, both=reshard)
        offload = {"reshard_after_forward": True, "replicate": 1, "cpu_offload": True}
        yield _like_own(spec, {"kind": "fsdp", **offload})
    for stage in (1, 2, 3):
        places: list[tuple[str | None, str | None]] = [(None, None)] if world_size > 1 else []
        places += [("cpu", None), ("cpu", "cpu")] if stage == 3 else [("cpu", None)]
        for optimizer, weights in places:
            offload = {"offload_optimizer": optimizer, "offload_parameters": weights, "nvme_path": None}
            settings = {"kind": "deepspeed", "zero_stage": stage, **offload}
            yield from _policies(spec, settings, both=stage == 3 and optimizer is None)


def _policies(spec: Spec, settings: dict[str, Any], *, both: bool) -> Iterator[dict[str, Any]]:
    """`settings` of a backend; with `both`, where something does not train, also with that whole on every rank."""
    yield _like_own(spec, settings)
    if both and (spec.lora is not None or any(group.freeze for group in spec.param_groups)):
        yield _like_own(spec, settings | {"frozen": "replicate"})


def _runs(spec: Spec, world_size: int) -> bool:
    """Whether the spec's own backend takes so many ranks."""
    try:
        sequences = change_spec(spec, batch={"micro_batch_size": 1, "gradient_accumulation_steps": 1})
        resolve_batch(sequences, world_size)
    except UserError:
        return False
    return True


def _like_own(spec: Spec, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of a backend, with what the spec's own says beyond them as far as this one has such fields.

    Fields that default to None belong to one ZeRO stage: at another they would be refused. What does not train is cut
    where it can be, unless `settings` say otherwise.
    """
    own, fields = spec.backend.model_dump(), _FIELDS[settings["kind"]]
    stays = own.get("zero_stage") == settings.get("zero_stage")
    shared = [name for name in own if name in fields and (stays or fields[name].default is not None)]
    if own["kind"] != settings["kind"] or not stays or (own.get("frozen") == "replicate" and _can_cut_frozen(own)):
        shared = [name for name in shared if name != "frozen"]
    return {name: own[name] for name in shared} | settings


def _can_cut_frozen(backend: dict[str, Any]) -> bool:
    return backend["kind"] == "fsdp" or backend.get("zero_stage") == 3


def cut_batch(spec: Spec, micro: int, per_rank: int) -> Batch:
    """The spec's batch cut into micro-batches of this size: the global batch stays what it is."""
    accumulation, rest = divmod(per_rank, micro)
    assert rest == 0, (micro, per_rank)
    sizes: dict[str, Any] = {"micro_batch_size": micro}
    if spec.batch.gradient_accumulation_steps != "auto":
        sizes["gradient_accumulation_steps"] = accumulation
    return change_spec(spec, batch=spec.batch.model_dump() | sizes).batch


def _illegal(spec: Spec, per_rank: int) -> list[Rejected]:
    """Micro-batches that do not divide a rank's sequences: the small ones, and the spec's own."""
    sizes = {*range(1, min(per_rank, MOST_REFUSED) + 1)}
    if isinstance(spec.batch.micro_batch_size, int):
        sizes.add(spec.batch.micro_batch_size)
    return [
        Rejected({"batch.micro_batch_size": size}, f"micro-batch {size} does not divide {per_rank} sequences per rank")
        for size in sorted(sizes)
        if per_rank % size
    ]


def changes_to(candidate: Spec, spec: Spec) -> dict[str, Any]:
    """The `--set` values, by dotted field, that make `candidate` of `spec`.

    A backend of another kind is set as a whole: fields that an earlier `--set` gave the old one would stay otherwise.
    """
    found: dict[str, Any] = {}
    before, after = spec.backend.model_dump(), candidate.backend.model_dump()
    if before["kind"] != after["kind"]:
        found["backend"] = candidate.backend.model_dump(exclude_defaults=True)
    else:
        found |= {f"backend.{name}": value for name, value in after.items() if before[name] != value}
    if spec.activation_checkpointing != candidate.activation_checkpointing:
        found["activation_checkpointing"] = candidate.activation_checkpointing
    return found | _batch_changes(spec.batch, candidate.batch)


def flags(changes: dict[str, Any]) -> list[str]:
    """`changes` as what stands behind `--set`."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


# ---------------------------------------------------------------- estimates


def _as_written(
    spec: Spec, cluster: Cluster, groups: tuple[Group, ...], usable: int | None
) -> tuple[Candidate | None, list[Rejected]]:
    """The spec as it stands; None, and where there is one the reason, if it cannot be estimated."""
    if spec.batch.micro_batch_size == "auto":
        return None, []
    try:
        plan = resolve_batch(spec, cluster.world_size)
        batches = {plan.micro_batch: spec.batch}
        return next(_candidates(spec, {}, batches, _estimates(spec, (batches, cluster, groups)), usable)), []
    except UserError as error:
        return None, [Rejected({}, str(error))]


Estimate = tuple[BatchPlan, MemoryEstimate, TimeEstimate]
Shared = tuple[dict[int, Batch], Cluster, tuple[Group, ...]]
"""Batches by micro-batch, the machine, the groups."""


def _estimates(structure: Spec, shared: Shared) -> Iterator[Estimate]:
    batches, cluster, groups = shared
    model: MemoryModel | None = None
    for batch in batches.values():
        spec = _with_batch(structure, batch)
        plan = resolve_batch(spec, cluster.world_size)
        rendered = render(spec, cluster.world_size)
        if model is None:
            model = MemoryModel(spec, groups, rendered, plan, cluster.gpu, cuda=not cluster.gpu.is_cpu)
        memory = model.at(plan.micro_batch, plan.accumulation)
        yield plan, memory, estimate_time(spec, plan, groups, rendered, cluster)


def _all_estimates(structure: Spec, shared: Shared) -> list[Estimate] | str:
    """One for each micro-batch, or why there are none."""
    try:
        return list(_estimates(structure, shared))
    except UserError as error:
        return str(error)


def _candidates(
    structure: Spec,
    changes: dict[str, Any],
    batches: dict[int, Batch],
    estimates: Iterable[Estimate],
    usable: int | None,
) -> Iterator[Candidate]:
    """Of one structure, one for each micro-batch."""
    for batch, (plan, memory, duration) in zip(batches.values(), estimates, strict=True):
        fits = None if usable is None else memory.high_bytes <= usable
        spec = _with_batch(structure, batch)
        yield Candidate(spec, plan, memory, duration, fits, changes | _batch_changes(structure.batch, batch))


def _with_batch(structure: Spec, batch: Batch) -> Spec:
    """Both parts are valid, and no rule joins them."""
    return structure.model_copy(update={"batch": batch})


def _batch_changes(before: Batch, after: Batch) -> dict[str, Any]:
    names = ("micro_batch_size", "gradient_accumulation_steps")
    return {f"batch.{name}": getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}


def _rank(candidate: Candidate) -> tuple[bool, float, int]:
    """What fits comes first, then by speed, then by memory; what does not fit by memory alone."""
    fails = candidate.fits is False
    return fails, 0.0 if fails else -(candidate.speed or 0.0), candidate.memory.high_bytes


def _pareto(ranked: Sequence[Candidate]) -> tuple[int, ...]:
    front: list[int] = []
    lean = math.inf
    for place, candidate in enumerate(ranked):  # fastest first, so each that is leaner than all before belongs to it
        if candidate.fits is False or candidate.speed is None:
            break
        if candidate.memory.device_used_bytes < lean:
            lean = candidate.memory.device_used_bytes
            front.append(place)
    return tuple(reversed(front))


# ---------------------------------------------------------------- reasons


def _explained(candidate: Candidate, fastest: Candidate | None, usable: int | None) -> Candidate:
    memory = candidate.memory
    needs = memory.high_bytes / GiB
    if usable is None:
        reason = f"{needs:.1f} GiB, {memory.peak_phase}; how much the card has is not known here"
    elif candidate.fits:
        reason = f"{needs:.1f} GiB of {usable / GiB:.1f}, {memory.peak_phase}"
    else:
        reason = (
            f"needs {needs:.1f} GiB in {memory.peak_phase}, {usable / GiB:.1f} usable: {largest_parts(memory.parts)}"
        )
    if memory.host_bytes:
        reason += f"; {memory.host_bytes / GiB:.1f} GiB of host memory"
    if candidate.fits is not False:
        reason += f"; {_pace(candidate, fastest)}"
    return Candidate(candidate.spec, candidate.plan, memory, candidate.time, candidate.fits, candidate.changes, reason)


def _pace(candidate: Candidate, fastest: Candidate | None) -> str:
    if candidate.speed is None:
        return "speed not known for this card"
    if fastest is None or fastest.speed is None:
        return f"{candidate.speed:,.0f} tokens/s per GPU predicted"
    slower = 1 - candidate.speed / fastest.speed
    if slower >= 0.005:
        return f"{slower:.0%} slower than the best".replace("%", " %")
    if slower >= 0:
        return "the fastest" if candidate is fastest else "as fast as the best"
    return f"{-slower:.0%} faster than the best".replace("%", " %")


def largest_parts(parts: dict[str, int], most: int = 4) -> str:
    """The largest parts of a memory peak, in GiB: "activations 40.2, logits 12.1, …"."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    shown = [f"{name} {size / GiB:.1f}" for name, size in ordered[:most] if size >= GiB / 20]
    return ", ".join(shown) + (", …" if len([size for _, size in ordered if size > 0]) > len(shown) else "")
