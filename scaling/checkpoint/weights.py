"""Weights to start from, wherever they lie: a checkpoint of ours, or safetensors files of ours or of Hugging Face's.

`find_weights` says which checkpoint or files a path means and verifies a checkpoint, for one process to do;
`open_weights` then opens them, for every rank to read the ranges it owns. Only `Reader` unpickles, and only what it
knows.
"""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scaling.checkpoint.format import METADATA, STATE, Reader
from scaling.checkpoint.huggingface import (
    CONFIG,
    OWN_CONFIG,
    Stored,
    behaviour,
    behaviour_of_config,
    equal,
    layout,
    recognise,
)
from scaling.checkpoint.safetensors import TensorFiles, files_of, read_json, reading
from scaling.checkpoint.store import BEST, LATEST, MANIFEST, Store, problems_of
from scaling.errors import CheckpointError, UserError
from scaling.inventory import VALUE_HEAD, adapted_layers, parameters, tied
from scaling.run_folder import CHECKPOINTS
from scaling.spec.sections import Decoder, FactoryModel, HuggingFace, HuggingFaceVla, Lora, Model, Recorded, Vla

logger = logging.getLogger("scaling")

_BAND = 1 << 24
"""Elements of a transposed tensor, or of two that are compared, held at a time."""


class WeightSource(Protocol):
    """Whole weights by canonical name, of which any range can be read."""

    def names(self) -> Collection[str]:
        """Canonical names, tied ones once."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the model."""
        ...

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start+count-1 of the flattened tensor, [count], on the host.

        In the type they are stored in. It takes the memory of the range, not of the tensor.
        """
        ...

    def close(self) -> None:
        """Close the files."""
        ...


# ---------------------------------------------------------------- what a path means


def find_weights(path: Path, which: str | None = None, problems: Callable[[Path], list[str]] = problems_of) -> Path:
    """The checkpoint that `path` means, found whole, or else `path` itself.

    `path` may be a checkpoint, `latest` or `best` beside it, or a run folder, of which `which` takes "latest" (the
    newest whole one; default), "best" or a step. `problems` says what is wrong with a checkpoint's files.
    """
    if path.name in (LATEST, BEST) and path.is_file() and which is None:
        return find_weights(path.parent, path.name, problems)
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir() and Store(folder).steps() and not is_checkpoint(path):
            return _choose(Store(folder), which or LATEST, problems)
    if which is not None:
        raise UserError(f"`--which` must be given with a run folder that has checkpoints, but {path} is none; drop it")
    if is_checkpoint(path):
        return _whole(path, problems)
    if (path / CHECKPOINTS).is_dir():
        raise CheckpointError(f"`{path}` must hold a checkpoint, but has none yet; name another run")
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder of a checkpoint of ours, whole or not."""
    return any((path / name).is_file() for name in (MANIFEST, STATE, METADATA))


def _choose(store: Store, which: str, problems: Callable[[Path], list[str]]) -> Path:
    steps = store.steps()
    if which == LATEST:
        for step in reversed(steps):
            if not (found := problems(store.path(step))):
                return store.path(step)
            logger.warning(f"WARNING: damaged checkpoint passed over: {found[0]}")
        raise CheckpointError(
            f"`{store.folder}` must hold a whole checkpoint, but all {len(steps)} are damaged; bring one back"
        )
    step = store.pointed(BEST) if which == BEST else int(which) if which.isdecimal() and len(which) < 13 else None
    if step not in steps:
        raise CheckpointError(
            f"`{store.folder}` must hold the checkpoint that is asked for, but has no {which[:40]!r}; "
            f"name latest, best or one of the steps {', '.join(map(str, steps[-10:]))}"
        )
    return _whole(store.path(step), problems)


def _whole(folder: Path, problems: Callable[[Path], list[str]]) -> Path:
    if found := problems(folder):
        raise CheckpointError(f"`{folder}` must be whole, but {found[0]}; use another checkpoint")
    return folder


# ---------------------------------------------------------------- opening


def open_weights(path: Path, model: Model, lora: Lora | None = None) -> WeightSource:
    """The weights in `path`, as `find_weights` gave it, for a model that has exactly these.

    With `lora` they are what adapters are put in; a checkpoint with the same adapters gives those too.
    CheckpointError where names, shapes or what is computed with them differ from `model`; nothing of a tensor's size
    is read before (but for a head that the model has tied: it must equal the embedding).
    """
    with reading(path):
        if is_checkpoint(path):
            return _open_checkpoint(path, model, lora)
        files = TensorFiles(files_of(path))
        if path.is_dir():
            check_config(path, model)
        return _open_files(path, files, model)


def _open_checkpoint(path: Path, model: Model, lora: Lora | None) -> WeightSource:
    source = CheckpointWeights(path)
    if source.lora is not None:
        _check_adapters(path, source.lora, model, lora)
    _check_behaviour(path, behaviour(source.model), model, "export it and name its .safetensors file")
    found = {name: source.shape(name) for name in source.names()}
    spare = _spare_head(found, model, source.read, "embed_tokens.weight")
    _check_shapes(path, found, {p.name: p.shape for p in parameters(model, source.lora and lora)}, model, spare)
    return source


def _check_adapters(path: Path, found: Lora, model: Model, lora: Lora | None) -> None:
    """CheckpointError where the weights in `path` have other adapters than `lora`, or `lora` is none."""
    have, want = ((one.rank, one.alpha, _adapted_names(model, one)) for one in (found, lora or found))
    if lora is None or have != want:
        told = f"rank {found.rank}, alpha {found.alpha:g}, {', '.join(have[2])}"
        raise CheckpointError(
            f"`lora` must be as in the weights of `initialize_from` ({told} in {path}), but is "
            + (f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(want[2])}" if lora else "null")
            + "; set it or, to start from those weights with the adapters merged, export them and name the export"
        )


def _adapted_names(model: Model, lora: Lora) -> tuple[str, ...]:
    """Last names of the layers with an adapter."""
    return tuple(dict.fromkeys(module.rpartition(".")[2] for module in adapted_layers(model, lora)))


def _open_files(path: Path, files: TensorFiles, model: Model) -> WeightSource:
    names, own = recognise(files.entries)
    stored = layout(model, names)
    if stored is None:
        raise CheckpointError(
            f"`initialize_from` must hold weights of the model that the spec describes, but {path} holds a GPT-2; set "
            "`model` to its shape: layernorm, gelu_new, learned positions, bias"
        )
    found = {name: files.entries[there].shape for name, there in own.items()}
    files.check_types(own.values())

    def read(name: str, start: int, count: int) -> Tensor:
        return files.read(own[name], start, count)

    spare = _spare_head(found, model, read, stored[0].name)
    _check_shapes(path, found, {s.name: s.shape for s in stored}, model, spare)
    return FileWeights(files, stored, own)


def check_config(folder: Path, model: Model, section: str = "model") -> None:
    """Refuse a folder whose config.json, or scaling_spec.json, describes a model that computes something else.

    `section`: where the spec has `model`.
    """
    remedy = "name its .safetensors file, or the index of several, itself"
    if isinstance(model, Recorded):
        return  # what its code makes of them, names and shapes alone tell
    if (path := folder / OWN_CONFIG).exists():
        _check_behaviour(path, behaviour(parse_model(path, read_json(path).get("model"))), model, remedy, section)
    elif (path := folder / CONFIG).exists():
        context = model.max_position_embeddings if isinstance(model, Decoder) else 0
        found = behaviour_of_config(read_json(path), context)
        if isinstance(found, str):
            raise CheckpointError(
                f"`initialize_from` must hold a model that the decoder can compute, but {path} has {found[:200]}; "
                f"use another model or, to take its weights all the same, {remedy}"
            )
        _check_behaviour(path, found, model, remedy, section)


def _check_behaviour(path: Path, found: Mapping[str, Any], model: Model, remedy: str, section: str = "model") -> None:
    """CheckpointError where a model described in `path` computes something else than `model` from equal weights."""
    named = "initialize_from" if section == "model" else "initialize_parts"
    for field, value in behaviour(model).items():
        if field in found and not equal(found[field], value):
            raise CheckpointError(
                f"`{section}.{field}` must be as in the weights of `{named}` ({str(found[field])[:80]} in {path}), "
                f"but is {value}; set it or, to take the weights all the same, {remedy}"
            )


def _check_shapes(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    model: Model,
    spare: str | None,
) -> None:
    """CheckpointError unless `found` has the names and shapes of `wanted`; it may have the name `spare` besides. A
    value head may be there or not: it begins afresh in any case.
    """
    found = {name: shape for name, shape in found.items() if name != spare and not _is_value_head(name)}
    wanted = {name: shape for name, shape in wanted.items() if not _is_value_head(name)}
    if problem := mismatch(found, wanted):
        raise CheckpointError(
            f"`initialize_from` must hold every weight of the model and no other, but {path} {problem}; "
            f"{_remedy(found, wanted, model)}"
        )


def _is_value_head(name: str) -> bool:
    return name.partition(".")[0] == VALUE_HEAD


def mismatch(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """How the names and shapes found differ from those of a model: "lacks … and has …"; None where they do not."""
    missing = [name for name in wanted if name not in found]
    others = [name for name in found if name not in wanted]
    shapes = [name for name in wanted if name in found and found[name] != wanted[name]]
    problems = [f"lacks {_some(missing)}"] if missing else []
    problems += [f"has {_some(others)}, which the model has not"] if others else []
    if shapes:
        first = shapes[0]
        problems.append(f"has {_some(shapes)} of another shape ({list(found[first])}, not {list(wanted[first])})")
    return " and ".join(problems) or None


def _remedy(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], model: Model) -> str:
    for name in found.keys() & wanted.keys():
        if found[name] == wanted[name] or not isinstance(model, Decoder) or found[name][1:] != (model.hidden_size,):
            continue
        if name.endswith(("embed_tokens.weight", "wte.weight")):
            return f"set `model.vocab_size` to {found[name][0]}: rows that nothing has trained are not made up here"
        if name.endswith(("embed_positions.weight", "wpe.weight")):
            return f"set `model.max_position_embeddings` to {found[name][0]}"
    if found.keys() ^ wanted.keys() == {"lm_head.weight"}:
        return f"set `model.tie_word_embeddings` to {'false' if 'lm_head.weight' in found else 'true'}"
    return "give `model` the shape of those weights, or name others"


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _spare_head(
    found: Mapping[str, tuple[int, ...]], model: Model, read: Callable[[str, int, int], Tensor], embedding: str
) -> str | None:
    """The name of a stored head that a model with a tied one can do without: it must equal the embedding."""
    head = "lm_head.weight"
    if not tied(model) or head not in found or found[head] != found.get(embedding):
        return None
    size = math.prod(found[head])
    same = all(
        torch.equal(read(head, start, count), read(embedding, start, count))
        for start in range(0, size, _BAND)
        for count in [min(_BAND, size - start)]
    )
    return head if same else None


# ---------------------------------------------------------------- sources


def parse_model(path: Path, section: Any) -> Model:
    """The `model` of a spec that was saved in `path`."""
    kinds: dict[str, type[Decoder | Vla | HuggingFace | FactoryModel | HuggingFaceVla]] = {
        "decoder": Decoder,
        "vla": Vla,
        "huggingface": HuggingFace,
        "factory": FactoryModel,
        "huggingface_vla": HuggingFaceVla,
    }
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        return kinds[section["kind"]].model_validate_json(json.dumps(section))
    raise CheckpointError(f"`{path}` must hold a `model` as specs have it, but does not; use another checkpoint")


def _parse_lora(path: Path, section: Any) -> Lora | None:
    if section is None:
        return None
    with suppress(ValueError, RecursionError):
        return Lora.model_validate_json(json.dumps(section))
    raise CheckpointError(f"`{path}` must hold `lora` as specs have it, but does not; use another checkpoint")


class CheckpointWeights:
    """The fp32 weights of a checkpoint of ours."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self.spec: dict[str, Any] = self._reader.state["spec"]
        """As resolved when the checkpoint was written."""
        self.model = parse_model(folder, self.spec.get("model"))
        self.lora = _parse_lora(folder, self.spec.get("lora"))
        """Of the adapters among the weights; None where there are none."""
        self._shapes = dict(self._named_shapes(folder))

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        with reading(self._reader.folder):
            return self._reader.read(f"master/{name}", start, count)

    def close(self) -> None:
        self._reader.close()

    def _named_shapes(self, folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        shapes = self._reader.state["shapes"]
        for key, elements in self._reader.elements.items():
            kind, _, name = key.partition("/")
            if kind != "master":
                continue
            shape = shapes.get(name)
            if not (isinstance(shape, list) and all(type(size) is int for size in shape)) or (
                math.prod(shape) != elements
            ):
                raise CheckpointError(
                    f"`{folder}` must hold {name} in the shape of its {STATE} ({str(shape)[:80]}), but has {elements} "
                    "elements of it; use another checkpoint"
                )
            yield name, tuple(shape)


class FileWeights:
    """Weights in safetensors files, whatever their names and layout there."""

    def __init__(self, files: TensorFiles, stored: Collection[Stored], own: Mapping[str, str]) -> None:
        """`own`: the name in the files of each that is `stored`."""
        self._files = files
        self._places: dict[str, tuple[Stored, str, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for tensor in stored:
            row = 0
            for member in tensor.members:
                self._places[member.name] = tensor, own[tensor.name], row
                self._shapes[member.name] = member.shape
                row += member.shape[0]

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        tensor, there, row = self._places[name]
        width = math.prod(self._shapes[name][1:])
        if not tensor.transposed:
            return self._files.read(there, row * width + start, count)
        first, skipped = divmod(start, width)
        rows = math.ceil((skipped + count) / width)
        # In the file our rows are columns: all of its rows are gone through, some at a time.
        columns = tensor.shape[1]
        step = max(1, int(_BAND / columns))
        bands = range(0, width, step)
        found: Tensor | None = None
        for top in bands:
            height = min(step, width - top)
            band = self._files.read(there, top * columns, height * columns).view(height, columns)
            if found is None:
                found = torch.empty(rows, width, dtype=band.dtype)
            found[:, top : top + height] = band[:, row + first : row + first + rows].T
        assert found is not None
        return found.view(-1)[skipped : skipped + count]

    def close(self) -> None:
        self._files.close()
