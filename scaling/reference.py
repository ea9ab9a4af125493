"""What the model that training starts from makes of the data: the yardstick of preference optimisation.

It is asked once, before the first step, and what it said is kept in the run folder: a run that goes on, on whatever
backend and number of ranks, compares with the very same numbers, and no second model is ever in memory.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from scaling.data.preference import PreferenceDataset
from scaling.data.progress import progress_in_items
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.errors import CheckpointError, StorageError
from scaling.objectives.preference import log_probabilities
from scaling.watch.heartbeat import Heartbeat


def with_reference(
    dataset: PreferenceDataset,
    part: str,
    engine: Engine,
    process: Process,
    heartbeat: Heartbeat,
    *,
    micro_batch: int,
    from_logits: bool,
    folder: Path | None,
    begins: bool,
) -> PreferenceDataset:
    """`dataset` with the reference's log-probabilities, which are asked of `engine` where it `begins`.

    They are in FOLDER/reference-PART.npy, fp32 [samples, 2]; without a folder they are not kept. A collective call.
    `from_logits`: the module returns logits (scaling/objectives/preference.py).
    CheckpointError where a run that goes on has no such file, or one of other data.
    """
    path = None if folder is None else folder / f"reference-{part}.npy"
    if not begins:
        assert path is not None
        try:
            return dataset.with_reference(_read(path, len(dataset)))
        except CheckpointError as error:
            error.shared = True  # every rank reads the same file
            raise
    found = _ask(dataset, engine, process, heartbeat, micro_batch, from_logits)
    if path is not None:
        process.on_main(lambda: _write(path, found))
    return dataset.with_reference(found)


def _ask(
    dataset: PreferenceDataset,
    engine: Engine,
    process: Process,
    heartbeat: Heartbeat,
    micro_batch: int,
    from_logits: bool,
) -> torch.Tensor:
    """Each rank asks about its share, all of them equally often: collectives are in every forward pass."""
    found = torch.zeros(len(dataset), 2, dtype=torch.float64)
    engine.module.eval()
    bar = progress_in_items("asking the reference", len(dataset), "pairs", shown=process.is_main)
    with torch.no_grad(), bar as advance:
        for first in range(0, len(dataset), micro_batch * process.world_size):
            heartbeat.part()
            places = first + process.rank * micro_batch + np.arange(micro_batch)
            batch = dataset.read(np.minimum(places, len(dataset) - 1)).each(lambda tensor: tensor.to(process.device))
            told = log_probabilities(engine.module, batch, from_logits=from_logits).double().cpu()
            mine = places < len(dataset)
            found[torch.from_numpy(places[mine])] = told[torch.from_numpy(mine)]
            advance(min(micro_batch * process.world_size, len(dataset) - first))
    engine.module.train()
    return process.sum_over_ranks(found.to(process.device)).cpu().float()


def _write(path: Path, found: torch.Tensor) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, found.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise StorageError(f"{path} must be writable, but is not: {error.strerror or error}; free space") from error


def _read(path: Path, samples: int) -> torch.Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} must hold what the model that training started from makes of the data, but cannot be read: "
            f"{error}; begin anew in another run folder"
        ) from error
    if found.shape != (samples, 2) or found.dtype != np.float32:
        raise CheckpointError(
            f"{path} must be of {samples:,} pairs, but is of shape {found.shape}; begin anew in another run folder"
        )
    return torch.from_numpy(found)
