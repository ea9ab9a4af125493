"""Objectives as users write them, for `"objective": {"kind": "factory"}` in tests; started from this folder."""

import json
import os
import urllib.request
from pathlib import Path

import torch.nn.functional as F


def plain(scale=1.0):
    """The built-in loss from the logits, by torch's own function."""

    def loss(module, batch):
        logits = module(batch.inputs).flatten(0, 1).float()
        return scale * F.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100, reduction="sum")

    return loss


def crashing(after, secrets, token=None):
    """Fails in its `after`-th call, with the environment's `secrets` in the message, as a client of a service would."""
    calls = 0

    def loss(module, batch):
        nonlocal calls
        calls += 1
        if calls >= after:
            raise RuntimeError(" ".join(f"{name}={os.environ[name]}" for name in secrets))
        return module(batch.inputs, batch.targets)

    return loss


def looking_at_sockets(out):
    """Notes where this process listens, in a file per process."""

    def loss(module, batch):
        Path(f"{out}.{os.getpid()}").write_text(json.dumps(listening()))
        return module(batch.inputs, batch.targets)

    return loss


def reading(address, out):
    """Notes what stands at an address on this machine, in a file that each step writes anew."""

    def loss(module, batch):
        with urllib.request.urlopen(address, timeout=10) as answer:
            Path(out).write_bytes(answer.read())
        return module(batch.inputs, batch.targets)

    return loss


def listening():
    """Hex addresses, as in /proc/net/tcp, that this process listens at."""
    folder, inodes = Path("/proc/self/fd"), set()
    for handle in folder.iterdir():
        try:
            inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:  # that of this listing
            continue
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def no_function():
    """Returns what is no objective."""
    return 3


NUMBER = 3


def poisoned(samples):
    """The built-in loss, but NaN for a micro-batch with any of `samples` (lists of token ids) in it."""

    def loss(module, batch):
        found = any(sequence in samples for sequence in batch.inputs.tolist())
        return module(batch.inputs, batch.targets) * (float("nan") if found else 1.0)

    return loss
