"""What a frozen vision makes of the images of a data set: asked once, before the first step, and kept on disk.

A file holds the features of all rows of one folder of demonstrations, as bytes of the type that training computes in,
and after them a checksum of each row. Its name says what they are made of: the images, the weights, the shape of the
vision and the type. It takes that name only once all of it is on the disk.
"""

import hashlib
import logging
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from scaling.data.cache import locked, remove_remains, replacing
from scaling.data.episodes import EpisodeDataset, Source
from scaling.data.progress import progress_in_bytes
from scaling.engine.precision import DTYPES
from scaling.engine.process import Process
from scaling.engine.protocol import Engine, cut
from scaling.errors import StorageError, UserError
from scaling.inventory import CHECKSUM_BYTES, feature_bytes, parameters, seen_shape
from scaling.models.huggingface_vla import described
from scaling.spec import Spec
from scaling.spec.sections import AnyVla, EpisodeData
from scaling.units import format_bytes
from scaling.watch.heartbeat import Heartbeat

logger = logging.getLogger("scaling")

_FORMAT = "scaling vision features 1"
"""Part of every key: to be raised when the same vision comes to make something else of the same images."""
_AT_A_TIME = 32
"""Most samples of one forward pass. Engineering judgement: enough to keep a GPU busy, and what a layer makes of them is
less than training holds."""
_CHECKSUM = np.dtype(f"<u{CHECKSUM_BYTES}")


def with_features(
    datasets: Sequence[EpisodeDataset | None],
    engine: Engine,
    process: Process,
    heartbeat: Heartbeat,
    spec: Spec,
    micro_batch: int,
) -> list[EpisodeDataset | None]:
    """`datasets`, which share their sources, with what the engine's vision makes of their images in place of these.

    Taken from `data.cache` where it is there, and made otherwise, by all ranks together. A collective call.
    StorageError where the folder cannot be used or has no room.
    """
    model, data = spec.model, spec.data
    assert isinstance(model, AnyVla) and isinstance(data, EpisodeData) and datasets[0] is not None
    names = {parameter.name for parameter in parameters(model) if parameter.name.startswith("vision.")}
    weights = _digest_of_weights(names, engine, process)
    # Without its dropout, which what is frozen has none of.
    shape = model.vision.model_dump_json(exclude={"dropout"}) + described(model)
    width = feature_bytes(model, spec.precision)
    found: list[np.ndarray] = []
    for source in datasets[0].sources:
        parts = (_FORMAT, shape, spec.precision, weights, source.digest)
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        store = _Store(Path(data.cache), key, len(source.images), width)
        rows = store.rows(engine, process, heartbeat, source, min(micro_batch, _AT_A_TIME))
        found.append(rows.reshape(len(rows), seen_shape(model)[0], -1))
    dtype = DTYPES[spec.precision]
    return [None if dataset is None else dataset.with_features(found, dtype) for dataset in datasets]


def _digest_of_weights(names: Collection[str], engine: Engine, process: Process) -> str:
    """Of these frozen parameters in fp32, whoever holds them. A collective call."""
    digest, left = hashlib.sha256(), set(names)
    for shard in engine.state():
        if not left:  # what trains may have to be read from NVMe
            break
        if shard.kind != "master" or shard.name not in left:
            continue
        left.remove(shard.name)
        own = shard.own()
        # As integers, to which adding zeros changes nothing: a float that is -0 would become 0.
        whole = torch.zeros(shard.elements, dtype=torch.int32, device=process.device)
        values = own.values.detach().contiguous().view(torch.int32)
        whole[own.start : own.start + values.numel()] = values.to(process.device)
        process.sum_over_ranks(whole)
        if process.is_main:
            digest.update(f"{shard.name} {shard.elements}\n".encode())
            digest.update(whole.cpu().numpy().data)
    return process.gather_objects(digest.hexdigest())[0]


class _Store:
    """The features of one source on disk: uint8 [rows, bytes of a row], then their checksums."""

    def __init__(self, folder: Path, key: str, count: int, width: int) -> None:
        self._folder, self._key, self._count, self._width = folder, key, count, width
        self._path = folder / f"{key}.features"
        self._size = count * (width + _CHECKSUM.itemsize)

    def rows(
        self, engine: Engine, process: Process, heartbeat: Heartbeat, source: Source, at_a_time: int
    ) -> np.ndarray:
        """Memory-mapped, uint8 [rows, bytes]. A collective call."""
        if self._whole_everywhere(process, heartbeat):  # first without the lock: a folder may be readable only
            return self._open()
        with ExitStack() as held:
            # One run of several at a time; the first rank alone waits for it, so that no two runs wait for each other.
            process.on_main(lambda: self._lock(held))
            if not self._whole_everywhere(process, heartbeat):  # another run may have made it meanwhile
                self._make(engine, process, heartbeat, source, at_a_time)
        return self._open()

    def _lock(self, held: ExitStack) -> None:
        with self._told():
            self._folder.mkdir(parents=True, exist_ok=True)
            if held.enter_context(locked(self._folder / f"{self._key}.lock")):
                remove_remains(self._folder, self._key)

    def _open(self) -> np.ndarray:
        with self._told():
            return self._mapped()[: self._count * self._width].reshape(self._count, self._width)

    def _mapped(self) -> np.ndarray:
        return np.memmap(self._path, np.uint8, mode="r", shape=(self._size,))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(
                f"`data.cache` must be a folder with room for {format_bytes(self._size)} of features, but "
                f"{self._folder.absolute()} fails: {reason}; free space, choose another folder, or set "
                "`data.cache_features` to false"
            ) from error

    # ------------------------------------------------------------ what is there

    def _whole_everywhere(self, process: Process, heartbeat: Heartbeat) -> bool:
        return all(process.gather_objects(self._whole(process, heartbeat)))

    def _whole(self, process: Process, heartbeat: Heartbeat) -> bool:
        """Whether this rank's share of the rows is there as it was written; the ranks of a host look at all of them."""
        try:
            if self._path.stat().st_size != self._size:
                return False
            found = self._mapped()
        except (OSError, ValueError):
            return False
        rows = found[: self._count * self._width].reshape(self._count, self._width)
        checksums = found[self._count * self._width :].view(_CHECKSUM)
        share = cut(self._count, process.local_world_size, process.local_rank)
        for row in range(share.start, share.stop):
            heartbeat.part()
            if zlib.crc32(rows[row]) != checksums[row]:
                logger.warning(f"WARNING: {self._path} is damaged: row {row}; its features are made anew")
                return False
        return True

    # ------------------------------------------------------------ what is made

    def _make(self, engine: Engine, process: Process, heartbeat: Heartbeat, source: Source, at_a_time: int) -> None:
        """Each rank asks about its share, and gets to know those of the others; one of each host, or of all that have
        the folder in common, writes."""
        checksums: list[int] = []
        with ExitStack() as held:
            file = self._begin(process, held)
            title = f"asking vision about {self._count:,} moments"
            with progress_in_bytes(title, self._count * self._width, shown=process.is_main) as advance:
                for row in _asked(engine, process, heartbeat, source.images, self._width, at_a_time):
                    if file is not None:
                        with self._told():
                            file.write(row.data)
                        checksums.append(zlib.crc32(row.data))
                    advance(len(row))
            if file is not None:
                with self._told():
                    file.write(np.array(checksums, _CHECKSUM).tobytes())
                    held.close()  # with it the file takes its name
        process.gather_objects(None)  # until all are written

    def _begin(self, process: Process, held: ExitStack) -> IO[bytes] | None:
        """The file that this rank is to write, with room for all of it; None where another one does."""
        file = process.on_main(lambda: self._create(held))
        name = process.gather_objects(None if file is None else Path(file.name).name)[0]
        problem: UserError | None = None
        if process.local_rank == 0 and file is None and not (self._folder / str(name)).exists():
            try:
                file = self._create(held)
            except UserError as error:
                problem = error
        problems = [found for found in process.gather_objects(problem) if found is not None]
        if problems:
            problems[0].shared = True
            raise problems[0]
        return file

    def _create(self, held: ExitStack) -> IO[bytes]:
        with self._told():
            self._folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(replacing(self._folder, self._path.name))
            if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now, and not after hours
                os.posix_fallocate(file.fileno(), 0, self._size)
            return file


def _asked(
    engine: Engine, process: Process, heartbeat: Heartbeat, images: np.ndarray, width: int, at_a_time: int
) -> Iterator[np.ndarray]:
    """What vision makes of each row of `images`, in their order, on all ranks alike: uint8 [width]."""
    ranks, left = process.world_size, len(images)
    engine.module.eval()
    for first in range(0, len(images), at_a_time * ranks):
        heartbeat.part()
        # The ranks take turns, and the last row comes as often as it takes: collectives are in every pass.
        places = first + process.rank + ranks * np.arange(at_a_time)
        with torch.no_grad():
            seen = engine.module(torch.from_numpy(images[np.minimum(places, len(images) - 1)]).to(process.device))
        for own in seen.contiguous().flatten(1).view(torch.uint8):
            assert own.numel() == width
            # As whole numbers, to which adding zeros changes nothing.
            everyones = torch.zeros(ranks, width, dtype=torch.uint8, device=process.device)
            everyones[process.rank] = own
            yield from process.sum_over_ranks(everyones).cpu().numpy()[:left]
            left -= min(left, ranks)
    engine.module.train()
