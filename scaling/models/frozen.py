"""Parameters that do not train, kept whole on every rank by a backend that cuts all others."""

import torch
from torch import nn


def keep_whole(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give each parameter that does not train memory for all of it, without values; what is tied stays tied.

    Those that DeepSpeed has cut have an empty shape, and their own beside it.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad:
                continue
            if parameter not in made:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                made[parameter] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            module._parameters[name] = made[parameter]


def hide_frozen(model: nn.Module) -> None:
    """Make parameters that do not train buffers: modules read them as before, and nobody finds them to cut them."""
    for module in model.modules():
        still = [(name, p) for name, p in module._parameters.items() if p is not None and not p.requires_grad]
        for name, parameter in still:
            del module._parameters[name]
            module.register_buffer(name, parameter, persistent=False)


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of a module and those that `hide_frozen` has hidden, each once."""
    hidden = (buffer for buffer in module.buffers() if isinstance(buffer, nn.Parameter))
    return [*module.parameters(), *hidden]
