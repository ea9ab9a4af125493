"""Seconds that one GPU computes for a block and for the head: matrix products, attention, and all that moves memory.

A matrix product takes the time of its FLOPs at the achievable rate or of its bytes, whichever is longer. Its shape
counts twice: the last wave of output tiles fills the GPU only in part, and a short inner dimension leaves each tile
little time between its start and its end.
"""

from typing import NamedTuple

from scaling.estimate.caching import cached
from scaling.estimate.decoder import CHUNK_ELEMENTS
from scaling.estimate.flops import Block, Product, Stack
from scaling.estimate.rates import Rates
from scaling.estimate.work import DIRECTIONS, Direction, Part, sized
from scaling.inventory import head_dim
from scaling.spec.sections import Decoder

TAIL_ELEMENTS = 66 * 128 * 256
"""Output elements that a product loses to the unfilled last wave: half of 132 tiles of 128 x 256, the mean over shapes.
Data-centre GPUs have 108 to 148 multiprocessors, each with one such tile at a time (CUTLASS's usual shape). Fewer
results than that are cut along the inner dimension too, which is taken to fill half of the GPU."""
RAMP = 256
"""Inner dimension at which a tile spends as long starting and ending as multiplying. Engineering judgement: 64 to 128
elements are in flight before the first product, and the epilogue writes 128 x 256 results."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass over its forward pass: five products, two of them for the scores over again."""
BACKWARD_RATE = 0.63 / 0.73
"""Rate of attention's backward pass over its forward pass: FlashAttention-2 on an A100 (Dao, 2023, section 4.1)."""
ATTENTION_RAMP = 300
"""Sequence length at which causal attention reaches half of its rate, since blocks on the diagonal are half wasted.
From FlashAttention-2 on an H100, heads of 128: 191, 260, 298, 319, 333 TFLOP/s at 512 to 8k tokens, 370 without mask
(Shah et al., 2024, figure 5)."""


KERNEL_SECONDS = 2e-6
"""What each kernel loses on the device between the one before and itself, filling up included. Engineering judgement:
the shortest kernel of a stream takes about this long."""
HOST_KERNEL_SECONDS, HOST_BACKWARD_SECONDS = 8e-6, 5e-6
"""The host's time to issue a kernel from Python, and from autograd's own thread. Engineering judgement."""
SCORE_BYTES = 2 + 4 + 16
"""Of each logit, where nothing but the loss is wanted: to fp32, and log_softmax as in `_chunk_seconds`."""


class Pass(NamedTuple):
    """One direction through a part of the model."""

    seconds: float
    """On the device."""
    kernels: int


class Passes(NamedTuple):
    """Both."""

    forward: Pass
    backward: Pass


def product_seconds(rows: int, inner: int, columns: int, rates: Rates) -> float:
    """Of [rows, inner] x [inner, columns]."""
    results = rows * columns
    padded = 2 * (inner + RAMP) * (results + min(results, TAIL_ELEMENTS))
    moved = rates.width * (rows * inner + inner * columns + results)
    return max(padded / rates.matmul, moved / rates.hbm)


def attention_seconds(
    model: Decoder, tokens: int, sequence: int, rates: Rates, *, backward: bool, causal: bool = True
) -> float:
    """Of `tokens` that look at sequences of `sequence`; if causal half of the scores are masked, and their blocks are
    skipped.
    """
    flops = (2 if causal else 4) * model.num_attention_heads * head_dim(model) * sequence * tokens
    rate = rates.attention * sequence / (sequence + ATTENTION_RAMP)
    return ATTENTION_BACKWARD * flops / (rate * BACKWARD_RATE) if backward else flops / rate


@cached
def block_passes(
    model: Decoder,
    block: Block,
    tokens: int,
    sequence: int,
    checkpointing: str,
    compiled: bool,
    rates: Rates,
    causal: bool = True,
) -> Passes:
    """One block over `tokens` tokens. The backward pass includes what `checkpointing` computes a second time."""
    forward = sum(product_seconds(tokens, p.inputs, p.outputs, rates) for p in block.products)
    backward = sum(_product_backward(p, tokens, rates) for p in block.products)
    attention = attention_seconds(model, tokens, sequence, rates, backward=False, causal=causal)
    mixed = block.query or block.key or block.value
    if mixed:
        backward += attention_seconds(model, tokens, sequence, rates, backward=True, causal=causal)
    moved, moved_back, small = _pointwise(model, compiled=compiled)
    moved, moved_back, small = _with_adapters(block, moved, moved_back, small, compiled=compiled)
    pointwise = rates.width / 2 * moved * tokens / rates.hbm
    large = len(block.products) + 1
    ahead = Pass(forward + attention + pointwise, large + small)
    if not block.backward:
        return Passes(ahead, Pass(0.0, 0))
    backward += rates.width / 2 * moved_back * tokens / rates.hbm
    kernels = 2 * large + round(1.3 * small)  # a gradient each, sums of gradients, reductions for norms and biases
    if checkpointing == "full":
        again = ahead.seconds
        if (model.intermediate_size, model.hidden_size) not in block.adapters:
            # torch/utils/checkpoint.py stops when all that is kept is there: nothing keeps the last product.
            again -= product_seconds(tokens, model.intermediate_size, model.hidden_size, rates)
        return Passes(ahead, Pass(backward + again, kernels + ahead.kernels))
    if checkpointing == "selective":
        return Passes(ahead, Pass(backward + pointwise, kernels + small))
    return Passes(ahead, Pass(backward, kernels))


@cached
def stack_passes(stack: Stack, samples: int, checkpointing: str, compiled: bool, rates: Rates) -> Passes:
    """One block of a part of a vla over so many samples, its cross-attention with it."""
    tokens, context = samples * stack.tokens, samples * stack.context
    shape = stack.shape
    own = block_passes(shape, stack.block, tokens, stack.sequence, checkpointing, compiled, rates, stack.causal)
    if not context:
        return own
    forward = sum(product_seconds(context, p.inputs, p.outputs, rates) for p in stack.crossed)
    forward += attention_seconds(shape, tokens, stack.context, rates, backward=False, causal=False)
    backward = sum(_product_backward(p, context, rates) for p in stack.crossed)
    if stack.reads:
        backward += attention_seconds(shape, tokens, stack.context, rates, backward=True, causal=False)
    again = forward if checkpointing == "full" and stack.block.backward else 0.0
    kernels = len(stack.crossed) + 1
    ahead, back = own
    return Passes(
        Pass(ahead.seconds + forward, ahead.kernels + kernels),
        Pass(back.seconds + backward + again, back.kernels + 2 * kernels * stack.reads),
    )


@cached
def ends_passes(ends: tuple[tuple[Product, int], ...], samples: int, rates: Rates) -> Passes:
    """What a vla computes outside of its blocks: patches, projections, head; its loss is small."""
    forward = sum(product_seconds(samples * tokens, p.inputs, p.outputs, rates) for p, tokens in ends)
    backward = sum(_product_backward(p, samples * tokens, rates) for p, tokens in ends)
    return Passes(Pass(forward, 4 * len(ends)), Pass(backward, 4 * len(ends)))


@cached
def head_passes(
    model: Decoder, head: Product, tokens: int, chunked: bool, rates: Rates, by_token: bool = False
) -> Passes:
    """Output projection and cross-entropy. The chunked form takes its gradients in the forward pass; of each token it
    makes the logits twice, and its gradients in the backward pass."""
    vocabulary, width = model.vocab_size, rates.width
    logits = tokens * vocabulary
    if not chunked:
        # Logits to fp32, log-softmax reads and writes them, then gradients the same way back; in 16 bits two casts.
        forward = product_seconds(tokens, head.inputs, vocabulary, rates) + (width + 4 + 8) * logits / rates.hbm
        backward = _product_backward(head, tokens, rates) + (4 + 12 + 4 + width) * logits / rates.hbm
        return Passes(Pass(forward, 5), Pass(backward, 6))
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    whole, rest = divmod(tokens, rows)
    seconds = whole * _chunk_seconds(head, rows, rates) + (_chunk_seconds(head, rest, rates) if rest else 0.0)
    kernels = 16 * (whole + (rest > 0))
    if by_token:
        ahead = product_seconds(tokens, head.inputs, vocabulary, rates) + SCORE_BYTES * logits / rates.hbm
        return Passes(Pass(ahead, kernels), Pass(seconds, kernels))
    return Passes(Pass(seconds, kernels), Pass((8 + width) * head.inputs * vocabulary / rates.hbm, 6))


def _chunk_seconds(head: Product, rows: int, rates: Rates) -> float:
    """One chunk of the cross-entropy: `rows` tokens, forward and backward."""
    width = rates.width
    # To fp32; log_softmax reads for the maximum and for the sum, and a third time to write; then an exponent and a mask
    # in place; the gradient goes to the compute type.
    moved = (width + 4 + 16 + 16 + 4 + width) * rows * head.outputs
    if head.trains:  # the chunk's product is added to a sum in fp32
        moved += (width + 8) * head.inputs * head.outputs
    products = product_seconds(rows, head.inputs, head.outputs, rates) + _product_backward(head, rows, rates)
    return products + moved / rates.hbm


def _product_backward(product: Product, tokens: int, rates: Rates) -> float:
    seconds = 0.0
    if product.flows:
        seconds += product_seconds(tokens, product.outputs, product.inputs, rates)
    if product.trains:
        seconds += product_seconds(product.outputs, tokens, product.inputs, rates)
    return seconds


def _with_adapters(
    block: Block, forward: float, backward: float, kernels: int, *, compiled: bool
) -> tuple[float, float, int]:
    """The same as `_pointwise` gives, and what adapters add: a scaling, a sum, and a sum of gradients of the input."""
    for inputs, outputs in block.adapters:
        # Eager: read and write; read two, write one. Compiled: read two, write one. Backward the scaling and the sum.
        forward += (6 if compiled else 10) * outputs
        backward += 4 * outputs + 6 * inputs
        kernels += 1 if compiled else 2
    return forward, backward, kernels


@cached
def _pointwise(model: Decoder, *, compiled: bool) -> tuple[float, float, int]:
    """Bytes a token reads and writes in a block besides products and attention, forward and backward, in 16 bits; and
    the number of kernels forward.

    Each operation reads its inputs and writes its result, 2 bytes an element. torch.compile makes one kernel of those
    that follow each other.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = model.num_attention_heads + (model.num_key_value_heads or model.num_attention_heads)
    rotated = heads * head_dim(model) if model.position == "rope" else 0
    gated = model.activation == "swiglu"
    if compiled:
        # Norm with the sum before it; rotation and activation in one kernel each.
        forward = 2 * 8 * hidden + 4 * rotated + (6 if gated else 4) * inner
        backward = 2 * 14 * hidden + 4 * rotated + (10 if gated else 6) * inner
        return forward, backward, 6
    # Two norms (read, write), two residual sums; rotation is two products, a negation, a concatenation and a sum.
    forward = 2 * 4 * hidden + 2 * 6 * hidden + 20 * rotated + (10 if gated else 4) * inner
    # Norms read twice for their own weights; gradients of q, k, v (and of gate and up) are summed, as are residuals'.
    backward = 2 * 10 * hidden + (2 + 2 + gated) * 6 * hidden + 24 * rotated + (18 if gated else 6) * inner
    if model.bias:  # a bias' gradient is the sum over the tokens
        backward += 2 * (5 * hidden + inner)
    if model.qk_norm:
        forward, backward = forward + 4 * heads * head_dim(model), backward + 10 * heads * head_dim(model)
    kernels = 4 + (10 if rotated else 0) + (2 if gated else 1) + (2 if model.qk_norm else 0)
    return forward, backward, kernels


# ---------------------------------------------------------------- recorded models


def recorded_passes(part: Part, micro_batch: int, rates: Rates) -> Passes:
    """One of the alike blocks of a recorded model, or what is outside of them, over so many sequences."""
    forward, backward = (_recorded_pass(part[way], micro_batch, rates) for way in DIRECTIONS)
    return Passes(forward, backward)


def _recorded_pass(way: Direction, micro_batch: int, rates: Rates) -> Pass:
    seconds = sized(way["other"], micro_batch) / rates.matmul + sized(way["bytes"], micro_batch) / rates.hbm
    for *sizes, count in way["products"]:
        batch, rows, inner, columns = (sized(size, micro_batch) for size in sizes)
        # Products of a batch share the device, as one of so many rows would.
        seconds += count * product_seconds(batch * rows, inner, columns, rates)
    for sequence, causal, backward, flops in way["attention"]:
        rate = rates.attention * sequence / (sequence + ATTENTION_RAMP) * (BACKWARD_RATE if backward else 1)
        seconds += sized(flops, micro_batch) / (2 if causal else 1) / rate
    return Pass(seconds, way["kernels"])
