"""How steps are made: batch, optimizer, parameter groups, learning rates."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from scaling.spec.sections.base import Auto, Beta, Count, NonNegative, Positive, Section, Text


class Batch(Section):
    """Sequences per optimizer step: global = micro x world size x accumulation, exactly."""

    global_batch_size: Count | Auto | None = None
    """Sequences per optimizer step over all ranks; stays the same at any world size."""
    global_batch_tokens: Count | None = None
    """Tokens per optimizer step, in place of global_batch_size; a multiple of the sequence length."""
    micro_batch_size: Count | Auto = "auto"
    """Sequences per forward pass on one rank; what memory depends on. "auto": what the other two sizes leave; where
    accumulation is "auto" as well, the fastest that fits, found when training starts."""
    gradient_accumulation_steps: Count | Auto = "auto"
    """Forward and backward passes per optimizer step on each rank. "auto": what the other two sizes leave."""

    def contradictions(self) -> Iterator[str]:
        if self.global_batch_tokens is not None and self.global_batch_size is not None:
            yield (
                "`global_batch_tokens` must not be set together with global_batch_size, "
                f"but they are {self.global_batch_tokens} and {self.global_batch_size!r}; drop one"
            )
        whole = self.global_batch_tokens or self.global_batch_size or "auto"
        sizes = {
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        unknown = [name for name, value in sizes.items() if value == "auto"]
        if whole == "auto" and unknown:
            yield (
                "`global_batch_size` must be a number, or both micro_batch_size and gradient_accumulation_steps, but "
                f'{" and ".join(["global_batch_size", *unknown])} are "auto" or absent; set one of them'
            )


class AdamW(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), torch's implementation on every backend."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive
    """Peak learning rate, before lr_scaling; a group may set its own."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment. Default: as GPT-3 and Llama."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Share of each weight taken off per step, times the LR. Default: as GPT-3 and Llama."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay applies to: all tensors, or those of two or more dimensions (no norms and biases)."""


class ParamGroup(Section):
    """One rule: the parameters that match it and no earlier rule train with these settings."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    """What logs and tables call the group."""
    match: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs over parameter names; `*` also crosses dots. Each must match something."""
    lr: Positive | None = None
    """Peak learning rate of the group. Default: the optimizer's."""
    weight_decay: NonNegative | None = None
    """Default: the optimizer's."""
    betas: tuple[Beta, Beta] | None = None
    """Default: the optimizer's."""
    freeze: bool = False
    """Not trained: no gradient and no optimizer state."""

    def contradictions(self) -> Iterator[str]:
        given = [name for name in ("lr", "weight_decay", "betas") if getattr(self, name) is not None]
        if self.freeze and given:
            yield (f"`{given[0]}` must not be set on a frozen group, but is; drop it or `freeze`")


class LRScaling(Section):
    """How the learning rates change with the size of the job."""

    rule: Literal["none", "linear", "sqrt"] = "none"
    """Factor on every LR: none 1; linear r; sqrt the root of r, where r is this job's size over the reference's."""
    reference_world_size: Count | None = None
    """The number of ranks that the LRs in this spec were found at."""
    reference_global_batch_size: Count | None = None
    """The global batch (sequences) that the LRs in this spec were found at."""

    def contradictions(self) -> Iterator[str]:
        given = [self.reference_world_size, self.reference_global_batch_size]
        if self.rule != "none" and (given[0] is None) == (given[1] is None):
            yield (
                f"exactly one of `reference_world_size` and `reference_global_batch_size` must be set for rule "
                f'"{self.rule}", but {"neither" if given[0] is None else "both"} is; set the one the LR was found at'
            )


class Schedule(Section):
    """What all schedules share: linear warm-up from 0, then the curve of its kind down to min_lr_ratio."""

    warmup_steps: Annotated[int, Field(ge=0, le=2**40)] = 0
    """Optimizer steps over which the LR rises linearly to its peak; step 0 trains at peak / warmup_steps."""


class Constant(Schedule):
    """The peak LR to the end."""

    kind: Literal["constant"]


class Linear(Schedule):
    """Straight from the peak to min_lr_ratio x peak at step max_steps."""

    kind: Literal["linear"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The LR that the curve ends at, over the peak LR."""


class Cosine(Schedule):
    """Half a cosine from the peak to min_lr_ratio x peak at step max_steps (Loshchilov and Hutter, 2017)."""

    kind: Literal["cosine"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The LR that the curve ends at, over the peak LR. Default: as GPT-3."""


class CosineWithRestarts(Schedule):
    """Several half cosines of equal length, each starting at the peak again."""

    kind: Literal["cosine_with_restarts"]
    cycles: Count
    """Number of half cosines after the warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The lowest LR over the peak LR."""


class WSD(Schedule):
    """Warm-up, stable, decay: the peak LR until decay_steps before the end, then straight down (Hu et al., 2024)."""

    kind: Literal["wsd"]
    decay_steps: Count
    """Optimizer steps of the final descent."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The LR that the curve ends at, over the peak LR."""


AnySchedule = Annotated[Constant | Linear | Cosine | CosineWithRestarts | WSD, Field(discriminator="kind")]
