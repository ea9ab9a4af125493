"""Memory of the device and of the host: whether it suffices, and whether it is as predicted."""

from typing import Any

from scaling.doctor.case import LEAST, Case, smaller_micro_batch
from scaling.doctor.robust import parts
from scaling.doctor.rule import CannotJudge, Symptom, percent, rule
from scaling.summarize import at, is_number
from scaling.units import GiB, format_bytes


@rule(
    "error",
    "memory ran out",
    looks_at="oom.json, which a run writes when it ends for want of memory",
    threshold="never",
    advice="Use a smaller micro-batch with more accumulation (the global batch stays), freeze more of the model, or "
    "keep less: `activation_checkpointing`, a higher ZeRO stage, offload.",
)
def out_of_memory(case: Case) -> Symptom | None:
    oom = case.run.oom
    if not oom or case.run.exit.get("code") == 0:  # of an earlier start
        return None
    place = PLACES.get(str(oom.get("place")), "at step {step}").format(step=oom.get("step"))
    asked, held = oom.get("asked_bytes"), at(oom, "held", "reserved_bytes") or at(oom, "held", "allocated_bytes")
    evidence = f"memory ran out on rank {oom.get('rank')} {place}"
    evidence += f": {format_bytes(asked)} were asked for" if is_number(asked) else ""
    evidence += f" with {format_bytes(held)} held" if is_number(held) else ""
    evidence += f"; {oom['off_by']}" if oom.get("off_by") else ""
    best = next((one for one in oom.get("suggestions") or [] if one.get("set")), None)
    if best is None:
        return Symptom(_sentence(evidence), set=smaller_micro_batch(case))
    return Symptom(
        _sentence(evidence),
        f"{_sentence(best.get('sentence') or best.get('command') or '')} Else a smaller micro-batch with more "
        "accumulation, more of the model frozen, or less kept (`activation_checkpointing`, a higher ZeRO stage, "
        "offload).",
        best["set"],
    )


PLACES = {
    "build": "while the model was built",
    "restore": "while a checkpoint was read",
    "first_step": "in the first step",
    "validation": "in the validation after step {step}",
    "save": "in the save after step {step}",
}
"""Places of oom.json in words; any other is a step."""


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


NEAR = 0.03
"""Share of the card's memory. The allocator's state differs from step to step, and validation and checkpoints come on
top: a few hundred MiB on any card."""


@rule(
    "warning",
    "memory is nearly exhausted",
    looks_at="the most memory in use on rank 0's card, and how often its allocator had to free its cache and ask again",
    threshold=f"{percent(NEAR)} of the card free, and no such retry",
    advice="Use a smaller micro-batch with more accumulation, which keeps the global batch, or keep less "
    "(`activation_checkpointing`): a retry waits for the device, and the next one may fail.",
)
def memory_near_limit(case: Case) -> Symptom | None:
    case.need_gpu()
    retries = case.run.highest("memory", "allocation_retries") or 0
    try:
        used, capacity = case.used_bytes, case.capacity
        near = used >= (1 - NEAR) * capacity
        evidence = f"{format_bytes(used)} of {format_bytes(capacity)} were in use"
    except CannotJudge:
        if not retries:
            raise
        near, evidence = False, "how much memory the card has is not known"
    if not near and not retries:
        return None
    changes = smaller_micro_batch(case)
    if not changes and case.spec.activation_checkpointing != "full":
        changes = {"activation_checkpointing": "selective" if case.spec.activation_checkpointing == "none" else "full"}
    return Symptom(f"{evidence}, and the allocator retried {retries:.0f} times.", set=changes)


FRAGMENTED = 0.2
"""Share of what the allocator holds that tensors do not fill even at their peak: published runs have 3 to 8 % where
memory is short, and 20 % where there is room to spare (`FRAGMENTS` in scaling/estimate/memory.py)."""
MATTERS = 0.8
"""Share of the card that the allocator must hold for gaps to matter: below, there is memory enough to waste."""


@rule(
    "warning",
    "memory is fragmented",
    looks_at="the allocator's peak (reserved) beside that of tensors (active), and its retries",
    threshold=f"at most {percent(FRAGMENTED)} between them where {percent(MATTERS)} of the card are held, and half of "
    "that where the allocator retried",
    advice="Set the environment variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: the allocator then grows "
    "its segments in place of adding others.",
)
def fragmentation(case: Case) -> Symptom | None:
    case.need_gpu()
    reserved = case.run.highest("memory", "reserved_peak_bytes")
    active = case.run.highest("memory", "active_peak_bytes") or case.run.highest("memory", "allocated_peak_bytes")
    if not reserved or not active:
        raise CannotJudge("no peak of the allocator is recorded")
    gap = 1 - active / reserved
    retries = case.run.highest("memory", "allocation_retries") or 0
    try:
        tight = reserved >= MATTERS * case.capacity
    except CannotJudge:
        if not retries:
            raise
        tight = False
    if not (retries and gap > FRAGMENTED / 2) and not (tight and gap > FRAGMENTED):
        return None
    return Symptom(
        f"the allocator held {format_bytes(reserved)} for tensors of {format_bytes(active)} at their peak "
        f"({percent(gap)} between them) and retried {retries:.0f} times."
    )


GROWN = 0.25
"""Share of the host memory of the first quarter."""
GROWN_BYTES = GiB
"""At least so much: what Python, torch and the first checkpoint's copy settle at differs by hundreds of MiB."""
STEADY = 0.5
"""Of the growth between the first two quarters that there must be between the last two: what fills up, as page tables
of mapped token files do, grows ever less; a leak goes on."""


@rule(
    "warning",
    "host memory grows and grows",
    looks_at="host memory (RSS) of rank 0 in the four quarters of the run, medians",
    threshold=f"grows by at most {percent(GROWN)}, or {format_bytes(GROWN_BYTES)}, or levels off",
    advice="Look for what your own code keeps from step to step (losses that are still tensors, lists of batches); "
    "token files that are mapped count as they are read, up to their size.",
)
def host_memory_growing(case: Case) -> Symptom | None:
    quarters = parts(case.values("memory", "host_rss_bytes", least=LEAST), 4)
    grown = quarters[-1] - quarters[0]
    rises = quarters == sorted(quarters)
    steady = quarters[3] - quarters[2] >= STEADY * (quarters[1] - quarters[0])
    if not (rises and steady and grown > max(GROWN * quarters[0], GROWN_BYTES)):
        return None
    told = ", ".join(format_bytes(size) for size in quarters)
    return Symptom(f"host memory was {told} in the four quarters of the run.")


OFF_MEMORY = 0.15
"""Share of the predicted peak. Beside runs that others published the planner is 1.2 % off at the median and 6 % at the
90th percentile (README.md)."""
OFF_BYTES = GiB
"""At least so much: of a tiny model workspaces of libraries are the larger part."""


@rule(
    "advice",
    "memory is not as predicted",
    looks_at="the peak of tensors on rank 0's card, and what plan.json predicted",
    threshold=f"within {percent(OFF_MEMORY)}, or {format_bytes(OFF_BYTES)}",
    advice="Have one step counted by category (`profile.memory_step`, a slow step), compare memory.json with "
    "plan.json, and please report it: the planner is wrong, or it was told of another model.",
)
def memory_off_prediction(case: Case) -> Symptom | None:
    case.need_gpu()
    predicted = at(case.run.plan, "memory", "peak_allocated_bytes")
    measured = case.run.highest("memory", "allocated_peak_bytes")
    if not is_number(predicted) or predicted <= 0 or measured is None:
        raise CannotJudge("no predicted and measured peak to compare")
    off = abs(measured - predicted)
    if off <= max(OFF_MEMORY * predicted, OFF_BYTES):
        return None
    evidence = f"tensors peaked at {format_bytes(measured)}, and {format_bytes(predicted)} were predicted"
    worst = _worst_part(case)
    counted = case.spec.profile.memory_step is not None
    return Symptom(
        f"{evidence}{worst}.",
        "Compare memory.json with the parts in plan.json, and please report it: the planner is wrong, or it was told "
        "of another model."
        if worst
        else "",
        {} if counted else {"profile.memory_step": 3} | ({"compile": False} if case.spec.compile else {}),
    )


def _worst_part(case: Case) -> str:
    """The category that is furthest off, where one step was counted."""
    measured: dict[str, Any] = case.run.memory.get("parts") or {}
    predicted: dict[str, Any] = at(case.run.plan, "memory", "parts") or {}
    shared = [name for name in measured if is_number(measured[name]) and is_number(predicted.get(name))]
    if not shared:
        return ""
    name = max(shared, key=lambda name: abs(measured[name] - predicted[name]))
    return f"; most of it is {name}: {format_bytes(measured[name])} for {format_bytes(predicted[name])}"


RULES = (
    out_of_memory,
    memory_near_limit,
    fragmentation,
    host_memory_growing,
    memory_off_prediction,
)
