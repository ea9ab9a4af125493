"""What a run says when memory runs out: the pure part on made-up cases, the rest on real runs under a limit."""

import errno
import gc
import json
import re
import shlex
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import TINY_MODEL, run
from torch import nn

from benchmarks.faults.hooks import limit_tensors
from scaling.checkpoint.format import CHUNK_BYTES
from scaling.errors import UserError
from scaling.estimate.report import run_report
from scaling.host_memory import ADDRESS_SPACE, COPY_BYTES, limits, resident_bytes
from scaling.postmortem import Case, facts, message, off_by, place_of, post_mortem
from scaling.profile import stock
from scaling.profile.stock import taking_stock
from scaling.run import resolve
from scaling.spec import load_spec
from scaling.units import GiB, MiB
from scaling.watch.exhausted import COPY, Exhausted, Held, asked_bytes, is_exhausted, is_of_host, message_of

LAUNCH = "benchmarks/faults/launch.py"

# ---------------------------------------------------------------- telling that it is memory

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.07 GiB is "
    "free. Including non-PyTorch memory, this process has 78.03 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "137438953472 bytes. Error code 12 (Cannot allocate memory)"
)
NCCL = (
    "NCCL error in: NCCLUtils.hpp:268, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5"
    "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)


@pytest.mark.parametrize(
    ("error", "asked", "of_host"),
    [
        (RuntimeError(CUDA), 2 * GiB, False),
        (RuntimeError(CPU), 137438953472, True),
        (RuntimeError(NCCL), None, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None, False),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), None, False),
        (RuntimeError("std::bad_alloc"), None, True),
        (MemoryError(), None, True),
        (MemoryError("Unable to allocate 1.50 GiB for an array with shape (402653184,)"), round(1.5 * GiB), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None, True),
    ],
)
def test_every_way_of_running_out_is_known(error, asked, of_host):
    assert is_exhausted(error) and is_of_host(error) is of_host
    assert asked_bytes(str(error)) == asked
    assert message_of(error) and "\n" not in message_of(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
        RuntimeError("Connection closed by peer [127.0.0.1]:5000"),
        OSError(errno.ENOSPC, "No space left on device"),
        UserError("`x` must be …, but memory is out of memory"),
        ValueError(CPU),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_exhausted(error)


def test_what_an_error_came_of_counts():
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise RuntimeError("saving failed") from cause
    except RuntimeError as error:
        assert is_exhausted(error) and is_of_host(error) and message_of(error) == "MemoryError"


def test_places():
    assert [place_of(phase, "restore") for phase in ("startup", "first_step", "validation", "closing")] == [
        *("restore", "first_step", "validation", "save")
    ]


# ---------------------------------------------------------------- what fits


def case(
    device: str = "NVIDIA H100 80GB HBM3",
    changes: tuple[str, ...] = (),
    world_size: int = 8,
    place: str = "step",
    asked: int | None = 2 * GiB,
    of_host: bool = False,
    **held: Any,
) -> Case:
    job = resolve(load_spec("llama-8b", (*SMALL, *changes)), world_size)
    exhausted = Exhausted("build", "CUDA out of memory.", asked, Held(**held), of_host=of_host)
    return Case(job.spec, job.plan, job.groups, job.rendered, device, 8, place, 7, 3, "cuda:3", exhausted)


H100 = {"limit_bytes": 78 * GiB, "limit_name": "the memory of the device", "free_bytes": GiB}
PARTS = {"parameters": 4 * GiB, "gradients": 4 * GiB, "optimizer": 8 * GiB}
SMALL = ("batch.global_batch_tokens=524288",)
"""Eight sequences for each rank: few ways to cut them."""
BIG = ("batch.micro_batch_size=8", "activation_checkpointing=none")


def full(scale: float = 1.0) -> dict[str, Any]:
    allocated = int(76 * GiB * scale)
    rest = {"activations and other": allocated - sum(PARTS.values())}
    return {"allocated_bytes": allocated, "reserved_bytes": 77 * GiB, "parts": PARTS | rest, **H100}


def test_suggestions_keep_the_global_batch_and_fit():
    made = case(changes=BIG, **full())
    found = post_mortem(made)
    assert found["suggestions"], found
    for suggestion in found["suggestions"]:
        flags = shlex.split(suggestion["command"])[1::2]
        other = resolve(load_spec("llama-8b", (*SMALL, *BIG, *flags)), 8)
        assert other.plan.global_batch == made.plan.global_batch
        assert suggestion["predicted_bytes"] <= 78 * GiB
        assert suggestion["slower"] is not None
    first = found["suggestions"][0]
    assert set(first["set"]) <= {"batch.micro_batch_size", "batch.gradient_accumulation_steps"}
    assert re.fullmatch(r"`--set .*`: [\d.]+ GiB predicted, (about \d+ % (slower|faster)|as fast)", first["sentence"])


def test_what_was_seen_corrects_what_is_suggested():
    """The same spec ran out with twice and with as much as was predicted: the former must be cut further."""
    changes = ("batch.micro_batch_size=2", "activation_checkpointing=selective")
    micros = []
    for reserved in (30 * GiB, 77 * GiB):
        held = full() | {"reserved_bytes": reserved, "allocated_bytes": reserved, "limit_bytes": reserved + GiB}
        found = post_mortem(case(changes=changes, **held))
        micros.append([s["predicted_bytes"] for s in found["suggestions"]])
        predicted = found["predicted"]["peak_reserved_bytes"]
        for suggestion in found["suggestions"]:
            assert suggestion["predicted_bytes"] <= (reserved + GiB) * 0.98
    assert predicted < 77 * GiB < 2 * predicted + 77 * GiB
    assert micros[1], "there is room for something"


def test_the_sentence_says_what_was_more_than_predicted():
    def told(changes: tuple[str, ...], **facts: Any) -> str:
        made = case(changes=changes, **facts)
        return off_by(made, run_report(made.spec, made.plan, made.groups, made.rendered, made.device_name, 8)["memory"])

    small = ("batch.micro_batch_size=1", "activation_checkpointing=full")
    more = r"held 76 GiB when 2 GiB more were asked for: activations and other are \d\.\d x what was predicted"
    assert re.search(more, told(small, **full()))
    as_predicted = full() | {"reserved_bytes": 76 * GiB}
    assert "it was predicted not to fit in the 78 GiB that tensors could have" in told(BIG, **as_predicted)
    assert "expandable_segments" in told(BIG, asked=GiB, **full(0.5))


def test_where_the_host_is_short_the_device_is_not_relieved():
    changes = ('backend={"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu"}', "batch.micro_batch_size=1")
    held = {"host_rss_bytes": 60 * GiB, **H100}
    made = case(changes=changes, place="save", asked=256 * MiB, of_host=True, **held)
    found = post_mortem(made)
    assert found["of_host"] and "of host memory" in found["off_by"]
    before = found["predicted"]["host_bytes"] + found["predicted"]["staging_bytes"]
    assert found["suggestions"] and all(s["predicted_bytes"] < before for s in found["suggestions"])
    text = message(made, found)
    assert text.startswith("`checkpoint` must find host memory for a copy of the state")


def test_an_unknown_card_and_a_cpu_have_suggestions_without_a_pace():
    for device, held in (
        ("Some Card", full()),
        ("cpu", {"parts": full()["parts"], "free_bytes": GiB, "limit_bytes": 78 * GiB, "limit_name": "the machine"}),
    ):
        found = post_mortem(case(device=device, changes=BIG, **held))
        assert found["suggestions"] and all(s["slower"] is None for s in found["suggestions"])
        assert found["suggestions"][0]["sentence"].endswith(" predicted")
        assert not any("offload" in s["command"] for s in found["suggestions"] if device == "cpu")


def test_where_nothing_fits_it_says_so():
    made = case(place="build", changes=('backend={"kind": "ddp"}',), **full(0.1) | {"limit_bytes": 6 * GiB})
    found = post_mortem(made)
    assert found["suggestions"] == []
    text = message(made, found)
    assert "nothing with the same global batch is predicted to fit" in text and '"fsdp"' in text
    assert text.startswith("`model` must fit in memory with its optimizer, but does not on cuda:3, while the model was")


def test_the_message_stands_without_the_arithmetic():
    made = case(**full())
    text = message(made, facts(made))
    assert "`batch.micro_batch_size` must be one that fits in memory" in text and "2 GiB more were asked for" in text


# ---------------------------------------------------------------- what is held


def test_each_storage_is_counted_once_and_then_freed():
    module, moments, made = nn.Linear(512, 256, bias=False), torch.zeros(1000), []
    views = [module.weight.detach().view(-1), moments[:600], moments[400:]]
    engine = SimpleNamespace(module=module, state=lambda: iter([SimpleNamespace(values=view) for view in views]))
    module(torch.ones(4, 512)).sum().backward()

    def fail():
        kept = torch.ones(16 * MiB)  # of 4 bytes each
        made.append(weakref.ref(kept))
        raise RuntimeError(CPU)

    with pytest.raises(Exhausted) as caught, taking_stock("build", torch.device("cpu"), engine):
        fail()
    exhausted, held = caught.value, caught.value.held
    assert (exhausted.stage, exhausted.asked_bytes, exhausted.of_host) == ("build", 137438953472, True)
    weights = 512 * 256 * 4
    assert held.parts["parameters"] == held.parts["gradients"] == weights and held.parts["optimizer"] == 4000
    assert held.parts["activations and other"] >= 64 * MiB and held.bytes == sum(held.parts.values())
    assert made[0]() is None, "what the failed call held is free for whoever tells of it"


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), taking_stock("build", torch.device("cpu")):
        _ = 1 / 0


def test_the_copy_that_is_saved_is_a_category_of_its_own():
    assert COPY_BYTES == CHUNK_BYTES
    copy = torch.empty(COPY_BYTES, dtype=torch.uint8)
    with pytest.raises(Exhausted) as caught, taking_stock("save", torch.device("cpu")):
        raise MemoryError
    assert caught.value.held.parts[COPY] >= copy.nbytes and caught.value.asked_bytes is None
    copy.untyped_storage().resize_(0)  # the error and this frame refer to each other


def test_the_limits_of_this_process_are_known():
    found = limits()
    assert found == sorted(found, key=lambda limit: limit.free_bytes)
    assert all(0 <= limit.free_bytes <= limit.limit_bytes for limit in found)
    assert resident_bytes() is None or resident_bytes() > MiB
    told = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); sys.path.insert(0, '.'); "
    told += "from scaling.host_memory import limits; print(*limits()[0][:2])"
    assert run("python", "-c", told).stdout == f"{ADDRESS_SPACE} {2**30}\n"


# ---------------------------------------------------------------- real runs

SIZES = {"hidden_size": 64, "vocab_size": 2048, "intermediate_size": 256, "max_position_embeddings": 128}
SPEC = {
    "name": "tiny",
    "model": TINY_MODEL | SIZES,
    "objective": {"kind": "causal_lm", "cross_entropy": "plain"},
    "data": {"kind": "synthetic", "samples": 64, "sequence_length": 128, "validation_samples": 16},
    "batch": {"global_batch_size": 16, "micro_batch_size": 16},
    "optimizer": {"lr": 1e-2},
    "param_groups": [{"name": "all", "match": ["*"]}],
    "schedule": {"kind": "constant"},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 3,
    "validation": {"interval": 1, "batches": 1},
    "checkpoint": {"interval": 2, "asynchronous": False},
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}
"""Of 16 sequences at a time a step takes 108 MiB, a validation 50 MiB; of two a step takes 20 MiB."""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    return str(tmp_path / "spec.json")


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def check(folder: Path, err: str, place: str, rank: int = 0) -> dict[str, Any]:
    """The files and the message of a run that has run out."""
    found, ended = read(folder, "oom.json"), read(folder, "exit.json")
    assert (found["schema_version"], found["place"], found["rank"]) == (1, place, rank)
    assert (ended["code"], ended["rank"], ended["step"]) == (3, rank, found["step"])
    assert ended["reason"] in err and err.count("more were asked for") == 1 and "scaling/" not in err
    assert found["asked_bytes"] > 0 and sum(found["held"]["parts"].values()) > 0
    assert found["predicted"] == read(folder, "plan.json")["memory"] and found["off_by"]
    return found


@pytest.mark.parametrize(
    ("place", "limit", "suggests"),
    [
        ("build", 1 * MiB, False),
        ("first_step", 60 * MiB, True),
        ("step", 60 * MiB, True),
        ("validation", 30 * MiB, True),
        ("save", 4 * MiB, False),
    ],
)
def test_running_out_at_each_place(spec, tmp_path, capsys, monkeypatch, place, limit, suggests):
    from scaling.train import main

    folder = tmp_path / "run"
    gc.collect()
    others = sum(stock._parts(torch.device("cpu"), None).values())  # what earlier tests of this process have left
    with monkeypatch.context() as patch:
        limit_tensors(place, limit, patch.setattr)
        assert main(["--spec", spec, "--run-dir", str(folder)]) == 3
    found = check(folder, capsys.readouterr().err, place)
    held = sum(found["held"]["parts"].values())
    held -= others
    assert held <= 1.25 * limit, "what is held cannot be more than the limit, but for what the C library keeps"
    assert bool(found["suggestions"]) is suggests
    if suggests:
        assert held >= 0.5 * limit
        flags = shlex.split(found["suggestions"][0]["command"])
        with monkeypatch.context() as patch:
            limit_tensors(place, limit, patch.setattr)
            again = tmp_path / "again"
            assert main(["--spec", spec, "--run-dir", str(again), *flags]) == 0, capsys.readouterr().err
        assert not (again / "oom.json").exists()


def test_a_run_that_goes_on_has_no_post_mortem_any_more(spec, tmp_path, capsys, monkeypatch):
    """And a checkpoint that does not fit is told as such."""
    from scaling.train import main

    folder, arguments = tmp_path / "run", ["--spec", spec, "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--stop-after", "2"]) == 0
    with monkeypatch.context() as patch:
        limit_tensors("restore", 2 * MiB, patch.setattr)
        assert main(arguments) == 3
    found = check(folder, capsys.readouterr().err, "restore")
    assert found["step"] is None and found["held"]["parts"]["parameters"] > MiB / 2
    assert main(arguments) == 0
    assert not (folder / "oom.json").exists() and read(folder, "exit.json")["code"] == 0


def test_a_real_limit_and_the_first_suggestion_under_it(tmp_path):
    """The address space may grow by 400 MB: 128 sequences at a time do not fit, what is suggested does."""
    flat = {"objective": {"kind": "causal_lm"}, "validation": None, "checkpoint": None, "max_steps": 2}
    batch = {"batch": {"global_batch_size": 128, "micro_batch_size": 128}}
    path = tmp_path / "spec.json"
    data = SPEC["data"] | {"samples": 200, "validation_samples": 0}
    path.write_text(json.dumps(SPEC | flat | batch | {"data": data}))
    limited = ("env", "FAULT_ADDRESS_SPACE=400000000", "python", LAUNCH, "--spec", str(path))
    failed = run(*limited, "--run-dir", str(tmp_path / "run"))
    assert failed.returncode == 3, failed.stdout + failed.stderr
    found = check(tmp_path / "run", failed.stderr, "first_step")
    assert "address space" in found["held"]["limit"] and found["held"]["free_bytes"] < 400e6
    flags = shlex.split(found["suggestions"][0]["command"])
    done = run(*limited, "--run-dir", str(tmp_path / "again"), *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rank_at_fault_is_named_and_the_others_end_with_it(spec, tmp_path):
    folder = tmp_path / "run"
    spread = ("--set", "backend.kind=ddp", "--set", "batch.micro_batch_size=8")
    fault = ("env", f"FAULT_MEMORY=1:step:{30 * MiB}")
    ranks = ("torchrun", "--nproc_per_node=2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    ended = run(*fault, *ranks, LAUNCH, "--spec", spec, "--run-dir", str(folder), *spread, timeout=300)
    assert ended.returncode != 0
    found = check(folder, ended.stderr, "step", rank=1)
    assert ended.stderr.count("[rank 1] `batch.micro_batch_size` must be one that fits") == 1
    assert "has lost another one" not in ended.stderr
    assert found["suggestions"][0]["set"]["batch.micro_batch_size"] in (1, 2)


@pytest.mark.long
@pytest.mark.parametrize(("place", "limit"), [("build", 30 * MiB), ("restore", 30 * MiB), ("save", 30 * MiB)])
def test_a_state_that_is_too_large_is_cut_over_the_ranks(tmp_path, place, limit):
    """Four ranks of DDP hold all of the state each; the suggestion shards it, and runs under the same limit."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 8}
    large = {"model": TINY_MODEL | sizes, "data": SPEC["data"] | {"sequence_length": 16}, "backend": {"kind": "ddp"}}
    batch = {"batch": {"global_batch_size": 4, "micro_batch_size": 1}, "validation": None}
    path, folder = tmp_path / "spec.json", tmp_path / "run"
    path.write_text(json.dumps(SPEC | large | batch))
    ranks = ("torchrun", "--nproc_per_node=4", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", LAUNCH)
    fault = ("env", f"FAULT_MEMORY=0:{'run' if place == 'build' else place}:{limit}")
    command = (*ranks, "--spec", str(path), "--run-dir", str(folder))
    if place == "restore":
        assert run(*command, "--stop-after", "1").returncode == 0
    failed = run(*fault, *command)
    found = check(folder, failed.stderr, place)
    flags = shlex.split(found["suggestions"][0]["command"])
    assert flags[1].startswith("backend=")
    done = run(*fault, *command, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
