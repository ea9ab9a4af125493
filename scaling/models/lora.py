"""Low-rank adapters by peft, put into a model that is built. The only module that imports peft."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.spec.sections import Lora


def adapter_inserter(lora: Lora, targets: Sequence[str]) -> Callable[[nn.Module], None]:
    """What replaces the linear layers called `targets` of a model, by last name or by path, by peft's, which hold them
    and an adapter each.

    Adapters are made where and in the type in which their layers are, whatever device context and parameter hooks the
    caller has set; what they start from is `fill_adapter`'s. peft itself is imported before: within DeepSpeed's
    `zero.Init`, which replaces functions of torch, it could not be.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # only when asked for: it takes seconds
        from peft.tuners.lora import Linear
        from peft.tuners.lora.layer import Conv1D  # pyright: ignore[reportPrivateImportUsage] - transformers'
    except ImportError as error:
        raise UserError(
            f"`lora` must be null where peft is not installed ({error}), but is set; `pip install 'scaling[lora]'`"
        ) from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - peft only divides it
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        init_lora_weights=False,
    )

    class AdaptedLinear(Linear):
        """peft's layer, which reads no weight but to multiply by it.

        peft's own forward looks up the type of lora_A's weight first. ZeRO-3 takes that for a use of it: gathers it
        alone, waits, and keeps it whole until the update; in 16 bits under other backends it is cast for nothing.
        """

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """[..., inputs] -> [..., outputs]: the layer's own result, and that of its adapter scaled."""
            result = self.base_layer(x, *args, **kwargs)
            for name in self.active_adapters:
                result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
            return result

    # Of Conv1D nothing is different here: it multiplies by its own weight, whichever way that lies.
    config._register_custom_module({nn.Linear: AdaptedLinear, Conv1D: AdaptedLinear})  # pyright: ignore[reportPrivateUsage]

    def insert(model: nn.Module) -> None:
        inject_adapter_in_model(config, model)

    return insert


def fill_adapter(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Initial values as peft's: lora_A kaiming uniform, lora_B zero, so that nothing is added at first."""
    if name.split(".")[-2] == "lora_A":
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    else:
        value.zero_()
