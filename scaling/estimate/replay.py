"""A recorded step (scaling/recording.py) played on a tape under any backend."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scaling.errors import UserError
from scaling.estimate.ops import FLOAT, Ops
from scaling.estimate.tape import Node, Storage, Value
from scaling.estimate.torch_engines import Single
from scaling.inventory import ledger_of
from scaling.spec.sections import Recorded, Spec, caches_features


def recorded_ledger(spec: Spec, model: Recorded, frozen: Collection[str]) -> Mapping[str, Any]:
    """The ledger of an inventory file; UserError where it was not recorded for steps as those of `spec`."""
    ledger = ledger_of(model)
    wanted = {
        "sequence_length": spec.data.sequence_length,
        "precision": spec.precision,
        "objective": spec.objective.model_dump(mode="json"),
        "lora": spec.lora.model_dump(mode="json") if spec.lora else None,
        "features": caches_features(spec.data),
        "frozen": sorted(frozen),
    }
    for name, value in wanted.items():
        if (recorded := ledger.get(name, False)) != value:
            was, now = (recorded, value) if name in ("sequence_length", "precision") else ("others", "these")
            raise UserError(
                f"`model.inventory` must be recorded for the spec's {_WORDS[name]} ({now}), but "
                f"{str(model.inventory)[:200]!r} is for {was}; run `python -m scaling.inventory SPEC` again"
            )
    return ledger


_WORDS = {
    "sequence_length": "data.sequence_length",
    "precision": "precision",
    "objective": "objective",
    "lora": "lora",
    "features": "data.cache_features",
    "frozen": "frozen parameters",
}


class Replay:
    """The passes of a recorded model."""

    def __init__(self, events: Sequence[list[Any]], ops: Ops, engine: Single, buffer_bytes: int = 0) -> None:
        with ops.tape.during("build", "framework"):
            self._buffers = Storage(ops.tape, buffer_bytes)
        self._events = events
        self._ops, self._engine = ops, engine
        self._tape = ops.tape
        self._casts = engine.casts_where_read and ops.shape.width != FLOAT
        self._there: dict[int, Storage | None] = {}
        self._place = 0
        self._ends: dict[int, Node] = {}
        """What a backend does when the backward pass of a module ends, by the number of the module's entry."""
        self._begins: dict[int, Node] = {}
        self._nothing = Node(self._tape, (), (), lambda *_: ())

    def forward(self) -> None:
        """Up to the loss."""
        self._there.clear()
        self._place = 0
        self._play(backward=False)

    def backward(self) -> None:
        """From the loss to the last gradient."""
        self._play(backward=True)
        self._there.clear()
        self._ends.clear()
        self._begins.clear()

    def _play(self, *, backward: bool) -> None:
        there, tape, micro = self._there, self._tape, self._ops.shape.batch
        events = self._events
        for place in range(self._place, len(events)):
            event = events[place]
            match event[0]:
                case "+":
                    there[event[1]] = Storage(tape, event[2] + event[3] * micro)
                case "l":
                    there[event[1]] = Storage(tape, event[2] + event[3] * micro, "logits")
                case "-":
                    there.pop(event[1], None)
                case "|":
                    self._place = place + 1
                    return
                case "c":
                    there[event[1]] = Storage(tape, self._ops.shape.width * event[2]) if self._casts else None
                case "u":
                    there[event[1]] = Storage(tape, FLOAT * event[3]) if self._casts else there.get(event[2])
                case "s":
                    there[event[1]] = Storage(tape, (FLOAT if self._casts else self._ops.shape.width) * event[2])
                case "g":
                    self._take(*event[1:])
                case ">":
                    self._enter(*event[1:], again=backward)
                case "<":
                    self._leave(*event[1:])
                case "b>":
                    self._run(self._begins.pop(event[1], None))
                case _:
                    self._run(self._ends.pop(event[1], None))

    def _take(self, name: str, number: int, last: int) -> None:
        gradient = self._there.pop(number) if last else self._there[number]
        assert gradient is not None
        held = [gradient]
        del gradient  # whoever takes it may let it go
        self._engine.leaves[name].take(held)

    def _enter(self, number: int, module: str, wants: int, *, again: bool) -> None:
        value = self._stand_in(wants)
        self._ops.repeats = again
        if module:
            found = self._engine.enter_all(module, [value])
        else:
            self._engine.enter(module, None)
            found = []
        self._ops.repeats = False
        if found and found[0].node not in (None, self._nothing) and wants:
            self._ends[number] = found[0].node

    def _leave(self, number: int, module: str, gives: int) -> None:
        found = self._engine.leave(module, self._stand_in(gives))
        if found.node not in (None, self._nothing):
            self._begins[number] = found.node

    def _stand_in(self, wants: int) -> Value:
        return Value(Storage(self._tape, 0), 0, self._nothing if wants else None)

    def _run(self, node: Node | None) -> None:
        if node is not None:
            node.run(Storage(self._tape, 0), [])
