"""Weights of parts of a vla, each from safetensors files of its own, whatever the tensors are called there."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from scaling.checkpoint.huggingface import Stored, layout, recognise
from scaling.checkpoint.safetensors import TensorFiles, files_of, reading
from scaling.checkpoint.weights import FileWeights, check_config, mismatch
from scaling.errors import CheckpointError
from scaling.inventory import CHANNELS, Parameter, parameters
from scaling.spec.sections import PartWeights, Vla

logger = logging.getLogger("scaling")

_PATCHES = "vision.patch_embed.weight"
"""Elsewhere a convolution, [hidden, 3, patch, patch]; here the pixels of a patch lie row by row, colours together."""


class PartSource:
    """The weights of some parts of a vla. See `WeightSource`."""

    def __init__(self, sources: Mapping[str, FileWeights], shapes: Mapping[str, tuple[int, ...]], conv: bool) -> None:
        """`sources`: by part; `conv`: whether patches are projected by a convolution there."""
        self._sources, self._shapes, self._conv = sources, shapes, conv

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        source = self._sources[name.partition(".")[0]]
        if name != _PATCHES or not self._conv:
            return source.read(name, start, count)
        hidden, inputs = self._shapes[name]
        whole = source.read(name, 0, hidden * inputs).view(hidden, CHANNELS, -1)
        return whole.transpose(1, 2).reshape(-1)[start : start + count]

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def open_parts(wanted: Sequence[PartWeights], model: Vla) -> PartSource:
    """The weights that `initialize_parts` names, each found to have every tensor of its part, in the same shape.

    CheckpointError where it lacks one; what else is in the files is not used, and counted in the log.
    """
    shapes = {p.name: p.shape for p in parameters(model)}
    sources: dict[str, FileWeights] = {}
    conv = False
    with ExitStack() as undo:
        for number, one in enumerate(wanted):
            path = Path(one.path)
            with reading(path):
                files = TensorFiles(files_of(path))
            undo.callback(files.close)
            members = [Parameter(name, shape) for name, shape in shapes.items() if name.startswith(f"{one.part}.")]
            stored, own = _stored(one, path, files, members, model)
            stored = [_as_convolution(tensor, files, own) for tensor in stored]
            conv = conv or any(len(tensor.shape) == 4 for tensor in stored)
            there = {name: files.entries[file].shape for name, file in own.items()}
            needed = {tensor.name: tensor.shape for tensor in stored}
            found = {name: there[name] for name in needed if name in there}
            if problem := mismatch(found, needed):
                raise CheckpointError(
                    f"`initialize_parts.{number}` must name every weight of {one.part} as {path} has it, but the file "
                    f"{problem}; correct `names`, or give `model.{one.part}` the shape of those weights"
                )
            used = [own[name] for name in needed]
            files.check_types(used)
            logger.info(f"{one.part} from {path}: {len(used):,} tensors; {len(files.entries) - len(used):,} not used")
            sources[one.part] = FileWeights(files, stored, own)
        undo.pop_all()
    return PartSource(sources, {name: shapes[name] for name in shapes if name.partition(".")[0] in sources}, conv)


def _stored(
    one: PartWeights, path: Path, files: TensorFiles, members: Sequence[Parameter], model: Vla
) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a part under the names that they have, and these by the names of the files."""
    same = {name: name for name in files.entries}
    if one.names:
        return _named(one.names, one.part, members), same
    if one.part == "language":
        names, own = recognise(files.entries)
        if names != "own":
            if path.is_dir():
                check_config(path, model.language, "model.language")
            found = layout(model.language, names) or ()
            return [_of_part(one.part, tensor) for tensor in found if tensor.name != "lm_head.weight"], own
    prefixed = any(name.startswith(f"{one.part}.") for name in files.entries)
    kept = 0 if prefixed else len(one.part) + 1
    return [Stored(p.name[kept:], p.shape, (p,)) for p in members], same


def _of_part(part: str, tensor: Stored) -> Stored:
    return replace(tensor, members=tuple(replace(p, name=f"{part}.{p.name}") for p in tensor.members))


def _named(names: Mapping[str, str], part: str, members: Sequence[Parameter]) -> list[Stored]:
    """By the first glob that matches a parameter; those with one name are the rows of one tensor, in our order."""
    patterns = [(re.compile("(.*)".join(map(re.escape, glob.split("*")))), name) for glob, name in names.items()]
    found: dict[str, list[Parameter]] = {}
    for parameter in members:
        own = parameter.name.removeprefix(f"{part}.")
        found.setdefault(_renamed(own, patterns), []).append(parameter)
    return [
        Stored(name, (sum(p.shape[0] for p in parts), *parts[0].shape[1:]), tuple(parts))
        for name, parts in found.items()
    ]


def _renamed(name: str, patterns: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, theirs in patterns:
        if match := pattern.fullmatch(name):
            for piece in match.groups():
                theirs = theirs.replace("*", piece, 1)
            return theirs
    return name


def _as_convolution(tensor: Stored, files: TensorFiles, own: Mapping[str, str]) -> Stored:
    entry = files.entries.get(own.get(tensor.name, ""))
    if entry is None or tensor.members[0].name != _PATCHES or len(entry.shape) != 4:
        return tensor
    hidden, inputs = tensor.shape
    patch = round((inputs / CHANNELS) ** 0.5)
    return replace(tensor, shape=(hidden, CHANNELS, patch, patch))
