"""Live bytes of tensors on one device, by category and phase: what an allocator would hold, on any machine.

    with LiveBytes(torch.device("cpu")) as live:
        live.label("parameters", model.parameters())
        with live.phase("forward"):
            loss = model(batch)
    live.peak            # bytes, parts by category, phase

Storages are counted, not tensors: views cost nothing. A storage lives from the operation that makes it until the last
reference to its memory is gone, autograd's among them. What a kernel allocates and frees inside one operation is not
seen (torch.distributed._tools.mem_tracker counts in the same way, by module).
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaling.profile.storages import storages
from scaling.records import Peak
from scaling.units import ALLOCATION_BYTES

UNLABELLED = "other"


@dataclass
class _Label:
    """What a storage is; sizes that it has had share one."""

    category: str


@dataclass
class _Span:
    """A storage at one size: alive from one event to before another."""

    label: _Label
    bytes: int
    born: int
    died: float = math.inf


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. Not for use in several threads."""

    def __init__(self, device: torch.device, *, rounding: int = ALLOCATION_BYTES) -> None:
        super().__init__()
        self._device = device.type
        self._rounding = rounding
        self._phase = self._category = UNLABELLED
        self._spans: list[_Span] = []
        self._known: dict[int, tuple[ref[torch.UntypedStorage], _Span]] = {}
        self._event = self._total = 0
        self._peaks: dict[str, tuple[int, int]] = {}
        """Phase -> (bytes, event) of its peak."""
        self._resize: Callable[..., Any] | None = None

    @property
    def live(self) -> dict[str, int]:
        """Bytes alive now, by category."""
        return self._parts(self._event)

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peak of each phase, by the labels of now."""
        return {phase: Peak(total, phase, self._parts(event)) for phase, (total, event) in self._peaks.items()}

    @property
    def peak(self) -> Peak:
        """The peak of all."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes, default=Peak())

    def label(self, category: str, tensors: Iterable[Tensor], of: Collection[str] | None = None) -> None:
        """Say what these tensors are, and have always been; `of`: if they were one of these categories."""
        for tensor in tensors:
            for known in self._spans_of(tensor):
                if of is None or known.label.category in of:
                    known.label.category = category

    def rename(self, category: str, new: str) -> None:
        """Call what is alive now of one category by another name."""
        for span in self._spans:
            if span.label.category == category and span.died == math.inf:
                span.label.category = new

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count peaks under this name."""
        before, self._phase = self._phase, name
        self._note(0)
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What is made meanwhile is of this category."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def __enter__(self) -> "LiveBytes":
        resize = self._resize = torch.UntypedStorage.resize_

        @functools.wraps(resize)
        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP2 frees gathered parameters like this, past the dispatcher."""
            result = resize(storage, size)
            if storage.device.type == self._device:
                self._span(storage)
            _, known = self._known.get(storage._cdata, (None, None))
            if known is not None and known.bytes != self._rounded(storage.nbytes()):
                self._end(storage._cdata)
                self._begin(storage, known.label)
            return result

        torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # pyright: ignore[reportAttributeAccessIssue]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._spans_of(leaf)
        return result

    def _spans_of(self, tensor: Tensor) -> list[_Span]:
        """What is known of the tensor's memory; nothing where it is on another device."""
        # The storage of a fake tensor is on the meta device; asking such a tensor for its device costs a dispatch.
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if device.type != self._device:
            return []
        return [self._span(storage) for storage in storages(tensor)]

    def _span(self, storage: torch.UntypedStorage) -> _Span:
        """What is known of a storage, from now on at the latest."""
        if storage._cdata not in self._known:
            self._begin(storage, _Label(self._category))
        return self._known[storage._cdata][1]

    def _begin(self, storage: torch.UntypedStorage, label: _Label) -> None:
        key = storage._cdata
        span = _Span(label, self._rounded(storage.nbytes()), self._event + 1)
        self._known[key] = (ref(storage, lambda _: self._end(key)), span)
        self._spans.append(span)
        self._note(span.bytes)

    def _end(self, key: int) -> None:
        span = self._known.pop(key)[1]
        self._note(-span.bytes)
        span.died = self._event

    def _note(self, more: int) -> None:
        self._event += 1
        self._total += more
        if self._total > self._peaks.get(self._phase, (0, 0))[0]:
            self._peaks[self._phase] = (self._total, self._event)

    def _parts(self, event: int) -> dict[str, int]:
        parts: Counter[str] = Counter()
        for span in self._spans:
            if span.born <= event < span.died:
                parts[span.label.category] += span.bytes
        return {category: count for category, count in parts.items() if count}

    def _rounded(self, count: int) -> int:
        return -(-count // self._rounding) * self._rounding
