"""Memory of a training step by phase: from the caching allocator on a GPU, from live tensors on a CPU."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from scaling.profile.clock import Clock
from scaling.profile.live import UNLABELLED, LiveBytes

_MADE_IN = {
    **dict.fromkeys(("data", "rollout", "forward"), "activations"),
    **dict.fromkeys(("backward", "optimizer"), "workspace"),
}
"""What a tensor is that nothing else is known of, by the phase in which it is made."""


class MemoryMeter(Protocol):
    """Measures while it is entered."""

    @property
    def clock(self) -> Clock:
        """Its phases are the meter's."""
        ...

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count the peak of what is inside under this name. Phases lie side by side."""
        ...

    def category(self, name: str) -> contextlib.AbstractContextManager[None]:
        """What is made inside is of this category."""
        ...

    def label(self, category: str, tensors: Iterable[Tensor], of: Collection[str] | None = None) -> None:
        """Say what these tensors are; `of`: if they were taken for one of these categories."""
        ...

    def label_rest(self, category: str) -> None:
        """Say what all is of which nothing is known yet."""
        ...

    def report(self) -> dict[str, Any]:
        """Bytes: the peak and its phase, the peaks of all phases; where known the peak's parts, what the allocator has
        reserved, and what is in use of the device.
        """
        ...


def build_meter(device: torch.device, *, by_category: bool = False) -> MemoryMeter:
    """The meter for a device. `by_category`: one that counts live tensors, on a GPU too, and so knows what they are."""
    return _Allocator(device) if device.type == "cuda" and not by_category else _Live(device)


class _PhaseClock(Clock):
    def __init__(self, device: torch.device, meter: MemoryMeter) -> None:
        super().__init__(device)
        self._meter = meter

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._meter.phase(name), super().phase(name):
            yield


class _Live:
    def __init__(self, device: torch.device) -> None:
        self.clock = _PhaseClock(device, self)
        self._live = LiveBytes(device)
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "_Live":
        self._live.__enter__()
        for owner, name, category in _known_functions():
            around = functools.partial(self._live.category, category)
            self._patches.enter_context(_wrapped(owner, name, around))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        self._live.__exit__(*error)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._live.phase(name), self._live.category(_MADE_IN.get(name, UNLABELLED)):
            yield

    def category(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._live.category(name)

    def label(self, category: str, tensors: Iterable[Tensor], of: Collection[str] | None = None) -> None:
        self._live.label(category, tensors, of)

    def label_rest(self, category: str) -> None:
        self._live.rename(UNLABELLED, category)

    @property
    def live(self) -> dict[str, int]:
        """Bytes alive now, by category."""
        return self._live.live

    def report(self) -> dict[str, Any]:
        peak = self._live.peak
        return {
            "method": "live tensors, counted",
            "peak_allocated_bytes": peak.bytes,
            "peak_phase": peak.phase,
            "phases": {phase: found.bytes for phase, found in self._live.peaks.items() if phase != UNLABELLED},
            "parts": dict(sorted(peak.parts.items(), key=lambda part: -part[1])),
            "peak_reserved_bytes": None,
            "device_used_bytes": None,
        }


class _Allocator:
    def __init__(self, device: torch.device) -> None:
        self.clock = _PhaseClock(device, self)
        self._device = device
        self._phases: dict[str, int] = {}
        self._reserved = self._used = 0

    def __enter__(self) -> "_Allocator":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        # The allocator counts when the host asks it for memory: there is nothing to wait for.
        peak = torch.cuda.max_memory_allocated(self._device)
        self._phases[name] = max(peak, self._phases.get(name, 0))
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
        free, total = torch.cuda.mem_get_info(self._device)
        self._used = max(self._used, total - free)

    def category(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def label(self, category: str, tensors: Iterable[Tensor], of: Collection[str] | None = None) -> None:
        pass

    def label_rest(self, category: str) -> None:
        pass

    def report(self) -> dict[str, Any]:
        phase = max(self._phases, key=lambda name: self._phases[name])
        return {
            "method": "the caching allocator's count",
            "peak_allocated_bytes": self._phases[phase],
            "peak_phase": phase,
            "phases": self._phases,
            "parts": {},
            "peak_reserved_bytes": self._reserved,
            "device_used_bytes": self._used,
        }


def _known_functions() -> Iterator[tuple[Any, str, str]]:
    """(owner, name, category of what is made there) of functions of FSDP2 and, if it is loaded, of DeepSpeed."""
    import sys

    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    for name in ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce"):
        yield _fsdp_param_group, name, "communication"
    # Copies by itself where there is one rank.
    yield _fsdp_param_group.FSDPParamGroup, "wait_for_unshard", "communication"
    if stage12 := sys.modules.get("deepspeed.runtime.zero.stage_1_and_2"):
        optimizer = stage12.DeepSpeedZeroOptimizer
        for name in ("setup_buckets", "average_tensor"):
            yield optimizer, name, "communication"
        for name in (
            "_build_compact_grad_partition_buffer",
            "copy_grads_in_partition",
            "_fill_param_grad_accum_attribute",
            "reduce_independent_p_g_buckets_and_remove_grads",  # copies of large ones
        ):
            yield optimizer, name, "gradients"
    if stage3 := sys.modules.get("deepspeed.runtime.zero.stage3"):
        owner = stage3.DeepSpeedZeroOptimizer_Stage3
        for name in (f"_{owner.__name__}__avg_scatter_grads", "_post_step"):  # which gathers the small parameters
            yield owner, name, "communication"
        yield owner, "_prepare_sub_group", "gradients"
    if engine := sys.modules.get("deepspeed.runtime.engine"):
        yield engine.DeepSpeedEngine, "allreduce_bucket", "communication"
    if coordinator := sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator"):
        yield coordinator.PartitionedParameterCoordinator, "fetch_sub_module", "communication"


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    real = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        with around():
            return real(*arguments, **more)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)
