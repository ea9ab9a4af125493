"""The DeepSpeed config dict: every value explicit, since its defaults move between versions and some are silent.

No optimizer and no scheduler block: the optimizer is torch's AdamW with our groups, the LR a function of the step
(DeepSpeed's own schedulers overwrite the LR of every group).
"""

from typing import Any

from scaling.records import BatchPlan
from scaling.spec.sections import DeepSpeed, Spec


def render_deepspeed(spec: Spec, backend: DeepSpeed, plan: BatchPlan) -> dict[str, Any]:
    """The complete dict for `deepspeed.initialize(config=…)`. Sizes in elements, as DeepSpeed counts."""
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # 0 turns clipping off; absent, it has meant 0 in older versions and 1 in newer ones.
        "gradient_clipping": spec.max_grad_norm or 0.0,
        **_precision(spec),
        "zero_optimization": _zero(spec, backend),
        # Offloaded steps run torch's AdamW too, so that the arithmetic is one everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "wall_clock_breakdown": False,
    }


def _precision(spec: Spec) -> dict[str, Any]:
    """16-bit parameters, fp32 master weights; gradients accumulated and reduced in fp32, as our FSDP does."""
    blocks: dict[str, Any] = {
        "bf16": {"enabled": spec.precision == "bf16"},
        "fp16": {"enabled": spec.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if spec.precision == "bf16":
        # A non-finite gradient is never applied; the loop decides what follows.
        blocks["bf16"]["check_grad_overflow"] = True
        # Stage 1 adds each bf16 gradient to its fp32 one when it is there, and lets go of it: 2 bytes a parameter less.
        blocks["bf16"]["immediate_grad_update"] = True
    if spec.precision == "fp16":
        blocks["fp16"] |= {
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    return blocks


def _zero(spec: Spec, backend: DeepSpeed) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": backend.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": backend.reduce_bucket_size,
        "overlap_comm": backend.overlap_comm,
        "round_robin_gradients": False,
    }
    if backend.offload_optimizer is not None:
        zero["offload_optimizer"] = _offload(backend.offload_optimizer, backend.nvme_path)
    if backend.zero_stage < 3:
        zero["allgather_partitions"] = True
        zero["allgather_bucket_size"] = backend.allgather_bucket_size or backend.reduce_bucket_size
        return zero
    if backend.offload_parameters is not None:
        zero["offload_param"] = _offload(backend.offload_parameters, backend.nvme_path)
    return zero | {
        "stage3_prefetch_bucket_size": _or(backend.prefetch_bucket_size, 50_000_000),
        "stage3_param_persistence_threshold": _or(backend.param_persistence_threshold, 100_000),
        "stage3_max_live_parameters": _or(backend.max_live_parameters, 1_000_000_000),
        "stage3_max_reuse_distance": _or(backend.max_reuse_distance, 1_000_000_000),
        "sub_group_size": _or(backend.sub_group_size, 1_000_000_000),
        # DeepSpeed's own linear adds the bias in place to the product that selective checkpointing keeps: silently
        # wrong gradients (measured with 0.19.8). Its gain, that no gathered weight is kept for the backward pass,
        # checkpointed blocks have anyway.
        "memory_efficient_linear": spec.activation_checkpointing != "selective",
        "zero_hpz_partition_size": _or(backend.zero_hpz_partition_size, 1),
    }


def _offload(device: str, nvme_path: str | None) -> dict[str, Any]:
    place: dict[str, Any] = {"device": device, "pin_memory": True}
    return place | {"nvme_path": nvme_path} if device == "nvme" else place


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
