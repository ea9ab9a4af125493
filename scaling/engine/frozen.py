"""fp32 values of what does not train and computes in 16 bits: each rank has a part of them in host memory.

Without them a checkpoint would round, and a move to another backend with it.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.engine.protocol import FlatShard, cut


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
