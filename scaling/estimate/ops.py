"""torch's operations as allocations: what each makes, keeps and frees, forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaling.estimate.tape import Backward, Frame, Gradients, Leaf, Node, Split, Storage, Tape, Value

FLOAT, LONG = 4, 8


@dataclass(frozen=True)
class Shape:
    """What passes through the model at a time."""

    batch: int
    sequence: int
    width: int
    """Bytes of an element in the compute type."""

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.batch * self.sequence


class Ops:
    """torch's operations, each a few allocations forward and backward.

    A backward function must hold sizes, not values: what it holds would live as long as its node.
    """

    def __init__(self, tape: Tape, shape: Shape, *, cuda: bool = False, rough: int = 0) -> None:
        self.tape = tape
        self.shape = shape
        self.cuda = cuda
        """Kernels of a GPU, some of which keep other things than a CPU's."""
        self.rough = rough
        """Not 0: every size is to grow evenly with the micro-batch, the loss in so many chunks, 3 for more; and moments
        between two blocks are marked."""
        self.grad = True
        """Autograd takes notes; not so where nothing is to be trained on."""
        self.compiled = False
        """Within a compiled block: a pointwise result that only pointwise operations want back is made again.

        What a matrix product wants is kept all the same: torch/_functorch/partitioners.py never repeats what it would
        have to write to memory (`is_materialized_backwards`). Of the models here that leaves silu(gate) alone.
        """
        self.read: Callable[[str], Value]
        """The parameter of this name as the forward pass sees it."""
        self.frame: Frame | None = None
        """The checkpointed call at work."""
        self.repeats = False
        """A recorded call is being made again in the backward pass."""
        self.writes_grad = False
        """Functions write to a parameter's gradient themselves (`may_write_grad` of scaling/models/on_cpu.py)."""
        self.zero3_linear = False
        """Linear layers are DeepSpeed's, which keep all they have (runtime/zero/linear.py)."""

    def new(self, elements: int, width: int | None = None, category: str | None = None) -> Storage:
        """Memory for so many elements of the compute type, or of `width` bytes."""
        return Storage(self.tape, elements * (self.shape.width if width is None else width), category)

    def held(self, elements: int, width: int, category: str, *, on_host: bool) -> Storage:
        """Memory that is there from the start, on the device or in the host's memory (one and the same on a CPU)."""
        if on_host and self.cuda:
            self.tape.host_bytes += elements * width
            elements = 0
        return self.new(elements, width, category)

    def result(
        self,
        elements: int,
        inputs: Sequence[Value | None],
        saved: Sequence[Storage],
        run: Backward,
        storage: Storage | Callable[[], Storage] | None = None,
        *,
        pointwise: bool = False,
    ) -> Value:
        """A value and, if a gradient flows to any of the inputs, its node; inputs are kept before the value is made."""
        edges = [value.node if value else None for value in inputs]
        node = None
        if self.grad and any(edges):
            node = Node(self.tape, edges, () if self.frame else saved, run)
            if self.frame:
                self.frame.enter(node, saved)
        if not isinstance(storage, Storage):
            storage = storage() if storage else self.new(elements)
        return Value(storage, elements, node, pointwise and self.compiled)

    def kept(self, elements: int, width: int | None = None) -> Storage:
        """Memory for a result that selective checkpointing keeps."""
        frame = self.frame
        if frame is None or not frame.selective:
            return self.new(elements, width)
        if not frame.repeats:
            frame.kept.append(found := self.new(elements, width))
            return found
        found, frame.kept[frame.taken] = frame.kept[frame.taken], None
        frame.taken += 1
        assert found is not None
        return found

    def checkpointed(self, call: Callable[[Value], Value], hidden: Value, *, selective: bool) -> Value:
        """A call that keeps its input, and with `selective` the results of its matrix products."""

        def again(frame: Frame) -> None:
            self.frame = frame
            try:
                call(hidden)
            finally:
                self.frame = None

        self.frame = Frame(again, selective=selective)
        try:
            return call(hidden)
        finally:
            self.frame = None

    def border(self, value: Value) -> Value:
        """Between two blocks: where a rough tape is marked, forward and backward."""
        if not self.rough:
            return value
        self.tape.mark()
        if value.node is None:
            return value

        def run(gradient: Storage, _: list[Storage]) -> Gradients:
            self.tape.mark()
            return [gradient]

        return Value(value.storage, value.elements, Node(self.tape, [value.node], [], run))

    def made(self, sizes: Sequence[int | None]) -> Gradients:
        """Gradients of so many elements each."""
        return [None if size is None else self.new(size) for size in sizes]

    @staticmethod
    def wanted(values: Sequence[Value | None], sizes: Sequence[int]) -> list[int | None]:
        """The sizes of those values to which a gradient flows."""
        return [size if value and value.node else None for value, size in zip(values, sizes, strict=True)]

    def embedding(self, name: str, rows: int, columns: int) -> Value:
        """Rows of a table."""
        table = self.read(f"{name}.weight")
        size, leaf = table.elements, table.node

        def run(_: Storage, __: list[Storage]) -> Gradients:
            there = self.writes_grad and isinstance(leaf, Leaf) and leaf.grad is not None
            return [None if there else self.new(size)]

        return self.result(rows * columns, [table], [], run)

    def add(self, first: Value, second: Value) -> Value:
        """Sum, the second broadcast to the first."""

        broadcast, size = second.elements < first.elements, second.elements

        def run(gradient: Storage, _: list[Storage]) -> Gradients:
            return [gradient, self.new(size) if broadcast else gradient]

        return self.result(first.elements, [first, second], [], run)

    def linear(self, name: str, inputs: Value, outputs: int, bias: bool, weight: Value | None = None) -> Value:
        """inputs @ weight.T + bias; the gradient of the bias comes first, as addmm names it first.

        `weight` where it was read before.
        """
        weight = weight or self.read(f"{name}.weight")
        extra = self.read(f"{name}.bias") if bias else None
        rows = inputs.elements // (weight.elements // outputs)
        saved = [inputs.storage] if weight.node or self.zero3_linear else []
        saved += [self.factor(weight)] if inputs.node or self.zero3_linear else []

        named = [(extra, outputs), (inputs, inputs.elements), (weight, weight.elements)]
        if self.zero3_linear:
            named = [*named[1:], named[0]]
        operands = [operand for operand, _ in named]
        sizes = self.wanted(operands, [size for _, size in named])
        run = lambda *_: self.made(sizes)  # noqa: E731
        # Nothing wants a block's last product back, and a compiled block knows it.
        spared = self.compiled and name.endswith(".down_proj")
        make = lambda: (self.new if spared else self.kept)(rows * outputs)  # noqa: E731
        # A function of DeepSpeed's own keeps what it has when it is done, torch's before.
        return self.result(rows * outputs, operands, saved, run, make() if self.zero3_linear else make)

    def factor(self, weight: Value) -> Storage:
        """What a linear layer keeps of its weight: torch's a transposed view, so what is in it now."""
        return weight.storage if self.zero3_linear else weight.storage.content

    def layer_norm(self, name: str, inputs: Value, columns: int, bias: bool) -> Value:
        """native_layer_norm: mean and 1/deviation of each row are kept, in fp32, on a CPU in the type of the input."""
        weight = self.read(f"{name}.weight")
        extra = self.read(f"{name}.bias") if bias else None
        out = self.new(inputs.elements)
        rows = inputs.elements // columns
        statistics = [self.new(rows, FLOAT if self.cuda else None) for _ in range(2)]
        saved = [inputs.storage, *statistics, weight.storage, *([extra.storage] if extra else [])]

        sizes = self.wanted((inputs, weight, extra), (inputs.elements, columns, columns))
        run = lambda *_: self.made(sizes)  # noqa: E731
        return self.result(inputs.elements, [inputs, weight, extra], saved, run, out)

    def attention(self, query: Value, key: Value, value: Value, width: int, mask: Storage | None = None) -> Value:
        """Flash attention, fused: keeps its inputs, its result and the log-sum-exp of each row in fp32.

        `width` is that of a head; `mask` is what is added to the scores.
        """
        rows = query.elements // width
        out, normaliser = self.kept(query.elements), self.kept(rows, FLOAT)

        sizes = [query.elements, key.elements, value.elements]  # all three are made, wanted or not
        saved = [query.storage, key.storage, value.storage, out, normaliser, *([mask] if mask else [])]

        def run(_: Storage, __: list[Storage]) -> Gradients:
            # torch/csrc flash_attn: dq summed up in fp32, a row sum of out * gradient, and for grouped queries the
            # gradients of keys and values of each head before they are added up.
            work = [self.new(sizes[0], FLOAT), self.new(rows, FLOAT)] if self.cuda else []
            apart = [self.new(sizes[0]) for _ in range(2 * (self.cuda and sizes[1] < sizes[0]))]
            found = self.made(sizes)
            del work, apart
            return found

        return self.result(query.elements, [query, key, value], saved, run, out)

    def pointwise(self, inputs: Value) -> Value:
        """A function that keeps its input (gelu, silu)."""
        size = inputs.elements
        return self.result(size, [inputs], [inputs.storage], lambda *_: [self.new(size)], pointwise=True)

    def times(self, inputs: Value, factor: Storage | None = None) -> Value:
        """Product with something that takes no gradient; or any function whose gradient needs no more."""
        size = inputs.elements
        return self.result(size, [inputs], [factor] if factor else [], lambda *_: [self.new(size)], self.new(size))

    def joined(self, parts: Sequence[Value]) -> Value:
        """torch.cat along the second dimension: the gradient of each part is a view, which a matrix product copies."""

        def apart(part: Value) -> Value:
            if part.node is None:
                return part
            size, copies = part.elements, self.shape.batch > 1
            run: Backward = lambda gradient, _: [self.new(size) if copies else gradient]  # noqa: E731
            return Value(part.storage, size, Node(self.tape, [part.node], [], run))

        parts, count = [apart(part) for part in parts], len(parts)
        elements = sum(part.elements for part in parts)
        return self.result(elements, parts, [], lambda gradient, _: [gradient] * count)

    def contiguous(self, inputs: Value) -> Value:
        """A copy in another layout."""
        return self.result(inputs.elements, [inputs], [], lambda gradient, _: [gradient])

    def cast(self, inputs: Value, width: int, back: int) -> Value:
        """To an element of `width` bytes, from one of `back`."""
        size = inputs.elements
        return self.result(size, [inputs], [], lambda *_: [self.new(size, back)], self.new(size, width))

    def rotate(self, heads: Value, cosines: Storage, sines: Storage) -> Value:
        """heads * cosines + cat((-second half, first half)) * sines; on a CPU a function of ours in place of it."""
        half = heads.elements // 2
        size = heads.elements
        if not (self.cuda or self.compiled):
            return self.result(size, [heads], [cosines, sines], lambda *_: [self.new(size)])
        node = Split(self.tape, [heads.node], [], lambda *_: [self.new(size)]) if heads.node else None
        first = second = Value(heads.storage, half, node)
        near = self.times(heads, cosines)
        turned = self.times(second)
        turned = self.result(size, [turned, first], [], lambda gradient, _: [gradient, gradient])
        far = self.times(turned, sines)
        del turned, first, second
        return self.add(near, far)

    def rms_norm(self, name: str, inputs: Value, columns: int, *, composed: bool = False) -> Value:
        """RMSNorm: one kernel that keeps 1/root of each row in fp32. On a CPU torch composes it, in fp32; what is in
        fp32 goes to a function of ours (scaling/models/on_cpu.py), but where `composed`."""
        exact = self.shape.width == FLOAT
        weight = self.read(f"{name}.weight")
        rows = inputs.elements // columns
        if exact and not (self.cuda or self.compiled or composed):
            return self._rms_norm_on_cpu(inputs, weight, rows)
        if self.cuda:
            out, root = self.new(inputs.elements), self.new(rows, FLOAT)
            sizes = self.wanted((inputs, weight), (inputs.elements, columns))
            saved = [inputs.storage, root, weight.storage]
            run = lambda *_: self.made(sizes)  # noqa: E731
            return self.result(inputs.elements, [inputs, weight], saved, run, out)
        upcast = inputs if exact else self.cast(inputs, FLOAT, self.shape.width)
        size = upcast.elements
        square = self._power(upcast, size)
        mean = self.result(rows, [square], [], lambda *_: [self.new(size, FLOAT)], self.new(rows, FLOAT))
        del square
        scale = self._power(mean, rows, keeps_result=True)
        del mean
        scaled = self._broadcast(upcast, scale)
        weighted = self._broadcast(scaled, weight)
        del scaled
        return weighted if exact else self.cast(weighted, self.shape.width, FLOAT)

    def _rms_norm_on_cpu(self, inputs: Value, weight: Value, rows: int) -> Value:
        size, columns = inputs.elements, weight.elements
        root, out = self.new(rows), self.new(size)
        to_inputs, to_weight = inputs.node is not None, weight.node is not None

        def run(_: Storage, __: list[Storage]) -> Gradients:
            product = self.new(size)
            of_weight = self.new(columns) if to_weight else None
            if not to_inputs:
                return [None, of_weight]
            along = self.new(rows)
            del along
            return [product, of_weight]

        return self.result(size, [inputs, weight], [inputs.storage, root, weight.storage], run, out)

    def _power(self, base: Value, size: int, *, keeps_result: bool = False) -> Value:
        """x ** 2, or 1 / sqrt(x), in fp32."""

        def run(_: Storage, __: list[Storage]) -> Gradients:
            power, scaled = self.new(size, FLOAT), self.new(size, FLOAT)
            found = self.new(size, FLOAT)
            del power, scaled
            return [found]

        out = self.new(size, FLOAT)
        return self.result(size, [base], [out if keeps_result else base.storage], run, out)

    def _broadcast(self, wide: Value, narrow: Value) -> Value:
        """Product in fp32 of a matrix and a row or a column."""
        size, small = wide.elements, narrow.elements
        to_wide, to_narrow = wide.node is not None, narrow.node is not None

        def run(_: Storage, __: list[Storage]) -> Gradients:
            product = self.new(size, FLOAT) if to_narrow else None
            direct = self.new(size, FLOAT) if to_wide else None
            summed = self.new(small, FLOAT) if to_narrow else None
            del product
            return [direct, summed]

        saved = [narrow.storage] if to_wide else []
        saved += [wide.storage] if to_narrow else []
        return self.result(size, [wide, narrow], saved, run, self.new(size, FLOAT))

    def relu(self, inputs: Value) -> Value:
        """Keeps its result; compiled, one byte an element for where it is zero."""
        size = inputs.elements
        out = self.new(size)
        saved = [self.new(size, 1) if self.compiled else out]
        return self.result(size, [inputs], saved, lambda *_: [self.new(size)], out)

    def dropout(self, inputs: Value) -> Value:
        """Keeps a mask of bytes; on a CPU it is a product with noise of the input's type, which is kept."""
        size = inputs.elements
        noise = self.new(size, 1 if self.cuda else None)
        return self.result(size, [inputs], [noise], lambda *_: [self.new(size)])

    def multiply(self, first: Value, second: Value) -> Value:
        """Product: each factor is kept for the other's gradient."""
        saved = [first.storage] if second.node and not first.cheap else []
        saved += [second.storage] if first.node and not second.cheap else []

        sizes = self.wanted((first, second), (first.elements, first.elements))
        return self.result(first.elements, [first, second], saved, lambda *_: self.made(sizes))
