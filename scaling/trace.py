"""Memory of one rank without the memory: the real engine on tensors that have shapes and no values.

Torch's fake tensors go through the very code of the engine, FSDP2's and DeepSpeed's, as rank 0 of any number of ranks,
and are counted as live tensors are (scaling/profile/live.py): a model of 8 B parameters in seconds, on any machine. The
kernels are a CPU's, which keep other tensors for the backward pass than a GPU's in attention and fused norms.
Used by `python -m scaling.plan --trace`.
"""

import contextlib
import importlib.util
import io
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from scaling.errors import UserError
from scaling.estimate.memory import MemoryModel
from scaling.estimate.report import PARTS, memory_report
from scaling.rehearse import apart, take_steps
from scaling.run import Job, resolve
from scaling.run_folder import versions
from scaling.spec import Spec
from scaling.spec.sections import PPO
from scaling.units import GiB, format_bytes

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

STEPS, STEPS_3 = 2, 5
"""From the second on all are alike; at stage 3 later, since what it knows of the order of modules grows."""
MICRO_STEPS = 2
"""Of each step: the second finds gradients, all after it find no more than that."""
REAL_BYTES = 2 * GiB
"""The most that is traced with real tensors, where fake ones cannot be."""


def trace(spec: Spec, world_size: int, allow_import: Sequence[str] = ()) -> dict[str, Any]:
    """The memory of rank 0 of so many, traced in a process of its own, beside the ledger's: plain JSON values.

    "memory" has the keys of an estimate's, with None for what a trace does not see; "predicted" is the ledger's for the
    same kernels. Raises UserError.
    """
    if isinstance(spec.objective, PPO):
        raise UserError(
            '`--trace` must come with another objective than "ppo", which draws from values, and traced tensors have '
            "none; leave it out, or take steps for real: python -m scaling.rehearse"
        )
    # Compiled code takes no fake tensors.
    job = resolve(spec.model_copy(update={"compile": False}), world_size, allow_import)
    backend = job.rendered.get("zero_optimization", {})
    on_nvme = [part for part in ("offload_optimizer", "offload_param") if _place(backend, part) == "nvme"]
    _check_installed(job)
    predicted = _ledger(job)
    if on_nvme and predicted["peak_allocated_bytes"] > REAL_BYTES:
        raise UserError(
            f"`--trace` must come without NVMe offload, whose files hold real tensors, or need at most "
            f"{format_bytes(REAL_BYTES)} for them, but needs {format_bytes(predicted['peak_allocated_bytes'])}; "
            "offload to the CPU instead, or make the model smaller"
        )
    began = time.perf_counter()
    steps = STEPS_3 if backend.get("stage") == 3 else STEPS
    measured = apart(traced, job, steps, MICRO_STEPS, not on_nvme)
    unseen = dict.fromkeys(name for name in predicted if name not in ("peak_allocated_bytes", "peak_phase", "parts"))
    return {
        "spec": spec.name,
        "backend": spec.backend.model_dump(mode="json"),
        "activation_checkpointing": spec.activation_checkpointing,
        "precision": spec.precision,
        "micro_batch_size": job.plan.micro_batch,
        "world_size": world_size,
        "kernels": "cpu",
        "tensors": "real" if on_nvme else "fake",
        "compile": False,
        "steps": steps,
        "micro_steps": min(MICRO_STEPS, job.plan.accumulation),
        "memory": unseen
        | {name: measured[name] for name in ("peak_allocated_bytes", "peak_phase")}
        | {"parts": dict.fromkeys(PARTS, 0) | measured["parts"]},
        "phases": measured["phases"],
        "predicted": predicted,
        "predicted_to_traced": predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"],
        "seconds": time.perf_counter() - began,
        "versions": versions(),
    }


def traced(job: Job, steps: int, micro_steps: int | None = None, fake: bool = True) -> dict[str, Any]:
    """What the meter reports after steps of `job` on this CPU. In a process that has no process group."""
    import torch

    from scaling.engine.build import import_backend
    from scaling.engine.process import rehearsed_process
    from scaling.profile.meter import build_meter

    cpu = torch.device("cpu")
    # DeepSpeed tells its memory on standard output, which is the caller's.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        rehearsed_process(job.plan.world_size, cpu) as process,
    ):
        import_backend(job.spec, process)
        meter = build_meter(cpu)
        with fake_tensors() if fake else contextlib.nullcontext(), meter:
            take_steps(job, process, meter, steps, micro_steps)
        return meter.report()


def _check_installed(job: Job) -> None:
    needed = ("torch", *["deepspeed"] * ("zero_optimization" in job.rendered), *["peft"] * (job.spec.lora is not None))
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"`--trace` must find {package} installed, but does not; pip install '.[train]'")


def _ledger(job: Job) -> dict[str, Any]:
    model = MemoryModel(job.spec, job.groups, job.rendered, job.plan, None, cuda=False)
    return memory_report(model.at(job.plan.micro_batch, job.plan.accumulation))


def _place(zero: dict[str, Any], part: str) -> str | None:
    return (zero.get(part) or {}).get("device")


# ---------------------------------------------------------------- fake tensors


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor a fake one; the few places that would read or move real memory do otherwise meanwhile."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.enter_context(replaced(owner, name, value))
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # DeepSpeed's alignment
        stack.enter_context(_fake_mode())
        yield


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, what stands there for fake tensors)."""
    import torch
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # pyright: ignore[reportUnusedImport] - registers how collectives take them
    from torch import nn
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.device_mesh import init_device_mesh

    from scaling.engine import torch_engine

    def real_mesh(*arguments: Any, **more: Any) -> Any:
        with unset_fake_temporarily():
            return init_device_mesh(*arguments, **more)

    real_swap = torch.utils.swap_tensors

    def swap(one: Any, other: Any) -> None:
        if one.device != other.device:
            real_swap(one, other)

    # nn.Module puts a new fake parameter in the place of each; one that is where it belongs has a memo that forbids it.
    yield torch.utils, "swap_tensors", swap
    # A mesh keeps ranks in a tensor, and reads them.
    yield torch_engine, "init_device_mesh", real_mesh
    # DeepSpeed moves the model to the one device there is, which would swap tensors that fake tensors refer to.
    yield nn.Module, "to", lambda module, *_, **__: module
    # DDP arranges its buckets anew in C++ with an array of its own: into others, of the same bytes in all.
    yield dist.Reducer, "_rebuild_buckets", lambda _: False  # pyright: ignore[reportPrivateImportUsage]
    if zero := sys.modules.get("deepspeed.runtime.zero.utils"):
        # Stage 3 compares the order of modules over ranks, of which there is one.
        yield zero, "get_lst_from_rank0", lambda numbers: numbers


def _fake_mode() -> "FakeTensorMode":
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    flags = (torch.bool, torch.uint8)

    class Fake(FakeTensorMode):
        """Code that must know a value is told 1 for a number (a count, a norm), false for a flag ("not finite")."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked = func is torch.ops.aten._local_scalar_dense.default
            if asked and getattr(args[0], "constant", None) is None:
                dtype = args[0].dtype
                return 1.0 if dtype.is_floating_point else int(dtype not in flags)
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Fake()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have an attribute be another meanwhile."""
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)
