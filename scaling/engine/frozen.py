"""Parameters that do not train: whole on every rank where all others are cut, and their fp32 values.

Of what computes in 16 bits each rank has a part in fp32 in host memory: without it a checkpoint would round, and a move
to another backend with it.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.engine.protocol import FlatShard, cut


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


def replica(name: str, values: Tensor) -> FlatShard:
    """Of a parameter that all ranks hold whole: its values as this rank has them."""
    flat = values.detach().view(-1)
    return FlatShard(name, "master", flat.numel(), 0, flat, copies=dist.get_world_size(), copy=dist.get_rank())


def on_host(shard: FlatShard) -> FlatShard:
    """A copy of this rank's own part, in fp32."""
    own = shard.own()
    return replace(own, values=own.values.to("cpu", torch.float32, copy=True))


@torch.no_grad()
def gather(parameter: Tensor, part: FlatShard) -> None:
    """Write to a whole parameter what the ranks have of it (`on_host`), rounded; a collective call."""
    whole, world_size = parameter.detach().view(-1), dist.get_world_size()
    longest = -(-whole.numel() // world_size)
    sent, parts = whole.new_zeros(longest), whole.new_empty(world_size * longest)
    sent[: part.values.numel()] = part.values.to(whole.device, whole.dtype)
    # As bytes: not every backend knows every 16-bit type.
    dist.all_gather_into_tensor(parts.view(torch.uint8), sent.view(torch.uint8))
    for rank, values in enumerate(parts.view(world_size, longest)):
        place = cut(whole.numel(), world_size, rank)
        whole[place] = values[: place.stop - place.start]
