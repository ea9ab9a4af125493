"""What DeepSpeed 0.19's ZeRO optimizers hold, as their sources allocate: runtime/zero/stage_1_and_2.py and others."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from scaling.estimate.ops import FLOAT, Ops
from scaling.estimate.tape import Leaf, Node, Refilled, Storage, Tape, Value
from scaling.estimate.torch_engines import Single, whole_frozen
from scaling.groups import Group
from scaling.inventory import ADAPTERS, Parameter, adapted_layers, block_finder, tied
from scaling.records import BatchPlan
from scaling.spec.sections import PPO, Spec

DOUBLE = 8
"""Bytes of an element in which norms are taken: `get_norm_dtype`."""
ALIGNMENT = 2
"""Elements times ranks that a flat group is a multiple of: `nccl_start_alignment_factor`."""


class _Hooked(Leaf):
    """A parameter whose gradient DeepSpeed takes over when it is there."""

    __slots__ = ("elements", "group", "hook", "offset", "sum")

    def __init__(self, tape: Tape, hook: Any, elements: int) -> None:
        super().__init__(tape, category=None)
        self.hook = hook
        self.elements = elements
        self.group = self.offset = 0
        """Its optimizer group, and where it lies in that one's flat tensor."""
        self.sum: Storage | None = None
        """In fp32, of several micro-steps."""

    def take(self, gradients: list[Storage]) -> None:
        super().take(gradients)
        assert self.grad is not None
        born = self.grad.born
        self.hook(self)
        if self.grad is not None and self.grad.born == born and self.grad.category == "workspace":
            self.grad.rename("gradients")  # it stays what it is


class _Group:
    """One optimizer group, flat."""

    def __init__(self, ops: Ops, elements: int, ranks: int, *, offloaded: bool) -> None:
        self.elements = -(-elements // (ALIGNMENT * ranks)) * ALIGNMENT * ranks
        self.partition = self.elements // ranks
        self.offloaded = offloaded
        self.flat = ops.new(self.elements, category="parameters")
        self.state = [ops.held(self.partition, FLOAT, "optimizer", on_host=offloaded)]
        if offloaded:  # gradients for the update, and what goes back in the compute type
            for width in (FLOAT, ops.shape.width):
                self.state.append(ops.held(self.partition, width, "communication", on_host=True))
        self.averaged: list[Storage] = []
        """This rank's part of the gradient."""

    def make_moments(self, ops: Ops) -> None:
        """Adam's, and the count of its steps."""
        counts = (self.partition, self.partition, 1)
        self.state += [ops.held(count, FLOAT, "optimizer", on_host=self.offloaded) for count in counts]


class _Flat(Single):
    """Stages 1 and 2: whole parameters in the compute type, fp32 masters and moments of this rank's part.

    Parameters that train are parts of one tensor for each group, frozen ones as they are.
    """

    casts_where_read = writes_grad = False

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        self.ranks = plan.world_size
        self.trained = [group for group in groups if not group.frozen]
        self.flats: list[_Group] = []
        self.host: list[Storage] = []
        """Masters of what is frozen, and places for gradients on their way."""
        self.last = True
        super().__init__(ops, spec, groups, rendered, plan)

    def leaf(self, parameter: Parameter) -> Leaf:
        return _Hooked(self.tape, self.arrived, parameter.elements)

    def arrived(self, leaf: _Hooked) -> None:
        """A parameter has its gradient of a micro-step."""
        raise NotImplementedError

    def build(self) -> None:
        sizes = {parameter.name: parameter.elements for parameter in self.parameters}
        made = [Storage(self.tape, self.width * size) for size in sizes.values()]  # the model, before it is flat
        self.fill()
        del made
        for index, group in enumerate(self.trained):
            elements = sum(sizes[name] for name in group.names)
            flat = _Group(self.ops, elements, self.ranks, offloaded=self.offloads)
            self.flats.append(flat)
            offset = 0
            for name in group.names:
                leaf = self.leaves[name]
                assert isinstance(leaf, _Hooked)
                leaf.group, leaf.offset = index, offset
                offset += sizes[name]
                self.values[name] = Value(flat.flat, sizes[name], leaf)
        for name, size in sizes.items():
            if name not in self.values:
                self.values[name], masters = whole_frozen(self.ops, size, self.ranks)
                self.host += masters
        if self.offloads:
            largest = max(sizes[name] for group in self.trained for name in group.names)
            for on_host in (True, False):
                self.host.append(self.ops.held(largest, self.width, "communication", on_host=on_host))
        self.make_gradients()
        if self.width != FLOAT:  # for the masters, once more
            self.fill()
        for flat in self.flats:
            flat.make_moments(self.ops)

    def make_gradients(self) -> None:
        """Those that are there from the start."""

    def masters(self) -> list[int]:
        cut = self.ranks if self.width != FLOAT else 1
        found = [p.elements // cut for p in self.parameters if p.name not in self.leaves]
        for leaf in self.leaves.values():
            assert isinstance(leaf, _Hooked)
            found.append(max(0, min(leaf.elements, self.flats[leaf.group].partition - leaf.offset)))
        return [count for count in found if count]

    def read(self, name: str) -> Value:
        return self.values[name]

    def begin(self, *, last: bool) -> None:
        self.last = last


class ZeRO12(_Flat):
    """Stages 1 and 2 as runtime/zero/stage_1_and_2.py has them: gradients reduced bucket by bucket."""

    blocks_alike = False

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        zero = rendered["zero_optimization"]
        self.stage: int = zero["stage"]
        self.bucket_elements: int = zero["reduce_bucket_size"]
        self.overlaps: bool = zero["overlap_comm"]
        self.buffers: list[Storage] = []
        self.current = self.filled = 0
        self.waiting: list[_Hooked] = []
        self.in_partition: Storage | None = None
        self.accumulation = plan.accumulation
        super().__init__(ops, spec, groups, rendered, plan)
        self.accumulates = self.stage == 1 and self.width != FLOAT
        """`use_grad_accum_attribute`: fp32 gradients of whole parameters."""
        self.buffer_width = FLOAT if self.accumulates else self.width

    def make_gradients(self) -> None:
        if self.stage == 2 and self.offloads and not self.compact and self.accumulation > 1:  # of earlier micro-steps
            total = sum(leaf.elements for leaf in self.leaves_here())
            self.host.append(self.ops.held(total, FLOAT, "gradients", on_host=True))

    @property
    def compact(self) -> bool:
        """Whether reduced gradients go straight to an fp32 tensor of this rank's part."""
        return self.width != FLOAT

    def arrived(self, leaf: _Hooked) -> None:
        """`process_gradients`: into the bucket, which is reduced when it is full."""
        if not self.buffers:
            count = self.buffer_width * self.bucket_elements
            self.buffers = [Storage(self.tape, count, "communication") for _ in range(1 + self.overlaps)]
            self.current = 0
        if self.accumulates:
            exact = Storage(self.tape, FLOAT * leaf.elements, "gradients")
            leaf.grad, leaf.sum = None, leaf.sum or exact
            del exact
        if self.stage == 2 or (self.last and self.overlaps):
            self.into_bucket(leaf)

    def into_bucket(self, leaf: _Hooked) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        if self.filled + leaf.elements > self.bucket_elements:
            self.reduce()
            self.current = (self.current + 1) % len(self.buffers)
        if leaf.elements <= self.bucket_elements:
            leaf.grad, leaf.sum = self.buffers[self.current], None
        elif self.offloads:  # what autograd may use again is left alone
            leaf.grad = Storage(self.tape, self.buffer_width * leaf.elements, "gradients")
            leaf.sum = None
        self.filled += leaf.elements
        self.waiting.append(leaf)

    def reduce(self) -> None:
        """`reduce_ipg_grads`."""
        self.average()
        for leaf in self.waiting:
            here = min(leaf.elements, self.flats[leaf.group].partition - leaf.offset)
            if here <= 0:  # rank 0 updates no part of it
                leaf.grad = leaf.grad if self.stage == 1 else None
            elif self.offloads:
                if self.compact and self.last:  # to the host, its norm taken before
                    exact = Storage(self.tape, DOUBLE * here, "gradients")
                    leaf.grad = None
                    del exact
            elif not self.compact:
                if self.in_partition is None:
                    total = sum(leaf.elements for leaf in self.leaves_here())
                    self.in_partition = Storage(self.tape, FLOAT * total, "gradients")
                leaf.grad = self.in_partition
        self.waiting, self.filled = [], 0

    def average(self) -> None:
        """`average_tensor`: slices by the rank that wants them, flattened into one and, in 16 bits, cast."""
        slices: list[int] = []
        for count in self.slices():
            slices.append(count)
            if sum(slices) > self.bucket_elements:
                self.all_reduce(slices)
                slices = []
        if slices:
            self.all_reduce(slices)

    def slices(self) -> list[int]:
        """Elements of each part of the bucket that one rank wants; neighbours are one unless they are for rank 0."""
        found: list[int] = []
        before = -1
        for leaf in self.waiting:
            group = self.flats[leaf.group]
            start, end = leaf.offset, leaf.offset + leaf.elements
            while start < end:
                rank = start // group.partition
                count = min(end, group.partition * (rank + 1)) - start
                if rank == 0 and self.compact and not group.averaged:
                    group.averaged = [Storage(self.tape, FLOAT * group.partition, "gradients")]
                if rank == before and not (rank == 0 and self.compact):
                    found[-1] += count
                else:
                    found.append(count)
                before, start = rank, start + count
        return found

    def all_reduce(self, slices: Sequence[int]) -> None:
        """`allreduce_bucket`; one tensor alone is not copied."""
        total = sum(slices)
        flat = Storage(self.tape, self.buffer_width * total, "communication") if len(slices) > 1 else None
        cast = Storage(self.tape, FLOAT * total, "communication") if self.buffer_width != FLOAT else None
        del flat, cast

    def leaves_here(self) -> Iterator[_Hooked]:
        """Parameters of which rank 0 updates a part."""
        for leaf in self.leaves.values():
            assert isinstance(leaf, _Hooked)
            if leaf.offset < self.flats[leaf.group].partition:
                yield leaf

    def end(self) -> None:
        """`independent_gradient_partition_epilogue`, at stage 1 after the last micro-step alone."""
        if self.stage == 1 and not self.last:
            return
        if self.stage == 1 and not self.overlaps:
            for flat in range(len(self.flats)):
                for leaf in self.leaves.values():
                    assert isinstance(leaf, _Hooked)
                    if leaf.group == flat and (leaf.grad or leaf.sum):
                        self.into_bucket(leaf)
        self.reduce()
        if not self.compact:
            for flat in self.flats:
                if self.in_partition is not None and not flat.averaged:
                    flat.averaged = [self.in_partition]
        self.in_partition, self.buffers = None, []
        for leaf in self.leaves.values():
            assert isinstance(leaf, _Hooked)
            leaf.grad = leaf.sum = None

    def step(self) -> None:
        """The norm, of each gradient in fp64; then group by group a flat gradient and the update."""
        if self.offloads:
            for flat in self.flats:
                flat.averaged = []
            return
        norms: list[Storage] = []
        for leaf in self.leaves_here():
            count = min(leaf.elements, self.flats[leaf.group].partition - leaf.offset)
            exact = Storage(self.tape, DOUBLE * count)
            norms.append(Storage(self.tape, DOUBLE))
            del exact
        del norms
        for flat in self.flats:
            gradient = flat.averaged if self.compact else [Storage(self.tape, FLOAT * flat.partition, "gradients")]
            flat.averaged = []
            del gradient


class BF16(_Flat):
    """Stage 1 in bf16 without offload, runtime/bf16_optimizer.py: whole fp32 gradients, from the start."""

    ALL_REDUCE_ELEMENTS = 500_000_000
    """`MEMORY_OPT_ALLREDUCE_SIZE` of runtime/engine.py."""

    def make_gradients(self) -> None:
        self.held_gradients = [Storage(self.tape, FLOAT * flat.elements, "gradients") for flat in self.flats]

    def arrived(self, leaf: _Hooked) -> None:
        """`accumulate_hp_grads_and_remove_lp`."""
        cast = Storage(self.tape, FLOAT * leaf.elements)
        leaf.grad = None
        del cast

    def end(self) -> None:
        """`allreduce_no_retain`: the flat gradients of some groups, flattened once more unless one is alone."""
        if not self.last:
            return
        bucket: list[int] = []
        for flat in self.flats:
            bucket.append(flat.elements)
            if sum(bucket) > self.ALL_REDUCE_ELEMENTS or flat is self.flats[-1]:
                joined = Storage(self.tape, FLOAT * sum(bucket), "communication") if len(bucket) > 1 else None
                bucket = []
                del joined

    def step(self) -> None:
        """The norm of each gradient; all else is in place."""
        norms = [Storage(self.tape, FLOAT) for _ in self.leaves]
        del norms


class _Handle:
    """A gathering under way, and what it gathers into when that is not the parameters themselves."""

    def __init__(self, names: Sequence[str], flat: Storage | None) -> None:
        self.names = names
        self.flat = flat
        self.done = False


class ZeRO3(Single):
    """Stage 3: everything cut; parameters gathered module by module, some ahead of use.

    As partitioned_param_coordinator.py, partition_parameters.py and stage3.py of runtime/zero have it. `place` numbers
    the modules as a pass enters them, backward ones included.
    """

    blocks_alike = casts_where_read = writes_grad = False

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        # The first pass knows nothing of what comes; parameters last into the next.
        self.steps = 3 if not ops.rough else 2 if plan.accumulation == 1 else 1
        if isinstance(spec.objective, PPO):  # nor what follows upon sampling, which is another order of modules
            self.steps += 2 if plan.accumulation == 1 else 1
        self.ranks = plan.world_size
        self.zero: dict[str, Any] = rendered["zero_optimization"]
        ops.zero3_linear = self.zero["memory_efficient_linear"]
        self.checks_overflow = spec.precision != "fp32"
        self.shards_frozen = spec.backend.shards_frozen
        self.trained = [group for group in groups if not group.frozen]
        self.sizes: dict[str, int] = {}
        self.whole: dict[str, Storage] = {}
        self.modules: dict[str, list[str]] = {}
        """Names of its own parameters, those that are cut, for each module that has any."""
        self.persistent: set[str] = set()
        self.users: dict[str, set[str]] = {}
        """Modules at work on a parameter."""
        self.active: dict[str, list[str]] = {}
        """Modules in their backward pass, the latest last, each with frozen parameters that recomputation gathered
        meanwhile: they stay as long."""
        self.ready: set[str] = set()
        self.flying: dict[str, _Handle] = {}
        self.trace: list[str] = []
        """Modules in the order of a pass; known after the first."""
        self.recording = self.recorded = False
        self.answers: dict[tuple[str, int], list[str]] = {}
        """What is freed after a module, by its place in a pass."""
        self.uses: dict[str, list[int]] = {}
        """Where in the trace each parameter is used."""
        self.passed: list[int] = []
        """Elements of all modules before each place."""
        self.queue: deque[tuple[str, int]] = deque()
        self.fetched_for: dict[str, int] = {}
        self.place = self.available = 0
        self.waiting: list[_Hooked] = []
        self.filled = 0
        self.tied = tied(spec.model)
        self.block_of = block_finder(spec.model)
        self.adapted = adapted_layers(spec.model, spec.lora) if spec.lora else {}
        """Linear layers with an adapter: what has their weights is a module inside."""
        self.leaf_modules = spec.compile or spec.activation_checkpointing == "selective"
        self.asked: list[Value] = []
        """Inputs of blocks that a gradient is asked for (`_ask_for_gradient` of the engine): what the loop calls `loss`
        keeps them and their gradients until there is another loss."""
        self.asked_before: list[Value] = []
        """Those of the micro-step before."""
        super().__init__(ops, spec, groups, rendered, plan)

    def leaf(self, parameter: Parameter) -> Leaf:
        return _Hooked(self.tape, self.arrived, parameter.elements)

    def part(self, name: str) -> int:
        """Elements of a parameter on a rank, padding included."""
        return -(-self.sizes[name] // self.ranks)

    def build(self) -> None:
        self.held_state: list[Storage] = []
        for parameter in self.parameters:
            name = parameter.name
            if name not in self.leaves and not self.shards_frozen:
                self.values[name], masters = whole_frozen(self.ops, parameter.elements, self.ranks)
                self.held_state += masters
                continue
            self.sizes[name] = parameter.elements
            self.modules.setdefault(self.owner(name), []).append(name)
            self.users[name] = set()
            self.whole[name] = Refilled(self.tape, "communication", trained=name in self.leaves)
            if parameter.elements <= self.zero["stage3_param_persistence_threshold"]:
                self.persistent.add(name)
        for first, *others in self.tied:
            for other in others if first in self.sizes else ():
                self.modules.setdefault(other.rpartition(".")[0], []).append(first)
        self.sub_groups: list[int] = []
        for group in self.trained:
            count = 0
            for name in group.names:
                count += self.part(name)
                if count >= self.zero["sub_group_size"] or name == group.names[-1]:
                    self.sub_groups.append(count)
                    count = 0
        total, held = sum(self.sub_groups), self.ops.held
        self.asking = {self.block_of(name) for name in self.leaves} - {None} if self.leaf_modules else set[str | None]()
        """Blocks that ask for a gradient of their input."""
        away, offloads = "offload_param" in self.zero, self.offloads
        self.held_state.append(held(total, self.width, "parameters", on_host=away))
        for name in self.sizes.keys() - self.leaves.keys():
            self.held_state.append(held(self.part(name), self.width, "parameters", on_host=away))
            if self.width != FLOAT:
                self.held_state.append(held(self.part(name), FLOAT, "optimizer", on_host=True))
        for count in self.sub_groups:
            sizes = (count, count, count, 1)
            self.held_state += [held(size, FLOAT, "optimizer", on_host=offloads) for size in sizes]
            if offloads:  # the update's gradients
                self.held_state.append(held(count, FLOAT, "communication", on_host=True))
        self.held_state.append(held(total, FLOAT, "gradients", on_host=offloads))
        self.held_state.append(Storage(self.tape, FLOAT * self.zero["reduce_bucket_size"], "communication"))
        self.fetch_persistent()

    def owner(self, name: str) -> str:
        """The module whose hooks gather a parameter: its own, or its block where blocks are gathered whole."""
        if self.leaf_modules and (block := self.block_of(name)):
            return block
        module = name.rpartition(".")[0]
        last = module.rpartition(".")[2]
        return f"{module}.base_layer" if module in self.adapted else f"{module}.default" if last in ADAPTERS else module

    def read(self, name: str) -> Value:
        if name not in self.sizes:
            return self.values[name]
        return Value(self.whole[name], self.sizes[name], self.leaves.get(name))

    # ------------------------------------------------------------ gathering

    def hooked(self, module: str) -> bool:
        """All modules are, with parameters of their own or not, but for those within a leaf module."""
        return not (self.leaf_modules and self.block_of(module) not in (None, module))

    def enter(self, module: str, value: Value | None) -> Value | None:
        if not module:
            self.begin_pass()
        return value if not (found := self.enter_all(module, [value] if value else [])) else found[0]

    def enter_all(self, module: str, values: Sequence[Value]) -> list[Value]:
        if not self.hooked(module):
            return list(values)
        self.fetch(module)
        if module in self.asking and not values[0].node:  # of its first input, whatever the others want
            first, *others = values
            first = Value(first.storage, first.elements, Leaf(self.tape, category=None))
            self.asked.append(first)
            values = [first, *others]
        coming = sum(value.node is not None for value in values)

        def run(gradient: Storage, _: list[Storage]) -> list[Storage]:
            nonlocal coming
            coming -= 1
            if not coming:
                self.release(module, backward=True)
            return [gradient]

        return [
            Value(value.storage, value.elements, Node(self.tape, [value.node], [], run)) if value.node else value
            for value in values
        ]

    def leave(self, module: str, value: Value) -> Value:
        if not self.hooked(module):
            return value
        if not module:
            self.asked_before = []
        self.release(module)
        if value.node is None:
            return value

        def run(gradient: Storage, _: list[Storage]) -> list[Storage]:
            self.active[module] = []
            self.fetch(module)
            return [gradient]

        return Value(value.storage, value.elements, Node(self.tape, [value.node], [], run))

    def begin(self, *, last: bool) -> None:
        self.asked_before, self.asked = self.asked, []

    def begin_pass(self) -> None:
        """`reset_step`: what is still under way ends, and the queue of parameters to come begins anew."""
        for name in list(self.flying):
            self.wait(name)
            self.free(name)
        if self.recording:
            self.record()
        self.recording = not self.recorded
        names = self.modules
        self.queue = deque((name, step) for step, module in enumerate(self.trace) for name in names.get(module, ()))
        self.fetched_for = {}
        self.place = self.available = 0

    def record(self) -> None:
        """The order of modules is known: where each is used, and how many elements pass before."""
        self.recorded = True
        self.uses = {}
        for place, module in enumerate(self.trace):
            for name in self.modules.get(module, ()):
                self.uses.setdefault(name, []).append(place)
        counts = (sum(self.sizes[name] for name in self.modules.get(module, ())) for module in self.trace)
        self.passed = list(accumulate(counts, initial=0))

    def forget_order(self) -> None:
        """`_invalidate_trace`: this is another kind of pass; the next one is noted down."""
        self.recorded = False
        self.trace, self.fetched_for = [], {}
        self.queue.clear()
        for name in list(self.flying):
            self.wait(name)
            if not self.users[name]:
                self.free(name)

    def soon(self, name: str) -> bool:
        """Whether a parameter is used again before so many elements have passed."""
        uses = self.uses[name]
        index = bisect_left(uses, self.place)
        if index == len(uses):
            return False
        return self.passed[uses[index]] - self.passed[self.place] < self.zero["stage3_max_reuse_distance"]

    def fetch(self, module: str) -> None:
        """`fetch_sub_module`."""
        if self.recorded and self.trace[self.place : self.place + 1] != [module]:
            self.forget_order()
        if self.recording:
            self.trace.append(module)
        names = self.modules.get(module, [])
        self.gather([name for name in names if name not in self.ready and name not in self.flying])
        recomputes = self.ops.repeats or (self.ops.frame is not None and self.ops.frame.repeats)
        owner = next(reversed(self.active), None) if recomputes else None
        for name in names:
            self.users[name].add(module)
            if owner is not None and name not in self.leaves:
                self.users[name].add(owner)
                self.active[owner].append(name)
            if name in self.flying:
                self.wait(name)
        if self.recorded:
            self.take_from_queue(names)
            self.prefetch()
        self.place += 1

    def take_from_queue(self, names: Sequence[str]) -> None:
        """Parameters of the module at work are not to come any more."""
        missing = {name for name in names if self.fetched_for.get(name, -1) < self.place}
        seen: set[str] = set()
        while self.queue and len(seen) < len(missing):
            name, step = self.queue.popleft()
            self.fetched_for[name] = step
            seen.add(name)

    def prefetch(self) -> None:
        """Parameters that come next, as many elements as allowed."""
        most = min(self.zero["stage3_max_live_parameters"] - self.available, self.zero["stage3_prefetch_bucket_size"])
        names: list[str] = []
        count = 0
        while self.queue and count < most:
            name, step = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, -1), step)
            if name not in self.ready and name not in self.flying and name not in names:
                names.append(name)
                count += self.sizes[name]
        self.gather(names)

    def gather(self, names: Sequence[str]) -> None:
        """`all_gather_coalesced`: one straight into its place, several by way of a flat tensor."""
        if not names:
            return
        self.available += sum(self.sizes[name] for name in names)
        flat = None
        if self.ranks > 1 and len(names) > 1:
            count = self.ranks * sum(self.part(name) for name in names)
            flat = Storage(self.tape, self.width * count, "communication")
        elif self.ranks > 1:
            self.whole[names[0]].resize(self.width * self.part(names[0]) * self.ranks)
        handle = _Handle(names, flat)
        for name in names:
            self.flying[name] = handle

    def wait(self, name: str) -> None:
        """All that came together is copied to its places; the flat tensor goes with the last that asks."""
        handle = self.flying.pop(name)
        if handle.done:
            return
        if handle.flat is not None:
            for other in handle.names:
                self.whole[other].resize(self.width * self.sizes[other])
        handle.done = True
        self.ready.update(handle.names)

    def release(self, module: str, *, backward: bool = False) -> None:
        """`release_sub_module`: free what no other module uses, and none will soon."""
        names = self.modules.get(module, [])
        for name in names:
            self.users[name].discard(module)
        for name in self.unneeded(module) if self.recorded else names:
            if name in self.ready and not self.users[name]:
                self.free(name)
        if backward:
            self.release_recomputed(module)

    def unneeded(self, module: str) -> list[str]:
        """`__params_to_release`. It remembers its answers for ever, also where the order of modules has become another:
        what was freed after a module in sampling is freed there in training too, however soon it is used again."""
        if (module, self.place) not in self.answers:
            self.answers[module, self.place] = [
                name
                for name in self.modules.get(module, ())
                if name not in self.persistent and self.fetched_for.get(name, -1) <= self.place and not self.soon(name)
            ]
        return self.answers[module, self.place]

    def release_recomputed(self, module: str) -> None:
        """What has stayed for a module whose backward pass is done."""
        for name in self.active.pop(module, ()):
            self.users[name].discard(module)
            if name in self.ready and name not in self.persistent and not self.users[name]:
                self.free(name)

    def free(self, name: str) -> None:
        """Cut again."""
        if name in self.ready:
            self.ready.remove(name)
            self.available -= self.sizes[name]
        self.whole[name].resize(0)

    def fetch_persistent(self) -> None:
        """`persistent_parameters[0].all_gather`: before the first pass and after each update."""
        names = [name for name in self.sizes if name in self.persistent and name not in self.ready]
        for name in names:
            if self.ranks > 1:
                self.whole[name].resize(self.width * self.part(name) * self.ranks)
            self.ready.add(name)

    def masters(self) -> list[int]:
        return [self.part(parameter.name) for parameter in self.parameters]

    def refresh(self) -> None:
        """`release_and_reset_all`, and the persistent ones once more."""
        for name in self.sizes:
            if name in self.flying:
                self.wait(name)
            self.users[name].clear()
            self.free(name)
        self.fetch_persistent()

    # ------------------------------------------------------------ gradients

    def arrived(self, leaf: _Hooked) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        if self.filled and self.filled + leaf.elements > self.zero["reduce_bucket_size"]:
            self.reduce()
        if self.filled + leaf.elements <= self.zero["reduce_bucket_size"]:
            leaf.grad = self.held_state[-1]
        self.waiting.append(leaf)
        self.filled += leaf.elements

    def reduce(self) -> None:
        """`__avg_scatter_grads` and `partition_grads`."""
        if not self.waiting:
            return
        bucket = self.held_state[-1]
        casts = [
            Storage(self.tape, FLOAT * leaf.elements, "communication")
            for leaf in self.waiting
            if leaf.grad is not bucket and self.width != FLOAT
        ]
        padded = sum(-(-leaf.elements // self.ranks) * self.ranks for leaf in self.waiting)
        alone = len(self.waiting) == 1 and padded == self.waiting[0].elements
        flat = None if alone else Storage(self.tape, FLOAT * padded, "communication")
        del casts, flat
        for leaf in self.waiting:
            leaf.grad = None
        self.waiting, self.filled = [], 0

    def end(self) -> None:
        self.reduce()
        # Modules whose inputs took no gradient are released now (`release_backward_leftovers`).
        for module in reversed(list(self.active)):
            self.release_recomputed(module)
        for module in self.modules:
            for name in self.modules[module]:
                self.users[name].discard(module)
                if name in self.ready and name not in self.persistent and not self.users[name]:
                    self.free(name)

    def step(self) -> None:
        """Sub-group by sub-group a flat gradient and the update."""
        for name in list(self.ready):
            self.free(name)
        if self.checks_overflow:
            found = Storage(self.tape, sum(self.sub_groups))
            del found
        for count in self.sub_groups:
            gradient = None if self.offloads else Storage(self.tape, FLOAT * count, "gradients")
            del gradient
        self.fetch_persistent()
        self.asked = []
