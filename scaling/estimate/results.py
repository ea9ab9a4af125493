"""What estimates say. Memory is bytes of one rank's device unless it says host; time is seconds of one step."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank at the peak of a step."""

    peak_allocated_bytes: int
    """What torch.cuda.max_memory_allocated will say."""
    peak_reserved_bytes: int
    """What the caching allocator will have taken from the driver."""
    device_used_bytes: int
    """What the driver will say that the process holds: reserved, the CUDA context, communicators."""
    low_bytes: int
    high_bytes: int
    """The band around `device_used_bytes`; a run fits if `high_bytes` does."""
    peak_phase: str
    parts: dict[str, int] = field(default_factory=dict)
    """Of the allocated peak: parameters, gradients, optimizer, activations, logits, communication, workspace."""
    phases: dict[str, int] = field(default_factory=dict)
    """Allocated at the peak of each: build, rollout (of ppo), forward, backward, optimizer."""
    host_bytes: int = 0
    """Host memory for what is offloaded; of ppo also the reference's weights of this rank, and a rollout."""
    staging_bytes: int = 0
    """Host memory for the copy of this rank's state that checkpoints are written from."""
    checkpoint_bytes: int = 0
    """A checkpoint on disk, over all ranks."""


@dataclass(frozen=True)
class TimeEstimate:
    """Time of one optimizer step."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    """Of the dense peak of the card; None where that is not known."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds: compute, communication_exposed, optimizer, offload_exposed, overhead, and of ppo sampling and scoring,
    what a step has of its rollout; they add up to `step_seconds`."""
    mean_step_seconds: float | None = None
    """Of all steps of a run whose sequences grow, where `step_seconds` is of those at full length. None where they do
    not grow, or where the number of steps or what shorter ones cost is not known."""
