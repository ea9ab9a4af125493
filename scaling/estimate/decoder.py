"""The decoder of scaling/models/decoder.py, its loss and its blocks, played on a tape: same names, same order."""

from collections.abc import Callable, Sequence
from typing import Protocol

from scaling.estimate.ops import FLOAT, LONG, Ops
from scaling.estimate.tape import Gradients, Leaf, Storage, Value
from scaling.inventory import head_dim
from scaling.spec.sections import Decoder, Lora

CHUNK_ELEMENTS = 2**25
"""As scaling/models/loss.py."""


class Hooks(Protocol):
    """What a backend does before and after a module, by its path."""

    def enter(self, module: str, value: Value | None) -> Value | None: ...
    def enter_all(self, module: str, values: Sequence[Value]) -> list[Value]: ...
    def leave(self, module: str, value: Value) -> Value: ...


class PlayedMemory:
    """Keys and values of all layers, KeyValues of scaling/models/decoder.py."""

    def __init__(self, ops: Ops, longest: int) -> None:
        self.length = 0
        """Tokens known before this pass."""
        self._ops, self._longest = ops, longest
        self._kept: dict[str, Storage] = {}

    def extend(self, name: str, value: Value) -> Value:
        """What a layer looks at: its keys, or values, of all tokens; both lie in one tensor."""
        shape = self._ops.shape
        each = value.elements // shape.sequence
        if name not in self._kept:
            self._kept[name] = self._ops.new(2 * each * self._longest)
        return Value(self._kept[name], each * (self.length + shape.sequence))


class PlayedBlocks:
    """Blocks of a decoder, or of an encoder made of the same."""

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        hooks: Hooks,
        *,
        checkpointing: str = "none",
        compiled: bool = False,
        lora: Lora | None = None,
    ) -> None:
        self.model = model
        self.lora = lora
        self.adapted = lora.targets(model) if lora else ()
        """Last names of the linear layers that have an adapter."""
        self.ops = ops
        self.hooks = hooks
        self.checkpointing = checkpointing
        self.compiled = compiled
        self.queries = model.num_attention_heads * head_dim(model)
        self.rotation: list[Storage] = []
        """Cosines and sines."""
        self.mask: Storage | None = None
        """What is added to the scores where texts are packed."""
        self.memory: PlayedMemory | None = None
        """Of the tokens before these."""
        self.keys = (model.num_key_value_heads or model.num_attention_heads) * head_dim(model)

    def wrapped(self, name: str, value: Value, body: Callable[[str, Value], Value]) -> Value:
        """A module with what its backend does before and after it."""
        entered = self.hooks.enter(name, value)
        del value
        assert entered is not None
        return self.hooks.leave(name, body(name, entered))

    def block(self, name: str, hidden: Value) -> Value:
        """Block.forward, checkpointed or not."""
        if self.checkpointing == "none" or not self.ops.grad:
            return self.block_forward(name, hidden)
        rotation, mask, selective = self.rotation, self.mask, self.checkpointing == "selective"

        def call(hidden: Value) -> Value:
            self.rotation, self.mask = rotation, mask
            try:
                return self.block_forward(name, hidden)
            finally:
                self.rotation, self.mask = [], None

        result = self.ops.checkpointed(call, hidden, selective=selective)
        self.rotation, self.mask = rotation, mask
        return result

    def block_forward(self, name: str, hidden: Value) -> Value:
        """Block.forward."""
        norm, mlp_norm = f"{name}.input_layernorm", f"{name}.post_attention_layernorm"
        self.ops.compiled = self.compiled
        try:
            mixed = self.wrapped(f"{name}.self_attn", self.wrapped(norm, hidden, self.norm), self.attention)
            hidden = self.ops.add(hidden, self.dropout(f"{name}.dropout", mixed))
            del mixed
            inner = self.wrapped(f"{name}.mlp", self.wrapped(mlp_norm, hidden, self.norm), self.mlp)
            return self.ops.add(hidden, self.dropout(f"{name}.dropout", inner))
        finally:
            self.ops.compiled = False

    def dropout(self, name: str, hidden: Value) -> Value:
        """nn.Dropout, where there is one."""
        if not self.model.dropout:
            return hidden
        return self.wrapped(name, hidden, lambda _, hidden: self.ops.dropout(hidden) if self.ops.grad else hidden)

    def head_norm(self, name: str, heads: Value) -> Value:
        """RMSNorm of each head, which makes the transposed heads contiguous."""
        return self.ops.contiguous(self.ops.rms_norm(name, heads, head_dim(self.model), composed=True))

    def norm(self, name: str, hidden: Value) -> Value:
        """LayerNorm or RMSNorm."""
        if self.model.norm == "rmsnorm":
            return self.ops.rms_norm(name, hidden, self.model.hidden_size)
        return self.ops.layer_norm(name, hidden, self.model.hidden_size, self.model.bias)

    def linear(self, name: str, hidden: Value, outputs: int, bias: bool) -> Value:
        """One projection, with its adapter if it has one."""
        if name.rpartition(".")[2] in self.adapted:
            return self.wrapped(name, hidden, lambda name, hidden: self.adapted_linear(name, hidden, outputs, bias))
        return self.wrapped(name, hidden, lambda name, hidden: self.ops.linear(name, hidden, outputs, bias))

    def adapted_linear(self, name: str, hidden: Value, outputs: int, bias: bool) -> Value:
        """AdaptedLinear.forward of scaling/models/lora.py."""
        ops, lora = self.ops, self.lora
        assert lora is not None

        def product(part: str, inner: Value, columns: int) -> Value:
            own = f"{name}.{part}"
            return self.wrapped(f"{own}.default", inner, lambda _, inner: ops.linear(own, inner, columns, False))

        base = self.wrapped(f"{name}.base_layer", hidden, lambda _, hidden: ops.linear(name, hidden, outputs, bias))
        drop = ops.dropout if lora.dropout else lambda inner: inner
        inner = self.wrapped(f"{name}.lora_dropout.default", hidden, lambda _, hidden: drop(hidden))
        inner = product("lora_A", inner, lora.rank)
        inner = product("lora_B", inner, outputs)
        inner = ops.times(inner)  # alpha / rank
        return ops.add(base, inner)

    def attention(self, name: str, hidden: Value) -> Value:
        """Attention.forward."""
        model, ops = self.model, self.ops
        bias = model.bias or model.qkv_bias
        query = self.linear(f"{name}.q_proj", hidden, self.queries, bias)
        key = self.linear(f"{name}.k_proj", hidden, self.keys, bias)
        value = self.linear(f"{name}.v_proj", hidden, self.keys, bias)
        if model.qk_norm:
            query = self.wrapped(f"{name}.q_norm", query, self.head_norm)
            key = self.wrapped(f"{name}.k_norm", key, self.head_norm)
        if model.position == "rope":
            query, key = ops.rotate(query, *self.rotation), ops.rotate(key, *self.rotation)
        if self.memory is not None:
            key, value = self.memory.extend(name, key), self.memory.extend(name, value)
        mixed = ops.attention(query, key, value, head_dim(model), self.mask)
        if model.qk_norm:  # its result is laid out like the query
            mixed = ops.contiguous(mixed)
        return self.linear(f"{name}.o_proj", mixed, model.hidden_size, model.bias)

    def mlp(self, name: str, hidden: Value) -> Value:
        """MLP.forward."""
        model, ops = self.model, self.ops
        inner = self.linear(f"{name}.up_proj", hidden, model.intermediate_size, model.bias)
        if model.activation == "swiglu":
            gate = ops.pointwise(self.linear(f"{name}.gate_proj", hidden, model.intermediate_size, model.bias))
            inner = ops.multiply(gate, inner)
            del gate
            return self.linear(f"{name}.down_proj", inner, model.hidden_size, model.bias)
        inner = ops.relu(inner) if model.activation == "relu" else ops.pointwise(inner)
        return self.linear(f"{name}.down_proj", inner, model.hidden_size, model.bias)


class PlayedDecoder(PlayedBlocks):
    """Its forward pass."""

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        hooks: Hooks,
        *,
        chunked: bool = True,
        checkpointing: str = "none",
        compiled: bool = False,
        lora: Lora | None = None,
        packed: bool = False,
        compares: bool = False,
        by_token: bool = False,
    ) -> None:
        super().__init__(model, ops, hooks, checkpointing=checkpointing, compiled=compiled, lora=lora)
        self.chunked = chunked
        self.packed = packed
        """Each sample holds several texts, or is filled up before its text."""
        self.compares = compares
        """The loss is of each sequence, for pairs to be compared."""
        self.by_token = by_token
        """It is of each token, and beside it stands what the value head says there."""

    def forward(self, memory: PlayedMemory | None = None) -> Value:
        """The summed loss, or what there is in its place; with `memory` the logits of the last token of each row."""
        ops, model, hooks, shape = self.ops, self.model, self.hooks, self.ops.shape
        hooks.enter("", None)
        hooks.enter("embed_tokens", None)
        hidden = hooks.leave("embed_tokens", ops.embedding("embed_tokens", shape.rows, model.hidden_size))
        positions = ops.new(shape.sequence, LONG)
        places_of = shape.sequence  # positions that differ from each other, as far as the code can tell
        self.memory = memory
        if self.packed:
            self.mask = self.mask_of(memory.length if memory else 0)
            places_of = shape.rows
            positions = ops.new(places_of, LONG)
        self.rotation = [ops.new(places_of * head_dim(model)) for _ in range(2 * (model.position == "rope"))]
        if model.position == "learned":
            hooks.enter("embed_positions", None)
            places = hooks.leave("embed_positions", ops.embedding("embed_positions", places_of, model.hidden_size))
            hidden = ops.add(hidden, places)
            del places
        hidden = self.dropout("dropout", hidden)
        for index in range(model.num_hidden_layers):
            hidden = ops.border(self.wrapped(f"layers.{index}", ops.border(hidden), self.block))
        hidden = self.wrapped("norm", hidden, self.norm)
        loss = self.wrapped("lm_head", hidden, self.head if memory is None else self.last_logits)
        if self.by_token and memory is None:
            loss = self.beside(loss, self.wrapped("value_head", hidden, self.value))
        del hidden, positions
        self.rotation, self.mask, self.memory = [], None, None
        return hooks.leave("", loss)

    def last_logits(self, _: str, hidden: Value) -> Value:
        """Head.forward of the last token of each row."""
        ops, model = self.ops, self.model
        before, ops.tape.category = ops.tape.category, "logits"
        weight = ops.read("embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight")
        found = ops.result(ops.shape.batch * model.vocab_size, [hidden, weight], [], lambda *_: [])
        ops.tape.category = before
        return found

    def value(self, name: str, hidden: Value) -> Value:
        """What the value head says of each token."""
        return self.ops.linear(name, hidden, 1, bias=True)

    def beside(self, losses: Value, values: Value) -> Value:
        """The two stacked, in fp32."""
        ops, rows = self.ops, self.ops.shape.rows
        if ops.shape.width != FLOAT:
            values = ops.cast(values, FLOAT, ops.shape.width)
        run = lambda gradient, _: [gradient] * 2  # noqa: E731 - views
        return ops.result(2 * rows, [losses, values], [], run, ops.new(2 * rows, FLOAT))

    def mask_of(self, before: int) -> Storage:
        """mask_of of scaling/models/decoder.py, after so many other tokens."""
        ops, pairs = self.ops, self.ops.shape.rows * (before + self.ops.shape.sequence)
        after, inside, seen = (ops.new(pairs, 1) for _ in range(3))
        del after, inside
        mask = ops.new(pairs)
        del seen
        return mask

    def head(self, name: str, hidden: Value) -> Value:
        """Head.forward with targets."""
        ops, model = self.ops, self.model
        tied = model.tie_word_embeddings
        before, ops.tape.category = ops.tape.category, "logits"
        weight = ops.read("embed_tokens.weight" if tied else "lm_head.weight")
        if self.compares or self.by_token:
            found = self.token_losses(hidden, weight) if self.chunked else self.plain_loss(hidden, weight)
        else:
            found = self.chunked_loss(hidden, weight) if self.chunked else self.plain_loss(hidden, weight)
        ops.tape.category = before
        return found

    def plain_loss(self, hidden: Value, weight: Value) -> Value:
        """F.cross_entropy of logits in fp32; log_softmax keeps its result."""
        ops, vocabulary = self.ops, self.model.vocab_size
        exact, size = ops.shape.width == FLOAT, ops.shape.rows * vocabulary
        sizes = ops.wanted((hidden, weight), (hidden.elements, weight.elements))
        saved = [hidden.storage] * bool(weight.node or ops.zero3_linear)
        saved += [ops.factor(weight)] * bool(hidden.node or ops.zero3_linear)
        logits = ops.result(size, [hidden, weight], saved, lambda *_: ops.made(sizes))
        logits = logits if exact else ops.cast(logits, FLOAT, ops.shape.width)
        likely = ops.new(size, FLOAT)
        logits = ops.result(size, [logits], [likely], lambda *_: [ops.new(size, FLOAT)], likely)
        del likely
        weights = ops.new(1, FLOAT)
        saved = [logits.storage, weights]
        del weights
        count = ops.shape.rows if self.by_token else 1
        return ops.result(count, [logits], saved, lambda *_: [ops.new(size, FLOAT)], ops.new(count, FLOAT))

    def chunks(self, most: int) -> list[int]:
        """Rows of each chunk of the loss; of more than three, those that do not differ from the second are left out."""
        rows = self.ops.shape.rows
        count = -(-rows // most)
        if self.ops.rough:  # the last of more than two is taken for a whole one
            return {1: [rows], 2: [most, rows - most], 3: [most, most]}[self.ops.rough]
        last = rows - most * (count - 1)
        return [*[most] * min(count - 1, 2), last]

    def token_losses(self, hidden: Value, weight: Value) -> Value:
        """_ChunkedTokenCrossEntropy, which makes the logits a second time in its backward pass."""
        ops, vocabulary, exact = self.ops, self.model.vocab_size, self.ops.shape.width == FLOAT
        rows = max(1, CHUNK_ELEMENTS // vocabulary)
        sizes, counts = ops.wanted((hidden, weight), (hidden.elements, weight.elements)), self.chunks(rows)
        losses = ops.new(ops.shape.rows, FLOAT)
        logits = mask = safe = None
        for count in counts:
            logits, mask, safe = self.scored(count)
        del logits, mask, safe

        def run(_: Storage, __: list[Storage]) -> Gradients:
            found: list[Storage | None] = [
                None if sizes[0] is None else ops.new(sizes[0]),
                None if sizes[1] is None else ops.new(sizes[1], FLOAT),
            ]
            logits = mask = safe = grad = None
            for count in counts:
                logits, mask, safe = self.scored(count)
                self.slope(count)
                counted = ops.new(count, FLOAT)
                del counted
                grad = logits if exact else ops.new(count * vocabulary)
                product = None if sizes[1] is None or exact else ops.new(sizes[1])
                del product
            del logits, mask, safe, grad
            if sizes[1] is not None and not exact:
                found[1] = ops.new(sizes[1])
            return found

        saved = [hidden.storage, weight.storage]
        return ops.result(ops.shape.rows, [hidden, weight], saved, run, losses)

    def scored(self, rows: int) -> tuple[Storage, ...]:
        """_scored of scaling/models/loss.py: logits in fp32, a mask, targets."""
        ops = self.ops
        half = ops.new(rows * self.model.vocab_size)
        logits = ops.new(rows * self.model.vocab_size, FLOAT) if ops.shape.width != FLOAT else half
        del half
        return logits, ops.new(rows, 1), ops.new(rows, LONG)

    def slope(self, rows: int) -> None:
        """_slope of scaling/models/loss.py, in place: what is taken from each row's target."""
        ones = self.ops.new(rows, FLOAT)
        del ones

    def chunked_loss(self, hidden: Value, weight: Value) -> Value:
        """_ChunkedCrossEntropy.forward."""
        ops, model, vocabulary = self.ops, self.model, self.model.vocab_size
        rows = max(1, CHUNK_ELEMENTS // vocabulary)
        total = ops.new(1, FLOAT)
        kept = [ops.new(hidden.elements)] if hidden.node else []
        kept += [ops.new(weight.elements, FLOAT)] if weight.node else []
        # The loop's variables hold what the iteration before made until they are given something new.
        logits = mask = safe = picked = grad = None
        for count in self.chunks(rows):
            logits, mask, safe = self.scored(count)
            picked = ops.new(count, FLOAT)
            counted, zero = ops.new(count, FLOAT), ops.new(1, FLOAT)
            del counted, zero
            if not kept:
                continue
            self.slope(count)
            grad = logits
            if ops.shape.width != FLOAT:
                grad = ops.new(count * vocabulary)
            if weight.node:
                counted = ops.new(count * model.hidden_size)
                product = ops.new(weight.elements) if ops.shape.width != FLOAT else None
                del counted, product
        del logits, mask, safe, picked, grad

        sizes, exact = ops.wanted((hidden, weight), (hidden.elements, weight.elements)), ops.shape.width == FLOAT
        leaf = weight.node if ops.writes_grad and isinstance(weight.node, Leaf) else None

        def run(_: Storage, saved: list[Storage]) -> Gradients:
            found: list[Storage | None] = [None, None]
            if sizes[0] is not None:
                upcast = None if exact else ops.new(sizes[0], FLOAT)
                scaled = ops.new(sizes[0], FLOAT)
                del upcast
                found[0] = scaled if exact else ops.new(sizes[0])
                del scaled
            if leaf is not None:
                if leaf.grad is None:
                    leaf.grad = saved[-1]  # not `take`: DDP copies to its bucket when all gradients are there
                    leaf.grad.rename("gradients")
            elif sizes[1] is not None:  # in fp32 it is scaled where it lies, and given away
                found[1] = saved[-1] if exact else ops.new(sizes[1])
            return found

        return ops.result(1, [hidden, weight], kept, run, total)
