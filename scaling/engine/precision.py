"""16-bit compute on fp32 parameters for modules that no sharding casts: single and DDP."""

import functools

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the spec's precision."""


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every parameter read as its cast to `dtype` in forward passes; the parameters themselves stay fp32.

    This is what FSDP2's MixedPrecisionPolicy does when it gathers: the gradient flows through the cast and arrives,
    adds up and is reduced in fp32. `named_parameters` and `state_dict` see the fp32 parameters.
    Each submodule gets a class of its own with properties over its parameters (the way of torch.nn.utils.parametrize,
    without its change of names).
    """
    for submodule in list(module.modules()):
        names = [name for name, parameter in submodule._parameters.items() if parameter is not None]
        if names:
            submodule.__class__ = _casting(type(submodule), tuple(names), dtype)


@functools.cache
def _casting(cls: type[nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> type[nn.Module]:
    """One class for all modules alike: torch.compile compiles a block anew for every class it meets."""
    return type(cls.__name__, (cls,), {name: _cast_property(name, dtype) for name in names})


def _cast_property(name: str, dtype: torch.dtype) -> property:
    def read(self: nn.Module) -> torch.Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter.to(dtype)

    return property(read)
