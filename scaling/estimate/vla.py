"""The model of scaling/models/vla.py and its losses, played on a tape: same names, same order."""

from collections.abc import Collection

from scaling.estimate.decoder import Hooks, PlayedBlocks
from scaling.estimate.ops import FLOAT, LONG, Ops
from scaling.estimate.tape import Value
from scaling.inventory import CHANNELS, TIME_FEATURES, head_dim, patches, shapes, text_length
from scaling.spec.sections import AnyVla, BehaviourCloning, Objective, Vla
from scaling.units import ALLOCATION_BYTES


def batch_sizes(model: AnyVla, batch: int, text: int, features: int | None = None) -> list[int]:
    """Bytes that each tensor of an ActionBatch takes; `features`: of what vision made of a sample's images, where that
    stands in their place."""
    vision, action = model.vision, model.action
    images = vision.views * vision.image_size**2 * CHANNELS
    sizes = [
        batch * (images if features is None else features),
        LONG * batch * text,
        FLOAT * batch * action.state_dim,
        FLOAT * batch * action.chunk_size * action.action_dim,
        batch * action.chunk_size,
        LONG * batch,
    ]
    return [-(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES for size in sizes]


class PlayedVla:
    """Its forward pass and its loss."""

    def __init__(
        self,
        model: Vla,
        objective: Objective,
        ops: Ops,
        hooks: Hooks,
        *,
        still: Collection[str] = (),
        checkpointing: str = "none",
        compiled: bool = False,
        features: bool = False,
    ) -> None:
        """`features`: the batch has what vision made of the images."""
        self.model = model
        self.objective = objective
        self.features = features
        self.ops = ops
        self.hooks = hooks
        self.text = text_length(model, ops.shape.sequence)
        self.parts: dict[str, PlayedBlocks] = {}
        for name, shape in shapes(model).items():
            # Where no gradient is asked for checkpointing does nothing, and in eval mode dropout neither.
            mode = "none" if name in still else checkpointing
            shape = shape.model_copy(update={"dropout": 0.0}) if name in still else shape
            self.parts[name] = PlayedBlocks(shape, ops, hooks, checkpointing=mode, compiled=compiled)

    def forward(self) -> Value:
        """The summed loss."""
        self.hooks.enter("", None)
        predicted = self.predicted()
        return self.loss(self.hooks.leave("", predicted))

    def predicted(self) -> Value:
        """Vla.forward, but for what is done before and after."""
        seen, read = self.vision(), self.language()
        fused = self.fusion(seen, read)
        del seen, read
        return self.inwards("action_head", fused, self.model.action.action_dim)

    def inwards(self, name: str, value: Value, outputs: int) -> Value:
        """A linear layer with bias."""
        return self.parts["fusion"].linear(name, value, outputs, True)

    def data(self, elements: int) -> Value:
        """A tensor of the batch in the compute type."""
        return Value(self.ops.new(elements), elements)

    def table(self, name: str, rows: int, columns: int) -> Value:
        """An embedding."""
        self.hooks.enter(name, None)
        return self.hooks.leave(name, self.ops.embedding(name, rows, columns))

    # ------------------------------------------------------------ parts

    def vision(self) -> Value:
        """Vision.forward."""
        ops, part, vision = self.ops, self.parts["vision"], self.model.vision
        width, tokens = vision.hidden_size, patches(vision)
        if self.features:
            return Value(ops.new(0), ops.shape.batch * vision.views * tokens * width)  # they are the batch's
        self.hooks.enter("vision", None)
        hidden = self.patch_embed("vision.patch_embed")
        hidden = ops.add(hidden, self.table("vision.embed_positions", tokens, width))
        hidden = ops.add(hidden, self.table("vision.embed_views", vision.views, width))
        hidden = part.dropout("vision.dropout", hidden)
        for index in range(vision.num_hidden_layers):
            hidden = ops.border(part.wrapped(f"vision.layers.{index}", ops.border(hidden), part.block))
        return self.hooks.leave("vision", part.wrapped("vision.norm", hidden, part.norm))

    def patch_embed(self, name: str) -> Value:
        """PatchEmbed.forward: the bytes of squares, then pixels in the compute type."""
        ops, vision = self.ops, self.model.vision
        count = ops.shape.batch * vision.views * vision.image_size**2 * CHANNELS
        self.hooks.enter(name, None)
        weight = ops.read(f"{name}.weight")
        squares = ops.new(count, 1)
        pixels = self.data(count)
        del squares
        return self.hooks.leave(name, self.ops.linear(name, pixels, vision.hidden_size, True, weight))

    def language(self) -> Value:
        """Language.forward."""
        ops, part, language = self.ops, self.parts["language"], self.model.language
        rows = ops.shape.batch * self.text
        self.hooks.enter("language", None)
        hidden = self.table("language.embed_tokens", rows, language.hidden_size)
        positions = ops.new(self.text, LONG)
        if language.position == "learned":
            hidden = ops.add(hidden, self.table("language.embed_positions", self.text, language.hidden_size))
        else:
            part.rotation = [ops.new(self.text * head_dim(language)) for _ in range(2)]
        hidden = part.dropout("language.dropout", hidden)
        for index in range(language.num_hidden_layers):
            hidden = ops.border(part.wrapped(f"language.layers.{index}", ops.border(hidden), part.block))
        hidden = part.wrapped("language.norm", hidden, part.norm)
        del positions
        part.rotation = []
        return self.hooks.leave("language", hidden)

    def fusion(self, seen: Value, read: Value) -> Value:
        """Fusion.forward."""
        ops, part, action = self.ops, self.parts["fusion"], self.model.action
        width, batch = self.model.fusion.hidden_size, ops.shape.batch
        seen, read = self.hooks.enter_all("fusion", [seen, read])
        projected = [self.inwards("fusion.vision_proj", seen, width), self.inwards("fusion.language_proj", read, width)]
        projected.append(self.inwards("fusion.state_proj", self.data(batch * action.state_dim), width))
        context = ops.joined(projected)
        del projected
        hidden = self.table("fusion.queries", batch * action.chunk_size, width)
        if action.head == "velocity":
            noised = self.data(batch * action.chunk_size * action.action_dim)
            hidden = ops.add(hidden, self.inwards("fusion.action_proj", noised, width))
            del noised
            hidden = ops.add(hidden, self.inwards("fusion.time_proj", self.data(batch * TIME_FEATURES), width))
        for index in range(self.model.fusion.num_hidden_layers):
            hidden = ops.border(self.fusion_block(f"fusion.layers.{index}", ops.border(hidden), context))
        del context
        return self.hooks.leave("fusion", part.wrapped("fusion.norm", hidden, part.norm))

    def fusion_block(self, name: str, hidden: Value, context: Value) -> Value:
        """FusionBlock.forward, checkpointed or not, with what a backend does before and after it."""
        hidden, context = self.hooks.enter_all(name, [hidden, context])
        mode = self.parts["fusion"].checkpointing
        if mode == "none":
            return self.hooks.leave(name, self.fusion_block_forward(name, hidden, context))

        def call(hidden: Value) -> Value:
            return self.fusion_block_forward(name, hidden, context)

        return self.hooks.leave(name, self.ops.checkpointed(call, hidden, selective=mode == "selective"))

    def fusion_block_forward(self, name: str, hidden: Value, context: Value) -> Value:
        """FusionBlock.forward."""
        part, ops = self.parts["fusion"], self.ops
        ops.compiled = part.compiled
        try:
            normed = part.wrapped(f"{name}.input_layernorm", hidden, part.norm)
            mixed = part.wrapped(f"{name}.self_attn", normed, part.attention)
            del normed
            hidden = ops.add(hidden, part.dropout(f"{name}.dropout", mixed))
            del mixed
            normed = part.wrapped(f"{name}.cross_attention_layernorm", hidden, part.norm)
            mixed = self.cross_attention(f"{name}.cross_attn", normed, context)
            del normed
            hidden = ops.add(hidden, part.dropout(f"{name}.dropout", mixed))
            del mixed
            normed = part.wrapped(f"{name}.post_attention_layernorm", hidden, part.norm)
            inner = part.wrapped(f"{name}.mlp", normed, part.mlp)
            del normed
            return ops.add(hidden, part.dropout(f"{name}.dropout", inner))
        finally:
            ops.compiled = False

    def cross_attention(self, name: str, hidden: Value, context: Value) -> Value:
        """CrossAttention.forward."""
        part, width = self.parts["fusion"], self.model.fusion.hidden_size
        hidden, context = self.hooks.enter_all(name, [hidden, context])
        query = part.linear(f"{name}.q_proj", hidden, width, True)
        key = part.linear(f"{name}.k_proj", context, width, True)
        value = part.linear(f"{name}.v_proj", context, width, True)
        mixed = self.ops.attention(query, key, value, head_dim(part.model))
        return self.hooks.leave(name, part.linear(f"{name}.o_proj", mixed, width, True))

    # ------------------------------------------------------------ loss

    def loss(self, predicted: Value) -> Value:
        """The error of each number in fp32, masked and summed (scaling/objectives/behaviour_cloning.py)."""
        ops, size = self.ops, predicted.elements
        if not isinstance(self.objective, BehaviourCloning):
            return self.summed(predicted)
        exact = predicted if ops.shape.width == FLOAT else ops.cast(predicted, FLOAT, ops.shape.width)
        grown = lambda *_: [ops.new(size, FLOAT)]  # noqa: E731
        apart = ops.result(size, [exact], [], lambda gradient, _: [gradient], ops.new(size, FLOAT))
        masked = ops.result(size, [apart], [], grown, ops.new(size, FLOAT))
        del apart, exact
        error = ops.result(size, [masked], [masked.storage], grown, ops.new(size, FLOAT))
        del masked
        return self.summed(error)

    def summed(self, value: Value) -> Value:
        """Its gradient is one number, seen as many."""
        return self.ops.result(1, [value], [], lambda gradient, _: [gradient], self.ops.new(1, FLOAT))
