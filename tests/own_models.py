"""A language model that nobody has written before, for `model.kind` "factory"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """A causal convolution over the tokens, a gate from a second input, and an MLP in which one layer serves twice."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Conv1d(width, width, 4, groups=width)
        self.gate = nn.Linear(width, width)
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, *, positions: Tensor) -> Tensor:
        mixed = self.mix(F.pad(self.norm(hidden).transpose(1, 2), (3, 0))).transpose(1, 2)
        mixed = mixed * torch.sigmoid(self.gate(hidden + positions))
        return hidden + F.dropout(self.inner(F.gelu(self.inner(mixed))), self.dropout, self.training)


class Mixers(nn.Module):
    """Token ids to logits; a list of unlike parts stands before the blocks."""

    def __init__(self, words: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.before = nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, width)])
        self.layers = nn.ModuleList(Mixer(width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for part in self.before:
            hidden = part(hidden)
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=hidden.dtype)[:, None] * 0.01
        for layer in self.layers:
            hidden = layer(hidden, positions=positions)
        return self.head(hidden * self.scale.to(hidden.dtype))


def mixers(words: int = 512, width: int = 64, layers: int = 3, dropout: float = 0.1) -> Mixers:
    return Mixers(words, width, layers, dropout)


def no_blocks() -> nn.Module:
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))


def no_module() -> str:
    return "nothing"


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Embedding(8, 4) for _ in range(2))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.layers
        return first(tokens), second(tokens)


def no_logits() -> nn.Module:
    return _Pair()


class _ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            for _ in range(len(tokens)):
                hidden = layer(hidden)
        return hidden @ self.embed.weight.T


def by_batch() -> nn.Module:
    return _ByBatch()
