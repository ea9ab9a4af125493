"""Seconds of one optimizer step of one rank: computation, exposed communication, update, offloading, overhead."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from scaling.estimate.compute import (
    HOST_BACKWARD_SECONDS,
    HOST_KERNEL_SECONDS,
    KERNEL_SECONDS,
    Pass,
    Passes,
    block_passes,
    ends_passes,
    head_passes,
    recorded_passes,
    stack_passes,
)
from scaling.estimate.flops import Block, Product, Structure, structure, train_flops_per_token, vla_structure
from scaling.estimate.rates import rates_of
from scaling.estimate.replay import recorded_ledger
from scaling.estimate.results import TimeEstimate
from scaling.estimate.sampling import rollout_seconds
from scaling.estimate.strategies import Costs, Step, costs
from scaling.groups import Group
from scaling.hardware import Cluster
from scaling.inventory import attended_length, block_finder, inventory_of, text_length
from scaling.records import BatchPlan
from scaling.schedule import at_length, growth
from scaling.spec.sections import PPO, Recorded, Spec, Vla, caches_features, curriculum_of, in_chunks, packs

STEP_SECONDS = 2e-3
"""Host time once a step: batch, learning rates, norm, metrics. Engineering judgement."""
TENSOR_SECONDS = 2e-6
"""Host time once a step for each tensor that trains: the optimizer's lists. Engineering judgement."""


def estimate_time(
    spec: Spec, plan: BatchPlan, groups: Sequence[Group], rendered: dict[str, Any], cluster: Cluster
) -> TimeEstimate:
    """One step of `plan` on `cluster` with the config `rendered`, as `scaling.render` gives it for the same spec.

    At full length where sequences grow. Raises UserError where the table of GPUs lacks a rate that it takes.
    """
    found = _one_length(spec, plan, groups, rendered, cluster)
    if curriculum_of(spec.data) is None or spec.max_steps is None or isinstance(spec.model, Recorded):
        return found
    total, stages = 0.0, growth(spec.data)
    for (first, length), (end, _) in pairwise((*stages, (spec.max_steps, 0))):
        pieces = plan.sequence_length // length  # exact, as lengths are made
        cut = replace(
            plan,
            global_batch=plan.global_batch * pieces,
            micro_batch=plan.micro_batch * pieces,
            sequence_length=length,
        )
        total += (end - first) * _one_length(at_length(spec, length), cut, groups, rendered, cluster).step_seconds
    return replace(found, mean_step_seconds=total / spec.max_steps)


def _one_length(
    spec: Spec, plan: BatchPlan, groups: Sequence[Group], rendered: dict[str, Any], cluster: Cluster
) -> TimeEstimate:
    frozen = frozenset(name for group in groups if group.frozen for name in group.names)
    step = _step(spec, plan, rendered, cluster, frozen)
    added = costs(step)
    hbm = step.rates.hbm
    parts = {
        "compute": plan.accumulation * step.micro_seconds + added.copied_bytes / hbm,
        "communication_exposed": added.communication,
        "optimizer": added.update_bytes / hbm,
        "offload_exposed": added.offload,
    }
    parts["overhead"] = _overhead(step, added, sum(parts.values()) - parts["optimizer"])
    if isinstance(spec.objective, PPO):
        parts |= rollout_seconds(step, spec.objective)
    seconds = sum(parts.values())
    rate = plan.global_tokens / plan.world_size / seconds
    peak = cluster.gpu.peak_flops(spec.precision)
    features = caches_features(spec.data)
    flops = train_flops_per_token(spec.model, attended_length(spec), frozen, spec.lora, features=features)
    return TimeEstimate(seconds, rate, None if peak is None else rate * flops / peak, parts)


def _step(spec: Spec, plan: BatchPlan, rendered: dict[str, Any], cluster: Cluster, frozen: frozenset[str]) -> Step:
    rates = rates_of(cluster.gpu, spec.precision)
    model, mode = spec.model, spec.activation_checkpointing
    if isinstance(model, Vla):
        parts = vla_structure(model, text_length(model, plan.sequence_length), frozen, caches_features(spec.data))
        blocks = tuple(
            (stack.block, stack.count, stack_passes(stack, plan.micro_batch, mode, spec.compile, rates))
            for stack in parts.stacks
        )
        alike = tuple((block, count) for block, count, _ in blocks)
        work = Structure(alike, parts.ends[-1][0], parts.elements, parts.trained, parts.trained_tensors)
        head = ends_passes(parts.ends, plan.micro_batch, rates)
        return Step(spec, plan, rendered, cluster, work, rates, blocks, head, frozen)
    if isinstance(model, Recorded):
        return _recorded_step(spec, model, plan, rendered, cluster, frozen)
    work = structure(model, frozen, spec.lora)
    tokens, length = plan.micro_batch * plan.sequence_length, attended_length(spec)
    masked = packs(spec.data) or isinstance(spec.objective, PPO)
    blocks = tuple(
        # Where a mask says who sees whom, no kernel knows that it is causal, and half the scores are made in vain.
        (block, count, block_passes(model, block, tokens, length, mode, spec.compile, rates, not masked))
        for block, count in work.blocks
    )
    chunked, by_token = in_chunks(spec.objective), isinstance(spec.objective, PPO)
    head = head_passes(model, work.head, tokens, chunked, rates, by_token)
    return Step(spec, plan, rendered, cluster, work, rates, blocks, head, frozen)


def _recorded_step(
    spec: Spec, model: Recorded, plan: BatchPlan, rendered: dict[str, Any], cluster: Cluster, frozen: frozenset[str]
) -> Step:
    """From what was counted when the model was recorded."""
    rates, found = rates_of(cluster.gpu, spec.precision), inventory_of(model)
    parts = recorded_ledger(spec, model, frozen)["work"][spec.activation_checkpointing]
    elements = {parameter.name: parameter.elements for parameter in found.parameters}
    trained = elements.keys() - frozen
    block_of = block_finder(model)
    blocks: list[tuple[Block, int, Passes]] = []
    head = Passes(Pass(0.0, 0), Pass(0.0, 0))
    for part in parts:
        passes = recorded_passes(part, plan.micro_batch, rates)
        if not part["blocks"]:
            head = passes
            continue
        own = {name for name in elements if block_of(name) == part["blocks"][0]}
        backward = passes.backward.kernels > 0
        size, trains = sum(elements[name] for name in own), sum(elements[name] for name in own & trained)
        block = Block((), backward, backward, backward, backward, backward, size, trains)
        blocks.append((block, len(part["blocks"]), passes))
    work = Structure(
        blocks=tuple((block, count) for block, count, _ in blocks),
        head=Product(0, 0, True, False),
        elements=sum(elements.values()),
        trained=sum(elements[name] for name in trained),
        trained_tensors=len(trained),
    )
    return Step(spec, plan, rendered, cluster, work, rates, tuple(blocks), head, frozen)


def _overhead(step: Step, added: Costs, device: float) -> float:
    """Gaps between kernels; the time by which the host is slower than the device, `device` seconds without gaps; what
    a step costs the host once."""
    ahead = sum(count * passes.forward.kernels for _, count, passes in step.blocks) + step.head.forward.kernels
    back = sum(count * passes.backward.kernels for _, count, passes in step.blocks) + step.head.backward.kernels
    steps = step.plan.accumulation
    host = steps * (HOST_KERNEL_SECONDS * ahead + HOST_BACKWARD_SECONDS * back + added.hooks)
    gaps = steps * KERNEL_SECONDS * (ahead + back)
    return max(gaps, host - device) + STEP_SECONDS + TENSOR_SECONDS * step.work.trained_tensors
