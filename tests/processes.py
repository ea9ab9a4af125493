"""Start real processes for tests, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "tests" / "specs"
TINY_MODEL = {
    "kind": "decoder",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
"""A model section whose steps take milliseconds."""
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(*command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder; stdout and stderr apart."""
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def torchrun(world_size: int, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node=N …`, on a port of its own so that several can run at once."""
    rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    return run("torchrun", f"--nproc_per_node={world_size}", *rendezvous, *arguments, timeout=timeout)


def python(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`python …`."""
    return run(sys.executable, *arguments, timeout=timeout)
