"""A search's result as plain JSON values: the schema that `python -m scaling.plan --json` prints."""

from typing import Any

from scaling.estimate.flops import train_flops_per_token
from scaling.estimate.search import Candidate, Found, Rejected, known
from scaling.spec import Spec

SCHEMA_VERSION = 1
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "communication", "workspace", "framework")
"""Of memory at the peak; each stands in every candidate."""
PHASES = ("compute", "communication_exposed", "optimizer", "offload_exposed", "overhead")
"""Of the time of a step."""


def report(spec: Spec, found: Found, margin: float) -> dict[str, Any]:
    """The whole result. All numbers about memory and time are predicted; null is what is not known."""
    groups = found.groups
    frozen = [name for group in groups if group.frozen for name in group.names]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "parameters": sum(group.parameters for group in groups),
            "trainable_parameters": sum(group.parameters for group in groups if not group.frozen),
            "flops_per_token": train_flops_per_token(spec.model, spec.data.sequence_length, frozen),
        },
        "hardware": {
            "name": found.cluster.gpu.name,
            "nodes": found.cluster.nodes,
            "gpus_per_node": found.cluster.gpus_per_node,
            "usable_bytes": found.usable_bytes,
            "memory_bytes": found.cluster.gpu.memory_bytes,
            "margin": margin,
        },
        "as_written": None if found.as_written is None else candidate_report(found.as_written),
        "candidates": [candidate_report(candidate) for candidate in found.candidates],
        "pareto": list(found.pareto),
        "rejected": [_rejected_report(rejected) for rejected in found.rejected],
        "seconds": found.seconds,
    }


def candidate_report(candidate: Candidate) -> dict[str, Any]:
    """One candidate."""
    memory, duration, plan = candidate.memory, candidate.time, candidate.plan
    return {
        "backend": candidate.spec.backend.model_dump(),
        "activation_checkpointing": candidate.spec.activation_checkpointing,
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "global_batch_size": plan.global_batch,
        "fits": candidate.fits,
        "reason": candidate.reason,
        "memory": {
            "peak_allocated_bytes": memory.peak_allocated_bytes,
            "peak_reserved_bytes": memory.peak_reserved_bytes,
            "device_used_bytes": memory.device_used_bytes,
            "low_bytes": memory.low_bytes,
            "high_bytes": memory.high_bytes,
            "peak_phase": memory.peak_phase,
            "parts": dict.fromkeys(PARTS, 0) | memory.parts,
            "host_bytes": memory.host_bytes,
        },
        "time": {
            "step_seconds": known(duration.step_seconds),
            "tokens_per_second_per_gpu": known(duration.tokens_per_second_per_gpu),
            "mfu": known(duration.mfu),
            "parts": {name: known(duration.parts.get(name, 0.0)) for name in PHASES},
        },
        "set": candidate.changes,
    }


def _rejected_report(rejected: Rejected) -> dict[str, Any]:
    return {"set": rejected.changes, "reason": rejected.reason}
