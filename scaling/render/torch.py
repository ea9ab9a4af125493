"""The dicts of torch's own backends: what our builders in `scaling.engine.torch_engine` are told."""

from typing import Any

from scaling.inventory import blocks
from scaling.records import BatchPlan
from scaling.spec.sections import FSDP, Decoder, Spec, Vla

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def render_single(spec: Spec, plan: BatchPlan) -> dict[str, Any]:
    """One process, no communication."""
    return {"kind": "single", **_common(spec, plan)}


def render_ddp(spec: Spec, plan: BatchPlan) -> dict[str, Any]:
    """Keyword arguments of DistributedDataParallel under "ddp"."""
    return {
        "kind": "ddp",
        **_common(spec, plan),
        "ddp": {"bucket_cap_mb": 25, "gradient_as_bucket_view": True, "broadcast_buffers": False},
    }


def render_fsdp(spec: Spec, backend: FSDP, plan: BatchPlan) -> dict[str, Any]:
    """Mesh, precision policy and wrap plan of `fully_shard`."""
    shard, rest = divmod(plan.world_size, backend.replicate)
    assert rest == 0, "check_world_size refuses this"
    axes = {"dp_replicate": backend.replicate, "dp_shard": shard} if backend.replicate > 1 else {"dp_shard": shard}
    return {
        "kind": "fsdp",
        **_common(spec, plan),
        "mesh": axes,
        "wrap": _wrap_plan(spec, backend),
        "cpu_offload": backend.cpu_offload,
        "frozen": "shard" if backend.shards_frozen else "replicate",
    }


def _common(spec: Spec, plan: BatchPlan) -> dict[str, Any]:
    return {
        "batch": {
            "global_batch_size": plan.global_batch,
            "micro_batch_size": plan.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
        },
        "param_dtype": DTYPES[spec.precision],
        "reduce_dtype": "float32",
        "master_dtype": "float32",
        "max_grad_norm": spec.max_grad_norm,
    }


def _wrap_plan(spec: Spec, backend: FSDP) -> list[dict[str, Any]]:
    """Modules that gather their parameters together, in the order of the forward pass; what is left is the root's.

    Of a vla that is its blocks and its table of words; what is left is small. Of a recorded model it is its
    blocks. Tied weights must be in one group (torch refuses them sharded apart): they stay in the root, which keeps its
    parameters from its first use to the end of the backward pass. The last group is never freed after its forward pass,
    since its backward pass comes next.
    """
    reshard = backend.reshard_after_forward
    plan = [{"modules": [block], "reshard_after_forward": reshard} for block in blocks(spec.model)]
    if not plan:
        return plan  # a module without blocks is one
    if isinstance(spec.model, Vla):
        table = {"modules": ["language.embed_tokens"], "reshard_after_forward": reshard}
        plan.insert(spec.model.vision.num_hidden_layers, table)
    if not isinstance(spec.model, Decoder) or spec.model.tie_word_embeddings:
        plan[-1]["reshard_after_forward"] = False
        return plan
    embeddings = {"modules": ["embed_tokens"], "reshard_after_forward": reshard}
    head = {"modules": ["norm", "lm_head"], "reshard_after_forward": False}
    return [embeddings, *plan, head]
