"""Each engine against the protocol, on real processes over gloo: what it starts from, trains, owns and refuses."""

import json
import math
import os
import platform

import pytest
from processes import ENVIRONMENT, SPECS, python, torchrun

from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.spec import load_spec

CASES = {
    ("gpt-parity", 1, "fp32"): "single,ddp,fsdp,zero1,zero2,zero3",
    ("gpt-parity", 2, "bf16"): "fsdp,ddp,hsdp,zero1,zero2,zero3,zero3-hpz-cut,zero1-offload,zero2-offload,"
    "zero3-offload-cut,fsdp-replicate,hsdp-replicate,zero3-replicate-cut",
    ("llama-parity", 3, "fp32"): "fsdp,ddp,fsdp-keep,fsdp-offload,zero1,zero2,zero3-cut,zero2-offload,zero3-offload,"
    "fsdp-replicate,fsdp-offload-replicate,zero3-replicate,zero3-offload-replicate",
    ("llama-parity", 1, "fp16"): "single,fsdp,fsdp-replicate",  # DeepSpeed has no fp16 on a CPU
    ("gpt-parity", 2, "fp32"): "zero2,hsdp,zero3-hpz-cut,zero3-cut",
}
LONG = (("llama-parity", 3, "fp32"), ("gpt-parity", 2, "fp32"))
ENGINES = [
    pytest.param(case, name, marks=[pytest.mark.long] * (case in LONG))
    for case, names in CASES.items()
    for name in names.split(",")
]
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 1e-3}
"""Of losses, relative."""


def launch(out, case, names, nvme_path="-", *assignments):
    """Each engine of `names` in turn; what tests/engine_worker.py saw of each, and how it ended."""
    spec, world_size, precision = case
    batch = f'batch={{"global_batch_size": {12 * world_size}, "micro_batch_size": 6}}'
    worker = ("tests/engine_worker.py", str(out), str(SPECS / f"{spec}.json"), str(nvme_path), names)
    # A compiler may have to make DeepSpeed's async_io first, which takes minutes.
    done = torchrun(world_size, *worker, f"precision={precision}", batch, *assignments, timeout=900)
    rows = out.read_text().splitlines() if out.exists() else []
    return {row["backend"]: row for row in map(json.loads, rows)}, done


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """(case, backend) -> what was seen of it; each case is launched once, when first asked for."""
    seen: dict = {}

    def look(case, name):
        if case not in seen:
            seen[case], done = launch(tmp_path_factory.mktemp("engine") / "seen.jsonl", case, CASES[case])
            assert done.returncode == 0, done.stderr[-3000:]
        return seen[case][name]

    return look


def _id(value):
    return value if isinstance(value, str) else "-".join(map(str, value))


@pytest.mark.parametrize(("case", "name"), ENGINES, ids=_id)
def test_engine(observed, case, name):
    seen = observed(case, name)
    spec = load_spec(str(SPECS / f"{case[0]}.json"))
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    trained = sorted(name for group in groups if not group.frozen for name in group.names)

    assert seen["complete"], "state() must cover every parameter"
    assert seen["starts_as_recipe"], "fp32 masters must start from the recipe's values, bit for bit"
    assert seen["trained"] == trained
    assert seen["moved"] == trained, "what is trained moves, what is frozen does not"
    assert seen["moments"] == trained
    assert seen["still_at_lr_0"], "the LR set in param_groups must be the one that is used"
    assert seen["nan_norm_is_not_finite"]
    assert seen["unchanged_by_nan"], "a NaN on one rank must change nothing on any"
    assert seen["scale_follows_nan"], "in fp16 it must halve the scale"
    assert seen["goes_on_after_nan"]
    assert seen["starts_at_0"] and seen["counts_updates"], "only applied updates count"
    assert seen.get("scalers_agree", True), "our loss scaler and DeepSpeed's must go the same way"


@pytest.mark.parametrize(("case", "name"), ENGINES, ids=_id)
def test_norms_of_layers_and_groups(observed, case, name):
    """Those of the whole gradient, on every backend alike; with the loss scale and frozen parameters left out."""
    seen, first = observed(case, name), observed(case, CASES[case].split(",")[0])
    for kind, norms in seen["gradient_norms"].items():
        assert norms == pytest.approx(first["gradient_norms"][kind], rel=1e-5 if case[2] == "fp32" else 2e-2)
        assert math.hypot(*norms.values()) == pytest.approx(seen["grad_norm"], rel=1e-5)
        assert all(norm > 0 for norm in norms.values())
    assert {"layers.2", "norm", "embed_tokens"} <= seen["gradient_norms"]["layers"].keys()


@pytest.mark.parametrize(("case", "name"), ENGINES, ids=_id)
def test_an_engine_goes_back_to_an_earlier_state(observed, case, name):
    # DDP lays its gradients out anew after the first step, and three or more numbers are then added in another order.
    check_return(observed(case, name), from_start=not (name == "ddp" and case[1] > 2))


@pytest.mark.parametrize(("case", "name"), ENGINES, ids=_id)
def test_an_engine_goes_on_from_the_state_of_another(observed, case, name):
    """The first of each case hands over to all; frozen parameters and tied weights are among what it hands over."""
    check_taking_over(observed(case, name), TOLERANCE[case[2]])


BUCKETS = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from scaling.engine.process import Process
from scaling.engine.rider import Rider
from scaling.engine.torch_engine import _settle_buckets

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
model = nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(6)))
rider = Rider(model, Process(0, 1, 0, 1, torch.device("cpu")))
names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
wrapped = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=2)
rider.get_off(model)
_settle_buckets(wrapped, model, rider)
seen = []


def reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    seen.append("reduce " + " ".join(names[parameter.data_ptr()] for parameter in bucket.parameters()))
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


wrapped.register_comm_hook(None, reduce)
for name, parameter in model.named_parameters():
    parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
rider.backward(wrapped(torch.ones(2, 600)).sum(), torch.tensor(1.0))
for line in seen:
    print(line)
"""


def test_ddp_reduces_a_bucket_while_earlier_layers_still_compute(tmp_path):
    (tmp_path / "buckets.py").write_text(BUCKETS)
    done = python(str(tmp_path / "buckets.py"))
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    buckets = [line.split()[1:] for line in seen if line.startswith("reduce")]
    assert buckets == [["_rider", "5.weight", "4.weight"], *([f"{n}.weight", f"{n - 1}.weight"] for n in (3, 1))]
    assert seen.index("reduce _rider 5.weight 4.weight") < seen.index("3.weight"), "not all of them at the end"


FREED = """
import sys
import torch
from scaling.engine.process import _keep_freed_memory
from scaling.host_memory import resident_bytes

if sys.argv[1] == "keep":
    _keep_freed_memory()
before = resident_bytes()
parts = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each
del parts
print(resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")
def test_what_a_step_frees_is_kept_for_the_next_unless_the_user_has_a_say(tmp_path, monkeypatch):
    def kept(word):
        done = python(str(tmp_path / "freed.py"), word)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    (tmp_path / "freed.py").write_text(FREED)
    assert kept("keep") > 100 * 2**20 > 64 * 2**20 > kept("give")
    monkeypatch.setitem(ENVIRONMENT, "MALLOC_ARENA_MAX", "4")
    assert kept("keep") < 64 * 2**20


@pytest.mark.skipif(not os.environ.get("NVME"), reason="NVME=1 tries it: DeepSpeed compiles async_io, for minutes")
@pytest.mark.parametrize(("precision", "hidden_size"), [("fp32", 256), ("bf16", 512)])
def test_state_on_nvme(tmp_path, precision, hidden_size):
    """At these sizes the optimizer's state and the frozen matrices are large enough for DeepSpeed to swap them."""
    sizes = (f"model.hidden_size={hidden_size}", "model.intermediate_size=1024")
    case = ("gpt-parity", 1, precision)
    on_nvme = ("zero3-nvme", "zero3-nvme-replicate")
    names = ",".join(("single", *on_nvme))
    seen, done = launch(tmp_path / "seen.jsonl", case, names, tmp_path / "nvme", *sizes)
    if "DeepSpeed finds no libaio" in done.stderr:
        pytest.skip("DeepSpeed finds no libaio here")
    assert done.returncode == 0, done.stderr[-3000:]
    swapped = " ".join(path.name for path in (tmp_path / "nvme").rglob("*.swp"))
    assert "exp_avg_sq" in swapped and "_param" in swapped, "nothing was on NVMe: the test shows nothing"
    for name in on_nvme:
        check_return(seen[name], from_start=True)
        check_taking_over(seen[name], TOLERANCE[precision])


def check_return(seen, *, from_start):
    assert seen["rolls_back"], "masters, moments and counters must be those that were loaded"
    assert seen["repeats_the_step"], "the step after it must be the same, bit for bit"
    assert seen["is_as_fresh"], "no updates and zero moments are a fresh optimizer"
    assert seen["starts_again_alike"] or not from_start


def check_taking_over(seen, tolerance):
    assert seen["takes_over"], "masters, moments and counters must be those of the other engine, bit for bit"
    assert seen["update_follows"]
    assert seen.get("copies_follow", True), "what is computed with must be the masters, rounded"
    assert seen["losses"] == pytest.approx(seen["reference_losses"], rel=tolerance)
    # Copies that were not refreshed, all of them or the frozen ones, would give these:
    for stale in seen["stale_losses"]:
        assert abs(stale / seen["reference_losses"][0] - 1) > 10 * tolerance


MEETINGS = """
import sys
import torch.distributed as dist
import scaling.loop
from scaling.train import main

meetings, found = [], []
add_up, take = dist.all_reduce, scaling.loop.train_step


def counted(*arguments, **more):
    meetings.append(arguments)
    return add_up(*arguments, **more)


def step(*arguments):
    before = len(meetings)
    result = take(*arguments)
    found.append(len(meetings) - before)
    return result


dist.all_reduce, scaling.loop.train_step = counted, step
code = main([*sys.argv[1:], "--spec", "tests/specs/gpt-parity.json", "--plain"])
print("meetings", *found)
sys.exit(code)
"""


def test_a_step_under_ddp_needs_no_meeting_of_ranks_beside_that_of_its_gradients(tmp_path):
    """But where ranks do not know how many targets the others have."""
    (tmp_path / "meetings.py").write_text(MEETINGS)
    settings = ("--set", 'backend={"kind": "ddp"}', "--stop-after", "3")
    for masked, expected in ((0.0, "meetings 0 0 0"), (0.3, "meetings 1 1 1")):
        command = (str(tmp_path / "meetings.py"), "--run-dir", str(tmp_path / str(masked)), *settings)
        done = torchrun(2, *command, "--set", f"data.masked_fraction={masked}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(expected) == 2, done.stdout
