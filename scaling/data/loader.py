"""Which rank reads which samples when, and reading ahead of the training loop.

Nothing here ends early on one rank: the number of micro-batches follows from the arguments alone.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from scaling.data.dataset import Dataset, MicroBatch, Samples
from scaling.data.hashing import derive, derive_each
from scaling.data.order import sample_indices

_BUNDLES_AHEAD = 2
"""Bundles of steps that wait in memory: one more than needed, for steps that take longer to read than others."""
_MOST_STEPS, _MOST_BYTES = 16, 2**22
"""Of a bundle. Where both threads run Python they hand each other the interpreter again and again, which takes longer
than to read a step of text; steps that are read together cost that once."""
_NOISE = 0x6E6F697365
"""Of the keys of samples: no other use of the seed has this word."""
_STOP_CHECK_S = 0.1
_STOP_WAIT_S = 5.0
"""How long closing waits for a read under way, on storage that hangs, say; the thread dies with the process."""


def step_batches(
    dataset: Dataset,
    *,
    seed: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world_size: int,
    first_samples: Iterable[int],
    device: torch.device,
    pieces: Iterable[int] | None = None,
) -> Generator[list[Samples], None, None]:
    """The micro-batches of this rank, `accumulation` of them for each optimizer step.

    A step whose first global sample is s is made of the samples s .. s + B - 1, where B = micro_batch x world_size x
    accumulation, for any world size: micro-step a of rank r takes `micro_batch` of them from
    s + (a world_size + r) micro_batch on. `first_samples` has that s for each step, `pieces` into how many each of its
    sequences is cut, if it is.

    From the first `next` on, a thread reads ahead, into pinned memory if the device is a GPU. What it raises is raised
    here, as it is; `close()` ends it.
    """
    assert 0 <= rank < world_size and micro_batch > 0 and accumulation > 0
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.current_device() if on_gpu and device.index is None else device.index  # a new thread's is always 0

    def read_step(first_sample: int, pieces: int) -> list[Samples]:
        batches: list[Samples] = []
        for micro_step in range(accumulation):
            first = first_sample + (micro_step * world_size + rank) * micro_batch
            batch = dataset.read(sample_indices(first, micro_batch, len(dataset), seed)).keyed(partial(keys, first))
            if pieces > 1:
                assert isinstance(batch, MicroBatch), "the spec refuses others"
                batch = batch.cut(pieces)
            batches.append(batch.each(Tensor.pin_memory) if on_gpu else batch)
        return batches

    def keys(first: int) -> np.ndarray:
        return derive_each(derive(seed, _NOISE), np.arange(first, first + micro_batch, dtype=np.uint64))

    def steps() -> Iterator[list[Samples]]:
        if on_gpu:
            torch.cuda.set_device(gpu)  # or pinning would occupy some hundred MB of GPU 0 from every rank
        return map(read_step, first_samples, repeat(1) if pieces is None else pieces)

    return _read_ahead(steps)


def validation_batches(
    dataset: Dataset, *, samples: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[Samples]:
    """This rank's share of a fixed set: `samples` samples spread over the dataset, or all if it has fewer.

    Over all ranks each sample comes once, and each rank gets as many batches as the others: places that are left over
    at the end hold the last sample with all targets masked.
    """
    assert 0 <= rank < world_size and micro_batch > 0
    samples = min(samples, len(dataset))
    # Shuffled, always alike: neighbours come from one file, and the first of a data set seldom stand for it.
    chosen = sample_indices(0, samples, len(dataset), seed=0)
    for first in range(0, samples, micro_batch * world_size):
        places = first + rank * micro_batch + np.arange(micro_batch)
        batch = dataset.read(chosen[np.minimum(places, samples - 1)])
        batch.leave_out(torch.from_numpy(places >= samples))
        yield batch


def _read_ahead(start: Callable[[], Iterator[list[Samples]]]) -> Generator[list[Samples], None, None]:
    """The steps of start(), which a thread of its own calls and walks through, some steps ahead."""
    ready: queue.Queue[tuple[list[list[Samples]], BaseException | None]] = queue.Queue(maxsize=_BUNDLES_AHEAD)
    closed = threading.Event()

    def offer(steps: list[list[Samples]], error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                ready.put((steps, error), timeout=_STOP_CHECK_S)
                return
            except queue.Full:
                continue

    def work() -> None:
        bundle: list[list[Samples]] = []
        size = 1
        try:
            for step in start():
                bundle.append(step)
                if len(bundle) == size:
                    awaited = ready.empty()  # then reading is what takes long, and every step is handed over at once
                    offer(bundle)
                    room = _MOST_BYTES // max(1, sum(batch.nbytes for batch in step))
                    size = 1 if awaited else max(1, min(2 * size, _MOST_STEPS, room))
                    bundle = []
                if closed.is_set():
                    return
            if bundle:
                offer(bundle)
            offer([])  # the end
        except BaseException as error:
            offer(bundle, error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            steps, error = ready.get()
            yield from steps
            if error is not None:
                raise error
            if not steps:
                return
    finally:
        closed.set()
        thread.join(_STOP_WAIT_S)
