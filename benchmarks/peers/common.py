"""What the peers' scripts share: the job that a folder holds, its samples, and saying when a step has ended.

Nothing of `scaling` is imported here: peers run without it.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

JOB, TOKENS, OWN_WEIGHTS, HUGGINGFACE, SPEC = (
    "job.json",
    "tokens.npy",
    "weights.safetensors",
    "huggingface",
    "spec.json",
)
"""What is in the folder of a job."""
LOSSES = 10
"""Steps whose losses are compared."""
LOG_EVERY = 10
"""Steps between two lines that a script prints."""


@dataclass(frozen=True)
class Job:
    """What every peer is to train, and where it writes."""

    folder: Path
    out: Path
    """Where this run of this peer writes."""
    steps: int
    shape: dict[str, Any]
    """The model, in the words of config.json of Llama."""
    sequence: int
    micro_batch: int
    """Sequences in a forward pass of a rank."""
    accumulation: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """Of tensors with two dimensions or more."""
    max_grad_norm: float
    bf16: bool
    compile: bool
    variant: str
    """Which of its ways the script is to go: as a rule, whose code the model is of."""


def job_of_command_line() -> Job:
    """`python -m … JOB_FOLDER OUT_FOLDER STEPS VARIANT`."""
    folder, out, steps, variant = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    found = json.loads((folder / JOB).read_text())
    found["betas"] = tuple(found["betas"])
    return Job(folder, out, steps, **found, variant=variant)


def load_model(job: Job) -> Any:
    """The model that the variant names, with the job's weights, on the host: (inputs, targets) -> mean loss."""
    if job.variant == "handwritten":
        from benchmarks.peers.handwritten import load_model
    else:
        from benchmarks.peers.huggingface import load_model
    return load_model(job)


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples in the order of training: `inputs` and `targets`, int64 [sequence]. It begins again at its end."""

    def __init__(self, job: Job) -> None:
        self._tokens = np.load(job.folder / TOKENS, mmap_mode="r")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self._samples = job.steps * job.micro_batch * job.accumulation * world

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self._tokens[index % len(self._tokens)].astype(np.int64))
        return {"inputs": window[:-1], "targets": window[1:]}


def micro_batches(job: Job, rank: int, world_size: int, device: torch.device) -> Iterator[list[tuple[Any, Any]]]:
    """For each step the micro-batches of this rank: inputs and targets, int64 [micro_batch, sequence]."""
    tokens, size = np.load(job.folder / TOKENS, mmap_mode="r"), job.micro_batch
    for step in range(job.steps):
        found: list[tuple[Any, Any]] = []
        for turn in range(job.accumulation):
            first = ((step * job.accumulation + turn) * world_size + rank) * size
            rows = [tokens[index % len(tokens)] for index in range(first, first + size)]
            window = torch.from_numpy(np.stack(rows).astype(np.int64))
            if device.type == "cuda":
                window = window.pin_memory().to(device, non_blocking=True)
            found.append((window[:, :-1].contiguous(), window[:, 1:].contiguous()))
        yield found


class Timeline:
    """Says when each step of this process has ended, by a clock that all processes share, and the first losses."""

    def __init__(self, job: Job) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self._steps = 0
        job.out.mkdir(parents=True, exist_ok=True)
        self._file = open(job.out / f"rank{rank}.jsonl", "w", buffering=1)  # noqa: SIM115 - open as long as the run
        self._file.write(json.dumps({"pid": os.getpid()}) + "\n")

    def mark(self, loss: Any) -> None:
        """A step has ended; `loss` is the mean over this rank's tokens, or over all ranks'."""
        found: dict[str, Any] = {"at": time.perf_counter(), "cpu": time.process_time()}
        self._steps += 1
        if self._steps <= LOSSES:  # later a GPU is not to be waited for
            found["loss"] = float(loss)
        if torch.cuda.is_available() and self._steps % LOG_EVERY == 0:
            found["allocated"] = torch.cuda.max_memory_allocated()
        self._file.write(json.dumps(found) + "\n")
