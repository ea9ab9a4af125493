"""Whether the machine is kept busy, and whether another way to run the same training would be faster."""

import statistics
from typing import TYPE_CHECKING, Any

from scaling.doctor.case import Case, enough
from scaling.doctor.robust import parts
from scaling.doctor.rule import CannotJudge, Symptom, percent, rule, speaks
from scaling.spec.sections import PPO, Spec, SyntheticData, TextData
from scaling.summarize import at, is_number
from scaling.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from scaling.estimate.search import Candidate

# ---------------------------------------------------------------- data

WAITS = 0.05
"""Share of a step. The loader reads ahead of training, so a step that waits at all waits for a loader that is slower
than training; 5 % is more than odd slow reads make."""
WAITS_ON_CPU = 0.25
"""The same where training is on a CPU, whose cores the loader takes its share of."""
WAITS_S = 0.005
"""Seconds of a step that are no matter: handing over a batch takes some, which is much of a very short step."""


@rule(
    "warning",
    "training waits for data",
    looks_at="the time of a step spent waiting for data, of the slowest rank where ranks are known (median)",
    threshold=f"at most {percent(WAITS)} of the step ({percent(WAITS_ON_CPU)} on a CPU), or {1000 * WAITS_S:g} ms",
    advice="Put what is read on a fast local disk, and leave the loader's thread a core of its own.",
)
def data_wait(case: Case) -> Symptom | None:
    if isinstance(case.spec.objective, PPO):
        raise CannotJudge("the time in which the model answers prompts counts as waiting for data")
    pairs: list[tuple[float, float]] = []
    for step in case.run.warm:
        waited = at(step, "ranks", "of", "data", "max")
        waited = waited if is_number(waited) else at(step, "time", "data")
        if is_number(waited) and is_number(step.get("step_seconds")) and step["step_seconds"] > 0:
            pairs.append((waited, step["step_seconds"]))
    enough(pairs, 5, "records of time.data")
    waited = statistics.median(waited for waited, _ in pairs)
    share = statistics.median(waited / seconds for waited, seconds in pairs)
    if share <= (WAITS if case.on_gpu else WAITS_ON_CPU) or waited <= WAITS_S:
        return None
    evidence = f"{format_seconds(waited)} of each step ({percent(share)}) are spent waiting for data."
    data = case.spec.data
    if isinstance(data, TextData):
        return Symptom(
            evidence,
            f"Tokens are read from `data.cache` ({data.cache}): put that folder on a fast local disk, and leave the "
            "loader's thread a core of its own.",
        )
    if isinstance(data, SyntheticData):
        return Symptom(
            evidence, "Synthetic samples are made by the host as they are needed: leave its loader a core of its own."
        )
    return Symptom(evidence)


# ---------------------------------------------------------------- how the batch is cut

ROOM = 0.6
"""Share of the card's memory that is in use at most where there is room for a larger micro-batch: with half as much
again the run would still be under the 97 % of `memory_near_limit`."""
LOW_MFU = 0.35
"""Model FLOPs utilisation. Megatron-Turing NLG reached 0.30 and PaLM 0.46 (Chowdhery et al., 2022, table 3), Llama 3
405B 0.38 to 0.43 (Grattafiori et al., 2024, table 4): dense training that fills its cards is above this."""
CUT_GAIN = 0.03
"""Predicted gain below which another cut of the batch is not worth a word: the planner's own error is as large."""
MANY = 16
"""Accumulation: forward and backward passes of a step, each of which launches all kernels and, sharded, gathers all
weights again."""


@rule(
    "advice",
    "the micro-batch is small for the card",
    looks_at="memory in use, MFU (median), and the planner's figures for the same run with larger micro-batches",
    threshold=f"more than {percent(ROOM)} of the memory in use, or an MFU of {LOW_MFU:g}, or a predicted gain under "
    f"{percent(CUT_GAIN)}",
    advice="Use a larger micro-batch and less accumulation: the global batch stays what it is.",
)
def micro_batch_small(case: Case) -> Symptom | None:
    mfu = statistics.median(case.values("mfu"))
    return _larger_micro_batch(case, f"an MFU of {mfu:.2f}") if mfu < LOW_MFU else None


@rule(
    "advice",
    "much accumulation though memory is free",
    looks_at="accumulation, memory in use, and the planner's figures for larger micro-batches, where the MFU is not "
    "low",
    threshold=f"accumulation below {MANY}, or more than {percent(ROOM)} of the memory in use, or a predicted gain "
    f"under {percent(CUT_GAIN)}",
    advice="Use a larger micro-batch and less accumulation, or more GPUs: the global batch stays what it is.",
)
def accumulation_large(case: Case) -> Symptom | None:
    _, accumulation = case.batch
    mfu = case.run.median("mfu")
    if accumulation < MANY or (mfu is not None and mfu < LOW_MFU):
        return None  # a low MFU is `micro_batch_small`'s matter
    return _larger_micro_batch(case, f"{accumulation} passes a step")


def _larger_micro_batch(case: Case, seen: str) -> Symptom | None:
    if case.used_bytes > ROOM * case.capacity:
        return None
    found = case.faster(CUT_GAIN, lambda candidate: _larger(case, candidate))
    if found is None:
        return None
    candidate, gain = found
    return Symptom(
        f"{_memory(case)}, with {seen}; with {candidate.plan.sentence} the planner predicts {percent(gain)} more "
        f"tokens per second in {format_bytes(candidate.memory.high_bytes)}.",
        set=candidate.changes,
    )


def _larger(case: Case, candidate: "Candidate") -> bool:
    """Whether nothing but the cut of the batch is other than the run's, and the micro-batch larger."""
    same = candidate.changes.keys() <= {"batch.micro_batch_size", "batch.gradient_accumulation_steps"}
    return same and candidate.plan.micro_batch > case.batch[0]


def _memory(case: Case) -> str:
    share = percent(case.used_bytes / case.capacity)
    return f"{format_bytes(case.used_bytes)} of {format_bytes(case.capacity)} are in use ({share})"


# ---------------------------------------------------------------- another way to run it

SPARE = 0.75
"""Share of the card's memory in use above which a run is taken to make good use of it."""
GAIN = 0.1
"""Predicted gain that another way to run must have: three times what the planner's speed is off by at the median."""


@rule(
    "advice",
    "a faster way to run it fits in memory",
    looks_at="memory in use, and the planner's figures for every backend, checkpointing mode and cut of the batch",
    threshold=f"more than {percent(SPARE)} of the memory in use, or a predicted gain under {percent(GAIN)}",
    advice="Run it as the planner says: the training stays the same, and a checkpoint of this run can be gone on from.",
)
def faster_spec(case: Case) -> Symptom | None:
    if case.used_bytes > SPARE * case.capacity:
        return None
    found = case.faster(GAIN, lambda candidate: True)
    if found is None:
        return None
    candidate, gain = found
    written = case.planned.as_written
    assert written is not None and written.speed is not None and candidate.speed is not None
    if speaks(micro_batch_small, case) or speaks(accumulation_large, case):  # which leave all else as it is
        recut = case.faster(CUT_GAIN, lambda candidate: _larger(case, candidate))
        if recut is not None and gain < recut[1] + GAIN:
            return None
    return Symptom(
        f"{_memory(case)}; {_words(candidate)} is predicted to train {format_count(candidate.speed)} tokens per second "
        f"and GPU in {format_bytes(candidate.memory.high_bytes)}, this run {format_count(written.speed)}: "
        f"{percent(gain)} more.",
        set=candidate.changes,
    )


def _words(candidate: "Candidate") -> str:
    settings = candidate.spec.backend.model_dump(exclude_defaults=True)
    told = [f"{name} {value}" for name, value in settings.items() if name != "kind"]
    mode = candidate.spec.activation_checkpointing
    return ", ".join([settings["kind"], *told, f"checkpointing {mode}", f"micro-batch {candidate.plan.micro_batch}"])


# ---------------------------------------------------------------- waiting

COMMUNICATES = 0.2
"""Share of a step. Sharded training of models that fit their cards hides all but a few per cent of its communication
behind computation; a fifth is what accumulating twice as much, or sharding less, visibly brings back."""
LESS = 0.7
"""Times the run's own predicted communication (or offloading) that a remedy may have left."""


@rule(
    "warning",
    "training waits for communication",
    looks_at="the time of a step that a rank waited for others (median); where that is not measured, what the planner "
    "predicted when the run began",
    threshold=f"at most {percent(COMMUNICATES)} of the step",
    advice="Use a larger micro-batch, shard less (`reshard_after_forward` false, a lower ZeRO stage) if memory allows, "
    "or accumulate more, which makes the global batch larger.",
)
def communication_bound(case: Case) -> Symptom | None:
    case.need_gpu()
    if case.world_size == 1:
        return None
    share, source = _share(case, "communication", "communication_exposed")
    if share <= COMMUNICATES:
        return None
    return Symptom(
        f"{percent(share)} of a step are spent waiting for communication ({source}).",
        set=_with_less(case, "communication_exposed"),
    )


OFFLOADS = 0.3
"""Share of a step. With little accumulation the update of offloaded weights, at the speed of host memory and of the
bus, easily takes longer than the passes on the GPU; at a third of the step it is the first thing to change."""


@rule(
    "warning",
    "training waits for what is offloaded",
    looks_at="under offload, the time of a step in the optimizer (median); where that is not measured, what the "
    "planner predicted when the run began",
    threshold=f"at most {percent(OFFLOADS)} of the step",
    advice="Leave the optimizer on the GPU if it fits there, or take more passes for each update: a larger global "
    "batch.",
)
def offload_bound(case: Case) -> Symptom | None:
    case.need_gpu()
    if not _offloads(case.spec):
        return None
    share, source = _share(case, "optimizer", "offload_exposed")
    if share <= OFFLOADS:
        return None
    return Symptom(
        f"{percent(share)} of a step go to the update of offloaded weights ({source}).",
        set=_with_less(case, "offload_exposed"),
    )


def _offloads(spec: Spec) -> bool:
    backend = spec.backend.model_dump()
    return any(backend.get(name) for name in ("cpu_offload", "offload_optimizer", "offload_parameters"))


def _share(case: Case, phase: str, part: str) -> tuple[float, str]:
    """Of a step, and whether it was measured."""
    try:
        return statistics.median(case.shares("time", phase)), "measured"
    except CannotJudge:
        seconds = at(case.run.plan, "time", "step_seconds")
        predicted = at(case.run.plan, "time", "parts", part)
        if not (is_number(seconds) and is_number(predicted) and seconds > 0):
            raise
        return predicted / seconds, "predicted, not measured"


def _with_less(case: Case, part: str) -> dict[str, Any]:
    """The fastest way to run that has clearly less of `part` of the predicted time; {} where nobody knows one."""
    try:
        written = case.planned.as_written
        assert written is not None
        most = LESS * written.time.parts[part]
        found = case.faster(0.0, lambda candidate: candidate.time.parts[part] < most)
    except CannotJudge:
        return {}
    return {} if found is None else found[0].changes


IDLE = 0.6
"""Share of the time in which the GPU ran any kernel at all (NVML's utilisation). A run that launches its kernels ahead
of the GPU keeps it above 0.9 whatever they do."""


@rule(
    "warning",
    "the GPU is idle for much of the time",
    looks_at="utilisation of rank 0's GPU as the driver has it (median), where it is not data that it waits for",
    threshold=f"at least {percent(IDLE)}",
    advice="Kernels are too short for the host to launch them in time: compile the model, and use a larger "
    "micro-batch.",
)
def gpu_idle(case: Case) -> Symptom | None:
    case.need_gpu()
    busy = statistics.median(case.values("device", "utilization"))
    if busy >= IDLE or speaks(data_wait, case):
        return None
    return Symptom(
        f"a kernel runs in {percent(busy)} of the time at the median.",
        set={} if case.spec.compile or isinstance(case.spec.objective, PPO) else {"compile": True},
    )


SLOWED = 1.15
"""Times as long a step takes at the end as at the start. With shapes that stay the same nothing makes it slower but the
machine: heat, other jobs, storage, a host that runs out of memory. It moves by a few per cent by itself."""


@rule(
    "warning",
    "steps become slower and slower",
    looks_at="seconds of a step in the four quarters of the run, medians, pauses left out",
    threshold=f"at most {percent(SLOWED - 1)} longer in the last than in the first",
    advice="Look for what else runs on the machine, for heat (clocks and temperatures), and for host memory that "
    "runs out.",
)
def slowing_down(case: Case) -> Symptom | None:
    case.need_gpu()
    quarters = parts(case.values("step_seconds", least=20), 4)
    rises = quarters == sorted(quarters)
    if not rises or quarters[-1] <= SLOWED * quarters[0]:
        return None
    told = ", ".join(format_seconds(seconds) for seconds in quarters)
    return Symptom(f"a step took {told} in the four quarters of the run.")


# ---------------------------------------------------------------- precision and prediction


@rule(
    "advice",
    "fp32 on a card with bf16 units",
    looks_at="`precision` and the card",
    threshold="bf16 or fp16 where the card has units for it",
    advice="Train in bf16: several times faster and with half the activations, while master weights, moments and "
    "reductions stay fp32.",
)
def precision_fp32(case: Case) -> Symptom | None:
    if case.spec.precision != "fp32":
        return None
    card = case.card
    if card.bf16_flops is None:
        return None
    slow = "" if card.fp32_flops is None else f" and {card.fp32_flops / 1e12:.0f} in fp32"
    return Symptom(
        f"`precision` is fp32; the peak of the {card.name} is {card.bf16_flops / 1e12:.0f} TFLOP/s in bf16{slow}.",
        set={"precision": "bf16"},
    )


OFF_TIME = 1.5
"""Times, either way. The planner's speed is off by 3 % at the median and 17 % at the 90th percentile beside runs that
others published (README.md): a factor of one and a half is not its usual error."""


@rule(
    "advice",
    "steps do not take as long as predicted",
    looks_at="seconds of a step (median), and what plan.json predicted",
    threshold=f"within a factor of {OFF_TIME:g}",
    advice="Where no other finding says why, `python -m scaling.calibrate --out FILE` measures what this machine can "
    "do (then set `profile.hardware` to it). If it is as fast as it should be, please report it: the planner is "
    "wrong.",
)
def time_off_prediction(case: Case) -> Symptom | None:
    if isinstance(case.spec.objective, PPO):
        raise CannotJudge("prompts are answered before one step of several, for as long as the answers are")
    predicted = at(case.run.plan, "time", "step_seconds")
    if not is_number(predicted) or predicted <= 0:
        raise CannotJudge("no time was predicted for its device")
    measured = statistics.median(case.values("step_seconds"))
    if 1 / OFF_TIME <= measured / predicted <= OFF_TIME:
        return None
    return Symptom(f"a step takes {format_seconds(measured)}, and {format_seconds(predicted)} were predicted.")


RULES = (
    data_wait,
    communication_bound,
    offload_bound,
    gpu_idle,
    slowing_down,
    faster_spec,
    micro_batch_small,
    accumulation_large,
    precision_fp32,
    time_off_prediction,
)
