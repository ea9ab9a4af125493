"""A search's result as plain JSON values: the schema that `python -m scaling.plan --json` prints."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from scaling.errors import UserError
from scaling.estimate.features import feature_cache
from scaling.estimate.flops import train_flops_per_token
from scaling.estimate.memory import MemoryModel
from scaling.estimate.results import MemoryEstimate, TimeEstimate
from scaling.estimate.search import Candidate, Found, Rejected, known
from scaling.estimate.time import estimate_time
from scaling.groups import Group
from scaling.hardware import Cluster, gpu_from_device_name
from scaling.inventory import attended_length
from scaling.records import BatchPlan
from scaling.spec import Spec
from scaling.spec.sections import caches_features

SCHEMA_VERSION = 1
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "communication", "workspace", "framework")
"""Of memory at the peak; each stands in every candidate."""
PHASES = ("compute", "communication_exposed", "optimizer", "offload_exposed", "overhead")
"""Of the time of a step; of ppo also "sampling" and "scoring"."""


def report(spec: Spec, found: Found, margin: float) -> dict[str, Any]:
    """The whole result. All numbers about memory and time are predicted; null is what is not known."""
    groups = found.groups
    frozen = [name for group in groups if group.frozen for name in group.names]
    length, features = attended_length(spec), caches_features(spec.data)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "parameters": sum(group.parameters for group in groups),
            "trainable_parameters": sum(group.parameters for group in groups if not group.frozen),
            "flops_per_token": train_flops_per_token(spec.model, length, frozen, spec.lora, features=features),
        },
        "hardware": {
            "name": found.cluster.gpu.name,
            "nodes": found.cluster.nodes,
            "gpus_per_node": found.cluster.gpus_per_node,
            "usable_bytes": found.usable_bytes,
            "memory_bytes": found.cluster.gpu.memory_bytes,
            "margin": margin,
            "measured_on": found.cluster.gpu.measured.device,
            "is_cpu": found.cluster.gpu.is_cpu,
        },
        "as_written": None if found.as_written is None else candidate_report(found.as_written),
        "candidates": [candidate_report(candidate) for candidate in found.candidates],
        "pareto": list(found.pareto),
        "rejected": [_rejected_report(rejected) for rejected in found.rejected],
        "features": None if (cache := feature_cache(spec)) is None else dataclasses.asdict(cache),
        "seconds": found.seconds,
    }


def candidate_report(candidate: Candidate) -> dict[str, Any]:
    """One candidate."""
    plan = candidate.plan
    return {
        "backend": candidate.spec.backend.model_dump(),
        "activation_checkpointing": candidate.spec.activation_checkpointing,
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "global_batch_size": plan.global_batch,
        "tokens_per_step": plan.global_tokens,
        "fits": candidate.fits,
        "reason": candidate.reason,
        "memory": memory_report(candidate.memory),
        "time": time_report(candidate.time),
        "set": candidate.changes,
    }


def memory_report(memory: MemoryEstimate) -> dict[str, Any]:
    """Bytes of one rank."""
    return dataclasses.asdict(memory) | {"parts": dict.fromkeys(PARTS, 0) | memory.parts}


def time_report(duration: TimeEstimate) -> dict[str, Any]:
    """Seconds of one step."""
    return {
        "step_seconds": known(duration.step_seconds),
        "mean_step_seconds": known(duration.mean_step_seconds),
        "tokens_per_second_per_gpu": known(duration.tokens_per_second_per_gpu),
        "mfu": known(duration.mfu),
        "parts": {name: known(seconds) for name, seconds in (dict.fromkeys(PHASES, 0.0) | duration.parts).items()},
    }


def run_report(
    spec: Spec, plan: BatchPlan, groups: Sequence[Group], rendered: dict[str, Any], device: str, ranks_per_node: int
) -> dict[str, Any]:
    """The estimate of one run as it is launched: its plan.json. `device`: "cpu", or as the driver calls the card.

    "time" is null where the card or one of its rates is not known; on a CPU memory is that of live tensors.
    """
    gpu, cuda = gpu_from_device_name(device), device != "cpu"
    memory = MemoryModel(spec, groups, rendered, plan, gpu, cuda=cuda).at(plan.micro_batch, plan.accumulation)
    duration = None
    if gpu is not None and ranks_per_node > 0 and plan.world_size % ranks_per_node == 0:
        cluster = Cluster(plan.world_size // ranks_per_node, ranks_per_node, gpu)
        with suppress(UserError):
            duration = time_report(estimate_time(spec, plan, groups, rendered, cluster))
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device,
        "world_size": plan.world_size,
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "memory": memory_report(memory),
        "time": duration,
    }


def _rejected_report(rejected: Rejected) -> dict[str, Any]:
    return {"set": rejected.changes, "reason": rejected.reason}
