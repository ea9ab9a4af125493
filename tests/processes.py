"""Start real processes for tests, as a user would."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from warm import Server

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


def torchrun(
    world_size: int, *arguments: str, timeout: float = 600, paths: str = ""
) -> subprocess.CompletedProcess[str]:
    """As `torchrun --nproc_per_node=N …` would end, several at once; warm (see there)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        **({"PYTHONPATH": f"{ROOT}:{paths}"} if paths else {}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return _warm(arguments, ranks, timeout)


def python(
    *arguments: str, timeout: float = 600, folder: Path = ROOT, paths: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python …` in a folder, with `paths` to import from; warm (see there)."""
    return _warm(arguments, [{"PYTHONPATH": f"{ROOT}:{paths}"} if paths else {}], timeout, folder)


def started(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`python …`, from nothing."""
    return run(sys.executable, *arguments, timeout=timeout)


@functools.cache
def _server() -> Server:
    return Server()


def _warm(
    arguments: Sequence[str], ranks: Sequence[dict[str, str]], timeout: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    server, ends = _server(), time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as files:
        out, error = (Path(files) / name for name in ("out", "error"))
        pids = [server.start(list(arguments), {**ENVIRONMENT, **rank}, folder, out, error) for rank in ranks]
        try:
            while None in (codes := [server.code(pid) for pid in pids]):
                if any(codes):  # as torchrun: no rank survives another
                    _end(server, pids, signal.SIGTERM)
                    ends = min(ends, time.monotonic() + 30)
                if time.monotonic() > ends and not any(codes):
                    raise subprocess.TimeoutExpired([*arguments], timeout, out.read_text(), error.read_text())
                if time.monotonic() > ends:
                    _end(server, pids, signal.SIGKILL)
                server.wait(0.1 if any(codes) else max(0.0, ends - time.monotonic()))
        finally:
            _end(server, pids, signal.SIGKILL)
        code = next((code for code in codes if code), 0)
        code = code if len(ranks) == 1 else int(code != 0)
        return subprocess.CompletedProcess([*arguments], code, out.read_text(), error.read_text())


def _end(server: Server, pids: Sequence[int], number: int) -> None:
    for pid in pids:
        if server.code(pid) is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
