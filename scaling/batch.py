"""The batch triangle: global batch = micro batch x world size x accumulation, exact or refused.

Nothing is ever rounded: a global batch that silently became smaller is another experiment. A refusal shows the sum with
its numbers and the values nearest to those asked for that would work.
"""

import math
from collections.abc import Callable, Iterable

from scaling.errors import UserError
from scaling.inventory import sample_length
from scaling.records import BatchPlan
from scaling.spec.sections import FSDP, Batch, DeepSpeed, Single, Spec

_REACH = 1024
"""How far above and below the world size a refusal looks for others that work; a longer search would be felt."""


def resolve_batch(spec: Spec, world_size: int) -> BatchPlan:
    """The batch of `spec` on `world_size` data-parallel ranks, with the one size that is "auto" or absent filled in.

    Raises UserError where the sizes do not multiply exactly, naming the nearest that do, where the backend cannot run
    on `world_size` ranks (see `check_world_size`), and where two sizes are open (see `is_open`).
    """
    check_world_size(spec, world_size)
    plan = _solve(spec, world_size)
    if plan is None:
        raise UserError(_refusal(spec, world_size))
    if is_open(spec.batch):
        raise UserError(
            "`batch.micro_batch_size` must be a number here, but it and gradient_accumulation_steps are "
            '"auto", which only training fills in, by trying; set `batch.micro_batch_size`, or take the numbers of '
            "`python -m scaling.plan`"
        )
    return plan


def is_open(batch: Batch) -> bool:
    """Whether micro-batch and accumulation are both to be found by what fits in memory."""
    return _steps(batch) == (None, None)


def check_world_size(spec: Spec, world_size: int) -> None:
    """Raise UserError where the backend of `spec` cannot run on `world_size` ranks, whatever the batch."""
    if world_size < 1:
        raise UserError(f"the world size must be at least 1, but is {world_size}; start one process or more")
    backend = spec.backend
    if isinstance(backend, Single) and world_size != 1:
        raise UserError(
            f'`backend.kind` must be "ddp", "fsdp" or "deepspeed" for a world size of {world_size}, but is "single"; '
            "change it, or start one process"
        )
    for name, value in _rank_groups(spec):
        if world_size % value:
            divisors = " or ".join(str(divisor) for divisor in _around(value, _divisors(world_size)))
            multiples = " or ".join(str(size) for size in _nearest_multiples(world_size, value))
            raise UserError(
                f"`backend.{name}` must divide the world size ({world_size}), but is {value}; "
                f"use {divisors}, or start {multiples} processes"
            )


def legal_world_sizes(spec: Spec, up_to: int) -> tuple[int, ...]:
    """World sizes from 1 to `up_to` on which `spec` runs exactly as it is written, in rising order."""
    return tuple(size for size in range(1, up_to + 1) if _is_legal(spec, size))


def _is_legal(spec: Spec, world_size: int) -> bool:
    return _backend_takes(spec, world_size) and _solve(spec, world_size) is not None


def _backend_takes(spec: Spec, world_size: int) -> bool:
    if isinstance(spec.backend, Single):
        return world_size == 1
    return not any(world_size % value for _, value in _rank_groups(spec))


def _rank_groups(spec: Spec) -> list[tuple[str, int]]:
    """Fields of the backend, with their values, that must divide the world size."""
    backend = spec.backend
    if isinstance(backend, FSDP):
        return [("replicate", backend.replicate)]
    if isinstance(backend, DeepSpeed) and backend.zero_hpz_partition_size is not None:
        return [("zero_hpz_partition_size", backend.zero_hpz_partition_size)]
    return []


def _solve(spec: Spec, world_size: int) -> BatchPlan | None:
    """The plan where the sizes multiply exactly, None where they do not."""
    length = sample_length(spec)
    whole, micro, accumulation = _known(spec.batch.global_batch_size), *_steps(spec.batch)
    if spec.batch.global_batch_tokens is not None:
        whole = _exact(spec.batch.global_batch_tokens, length)
        if whole is None:
            return None
    if whole is None:
        assert micro is not None and accumulation is not None, "the spec gives two sizes where it leaves this one open"
        whole = micro * world_size * accumulation
    elif accumulation is None:
        micro = 1 if micro is None else micro  # open both: the smallest, which works if any does
        accumulation = _exact(whole, micro * world_size)
    elif micro is None:
        micro = _exact(whole, world_size * accumulation)
    if micro is None or accumulation is None or whole != micro * world_size * accumulation:
        return None
    return BatchPlan(whole, micro, accumulation, world_size, length)


def _steps(batch: Batch) -> tuple[int | None, int | None]:
    """Micro batch and accumulation, None where "auto"."""
    return _known(batch.micro_batch_size), _known(batch.gradient_accumulation_steps)


def _known(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None


def _exact(value: int, divisor: int) -> int | None:
    """value / divisor where that is a whole number, else None."""
    quotient, remainder = divmod(value, divisor)
    return quotient if not remainder else None


# ---------------------------------------------------------------- what a refusal says


def _refusal(spec: Spec, world_size: int) -> str:
    """The message for sizes that do not multiply exactly: field, rule with its numbers, value, and what would work."""
    in_tokens = spec.batch.global_batch_tokens is not None
    length = sample_length(spec)
    asked = spec.batch.global_batch_tokens if in_tokens else _known(spec.batch.global_batch_size)
    assert asked is not None, "an open global batch always works"
    micro, accumulation = _steps(spec.batch)
    factors = [("micro_batch_size", micro), ("world size", world_size), ("gradient_accumulation_steps", accumulation)]
    if in_tokens:
        factors.append(("data.sequence_length", length))
    known = [(name, value) for name, value in factors if value is not None]
    unit = math.prod(value for _, value in known)

    def say(plan: BatchPlan) -> str:
        return f"{plan.global_tokens} tokens ({plan.sentence})" if in_tokens else plan.sentence

    names, numbers = " x ".join(name for name, _ in known), " x ".join(str(value) for _, value in known)
    product = f"{names} = {numbers} = {unit}" if len(known) > 1 else f"{names} = {unit}"
    field = "batch.global_batch_tokens" if in_tokens else "batch.global_batch_size"
    multiple = "" if len(known) == len(factors) else "a multiple of "
    others = _changed(asked if not in_tokens else asked / length, micro, accumulation, world_size, length)
    advice = [f"the nearest that work: {'; '.join(say(plan) for plan in others)}"]
    kept = _exact(asked, length) if in_tokens else asked
    if kept is None:
        advice.append(f"{asked} is no multiple of data.sequence_length ({length}), so no batch gives it")
    else:
        plans = _kept(spec, kept, world_size)
        if plans:
            advice.append(f"or keep {asked} with {' or '.join(_factors(plan) for plan in plans)}")
        sizes = _legal_near(world_size, lambda size: _is_legal(spec, size))
        if sizes:
            advice.append(f"or keep every size and start {' or '.join(str(size) for size in sizes)} processes")
    return f"`{field}` must be {multiple}{product}, but is {asked}; {'; '.join(advice)}"


def _factors(plan: BatchPlan) -> str:
    return plan.sentence.partition(" = ")[2]


def _changed(
    asked: float, micro: int | None, accumulation: int | None, world_size: int, length: int
) -> list[BatchPlan]:
    """Plans on these ranks nearest to `asked` sequences, but not equal: the micro batch kept where it is set, else the
    accumulation. Memory depends on the micro batch and on nothing else here, so it is the last thing to touch.
    """
    unit = world_size * (micro or accumulation or 1)
    plans: list[BatchPlan] = []
    for whole in _nearest_multiples(asked, unit):
        other = _exact(whole, unit)
        assert other is not None, (whole, unit)
        pair = (micro, other) if micro is not None else (other, accumulation or 1)
        plans.append(BatchPlan(whole, *pair, world_size, length))
    if micro is not None and accumulation is not None:  # with both set, their own product is worth a mention too
        own = BatchPlan(micro * world_size * accumulation, micro, accumulation, world_size, length)
        plans += [own] if own not in plans else []
    return [plan for plan in plans if plan.global_batch != asked]


def _kept(spec: Spec, whole: int, world_size: int) -> list[BatchPlan]:
    """Plans with `whole` sequences: on these ranks if it divides among them, else on the nearest numbers that do."""

    def divides(size: int) -> bool:
        return whole % size == 0 and _backend_takes(spec, size)

    length = sample_length(spec)
    sizes = [world_size] if divides(world_size) else _legal_near(world_size, divides)
    micro, accumulation = _steps(spec.batch)
    plans: list[BatchPlan] = []
    for size in sizes:
        per_rank = _exact(whole, size)
        assert per_rank is not None, (whole, size)
        wanted = micro or accumulation or 1
        found = _around(wanted, _divisors(per_rank))
        if size != world_size:  # one suggestion each is enough: the smaller micro batch, which needs the least memory
            found = found[:1] if micro is not None else found[-1:]
        for value in found:
            other = _exact(per_rank, value)
            assert other is not None, (per_rank, value)
            pair = (value, other) if micro is not None else (other, value)
            plans.append(BatchPlan(whole, *pair, size, length))
    return plans


def _legal_near(world_size: int, legal: Callable[[int], bool]) -> list[int]:
    """The nearest legal world size below `world_size` and the nearest above, as far as there are any in reach."""
    below = next((size for size in range(world_size - 1, max(0, world_size - _REACH - 1), -1) if legal(size)), None)
    above = next((size for size in range(world_size + 1, world_size + _REACH + 1) if legal(size)), None)
    return [size for size in (below, above) if size is not None]


def _around(value: int, candidates: Iterable[int]) -> list[int]:
    """The largest candidate up to `value` and the smallest above it, as far as there are such."""
    candidates = tuple(candidates)
    below = max((one for one in candidates if one <= value), default=None)
    above = min((one for one in candidates if one > value), default=None)
    return [one for one in (below, above) if one is not None]


def _nearest_multiples(value: float, step: int) -> list[int]:
    """The positive multiples of `step` on either side of `value` (or `value` itself), the nearer first."""
    low = math.floor(value) - math.floor(value) % step
    found = [low] if low == value else [low, low + step]
    return sorted((one for one in found if one > 0), key=lambda one: abs(one - value))


def _divisors(value: int) -> list[int]:
    """All divisors of `value`, in no order; a moment at most, for batches of the spec's own bound of 2^40."""
    small = [one for one in range(1, math.isqrt(value) + 1) if value % one == 0]
    return [*small, *(large for one in small if (large := _exact(value, one)) is not None and large != one)]
