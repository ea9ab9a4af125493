"""What one GPU sustains in training: rates that kernels achieve, where a data sheet has peaks.

What `GPU.measured` has is taken as it is; the factors here are for figures of data sheets and tables alone.
"""

from dataclasses import dataclass
from typing import Literal

from scaling.errors import UserError
from scaling.estimate.caching import cached
from scaling.hardware import GPU, GPUS
from scaling.units import WIDTHS

SUSTAINED = 0.84
"""Of the fastest matmul measured (MAMF), what a large product keeps up within a training step, where the card is hot
and memory is busy with other things. Fitted on the rows that benchmarks/published.py lists, FITTED_ON."""
HBM_EFFICIENCY = 0.85
"""Of the memory's peak bandwidth, what a pointwise kernel reaches. Engineering judgement: copies reach 0.85 to 0.92."""
MATMUL_RATIO = 0.80
"""Matmul measured over peak, for cards without a sibling in the table: H100 0.80, B200 0.78, A100 0.87."""
WIDE_CORES_FLOPS = 700e12
"""Cards above this peak have matmul instructions (Hopper's wgmma and its successors) that FlashAttention-2 lacks."""
ATTENTION_RATIO = 0.73
"""Attention's forward pass over the peak where the kernel uses all of the tensor cores: FlashAttention-2 on an A100
(Dao, 2023)."""
WIDE_ATTENTION_RATIO = 370 / 989
"""The same above WIDE_CORES_FLOPS: FlashAttention-2 on an H100 (Shah et al., FlashAttention-3, 2024, figure 5)."""
OTHER_ATTENTION_RATIO = 0.4
"""The same for the kernels that serve in place of FlashAttention-2, which wants 16 bits and Ampere or newer.
Engineering judgement."""

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Rates:
    """Of one GPU at one precision. FLOP/s and bytes/s."""

    matmul: float
    """A large matrix product."""
    attention: float
    """Forward pass of the attention kernel, long sequences without a mask."""
    hbm: float
    """Memory, read and written together."""
    width: int
    """Bytes of an element in the compute type."""


@cached
def rates_of(gpu: GPU, precision: Precision) -> Rates:
    """What `gpu` sustains at `precision`: as it was measured, without any factor, else made from its peaks.

    Raises UserError where the table lacks what that needs.
    """
    return Rates(_matmul(gpu, precision), _attention(gpu, precision), _hbm(gpu), WIDTHS[precision])


def host_rate(gpu: GPU) -> float:
    """Bytes/s between `gpu` and its host in one direction; UserError where it is not known."""
    rate = gpu.measured.host_bytes_per_s or gpu.host_bytes_per_s
    return known(rate, gpu, "host_bytes_per_s", "to plan offloading")


def known(value: float | None, gpu: GPU, field: str, purpose: str) -> float:
    """`value`, or UserError where it is None."""
    if value is None:
        raise UserError(
            f"`{field}` of the {gpu.name} must be known {purpose}, but is null; "
            "give the card's own with `--hardware FILE.json`"
        )
    return value


def _peak(gpu: GPU, precision: Precision) -> float:
    peak = gpu.fp32_flops if precision == "fp32" else gpu.peak_flops(precision)
    return known(peak, gpu, f"{precision}_flops", f"to plan in {precision}")


def _matmul(gpu: GPU, precision: Precision) -> float:
    if measured := gpu.measured.matmul_flops(precision):
        return measured
    peak = _peak(gpu, precision)
    return SUSTAINED * (peak * MATMUL_RATIO if precision == "fp32" else gpu.matmul_flops or peak * _ratio(gpu))


def _hbm(gpu: GPU) -> float:
    return gpu.measured.hbm_bytes_per_s or HBM_EFFICIENCY * known(
        gpu.hbm_bytes_per_s, gpu, "hbm_bytes_per_s", "to plan"
    )


def _ratio(gpu: GPU) -> float:
    """Matmul measured over peak, of a card of the same family ("A100-40GB" is of the family A100)."""
    family = gpu.name.split("-")[0]
    for other in GPUS:
        if other.name.split("-")[0] == family and other.matmul_flops and other.bf16_flops:
            return other.matmul_flops / other.bf16_flops
    return MATMUL_RATIO


def _attention(gpu: GPU, precision: Precision) -> float:
    if measured := gpu.measured.attention_flops(precision):
        return measured
    peak = _peak(gpu, precision)
    if precision == "fp32" or gpu.bf16_flops is None:
        return OTHER_ATTENTION_RATIO * peak
    wide = WIDE_ATTENTION_RATIO if peak > WIDE_CORES_FLOPS else ATTENTION_RATIO
    return gpu.attention_flops or wide * peak
