"""What each backend adds to the computation of a step: collectives, copies, the update, offloading.

Read in scaling/engine and in the libraries that it drives (torch 2.13, DeepSpeed 0.19.8):

    ddp      gradients averaged in fp32, in buckets of 25 MiB, while the last micro-step's backward pass goes on
    fsdp     parameters gathered in 16 bits, a block at a time, before its forward pass and, where it was freed after
             it, before its backward pass; gradients reduce-scattered in fp32 at every micro-step; with replicas, the
             shards of gradients all-reduced over them at the last. Frozen parameters that are kept whole are not
             gathered, here and at stage 3
    zero 1   in bf16 (bf16_optimizer.py): fp32 gradients of the whole model, all-reduced after the last backward pass
             in buckets of 5e8, nothing beside it. Elsewhere as stage 2, but at the last micro-step alone
    zero 2   (stage_1_and_2.py) buckets all-reduced in fp32 at every micro-step, beside the backward pass with
             `overlap_comm`. They are all-reduced whole, not reduce-scattered: `use_multi_rank_bucket_allreduce`
    zero 1, 2 after the update the 16-bit parameters are all-gathered, a group at a time, nothing beside it
    zero 3   (stage3.py) as fsdp, but gathered a module at a time; what is used again within `max_reuse_distance` is
             kept between forward and backward pass; gradients reduce-scattered in fp32 at every micro-step
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scaling.estimate.caching import cached
from scaling.estimate.collectives import Ring, ring
from scaling.estimate.compute import HOST_KERNEL_SECONDS, Passes
from scaling.estimate.flops import Block, Structure
from scaling.estimate.rates import Rates, host_rate
from scaling.hardware import Cluster
from scaling.inventory import blocks, parameters
from scaling.records import BatchPlan
from scaling.spec.sections import DDP, FSDP, PPO, Decoder, DeepSpeed, Lora, Model, Spec

OVERLAP_COST = 0.5
"""Of the time that communication runs beside computation, what the computation loses: it shares multiprocessors and
memory. Fitted on the rows that benchmarks/published.py lists, FITTED_ON."""
ADAM_BYTES = 28
"""A parameter's traffic in fused AdamW: fp32 parameter, gradient and two moments read, all but the gradient written."""
NORM_BYTES = 4
"""The same for the norm of the gradients."""
ZERO_BYTES = 22
"""What DeepSpeed's step adds: gradients unscaled and clipped in place (8), copied (8), parameters rounded (6)."""
HOST_MEMORY_BYTES_PER_S = 200e9
"""Of a node, which its ranks share. Engineering judgement: half of the peak of two sockets of eight DDR4 channels."""
PROCESS_MEMORY_BYTES_PER_S = 100e9
"""The most that one process gets of it: one socket's. Engineering judgement."""
NVME_BYTES_PER_S = 6e9
"""Of a node, shared too. Engineering judgement: two drives on four lanes of PCIe 4, at less than half of their peak."""
FSDP_HOOK_SECONDS = 250e-6
"""Host time of one unit's gathering or reducing in one pass. Engineering judgement: dozens of calls into torch."""
ZERO3_HOOK_SECONDS = 150e-6
"""Host time of one module's gathering and freeing in one pass. Engineering judgement: Python hooks before and after."""
FALLBACK_BUCKET = 500_000_000
"""Elements that bf16 at stage 1 all-reduces at a time: MEMORY_OPT_ALLREDUCE_SIZE in deepspeed/runtime/engine.py."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank, before its backend is looked at."""

    spec: Spec
    plan: BatchPlan
    rendered: dict[str, Any]
    cluster: Cluster
    work: Structure
    rates: Rates
    blocks: tuple[tuple[Block, int, Passes], ...]
    """Each kind of block, how many there are, and its time in one micro-step."""
    head: Passes
    frozen: frozenset[str] = frozenset()
    """Names of parameters that do not train."""

    def cut(self, elements: int, trained: int) -> int:
        """Of so many elements, of which some train, those that ranks which share parameters gather for use."""
        return elements if self.shards_frozen else trained

    @property
    def shards_frozen(self) -> bool:
        backend = self.spec.backend
        return not isinstance(backend, FSDP | DeepSpeed) or backend.shards_frozen

    @property
    def cut_elements(self) -> int:
        """Of the whole model."""
        return self.cut(self.work.elements, self.work.trained)

    @property
    def outside(self) -> int:
        """Elements outside of the blocks: embeddings, last norm, head."""
        return self.work.elements - sum(block.elements * count for block, count, _ in self.blocks)

    @property
    def outside_trained(self) -> int:
        """Those of them that train."""
        return self.work.trained - sum(block.trained * count for block, count, _ in self.blocks)

    @property
    def micro_seconds(self) -> float:
        """Computation of one micro-step."""
        blocks = sum(count * (p.forward.seconds + p.backward.seconds) for _, count, p in self.blocks)
        return blocks + self.head.forward.seconds + self.head.backward.seconds


@dataclass(frozen=True)
class Costs:
    """What a backend adds to a step; seconds unless it says bytes."""

    communication: float = 0.0
    """Exposed, and what computation loses to what is not."""
    copied_bytes: float = 0.0
    """Parameters and gradients cast, copied and added up in device memory."""
    update_bytes: float = 0.0
    """The optimizer's traffic in device memory."""
    offload: float = 0.0
    hooks: float = 0.0
    """Host time of one micro-step."""


def costs(step: Step) -> Costs:
    """Of the step's backend."""
    match step.spec.backend:
        case FSDP():
            return _fsdp(step, step.spec.backend)
        case DDP():
            return _ddp(step)
        case DeepSpeed() if step.spec.backend.zero_stage == 3:
            return _zero3(step, step.spec.backend)
        case DeepSpeed():
            return _zero12(step, step.spec.backend)
        case _:
            return Costs(
                copied_bytes=_whole_model_bytes(step), update_bytes=(ADAM_BYTES + NORM_BYTES) * step.work.trained
            )


def forward_costs(step: Step) -> Costs:
    """What the step's backend adds to one of many forward passes without gradients that follow each other."""
    width = step.rates.width
    match step.spec.backend:
        case FSDP() as backend:
            shard = step.rendered["mesh"]["dp_shard"]
            hooks = (sum(count for _, count, _ in step.blocks) + 2) * FSDP_HOOK_SECONDS
            if not backend.reshard_after_forward:  # gathered by the first of them
                return Costs(hooks=hooks)
            root = step.cut(step.outside, step.outside_trained)  # stays gathered, but for the head where it is apart
            head = step.cut(step.work.head.inputs * step.work.head.outputs, _head_and_embeddings(step)[0])
            outside = root - head if _head_apart(step) else 0
            exposed = _gathered_ahead(step, ring(step.cluster, shard), outside, 1, overlap=True)
            again = step.cut_elements - root + outside
            copied = 6 * again / shard + 2 * width * again
            offload = 4 * again / shard / host_rate(step.cluster.gpu) if backend.cpu_offload else 0.0
            return Costs(exposed, copied, 0.0, offload, hooks)
        case DeepSpeed() as backend if backend.zero_stage == 3:
            world, calls = step.plan.world_size, _calls(step)
            overlap = step.rendered["zero_optimization"]["overlap_comm"]
            outside = step.cut(step.outside, step.outside_trained)
            exposed = _gathered_ahead(step, ring(step.cluster, world), outside, calls, overlap=overlap)
            away = backend.offload_parameters is not None
            offload = width * step.cut_elements / world / host_rate(step.cluster.gpu) if away else 0.0
            hooks = calls * sum(count for _, count, _ in step.blocks) * ZERO3_HOOK_SECONDS
            return Costs(exposed, 2 * width * step.cut_elements, 0.0, offload, hooks)
        case DeepSpeed():
            return Costs()
        case _ if width == 4:
            return Costs()
        case _:  # every weight is cast where it is read
            casts = len(parameters(step.spec.model, step.spec.lora))
            return Costs(copied_bytes=6 * step.work.elements, hooks=HOST_KERNEL_SECONDS * casts)


def _gathered_ahead(step: Step, group: Ring, outside: int, calls: int, *, overlap: bool) -> float:
    """Exposed time of gathering the blocks, and `outside` elements beside them, in a forward pass."""
    width = step.rates.width
    exposed = group.gather(width * outside) if outside else 0.0
    for block, count, passes in step.blocks:
        if gathered := step.cut(block.elements, block.trained):
            exposed += count * beside(passes.forward.seconds * overlap, group.gather(width * gathered, calls))
    return exposed


def masters(step: Step) -> float:
    """Elements of the fp32 weights of a rank."""
    match step.spec.backend:
        case FSDP():
            return step.work.elements / step.rendered["mesh"]["dp_shard"]
        case DeepSpeed():
            return step.work.elements / step.plan.world_size
        case _:
            return float(step.work.elements)


def beside(computation: float, communication: float) -> float:
    """What `communication` that runs beside `computation` adds to its time."""
    return max(0.0, communication - computation) + OVERLAP_COST * min(communication, computation)


# ---------------------------------------------------------------- whole models


def _whole_model_bytes(step: Step) -> float:
    """Parameters in fp32 that are cast wherever they are read, gradients added up in fp32."""
    again = step.spec.activation_checkpointing == "full"
    steps, trained = step.plan.accumulation, step.work.trained
    added = 12 * trained * (steps - 1)
    if step.rates.width == 4:
        return float(added)
    blocks = step.work.elements - step.outside
    return float(added + steps * (6 * step.work.elements + 6 * blocks * again + 6 * trained))


def _ddp(step: Step) -> Costs:
    everyone = ring(step.cluster, step.plan.world_size)
    bucket = step.rendered["ddp"]["bucket_cap_mb"] * 2**20
    exposed = 0.0
    for block, count, passes in step.blocks:
        exposed += count * beside(passes.backward.seconds, _bucketed(everyone, 4 * block.trained, bucket))
    # Embeddings have their gradient last, the tied head's with them; an untied head's comes first.
    first, last = _head_and_embeddings(step)
    exposed += beside(step.head.backward.seconds, _bucketed(everyone, 4 * first, bucket))
    exposed += _bucketed(everyone, 4 * last, bucket)
    return Costs(
        communication=exposed,
        copied_bytes=_whole_model_bytes(step) + 8 * step.work.trained,
        update_bytes=(ADAM_BYTES + NORM_BYTES) * step.work.trained,
    )


def _bucketed(group: Ring, size: float, bucket: float) -> float:
    """An all-reduce of `size` bytes in messages of at most `bucket`, near enough."""
    return group.all_reduce(size, max(1, round(size / bucket))) if size else 0.0


def _head_and_embeddings(step: Step) -> tuple[int, int]:
    """Trained elements outside of the blocks: those whose gradients come first, and those whose come last."""
    head = step.work.head
    first = head.inputs * head.outputs if head.trains and _head_apart(step) else 0
    return first, step.outside_trained - first


def _head_apart(step: Step) -> bool:
    """Whether the output head is a large matrix of its own."""
    return isinstance(step.spec.model, Decoder) and not step.spec.model.tie_word_embeddings


# ---------------------------------------------------------------- FSDP2


def _fsdp(step: Step, backend: FSDP) -> Costs:
    shard = step.rendered["mesh"]["dp_shard"]
    group = ring(step.cluster, shard)
    replicas = ring(step.cluster, backend.replicate, shard)
    width, steps = step.rates.width, step.plan.accumulation
    freed = backend.reshard_after_forward

    def reduced(trained: int, *, last: bool) -> float:
        if not trained:
            return 0.0
        return group.gather(4 * trained) + (replicas.all_reduce(4 * trained / shard) if last else 0.0)

    def micro(*, last: bool) -> float:
        exposed = 0.0
        for block, count, passes in step.blocks:
            gathered = _gathered(group, width * step.cut(block.elements, block.trained))
            exposed += count * beside(passes.forward.seconds, gathered)
            if block.backward:
                again = gathered if freed else 0.0
                exposed += count * beside(passes.backward.seconds, again + reduced(block.trained, last=last))
        return exposed + _ends(step, group, lambda trained: reduced(trained, last=last))

    exposed = (steps - 1) * micro(last=False) + micro(last=True)
    share = step.work.trained / shard
    gathers = 1 + freed
    per_step = gathers * (6 * step.cut_elements / shard + 2 * width * step.cut_elements)
    per_step += (width + 4) * step.work.trained + 12 * share
    units = sum(count for block, count, _ in step.blocks if step.cut(block.elements, block.trained)) + 2
    hooks = 2 * units * FSDP_HOOK_SECONDS
    if not backend.cpu_offload:
        return Costs(exposed, steps * per_step, (ADAM_BYTES + NORM_BYTES) * share, 0.0, hooks)
    up, down = gathers * 4 * step.cut_elements / shard, 4 * share
    added = 12 * share / _host_memory(step) if steps > 1 else 0.0
    waits = steps * (_copies(step, up + down) + added)
    offload = waits + (ADAM_BYTES + NORM_BYTES) * share / _host_memory(step)
    return Costs(exposed, steps * per_step, 0.0, offload, hooks)


def _ends(step: Step, group: Ring, reduced: Callable[[int], float]) -> float:
    """Of one micro-step, what no block hides: the first gathering, of the embeddings and a block, and the last
    reduction, of the same; and the head's own beside its computation."""
    width = step.rates.width
    block = step.blocks[0][0]
    head = step.work.head
    first, last = _head_and_embeddings(step)
    apart = step.cut(head.inputs * head.outputs, first) if _head_apart(step) else 0
    exposed = _gathered(group, width * (step.cut(step.outside, step.outside_trained) - apart))
    exposed += _gathered(group, width * step.cut(block.elements, block.trained))
    exposed += reduced(last) + reduced(block.trained)
    if apart:
        seconds = step.head.forward.seconds + step.head.backward.seconds
        exposed += beside(seconds, _gathered(group, width * apart) + reduced(first))
    return exposed


def _gathered(group: Ring, size: float, calls: int = 1) -> float:
    return group.gather(size, calls) if size else 0.0


# ---------------------------------------------------------------- ZeRO 1 and 2


def _zero12(step: Step, backend: DeepSpeed) -> Costs:
    world, steps, trained, width = step.plan.world_size, step.plan.accumulation, step.work.trained, step.rates.width
    everyone = ring(step.cluster, world)
    share = trained / world
    gathered = everyone.gather(width * trained)
    offloaded = backend.offload_optimizer is not None
    if backend.zero_stage == 1 and step.spec.precision == "bf16" and not offloaded:
        reduced = _bucketed(everyone, 4 * trained, 4 * FALLBACK_BUCKET)
        copied = steps * (width + 8) * trained + 28 * trained
        return Costs(reduced + gathered, copied, (ADAM_BYTES + NORM_BYTES + ZERO_BYTES) * share)
    zero = step.rendered["zero_optimization"]
    reductions = steps if backend.zero_stage == 2 else 1
    reduced = _reduced_in_buckets(step, everyone, zero["reduce_bucket_size"], overlap=zero["overlap_comm"])
    copied = (reductions * 20 + (steps - reductions) * 3 * width) * trained
    exposed = reductions * reduced + gathered
    if not offloaded:
        return Costs(exposed, copied, (ADAM_BYTES + NORM_BYTES + ZERO_BYTES) * share)
    moved = (8 if steps > 1 else 4) * share
    waits = reductions * _copies(step, moved)
    return Costs(exposed, copied, 0.0, waits + _host_update(step, backend.offload_optimizer, share))


def _reduced_in_buckets(step: Step, group: Ring, bucket: int, *, overlap: bool) -> float:
    """Exposed time of all-reducing the gradients of one backward pass."""
    whole = _bucketed(group, 4 * step.work.trained, 4 * bucket)
    if not overlap:
        return whole
    last = _bucketed(group, 4 * min(bucket, step.work.trained), 4 * bucket)
    backward = step.head.backward.seconds + sum(count * p.backward.seconds for _, count, p in step.blocks)
    return last + beside(backward, whole - last)


# ---------------------------------------------------------------- ZeRO 3


def _zero3(step: Step, backend: DeepSpeed) -> Costs:
    world, steps, width = step.plan.world_size, step.plan.accumulation, step.rates.width
    zero = step.rendered["zero_optimization"]
    everyone = ring(step.cluster, world)
    near = zero["zero_hpz_partition_size"]
    again = ring(step.cluster, near) if near > 1 else everyone
    calls = _calls(step)
    overlap = zero["overlap_comm"]  # without it everything is on one stream
    # What is used again within the distance is kept: the blocks around the turn from forward to backward pass.
    kept = min(zero["stage3_max_reuse_distance"] / 2, zero["stage3_max_live_parameters"]) / step.cut_elements
    # What was freed after a module in sampling is freed there ever after (`unneeded` of deepspeed_engines.py).
    gathered_again = 1.0 if isinstance(step.spec.objective, PPO) else max(0.0, 1 - kept)

    def reduced(trained: int) -> float:
        bucket = max(1, round(trained / zero["reduce_bucket_size"]))
        return everyone.gather(4 * trained, bucket) if trained else 0.0

    exposed = _ends(step, everyone, reduced)
    for block, count, passes in step.blocks:
        size = width * step.cut(block.elements, block.trained)
        gathered = _gathered(everyone, size, calls)
        exposed += count * beside(passes.forward.seconds * overlap, gathered)
        if block.backward:
            back = gathered_again * _gathered(again, size, calls) + reduced(block.trained)
            exposed += count * beside(passes.backward.seconds * overlap, back)
    exposed *= steps
    share = step.work.trained / world
    copied = (1 + gathered_again) * 2 * width * step.cut_elements + (22 * step.work.trained + 12 * share)
    gathering = sum(count for block, count, _ in step.blocks if step.cut(block.elements, block.trained))
    hooks = 2 * calls * gathering * ZERO3_HOOK_SECONDS
    waits, update = 0.0, (ADAM_BYTES + NORM_BYTES + ZERO_BYTES) * share
    if backend.offload_parameters is not None:
        moved = (1 + gathered_again) * width * step.cut_elements / world
        waits += steps * _copies(step, moved, disk=backend.offload_parameters == "nvme")
    if backend.offload_optimizer is not None:
        waits += steps * _copies(step, (8 if steps > 1 else 4) * share)
        waits += _host_update(step, backend.offload_optimizer, share)
        update = 0.0
    return Costs(exposed, steps * copied, update, waits, hooks)


def _calls(step: Step) -> int:
    """Gatherings of a block: one where blocks, not their modules, are gathered."""
    at_once = step.spec.compile or step.spec.activation_checkpointing == "selective"
    whole = frozenset[str]() if step.shards_frozen else step.frozen
    return 1 if at_once else _modules(step.spec.model, step.spec.lora, whole)


@cached
def _modules(model: Model, lora: Lora | None, whole: frozenset[str]) -> int:
    """Modules in a block, the first that has any, with parameters of their own beside those that are whole anyway."""
    owners = {p.name.rpartition(".")[0] for p in parameters(model, lora) if p.name not in whole}
    counts = (sum(owner.startswith(f"{block}.") for owner in owners) for block in blocks(model))
    return next((count for count in counts if count), 0)


# ---------------------------------------------------------------- offloading


def _copies(step: Step, size: float, *, disk: bool = False) -> float:
    """Exposed time of `size` bytes between device and host in one micro-step, beside its computation."""
    rate = host_rate(step.cluster.gpu)
    seconds = size / rate
    if disk:
        seconds = max(seconds, size / (NVME_BYTES_PER_S / _local_ranks(step)))
    return max(0.0, seconds - step.micro_seconds)


def _host_update(step: Step, place: str | None, share: float) -> float:
    """DeepSpeed's update on the host, and the new parameters' way to the device; from and to disk for nvme."""
    rate = host_rate(step.cluster.gpu)
    seconds = (ADAM_BYTES + NORM_BYTES + ZERO_BYTES) * share / _host_memory(step) + 4 * share / rate
    if place == "nvme":  # master and moments there and back
        seconds += 2 * 12 * share / (NVME_BYTES_PER_S / _local_ranks(step))
    return seconds


def _host_memory(step: Step) -> float:
    return min(PROCESS_MEMORY_BYTES_PER_S, HOST_MEMORY_BYTES_PER_S / _local_ranks(step))


def _local_ranks(step: Step) -> int:
    return min(step.plan.world_size, step.cluster.gpus_per_node)
