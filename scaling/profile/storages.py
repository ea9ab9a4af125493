"""The memory behind a tensor, also where the tensor is made of others (a DTensor, a quantised weight).

torch.distributed._tools.common_utils has the like of it, but brings trackers and torch's compiler with it, which takes
seconds and memory where memory has just run out.
"""

from collections.abc import Iterator

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(tensor: Tensor) -> Iterator[UntypedStorage]:
    """Each storage of the plain tensors that `tensor` consists of; one that several share comes several times."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                yield from storages(part)
    else:
        yield tensor.untyped_storage()
