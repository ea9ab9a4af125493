"""A whole training step of one process, played: what it holds before, through forward and backward passes."""

from collections.abc import Sequence

from scaling.estimate.decoder import FLOAT, LONG, Ops, PlayedDecoder, Shape
from scaling.estimate.tape import Leaf, Node, Storage, Tape, Value, backward
from scaling.groups import Group
from scaling.inventory import parameters
from scaling.records import BatchPlan
from scaling.spec.sections import CausalLM, Spec

WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}


def play_single(spec: Spec, plan: BatchPlan, groups: Sequence[Group]) -> Tape:
    """The forward and backward passes of a step of the backend "single" once Adam has its moments; no activation
    checkpointing, no dropout, not compiled, and normalisation as torch composes it on a CPU.
    """
    tape = Tape()
    width = WIDTHS[spec.precision]
    state = _State(tape, spec, groups, width)
    shape = Shape(plan.micro_batch, plan.sequence_length, width)
    chunked = not isinstance(spec.objective, CausalLM) or spec.objective.cross_entropy == "chunked"
    decoder = PlayedDecoder(spec.model, Ops(tape, shape, state.read), chunked=chunked)
    with tape.during("data", "activations"):
        held = [Storage(tape, LONG * shape.rows) for _ in range(2 * plan.accumulation)]
    # Targets, scale and loss of the step; of the step before, what the optimizer was given.
    held += [Storage(tape, FLOAT, "other") for _ in range(3)] + [Storage(tape, FLOAT, "workspace") for _ in range(2)]
    loss: Value | None = None
    for _ in range(plan.accumulation):
        with tape.during("forward", "activations"):
            loss = decoder.forward()
        with tape.during("backward", "workspace"):
            scaled = [Storage(tape, FLOAT) for _ in range(2)]
            node, loss = loss.node, Value(loss.storage, 1)  # the loss is held, what it came from is not
            assert node is not None, "something trains: the spec refuses others"
            backward(tape, node, Storage(tape, FLOAT))
            del scaled, node
    del held
    return tape


class _State:
    """Parameters in fp32, and Adam's state of those that train."""

    def __init__(self, tape: Tape, spec: Spec, groups: Sequence[Group], width: int) -> None:
        self._tape = tape
        self._width = width
        frozen = {name for group in groups if group.frozen for name in group.names}
        self._values: dict[str, Value] = {}
        self._moments: list[Storage] = []
        with tape.during("build", "parameters"):
            for parameter in parameters(spec.model):
                leaf = None if parameter.name in frozen else Leaf(tape)
                size = FLOAT * parameter.elements
                self._values[parameter.name] = Value(Storage(tape, size), parameter.elements, leaf)
                if leaf is not None:
                    self._moments += [Storage(tape, count, "optimizer") for count in (size, size, FLOAT)]

    def read(self, name: str) -> Value:
        """The parameter in the compute type: itself, or a copy whose gradient is cast back."""
        value, tape = self._values[name], self._tape
        if self._width == FLOAT:
            return value
        size = value.elements
        copy = Storage(tape, self._width * size)
        if value.node is None:
            return Value(copy, size)
        return Value(copy, size, Node(tape, [value.node], [], lambda *_: [Storage(tape, FLOAT * size, "gradients")]))
