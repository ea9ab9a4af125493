"""Where each line of the memory ledger comes from: a formula for what is held throughout, a source for the rest."""

from collections.abc import Sequence
from typing import Any

from scaling.estimate.deepspeed_engines import BF16, ZeRO3, ZeRO12
from scaling.estimate.step import engine_of
from scaling.groups import Group
from scaling.spec.sections import DDP, FSDP, DeepSpeed, Spec, in_chunks
from scaling.units import WIDTHS

FUSED_ADAMW = "torch/optim/adamw.py"
FSDP2 = "torch/distributed/fsdp/_fully_shard"
ZERO = {
    BF16: "deepspeed/runtime/bf16_optimizer.py",
    ZeRO12: "deepspeed/runtime/zero/stage_1_and_2.py",
    ZeRO3: "deepspeed/runtime/zero/stage3.py",
}


def formulas(spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], world_size: int) -> dict[str, str]:
    """By part of the memory estimate. What is offloaded is on the host; what each rank holds whole is not divided."""
    everything = sum(group.parameters for group in groups)
    trained = sum(group.parameters for group in groups if not group.frozen)
    width = WIDTHS[spec.precision]
    match spec.backend:
        case FSDP():
            cut = everything if spec.backend.shards_frozen else trained
            held = _fsdp(spec.backend, cut, trained, rendered["mesh"]["dp_shard"], width)
            held["parameters"] += _beside(width, everything - cut)
        case DeepSpeed():
            cut = trained if spec.backend.zero_stage == 3 and not spec.backend.shards_frozen else everything
            held = _zero(spec, spec.backend, cut, trained, rendered["zero_optimization"], world_size, width)
            held["parameters"] += _beside(width, everything - cut)
        case _:
            held = _whole(everything, trained, buckets=isinstance(spec.backend, DDP))
    played = f"scaling/estimate/{spec.model.kind}.py"
    return held | {
        "activations": f"op by op, checkpointing {spec.activation_checkpointing}: {played}",
        "logits": _logits(spec),
        "workspace": "op by op; 64 MiB of it cuBLAS's (aten/src/ATen/cuda/CublasHandlePool.cpp)",
        "other": "loss, scale and counts",
    }


def _beside(width: int, elements: int) -> str:
    return f"; {width} B x {elements:,} that do not train, whole" if elements else ""


def _whole(everything: int, trained: int, *, buckets: bool) -> dict[str, str]:
    return {
        "parameters": _times(4, everything, "fp32, cast where they are used"),
        "gradients": "views of the buckets" if buckets else _times(4, trained, "fp32"),
        "optimizer": _times(8, trained, FUSED_ADAMW),
        "communication": _times(4, trained, "buckets of torch/nn/parallel/distributed.py") if buckets else "",
    }


def _fsdp(backend: FSDP, everything: int, trained: int, shards: int, width: int) -> dict[str, str]:
    kept = "one block and the next" if backend.reshard_after_forward else "all blocks"
    held = {
        "parameters": _times(4, everything, f"rows rounded up; {FSDP2}/_fsdp_param.py", shards),
        "gradients": _times(4, trained, "fp32", shards),
        "optimizer": _times(8, trained, FUSED_ADAMW, shards),
    }
    if backend.cpu_offload:
        held = {name: f"on the host: {formula}; here what is under way" for name, formula in held.items()}
    return held | {"communication": f"{kept} gathered, {width} B an element, and a flat copy: {FSDP2}"}


def _zero(
    spec: Spec, backend: DeepSpeed, everything: int, trained: int, zero: dict[str, Any], ranks: int, width: int
) -> dict[str, str]:
    engine = engine_of(spec)
    source, cut = ZERO[engine], ranks if engine is ZeRO3 else 1
    buckets = 2 if engine is ZeRO12 and zero["overlap_comm"] else 1
    reduced = f"{buckets} x {zero['reduce_bucket_size']:,} elements, and what is gathered"
    held = {
        "parameters": _times(width, everything, source, cut),
        "gradients": _times(4, trained, "fp32", 1 if engine is BF16 else ranks),
        "optimizer": _times(
            12, trained, "fp32 masters and two moments (ZeRO, Rajbhandari et al., 2020, section 3)", ranks
        ),
        "communication": f"{'joined gradients' if engine is BF16 else reduced}: {source}",
    }
    places = {"optimizer": backend.offload_optimizer, "gradients": backend.offload_optimizer}
    for part, place in (places | {"parameters": backend.offload_parameters}).items():
        if place:
            held[part] = f"on the {'host' if place == 'cpu' else place}: {held[part]}; here what is under way"
    return held


def _logits(spec: Spec) -> str:
    return f"{'chunk by chunk' if in_chunks(spec.objective) else 'all rows at once'}: scaling/models/loss.py"


def _times(width: int, elements: int, note: str, parts: int = 1) -> str:
    share = f" / {parts}" if parts > 1 else ""
    return f"{width} B x {elements:,}{share}; {note}"
