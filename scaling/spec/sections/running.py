"""What goes on beside training: validation, checkpoints, timeouts, profile, tracking."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from scaling.spec.sections.base import Count, Section, Text


class Validation(Section):
    """When and on how much the validation loss is measured."""

    interval: Count
    """Optimizer steps between two validations; one more follows the last step."""
    batches: Count
    """Size of the fixed validation set, in global batches, as far as the data have that many samples."""


Seconds = Annotated[float, Field(gt=0, le=1e7)]


class Checkpoint(Section):
    """When the state of training is saved, and which of the saved states are kept."""

    interval: Count = 1000
    """Optimizer steps between two checkpoints; one more follows the last step."""
    keep_last: Annotated[int, Field(ge=1, le=2**20)] | None = 5
    """Checkpoints kept, the newest ones; null keeps all. Two or more leave another where the newest is damaged."""
    permanent: Annotated[list[Count], Field(max_length=10_000)] = []
    """Steps that are saved, and kept for ever."""
    best: bool = True
    """Save after each validation that is better than all before, and keep it: checkpoints/best names it."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in host memory; false makes training wait."""
    restart_limit: Annotated[int, Field(ge=1, le=2**20)] | None = 3
    """A run that is started again this many times after a failure, with no newer checkpoint in between, ends with exit
    code 7; null lets it try for ever."""
    grace: Seconds | None = None
    """Seconds that the scheduler gives between asking a run to stop and killing it. A stop that finds less of them left
    than the save before took begins none, and ends with exit code 143; null: it always saves."""


class Timeouts(Section):
    """How long a rank may go without a sign of life, by phase, before its watchdog ends the run with exit code 8.

    Within a step every part of every micro-batch is a sign, within a validation every batch.
    """

    startup: Seconds = 3600.0
    """Until the first step: tokenising, building, reading a checkpoint; seconds, as all of these."""
    first_step: Seconds = 1800.0
    """The first step of a start, which compiles."""
    step: Seconds = 600.0
    """A part of a later step."""
    validation: Seconds = 600.0
    """A batch of a validation."""
    save: Seconds = 1800.0
    """Copying the state for a checkpoint, and waiting for the one before or the last one to be written."""
    closing: Seconds = 600.0
    """From the last step to the end of the process."""


class Profile(Section):
    """What is recorded while training."""

    interval: Count = 10
    """Optimizer steps between two lines of metrics.jsonl; the last step is always recorded."""
    log_gradients: bool = False
    """At each of these lines also the norm of the gradient of each block, of each module outside of them (embeddings,
    norm, head) and of each parameter group, before clipping."""
    trace_steps: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """First and last step of a trace by torch.profiler, for Perfetto or chrome://tracing; written to traces/ of the run
    folder, for each rank. Null: none."""
    memory_step: Count | None = None
    """At this step every tensor is counted by what it is (parameters, gradients, activations, …), on rank 0, into
    memory.json; that step is slow. Null: never."""
    memory_snapshot: bool = False
    """On a GPU record every allocation, and write torch's snapshot for https://pytorch.org/memory_viz to memory/ of the
    run folder: after the first record, and where memory runs out."""
    device_interval: Seconds = 1.0
    """Seconds between two readings of the GPU (power, temperature, clocks) in the background."""
    hardware: Text | None = None
    """File of `scaling.calibrate` for this machine, to tell speed against what it measured; null: against the card's
    dense peak alone."""

    def contradictions(self) -> Iterator[str]:
        if self.trace_steps is not None and self.trace_steps[0] > self.trace_steps[1]:
            first, last = self.trace_steps
            yield f"`trace_steps` must be its first and its last step, but is [{first}, {last}]; use [{last}, {first}]"
        if self.trace_steps is not None and self.trace_steps[1] - self.trace_steps[0] >= MOST_TRACED:
            yield (
                f"`trace_steps` must be at most {MOST_TRACED} steps, but is {self.trace_steps}: a trace holds every "
                f"kernel; use [{self.trace_steps[0]}, {self.trace_steps[0] + 2}]"
            )


MOST_TRACED = 100
"""Steps of a trace: what viewers still open."""


class Wandb(Section):
    """A run of Weights & Biases (pip install wandb; its key comes from its own login, never from here)."""

    project: Text
    """Where the run is listed."""
    entity: Text | None = None
    """User or team; null: its default."""
    group: Text | None = None
    """Runs of one experiment, shown together; null: none."""
    tags: Annotated[list[Text], Field(max_length=100)] = []
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """offline: into the run folder alone, for `wandb sync`."""


class Prometheus(Section):
    """An address that says the newest record in Prometheus' text format, at /metrics."""

    port: Annotated[int, Field(ge=0, le=65535)]
    """0: any free one; the log says which."""
    host: Text = "127.0.0.1"
    """Address to listen on: this machine alone, unless you ask for more ("0.0.0.0")."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: Wandb | None = None
    """Null: nothing is sent to Weights & Biases."""
    prometheus: Prometheus | None = None
    """Null: nothing listens."""
