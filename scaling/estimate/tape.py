"""Which memory a training step holds when: autograd played with sizes in place of tensors.

A `Storage` counts as alive from the line that makes it until Python lets go of it, so code that names its values as
the model's code does holds them for as long. A `Node` keeps what its backward function needs, and `backward` runs the
functions in the order of torch's engine (torch/csrc/autograd/engine.cpp): of those that are ready the latest made
first, an incoming gradient freed before what was kept, and a sum of two gradients a third tensor.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from scaling.records import Peak
from scaling.units import ALLOCATION_BYTES


class Tape:
    """Notes what is made and freed, in blocks of `rounding` bytes; what was alive when is worked out afterwards."""

    def __init__(self, rounding: int = ALLOCATION_BYTES) -> None:
        self.rounding = rounding
        self.changes: list[int] = []
        """Bytes more, or less, one after the other."""
        self.categories: list[str] = []
        """Of each change: what it is of."""
        self.marks: list[tuple[int, str]] = [(0, "other")]
        """(index of a change, phase): from there on."""
        self.host_bytes = 0
        """In host memory."""
        self.category = "other"
        self.nodes = itertools.count()

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.changes)

    @property
    def peak(self) -> Peak:
        """The peak of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes, default=Peak())

    @property
    def peaks(self) -> dict[str, Peak]:
        """By phase."""
        totals = list(itertools.accumulate(self.changes, initial=0))  # before each change, and after the last
        ends = [*(start for start, _ in self.marks[1:]), len(self.changes)]
        where: dict[str, int] = {}
        for (start, phase), end in zip(self.marks, ends, strict=True):
            highest = max(range(start, end + 1), key=totals.__getitem__)
            if phase not in where or totals[highest] > totals[where[phase]]:
                where[phase] = highest
        return {phase: Peak(totals[place], phase, self.parts(place)) for phase, place in where.items()}

    def mark(self) -> None:
        """Something of the same phase begins: a block, say."""
        self.marks.append((len(self.changes), self.marks[-1][1]))

    def parts(self, place: int) -> dict[str, int]:
        """Bytes by category after so many changes."""
        found: Counter[str] = Counter()
        for category, more in zip(self.categories[:place], self.changes, strict=False):
            found[category] += more
        return {category: count for category, count in found.items() if count}

    @contextmanager
    def during(self, phase: str, category: str) -> Iterator[None]:
        """Count peaks under `phase`; what is made is of `category` unless it says otherwise."""
        before, self.category = (self.marks[-1][1], self.category), category
        self.marks.append((len(self.changes), phase))
        yield
        self.marks.append((len(self.changes), before[0]))
        self.category = before[1]


class Storage:
    """Memory of one or more tensors; gone when nobody refers to it any more."""

    __slots__ = ("born", "bytes", "category", "tape")

    def __init__(self, tape: Tape, count: int, category: str | None = None) -> None:
        self.tape = tape
        self.category = category = category or tape.category
        self.bytes = count = -(-count // tape.rounding) * tape.rounding
        self.born = len(tape.changes)
        tape.changes.append(count)
        tape.categories.append(category)

    def __del__(self) -> None:
        self.tape.changes.append(-self.bytes)
        self.tape.categories.append(self.category)

    def resize(self, count: int) -> None:
        """Be of another size, for all who refer to it: FSDP2 frees what it gathered in this way."""
        before, self.bytes = self.bytes, -(-count // self.tape.rounding) * self.tape.rounding
        self.tape.changes.append(self.bytes - before)
        self.tape.categories.append(self.category)

    @property
    def content(self) -> "Storage":
        """What stays alive with one who keeps not this, but what is in it now."""
        return self

    @property
    def recomputed(self) -> "Storage":
        """What stays alive with recomputation that keeps it."""
        return self

    def rename(self, category: str) -> None:
        """Be of another category, and have been so always. Not for what was resized."""
        self.category = self.tape.categories[self.born] = category


class Refilled(Storage):
    """Memory that is other memory after each change of its size: ZeRO-3 gives a parameter a new tensor as its data."""

    __slots__ = ("_content", "_trained")

    def __init__(self, tape: Tape, category: str, *, trained: bool) -> None:
        super().__init__(tape, 0, category)
        self._content: Storage | None = None
        self._trained = trained

    def resize(self, count: int) -> None:
        self._content = None
        self._content = Storage(self.tape, count, self.category) if count else None

    @property
    def content(self) -> Storage:
        return self._content or self

    @property
    def recomputed(self) -> Storage:
        # torch/utils/checkpoint.py detaches what requires a gradient, and keeps a frozen parameter itself.
        return self.content if self._trained else self


Gradients = Sequence[Storage | None]
Backward = Callable[[Storage, list[Storage]], Gradients]


class Node:
    """A backward function, what it keeps, and where its gradients go."""

    __slots__ = ("edges", "frame", "number", "run", "saved")
    joins = False
    """Its result comes in parts, as views: their gradients are not added up."""

    def __init__(self, tape: Tape, edges: "Sequence[Node | None]", saved: Sequence[Storage], run: "Backward") -> None:
        self.number = next(tape.nodes)
        self.edges = edges
        """For each input: the node that takes its gradient; None where none is wanted."""
        self.saved = list(saved)
        self.run = run
        """From the gradient of the result, and what was kept, to those of the inputs, in the order of `edges`."""
        self.frame: tuple[Frame, int] | None = None
        """Where what it keeps comes from, if it is made again in the backward pass."""

    def backward(self, gradients: list[Storage]) -> Gradients:
        """Its gradients from the one in the list, which is emptied; what was kept is let go."""
        if self.frame is not None:
            frame, index = self.frame
            self.saved = frame.take(index)
            self.frame = None
            del frame
        found = self.run(gradients.pop(), self.saved)
        self.saved = []
        return found


class Split(Node):
    """Parts of a tensor."""

    __slots__ = ()
    joins = True


class Leaf(Node):
    """A parameter that trains: takes its gradient over, or adds to the one that is there."""

    __slots__ = ("category", "grad")

    def __init__(self, tape: Tape, category: str | None = "gradients") -> None:
        super().__init__(tape, (), (), lambda *_: ())
        self.number = -1
        self.category = category
        """What a gradient becomes here."""
        self.grad: Storage | None = None

    def backward(self, gradients: list[Storage]) -> Gradients:
        self.take(gradients)
        return ()

    def take(self, gradients: list[Storage]) -> None:
        """Keep the gradient in the list, which is emptied, or add it to the one that is there; without one in the list
        that has been done."""
        gradient = gradients.pop() if gradients else None
        if self.grad is None:
            assert gradient is not None
            self.grad = gradient
            if self.category is not None and gradient.category == "workspace":
                gradient.rename(self.category)


class Frame:
    """A call whose nodes keep nothing but what the call needs: the first of them to run makes it again.

    As torch.utils.checkpoint does without reentry: the call is repeated up to the last value that any node keeps.
    """

    class Enough(Exception):
        """All that is kept has been made."""

    def __init__(self, again: "Callable[[Frame], None]", *, selective: bool) -> None:
        self._again = again
        """Plays the call with the given frame, this one, as the one at work."""
        self.selective = selective
        self._saved: list[list[Storage] | None] = []
        self._last = -1
        self._next: int | None = None
        self.kept: list[Storage | None] = []
        """Results that selective checkpointing keeps, in their order."""
        self.taken = 0

    @property
    def repeats(self) -> bool:
        """Whether the call is being repeated."""
        return self._next is not None

    def enter(self, node: Node, saved: Sequence[Storage]) -> None:
        """A node of the call, which would keep `saved`."""
        if self._next is None:
            if saved:
                self._last = len(self._saved)
                node.frame = (self, self._last)
            self._saved.append(None)
            return
        index, self._next = self._next, self._next + 1
        self._saved[index] = [storage.recomputed for storage in saved]
        if index == self._last:
            raise Frame.Enough

    def take(self, index: int) -> list[Storage]:
        """What a node keeps."""
        if self._saved[index] is None:
            self._next = 0
            with suppress(Frame.Enough):
                self._again(self)
            self._next = None
        found, self._saved[index] = self._saved[index], None
        assert found is not None
        return found


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor: its memory, its elements, and who takes its gradient."""

    storage: Storage
    elements: int
    node: Node | None = None
    cheap: bool = False
    """Compiled code makes it again in the backward pass rather than keep it."""


def together(tape: Tape, values: Sequence[Value], act: Callable[[], None]) -> list[Value]:
    """The same values, none of whose gradients goes on before all are there and `act` was called: one function."""
    edges = [value.node for value in values if value.node]
    if len(edges) == 1:

        def alone(gradient: Storage, _: list[Storage]) -> Gradients:
            act()
            return [gradient]

        return [_through(value, Node(tape, edges, [], alone)) if value.node else value for value in values]
    held: dict[int, Storage] = {}

    def go_on(_: Storage, __: list[Storage]) -> Gradients:
        act()
        return [held.pop(place) for place in range(len(edges))]

    function = Split(tape, edges, [], go_on)

    def arrival(place: int) -> Node:
        def arrive(gradient: Storage, _: list[Storage]) -> Gradients:
            held[place] = gradient
            return [Storage(tape, 0)]

        return Node(tape, [function], [], arrive)

    arrivals = (arrival(place) for place in range(len(edges)))
    return [_through(value, next(arrivals)) if value.node else value for value in values]


def _through(value: Value, node: Node) -> Value:
    return Value(value.storage, value.elements, node)


def backward(tape: Tape, root: Node, gradient: Storage) -> None:
    """Run the backward functions from `root` on, each when all gradients of its result are there."""
    waiting = _dependencies(root)
    gradients: dict[int, list[Storage]] = {id(root): [gradient]}
    del gradient
    ready: list[tuple[int, int, Node]] = [(-root.number, 0, root)]
    order = itertools.count(1)
    while ready:
        node = heapq.heappop(ready)[2]
        # A leaf takes the gradient itself; for others it is gone before what they keep.
        found = list(node.backward(gradients.pop(id(node), [])))
        for index, edge in enumerate(node.edges):
            if edge is None:
                continue
            part, found[index] = found[index], None
            there = gradients.get(id(edge))
            if part is None:
                assert isinstance(edge, Leaf), "only a leaf has a gradient that was added to"
            elif there is None:
                gradients[id(edge)] = [part]
            elif edge.joins:
                there.append(part)
            else:
                there[0] = Storage(tape, max(there[0].bytes, part.bytes))
            del part, there
            waiting[id(edge)] -= 1
            if not waiting[id(edge)]:
                first = float("-inf") if isinstance(edge, Leaf) else -edge.number
                heapq.heappush(ready, (first, next(order), edge))  # pyright: ignore[reportArgumentType]


def _dependencies(root: Node) -> dict[int, int]:
    """How many gradients come to each node, by its id."""
    found: dict[int, int] = {}
    todo = [root]
    while todo:
        for edge in todo.pop().edges:
            if edge is None:
                continue
            if id(edge) in found:
                found[id(edge)] += 1
            else:
                found[id(edge)] = 1
                todo.append(edge)
    return found
