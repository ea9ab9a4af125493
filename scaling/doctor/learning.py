"""Whether the model learns: loss, gradient, learning rate, validation."""

import math
import statistics
from typing import Any

from scaling.doctor.case import LEAST, Case, enough, longer_warm_up, scaled_lr, told
from scaling.doctor.robust import above_before, noise, off_trend, rounded, whole
from scaling.doctor.rule import CannotJudge, Symptom, percent, rule
from scaling.spec.sections import Decoder, FactoryData, SyntheticData
from scaling.summarize import is_number

WINDOW = 5
"""Records that one median is taken over: two odd ones do not move it."""
BEFORE = 10
"""Records before a loss that it is compared with: half of what LEAST asks for."""

# ---------------------------------------------------------------- loss

FLAT = 0.02
"""Share of the first loss that a run must bring it down by. A model that learns leaves its first loss, that of weights
that know nothing, by far more within tens of steps (the demo: 3.79 to 3.07 in ten); medians of small batches differ by
about 1 % by chance."""
FIRST = 3
"""Logged losses that are a run's first: the fewest that have a median, since it falls fastest there."""
MEDIAN_ERROR = 1.25
"""Standard error of the median of n normal values, times the root of n and over their deviation: the root of pi / 2."""
HIGH_LR = 1e-2
"""An update of AdamW moves a weight by about the learning rate, and weights begin at about 0.02 (`initializer_range`):
at this rate two steps undo what they were. A loss that stays flat at a higher one wants a lower one."""


@rule(
    "warning",
    "the loss does not fall",
    looks_at=f"the first {FIRST} losses and those of the last tenth of the run (medians); not of a run that starts "
    "from trained weights",
    threshold=f"must fall by at least {percent(FLAT)} of the first, once twice the warm-up is over",
    advice="Look at the data (are targets masked away, or the samples all noise?) and at what is frozen; then change "
    "the learning rate threefold, or shorten the warm-up.",
)
def loss_flat(case: Case) -> Symptom | None:
    losses = case.losses()
    spec, last = case.spec, losses[-1][0]
    if spec.initialize_from is not None:
        raise CannotJudge("it starts from trained weights, whose loss may be as low as it gets")
    if losses[0][0] > last / 10:
        raise CannotJudge("the start of the training is not in its records")
    if last < 2 * spec.schedule.warmup_steps:
        raise CannotJudge(f"step {last} is within twice the warm-up")
    values = [loss for _, loss in losses]
    tenth = max(WINDOW, len(values) // 10)
    first, end = statistics.median(values[:FIRST]), statistics.median(values[-tenth:])
    if first - end >= FLAT * abs(first):
        return None
    uncertain = noise(values) * MEDIAN_ERROR / math.sqrt(FIRST)
    if uncertain > FLAT * abs(first):
        raise CannotJudge(f"the first losses are known to {percent(uncertain / abs(first))} only, such is their noise")
    knows_nothing = (
        f"; knowing nothing is ln {spec.model.vocab_size} = {math.log(spec.model.vocab_size):.2f}"
        if isinstance(spec.model, Decoder)
        else ""
    )
    return Symptom(
        f"the loss was {first:.4g} at the start and is {end:.4g} at step {last:,}{knows_nothing}.",
        set=scaled_lr(spec, 1 / 3 if spec.optimizer.lr >= HIGH_LR else 3.0),
    )


SWING = 0.15
"""Standard deviation of the loss around its trend, as a share of its level. The batches of the smallest recipe here
(32 samples) make about a third of that."""
SWING_OF_FIRST = 0.05
"""The same as a share of the first loss: near zero every loss swings by much of its own level."""


@rule(
    "warning",
    "the loss oscillates",
    looks_at="the loss of the second half of the run, around a straight line through it (Theil-Sen; median deviation)",
    threshold=f"swings by up to {percent(SWING)} of its level, or by {percent(SWING_OF_FIRST)} of the first loss",
    advice="Halve the learning rate, or train with a larger global batch, whose losses and gradients are less noisy.",
)
def loss_oscillating(case: Case) -> Symptom | None:
    losses = case.losses(after=case.warmup_steps)
    half = losses[len(losses) // 2 :]
    values = [loss for _, loss in half]
    level, swing, first = statistics.median(values), off_trend(values), abs(case.run.losses[0][1])
    if swing <= SWING * abs(level) or swing <= SWING_OF_FIRST * first:
        return None
    return Symptom(
        f"from step {half[0][0]:,} on the loss swings by about {swing:.2g} around its trend, at a level of "
        f"{level:.4g}.",
        set=scaled_lr(case.spec),
    )


RISE = 0.2
"""Share of the loss by which it must rise to be called a rise: a fifth of all that is left to learn. A judgement; small
batches differ by less, and what lesser rises cost is small."""
SIGMAS = 6
"""Standard deviations of the noise that a rise must exceed besides: by chance, one in 10^9 normal values."""
RISE_OF_FIRST = 0.02
"""Share of the first loss that a rise must exceed besides: a loss near zero doubles for nothing."""


def _beyond_start(case: Case) -> list[tuple[int, float]]:
    """The losses that are no longer `warm_up_too_short`'s matter."""
    return case.losses(after=_start(case))


def _least_rise(case: Case, losses: list[tuple[int, float]]) -> float:
    """What a rise must exceed whatever the loss is."""
    return max(SIGMAS * noise([loss for _, loss in losses]), RISE_OF_FIRST * abs(case.run.losses[0][1]))


@rule(
    "warning",
    "the loss jumped and came back",
    looks_at=f"each loss beside the median of the {BEFORE} records before it, beyond the start",
    threshold=f"rises by up to {percent(RISE)}, or by {SIGMAS} standard deviations of its noise",
    advice="Look at the samples of that step; if it happens again, lower the learning rate, or clip at a lower norm.",
)
def loss_spike(case: Case) -> Symptom | None:
    losses = _beyond_start(case)
    values, least = [loss for _, loss in losses], _least_rise(case, losses)
    spikes: list[tuple[int, float, float]] = []
    for i, value, before in above_before(values, BEFORE):
        after = values[i + 1 : i + 1 + BEFORE]
        rises = value - before > max(RISE * abs(before), least)
        if rises and len(after) >= WINDOW and statistics.median(after) - before < (value - before) / 2:
            spikes.append((losses[i][0], value, before))
    if not spikes:
        return None
    step, value, before = max(spikes, key=lambda spike: spike[1] - spike[2])
    changes: dict[str, Any] = {"max_grad_norm": 1.0} if case.spec.max_grad_norm is None else {}
    if len(spikes) > 2:
        changes |= scaled_lr(case.spec)
    more = f"; {len(spikes)} such jumps, at {told([step for step, _, _ in spikes])}" if len(spikes) > 1 else ""
    return Symptom(f"the loss was {value:.4g} at step {step:,}, and {before:.4g} before it{more}.", set=changes)


@rule(
    "error",
    "the loss rose and has not come back",
    looks_at=f"the last {WINDOW} losses beside the lowest {WINDOW} in a row (medians)",
    threshold=f"ends at most {percent(RISE)} above its lowest, or {SIGMAS} standard deviations of its noise",
    advice="Go back to a checkpoint before the rise (`--resume RUN_DIR/checkpoints/step-…` into a new folder) with "
    "half the learning rate.",
)
def loss_diverged(case: Case) -> Symptom | None:
    losses = case.losses()
    values, least = [loss for _, loss in losses], _least_rise(case, losses)
    begin = len(values) % WINDOW
    medians = [statistics.median(values[i : i + WINDOW]) for i in range(begin, len(values), WINDOW)]
    lowest, last = min(medians), medians[-1]
    if last - lowest <= max(RISE * abs(lowest), least):
        return None
    at_step = losses[begin + WINDOW * medians.index(lowest) + WINDOW - 1][0]
    saved = [event["step"] for event in case.run.events if event.get("event") == "checkpoint" and event.get("step")]
    before = max((step for step in saved if step <= at_step), default=None)
    return Symptom(
        f"the loss was {lowest:.4g} up to step {at_step:,} and is {last:.4g} at step {losses[-1][0]:,}.",
        ""
        if before is None
        else f"Go back to the checkpoint before the rise (`--resume {case.run.folder}/checkpoints/step-{before:08d}` "
        "into a new folder) with half the learning rate.",
        scaled_lr(case.spec),
    )


@rule(
    "error",
    "the loss or the gradient was not finite",
    looks_at="steps that were refused, or whose loss is NaN or infinite; exit code 4 (not steps that find fp16's "
    "scale)",
    threshold="not one",
    advice="Halve the learning rate or lengthen the warm-up; where it is always the same rank or the same samples, "
    "look at that machine or at those data.",
)
def not_finite(case: Case) -> Symptom | None:
    if not case.run.lines:
        raise CannotJudge("no step is logged")
    bad = [line for line in case.run.lines if not is_number(line.get("loss")) or _refused(line)]
    bad = [line for line in bad if not _finds_scale(case, line)]
    code = case.run.exit.get("code")
    if not bad and code != 4:
        return None
    steps = [line["step"] for line in bad] or [case.run.exit.get("step") or case.last_step]
    ranks = sorted({rank for line in bad for rank in line.get("bad_ranks") or []})
    blamed = f", by the loss of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:4]))}" if ranks else ""
    alone = len(steps) == 1 and case.spec.on_nonfinite == "stop" and steps[0] > _start(case)
    return Symptom(
        f"{len(steps)} step{'s were' if len(steps) > 1 else ' was'} not finite: {told(steps)}{blamed}.",
        "It happened once, late in the run: skip such steps, and look at the samples of that one." if alone else "",
        {"on_nonfinite": "skip"} if alone else scaled_lr(case.spec),
    )


def _refused(line: dict[str, Any]) -> bool:
    return bool(line.get("skipped"))


def _finds_scale(case: Case, line: dict[str, Any]) -> bool:
    """Refused with a finite loss, in fp16: the loss scale goes down, which is none of the model's fault."""
    return case.run.spec.get("precision") == "fp16" and _refused(line) and is_number(line.get("loss"))


OVERFLOWS = 0.01
"""Share of steps. The scale doubles every 2,000 finite steps (scaling/engine/scaler.py), and each doubling may cost one
step: 0.05 %."""
FINDING = 20
"""Steps that are refused while the scale is found: from 2^16 down to 1 they are 16."""


@rule(
    "warning",
    "fp16 overflows again and again",
    looks_at="steps refused with a finite loss, in fp16",
    threshold=f"at most {FINDING}, then {percent(OVERFLOWS)} of the steps",
    advice="Train in bf16, which has the range of fp32 and needs no loss scale, where the card has it; else lower the "
    "learning rate.",
)
def fp16_overflow(case: Case) -> Symptom | None:
    if case.spec.precision != "fp16":
        return None
    found = [line["step"] for line in case.run.lines if _finds_scale(case, line)]
    if len(found) <= FINDING + OVERFLOWS * case.last_step:
        return None
    try:
        has_bf16 = case.card.bf16_flops is not None
    except CannotJudge:
        has_bf16 = False
    return Symptom(
        f"{len(found)} of {case.last_step:,} steps were refused since fp16 overflowed.",
        set={"precision": "bf16"} if has_bf16 else scaled_lr(case.spec),
    )


# ---------------------------------------------------------------- the start

FIRST_STEPS = 100
"""Steps that are a run's start at least, as in SHORTEST_WARM_UP."""
JUMP = 10.0
"""Times the median of the gradient norms before. At the start norms fall, and differ by a factor of two or three from
step to step."""


def _start(case: Case) -> int:
    """The last step of a run's start: the warm-up, and as long again, in which the peak rate shows what it does."""
    return max(2 * case.warmup_steps, FIRST_STEPS)


@rule(
    "warning",
    "the learning rate is too high, or the warm-up too short",
    looks_at=f"loss and gradient norm up to twice the warm-up (at least {FIRST_STEPS} steps), each beside the median "
    "of the records before",
    threshold=f"the loss rises by up to {percent(RISE)}, the gradient norm to {JUMP:g} times",
    advice="Lengthen the warm-up, up to fourfold and a quarter of the run; if the jump stays, halve the learning rate.",
)
def warm_up_too_short(case: Case) -> Symptom | None:
    edge = _start(case)
    start = [step for step in case.run.steps if step["step"] <= edge]
    losses = [(step["step"], step["loss"]) for step in start if is_number(step.get("loss"))]
    norms = [(step["step"], step["grad_norm"]) for step in start if is_number(step.get("grad_norm"))]
    enough(losses, WINDOW + 1, f"finite losses up to step {edge}")
    least = _least_rise(case, losses)
    lr = f"with a warm-up of {case.warmup_steps:,} steps to a rate of {case.spec.optimizer.lr:g}"
    for i, value, before in above_before([loss for _, loss in losses], 3):
        if value - before > max(RISE * abs(before), least):
            return Symptom(
                f"{lr}, the loss went from {before:.4g} to {value:.4g} at step {losses[i][0]:,}.",
                set=longer_warm_up(case),
            )
    for i, value, before in above_before([norm for _, norm in norms], WINDOW):
        if value > JUMP * before and value > (case.spec.max_grad_norm or 1.0):
            return Symptom(
                f"{lr}, the gradient norm went from {before:.3g} to {value:.3g} at step {norms[i][0]:,}.",
                set=longer_warm_up(case),
            )
    return None


# ---------------------------------------------------------------- gradient and learning rate

CLIPPED = 0.9
"""Share of steps. Clipping is for the odd large gradient (Pascanu et al., 2013); where it always acts, every gradient
has the same length whatever it says."""
SHORTENED = 2.0
"""Times `max_grad_norm` that the median must exceed besides: AdamW's updates do not change where all gradients are made
shorter by the same factor, so a little of it does no harm."""


@rule(
    "warning",
    "the gradient is clipped on nearly every step",
    looks_at="gradient norms after the warm-up, beside `max_grad_norm`",
    threshold=f"above it in at most {percent(CLIPPED)} of the steps, or at most {SHORTENED:g} times it at the median",
    advice="Set `max_grad_norm` to what nine in ten steps stay under, or lower the learning rate if the loss is "
    "unsteady.",
)
def clipping(case: Case) -> Symptom | None:
    limit = case.spec.max_grad_norm
    if limit is None:
        return None
    norms = _norms(case, after=case.warmup_steps)
    share, middle = sum(norm > limit for norm in norms) / len(norms), statistics.median(norms)
    if share <= CLIPPED or middle <= SHORTENED * limit:
        return None
    ninth = statistics.quantiles(norms, n=10)[-1]
    return Symptom(
        f"{percent(share)} of the steps after the warm-up had a gradient norm above {limit:g}, {middle:.3g} at the "
        "median.",
        set={"max_grad_norm": rounded(ninth, 2)},
    )


VANISHED = 1e-6
"""Gradient norm over all parameters. Norms of healthy runs, of any size, are between 0.01 and 10; AdamW's eps (1e-8) is
what single elements of such a gradient are lost in."""


@rule(
    "error",
    "the gradient has vanished",
    looks_at="the gradient norm of the second half of the run, its median",
    threshold=f"at least {VANISHED:g}",
    advice="Look for targets that are all masked, a part that is frozen or cut off from the loss, or weights that have "
    "become so large that the model saturates; a lower learning rate helps the last.",
)
def vanishing_gradient(case: Case) -> Symptom | None:
    norms = _norms(case)
    middle = statistics.median(norms[len(norms) // 2 :])
    if middle >= VANISHED:
        return None
    return Symptom(
        f"the gradient norm was {norms[0]:.3g} at the start and is {middle:.3g} at the median since half-way."
    )


def _norms(case: Case, after: int = 0) -> list[float]:
    found = [step.get("grad_norm") for step in case.run.steps if step["step"] > after]
    return enough([norm for norm in found if is_number(norm)], LEAST, "gradient norms")


ZERO = 1e-12
"""A learning rate that moves no weight: times the largest update of AdamW (about 1) less than the last bit of any."""


@rule(
    "error",
    "a group's learning rate is zero throughout",
    looks_at="the learning rate of each group at each logged step",
    threshold=f"above {ZERO:g} somewhere",
    advice="Give the group a learning rate; to keep it as it is, freeze it, which saves its gradient and its optimizer "
    "state.",
)
def zero_learning_rate(case: Case) -> Symptom | None:
    rates = [step["lr"] for step in case.run.steps if isinstance(step.get("lr"), dict)]
    enough(rates, WINDOW, "records of learning rates")
    zero = [name for name in rates[-1] if all(abs(rate.get(name) or 0.0) < ZERO for rate in rates)]
    if not zero:
        return None
    index = {group.name: i for i, group in enumerate(case.spec.param_groups)}
    names = sorted({name.partition("/")[0] for name in zero} & index.keys())
    rate = case.spec.optimizer.lr
    return Symptom(
        f"the learning rate of {', '.join(repr(name) for name in zero)} was 0 in all {len(rates)} records.",
        set={f"param_groups.{index[name]}.lr": rate for name in names} if rate >= ZERO else {},
    )


# ---------------------------------------------------------------- validation

OVERFIT = 0.02
"""Share by which the validation loss must have risen above its lowest. The validation set is fixed, so what it varies
by is what the weights do from step to step: a few per mille near the end of a run."""
FEWEST_VALIDATIONS = 4
"""As many validations it takes to see one fall, and two that stay above the lowest."""


@rule(
    "warning",
    "the validation loss rises while the training loss falls",
    looks_at=f"the validations after the lowest one (at least two, of {FEWEST_VALIDATIONS}), and the training loss "
    "over the same steps",
    threshold=f"at most {percent(OVERFIT)} above the lowest",
    advice="Take checkpoints/best and stop earlier, or train on more data; else more dropout, more weight decay or "
    "fewer trained parameters.",
)
def overfitting(case: Case) -> Symptom | None:
    by_step = {entry["step"]: entry["loss"] for entry in case.run.validations if is_number(entry.get("loss"))}
    entries = enough(sorted(by_step.items()), FEWEST_VALIDATIONS, "validations")
    best, lowest = min(entries, key=lambda entry: entry[1])
    later = [loss for step, loss in entries if step > best]
    limit = lowest + OVERFIT * abs(lowest)
    if len(later) < 2 or min(later[-2:]) <= limit:
        return None
    losses = case.losses()
    before = [loss for step, loss in losses if step <= best][-WINDOW:]
    then, now = statistics.median(before or [losses[0][1]]), statistics.median([loss for _, loss in losses[-WINDOW:]])
    if now >= then:
        return None
    dropout = {"model.dropout": 0.1} if isinstance(case.spec.model, Decoder) and not case.spec.model.dropout else {}
    return Symptom(
        f"the validation loss was {lowest:.4g} after step {best:,} and is {later[-1]:.4g} after step "
        f"{entries[-1][0]:,}, while the training loss went from {then:.4g} to {now:.4g}.",
        set=dropout,
    )


SHORT = 1000
"""Steps of a run that may do without validation: a try-out."""
VALIDATIONS = 5
"""Validations of a run at least: fewer show no curve."""


@rule(
    "advice",
    "validation is never measured, or too rarely",
    looks_at=f"`validation` of the spec and the steps that the run is to take, from {SHORT:,} on",
    threshold=f"at least {VALIDATIONS} validations in a run",
    advice="Measure the validation loss: without it nothing tells learning from learning by heart, and no best "
    "checkpoint is kept.",
)
def validation_rare(case: Case) -> Symptom | None:
    spec, length = case.spec, case.length
    if isinstance(spec.data, SyntheticData | FactoryData):
        raise CannotJudge("its data are synthetic, or of a program's own")
    if length < SHORT or (spec.validation is not None and spec.validation.interval * VALIDATIONS <= length):
        return None
    changes: dict[str, Any] = {"validation.interval": whole(length / 20)}
    if spec.validation is None:
        changes |= {"validation.batches": 8}
        changes |= {} if spec.data.validation else {"data.validation": 0.05}
        return Symptom(f"the run is to take {length:,} steps and `validation` is null.", set=changes)
    return Symptom(
        f"the run is to take {length:,} steps and validates every {spec.validation.interval:,}.", set=changes
    )


# ---------------------------------------------------------------- all of them

RULES = (
    loss_diverged,
    not_finite,
    vanishing_gradient,
    zero_learning_rate,
    loss_flat,
    loss_oscillating,
    loss_spike,
    warm_up_too_short,
    clipping,
    overfitting,
    fp16_overflow,
    validation_rare,
)
