"""What scaling/engine/torch_engine.py holds: one process, and FSDP2 as torch 2.13 gathers, frees and reduces.

Sources: torch/distributed/fsdp/_fully_shard (_fsdp_param_group.py, _fsdp_collectives.py, _fsdp_state.py).
"""

from collections.abc import Sequence
from typing import Any

from scaling.estimate.ops import FLOAT, Ops
from scaling.estimate.tape import Leaf, Node, Storage, Tape, Value, together
from scaling.groups import Group
from scaling.inventory import Parameter, parameters
from scaling.records import BatchPlan
from scaling.spec.sections import Spec


class Single:
    """The whole model in fp32; in 16 bits each parameter is cast where it is read."""

    casts_where_read = True
    """In 16 bits; others hold what they gather in the compute type."""
    steps = 1
    """After so many all steps are alike."""
    blocks_alike = True
    """Blocks do the same whatever their number: nothing is done when so many elements have come."""
    writes_grad = True
    """As `Ops.writes_grad`, on a CPU."""
    micro_steps = 2
    """After so many, more of them change nothing: the last that is played stands for all later ones."""

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        self.ops = ops
        self.tape = ops.tape
        ops.writes_grad = self.writes_grad and not ops.cuda
        self.width = ops.shape.width
        self.rendered = rendered
        self.offloads = "offload_optimizer" in rendered.get("zero_optimization", {}) or bool(
            rendered.get("cpu_offload")
        )
        """Adam's state, and what it works on, are in host memory."""
        frozen = {name for group in groups if group.frozen for name in group.names}
        self.parameters = parameters(spec.model, spec.lora)
        self.leaves = {p.name: self.leaf(p) for p in self.parameters if p.name not in frozen}
        self._state: list[Storage] = []
        self.values: dict[str, Value] = {}
        with self.tape.during("build", "parameters"):
            self.build()
        ops.read = self.read

    def leaf(self, parameter: Parameter) -> Leaf:
        """What takes the gradient of a parameter that trains."""
        return Leaf(self.tape)

    def build(self) -> None:
        """Parameters, and Adam's state of those that train."""
        for parameter in self.parameters:
            self.values[parameter.name] = self.resident(parameter)
        self.fill()
        held = self.ops.held
        for value in self.values.values():
            if value.node is not None:
                sizes = (value.elements, value.elements, 1)
                self._state += [held(size, FLOAT, "optimizer", on_host=self.offloads) for size in sizes]

    def resident(self, parameter: Parameter) -> Value:
        """A parameter as this rank has it throughout."""
        count = self.held(parameter)
        storage = self.ops.held(count, FLOAT, "parameters", on_host=self.offloads)
        return Value(storage, count, self.leaves.get(parameter.name))

    def fill(self) -> None:
        """Initial values, each made whole on the host, where the one before is let go when the next is there."""
        value = None
        for parameter in () if self.ops.cuda else self.parameters:
            value = Storage(self.tape, FLOAT * parameter.elements, "other")
        del value

    def held(self, parameter: Parameter) -> int:
        """Elements of a parameter on this rank."""
        return parameter.elements

    def read(self, name: str) -> Value:
        """The parameter in the compute type: itself, or a copy whose gradient is cast back."""
        value = self.values[name]
        if self.width == FLOAT:
            return value
        return self.ops.cast(value, self.width, FLOAT)

    def enter(self, module: str, value: Value | None) -> Value | None:
        """Before a module."""
        return value

    def enter_all(self, module: str, values: Sequence[Value]) -> list[Value]:
        """Before a module that is given several tensors."""
        return list(values)

    def leave(self, module: str, value: Value) -> Value:
        """After a module."""
        return value

    def masters(self) -> list[int]:
        """Elements of each fp32 weight of this rank, as `Engine.state` lists them."""
        return [self.held(parameter) for parameter in self.parameters]

    def refresh(self) -> None:
        """Once the masters were written to (`Engine.loading`)."""

    def begin(self, *, last: bool) -> None:
        """Before a micro-step."""

    def end(self) -> None:
        """After its backward pass."""

    def gradients(self) -> list[Storage]:
        """What the optimizer gets."""
        return [leaf.grad for leaf in self.leaves.values() if leaf.grad is not None]

    def step(self) -> None:
        """The norm of each gradient and of all; the fused kernel works in place."""
        norms = [Storage(self.tape, FLOAT) for _ in self.leaves]
        stacked = Storage(self.tape, FLOAT * len(norms))
        del norms, stacked
        self.forget()

    def forget(self) -> None:
        """Let the gradients go."""
        for leaf in self.leaves.values():
            leaf.grad = None


def whole_frozen(ops: Ops, elements: int, ranks: int) -> tuple[Value, list[Storage]]:
    """A parameter that does not train and is whole on each of so many ranks, in the compute type; in 16 bits beside it
    this rank's part of its fp32 values, on the host, for checkpoints."""
    width = ops.shape.width
    masters = [ops.held(elements // ranks, FLOAT, "optimizer", on_host=True)] if width != FLOAT else []
    return Value(Storage(ops.tape, width * elements), elements), masters


class _InBucket(Leaf):
    """A parameter whose gradient DDP copies into its place in a bucket as soon as gradients are averaged."""

    __slots__ = ("bucket", "synced")

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self.bucket: Storage | None = None
        self.synced = True

    def take(self, gradients: list[Storage]) -> None:
        super().take(gradients)
        if self.synced:
            self.grad = self.bucket


class DDP(Single):
    """As one process, with a bucket of fp32 gradients beside each part of the model, which views of it become."""

    micro_steps = 3  # the last one frees gradients of its own as buckets are filled: the one before holds all of them

    FIRST_BUCKET_BYTES = 2**20
    """torch.distributed._DEFAULT_FIRST_BUCKET_BYTES."""

    def leaf(self, parameter: Parameter) -> Leaf:
        return _InBucket(self.tape)

    def build(self) -> None:
        super().build()
        limits = [self.FIRST_BUCKET_BYTES, self.rendered["ddp"]["bucket_cap_mb"] * 2**20]
        bucket: list[_InBucket] = []
        size = 0
        trained = [p for p in reversed(self.parameters) if p.name in self.leaves]
        for parameter in trained:
            leaf = self.leaves[parameter.name]
            assert isinstance(leaf, _InBucket)
            bucket.append(leaf)
            size += FLOAT * parameter.elements
            if size >= limits[0] or parameter is trained[-1]:
                limits = limits[-1:]
                storage = Storage(self.tape, size, "communication")
                for leaf in bucket:
                    leaf.bucket = storage
                bucket, size = [], 0

    def begin(self, *, last: bool) -> None:
        for leaf in self.leaves.values():
            assert isinstance(leaf, _InBucket)
            leaf.synced = last


class _Unit:
    """Parameters that FSDP2 gathers together."""

    def __init__(self, tape: Tape, modules: Sequence[str], *, reshard: bool) -> None:
        self.modules = modules
        self.reshard = reshard
        self.shard: dict[str, int] = {}
        """Elements of each parameter on a rank, padding included."""
        self.whole: dict[str, Storage] = {}
        """Each parameter as gathered: of no size when it is not."""
        self.leaves: dict[str, Leaf] = {}
        self.gathering: Storage | None = None
        self.unsharded = False
        self.in_forward = self.done = False
        self.places: list[int] = []
        """In the order in which forward passes ended."""
        self.grad: Storage | None = None
        """Of all its shards."""
        self.partial: Storage | None = None
        """Reduced within this replica alone."""


class FSDP(Single):
    """Shards in fp32, gathered unit by unit in the compute type; gradients cut as soon as a unit has all of its own."""

    casts_where_read = writes_grad = False

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        self.ranks: int = rendered["mesh"]["dp_shard"]
        self.replicas: int = rendered["mesh"].get("dp_replicate", 1)
        wrap = [(entry["modules"], entry["reshard_after_forward"]) for entry in rendered["wrap"]]
        self.units = [_Unit(ops.tape, modules, reshard=reshard) for modules, reshard in [([""], False), *wrap]]
        self._unit_of: dict[str, _Unit] = {}
        self._of_parameter: dict[str, _Unit] = {}
        self._ended: list[_Unit] = []
        self._held: Storage | None = None
        """What the unit before was gathered from; freed when the next is copied out."""
        self._reducing: Storage | None = None
        self._last = True
        self._elements: dict[str, int] = {}
        self._masters: list[Storage] = []
        self._keeps_frozen: bool = rendered["frozen"] == "replicate"
        self._world_size = plan.world_size
        super().__init__(ops, spec, groups, rendered, plan)

    def build(self) -> None:
        super().build()
        root, *inner = self.units
        for parameter in self.parameters:
            if self._is_whole(parameter.name):
                continue
            owner = next((u for u in inner if any(parameter.name.startswith(f"{m}.") for m in u.modules)), root)
            self._of_parameter[parameter.name] = owner
            self._elements[parameter.name] = parameter.elements
            owner.shard[parameter.name] = self.held(parameter)
            owner.whole[parameter.name] = Storage(self.tape, 0, "communication")
            if parameter.name in self.leaves:
                owner.leaves[parameter.name] = self.leaves[parameter.name]
        self.units = [unit for unit in self.units if unit.shard]
        self._unit_of = {module: unit for unit in self.units for module in unit.modules}

    def leaf(self, parameter: Parameter) -> Leaf:
        return Leaf(self.tape, category=None)

    def _is_whole(self, name: str) -> bool:
        return self._keeps_frozen and name not in self.leaves

    def resident(self, parameter: Parameter) -> Value:
        if not self._is_whole(parameter.name):
            return super().resident(parameter)
        value, masters = whole_frozen(self.ops, parameter.elements, self._world_size)
        self._masters += masters
        return value

    def held(self, parameter: Parameter) -> int:
        rows = parameter.shape[0]
        return -(-rows // self.ranks) * (parameter.elements // rows)

    def read(self, name: str) -> Value:
        if self._is_whole(name):
            return self.values[name]
        unit = self._of_parameter[name]
        return Value(unit.whole[name], self._elements[name], self.leaves.get(name))

    def enter(self, module: str, value: Value | None) -> Value | None:
        return value if not (found := self.enter_all(module, [value] if value else [])) else found[0]

    def enter_all(self, module: str, values: Sequence[Value]) -> list[Value]:
        unit = self._unit_of.get(module)
        if unit is None:
            return list(values)
        first, unit.in_forward = not unit.in_forward, True
        self._gather(unit)
        self._copy_out(unit, forward=True)
        if not first or not any(value.node for value in values):
            return list(values)
        unit.done = False
        return together(self.tape, values, lambda: self._reduce(unit))

    def leave(self, module: str, value: Value) -> Value:
        unit = self._unit_of.get(module)
        if not module:
            self._held = None
        if unit is None or module != unit.modules[-1]:
            return value
        if unit.reshard:
            self._shard(unit)
        unit.places.append(len(self._ended))
        self._ended.append(unit)
        unit.in_forward = unit.done = False
        if value.node is None:
            return value

        def run(gradient: Storage, _: list[Storage]) -> list[Storage]:
            self._gather(unit)
            self._copy_out(unit, forward=False)
            if (place := unit.places.pop()) > 0:
                self._gather(self._ended[place - 1])
            return [gradient]

        return Value(value.storage, value.elements, Node(self.tape, [value.node], [], run))

    def refresh(self) -> None:
        for unit in self.units:
            unit.gathering = None
            self._shard(unit)

    def begin(self, *, last: bool) -> None:
        self._last = last

    def end(self) -> None:
        for unit in self.units:
            if not unit.done:
                self._reduce(unit)
            if self._last:
                unit.gathering = None
                unit.places.clear()
        if self._last:
            self._ended.clear()
            self._reducing = None

    def gradients(self) -> list[Storage]:
        return [unit.grad for unit in self.units if unit.grad is not None]

    def forget(self) -> None:
        for unit in self.units:
            unit.grad = None

    def _gather(self, unit: _Unit) -> None:
        """`unshard`: cast to a flat tensor, gathered into another."""
        if unit.gathering is not None or unit.unsharded:
            return
        count = 0 if self.ranks == 1 else sum(unit.shard.values())
        there = Storage(self.tape, FLOAT * count, "communication") if self.offloads and self.ops.cuda else None
        cast = Storage(self.tape, self.width * count, "communication") if self.width != FLOAT else None
        unit.gathering = Storage(self.tape, self.width * count * self.ranks, "communication")
        del cast, there

    def _copy_out(self, unit: _Unit, *, forward: bool) -> None:
        """`wait_for_unshard`."""
        if unit.gathering is None:
            return
        before = self._held if forward else None  # a local variable of torch's keeps it until the end
        cast = None
        for name, count in unit.shard.items():
            if self.ranks == 1 and self.width != FLOAT:
                cast = Storage(self.tape, self.width * count, "communication")
            unit.whole[name].resize(self.width * count * self.ranks)
        del cast
        unit.unsharded = True
        if forward:
            self._held = unit.gathering if self.ranks > 1 else None
        unit.gathering = None
        del before

    def _shard(self, unit: _Unit) -> None:
        if unit.unsharded:
            for storage in unit.whole.values():
                storage.resize(0)
            unit.unsharded = False

    def _reduce(self, unit: _Unit) -> None:
        """`post_backward`: free what was gathered, reduce the gradients in fp32 and keep this rank's part."""
        unit.done = True
        found = [(name, leaf) for name, leaf in unit.leaves.items() if leaf.grad is not None]
        grads = [leaf.grad for _, leaf in found]
        for _, leaf in found:
            leaf.grad = None
        self._shard(unit)
        self._reducing = None
        if not grads:
            return
        count = sum(unit.shard[name] for name, _ in found)
        self._reducing = Storage(self.tape, FLOAT * count * self.ranks, "communication")
        last = grads[-1] if self.ranks > 1 else None  # a variable of torch's loop over gradients keeps it to the end
        del grads
        final = self.replicas == 1 or self._last
        part = Storage(self.tape, FLOAT * count, "gradients" if final else "communication")
        del last
        if not final:
            unit.partial = unit.partial or part
            return
        unit.partial = None
        if unit.grad is None:
            unit.grad = self.ops.held(count, FLOAT, "gradients", on_host=True) if self.offloads else part
