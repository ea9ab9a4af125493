"""Estimates that cost nothing, for tests of what is done with estimates: memory falls with the ranks that share it."""

import pytest

from scaling.estimate import search
from scaling.estimate.results import MemoryEstimate, TimeEstimate
from scaling.units import GiB

STATE_BYTES = 16
"""Per parameter, divided by the ranks."""
KEPT = {"none": 4, "selective": 2, "full": 1}
"""Bytes of activations per token, layer and width, relative to the least."""


class RoughMemory:
    """In place of MemoryModel."""

    made = 0
    """How many there were."""

    def __init__(self, spec, groups, rendered, plan, gpu, *, cuda=True):
        RoughMemory.made += 1
        self.spec, self.plan = spec, plan
        offloaded = "offload" in str(spec.backend.model_dump(exclude_defaults=True))
        self.states = 0 if offloaded else STATE_BYTES * sum(group.parameters for group in groups) // plan.world_size
        self.host = STATE_BYTES * sum(group.parameters for group in groups) if offloaded else 0

    def at(self, micro_batch, accumulation):
        assert micro_batch * accumulation == self.plan.micro_batch * self.plan.accumulation
        model = self.spec.model
        tokens = micro_batch * self.plan.sequence_length
        kept = KEPT[self.spec.activation_checkpointing]
        activations = 8 * kept * tokens * model.hidden_size * model.num_hidden_layers
        logits = 4 * min(tokens, 256) * model.vocab_size
        parts = {"parameters": self.states, "activations": activations, "logits": logits}
        peak = sum(parts.values())
        used = peak + GiB // 2
        return MemoryEstimate(peak, peak, used, used - GiB // 4, used + GiB // 4, "backward", parts, {}, self.host)


def rough_time(spec, plan, groups, rendered, cluster):
    """In place of estimate_time: more micro-steps and more recomputation take longer."""
    assert spec.batch.micro_batch_size == plan.micro_batch
    tokens = plan.micro_batch * plan.accumulation * plan.sequence_length
    again = {"none": 1.0, "selective": 1.2, "full": 1.4}[spec.activation_checkpointing]
    peak = cluster.gpu.bf16_flops
    compute = tokens * again * 1e-5 * (1e15 / peak) if peak else float("nan")
    parts = {"compute": compute, "overhead": 0.01 * plan.accumulation}
    seconds = sum(parts.values())
    return TimeEstimate(seconds, tokens / seconds, None if peak is None else 0.4 / again, parts)


@pytest.fixture
def rough(monkeypatch):
    """Search with these."""
    RoughMemory.made = 0
    monkeypatch.setattr(search, "MemoryModel", RoughMemory)
    monkeypatch.setattr(search, "estimate_time", rough_time)
