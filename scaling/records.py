"""Plain records that one part of a run hands to another. Counts are whole numbers, memory is bytes, time is seconds."""

from dataclasses import dataclass

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
    """Tokens in one sequence."""

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
class StepRecord:
    """One logged step: a line of metrics.jsonl."""

    step: int
    """Number of the optimizer step, the first being 1."""
    loss: float
    """Mean over the target tokens of the whole step, nats."""
    grad_norm: float
    """Global 2-norm before clipping."""
    lr: dict[str, float]
    """Learning rate of each group at this step."""
    tokens: int
    """Input tokens seen since the start of training, masked ones included."""
    samples_seen: int
    """Sequences seen since the start of training."""
    step_seconds: float
    """Mean over the steps since the last record, pauses (validation) left out."""
    tokens_per_second: float
    """Input tokens per second over all ranks, over the same steps."""
    tokens_per_second_per_device: float
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None for a device whose peak is not known."""
    memory: dict[str, int | None]
    """Bytes on rank 0: allocated and reserved peak since the last record, device and host."""
    time: dict[str, float | None]
    """Seconds of the recorded step by phase."""
    device: dict[str, float | None]
    """Utilisation, power and temperature of rank 0's GPU."""
    skipped: bool
    """The update was not applied, because the gradient was not finite at this fp16 loss scale."""


@dataclass(frozen=True)
class ValidationRecord:
    """One validation: a line of validation.jsonl."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean over the target tokens of the validation set, nats."""
    bits_per_byte: float | None
    """Loss in bits per UTF-8 byte of text; None where the number of bytes is not known."""
    tokens: int
    """Target tokens of the validation set."""
    seconds: float
