"""The decoder of scaling/models/decoder.py, its loss and its blocks, played on a tape: same names, same order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaling.estimate.tape import Backward, Gradients, Node, Split, Storage, Tape, Value
from scaling.inventory import head_dim
from scaling.spec.sections import Decoder

CHUNK_ELEMENTS = 2**25
"""As scaling/models/loss.py."""
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

    def __init__(self, tape: Tape, shape: Shape, read: Callable[[str], Value]) -> None:
        self.tape = tape
        self.shape = shape
        self.read = read
        """The parameter of this name as the forward pass sees it."""

    def new(self, elements: int, width: int | None = None, category: str | None = None) -> Storage:
        """Memory for so many elements of the compute type, or of `width` bytes."""
        return Storage(self.tape, elements * (self.shape.width if width is None else width), category)

    def result(
        self,
        elements: int,
        inputs: Sequence[Value | None],
        saved: Sequence[Storage],
        run: Backward,
        storage: Storage | None = None,
    ) -> Value:
        """A value and, if a gradient flows to any of the inputs, its node."""
        edges = [value.node if value else None for value in inputs]
        node = Node(self.tape, edges, saved, run) if any(edges) else None
        return Value(storage or self.new(elements), elements, node)

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
        size = table.elements
        return self.result(rows * columns, [table], [], lambda *_: [self.new(size)])

    def add(self, first: Value, second: Value) -> Value:
        """Sum, the second broadcast to the first."""

        broadcast, size = second.elements < first.elements, second.elements

        def run(gradient: Storage, _: list[Storage]) -> Gradients:
            return [gradient, self.new(size) if broadcast else gradient]

        return self.result(first.elements, [first, second], [], run)

    def linear(self, name: str, inputs: Value, outputs: int, bias: bool) -> Value:
        """inputs @ weight.T + bias."""
        weight = self.read(f"{name}.weight")
        extra = self.read(f"{name}.bias") if bias else None
        rows = inputs.elements // (weight.elements // outputs)
        saved = [inputs.storage] if weight.node else []
        saved += [weight.storage] if inputs.node else []

        sizes = self.wanted((inputs, weight, extra), (inputs.elements, weight.elements, outputs))
        return self.result(rows * outputs, [inputs, weight, extra], saved, lambda *_: self.made(sizes))

    def layer_norm(self, name: str, inputs: Value, columns: int, bias: bool) -> Value:
        """native_layer_norm: mean and 1/deviation of each row are kept, on a CPU in the type of the input."""
        weight = self.read(f"{name}.weight")
        extra = self.read(f"{name}.bias") if bias else None
        out = self.new(inputs.elements)
        rows = inputs.elements // columns
        statistics = [self.new(rows), self.new(rows)]
        saved = [inputs.storage, *statistics, weight.storage, *([extra.storage] if extra else [])]

        sizes = self.wanted((inputs, weight, extra), (inputs.elements, columns, columns))
        return self.result(inputs.elements, [inputs, weight, extra], saved, lambda *_: self.made(sizes), out)

    def attention(self, query: Value, key: Value, value: Value, heads: int) -> Value:
        """Flash attention, fused: keeps its inputs, its result and the log-sum-exp of each row in fp32."""
        out, normaliser = self.new(query.elements), self.new(heads * self.shape.rows, FLOAT)

        sizes = [query.elements, key.elements, value.elements]  # all three are made, wanted or not
        saved = [query.storage, key.storage, value.storage, out, normaliser]
        return self.result(query.elements, [query, key, value], saved, lambda *_: self.made(sizes), out)

    def pointwise(self, inputs: Value) -> Value:
        """A function that keeps its input (gelu, silu)."""
        size = inputs.elements
        return self.result(size, [inputs], [inputs.storage], lambda *_: [self.new(size)])

    def times(self, inputs: Value, width: int | None = None) -> Value:
        """Product with something small that takes no gradient; or any function whose gradient needs no more."""
        size = inputs.elements
        return self.result(size, [inputs], [], lambda *_: [self.new(size, width)], self.new(size, width))

    def cast(self, inputs: Value, width: int, back: int) -> Value:
        """To an element of `width` bytes, from one of `back`."""
        size = inputs.elements
        return self.result(size, [inputs], [], lambda *_: [self.new(size, back)], self.new(size, width))

    def rotate(self, heads: Value) -> Value:
        """_rotate: heads * cosines + cat((-second half, first half)) * sines."""
        half = heads.elements // 2
        size = heads.elements
        node = Split(self.tape, [heads.node], [], lambda *_: [self.new(size)]) if heads.node else None
        first = second = Value(heads.storage, half, node)
        near = self.times(heads)
        turned = self.times(second)
        turned = self.result(size, [turned, first], [], lambda gradient, _: [gradient, gradient])
        far = self.times(turned)
        del turned, first, second
        return self.add(near, far)

    def rms_norm_in_parts(self, name: str, inputs: Value, columns: int) -> Value:
        """RMSNorm as torch composes it on a CPU: in fp32, piece by piece."""
        exact = self.shape.width == FLOAT
        weight = self.read(f"{name}.weight")
        rows = inputs.elements // columns
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
        """Keeps its result."""
        size = inputs.elements
        out = self.new(size)
        return self.result(size, [inputs], [out], lambda *_: [self.new(size)], out)

    def multiply(self, first: Value, second: Value) -> Value:
        """Product: each factor is kept for the other's gradient."""
        saved = [first.storage] if second.node else []
        saved += [second.storage] if first.node else []

        sizes = self.wanted((first, second), (first.elements, first.elements))
        return self.result(first.elements, [first, second], saved, lambda *_: self.made(sizes))


class PlayedDecoder:
    """Its forward pass."""

    def __init__(self, model: Decoder, ops: Ops, *, chunked: bool) -> None:
        self.model = model
        self.ops = ops
        self.chunked = chunked
        self.queries = model.num_attention_heads * head_dim(model)
        self.keys = (model.num_key_value_heads or model.num_attention_heads) * head_dim(model)

    def forward(self) -> Value:
        """The summed loss."""
        ops, model, shape = self.ops, self.model, self.ops.shape
        hidden = ops.embedding("embed_tokens", shape.rows, model.hidden_size)
        positions = ops.new(shape.sequence, LONG)  # noqa: F841 - alive until the end
        rotation = [ops.new(shape.sequence * head_dim(model)) for _ in range(2 * (model.position == "rope"))]  # noqa: F841
        if model.position == "learned":
            hidden = ops.add(hidden, ops.embedding("embed_positions", shape.sequence, model.hidden_size))
        for index in range(model.num_hidden_layers):
            hidden = self.block(f"layers.{index}", hidden)
        return self.head(self.norm("norm", hidden))

    def block(self, name: str, hidden: Value) -> Value:
        """Block.forward."""
        hidden = self.ops.add(hidden, self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", hidden)))
        normed = self.norm(f"{name}.post_attention_layernorm", hidden)
        return self.ops.add(hidden, self.mlp(f"{name}.mlp", normed))

    def norm(self, name: str, hidden: Value) -> Value:
        """LayerNorm or RMSNorm."""
        if self.model.norm == "rmsnorm":
            return self.ops.rms_norm_in_parts(name, hidden, self.model.hidden_size)
        return self.ops.layer_norm(name, hidden, self.model.hidden_size, self.model.bias)

    def attention(self, name: str, hidden: Value) -> Value:
        """Attention.forward."""
        model, ops = self.model, self.ops
        bias = model.bias or model.qkv_bias
        query = ops.linear(f"{name}.q_proj", hidden, self.queries, bias)
        key = ops.linear(f"{name}.k_proj", hidden, self.keys, bias)
        value = ops.linear(f"{name}.v_proj", hidden, self.keys, bias)
        if model.position == "rope":
            query, key = ops.rotate(query), ops.rotate(key)
        mixed = ops.attention(query, key, value, model.num_attention_heads)
        return ops.linear(f"{name}.o_proj", mixed, model.hidden_size, model.bias)

    def mlp(self, name: str, hidden: Value) -> Value:
        """MLP.forward."""
        model, ops = self.model, self.ops
        inner = ops.linear(f"{name}.up_proj", hidden, model.intermediate_size, model.bias)
        if model.activation == "swiglu":
            gate = ops.pointwise(ops.linear(f"{name}.gate_proj", hidden, model.intermediate_size, model.bias))
            inner = ops.multiply(gate, inner)
            del gate
            return ops.linear(f"{name}.down_proj", inner, model.hidden_size, model.bias)
        inner = ops.relu(inner) if model.activation == "relu" else ops.pointwise(inner)
        return ops.linear(f"{name}.down_proj", inner, model.hidden_size, model.bias)

    def head(self, hidden: Value) -> Value:
        """Head.forward with targets."""
        ops, model = self.ops, self.model
        tied = model.tie_word_embeddings
        before, ops.tape.category = ops.tape.category, "logits"
        weight = ops.read("embed_tokens.weight" if tied else "lm_head.weight")
        found = self.chunked_loss(hidden, weight)
        ops.tape.category = before
        return found

    def chunked_loss(self, hidden: Value, weight: Value) -> Value:
        """_ChunkedCrossEntropy.forward."""
        ops, vocabulary = self.ops, self.model.vocab_size
        rows = max(1, CHUNK_ELEMENTS // vocabulary)
        total = ops.new(1, FLOAT)
        kept = [ops.new(hidden.elements)] if hidden.node else []
        kept += [ops.new(weight.elements, FLOAT)] if weight.node else []
        # The loop's variables hold what the iteration before made until they are given something new.
        logits = mask = safe = normaliser = picked = grad = None
        for start in range(0, ops.shape.rows, rows):
            count = min(rows, ops.shape.rows - start)
            half = ops.new(count * vocabulary)
            logits = ops.new(count * vocabulary, FLOAT) if ops.shape.width != FLOAT else half
            del half
            mask, safe = ops.new(count, 1), ops.new(count, LONG)
            normaliser, picked = ops.new(count, FLOAT), ops.new(count, FLOAT)
            if not kept:
                continue
            grad = logits
            if ops.shape.width != FLOAT:
                grad = ops.new(count * vocabulary)
            if weight.node:
                product = ops.new(weight.elements)
                del product
        del logits, mask, safe, normaliser, picked, grad

        sizes, exact = ops.wanted((hidden, weight), (hidden.elements, weight.elements)), ops.shape.width == FLOAT

        def run(_: Storage, saved: list[Storage]) -> Gradients:
            found: list[Storage | None] = [None, None]
            if sizes[0] is not None:
                upcast = None if exact else ops.new(sizes[0], FLOAT)
                scaled = ops.new(sizes[0], FLOAT)
                del upcast
                found[0] = scaled if exact else ops.new(sizes[0])
                del scaled
            if sizes[1] is not None:  # in fp32 it is scaled where it lies, and given away
                found[1] = saved[-1] if exact else ops.new(sizes[1])
            return found

        return ops.result(1, [hidden, weight], kept, run, total)
