"""What a process holds at the moment in which memory runs out, counted from the tensors themselves.

Tensors that a failed step has made hang on the frames of its error. So they are counted as the error passes, before
anything is freed; then they are freed, since whoever tells of it needs memory too.
"""

import contextlib
import ctypes
import gc
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scaling.host_memory import COPY_BYTES, limits, resident_bytes
from scaling.profile.storages import storages
from scaling.watch.exhausted import COPY, REST, Exhausted, Held, asked_bytes, is_exhausted, is_of_host, message_of


class _Shard(Protocol):
    @property
    def values(self) -> Tensor: ...


class Stocked(Protocol):
    """What is asked of an engine here."""

    module: nn.Module

    def state(self) -> Iterator[Any]:
        """Masters and moments, each with `values`."""
        ...


@contextlib.contextmanager
def taking_stock(
    stage: str, device: torch.device, engine: Stocked | None = None, snapshot: Path | None = None
) -> Iterator[None]:
    """Raise Exhausted, with what was held, where memory runs out inside. `stage`: see there.

    On a GPU whose allocations are recorded its allocator's snapshot is written to the file `snapshot`.
    """
    exhausted: Exhausted | None = None
    try:
        yield
    except Exception as error:
        if isinstance(error, Exhausted) or not is_exhausted(error):
            raise
        exhausted = take_stock(error, stage, device, engine, snapshot)
    if exhausted is not None:
        raise exhausted


def take_stock(
    error: Exception, stage: str, device: torch.device, engine: Stocked | None = None, snapshot: Path | None = None
) -> Exhausted:
    """What `taking_stock` raises. Frees what the frames of `error` hold."""
    of_host = is_of_host(error) or device.type == "cpu"
    message, asked = message_of(error), asked_bytes(str(error))
    held = Held()
    with contextlib.suppress(Exception):  # whatever fails here, that memory has run out is told all the same
        held = _count(error, device, engine, snapshot)
    with contextlib.suppress(Exception):
        _let_go(error)
    return Exhausted(stage, message, asked, held, of_host=of_host)


def _count(error: Exception, device: torch.device, engine: Stocked | None, snapshot: Path | None) -> Held:
    gc.unfreeze()  # what is frozen is not among the objects that the collector lists
    parts = _parts(device, engine)
    if device.type == "cuda":
        if snapshot is not None:
            with contextlib.suppress(Exception):
                snapshot.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(snapshot))
        return _of_gpu(parts, device)
    room = limits()
    resident = resident_bytes()
    _tidy()  # or what had been free before would count as freed by what follows
    before = resident_bytes()
    _let_go(error)
    after = resident_bytes()
    if before is not None and after is not None:
        # What autograd alone refers to is no object of Python's; it shows as it goes.
        parts[REST] = max(parts[REST], before - after)
    tightest = room[0] if room else None
    return Held(
        host_rss_bytes=resident,
        limit_bytes=tightest.limit_bytes if tightest else None,
        limit_name=tightest.name if tightest else "",
        free_bytes=tightest.free_bytes if tightest else None,
        parts=parts,
    )


def _of_gpu(parts: dict[str, int], device: torch.device) -> Held:
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    parts[REST] = max(0, allocated - sum(size for name, size in parts.items() if name != REST))
    limit = free = None
    with contextlib.suppress(RuntimeError):  # a context that is broken answers no more
        free, total = torch.cuda.mem_get_info(device)
        share = getattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        limit = min(free + reserved, int(share * total))
        free = max(0, limit - reserved)
    return Held(allocated, reserved, resident_bytes(), limit, "the memory of the device", free, parts)


def _parts(device: torch.device, engine: Stocked | None) -> dict[str, int]:
    """Bytes of the tensors on the device, each storage once, under the first category that has it."""
    seen: set[int] = set()

    def fresh(tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            with contextlib.suppress(Exception):  # a tensor without memory, or in the making
                for storage in storages(tensor):
                    if storage.device.type == device.type and storage._cdata not in seen:
                        seen.add(storage._cdata)
                        total += storage.nbytes()
        return total

    found: dict[str, int] = {}
    if engine is not None:
        weights = all_parameters(engine.module)
        found["parameters"] = fresh(getattr(weight, "ds_tensor", weight) for weight in weights)
        found["gradients"] = fresh(_gradients(engine.module, weights))
        # Shards on NVMe would be read into memory, which there is none of.
        with contextlib.suppress(Exception):
            if not getattr(getattr(engine.module, "optimizer", None), "swap_optimizer", False):
                found["optimizer"] = fresh(shard.values for shard in engine.state())
    others = list(_tensors())
    found[COPY] = fresh(tensor for tensor in others if _is_copy(tensor))
    found[REST] = fresh(others)
    return {name: size for name, size in found.items() if size or name != COPY}


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of a module, and those that an engine has made buffers for DeepSpeed not to cut them; each once."""
    hidden = (buffer for buffer in module.buffers() if isinstance(buffer, nn.Parameter))
    return [*module.parameters(), *hidden]


def _is_copy(tensor: Tensor) -> bool:
    """Whether it is a piece of host memory that a checkpoint is written from."""
    return type(tensor) is Tensor and tensor.dtype == torch.uint8 and tensor.numel() == COPY_BYTES


def _gradients(module: nn.Module, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Gradients of the parameters, and what DeepSpeed adds them up in."""
    for weight in weights:
        if weight.grad is not None:
            yield weight.grad
    yield from flat_gradients(module)
    for partitions in getattr(getattr(module, "optimizer", None), "averaged_gradients", {}).values():
        yield from (partition for partition in partitions or () if isinstance(partition, Tensor))


def flat_gradients(module: nn.Module) -> Iterable[Tensor]:
    """What DeepSpeed adds gradients up in, where that is there from the start: stage 1 in bf16, stage 3."""
    optimizer = getattr(module, "optimizer", None)
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return getattr(optimizer, "fp32_groups_gradients_flat", []) if flat is None else [flat]


def _tensors() -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to ask old objects for their class makes some of them warn
        for thing in gc.get_objects():
            # By type alone: `isinstance` would ask proxies and lazy modules what they are.
            if issubclass(type(thing), Tensor):
                yield thing


def _let_go(error: BaseException) -> None:
    """Free what the frames of `error` hold, and what allocators keep for later."""
    seen: BaseException | None = error
    for _ in range(100):  # chains are short
        if seen is None:
            break
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    _tidy()


def _tidy() -> None:
    """Give back what allocators keep for later."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
