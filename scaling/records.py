"""Plain records that one part of a run hands to another. Counts are whole numbers, memory is bytes, time is seconds."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

IGNORED = -100
"""The target of a position that adds nothing to the loss: torch's own `ignore_index`, and Hugging Face's."""


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is cut: global_batch = micro_batch x world_size x accumulation, exactly."""

    global_batch: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int
    """Sequences per forward pass on one rank."""
    accumulation: int
    """Forward and backward passes per optimizer step, on each rank."""
    world_size: int
    """Ranks, each of which sees its own sequences."""
    sequence_length: int
    """Tokens in one sequence; of a vla positions in one sample (`scaling.inventory.sample_length`)."""

    def __post_init__(self) -> None:
        assert self.global_batch == self.micro_batch * self.world_size * self.accumulation, self

    @property
    def global_tokens(self) -> int:
        """Tokens per optimizer step, over all ranks, masked ones included."""
        return self.global_batch * self.sequence_length

    @property
    def sentence(self) -> str:
        """The sum as people say it: "480 = 12 micro x 8 ranks x 5 accumulation"."""
        ranks = f"{self.world_size} rank{'' if self.world_size == 1 else 's'}"
        return f"{self.global_batch} = {self.micro_batch} micro x {ranks} x {self.accumulation} accumulation"


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that its data and its schedule depend on."""

    step: int = 0
    """Optimizer steps done, refused ones included."""
    samples: int = 0
    """Where in the global order of samples the next step looks for its own."""
    tokens: int = 0
    """Input tokens seen, masked ones included; of a vla positions (`scaling.inventory.sample_length`)."""
    skipped: tuple[int, ...] = ()
    """Places in the order at which a step's samples are passed over, since they gave no finite gradient."""
    best: tuple[int, float] | None = None
    """Step and loss of the best validation."""

    def first_sample(self, plan: BatchPlan) -> int:
        """The place in the order at which the samples of the next step begin."""
        place = self.samples
        while place in self.skipped:
            place += plan.global_batch
        return place

    def after(self, plan: BatchPlan) -> "Progress":
        """The progress one step later."""
        samples = self.first_sample(plan) + plan.global_batch
        return replace(self, step=self.step + 1, samples=samples, tokens=self.tokens + plan.global_tokens)

    def first_samples(self, plan: BatchPlan, last_step: int) -> Iterator[int]:
        """`first_sample` of each step from here to `last_step`."""
        progress = self
        while progress.step < last_step:
            yield progress.first_sample(plan)
            progress = progress.after(plan)


@dataclass(frozen=True)
class StepRecord:
    """One logged step: a line of metrics.jsonl."""

    step: int
    """Number of the optimizer step, the first being 1."""
    loss: float
    """Mean over the target tokens of the whole step, nats; of actions over their numbers."""
    grad_norm: float
    """Global 2-norm before clipping."""
    lr: dict[str, float]
    """Learning rate of each group at this step."""
    tokens: int
    """Input tokens seen since the start of training, masked ones included."""
    samples_seen: int
    """Sequences seen since the start of training: the place in the order of the data."""
    step_seconds: float
    """Mean over the steps since the last record, pauses (validation, checkpoints) left out."""
    tokens_per_second: float
    """Input tokens per second over all ranks, over the same steps."""
    tokens_per_second_per_device: float
    samples_per_second: float
    """Sequences per second over all ranks, over the same steps."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1, of the card's dense peak; None for a device whose peak is not known."""
    mfu_of_mamf: float | None
    """The same of the fastest matrix product that `scaling.calibrate` measured (its maximum achievable matmul FLOP/s);
    None where `profile.hardware` names no such measurement."""
    memory: dict[str, Any]
    """On rank 0 since the last record, bytes: "allocated_peak_bytes", "active_peak_bytes", "reserved_peak_bytes",
    "device_used_bytes" (all processes), "process_used_bytes" (this one, where the driver says), "host_rss_bytes",
    "host_pinned_bytes"; "fragmentation" (0 to 1: the share of the reserved peak that the active peak leaves);
    "allocation_retries" and "out_of_memory_count" since the process began; "phases" {phase: allocated peak of the
    recorded step}. None where it cannot be known."""
    time: dict[str, float | None]
    """Seconds of a step by phase, which add up to `step_seconds`: the mean over the steps since the last record on a
    CPU, the recorded step on a GPU. "communication" is what the rank waited for others, taken out of the phase in which
    it did; None where that cannot be known, and then it is within the phases."""
    pauses: dict[str, float]
    """Seconds since the last record that training stood still, by reason: "validation", "checkpoint"; "profiling" has
    the steps that were slowed by `profile.trace_steps` or `profile.memory_step`, which no other time is of."""
    device: dict[str, Any]
    """Rank 0's GPU since the last record: "utilization" (0 to 1), "power_watts", "temperature_c" (highest),
    "clock_mhz", "max_clock_mhz", "throttle" [reasons], "ecc_errors", "xid_errors" (new ones)."""
    energy: dict[str, float | None]
    """Of the GPUs of all ranks: "joules_per_step", "joules_per_million_tokens"."""
    ranks: dict[str, Any] | None
    """None for one rank. "count"; "of" {quantity: {"min", "mean", "max", "lowest" rank, "highest" rank}} for the phases
    of `time`, "busy" (their sum without communication), "allocated_peak_bytes", "host_rss_bytes", "temperature_c",
    "clock_mhz", "power_watts", as far as they are known; "slowest" and "fastest" {"rank", "host", "device", "seconds"}
    by "busy", None where communication is not known and every rank waits for the slowest within its phases."""
    window_steps: int
    """The steps that times are of: those since the last record, without the first two of a start."""
    warm_up: bool
    """They are the first two of a start, which compile and fill caches, or a step that was traced: not for averages."""
    wall_time: float
    """When the record was made: seconds since 1970, as the clock of rank 0 has it."""
    skipped: bool
    """The update was not applied on any rank, because the loss or the gradient was not finite."""
    first_sample: int
    """Place in the global order of the first sample of the step; the others follow it."""
    bad_ranks: list[int]
    """Ranks whose own loss was not finite."""
    sequence_length: int | None = None
    """Tokens in each sequence of the step, where `data.sequence_curriculum` lets them grow; else None."""
    gradient_norms: dict[str, dict[str, float]] | None = None
    """2-norms before clipping of the parts of the gradient, "layers" {block, or module outside of blocks: norm} and
    "groups" {parameter group: norm}; the squares of each add up to that of `grad_norm`. None without
    `profile.log_gradients`, and for a refused step that is recorded out of turn."""


@dataclass(frozen=True)
class ValidationRecord:
    """One validation: a line of validation.jsonl."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean over the target tokens of the validation set, nats; of actions over their numbers."""
    bits_per_byte: float | None
    """Loss in bits per UTF-8 byte of text; None where the number of bytes is not known."""
    tokens: int
    """Target tokens of the validation set; of actions their numbers, padding left out; of preferences pairs."""
    seconds: float
    wall_time: float
    """When it ended: seconds since 1970, as the clock of rank 0 has it."""
    unit: str = "tokens"
    """What `tokens` counts: "tokens", "numbers", "pairs", "samples" or "responses"."""
    measures: dict[str, float] = field(default_factory=dict[str, float])
    """What else the objective measures, means over the validation set: of dpo "accuracy", the share of pairs of which
    the chosen response has gained more than the rejected one, and "margin", by how much more, in nats times beta."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run as a whole: a line of events.jsonl."""

    event: str
    """"start" (of a process group, a resumed one too), "checkpoint", "checkpoint_failed", "rollback", "rollout",
    "end"."""
    wall_time: float
    """Seconds since 1970, as the clock of rank 0 has it."""
    step: int | None
    """Optimizer steps done."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """start: "world_size", "backend", "hosts"; checkpoint: "seconds", "bytes", "stall_seconds"; rollout (of
    ppo): "reward", "kl", "response_tokens", means over its responses; end: "code", "reason", "rank"."""


@dataclass
class Peak:
    """The most memory that was in use at one time."""

    bytes: int = 0
    phase: str = ""
    parts: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes by category; they add up to `bytes`."""
