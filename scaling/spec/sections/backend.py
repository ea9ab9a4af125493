"""Where parameters, gradients and optimizer state are."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from scaling.spec.scan import quoted
from scaling.spec.sections.base import Count, Elements, Section, Text


class Single(Section):
    """One process on one device, no sharding."""

    kind: Literal["single"]

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return False


class DDP(Section):
    """Every rank holds everything; gradients are averaged (torch DistributedDataParallel)."""

    kind: Literal["ddp"]
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: whole on every rank (replicate, the default), as all others here."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return False

    def contradictions(self) -> Iterator[str]:
        if self.frozen == "shard":
            yield (
                '`frozen` must be "replicate" or null for ddp, where every rank holds all parameters, but is '
                '"shard"; drop it, or set `backend` to {"kind": "fsdp"}'
            )


class FSDP(Section):
    """Parameters, gradients and optimizer state cut over the ranks (torch FSDP2, `fully_shard`)."""

    kind: Literal["fsdp"]
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass and gather them again in the backward pass (as ZeRO-3);
    false keeps them in between (as ZeRO-2): more memory, less communication."""
    replicate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Hybrid sharding (HSDP): this many replicas, each sharded over world size / replicate ranks."""
    cpu_offload: bool = False
    """Keep the sharded parameters, gradients and optimizer state in host memory."""
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: cut over the ranks and gathered as all others (shard, the default), or
    whole on every rank's device, in the precision that computes (replicate): more memory, less communication."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return self.frozen != "replicate"


class DeepSpeed(Section):
    """DeepSpeed ZeRO. Sizes are elements, not bytes, and have DeepSpeed's own names."""

    kind: Literal["deepspeed"]
    zero_stage: Annotated[int, Field(ge=1, le=3)]
    """What is cut over the ranks: 1 optimizer state, 2 gradients too, 3 parameters too. (For 0 use `ddp`.)"""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer state and its step live in place of the GPU; nvme wants stage 3 and nvme_path."""
    offload_parameters: Literal["cpu", "nvme"] | None = None
    """Where the parameter shards of stage 3 live in place of the GPU."""
    nvme_path: Text | None = None
    """Folder on a fast local disk, for the nvme offloads."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on; takes a second reduce bucket."""
    reduce_bucket_size: Annotated[int, Field(ge=1024, le=2**40)] = 50_000_000
    """Gradient elements reduced at a time. Default: 100 MB of bf16, which fills a network; a tenth of DeepSpeed's."""
    allgather_bucket_size: Annotated[int, Field(ge=1024, le=2**40)] | None = None
    """Stages 1 and 2: parameter elements gathered at a time after the step. Default: as reduce_bucket_size."""
    prefetch_bucket_size: Elements | None = None
    """Stage 3: parameter elements fetched ahead of use. Default: 50,000,000, DeepSpeed's own."""
    param_persistence_threshold: Elements | None = None
    """Stage 3: tensors up to this many elements stay whole on every rank. Default: 100,000, DeepSpeed's own."""
    max_live_parameters: Elements | None = None
    """Stage 3: gathered elements alive at a time. Default: 1,000,000,000, DeepSpeed's own."""
    max_reuse_distance: Elements | None = None
    """Stage 3: parameters used again within so many elements are not freed. Default: 1,000,000,000, DeepSpeed's own."""
    sub_group_size: Annotated[int, Field(ge=1024, le=2**40)] | None = None
    """Stage 3: elements that the optimizer updates at a time. Default: 1,000,000,000, DeepSpeed's own."""
    zero_hpz_partition_size: Count | None = None
    """Stage 3: ranks in a secondary partition (ZeRO++ hpZ), usually those of a node; divides the world size."""
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: cut over the ranks and gathered as all others (shard, stage 3 alone), or
    whole on every rank's device, in the precision that computes (replicate). Default: shard at stage 3, replicate at
    stages 1 and 2."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return self.zero_stage == 3 and self.frozen != "replicate"

    def contradictions(self) -> Iterator[str]:
        stage3 = [
            *("offload_parameters", "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters"),
            *("max_reuse_distance", "sub_group_size", "zero_hpz_partition_size"),
        ]
        for name in stage3 if self.zero_stage < 3 else ["allgather_bucket_size"]:
            if getattr(self, name) is not None:
                right = "stage 3" if self.zero_stage < 3 else "stages 1 and 2"
                yield (
                    f"`{name}` must be absent at ZeRO stage {self.zero_stage}, but is {getattr(self, name)!r}: "
                    f"DeepSpeed would ignore it; drop it or use {right}"
                )
        if self.frozen == "shard" and self.zero_stage < 3:
            yield (
                f'`frozen` must be "replicate" or null at ZeRO stage {self.zero_stage}, where every rank holds all '
                'parameters, but is "shard"; drop it or use stage 3'
            )
        if self.offload_optimizer == "nvme" and self.zero_stage < 3:
            yield (
                f'`offload_optimizer` must be "cpu" or null at ZeRO stage {self.zero_stage}, but is "nvme"; use stage 3'
            )
        wants_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if wants_nvme != (self.nvme_path is not None):
            yield (
                "`nvme_path` must be set when, and only when, something is offloaded to nvme, but "
                + (
                    "is absent; name a folder on a local disk"
                    if self.nvme_path is None
                    else f"is '{quoted(self.nvme_path)}'; drop it"
                )
            )


Backend = Annotated[Single | DDP | FSDP | DeepSpeed, Field(discriminator="kind")]
