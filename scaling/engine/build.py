"""Spec -> engine: the one place that knows which backend is which."""

from collections.abc import Sequence
from typing import Any

from scaling.engine.optimizer import check_live_groups
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.groups import Group
from scaling.models.recipe import ModelRecipe
from scaling.spec.sections import DDP, FSDP, DeepSpeed, Single, Spec


def import_backend(spec: Spec, process: Process) -> None:
    """Import the library that the spec's backend needs."""
    if isinstance(spec.backend, DeepSpeed):
        from scaling.engine.deepspeed_engine import import_deepspeed

        import_deepspeed(process)


def build_engine(
    spec: Spec, rendered: dict[str, Any], recipe: ModelRecipe, groups: Sequence[Group], process: Process
) -> Engine:
    """The engine that trains `recipe` as `rendered` says, its live groups checked against `groups`."""
    match spec.backend:
        case DeepSpeed():
            # Imported only when asked for: it takes seconds.
            from scaling.engine.deepspeed_engine import build_deepspeed

            engine: Engine = build_deepspeed(spec, spec.backend, rendered, recipe, groups, process)
        case FSDP():
            from scaling.engine.torch_engine import build_fsdp

            engine = build_fsdp(spec, rendered, recipe, groups, process)
        case DDP():
            from scaling.engine.torch_engine import build_ddp

            engine = build_ddp(spec, rendered, recipe, groups, process)
        case Single():
            from scaling.engine.torch_engine import build_single

            engine = build_single(spec, rendered, recipe, groups, process)
    check_live_groups(groups, engine.param_groups, engine.live_names())
    return engine
