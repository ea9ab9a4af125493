"""A module, a data set and a loss of your own, on any backend: torchrun --nproc_per_node=2 launch/own_model.py

A neural language model (Bengio et al., 2003) of this Python's standard library: the next byte from the sixteen before.
"""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scaling.train import run


class NextByte(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.layers = nn.Sequential(nn.Linear(16 * 32, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, context):
        return self.layers(self.embed(context).flatten(1))


class Bytes(torch.utils.data.Dataset):
    def __init__(self, text):
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self):
        return len(self.bytes) - 16

    def __getitem__(self, index):
        return {"context": self.bytes[index : index + 16], "next": self.bytes[index + 16]}


def loss(module, batch):
    return F.cross_entropy(module(batch["context"]).float(), batch["next"], reduction="none")  # one for each sample


SPEC = {
    "name": "own-model",
    "batch": {"global_batch_size": 256, "micro_batch_size": 64},
    "optimizer": {"lr": 2e-3},
    "precision": "fp32",
    "backend": {"kind": "ddp"},
    "max_steps": 300,
    "validation": {"interval": 100, "batches": 4},
}

if __name__ == "__main__":
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    train, held_out = Bytes(text[: -len(text) // 10]), Bytes(text[-len(text) // 10 :])
    sys.exit(run(SPEC, model=NextByte, dataset=train, validation=held_out, loss=loss, arguments=sys.argv[1:]))
