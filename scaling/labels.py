"""What the tensors of an engine are, for a meter of memory: parameters, gradients, optimizer state, logits, buffers."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scaling.engine.protocol import Engine
from scaling.models.decoder import Head
from scaling.profile.live import UNLABELLED
from scaling.profile.meter import MemoryMeter
from scaling.profile.stock import all_parameters, flat_gradients


@contextlib.contextmanager
def labelled(engine: Engine, meter: MemoryMeter) -> Iterator[None]:
    """Say what the engine has built, and within, what it makes; what else there is are buffers for communication."""

    def take_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            # ZeRO's and DDP's gradients may be views of buckets, which are another matter; FSDP2's shards are not.
            of = ("activations", "workspace", *(("communication",) if isinstance(parameter, DTensor) else ()))
            meter.label("gradients", [parameter.grad], of=of)

    meter.label_rest("communication")
    meter.label("optimizer", (shard.values for shard in engine.state()))
    parameters = all_parameters(engine.module)
    meter.label("parameters", (getattr(parameter, "ds_tensor", parameter).detach() for parameter in parameters))
    meter.label("gradients", flat_gradients(engine.module))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(take_gradient) for parameter in trained]
    heads = [module for module in engine.module.modules() if isinstance(module, Head)]
    for head in heads:
        head.forward = _within(head, meter)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for head in heads:
            del head.forward  # the one of its class is under it


@contextlib.contextmanager
def labelled_in_midst(engine: Engine, meter: MemoryMeter, apart: Iterable[Tensor]) -> Iterator[None]:
    """`labelled`, for a meter that has not seen the engine being built; a collective matter, for all ranks alike.

    `apart`: what is not to be counted, such as the memory that checkpoints are copied to.
    """
    for module in engine.module.modules():
        if isinstance(module, FSDPModule):  # a validation before this step has left the root's parameters gathered
            module.reshard()
    places = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in apart]
    gc.unfreeze()  # what is kept from the collector is not listed
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    gc.freeze()
    meter.label(UNLABELLED, (one for one in tensors if not _within_any(one, places)))
    del tensors
    with labelled(engine, meter):
        yield


def _within_any(tensor: Tensor, places: list[tuple[int, int]]) -> bool:
    return bool(places) and any(start <= tensor.data_ptr() < end for start, end in places)


def _within(head: Head, meter: MemoryMeter) -> Callable[..., Tensor]:
    """Its forward, of which logits are made; what its backward pass writes to the weight's `grad` is a gradient."""
    forward = head.forward

    def take_written(_: Tensor) -> None:
        if head.weight.grad is not None:
            meter.label("gradients", [head.weight.grad], of=("logits",))

    def call(hidden: Tensor, *inputs: Tensor, **named: bool) -> Tensor:
        with meter.category("logits"):
            result = forward(hidden, *inputs, **named)
        if head.writes_grad and hidden.requires_grad:
            hidden.register_hook(take_written)
        return result

    return call
