"""The doctor: every rule on a run that has its illness, and on one that is only near it; silence on healthy runs."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from made_runs import START, GiB, event, make_run, step, validation
from processes import python, started

from scaling.batch import resolve_batch
from scaling.doctor import RULES, at_end, diagnose, examine
from scaling.doctor.case import Case
from scaling.doctor.show import rules_page
from scaling.estimate.search import flags
from scaling.spec import load_spec
from scaling.summarize import read_run
from scaling.view import print_lines

ROOT = Path(__file__).parent.parent
STEPS = range(10, 401, 10)
SPEC = {"schedule": {"warmup_steps": 50}, "max_steps": 400}
"""A run that has come to its end, so that most rules have enough to go by."""


def made(folder, lines=None, *, spec=None, **files):
    return read_run(make_run(folder, lines, spec={**SPEC, **(spec or {})}, **files))


def lines(change=None, steps=STEPS, **changes):
    """Records of a healthy run; `change(step)` gives what is other in each."""
    return [step(number, **{**changes, **(change(number) if change else {})}) for number in steps]


def healthy_loss(number):
    return 2.0 + 8.0 * math.exp(-number / 120)


def noisy(number, by):
    """Noise of a fixed course: -by, 0 or by."""
    return by * ((number // 10 * 7919) % 3 - 1)


def memory(**changes):
    return {"memory": {name: size if name in COUNTS else round(size * GiB) for name, size in changes.items()}}


COUNTS = ("allocation_retries", "fragmentation")


def ranks(slow_s, fast_s, slowest=3, **of):
    ends = {
        "slowest": {"rank": slowest, "host": "node1", "device": 5, "seconds": slow_s},
        "fastest": {"rank": 0, "host": "node0", "device": 0, "seconds": fast_s},
    }
    return {"ranks": {"count": 8, "of": of, **ends}}


def spanning(low, mean, high, lowest=0, highest=3):
    return {"min": low, "mean": mean, "max": high, "lowest": lowest, "highest": highest}


def restarted(times, code):
    """Events of a run that began anew so often after ending with `code`."""
    found = [event("start", 0, 0, world_size=8, hosts=["node0"])]
    for i in range(times):
        found += [event("end", 50 * i + 40, 10, code=code), event("start", 50 * i + 50, 10, world_size=8)]
    return found


def saves(every, seconds, last=400, step_seconds=1.0):
    saved = range(every, last + 1, every)
    start = event("start", 0, 0, world_size=8, hosts=["node0"])
    return [start, *(event("checkpoint", 30 + n * step_seconds, n, seconds=seconds, bytes=GiB) for n in saved)]


SPARE = memory(device_used_bytes=9, reserved_peak_bytes=8, allocated_peak_bytes=7, active_peak_bytes=7.2)
"""Memory of a run that leaves most of its card free."""
LEAN = {"memory": {"peak_allocated_bytes": 7 * GiB}}
"""And the plan that said so."""
CUT = {"batch": {"global_batch_tokens": 524_288, "micro_batch_size": 1}}
CUT_PLAN = {**LEAN, "micro_batch_size": 1, "gradient_accumulation_steps": 64}
OFFLOADED = {"backend": {"kind": "fsdp", "cpu_offload": True, "reshard_after_forward": True, "replicate": 1}}
SAVES_OFTEN = {"checkpoint": {"interval": 10}}
OOM = {
    "schema_version": 1, "place": "step", "step": 40, "rank": 2, "device": "cuda:2", "asked_bytes": 3 * GiB,
    "message": "", "held": {"allocated_bytes": 70 * GiB, "reserved_bytes": 76 * GiB, "host_rss_bytes": GiB,
                            "limit_bytes": None, "parts": {}},
    "predicted": {}, "off_by": "activations were 5 GiB more than predicted",
    "suggestions": [{"set": {"batch.micro_batch_size": 8}, "command": "--set batch.micro_batch_size=8",
                     "predicted_bytes": 40 * GiB, "slower": 0.04, "sentence": "8 micro: 40 GiB predicted, 4 % slower"}],
}  # fmt: skip
LOWER = {"optimizer.lr": 3e-4}


def with_oom(folder, end):
    make_run(folder, lines(steps=range(10, 41, 10)), spec=SPEC, end=end)
    (folder / "oom.json").write_text(json.dumps(OOM))
    return read_run(folder)


SICK = {
    # rule: (what makes the run, what it is told to set, what other rules speak too)
    "loss-flat": (
        lambda at: made(at, lines(lambda n: {"loss": 10.8 + noisy(n, 0.02)}), validations=[]),
        {"optimizer.lr": 1.8e-3}, set(),
    ),
    "loss-oscillating": (
        lambda at: made(at, lines(lambda n: {"loss": healthy_loss(n) + (0.9 if n % 20 else -0.9)})),
        LOWER, set(),
    ),
    "loss-spike": (
        lambda at: made(at, lines(lambda n: {"loss": healthy_loss(n) + 2 * (n == 250)})), {}, set(),
    ),
    "loss-diverged": (
        lambda at: made(at, lines(lambda n: {"loss": healthy_loss(min(n, 250)) + max(0, n - 250) / 40})), LOWER, set(),
    ),
    "not-finite": (
        lambda at: made(
            at, lines(lambda n: {"loss": None, "skipped": True, "bad_ranks": [5]} if n in (60, 70) else {}),
        ),
        LOWER, set(),
    ),
    "fp16-overflow": (
        lambda at: made(at, [*lines(), *(step(n, skipped=True) for n in range(1, 60, 2))], spec={"precision": "fp16"}),
        {"precision": "bf16"}, set(),
    ),
    "warm-up-too-short": (
        lambda at: made(at, lines(lambda n: {"loss": healthy_loss(n) + (3 if n == 60 else 0)})),
        {"schedule.warmup_steps": 100}, set(),
    ),
    "clipping": (lambda at: made(at, lines(grad_norm=4.2)), {"max_grad_norm": 4.2}, set()),
    "vanishing-gradient": (lambda at: made(at, lines(grad_norm=1e-9)), {}, set()),
    "zero-learning-rate": (lambda at: made(at, lines(lr={"all": 0.0})), {"param_groups.0.lr": 6e-4}, set()),
    "overfitting": (
        lambda at: made(at, validations=[validation(100 * n, loss) for n, loss in enumerate((5, 3, 3.2, 3.4), 1)]),
        {"model.dropout": 0.1}, set(),
    ),
    "validation-rare": (
        lambda at: made(at, spec={"max_steps": 40_000, "validation": None}),
        {"validation.interval": 2000, "validation.batches": 8}, set(),
    ),
    "data-wait": (lambda at: made(at, lines(time={"data": 0.2, "forward": 0.1})), {}, set()),
    "micro-batch-small": (
        lambda at: made(at, lines(mfu=0.1, **SPARE), spec=CUT, plan=CUT_PLAN), {"batch.micro_batch_size": 32},
        set(),
    ),
    "accumulation-large": (
        lambda at: made(at, lines(**SPARE), spec=CUT, plan=CUT_PLAN), {"batch.micro_batch_size": 32}, set(),
    ),
    "faster-spec": (
        lambda at: made(at, lines(**SPARE), spec={"activation_checkpointing": "full"}, plan=LEAN),
        {"backend.reshard_after_forward": False, "activation_checkpointing": "none", "batch.micro_batch_size": 64},
        set(),
    ),
    "communication-bound": (
        lambda at: made(at, lines(time={"communication": 0.4}, **SPARE), spec=CUT, plan=CUT_PLAN),
        None, {"accumulation-large"},
    ),
    "offload-bound": (
        lambda at: made(at, lines(time={"optimizer": 0.6}, **SPARE), spec=OFFLOADED, plan=LEAN),
        None, {"faster-spec"},
    ),
    "gpu-idle": (
        lambda at: made(at, lines(device={"utilization": 0.3}), spec={"compile": False}), {"compile": True}, set(),
    ),
    "slowing-down": (lambda at: made(at, lines(lambda n: {"step_seconds": 1 + n / 1000})), {}, set()),
    "precision-fp32": (
        lambda at: made(at, spec={"precision": "fp32"}), {"precision": "bf16"}, set(),
    ),
    "time-off-prediction": (lambda at: made(at, lines(step_seconds=2.0)), {}, set()),
    "out-of-memory": (
        lambda at: with_oom(at, {"code": 3, "reason": "it does not fit", "rank": 2, "step": 40}),
        {"batch.micro_batch_size": 8}, set(),
    ),
    "memory-near-limit": (
        lambda at: made(at, lines(**memory(device_used_bytes=77.5))), {"batch.micro_batch_size": 8}, set(),
    ),
    "fragmentation": (
        lambda at: made(at, lines(**memory(active_peak_bytes=48, reserved_peak_bytes=66, device_used_bytes=68))),
        {}, set(),
    ),
    "host-memory-growing": (lambda at: made(at, lines(lambda n: memory(host_rss_bytes=4 + n / 100))), {}, set()),
    "memory-off-prediction": (
        lambda at: made(at, plan={"memory": {"peak_allocated_bytes": 40 * GiB}}),
        {"profile.memory_step": 3, "compile": False},
        set(),
    ),
    "stragglers": (
        lambda at: made(at, lines(**ranks(1.0, 0.8, temperature_c=spanning(60, 64, 86)))), {}, set(),
    ),
    "throttled": (
        lambda at: made(at, lines(device={"throttle": ["hw_thermal_slowdown"], "clock_mhz": 1200.0})), {}, set(),
    ),
    "gpu-errors": (lambda at: made(at, lines(lambda n: {"device": {"xid_errors": int(n == 90)}})), {}, set()),
    "ended-badly": (
        lambda at: made(at, end={"code": 9, "reason": "rank 3 died", "rank": 3, "step": 400}), {}, set(),
    ),
    "restarts": (lambda at: made(at, events=restarted(3, 9)), {}, set()),
    "low-goodput": (
        lambda at: made(at, lines(step_seconds=20.0, window_steps=10, wall_time=START + 200_000)),
        {}, {"checkpoints-too-rare", "time-off-prediction"},
    ),
    "checkpoints-too-often": (
        lambda at: made(at, lines(pauses={"checkpoint": 2.0}), events=saves(10, 5.0), spec=SAVES_OFTEN),
        {"checkpoint.interval": 167}, set(),
    ),
    "checkpoints-too-rare": (
        lambda at: made(at, lines(step_seconds=30.0), plan={"time": {"step_seconds": 30.0}}),
        {"checkpoint.interval": 50}, set(),
    ),
    "save-failed": (
        lambda at: made(at, events=[*saves(100, 5.0), event("checkpoint_failed", 500, 400, reason="no space is left")]),
        {"checkpoint.keep_last": 2}, set(),
    ),
    "validation-too-often": (
        lambda at: made(at, lines(pauses={"validation": 3.0}), spec={"validation": {"interval": 10, "batches": 50}}),
        {"validation.interval": 46}, set(),
    ),
}  # fmt: skip

NEAR = {
    "loss-flat": lambda at: made(at, lines(lambda n: {"loss": 10.8 - n / 1000 + noisy(n, 0.02)})),
    "loss-oscillating": lambda at: made(at, lines(lambda n: {"loss": healthy_loss(n) + noisy(n, 0.25)})),
    "loss-spike": lambda at: made(at, lines(lambda n: {"loss": healthy_loss(n) + 0.3 * (n == 250)})),
    "loss-diverged": lambda at: made(at, lines(lambda n: {"loss": healthy_loss(min(n, 250)) + noisy(n, 0.1)})),
    "not-finite": lambda at: made(at, [*lines(), step(15, skipped=True)], spec={"precision": "fp16"}),
    "fp16-overflow": lambda at: made(
        at, [*lines(), *(step(n, skipped=True) for n in range(1, 17))], spec={"precision": "fp16"}
    ),
    "warm-up-too-short": lambda at: made(at, lines(lambda n: {"grad_norm": 5.0 if n == 90 else 1.0})),
    "clipping": lambda at: made(at, lines(grad_norm=1.4)),
    "vanishing-gradient": lambda at: made(at, lines(grad_norm=1e-3)),
    "zero-learning-rate": lambda at: made(at, lines(lambda n: {"lr": {"all": 0.0 if n > 300 else 1e-5}})),
    "overfitting": lambda at: made(
        at, validations=[validation(100 * n, loss) for n, loss in enumerate((5, 3, 3.1, 3.02), 1)]
    ),
    "validation-rare": lambda at: made(at, spec={"max_steps": 40_000, "validation": {"interval": 8000, "batches": 2}}),
    "data-wait": lambda at: made(at, lines(time={"data": 0.04})),
    "micro-batch-small": lambda at: made(at, lines(mfu=0.1, **memory(device_used_bytes=50))),
    "accumulation-large": lambda at: made(
        at, lines(**memory(device_used_bytes=50)), spec=CUT, plan={**CUT_PLAN, "memory": {}}
    ),
    "faster-spec": lambda at: made(at, spec={"activation_checkpointing": "full"}),
    "communication-bound": lambda at: made(at, lines(time={"communication": 0.15})),
    "offload-bound": lambda at: made(at, lines(time={"optimizer": 0.2}), spec=OFFLOADED),
    "gpu-idle": lambda at: made(at, lines(device={"utilization": 0.3}, time={"data": 0.5})),
    "slowing-down": lambda at: made(at, lines(lambda n: {"step_seconds": 1.0 + 0.5 * (n % 30 == 0)})),
    "precision-fp32": lambda at: made(at, spec={"precision": "fp32"}, device="Tesla T4"),
    "time-off-prediction": lambda at: made(at, lines(step_seconds=1.3)),
    "out-of-memory": lambda at: with_oom(at, {"code": 0, "reason": "done", "rank": 0, "step": 40}),
    "memory-near-limit": lambda at: made(at, lines(**memory(device_used_bytes=76))),
    "fragmentation": lambda at: made(at, lines(**memory(active_peak_bytes=20, reserved_peak_bytes=40))),
    "host-memory-growing": lambda at: made(at, lines(lambda n: memory(host_rss_bytes=8 - 4 * math.exp(-n / 60)))),
    "memory-off-prediction": lambda at: made(at, plan={"memory": {"peak_allocated_bytes": 54 * GiB}}),
    "stragglers": lambda at: made(at, lines(lambda n: ranks(1.0, 0.8, slowest=n // 10 % 8))),
    "throttled": lambda at: made(at, lines(device={"throttle": ["sw_power_cap"], "clock_mhz": 1750.0})),
    "gpu-errors": lambda at: made(at, lines(device={"xid_errors": None})),
    "ended-badly": lambda at: made(at, end={"code": 75, "reason": "stopped by a signal", "rank": 0, "step": 400}),
    "restarts": lambda at: made(at, events=restarted(5, 75)),
    "low-goodput": lambda at: made(
        at, lines(lambda n: {"step_seconds": 10.0, "wall_time": START + 11 * n}), plan={"time": {"step_seconds": 10.0}}
    ),
    "checkpoints-too-often": lambda at: made(
        at, lines(pauses={"checkpoint": 0.3}), events=saves(10, 5.0), spec=SAVES_OFTEN
    ),
    "checkpoints-too-rare": lambda at: made(at, lines(step_seconds=15.0), plan={"time": {"step_seconds": 15.0}}),
    "save-failed": lambda at: made(at, events=saves(100, 5.0)),
    "validation-too-often": lambda at: made(at, lines(pauses={"validation": 1.0})),
}


@pytest.mark.parametrize("rule", SICK)
def test_a_sick_run_is_told_what_it_has_and_what_to_set(rule, tmp_path):
    make, expected, others = SICK[rule]
    run = make(tmp_path)
    found = {finding.rule: finding for finding in examine(run)}
    assert found.keys() == {rule} | others, [finding.evidence for finding in found.values()]
    finding = found[rule]
    assert any(sign.isdigit() for sign in finding.evidence) and finding.evidence.endswith("."), finding.evidence
    assert 1 <= sentences(finding.advice) <= 2, finding.advice
    if expected is None:  # the planner's choice
        assert finding.set
    else:
        assert finding.set == expected
    for one in found.values():
        spec = load_spec(str(tmp_path / "spec.json"), flags(one.set))
        before = load_spec(str(tmp_path / "spec.json"))
        assert resolve_batch(spec, 8).global_batch == resolve_batch(before, 8).global_batch


@pytest.mark.parametrize("rule", NEAR)
def test_a_run_that_is_near_an_illness_is_judged_and_found_well(rule, tmp_path):
    told = diagnose(NEAR[rule](tmp_path))
    assert rule in told.healthy, (told.not_judged.get(rule), told.findings)


def test_every_rule_has_a_sick_and_a_healthy_run():
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names)) and set(SICK) == set(NEAR) == set(names)
    assert all(
        sentences(rule.advice) <= 2 and "|" not in rule.looks_at + rule.threshold + rule.advice for rule in RULES
    )


def sentences(text):
    return text.replace("…", "").rstrip(".").count(". ") + 1


def test_communication_that_was_not_measured_is_told_as_predicted(tmp_path):
    parts = {"step_seconds": 0.95, "parts": {"communication_exposed": 0.4}}
    told = examine(made(tmp_path, lines(**SPARE), spec=CUT, plan={**CUT_PLAN, "time": parts}))
    (finding,) = [one for one in told if one.rule == "communication-bound"]
    assert "42 %" in finding.evidence and "predicted, not measured" in finding.evidence


def test_a_rank_that_waits_for_its_data_or_is_slow_of_clock_is_named(tmp_path):
    late = {"data": spanning(0.01, 0.03, 0.4), "clock_mhz": spanning(1900, 1910, 1980)}
    (data, rank) = examine(
        made(tmp_path / "late", lines(ranks={"count": 8, "of": late, "slowest": None, "fastest": None}))
    )
    assert (data.rule, rank.rule) == ("stragglers", "data-wait") and "rank 3 waited longest" in data.evidence
    slow = {"clock_mhz": spanning(1200, 1850, 1980, lowest=6)}
    (rank,) = examine(made(tmp_path / "slow", lines(ranks={"count": 8, "of": slow, "slowest": None, "fastest": None})))
    assert "rank 6 had the lowest clock" in rank.evidence and "35 % lower than the mean" in rank.evidence


def test_flags_that_make_no_valid_spec_are_not_given(tmp_path):
    """A decaying schedule that fills the run leaves no room for a longer warm-up: the rate is lowered."""
    schedule = {"kind": "wsd", "warmup_steps": 50, "decay_steps": 340, "min_lr_ratio": 0.0}
    run = made(
        tmp_path, lines(lambda n: {"loss": healthy_loss(n) + (3 if n == 60 else 0)}), spec={"schedule": schedule}
    )
    (finding,) = examine(run)
    assert finding.rule == "warm-up-too-short" and finding.set == LOWER
    assert Case(run).takes(LOWER) and not Case(run).takes({"schedule.warmup_steps": 100})
    assert not Case(run).takes({"batch.micro_batch_size": 7}) and not Case(run).takes({"optimizer.rate": 1})


# ---------------------------------------------------------------- silence


def test_a_healthy_run_is_told_nothing_and_what_could_not_be_judged_is_counted(tmp_path):
    told = diagnose(made(tmp_path))
    assert told.findings == ()
    assert set(told.not_judged) == {"low-goodput", "stragglers"}, told.not_judged
    assert len(told.healthy) + len(told.not_judged) == len(RULES)


def test_a_run_that_has_only_begun_is_told_nothing(tmp_path):
    begun = diagnose(made(tmp_path, lines(steps=range(10, 51, 10)), spec={"schedule": {"warmup_steps": 2000}}))
    assert begun.findings == ()
    assert {"loss-flat", "loss-diverged", "clipping", "overfitting"} <= begun.not_judged.keys()


def test_a_run_that_has_logged_nothing_is_told_nothing(tmp_path):
    told = diagnose(made(tmp_path, [], end={}))
    assert told.findings == () and len(told.not_judged) > 20


DEMO = (
    *(3.79, 3.07, 2.78, 2.63, 2.46, 2.37, 2.31, 2.20, 2.15, 2.07),
    *(2.04, 1.98, 1.96, 1.88, 1.93, 1.84, 1.76, 1.82, 1.68, 1.78),
)
"""Losses of the demo every ten steps, of batches of 4,096 tokens: falling fast, then noisy as the rate comes down."""


ON_CPU = {
    "mfu": None,
    "device": dict.fromkeys(("utilization", "clock_mhz", "max_clock_mhz", "throttle", "ecc_errors", "xid_errors")),
    "memory": dict.fromkeys(("allocated_peak_bytes", "active_peak_bytes", "reserved_peak_bytes", "device_used_bytes",
                             "fragmentation", "allocation_retries", "host_pinned_bytes")),
}  # fmt: skip
"""What is not known of a CPU."""


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H200", "NVIDIA A900 of a later day"])
def test_the_demo_is_told_nothing_wherever_it_ran(device, tmp_path):
    on_cpu = device == "cpu"
    machine = ON_CPU if on_cpu else memory(device_used_bytes=120)
    entries = [
        step(10 * n, loss=loss, grad_norm=5.1 if n == 1 else 0.85 + noisy(n, 0.1), step_seconds=1.2,
             time={"data": 0.002, "communication": 0.4 if on_cpu else 0.01}, **machine)
        for n, loss in enumerate(DEMO, 1)
    ]  # fmt: skip
    folder = make_run(
        tmp_path, entries, spec={}, device=device, world_size=2,
        plan={"micro_batch_size": 2, "gradient_accumulation_steps": 4, "time": None},
        validations=[validation(100, 2.04), validation(200, 1.73)],
    )  # fmt: skip
    spec = load_spec("gpt-stdlib", [] if on_cpu else ["precision=bf16"]).to_json()
    (folder / "spec.json").write_text(json.dumps(spec))
    assert examine(read_run(folder)) == []


@pytest.mark.parametrize("recipe", ["gpt2-124m", "llama-8b", "atlas-vla", "gpt-stdlib", "atlas-vla-tiny"])
def test_recipes_that_train_well_are_told_nothing(recipe, tmp_path):
    """The whole course, in 40 records; the tiny ones on a CPU, with a noise of 7 % as batches of 32 samples have it."""
    spec = load_spec(recipe)
    tiny = recipe in ("gpt-stdlib", "atlas-vla-tiny")
    ranks_, apart, swing = (2, spec.max_steps // 40, 0.07) if tiny else (8, spec.max_steps // 40, 0.01)
    batch, warm = resolve_batch(spec, ranks_), spec.schedule.warmup_steps
    noise = random.Random(7)
    entries = [
        step(
            n, loss=(2 + 2 * math.exp(-4 * n / spec.max_steps)) * (1 + noise.gauss(0, swing)),
            grad_norm=1.2 * math.exp(noise.gauss(0, 0.3)), lr={"all": spec.optimizer.lr * min(1, n / max(1, warm))},
            window_steps=apart, warm_up=n == apart, **(ON_CPU if tiny else {}),
        )
        for n in range(apart, spec.max_steps + 1, apart)
    ]  # fmt: skip
    measured = [
        validation(n, 2 + 2 * math.exp(-4 * n / spec.max_steps)) for n in range(apart, spec.max_steps + 1, apart)
    ]
    make_run(
        tmp_path, entries, world_size=ranks_, device="cpu" if tiny else "NVIDIA H100 80GB HBM3", validations=measured,
        events=saves(spec.checkpoint.interval, 5.0, last=spec.max_steps),
        plan={"micro_batch_size": batch.micro_batch, "gradient_accumulation_steps": batch.accumulation,
              **({"time": None} if tiny else {})},
    )  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    assert examine(read_run(tmp_path)) == []


def test_a_run_of_an_older_version_is_judged_as_far_as_it_goes(tmp_path):
    old = [
        {
            **{name: entry[name] for name in ("step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "mfu")},
            "memory": {"allocated_peak_bytes": 60 * GiB, "reserved_peak_bytes": 66 * GiB, "device_used_bytes": None},
            "time": {"data": 0.001, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "communication": None},
            "device": {"utilization": 0.97, "power_watts": 600.0, "temperature_c": 60.0},
            "skipped": False,
        }
        for entry in lines()
    ]  # fmt: skip
    run = made(tmp_path, old, events=[])
    spec = {name: value for name, value in run.spec.items() if name not in ("profile", "tracking", "timeouts")}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    told = diagnose(read_run(tmp_path))
    assert told.findings == () and "loss-flat" in told.healthy
    assert {"restarts", "save-failed", "checkpoints-too-often"} <= told.not_judged.keys()


@pytest.mark.parametrize("value", [None, "absent", float("nan")])
def test_no_rule_stumbles_over_what_a_record_lacks(value, tmp_path):
    """Each field of the records, and of the files beside them, missing or NaN in turn."""
    run = made(tmp_path, lines(**ranks(1.0, 0.8, data=spanning(0.1, 0.2, 0.9), temperature_c=spanning(1, 2, 3))))
    run = dataclasses.replace(run, oom=OOM, memory={"parts": {"activations": 3}})

    def without(entry, path):
        if len(path) == 1:
            rest = {key: inner for key, inner in entry.items() if key != path[0]}
            return rest if value == "absent" else rest | {path[0]: value}
        return entry | {path[0]: without(entry[path[0]], path[1:])}

    def paths(entry):
        for key, inner in entry.items():
            yield (key,)
            yield from ((key, *rest) for rest in paths(inner)) if isinstance(inner, dict) else ()

    for path in paths(run.lines[0]):
        if path != ("step",):
            examine(dataclasses.replace(run, lines=[without(entry, path) for entry in run.lines]))
    for name in ("spec", "plan", "exit", "oom", "memory", "environment"):
        for path in paths(getattr(run, name)) if name != "spec" else ((key,) for key in run.spec):
            examine(dataclasses.replace(run, **{name: without(getattr(run, name), path)}))
    for name in ("events", "validations"):
        for path in paths(getattr(run, name)[0]):
            if path not in (("event",), ("step",), ("wall_time",)):
                examine(dataclasses.replace(run, **{name: [without(entry, path) for entry in getattr(run, name)
                                                            if path[0] in entry]}))  # fmt: skip


# ---------------------------------------------------------------- the command


def test_the_command_tells_the_worst_first_and_how_many_rules_could_not_judge(tmp_path):
    sick, well = tmp_path / "sick", tmp_path / "well"
    SICK["not-finite"][0](sick)
    make_run(sick, lines(lambda n: {"loss": None if n == 60 else healthy_loss(n)}, grad_norm=4.2), spec=SPEC)
    made(well)
    told = python("-m", "scaling.doctor", str(sick), str(well), "--verbose")
    assert told.returncode == 0 and not told.stderr
    assert told.stdout.index("error  the loss or the gradient") < told.stdout.index("warning  the gradient is clipped")
    assert "--set optimizer.lr=0.0003" in told.stdout and f"{well}: nothing found" in told.stdout
    assert f"{len(RULES)} rules looked" in told.stdout and "n/a  stragglers: 0 records of the ranks" in told.stdout


def test_the_command_writes_json(tmp_path):
    SICK["clipping"][0](tmp_path / "run")
    told = json.loads(python("-m", "scaling.doctor", str(tmp_path / "run"), "--json").stdout)
    (finding,) = told["findings"]
    assert finding["rule"] == "clipping" and finding["command"] == "--set max_grad_norm=4.2" and finding["threshold"]
    assert {"rule": "stragglers", "why": "0 records of the ranks, 5 are needed"} in told["not_judged"]
    assert len(told["healthy"]) + len(told["not_judged"]) + 1 == told["rules"] == len(RULES)
    both = python("-m", "scaling.doctor", *2 * [str(tmp_path / "run")], "--json", str(tmp_path / "out.json"))
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2 and "clipped" in both.stdout


def test_on_a_terminal_texts_stand_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_lines([[("error  ", "bold red"), ("[red]runs/a[/red] " + "word " * 40, "")]])
    told = capsys.readouterr().out
    assert "[red]runs/a[/red]" in told and told.count("\n") == 1, "neither markup nor wrapped"


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    for arguments, message in (([str(tmp_path)], "has no plan.json"), ([], "RUN_DIR must be the folder of a run")):
        told = python("-m", "scaling.doctor", *arguments)
        assert told.returncode == 2 and message in told.stderr and "Traceback" not in told.stderr


def test_the_doctor_needs_neither_torch_nor_numpy(tmp_path):
    SICK["faster-spec"][0](tmp_path)  # which asks the planner
    code = (
        "import sys; from scaling.doctor.__main__ import main; main([sys.argv[1]]); "
        "print({'torch', 'numpy'} & sys.modules.keys())"
    )
    told = started("-c", code, str(tmp_path)).stdout
    assert told.rstrip().endswith("set()") and "a faster way to run it" in told


# ---------------------------------------------------------------- the end of a run, and the page


def test_at_its_end_a_run_is_told_what_matters_in_a_few_lines(tmp_path):
    SICK["clipping"][0](tmp_path)
    told = at_end(tmp_path)
    assert told[0].startswith("doctor: warning: the gradient is clipped") and "--set max_grad_norm=4.2" in told[1]
    assert told[-1] == f"doctor: 1 warning; python -m scaling.doctor {tmp_path} says what to do"


def test_at_its_end_a_healthy_run_is_told_nothing(tmp_path):
    made(tmp_path)
    assert at_end(tmp_path) == []


def test_a_run_never_fails_for_what_is_said_about_it(tmp_path):
    assert at_end(tmp_path)[0].startswith("doctor: RUN_DIR must be")
    made(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    (line,) = at_end(tmp_path)
    assert line.startswith("doctor: it could not look at the run")


def test_at_its_end_a_short_run_does_not_wait_for_the_planner(tmp_path):
    SICK["faster-spec"][0](tmp_path)
    short = diagnose(read_run(tmp_path), ask_planner=False)
    assert "the planner was not asked" in short.not_judged["faster-spec"] and not short.findings


def test_the_page_of_all_rules_is_as_the_code_has_them():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert page == rules_page(), "python -m scaling.doctor --rules > docs/doctor.md"
    assert python("-m", "scaling.doctor", "--rules").stdout == page
