"""Data sets that are not this project's: torch's map-style ones, of whatever items."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from scaling.data.dataset import Dataset, MicroBatch, Samples
from scaling.errors import UserError
from scaling.imports import call_target
from scaling.spec.sections import FactoryData

_TEXT = {"inputs", "targets"}
"""Keys of items that are text."""


@dataclass(frozen=True)
class GivenBatch(Samples):
    """Items of a user's own data set, collated."""

    unit: ClassVar[str] = "samples"
    values: Any
    """As torch's `default_collate` returns it: the structure of an item, each tensor with a row for each sample."""
    counts: Tensor
    """Which samples add to the loss, bool [micro_batch]."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, values=tree_map_only(Tensor, change, self.values), counts=change(self.counts))

    @property
    def terms(self) -> int:
        """Samples."""
        return int(self.counts.sum())

    def leave_out(self, rows: Tensor) -> None:
        self.counts[rows] = False


class GivenDataset:
    """A map-style data set, as `Dataset` wants it."""

    bytes_per_token = None

    def __init__(self, dataset: Any, name: str) -> None:
        """`name` is what errors call it."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(
                f"{name} must be a data set with `__len__` and `__getitem__`, but is a {type(dataset).__name__}; the "
                "order of the samples is drawn by their number, so that a run can go on where it was"
            )
        if not len(dataset):
            raise UserError(f"{name} must have items, but has none; add some")
        self._dataset = dataset
        first = dataset[0]
        self.is_text = isinstance(first, dict) and set(first) == _TEXT

    @property
    def terms_per_sample(self) -> int | None:
        return None if self.is_text else 1

    @property
    def fingerprint(self) -> str:
        """Its own `fingerprint` where it has one, else of its class, length and first item."""
        if (own := getattr(self._dataset, "fingerprint", None)) is not None:
            return str(own)
        digest = hashlib.sha256(f"{type(self._dataset).__qualname__} {len(self)}".encode())
        tree_map_only(Tensor, lambda tensor: digest.update(repr(tensor.tolist()).encode()), self._collated([0]))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: np.ndarray) -> Samples:
        """The samples with these indices; see `Dataset.read`."""
        values = self._collated(indices.tolist())
        if self.is_text:
            return MicroBatch(values["inputs"].long(), values["targets"].long())
        return GivenBatch(values, torch.ones(len(indices), dtype=torch.bool))

    def _collated(self, indices: Sequence[int]) -> Any:
        return default_collate([self._dataset[index] for index in indices])


def open_given_data(
    data: FactoryData, allow_import: Sequence[str], *, wants_validation: bool
) -> tuple[Dataset, Dataset | None]:
    """What the function returns: the training and the validation samples. UserError where they are no data sets."""
    found = call_target(data.target, data.arguments, allow_import, "data")
    train, held_out = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if wants_validation and held_out is None:
        raise UserError(
            f"`validation` must be null where {data.target} returns one data set, but is set; return a second one"
        )
    name = f"what {data.target} returns"
    return GivenDataset(train, name), None if held_out is None else GivenDataset(held_out, f"the second of {name}")
