"""Where modules that are not this project's start from: their own code, or the weights in their folder."""

import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaling.errors import CheckpointError, UserError
from scaling.models.recipe import canonical_name
from scaling.spec.sections import FactoryModel, HuggingFace

logger = logging.getLogger("scaling")

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
"""Names of transformers' own."""


def local_folder(path: str, field: str) -> Path:
    """The folder that `path`, which stands at `field` of the spec, names: itself, or that of a model of the hub, as far
    as it has been fetched.

    Nothing is fetched here: ranks would do it at the same time, and a spec would reach out of the machine. UserError
    where there is none.
    """
    folder = Path(path)
    if folder.is_dir() or folder.is_absolute() or path.count("/") > 1:
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, local_files_only=True))
    except ImportError:
        return folder
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{field}` must be a folder with a config.json, or the name of a model that has been fetched from the "
            f"hub, but {path[:200]!r} is neither here ({type(error).__name__}); correct it, or run "
            f"`hf download {path[:200]}`"
        ) from None


def folder_of(model: HuggingFace) -> Path:
    """`local_folder` of a model."""
    return local_folder(model.path, "model.path")


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors of a model in it."""
    return any((folder / name).is_file() for name in (INDEX, WHOLE))


class InitialValues:
    """Values of parameters and buffers by name, the same on every rank and backend.

    A folder's weights are read tensor by tensor. Where there are none, the module is built once on the host as its code
    does it, in fp32 and from the seed: each rank then has all of it until the engine is built.
    """

    def __init__(self, model: FactoryModel | HuggingFace, build: Callable[[bool], nn.Module], seed: int) -> None:
        """`build`: the module on torch's default device, with initial values if asked for."""
        self._model = model
        self._build = build
        self._seed = seed

    def fill(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Write a parameter's initial values; as `ModelRecipe.fill`."""
        found = self._files.read(name) if self._files is not None else self._tensors[name]
        if found.shape != value.shape:
            raise CheckpointError(
                f"the weights in {self._folder} must be of the model's shapes, but {name} is {list(found.shape)} there "
                f"and {list(value.shape)} here; correct its config.json"
            )
        value.copy_(found)

    def buffers(self) -> dict[str, Tensor]:
        """Values of all buffers, on the host."""
        return {canonical_name(name): buffer for name, buffer in self._module.named_buffers()}

    @property
    def _folder(self) -> Path:
        assert isinstance(self._model, HuggingFace)
        return folder_of(self._model)

    @cached_property
    def _has_files(self) -> bool:
        return isinstance(self._model, HuggingFace) and has_weights(self._folder)

    @cached_property
    def _files(self) -> "_Files | None":
        if not self._has_files:
            return None
        logger.info(f"weights from {self._folder}")
        return _Files(self._folder, _aliases(self._module))

    @cached_property
    def _module(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self._seed)
            return self._build(not self._has_files)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        logger.info("initial values are those of the module's own code")
        return {canonical_name(n): p.detach() for n, p in self._module.named_parameters(remove_duplicate=False)}


class _Files:
    """Tensors by name in a folder's safetensors."""

    def __init__(self, folder: Path, aliases: dict[str, list[str]]) -> None:
        from safetensors import safe_open

        self._folder = folder
        self._aliases = aliases
        try:
            if (folder / INDEX).is_file():
                index: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            else:
                index = dict.fromkeys(safe_open(folder / WHOLE, "pt").keys(), WHOLE)
            self._index = index
            self._open: dict[str, Any] = {file: safe_open(folder / file, "pt") for file in set(index.values())}
        except Exception as error:  # what safetensors raises for a file that is cut short is its own
            raise CheckpointError(
                f"the weights in {folder} must be whole safetensors, but are not: {error}; fetch them again"
            ) from error

    def read(self, name: str) -> Tensor:
        for one in self._aliases[name]:
            if one in self._index:
                return self._open[self._index[one]].get_tensor(one)
        raise CheckpointError(
            f"the weights in {self._folder} must have {name}, but have no such tensor; correct its config.json"
        )


def _aliases(module: Any) -> dict[str, list[str]]:
    """Names that a parameter may have in a file: its own, those of what is tied to it, and each without the prefix that
    files of the bare model lack (GPT-2's have "wte.weight" for "transformer.wte.weight")."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(canonical_name(name))
    found: dict[str, list[str]] = {}
    for names in tied.values():
        for name in names:
            own = [name, *(other for other in names if other != name)]
            found[name] = own + [one.removeprefix(prefix) for one in own if one.startswith(prefix)]
    return found
