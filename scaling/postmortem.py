"""What is found out when memory has run out: what was asked, what was held, where the prediction was off, what fits.

Pure: facts in, JSON and text out. `scaling.profile.stock` collects the facts, `scaling.train` writes RUN/oom.json.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from scaling.batch import resolve_batch
from scaling.errors import UserError
from scaling.estimate.memory import FRAGMENTS, FRAGMENTS_HIGH, MemoryModel
from scaling.estimate.report import memory_report, run_report
from scaling.estimate.results import MemoryEstimate
from scaling.estimate.search import (
    CHECKPOINTING,
    Candidate,
    changes_to,
    cut_batch,
    flags,
    micro_batches,
    search,
    sequences_per_rank,
    structures,
)
from scaling.groups import Group
from scaling.hardware import GPU, Cluster, gpu_from_device_name
from scaling.host_memory import ADDRESS_SPACE, COPY_BYTES
from scaling.records import BatchPlan
from scaling.render import render
from scaling.spec import Spec
from scaling.summarize import at
from scaling.units import format_bytes
from scaling.watch.exhausted import COPY, REST, Exhausted

SCHEMA_VERSION = 1
GPU_SPARE = FRAGMENTS_HIGH / FRAGMENTS - 1
"""Share of a card that a suggestion leaves free, beyond what is predicted to be reserved: the planner's own band."""
HOLES = 1.2
"""Host memory that is lost beside each byte of activations: blocks of some MiB, freed out of order, leave holes in the
C library's heap. Where the first step had 226 MiB for tensors, the second had 98 MiB: 128 MiB were lost beside 134 MiB
of predicted activations, 0.96. A quarter more is engineering judgement, since it varies from run to run."""
_FIXED = ("parameters", "gradients", "optimizer")
"""Categories that are counted by themselves; all others are counted together."""
_WORDS = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer states", REST: REST}
_PLACES = {"build": "while the model was built", "restore": "while the checkpoint was restored"}


@dataclass(frozen=True)
class Case:
    """A run whose memory has run out."""

    spec: Spec
    plan: BatchPlan
    groups: Sequence[Group]
    rendered: dict[str, Any]
    device_name: str
    """As the driver calls it; "cpu"."""
    ranks_per_node: int
    place: str
    """"build", "restore", "first_step", "step", "validation" or "save"."""
    step: int | None
    rank: int
    device: str
    """torch's name of it, as "cuda:0"."""
    exhausted: Exhausted

    @property
    def on_gpu(self) -> bool:
        """Whether the rank computes on a GPU."""
        return self.device_name != "cpu"

    @property
    def of_host(self) -> bool:
        """Whether host memory ran out."""
        # Saving takes no memory of the device: what it pins is the host's.
        return self.exhausted.of_host or not self.on_gpu or self.place == "save"


@dataclass(frozen=True)
class _Option:
    """A spec with the same global batch."""

    changes: dict[str, Any]
    plan: BatchPlan
    memory: MemoryEstimate
    mode: str
    tokens_per_s: float | None

    @property
    def worth(self) -> tuple[float, int]:
        """By how fast it is; where that is not known by its micro-batch."""
        return self.tokens_per_s or 0.0, self.plan.micro_batch


def place_of(phase: str, stage: str) -> str:
    """The place, from the phase of the heartbeat and from what the process was at outside of steps."""
    return {"startup": stage, "closing": "save"}.get(phase, phase)


def facts(case: Case) -> dict[str, Any]:
    """oom.json, as far as it needs no arithmetic: what remains where that fails."""
    exhausted, held = case.exhausted, case.exhausted.held
    return {
        "schema_version": SCHEMA_VERSION,
        "place": case.place,
        "step": case.step,
        "rank": case.rank,
        "device": case.device,
        "of_host": case.of_host,
        "asked_bytes": exhausted.asked_bytes,
        "message": exhausted.message,
        "held": {
            "allocated_bytes": held.allocated_bytes,
            "reserved_bytes": held.reserved_bytes,
            "host_rss_bytes": held.host_rss_bytes,
            "limit_bytes": held.limit_bytes,
            "limit": held.limit_name,
            "free_bytes": held.free_bytes,
            "parts": held.parts,
        },
        "predicted": None,
        "off_by": "",
        "suggestions": [],
    }


def post_mortem(case: Case) -> dict[str, Any]:
    """oom.json."""
    estimate = _estimate(case)
    predicted = estimate["memory"]
    found = suggestions(case, estimate)
    return facts(case) | {"predicted": predicted, "off_by": off_by(case, predicted), "suggestions": found}


def _estimate(case: Case) -> dict[str, Any]:
    """plan.json."""
    return run_report(case.spec, case.plan, case.groups, case.rendered, case.device_name, case.ranks_per_node)


# ---------------------------------------------------------------- where the prediction was off


def off_by(case: Case, predicted: dict[str, Any]) -> str:
    """One sentence: what was predicted, what was held, and what the difference is."""
    held, asked = case.exhausted.held, case.exhausted.asked_bytes or 0
    if case.on_gpu and case.of_host:
        host = predicted["host_bytes"] + predicted["staging_bytes"]
        resident = "" if held.host_rss_bytes is None else f", {format_bytes(held.host_rss_bytes)} were resident"
        return f"predicted {format_bytes(host)} of host memory for this rank's state and its copy{resident}"
    peak, copy, taken = predicted["peak_allocated_bytes"], _copy(case, predicted), _held(case, predicted)
    more = f" when {format_bytes(asked)} more were asked for" if asked else ""
    beside = f" and {format_bytes(copy)} for the copy that is saved" if copy else ""
    told = f"predicted {format_bytes(peak)} in {predicted['peak_phase']}{beside}, held {format_bytes(taken)}{more}"
    if taken + asked > 1.02 * (peak + copy) and held.parts:
        return f"{told}: {_excess(held.parts, asked, predicted['parts'], copy)}"
    reserved = (held.reserved_bytes or 0) - (held.allocated_bytes or 0)
    if reserved > max(asked, 0.1 * (held.reserved_bytes or 0)):
        return (
            f"{told}: {format_bytes(reserved)} more were reserved in pieces too small to serve; set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True"
        )
    room = _capacity(case, predicted)
    if _needs(case, predicted) > room:
        return f"{told}: it was predicted not to fit in the {format_bytes(room)} that tensors could have"
    return f"{told}: what lacks is held by what is no tensor of this run, such as libraries and other processes"


def _excess(parts: dict[str, int], asked: int, predicted: dict[str, int], copy: int) -> str:
    """The category that is furthest above what was predicted."""
    expected = {name: predicted.get(name, 0) for name in _FIXED}
    expected[REST] = sum(size for name, size in predicted.items() if name not in _FIXED)
    found = parts | {REST: parts.get(REST, 0) + asked}
    if not parts.get(COPY):  # what is asked for may be the copy itself
        expected[REST] += copy
    name = max(expected, key=lambda name: found.get(name, 0) - expected[name])
    have, word = found.get(name, 0), _WORDS[name]
    if expected[name] < have / 100:
        return f"{word} of {format_bytes(have)} were not predicted"
    return f"{word} are {have / expected[name]:.1f} x what was predicted"


# ---------------------------------------------------------------- what fits


def suggestions(case: Case, estimate: dict[str, Any]) -> list[dict[str, Any]]:
    """The nearest specs that are predicted to fit, corrected by what was seen: the best of those that only cut the
    batch otherwise; then of those that checkpoint otherwise, and of those on other backends, if they are better yet.
    `estimate`: plan.json.
    """
    predicted = estimate["memory"]
    needed, factor, room = _needs(case, predicted), _factor(case, predicted), _capacity(case, predicted)
    if case.on_gpu:
        room *= 1 - GPU_SPARE
    best: dict[int, _Option] = {}
    with suppress(UserError):  # where nothing can be estimated there is nothing to suggest
        for option in _options(case):
            memory, tier = memory_report(option.memory), _tier(option.changes)
            need = _needs(case, memory)
            if need < needed and factor * need + _holes(case, memory) <= room and _fits_device(case, option):
                best[tier] = min(best.get(tier, option), option, key=lambda one: _preference(one, case))
    speed = at(estimate, "time", "tokens_per_second_per_gpu")
    kept: list[_Option] = []
    for _, option in sorted(best.items()):
        if all(option.worth > other.worth for other in kept):
            kept.append(option)
    return [_suggestion(case, option, factor, speed) for option in kept]


def _needs(case: Case, memory: dict[str, Any]) -> int:
    """Bytes that are predicted to be taken of the memory that ran out."""
    if not case.on_gpu:
        return memory["peak_allocated_bytes"] + _copy(case, memory)
    return memory["host_bytes"] + memory["staging_bytes"] if case.of_host else memory["peak_reserved_bytes"]


def _holes(case: Case, memory: dict[str, Any]) -> float:
    """Bytes of the host's memory that nothing can have: what stays for the whole run leaves no holes."""
    if case.on_gpu:
        return 0.0
    return HOLES * sum(size for name, size in memory["parts"].items() if name not in _FIXED)


def _copy(case: Case, memory: dict[str, Any]) -> int:
    """On a CPU, what the copy that is saved takes beside the step: whole pieces of the address space."""
    size = 0 if case.on_gpu else memory["staging_bytes"]
    return -(-size // COPY_BYTES) * COPY_BYTES if case.exhausted.held.limit_name == ADDRESS_SPACE else size


def _held(case: Case, predicted: dict[str, Any]) -> int:
    """What tensors held of the device; of the copy that is saved as much as is in use."""
    held = case.exhausted.held
    copy = held.parts.get(COPY, 0)
    return held.bytes - copy + min(copy, _copy(case, predicted))


def _factor(case: Case, predicted: dict[str, Any]) -> float:
    """By how much more than predicted is taken, from what was seen: at least 1, since the peak may not be reached."""
    if case.on_gpu and case.of_host:
        return 1.0  # what is resident is mostly not this run's tensors
    taken = case.exhausted.held.reserved_bytes or 0 if case.on_gpu else _held(case, predicted)
    return max(1.0, (taken + (case.exhausted.asked_bytes or 0)) / max(1, _needs(case, predicted)))


def _capacity(case: Case, predicted: dict[str, Any]) -> float:
    """Bytes of the memory that ran out which tensors can have."""
    held, asked = case.exhausted.held, case.exhausted.asked_bytes
    if case.on_gpu and case.of_host:
        return _needs(case, predicted) - (asked or 1)
    if case.on_gpu:
        return held.limit_bytes or held.reserved_bytes or 0
    free = held.free_bytes or 0
    # Where the system says that there is room for what it refused, it is not to be believed.
    return _held(case, predicted) + (free if asked is None or free < asked else 0)


def _fits_device(case: Case, option: "_Option") -> bool:
    """Whether the device has room too, where it was the host that had not."""
    limit = case.exhausted.held.limit_bytes
    return not (case.on_gpu and case.of_host and limit) or option.memory.peak_reserved_bytes <= limit


def _options(case: Case) -> Iterator[_Option]:
    """All ways to run the spec with the same global batch on as many ranks, with no larger micro-batch."""
    gpu, world_size = gpu_from_device_name(case.device_name), case.plan.world_size
    per_node = case.ranks_per_node if case.ranks_per_node and not world_size % case.ranks_per_node else world_size
    nodes, rest = divmod(world_size, per_node)
    assert not rest, (world_size, per_node)
    if gpu is not None:
        options: Iterator[_Option] = map(_option, search(case.spec, Cluster(nodes, per_node, gpu), margin=0).candidates)
    else:
        options = _untimed(case, Cluster(nodes, per_node, _unknown(case.device_name)))
    yield from (option for option in options if option.plan.micro_batch <= case.plan.micro_batch)


def _option(candidate: Candidate) -> _Option:
    return _Option(
        candidate.changes,
        candidate.plan,
        candidate.memory,
        candidate.spec.activation_checkpointing,
        candidate.speed,
    )


def _untimed(case: Case, cluster: Cluster) -> Iterator[_Option]:
    """The same where nothing is known of the device's speed; on a CPU nothing can be put on the host."""
    for structure, changes in structures(case.spec, cluster, []):
        places = structure.backend.model_dump()
        if not case.on_gpu and any(places[name] for name in places if "offload" in name) and changes:
            continue
        with suppress(UserError):  # this one cannot be estimated
            yield from _cut(case, structure, cluster.world_size)


def _cut(case: Case, structure: Spec, world_size: int) -> list[_Option]:
    """One structure with each micro-batch up to the one that did not fit."""
    per_rank, found = sequences_per_rank(case.spec, world_size), []
    model: MemoryModel | None = None
    for micro in (one for one in micro_batches(per_rank) if one <= case.plan.micro_batch):
        spec = structure.model_copy(update={"batch": cut_batch(case.spec, micro, per_rank)})
        plan = resolve_batch(spec, world_size)
        if model is None:
            rendered = render(spec, world_size)
            model = MemoryModel(spec, case.groups, rendered, plan, None, cuda=case.on_gpu)
        memory = model.at(plan.micro_batch, plan.accumulation)
        found.append(_Option(changes_to(spec, case.spec), plan, memory, spec.activation_checkpointing, None))
    return found


def _unknown(name: str) -> GPU:
    return GPU(name, (), None, None, None, None, None, None, None, None)


def _tier(changes: dict[str, Any]) -> int:
    if any(name.partition(".")[0] == "backend" for name in changes):
        return 2
    return 1 if "activation_checkpointing" in changes else 0


def _preference(option: _Option, case: Case) -> tuple[float, int, int, int]:
    """The smaller the better: the fastest; where speed is not known the largest micro-batch, what is made again last,
    then what changes least. Another backend is to make what is made again now."""
    again = CHECKPOINTING.index(option.mode)
    own = CHECKPOINTING.index(case.spec.activation_checkpointing)
    if _tier(option.changes) == 2:
        again = abs(again - own)
        return -(option.tokens_per_s or 0.0), again, -option.plan.micro_batch, len(option.changes)
    return -(option.tokens_per_s or 0.0), -option.plan.micro_batch, again, len(option.changes)


def _suggestion(case: Case, option: _Option, factor: float, speed: float | None) -> dict[str, Any]:
    """`speed`: of the spec as it is, tokens per second and GPU."""
    need = round(factor * _needs(case, memory_report(option.memory)))
    slower = 1 - option.tokens_per_s / speed if speed and option.tokens_per_s else None
    command = command_of(option.changes)
    return {
        "set": option.changes,
        "command": command,
        "predicted_bytes": need,
        "slower": slower,
        "sentence": f"`{command}`: {format_bytes(need)} predicted{_pace(slower)}",
    }


def command_of(changes: dict[str, Any]) -> str:
    """`changes` as a shell takes them: "--set a.b=1 --set c=full"."""
    return " ".join(f"--set {shlex.quote(flag)}" for flag in flags(changes))


def _pace(slower: float | None) -> str:
    if slower is None:
        return ""
    if abs(slower) < 0.005:
        return ", as fast"
    return f", about {abs(slower):.0%} {'slower' if slower > 0 else 'faster'}".replace("%", " %")


# ---------------------------------------------------------------- the message


def message(case: Case, found: dict[str, Any]) -> str:
    """What the user is told: `found` is the case's post-mortem."""
    asked, held = case.exhausted.asked_bytes, case.exhausted.held
    told = [found["off_by"] or f"{format_bytes(asked or 0)} more were asked for"]
    if not asked or not found["off_by"]:
        told.append(case.exhausted.message[:200])
    if parts := sorted(((size, name) for name, size in held.parts.items() if size), reverse=True):
        told.append("held were " + ", ".join(f"{name} {format_bytes(size)}" for size, name in parts))
    if held.limit_bytes is not None and held.free_bytes is not None:
        told.append(
            f"of {held.limit_name} ({format_bytes(held.limit_bytes)}) {format_bytes(held.free_bytes)} were free"
        )
    ways = [suggestion["sentence"] for suggestion in found["suggestions"]]
    advice = f"what fits with the same global batch: {'; or '.join(ways)}" if ways else _OTHERWISE
    return f"{_subject(case)} ({'; '.join(told)}); {advice}"


def _subject(case: Case) -> str:
    where = f"{case.device}, {_words(case)}"
    if case.place == "save":
        return f"`checkpoint` must find host memory for a copy of the state, but there is too little for {where}"
    if case.place in _PLACES:
        return f"`model` must fit in memory with its optimizer, but does not on {where}"
    return f"`batch.micro_batch_size` must be one that fits in memory, but {case.plan.micro_batch} does not on {where}"


def _words(case: Case) -> str:
    step = case.step or 0
    if case.place in ("validation", "save"):
        return f"in {case.place} after step {step}" if step else f"in {case.place}"
    return _PLACES.get(case.place, f"in step {step}")


_OTHERWISE = (
    "nothing with the same global batch is predicted to fit on these ranks: start more of them with a `backend` that "
    'cuts the state over them ("fsdp", "deepspeed"), or shorten the sequences'
)
