"""Seconds of a rollout of `ppo` (scaling/rollouts.py): answers sampled token by token, then scored twice.

Prompts are as long as there is room for, and some answer of every micro-batch as long as it may be: no rollout takes
longer. A token wants every weight read, and the keys and values of all before it, for a product with one row for each
prompt: memory's rate bounds it, or the host, which issues the kernels.
"""

from dataclasses import replace

from scaling.estimate.compute import HOST_KERNEL_SECONDS, KERNEL_SECONDS, Pass, Passes, block_passes, product_seconds
from scaling.estimate.flops import Block
from scaling.estimate.policy import shares
from scaling.estimate.rates import host_rate
from scaling.estimate.strategies import Step, forward_costs, masters
from scaling.inventory import head_dim
from scaling.spec.sections import PPO, Decoder

DRAW_BYTES = 430
"""Memory's traffic for each logit: to fp32 and over the temperature 16; the two mixings of 64 bits 180, from bits to
noise 210, the sum and its maximum 16 (`_gumbel`: some 25 kernels that each read and write 8 bytes)."""
DRAW_KERNELS = 70
"""Of a token outside of the blocks: embedding, mask, rotations, norm, head, the draw, what looks for the end."""
MEMORY_KERNELS = 2
"""Of a block: new keys and values to their places."""


def rollout_seconds(step: Step, objective: PPO) -> dict[str, float]:
    """What a step has of the rollout that it shares with others: "sampling", and "scoring"."""
    model, plan, rates = step.spec.model, step.plan, step.rates
    assert isinstance(model, Decoder), "the spec refuses others"
    length, new = plan.sequence_length, objective.max_new_tokens
    steps = objective.rollout_steps * objective.epochs
    prefill = _pass_seconds(step, model, length - new, length - new)
    token = _pass_seconds(step, model, 1, length - new // 2)  # the middle one
    score = _seconds(step, step.head.forward)
    rate = rates.hbm if step.cluster.gpu.is_cpu else host_rate(step.cluster.gpu)
    exchange = 2 * 4 * masters(step) / rate  # each way
    answered = shares(objective, plan)
    return {
        "sampling": answered * (prefill + new * token) / steps,
        "scoring": (2 * answered * score + 2 * exchange) / steps,
    }


def _pass_seconds(step: Step, model: Decoder, tokens: int, seen: int) -> float:
    """A forward pass of so many tokens of each prompt, that look at `seen`, and the draw of one more."""
    rates, micro = step.rates, step.plan.micro_batch
    keys = (model.num_key_value_heads or model.num_attention_heads) * head_dim(model)
    memory = 2 * rates.width * keys * seen * micro / rates.hbm

    def passes(block: Block) -> Passes:
        found = block_passes(model, block, micro * tokens, seen, "none", False, rates, causal=False).forward
        return Passes(Pass(found.seconds + memory, found.kernels + MEMORY_KERNELS), Pass(0.0, 0))

    blocks = tuple((block, count, passes(block)) for block, count, _ in step.blocks)
    logits = micro * model.vocab_size
    head = product_seconds(micro, model.hidden_size, model.vocab_size, rates) + DRAW_BYTES * logits / rates.hbm
    return _seconds(replace(step, blocks=blocks), Pass(head, DRAW_KERNELS))


def _seconds(step: Step, head: Pass) -> float:
    """Of one forward pass: of the device, or of the host where that is slower."""
    added = forward_costs(step)
    kernels = head.kernels + sum(count * passes.forward.kernels for _, count, passes in step.blocks)
    device = head.seconds + sum(count * passes.forward.seconds for _, count, passes in step.blocks)
    device += added.communication + added.copied_bytes / step.rates.hbm + added.offload
    return max(device + KERNEL_SECONDS * kernels, HOST_KERNEL_SECONDS * kernels + added.hooks)
