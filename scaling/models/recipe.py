"""What a backend needs to build a model: how to construct it, what its weights start from, what its blocks are."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelRecipe:
    """A model that is not built yet. Each backend builds it in its own order and place."""

    build: Callable[[], nn.Module]
    """Construct the module under whatever `torch.device` context and parameter hooks the caller has set."""
    fill: Callable[[str, Tensor, torch.Generator], None]
    """Write the initial values of the parameter of that canonical name into a whole fp32 CPU tensor."""
    blocks: tuple[str, ...]
    """Paths of the repeated blocks: wrapped, checkpointed and compiled one by one."""
    seed: int
    """Of the initial weights."""
    buffers: Callable[[], Mapping[str, Tensor]] = dict
    """Values of the buffers by canonical name, on the host: for who builds the module on a device without values."""

    def initial_value(self, name: str, shape: torch.Size) -> Tensor:
        """The whole fp32 tensor that parameter `name` starts from: a pure function of the seed, the name and the shape.

        Each parameter has a generator of its own, so its value depends neither on the order of construction nor on
        which ranks construct it: every backend starts alike at every world size.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        value = torch.empty(shape, dtype=torch.float32)
        self.fill(name, value, generator)
        return value


def leave(name: str, value: Tensor, generator: torch.Generator) -> None:
    """A `fill` that leaves values as they are."""


class WritesGrad(nn.Module):
    """A module that can add to the `grad` of its weight by itself, in its backward pass."""

    writes_grad = False
    """Whether it is to. An engine says so that bears it: one process does, and DDP, which hears of a parameter even if
    autograd hands over nothing; FSDP2 and DeepSpeed do not."""


def let_write_grad(model: nn.Module) -> None:
    """Let those modules of `model` that can."""
    for module in model.modules():
        if isinstance(module, WritesGrad):
            module.writes_grad = True


WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes under which DDP, torch.compile, checkpoint wrappers and FSDP1 hold what they wrap."""
ADAPTED = ("base_layer", "default")
"""The same of peft's layers; "default" is peft's name of an adapter."""


def canonical_name(name: str) -> str:
    """`name` as the unwrapped model has it."""
    return ".".join(part for part in name.split(".") if part not in (*WRAPPERS, *ADAPTED))


def module_path(name: str) -> str:
    """`name` with what peft puts between: its layer and the one inside are modules of their own."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
