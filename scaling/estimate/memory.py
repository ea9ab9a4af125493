"""Memory of one rank for any micro-batch, from a few played steps.

All sizes in a step grow evenly with the micro-batch, and with the number of blocks where blocks are alike. So steps of
three and of four blocks say what each moment of a deep one holds, and sizes that are written as bytes + bytes for each
sequence (PER_SEQUENCE) say it for every micro-batch: a line. The peak is the highest of these lines.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from scaling.estimate.decoder import CHUNK_ELEMENTS
from scaling.estimate.deepspeed_engines import ZeRO3
from scaling.estimate.ops import FLOAT
from scaling.estimate.policy import answers_bytes, rollout_bytes
from scaling.estimate.results import MemoryEstimate
from scaling.estimate.step import OWN, Cast, batch_sizes, play
from scaling.estimate.tape import Tape
from scaling.groups import Group
from scaling.hardware import GPU
from scaling.inventory import parameters
from scaling.records import BatchPlan
from scaling.render import render
from scaling.spec.sections import PPO, Decoder, Spec, in_chunks
from scaling.units import GiB

PER_SEQUENCE = 2**64
"""The micro-batch that is played: large enough for a whole number to hold two, what is there in any case and what comes
with each sequence. All that is done to sizes (sums, multiples, exact shares) is done to both."""
BLOCKS = (3, 4)
"""Numbers of blocks that are played for more; the second is the first and one."""

PHASES = ("build", "rollout", "forward", "backward", "optimizer")
"""Whose peaks are told."""

FRAGMENTS_LOW, FRAGMENTS, FRAGMENTS_HIGH = 1.03, 1.06, 1.09
"""Reserved over allocated where memory is short. SimuMax's published pairs on nearly full cards are 1.03 to 1.09; where
the allocator has room to spare it takes up to 1.25, and gives it back when it must. With 1.12 for the highest, two of
the published runs that fitted (gt0194, gt0217 of benchmarks/published) were said not to."""
CONTEXT_BYTES = round(0.5 * GiB)
"""The CUDA context and its modules. Engineering judgement: 0.3 to 0.6 GiB are reported for current drivers."""
COMMUNICATOR_BYTES = round(0.67 * GiB)
"""Each NCCL communicator: 688 MB on 4 A100 (NVIDIA/nccl#964); 544 MB with 2 ranks."""
MATMUL_WORKSPACE_BYTES = 2 * 32 * 2**20
"""cuBLAS on Hopper, allocated like tensors: 32 MiB for each thread that multiplies, forward and backward (torch,
aten/src/ATen/cuda/CublasHandlePool.cpp); 8 MiB on other cards."""


@dataclass(frozen=True)
class _Moment:
    """One change on each of the played tapes: what is alive after it."""

    base: int
    """Bytes whatever the micro-batch."""
    slope: int
    """Bytes more for each sequence."""
    places: tuple[int, ...]
    """Changes before it, on each tape."""
    phase: str

    def at(self, micro_batch: int) -> int:
        """Bytes for this micro-batch."""
        return self.base + self.slope * micro_batch


class MemoryModel:
    """Memory of one structure: everything but micro-batch and accumulation is fixed."""

    def __init__(
        self,
        spec: Spec,
        groups: Sequence[Group],
        rendered: dict[str, Any],
        plan: BatchPlan,
        gpu: GPU | None,
        *,
        cuda: bool = True,
        cast: Cast = OWN,
    ) -> None:
        """Without `cuda` it is that of live tensors on a CPU, with nothing around."""
        self._cuda = cuda
        self._spec, self._groups, self._rendered, self._plan, self._gpu = spec, groups, rendered, plan, gpu
        self._cast = cast
        self._curves: dict[tuple[int, int], _Curve] = {}
        self._checkpoint_bytes = checkpoint_bytes(spec, groups)

    def at(self, micro_batch: int, accumulation: int) -> MemoryEstimate:
        """With so many sequences at a time, so many times a step."""
        curve, plan = self._curve(micro_batch, accumulation), self._plan_of(micro_batch, accumulation)
        batch, host = sum(batch_sizes(self._spec, plan, cuda=self._cuda)), 0
        beside = {"build": 0, "rollout": batch}
        if isinstance(objective := self._spec.objective, PPO):
            host = rollout_bytes(objective, plan)
            batch += 0 if self._cuda else host  # where host and device are one
            beside["rollout"] = batch + answers_bytes(objective, plan)
        phase, parts, phases = curve.peak(micro_batch, batch, beside)
        return self._estimate(sum(parts.values()), phase, parts, phases, curve.host_bytes + host)

    def exactly(self, plan: BatchPlan) -> MemoryEstimate:
        """Every micro-step and block of a plan, played."""
        tape = play(self._spec, plan, self._groups, self._rendered, cuda=self._cuda, cast=self._cast)
        peak = tape.peak
        phases = {phase: found.bytes for phase, found in tape.peaks.items()}
        return self._estimate(peak.bytes, peak.phase, peak.parts, phases, tape.host_bytes)

    def _curve(self, micro_batch: int, accumulation: int) -> "_Curve":
        """Played once for each way in which steps differ: by micro-steps and by chunks of the loss."""
        kind = self._micro_steps(accumulation), self._chunks(micro_batch)
        if kind not in self._curves:
            self._curves[kind] = _Curve(_Played(self._spec, self._groups, self._plan, *kind, self._cuda, self._cast))
        return self._curves[kind]

    def _micro_steps(self, accumulation: int) -> int:
        """How many are played for so many."""
        engine = self._cast.engine_for(self._spec)
        if engine is ZeRO3 and accumulation == 1 and self._persistent_share < 1e-3:
            return engine.micro_steps  # they differ in when the parameters that persist are gathered first
        # After rollouts the first pass is in an order that is not expected, the second is noted down, the third known.
        noted = engine is ZeRO3 and isinstance(self._spec.objective, PPO)
        return min(accumulation, engine.micro_steps + noted)

    @cached_property
    def _persistent_share(self) -> float:
        """Of the elements that ZeRO-3 cuts, those that it never cuts again."""
        limit = self._rendered["zero_optimization"]["stage3_param_persistence_threshold"]
        cut = self._spec.backend.shards_frozen
        whole = {name for group in self._groups if group.frozen and not cut for name in group.names}
        sizes = [p.elements for p in parameters(self._spec.model, self._spec.lora) if p.name not in whole]
        return sum(size for size in sizes if size <= limit) / sum(sizes)

    def _chunks(self, micro_batch: int) -> int:
        """Of the loss; 3 for more."""
        model = self._spec.model
        if not isinstance(model, Decoder) or not in_chunks(self._spec.objective):
            return 1
        rows = max(1, CHUNK_ELEMENTS // model.vocab_size)
        return min(3, -(-micro_batch * self._plan.sequence_length // rows))

    def _plan_of(self, micro_batch: int, accumulation: int) -> BatchPlan:
        ranks = self._plan.world_size
        whole = micro_batch * accumulation * ranks
        return BatchPlan(whole, micro_batch, accumulation, ranks, self._plan.sequence_length)

    def _estimate(
        self, allocated: int, phase: str, parts: dict[str, int], phases: dict[str, int], host: int
    ) -> MemoryEstimate:
        phases = {name: phases[name] for name in PHASES if name in phases}
        saving = {
            "staging_bytes": -(-self._checkpoint_bytes // self._plan.world_size),
            "checkpoint_bytes": self._checkpoint_bytes,
        }
        if not self._cuda:
            parts = dict(sorted(parts.items()))
            return MemoryEstimate(allocated, allocated, allocated, allocated, allocated, phase, parts, phases, **saving)
        workspace = MATMUL_WORKSPACE_BYTES // (1 if _is_wide(self._gpu) else 4)
        parts["workspace"] = parts.get("workspace", 0) + workspace
        allocated += workspace
        around = CONTEXT_BYTES + COMMUNICATOR_BYTES * self._communicators()
        low, usual, high = (round(factor * allocated) for factor in (FRAGMENTS_LOW, FRAGMENTS, FRAGMENTS_HIGH))
        return MemoryEstimate(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=usual,
            device_used_bytes=usual + around,
            low_bytes=low + around,
            high_bytes=high + around,
            peak_phase=phase,
            parts=dict(sorted(parts.items())),
            phases={name: size + workspace for name, size in phases.items()},
            host_bytes=host,
            **saving,
        )

    def _communicators(self) -> int:
        """Groups of NCCL that a rank is in."""
        replicas = self._rendered.get("mesh", {}).get("dp_replicate", 1)
        return 0 if self._plan.world_size == 1 else 1 + (replicas > 1)


def checkpoint_bytes(spec: Spec, groups: Sequence[Group]) -> int:
    """The tensors of a checkpoint: fp32 masters, and two moments of what trains. Each rank writes an equal share."""
    if spec.checkpoint is None:
        return 0
    return sum(FLOAT * (1 if group.frozen else 3) * group.parameters for group in groups)


class _Curve:
    """The peak over the micro-batch."""

    def __init__(self, played: "_Played") -> None:
        model = played.spec.model
        layers = model.num_hidden_layers if isinstance(model, Decoder) else 0  # of others all are played
        grows = (
            layers > BLOCKS[1] and _alike(played.groups, layers) and played.cast.engine_for(played.spec).blocks_alike
        )
        self._layers, self._blocks = layers, BLOCKS if grows else (layers, layers)
        self._tapes = [played.tape(count) for count in dict.fromkeys(self._blocks)]
        self.host_bytes = self._grown([tape.host_bytes for tape in self._tapes])
        by_phase: dict[str, list[_Moment]] = {}
        for moment in self._all():
            by_phase.setdefault(moment.phase, []).append(moment)
        self._moments = {phase: _highest(moments) for phase, moments in by_phase.items()}
        self._parts: dict[tuple[int, ...], list[dict[str, int]]] = {}

    def peak(
        self, micro_batch: int, batch: int, beside: Mapping[str, int]
    ) -> tuple[str, dict[str, int], dict[str, int]]:
        """Phase, bytes by part, and the peak of each phase. The batch, of so many bytes, is there all the time, but for
        phases of which `beside` says what is there."""
        tops = {phase: max(of, key=lambda moment: moment.at(micro_batch)) for phase, of in self._moments.items()}
        phases = {phase: top.at(micro_batch) + beside.get(phase, batch) for phase, top in tops.items()}
        phase = max(phases, key=phases.__getitem__)
        top, batch = tops[phase], beside.get(phase, batch)
        if top.places not in self._parts:
            self._parts[top.places] = [tape.parts(place) for tape, place in zip(self._tapes, top.places, strict=True)]
        found = self._parts[top.places]
        parts: dict[str, int] = {}
        for category in sorted({name for part in found for name in part}):
            base, slope = _both(self._grown([part.get(category, 0) for part in found]))
            if size := base + slope * micro_batch:
                parts[category] = size
        if batch:
            parts["activations"] = parts.get("activations", 0) + batch
        return phase, parts, phases

    def _grown(self, values: Sequence[int]) -> int:
        """From the played numbers of blocks to the real one."""
        if len(values) == 1:
            return values[0]
        fewer, more = values
        return more + (more - fewer) * (self._layers - self._blocks[1])  # the second is one more than the first

    def _all(self) -> Iterator[_Moment]:
        """Moments that are the highest of their stretch of the step, for some micro-batch."""
        totals = [list(accumulate(tape.changes, initial=0)) for tape in self._tapes]
        runs = [_runs(tape) for tape in self._tapes]
        for tracks in zip(*runs, strict=True):
            phase = tracks[0][0]
            for segments in _aligned([segments for _, segments in tracks]):
                starts, columns = _columns(segments, totals)
                summits = _summits(columns[0])
                lines = [_both(self._grown([column[index] for column in columns])) for index in summits]
                for top in _tops(lines):
                    yield _Moment(*lines[top], tuple(start + summits[top] for start in starts), phase)


@dataclass(frozen=True)
class _Played:
    """Steps to play of one structure."""

    spec: Spec
    groups: Sequence[Group]
    plan: BatchPlan
    accumulation: int
    chunks: int
    cuda: bool
    cast: Cast

    def tape(self, blocks: int) -> Tape:
        """A step with so many blocks."""
        ranks, micro = self.plan.world_size, PER_SEQUENCE
        cut = BatchPlan(micro * self.accumulation * ranks, micro, self.accumulation, ranks, self.plan.sequence_length)
        sizes = {"global_batch_size": cut.global_batch, "global_batch_tokens": None, "micro_batch_size": micro}
        batch = self.spec.batch.model_copy(update={**sizes, "gradient_accumulation_steps": "auto"})
        small, kept = self.spec.model_copy(update={"batch": batch}), list(self.groups)
        if isinstance(self.spec.model, Decoder):
            model = self.spec.model.model_copy(update={"num_hidden_layers": blocks})
            small = small.model_copy(update={"model": model})
            kept = [replace(group, names=tuple(n for n in group.names if _within(n, blocks))) for group in self.groups]
            kept = [group for group in kept if group.names]
        return play(small, cut, kept, render(small, ranks), cuda=self.cuda, rough=self.chunks, cast=self.cast)


def _within(name: str, blocks: int) -> bool:
    first, _, rest = name.partition(".")
    return first != "layers" or int(rest.split(".")[0]) < blocks


def _alike(groups: Sequence[Group], layers: int) -> bool:
    """Whether all blocks have the same parameters in the same groups."""
    found: list[set[tuple[int, str]]] = [set() for _ in range(layers)]
    for index, group in enumerate(groups):
        for name in group.names:
            first, _, rest = name.partition(".")
            if first == "layers":
                block, _, own = rest.partition(".")
                found[int(block)].add((index, own))
    return all(block == found[0] for block in found)


def _runs(tape: Tape) -> list[tuple[str, list[tuple[int, int]]]]:
    """Stretches of one phase, each as its segments between marks: (first change, one past the last)."""
    found: list[tuple[str, list[tuple[int, int]]]] = []
    ends = [*(start for start, _ in tape.marks[1:]), len(tape.changes)]
    for (start, phase), end in zip(tape.marks, ends, strict=True):
        if not found or found[-1][0] != phase:
            found.append((phase, []))
        found[-1][1].append((start, end))
    return found


def _aligned(tracks: Sequence[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
    """Segments that belong together: where tapes differ in blocks, those as far from the start, or from the end."""
    if len(tracks) == 1:
        yield [(tracks[0][0][0], tracks[0][-1][1])]
        return
    fewest = min(len(track) for track in tracks)
    if all(len(track) == fewest for track in tracks):
        yield from (list(together) for together in zip(*tracks, strict=True))
        return
    half = fewest // 2
    for place in range(half + 1):
        yield [track[place] for track in tracks]
    for place in range(-(fewest - half), 0):
        yield [track[place] for track in tracks]


def _columns(segments: Sequence[tuple[int, int]], totals: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Where segments begin, and what is alive on each tape from there on; where they differ in length, at the highest
    of each alone.
    """
    columns = [total[start : end + 1] for (start, end), total in zip(segments, totals, strict=True)]
    starts = [start for start, _ in segments]
    if len({len(column) for column in columns}) == 1:
        return starts, columns
    highest = [max(column) for column in columns]
    starts = [start + column.index(top) for start, column, top in zip(starts, columns, highest, strict=True)]
    return starts, [[top] for top in highest]


def _summits(column: Sequence[int]) -> list[int]:
    """Places that are no lower than those before and after: after something was made, before something is freed."""
    last = len(column) - 1
    return [
        place
        for place, here in enumerate(column)
        if (not place or column[place - 1] <= here) and (place == last or column[place + 1] <= here)
    ]


def _tops(lines: Sequence[tuple[int, int]]) -> list[int]:
    """Which lines, given by base and slope, are the highest for some micro-batch of one or more, from the flattest to
    the steepest; of equal ones the first. (Andrew's monotone chain, for the upper envelope of lines.)
    """
    hull: list[int] = []
    for index in sorted(range(len(lines)), key=lambda index: (lines[index][1], sum(lines[index]), -index)):
        while hull and not _stays([lines[one] for one in hull[-2:]], lines[index]):
            hull.pop()
        hull.append(index)
    return hull


def _stays(hull: Sequence[tuple[int, int]], steeper: tuple[int, int]) -> bool:
    """Whether the last of one or two lines is ever the highest when a steeper one comes to them."""
    (base, slope), (last_base, last_slope) = steeper, hull[-1]
    if base + slope >= last_base + last_slope:  # higher from the start
        return False
    first_base, first_slope = hull[0]
    # Higher than the first from later on than the last is.
    later = (first_base - base) * (last_slope - first_slope) > (first_base - last_base) * (slope - first_slope)
    return len(hull) == 1 or later


def _both(size: int) -> tuple[int, int]:
    """Bytes in any case, and for each sequence, of a size of a played tape."""
    slope = (size + PER_SEQUENCE // 2) // PER_SEQUENCE
    return size - slope * PER_SEQUENCE, slope


def _highest(moments: Sequence[_Moment]) -> list[_Moment]:
    """Those that are the highest for some micro-batch."""
    return [moments[index] for index in _tops([(moment.base, moment.slope) for moment in moments])]


def _is_wide(gpu: GPU | None) -> bool:
    """Hopper and newer, by their peak."""
    return gpu is not None and (gpu.bf16_flops or 0) > 700e12
