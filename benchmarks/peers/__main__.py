"""Train the same model with this toolkit and with what people would use instead, by turns, and compare.

    python -m benchmarks.peers --setup DIR                          # environments of the peers, in DIR/PEER
    python -m benchmarks.peers --environments DIR [--out FILE]      # on this machine's GPUs, or on its CPU

Same weights, tokens, batch, optimizer and precision: the losses of the first steps are compared first. Then all
peers train by turns (rounds.py). A peer that cannot run is a row that says why. Exit code 0 where all losses agree.
"""

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.common import LOSSES, SPEC
from benchmarks.peers.job import SHAPES, write_job
from benchmarks.peers.rounds import Peer, compare
from scaling.run_folder import environment

HERE = Path(__file__).resolve().parent
LOSSES_APART = 1e-4
"""Losses of the same work in fp32 differ by rounding; in bf16 by more."""
LOSSES_APART_BF16 = 2e-2
PEERS = {
    # name: script, variant, environment, what it imports, files that the user writes
    "ours": ("ours", "decoder", None, (), (SPEC,)),
    "plain": ("plain", "handwritten", None, (), ("plain.py", "handwritten.py")),
    "nanogpt": ("nanogpt", "handwritten", None, (), ("nanogpt.py",)),
    "trainer": ("trainer", "transformers", "trainer", ("transformers", "accelerate"), ("trainer.py",)),
    "accelerate": (
        *("accelerate_loop", "transformers", "accelerate", ("accelerate", "transformers")),
        ("accelerate_loop.py", "huggingface.py"),
    ),
    "accelerate-handwritten": (
        *("accelerate_loop", "handwritten", "accelerate", ("accelerate",)),
        ("accelerate_loop.py", "handwritten.py"),
    ),
    "fabric": (
        *("fabric_loop", "transformers", "fabric", ("lightning", "transformers")),
        ("fabric_loop.py", "huggingface.py"),
    ),
    "fabric-handwritten": (
        *("fabric_loop", "handwritten", "fabric", ("lightning",)),
        ("fabric_loop.py", "handwritten.py"),
    ),
    "ours-transformers": ("ours", "transformers", None, ("transformers",), (SPEC,)),
    "plain-transformers": ("plain", "transformers", None, ("transformers",), ("plain.py", "huggingface.py")),
    "trainer-fsdp2": ("trainer", "fsdp2", "trainer", ("transformers", "accelerate"), ("trainer.py",)),
    "trainer-zero2": ("trainer", "zero2", "trainer", ("transformers", "accelerate", "deepspeed"), ("trainer.py",)),
    "torchtitan": ("torchtitan", "", None, (), ()),
}
GROUPS = {
    "usual": ["ours", "plain", "nanogpt", "trainer", "accelerate", "fabric", "torchtitan"],
    "handwritten": ["ours", "plain", "accelerate-handwritten", "fabric-handwritten"],
    "transformers": ["ours-transformers", "plain-transformers", "trainer", "accelerate", "fabric"],
    "sharded": ["ours", "trainer-fsdp2", "trainer-zero2"],
    "installed": ["ours", "plain", "nanogpt"],
}
"""Which peers stand side by side: of each what its users mostly use; all with one model."""


def main() -> int:
    options = _parser().parse_args()
    if options.setup:
        return _set_up(Path(options.setup))
    on_gpu = torch.cuda.is_available()
    shapes = options.shapes or ("gpt2-tiny" if options.tiny else "gpt2-124m" if on_gpu else "gpt2-small,llama-small")
    ranks = options.ranks or ("1" if options.tiny else _counts(on_gpu))
    names = options.peers or ("installed" if options.tiny else "usual")
    usual = (8, 3.0, 2) if on_gpu else (24, 1.0, 6)  # on a GPU a start compiles, which takes long
    rounds, seconds, starts = (2, 0.3, 1) if options.tiny else usual
    options.rounds, options.seconds = options.rounds or rounds, options.seconds or seconds
    options.starts = options.starts or starts
    signal.signal(signal.SIGTERM, _asked_to_end)
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    where = environment(max(map(int, ranks.split(","))), device) | {"cpu": _cpu_name(), "beside": options.note}
    jobs: list[dict[str, Any]] = []
    for shape in shapes.split(","):
        for count in map(int, ranks.split(",")):
            jobs.append(_measure(shape, count, names, options))
            _show(jobs[-1])
            if options.out:  # after each: a machine that is lent may be taken back
                _write(Path(options.out), {"environment": where, "jobs": jobs})
    return 0 if all(job["same_losses"] for job in jobs) else 1


def _asked_to_end(*_: Any) -> None:
    """End all peers: those that stand still would do so for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt that
    sys.exit(143)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _counts(on_gpu: bool) -> str:
    return ",".join(str(n) for n in (1, 4, 8) if n <= torch.cuda.device_count()) if on_gpu else "1,2"


# ---------------------------------------------------------------- environments


def _set_up(folder: Path) -> int:
    """An environment for each requirements file, on top of the present one: torch is in it once."""
    for requirements in sorted((HERE / "requirements").glob("*.txt")):
        place = folder / requirements.stem
        if place.exists():
            shutil.rmtree(place)
        venv.create(place, with_pip=False)
        python = place / "bin" / "python"
        paths = subprocess.check_output(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(paths.strip()) / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "-r", str(requirements)]
        if subprocess.run(command).returncode:
            print(f"{requirements.stem}: pip failed; its peers will be rows that say so")
    return 0


def _peer(name: str, shape: str, ranks: int, environments: str | None) -> tuple[Peer, str | None]:
    """A peer, and why it cannot run; None if it may."""
    module, variant, where, packages, files = PEERS[name]
    own = Path(environments or "", where or "", "bin", "python")
    python = str(own) if environments and where and own.exists() else sys.executable
    peer = Peer(name, module, variant, files, python)
    on_gpu = torch.cuda.is_available()
    if name == "torchtitan":
        return peer, "its script is not written yet" if on_gpu else "torchtitan trains on GPUs alone"
    if name == "trainer-zero2" and not on_gpu:
        return peer, "on a CPU DeepSpeed begins with minutes of compiling an extension"
    if name == "trainer-fsdp2" and ranks == 1:
        return peer, "Trainer's FSDP wants more than one rank"
    if name == "nanogpt" and not shape.startswith("gpt2"):
        return peer, "nanoGPT has GPT-2's shape alone"
    look = "import sys, importlib.util as u; print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])"
    missing = subprocess.run([python, "-c", look, *packages], capture_output=True, text=True).stdout.split()
    return peer, f"not installed: {', '.join(missing)} (--setup)" if missing else None


# ---------------------------------------------------------------- measuring


def _measure(shape_name: str, ranks: int, names: str, options: argparse.Namespace) -> dict[str, Any]:
    chosen = GROUPS.get(names) or names.split(",")
    shape = SHAPES[shape_name]
    # A watchdog that finds its rank killed may still write while the folder goes.
    with tempfile.TemporaryDirectory(prefix="scaling-peers-", ignore_cleanup_errors=True) as folder:
        job = Path(folder) / "job"
        tokens = write_job(job, shape, ranks)
        found = [_peer(name, shape_name, ranks, options.environments) for name in chosen]
        able = [peer for peer, why in found if why is None]
        _say(f"{_called(shape_name, ranks)}: {', '.join(peer.name for peer in able)}")
        for peer, why in found:
            if why is not None:  # said before the minutes that the others take
                _say(f"{peer.name} will not run: {why}")
        rows = compare(
            able,
            job,
            ranks,
            tokens,
            rounds=options.rounds,
            seconds=options.seconds,
            starts=options.starts,
            say=_say,
        )
        lines = {peer.name: _lines(peer, job) for peer in able}
    rows = [{**row, "lines": lines[row["peer"]]} for row in rows]
    rows += [{"peer": peer.name, "why_not": why} for peer, why in found if why is not None]
    limit = LOSSES_APART_BF16 if shape.bf16 else LOSSES_APART
    apart = [row["losses_apart"] for row in rows if "losses_apart" in row]
    return {
        "shape": shape_name,
        "ranks": ranks,
        "device": "gpu" if torch.cuda.is_available() else "cpu",
        "tokens_per_step": tokens,
        "of": {"micro_batch": shape.micro_batch, "accumulation": shape.accumulation, "sequence": shape.sequence},
        "seconds_of_a_turn": options.seconds,
        "same_losses": max(apart, default=0.0) <= limit,
        "losses_apart_limit": limit,
        "rows": rows,
    }


def _lines(peer: Peer, job: Path) -> int:
    """Lines that its user writes: without comments, docstrings, empty ones, and those that measure."""
    import ast

    total = 0
    for name in peer.files:
        path = job / name if name == SPEC else HERE / name
        text = path.read_text()
        skipped: set[int] = set()
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.strip()
            counts = words and not words.startswith("#") and "# measuring" not in words and "timeline" not in words
            total += bool(counts and number not in skipped)
    return total


# ---------------------------------------------------------------- telling


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _called(shape: str, ranks: int) -> str:
    return f"{shape}, {ranks} rank{'s' if ranks > 1 else ''}"


def _show(job: dict[str, Any]) -> None:
    what = f"{_called(job['shape'], job['ranks'])} on the {job['device']}"
    print(f"\n{what}: {job['tokens_per_step']} tokens a step; first {LOSSES} losses within {_most_apart(job):.1e}")
    words = f"{'tokens/s':>10}{'of ours':>9}{'half within':>16}{'CPU s/step':>12}{'of ours':>9}"
    print(f"{'':24}{words}{'peak':>11}{'start':>8}{'lines':>7}")
    for row in job["rows"]:
        if "tokens_per_second" not in row:
            print(f"{row['peer']:24}did not run: {row['why_not']}")
            continue
        ratio, peak = row["of_ours"], row["peak_bytes"]
        most = peak.get("allocated", peak["resident"]) / 2**20
        print(
            f"{row['peer']:24}{row['tokens_per_second']:10.0f}{ratio['median']:9.3f}"
            f"{ratio['low']:9.3f}-{ratio['high']:.3f}{row['cpu_seconds_per_step']:12.4f}{row['cpu_of_ours']['median']:9.3f}"
            f"{most:7.0f} MiB{row['start_seconds']:6.1f} s{row['lines']:7}",
            flush=True,
        )


def _most_apart(job: dict[str, Any]) -> float:
    return max((row.get("losses_apart", 0.0) for row in job["rows"]), default=0.0)


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setup", metavar="DIR", help="make the environments of the peers there, and end")
    parser.add_argument("--environments", metavar="DIR", help="where they are; without, peers that are installed here")
    parser.add_argument("--shapes", help=f"of {','.join(SHAPES)}")
    parser.add_argument("--ranks", help="1,2: each in turn (default: 1,2 on a CPU; of 1,4,8 what there are GPUs for)")
    parser.add_argument("--peers", help=f"one of {', '.join(GROUPS)}, or some of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, help="turns of each peer, over all starts (GPU: 8, CPU: 24)")
    parser.add_argument("--starts", type=int, help="starts of each peer, fairest as many as there are (GPU: 2, CPU: 6)")
    parser.add_argument("--seconds", type=float, help="of a turn (GPU: 3, CPU: 1)")
    parser.add_argument("--tiny", action="store_true", help="a model that takes no time: does the command still work?")
    parser.add_argument("--note", help="what else runs on this machine; kept in the result")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
