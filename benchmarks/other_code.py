"""What other projects' training code holds where it differs from this one's: played as scaling/estimate plays ours.

Only benchmarks/published.py uses this, so that what is compared is how a step is played, not whose code it is. Each
class names the code it stands for. What is not named here is taken to be as ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scaling.estimate.decoder import PlayedDecoder
from scaling.estimate.deepspeed_engines import ZeRO3
from scaling.estimate.ops import FLOAT, Ops, Shape
from scaling.estimate.step import Cast
from scaling.estimate.tape import Leaf, Split, Storage, Tape, Value
from scaling.estimate.torch_engines import FSDP, Single
from scaling.groups import Group
from scaling.inventory import Parameter
from scaling.records import BatchPlan
from scaling.spec.sections import Spec

# ---------------------------------------------------------------- operations


class RepeatingOps(Ops):
    """Keys and values are copied for every query head before attention (torchtitan's repeat_kv, torchtune's expand)."""

    def attention(self, query: Value, key: Value, value: Value, width: int, mask: Storage | None = None) -> Value:
        key, value = self._repeated(key, query.elements), self._repeated(value, query.elements)
        return super().attention(query, key, value, width, mask)

    def _repeated(self, value: Value, size: int) -> Value:
        small = value.elements
        return value if small == size else self.result(size, [value], [], lambda *_: [self.new(small)])


class TitanOps(RepeatingOps):
    """torchtitan's selective checkpointing "op": of a block's products every second is made again."""

    AGAIN = (".k_proj", ".o_proj", ".up_proj")
    """The second, fourth and sixth of wq, wk, wv, wo, w1 (our gate), w3, w2."""

    def __init__(self, tape: Tape, shape: Shape, **options: Any) -> None:
        super().__init__(tape, shape, **options)
        self._again = False

    def linear(self, name: str, inputs: Value, outputs: int, bias: bool) -> Value:
        self._again = name.endswith(self.AGAIN)
        try:
            return super().linear(name, inputs, outputs, bias)
        finally:
            self._again = False

    def kept(self, elements: int, width: int | None = None) -> Storage:
        return self.new(elements, width) if self._again else super().kept(elements, width)


class TuneOps(RepeatingOps):
    """torchtune's RMSNorm is composed: normed in fp32, cast, then weighted. Compiled it keeps what a fused one does."""

    def rms_norm(self, name: str, inputs: Value, columns: int, *, composed: bool = False) -> Value:
        if self.compiled:
            return super().rms_norm(name, inputs, columns, composed=composed)
        weight = self.read(f"{name}.weight")
        size = inputs.elements
        exact = self.cast(inputs, FLOAT, self.shape.width)
        saved = [exact.storage, self.new(size // columns, FLOAT)]
        normed = self.result(size, [exact], saved, lambda *_: [self.new(size, FLOAT)], self.new(size, FLOAT))
        del exact, saved
        half = self.cast(normed, self.shape.width, FLOAT)
        del normed
        sizes = self.wanted((half, weight), (size, columns))
        return self.result(size, [half, weight], [half.storage, weight.storage], lambda *_: self.made(sizes))


# ---------------------------------------------------------------- losses


class FusedLoss(PlayedDecoder):
    """Cross-entropy in one kernel each way, that reads logits and writes gradients in 16 bits: flash-attn's, which
    llm-foundry uses unless told otherwise, or torch.compile's."""

    def plain_loss(self, hidden: Value, weight: Value) -> Value:
        ops = self.ops
        size = ops.shape.rows * self.model.vocab_size
        sizes = ops.wanted((hidden, weight), (hidden.elements, weight.elements))
        saved = [hidden.storage] * bool(weight.node) + [weight.storage] * bool(hidden.node)
        logits = ops.result(size, [hidden, weight], saved, lambda *_: ops.made(sizes))
        saved = [logits.storage, ops.new(ops.shape.rows, FLOAT)]
        return ops.result(1, [logits], saved, lambda *_: [ops.new(size)], ops.new(1, FLOAT))


class EightChunks(PlayedDecoder):
    """Logits and loss of an eighth of each sequence at a time, each with its own graph: all are there in the end."""

    CHUNKS = 8

    def plain_loss(self, hidden: Value, weight: Value) -> Value:
        ops, whole = self.ops, self.ops.shape
        assert hidden.node is not None
        size, count = hidden.elements, hidden.elements // self.CHUNKS
        cut = Split(ops.tape, [hidden.node], [], lambda *_: [ops.new(size)])
        ops.shape = replace(whole, sequence=whole.sequence // self.CHUNKS)
        total: Value | None = None
        for _ in range(self.CHUNKS):
            part = super().plain_loss(Value(hidden.storage, count, cut), weight)
            total = part if total is None else ops.add(total, part)
        ops.shape = whole
        assert total is not None
        return total


class EightFusedChunks(EightChunks, FusedLoss):
    """torchtune compiles the loss of a chunk (its CEWithChunkedOutputLoss)."""


# ---------------------------------------------------------------- engines


class TitanFSDP(FSDP):
    """torchtitan wraps its blocks alone: embeddings, last norm and head are the root's."""

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        blocks = [dict(entry) for entry in rendered["wrap"] if entry["modules"][0].startswith("layers.")]
        blocks[-1]["reshard_after_forward"] = False
        super().__init__(ops, spec, groups, rendered | {"wrap": blocks}, plan)


class Half(Single):
    """Everything in the compute type, the optimizer's state too (torchtune's "full bf16")."""

    def build(self) -> None:
        new = self.ops.new
        for parameter in self.parameters:
            count = parameter.elements
            self.values[parameter.name] = Value(new(count, None, "parameters"), count, self.leaves[parameter.name])
        total = sum(parameter.elements for parameter in self.parameters)
        self._state += self.state(total)

    def state(self, total: int) -> list[Storage]:
        """The optimizer's."""
        return [self.ops.new(total, None, "optimizer") for _ in range(2)]

    def read(self, name: str) -> Value:
        return self.values[name]


class InternEvo(Half):
    """Whole parameters and gradients in bf16; masters and moments cut, gradients upcast part by part in the update."""

    RANKS: int | None = None
    """Ranks that share the state; None: all."""

    def __init__(
        self, ops: Ops, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan
    ) -> None:
        self.ranks = min(self.RANKS or plan.world_size, plan.world_size)
        super().__init__(ops, spec, groups, rendered, plan)

    def state(self, total: int) -> list[Storage]:
        self.part = -(-total // self.ranks)
        return [self.ops.new(self.part, FLOAT, "optimizer") for _ in range(3)]

    def step(self) -> None:
        exact = self.ops.new(self.part, FLOAT, "gradients")
        del exact
        self.forget()


class InternEvoByNode(InternEvo):
    """With `zero1` of 8."""

    RANKS = 8


class HalfGradients(ZeRO3):
    """ZeRO-3 with gradients in bf16 and not, as here, in fp32; a sub-group's are flattened, then upcast."""

    def build(self) -> None:
        super().build()
        for storage in self.held_state[-2:]:  # this rank's gradients, and the bucket
            storage.resize(storage.bytes // 2)

    def step(self) -> None:
        for name in list(self.ready):
            self.free(name)
        for count in self.sub_groups:
            flat = self.ops.new(count, None, "gradients")
            exact = self.ops.new(count, FLOAT, "gradients")
            del flat, exact


class _Passing(Leaf):
    """A gradient that goes to a bucket at once, or waits for the end of its micro-step."""

    __slots__ = ("waits",)

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self.waits = False

    def take(self, gradients: list[Storage]) -> None:
        super().take(gradients)
        if not self.waits:
            self.grad = None


class NanotronDDP(InternEvo):
    """nanotron: bf16 gradients in DDP's buckets, added up in whole fp32 ones; masters and moments on every rank."""

    RANKS = 1

    def leaf(self, parameter: Parameter) -> Leaf:
        return _Passing(self.tape)

    def state(self, total: int) -> list[Storage]:
        gradients = self.ops.new(total, FLOAT, "gradients")
        return [*super().state(total), gradients, self.ops.new(total, None, "communication")]

    def begin(self, *, last: bool) -> None:
        for leaf in self.leaves.values():
            assert isinstance(leaf, _Passing)
            leaf.waits = not last

    def end(self) -> None:
        self.forget()

    def step(self) -> None:
        pass


class NanotronZeRO1(NanotronDDP):
    """The same with masters and moments cut; gradients stay whole."""

    RANKS = None


TITAN = Cast(TitanOps, engine=TitanFSDP)
TITAN_CHUNKED = Cast(TitanOps, EightChunks, TitanFSDP)
TUNE = Cast(TuneOps, engine=Half)
TUNE_CHUNKED = Cast(TuneOps, EightFusedChunks, Half)
FOUNDRY = Cast(decoder=FusedLoss)
NANOTRON = {"DDP": Cast(engine=NanotronDDP), "ZeRO-1": Cast(engine=NanotronZeRO1)}
EXAMPLES = Cast(engine=HalfGradients)
INTERNEVO, INTERNEVO_BY_NODE = Cast(engine=InternEvo), Cast(engine=InternEvoByNode)
