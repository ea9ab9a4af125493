"""Memory of one rank, roughly: states from their counts, activations from their widths. Stands in for the ledger."""

from collections.abc import Sequence
from typing import Any

from scaling.estimate.results import MemoryEstimate
from scaling.estimate.step import WIDTHS
from scaling.groups import Group
from scaling.hardware import GPU
from scaling.records import BatchPlan
from scaling.spec.sections import Spec
from scaling.units import GiB


class MemoryModel:
    """Memory of one structure: everything but micro-batch and accumulation is fixed."""

    def __init__(
        self, spec: Spec, groups: Sequence[Group], rendered: dict[str, Any], plan: BatchPlan, gpu: GPU | None
    ) -> None:
        self.spec = spec
        self.sequence = plan.sequence_length
        self.width = WIDTHS[spec.precision]
        every = sum(group.parameters for group in groups)
        trained = sum(group.parameters for group in groups if not group.frozen)
        zero = rendered.get("zero_optimization")
        self.states = (
            self._deepspeed(zero, every, trained, plan.world_size) if zero else self._torch(rendered, every, trained)
        )
        self.host = self.states.pop("host", 0)

    def _torch(self, rendered: dict[str, Any], every: int, trained: int) -> dict[str, int]:
        ranks = rendered.get("mesh", {}).get("dp_shard", 1)
        found = {"parameters": 4 * every // ranks, "gradients": 4 * trained // ranks, "optimizer": 8 * trained // ranks}
        if rendered.get("cpu_offload"):
            found = {"host": sum(found.values())}
        gathered = every * self.width
        if "wrap" in rendered and rendered["wrap"][0]["reshard_after_forward"]:
            gathered = 3 * gathered // len(rendered["wrap"])
        return found | {"communication": {"single": 0, "ddp": 4 * trained, "fsdp": gathered}[rendered["kind"]]}

    def _deepspeed(self, zero: dict[str, Any], every: int, trained: int, ranks: int) -> dict[str, int]:
        whole = self.width * every
        found = {
            "parameters": whole // (ranks if zero["stage"] == 3 else 1),
            "gradients": 4 * trained // (ranks if zero["stage"] > 1 else 1),
            "optimizer": 12 * trained // ranks,
            "communication": 2 * zero["reduce_bucket_size"] * self.width,
            "host": 0,
        }
        for part, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
            if name in zero:
                found["host"] += found.pop(part)
        return found

    def at(self, micro_batch: int, accumulation: int) -> MemoryEstimate:
        """The estimate with so many sequences at a time."""
        model, tokens = self.spec.model, micro_batch * self.sequence
        block = tokens * self.width * (10 * model.hidden_size + 4 * model.intermediate_size)
        kept = {"none": 1.0, "selective": 0.6, "full": 0.0}[self.spec.activation_checkpointing]
        inputs = tokens * self.width * model.hidden_size
        parts = {
            **self.states,
            "activations": round(model.num_hidden_layers * (inputs + kept * block) + block),
            "logits": 10 * min(2**25, tokens * model.vocab_size),
            "workspace": 64 * 2**20,
        }
        allocated = sum(parts.values())
        reserved = round(1.1 * allocated)
        used = reserved + GiB
        return MemoryEstimate(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_used_bytes=used,
            low_bytes=round(0.95 * used),
            high_bytes=round(1.05 * used),
            peak_phase="backward",
            parts=parts,
            host_bytes=self.host,
        )
