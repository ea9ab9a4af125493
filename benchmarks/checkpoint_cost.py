"""What saving costs: how long a step waits for an asynchronous save, and how fast a synchronous one writes.

    python -m benchmarks.checkpoint_cost --ranks 2 --folder DIR --out benchmarks/results/checkpoint-cost-cpu.json

Trains a model of about 100 M parameters on one process per GPU (or as many CPU processes as asked for) and notes, on
rank 0, how long each step takes from end to end, saving included. Beside it stand the time that copying the state
within the host's memory takes on all ranks at once, and what `dd` with fsync writes to the same folder, taken in turns
with synchronous saves.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scaling.parity import BACKENDS
from scaling.run_folder import environment
from scaling.units import format_bytes, format_seconds

MODEL = {
    "kind": "decoder",
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "bias": True,
    "tie_word_embeddings": True,
}
"""103 M parameters: GPT-2's shape with 11 layers and a smaller vocabulary."""
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""What --tiny changes of it."""
EVERY = 12
"""Steps between two saves."""
NEIGHBOURS = 4
"""Steps before a saving one, and after it, that it is compared with."""


def main() -> int:
    options = _parser().parse_args()
    if options.worker:
        return _work(options)
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = [_launch(options, mode, Path(folder)) for mode in ("write", "train")]
    report = {**results[0], **results[1]}
    print(markdown(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def markdown(report: dict[str, Any]) -> str:
    """The table for people."""
    steps = report["steps"]
    rows = [
        ("state", f"{format_bytes(report['bytes'])} over {report['ranks']} ranks"),
        ("copying it within memory, all ranks at once", format_seconds(report["copy_seconds"])),
        ("a step while no save is being written", format_seconds(steps["quiet"])),
        ("a step while one is being written", format_seconds(steps["beside"])),
        (f"a step that saves in the background, {steps['saves']} of them", format_seconds(steps["saving"])),
        (f"longer than its {2 * NEIGHBOURS} neighbours by", _with_error(steps["longer"], steps["longer_error"])),
        ("dd with fsync", f"{format_bytes(report['dd_bytes_per_second'])}/s"),
        ("a synchronous save, copying and checksums included", f"{format_bytes(report['sync_bytes_per_second'])}/s"),
        ("of dd", f"{report['sync_bytes_per_second'] / report['dd_bytes_per_second']:.0%}"),
    ]
    return "\n".join(["| what | measured |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


def _with_error(seconds: float, error: float) -> str:
    return f"{seconds:.3f} s ± {error:.3f} s"


def _launch(options: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    out = folder / f"{mode}.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(options.ranks)),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "benchmarks.checkpoint_cost"),
        *("--worker", mode, "--out", str(out), "--folder", str(folder), "--backend", options.backend),
        *("--repeats", str(options.repeats), *(["--tiny"] if options.tiny else [])),
    ]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def _spec(options: argparse.Namespace, ranks: int) -> Any:
    from scaling.spec.sections import Spec

    spec = {
        "name": "checkpoint-cost",
        "model": MODEL | (TINY if options.tiny else {}),
        "data": {"kind": "synthetic", "samples": 4096, "sequence_length": 128},
        "batch": {"global_batch_size": ranks, "micro_batch_size": 1, "gradient_accumulation_steps": "auto"},
        "optimizer": {"lr": 1e-4},
        "precision": "fp32",
        "backend": BACKENDS[options.backend],
        "max_steps": 1 + EVERY * (options.repeats + 2),
        "profile": {"interval": 1},
        "checkpoint": {"interval": EVERY, "keep_last": 1},
    }
    return Spec.model_validate_json(json.dumps(spec))


def _work(options: argparse.Namespace) -> int:
    import torch

    from scaling.engine.process import process_from_environment
    from scaling.run import resolve

    with process_from_environment() as process:
        job = resolve(_spec(options, process.world_size), process.world_size)
        found = (_write if options.worker == "write" else _train)(job, process, Path(options.folder), options.repeats)
        if process.is_main:
            device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"
            found |= {"ranks": process.world_size, "backend": options.backend, "tiny": options.tiny}
            found |= {"environment": environment(process.world_size, device)}
            Path(options.out).write_text(json.dumps(found))
    return 0


def _write(job: Any, process: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """dd and synchronous saves in turns, and copies within memory."""
    import torch
    import torch.distributed as dist

    from scaling.checkpoint.saver import Saver
    from scaling.checkpoint.store import Store
    from scaling.engine.build import build_engine
    from scaling.models.build import model_recipe

    spec = job.spec
    recipe = model_recipe(spec)
    engine = build_engine(spec, job.rendered, recipe, job.groups, process)
    with engine.loading(engine.counters()):
        pass
    copies = [torch.empty_like(shard.own().values, device="cpu").zero_() for shard in engine.state()]
    copy_s, dd, sync = [], [], []
    for repeat in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        for copy, shard in zip(copies, engine.state(), strict=True):
            copy.copy_(shard.own().values)
        dist.barrier()
        copy_s.append(time.perf_counter() - began)

        saver = Saver(Store(folder / "sync"), process, asynchronous=False)
        began = time.perf_counter()
        saver.save(repeat, engine.state(), {}, lambda: None)
        seconds = time.perf_counter() - began
        outcome = saver.wait()
        assert outcome is not None and outcome.problem is None, outcome
        sync.append(outcome.bytes / seconds)
        if process.is_main:
            shutil.rmtree(folder / "sync")
            dd.append(_dd(folder / "dd", outcome.bytes))
        dist.barrier()
    engine.close()
    return {
        "bytes": outcome.bytes,
        "copy_seconds": statistics.median(copy_s),
        "copy_seconds_all": copy_s,
        "dd_bytes_per_second": statistics.median(dd or [1]),
        "dd_all": dd,
        "sync_bytes_per_second": statistics.median(sync),
        "sync_all": sync,
    }


def _dd(path: Path, size: int) -> float:
    """Bytes per second."""
    block = 4 << 20
    began = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-size // block)}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    path.unlink()
    return -(-size // block) * block / seconds


class _Times:
    """A sink that notes when each step ended, all that a step of the loop does included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def begin(self, first_step: int, last_step: int) -> None:
        pass

    def step(self, record: Any) -> None:
        self.ends.append(time.perf_counter())

    def validation(self, record: Any) -> None:
        pass

    def event(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _train(job: Any, process: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Steps of a run that saves in the background every EVERY steps."""
    from scaling.run import Resume, run

    times = _Times()
    (folder / "checkpoints").mkdir(exist_ok=True)
    run(job, process, [times] if process.is_main else [], resume=Resume(folder))
    # Step k's record is made before its save: the save of step k is in the time from record k to record k + 1.
    steps = {k: later - earlier for k, (earlier, later) in enumerate(zip(times.ends, times.ends[1:], strict=False), 1)}
    if not steps:
        return {}  # the other ranks' sinks see nothing
    saves = range(2 * EVERY, max(steps) - EVERY + 1, EVERY)  # the first warms up, the last has nothing after it
    around = {k: [steps[k + d] for d in range(-NEIGHBOURS, NEIGHBOURS + 1) if d] for k in saves}
    longer = [steps[k] - statistics.mean(around[k]) for k in saves]
    medians = {
        "saving": statistics.median(steps[k] for k in saves),
        "beside": statistics.median(steps[k + d] for k in saves for d in range(1, EVERY // 2)),
        "quiet": statistics.median(steps[k - d] for k in saves for d in range(1, EVERY // 3)),
        "saves": len(saves),
        "longer": statistics.mean(longer),
        "longer_error": statistics.stdev(longer) / len(longer) ** 0.5,
        "longer_all": longer,
    }
    return {"steps": medians, "step_seconds": steps}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", default="fsdp", choices=[name for name in BACKENDS if name != "single"])
    parser.add_argument("--repeats", type=int, default=20, help="saves to measure")
    parser.add_argument("--tiny", action="store_true", help="a model that takes no time: does the command still work?")
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
