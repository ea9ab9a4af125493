"""What real runs tell of themselves: times by phase and rank, tensors by category, traces, events."""

import gzip
import json
import math

import pytest
import torch
from processes import SPECS, TINY_MODEL, python, torchrun

from scaling.engine.build import build_engine
from scaling.engine.process import rehearsed_process
from scaling.inventory import parameters
from scaling.labels import labelled_in_midst
from scaling.models.build import model_recipe
from scaling.profile.meter import build_meter
from scaling.run import resolve
from scaling.spec import load_spec
from scaling.summarize import goodput, read_run

RECORDED = ["profile.interval=2", "profile.memory_step=5", "profile.trace_steps=[3,4]", "checkpoint.interval=4"]
RECORDED += ["profile.log_gradients=true"]
STEPS = ["max_steps=8", 'validation={"interval":4,"batches":1}']


def train(folder, *changes, ranks=2):
    more = [word for change in changes for word in ("--set", change)]
    command = ["launch/train.py", "--spec", str(SPECS / "gpt-parity.json"), *more, "--run-dir", str(folder)]
    done = torchrun(ranks, *command) if ranks > 1 else python(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_run(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return train(tmp_path_factory.mktemp("profile") / "run", *STEPS, *RECORDED, 'backend={"kind":"fsdp"}')


def test_phases_and_what_was_waited_for_add_up_to_the_step(sharded):
    for line in sharded.warm:
        assert math.isclose(sum(line["time"].values()), line["step_seconds"], rel_tol=1e-6)
        assert line["time"]["communication"] > 0, "FSDP2 gathers"
    assert [line["step"] for line in sharded.steps] == [2, 4, 6, 8]
    assert [line["warm_up"] for line in sharded.steps] == [True, True, False, False], "steps 3 and 4 are traced"
    assert [line["pauses"]["validation"] > 0 for line in sharded.steps] == [False, False, True, False]
    assert sharded.warm[0]["samples_per_second"] * 64 == pytest.approx(sharded.warm[0]["tokens_per_second"])


def test_ranks_tell_each_other_their_times(sharded):
    ranks = sharded.warm[-1]["ranks"]
    assert ranks["count"] == 2 and {ranks["slowest"]["rank"], ranks["fastest"]["rank"]} == {0, 1}
    assert ranks["slowest"]["seconds"] >= ranks["fastest"]["seconds"] > 0
    own, spread = sharded.warm[-1]["time"], ranks["of"]["forward"]
    assert own["forward"] == pytest.approx(spread["min"]) or own["forward"] == pytest.approx(spread["max"])
    assert {"data", "backward", "optimizer", "busy", "host_rss_bytes"} <= ranks["of"].keys()
    assert "temperature_c" not in ranks["of"], "a CPU does not say"


def test_what_happened_stands_in_events(sharded):
    assert [event["event"] for event in sharded.events] == ["start", "checkpoint", "checkpoint", "end"]
    start, first, last, end = sharded.events
    assert start["details"]["world_size"] == 2 and start["details"]["backend"] == {"kind": "fsdp"}
    assert (first["step"], last["step"], end["details"]["code"]) == (4, 8, 0)
    assert first["details"]["seconds"] >= first["details"]["stall_seconds"] > 0 and first["details"]["bytes"] > 1e6
    found = goodput(sharded)
    assert found.starts == 1 and 0 < found.share < 1


def test_the_tensors_of_a_step_are_counted_by_what_they_are(sharded):
    parts = sharded.memory["parts"]
    elements = sum(p.elements for p in parameters(load_spec(str(SPECS / "gpt-parity.json")).model))
    # A half of the parameters and of both moments is on each rank; each tensor takes a multiple of 512 bytes.
    assert parts["parameters"] == pytest.approx(2 * elements, rel=0.05) and sharded.memory["step"] == 5
    assert sum(parts.values()) == sharded.memory["peak_allocated_bytes"]
    assert sharded.plan["memory"]["peak_allocated_bytes"] == pytest.approx(sum(parts.values()), rel=0.1)


def test_a_trace_names_steps_and_phases(sharded):
    for rank in (0, 1):
        with gzip.open(sharded.folder / "traces" / f"rank{rank}-steps-3-4.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert {"step", "data", "forward", "backward", "optimizer"} <= set(names) and names.count("step") == 2
        summary = json.loads((sharded.folder / "traces" / f"rank{rank}-steps-3-4.summary.json").read_text())
        assert summary["steps"] == 2 and 0 < summary["communication_seconds"] < summary["device_seconds"]


SLOW = """
import os, sys, time
from scaling import loop, train

real = loop._to


def slow(batch, device):
    time.sleep(0.05 * int(os.environ["RANK"]))
    return real(batch, device)


loop._to = slow
sys.exit(train.main(sys.argv[1:]))
"""
"""Rank 1 takes 50 ms longer in each forward pass."""


@pytest.mark.parametrize(
    "backend",
    [
        '{"kind":"ddp"}',
        pytest.param('{"kind":"fsdp"}', marks=pytest.mark.long),
        pytest.param('{"kind":"deepspeed","zero_stage":2}', marks=pytest.mark.long),
    ],
)
def test_the_slow_rank_is_named(backend, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    where = ["--spec", str(SPECS / "gpt-parity.json"), "--run-dir", str(tmp_path / "run")]
    changes = [*STEPS, f"backend={backend}", "profile.interval=1"]
    done = torchrun(2, str(tmp_path / "slow.py"), *where, *(word for one in changes for word in ("--set", one)))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (lines := read_run(tmp_path / "run").warm):
        slowest, fastest = line["ranks"]["slowest"], line["ranks"]["fastest"]
        micro_steps = 2
        assert (slowest["rank"], fastest["rank"]) == (1, 0)
        assert slowest["seconds"] - fastest["seconds"] > 0.04 * micro_steps
        assert line["ranks"]["of"]["communication"]["max"] > 0.04 * micro_steps
        assert sum(line["time"].values()) == pytest.approx(line["step_seconds"])
    assert len(lines) == 6


def test_a_single_rank_has_no_others_and_all_backends_tell_of_the_same_gradients(tmp_path, sharded):
    often = ("profile.interval=4", "profile.log_gradients=true")
    alone = train(tmp_path / "single", *STEPS, 'backend={"kind":"single"}', *often, ranks=1)
    assert alone.steps[-1]["ranks"] is None and alone.steps[-1]["time"]["communication"] == 0
    shared = train(tmp_path / "ddp", *STEPS, 'backend={"kind":"ddp"}', *often)
    last = shared.steps[-1]
    assert last["time"]["communication"] > 0 and {last["ranks"][end]["rank"] for end in ("slowest", "fastest")} == {
        0,
        1,
    }
    assert sum(last["time"].values()) == pytest.approx(last["step_seconds"])
    for ours, theirs, third in zip(alone.steps, shared.steps, sharded.steps[1::2], strict=True):
        for kind, norms in ours["gradient_norms"].items():
            assert norms == pytest.approx(theirs["gradient_norms"][kind], rel=1e-5)
            assert norms == pytest.approx(third["gradient_norms"][kind], rel=1e-5)
            assert math.hypot(*norms.values()) == pytest.approx(ours["grad_norm"], rel=1e-5)
        layers = ["embed_tokens", "embed_positions", "layers.0", "layers.2", "norm"]  # layers.1 is frozen
        assert list(ours["gradient_norms"]["layers"]) == layers
        assert ours["gradient_norms"]["groups"].keys() == ours["lr"].keys()


def test_categories_are_those_of_an_independent_count():
    """Against the sizes of the very tensors, held in the optimizer and the module, after a backward pass."""
    model = {**TINY_MODEL, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 512}
    changes = [f"model={json.dumps(model)}", "data.sequence_length=16", 'backend={"kind":"single"}', "precision=fp32"]
    job = resolve(load_spec(str(SPECS / "gpt-parity.json"), changes), 1)
    device = torch.device("cpu")
    with rehearsed_process(1, device) as process:
        engine = build_engine(job.spec, job.rendered, model_recipe(job.spec), job.groups, process)
        with engine.loading(engine.counters()):
            pass
        meter = build_meter(device, by_category=True)
        with meter, labelled_in_midst(engine, meter, []):
            with meter.phase("forward"):
                loss = engine.module(torch.zeros((2, 16), dtype=torch.long), torch.zeros((2, 16), dtype=torch.long))
            with meter.phase("backward"):
                loss.sum().backward()
            live = meter.live
    weights = sum(p.nbytes for p in engine.module.parameters())
    gradients = sum(p.grad.nbytes for p in engine.module.parameters() if p.requires_grad)
    moments = 8 * sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert live["parameters"] == pytest.approx(weights, rel=0.01)
    assert live["gradients"] == pytest.approx(gradients, rel=0.01)
    assert live["optimizer"] == pytest.approx(moments, rel=0.01)
