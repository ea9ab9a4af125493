"""What `ppo` adds to a step, played on a tape: its loss, and the rollouts before it (scaling/rollouts.py).

A rollout is sampling, a prompt's tokens at once and then token by token, and scoring: what the model and the one that
training starts from make of each token. No gradient is wanted there, so each pass holds what is at work, and what the
answers of this rank and the keys and values of those at work take.
"""

from scaling.estimate.decoder import PlayedDecoder, PlayedMemory
from scaling.estimate.ops import FLOAT, LONG, Ops, Shape
from scaling.estimate.tape import Split, Storage, Value
from scaling.estimate.torch_engines import Single
from scaling.records import BatchPlan
from scaling.spec.sections import PPO

ANSWER_BYTES = 3 * LONG
"""Of each token of an answer: `Answered`."""
SCORE_BYTES = 4 * FLOAT
"""The same once it is scored: its log-probability, that and the value as the model gives them, and the reference's."""
BATCH = (LONG, LONG, LONG, FLOAT, FLOAT, FLOAT, FLOAT)
"""Bytes of each token in the tensors of `ResponseBatch`."""


def shares(objective: PPO, plan: BatchPlan) -> int:
    """Micro-batches of prompts that a rank answers at a time."""
    return objective.rollout_steps * plan.accumulation


def answers_bytes(objective: PPO, plan: BatchPlan) -> int:
    """On the device, of all that a rank has answered and scored in a rollout, at its end."""
    tokens = shares(objective, plan) * plan.micro_batch * plan.sequence_length
    return (ANSWER_BYTES + SCORE_BYTES) * tokens


def rollout_bytes(objective: PPO, plan: BatchPlan) -> int:
    """What every rank keeps of a rollout, all ranks' answers, in host memory."""
    return sum(BATCH) * objective.rollout_steps * plan.global_batch * plan.sequence_length


def play_rollout(objective: PPO, ops: Ops, engine: Single, model: PlayedDecoder) -> None:
    """One micro-batch of prompts, as long as they may be, answered to the last token, and scored twice; without what is
    kept of it (`answers_bytes`)."""
    tape, shape = ops.tape, ops.shape
    ops.grad = False
    memory = PlayedMemory(ops, shape.sequence)
    for length in (shape.sequence - objective.max_new_tokens, 1):
        ops.shape = Shape(shape.batch, length, shape.width)
        with tape.during("rollout", "activations"):
            _draw(ops, model.forward(memory), model.model.vocab_size)
        memory.length = shape.sequence - 1  # nothing between the two holds more than the last does
    del memory
    ops.shape = shape
    for _ in ("the model", "the reference"):
        with tape.during("rollout", "activations"):
            scored = model.forward()
            del scored
            engine.refresh()  # weights make place, twice
    ops.grad = True


def _draw(ops: Ops, logits: Value, vocabulary: int) -> None:
    """The next token of each row: logits in fp32 and Gumbel noise, whose bits are mixed in 64."""
    size = ops.shape.batch * vocabulary
    exact = logits.storage if ops.shape.width == FLOAT else ops.new(size, FLOAT)
    tempered = ops.new(size, FLOAT)
    del logits, exact
    places = ops.new(vocabulary, LONG)
    mixed = [ops.new(size, LONG) for _ in range(4)]
    del mixed, places, tempered


def policy_loss(ops: Ops, found: Value) -> Value:
    """PolicyLoss of scaling/objectives/policy.py, of what the model says of each token: [2, tokens] in fp32."""
    rows = ops.shape.rows
    node = Split(ops.tape, [found.node], [], lambda *_: [ops.new(2 * rows, FLOAT)]) if found.node else None
    losses = values = Value(found.storage, rows, node)
    del found, node
    counted = ops.new(rows, 1)
    ratio = _exponent(ops, _same(ops, _new(ops, losses)))  # minus, less what it was
    gain = _new(ops, ratio)
    clipped = _new(ops, _clamped(ops, ratio))
    near = _same(ops, _clamped(ops, _same(ops, values)))
    error = _extreme(ops, _square(ops, _same(ops, values)), _square(ops, _same(ops, near)))
    whole = _same(ops, _new(ops, error))
    lower = _extreme(ops, gain, clipped)
    lost = ops.result(rows, [whole, lower], [], lambda gradient, _: [gradient, ops.new(rows, FLOAT)], _row(ops))
    del whole, lower
    chosen = _new(ops, lost, kept=[counted])
    del lost
    return ops.result(1, [chosen], [], lambda gradient, _: [gradient], ops.new(1, FLOAT))


def _row(ops: Ops) -> Storage:
    return ops.new(ops.shape.rows, FLOAT)


def _new(ops: Ops, inputs: Value, kept: list[Storage] | None = None) -> Value:
    """A function whose gradient is another tensor."""
    return ops.result(inputs.elements, [inputs], kept or [], lambda *_: [_row(ops)], lambda: _row(ops))


def _same(ops: Ops, inputs: Value) -> Value:
    """A sum with something given: the gradient goes on as it is."""
    return ops.result(inputs.elements, [inputs], [], lambda gradient, _: [gradient], lambda: _row(ops))


def _exponent(ops: Ops, inputs: Value) -> Value:
    out = _row(ops)
    return ops.result(inputs.elements, [inputs], [out], lambda *_: [_row(ops)], out)


def _clamped(ops: Ops, inputs: Value) -> Value:
    return _new(ops, inputs, kept=[inputs.storage])


def _square(ops: Ops, inputs: Value) -> Value:
    def run(_: Storage, __: list[Storage]) -> list[Storage]:
        power, scaled = _row(ops), _row(ops)
        found = _row(ops)
        del power, scaled
        return [found]

    return ops.result(inputs.elements, [inputs], [inputs.storage], run, lambda: _row(ops))


def _extreme(ops: Ops, first: Value, second: Value) -> Value:
    """The larger, or the smaller, of two."""
    kept = [first.storage, second.storage]
    return ops.result(first.elements, [first, second], kept, lambda *_: [_row(ops), _row(ops)], lambda: _row(ops))
