"""Spec + world size -> the very dict that the backend gets. Pure: no torch, no environment, no "auto"."""

from typing import Any

from scaling.batch import check_world_size, resolve_batch
from scaling.render.deepspeed import render_deepspeed
from scaling.render.torch import render_ddp, render_fsdp, render_single
from scaling.spec.sections import DDP, FSDP, DeepSpeed, Single, Spec


def render(spec: Spec, world_size: int) -> dict[str, Any]:
    """The config of `spec.backend` for `world_size` ranks, as plain JSON values.

    Raises UserError when the batch or the backend does not fit the world size.
    """
    check_world_size(spec, world_size)
    plan = resolve_batch(spec, world_size)
    match spec.backend:
        case DeepSpeed():
            return render_deepspeed(spec, spec.backend, plan)
        case FSDP():
            return render_fsdp(spec, spec.backend, plan)
        case DDP():
            return render_ddp(spec, plan)
        case Single():
            return render_single(spec, plan)
