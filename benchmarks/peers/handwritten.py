"""GPT-2 and Llama as one writes them by hand in plain torch, for the loops that bring no model of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.common import OWN_WEIGHTS, Job


class Model(nn.Module):
    """A decoder; `model(inputs, targets)` is the mean cross-entropy."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, gpt2 = shape["hidden_size"], shape["model_type"] == "gpt2"
        self.embed_tokens = nn.Embedding(shape["vocab_size"], width)
        self.embed_positions = nn.Embedding(shape["max_position_embeddings"], width) if gpt2 else None
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape["num_hidden_layers"]))
        self.norm = norm_of(shape)
        self.lm_head = nn.Linear(width, shape["vocab_size"], bias=False)
        if shape["tie_word_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight
        angles = None if gpt2 else angles_of(shape)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden, length = self.embed_tokens(inputs), inputs.shape[1]
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions.weight[:length]
        turn = None
        if self.angles is not None:
            angles = self.get_buffer("angles")[:length]
            turn = angles.cos(), angles.sin()
        for layer in self.layers:
            hidden = layer(hidden, turn)
        logits = self.lm_head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = norm_of(shape), Attention(shape)
        self.post_attention_layernorm, self.mlp = norm_of(shape), MLP(shape)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), turn)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, bias = shape["hidden_size"], shape["model_type"] == "gpt2"
        self.head = width // shape["num_attention_heads"]
        keys = self.head * shape["num_key_value_heads"]
        self.grouped = keys != width
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turn is not None:
            query, key = rotated(query, *turn), rotated(key, *turn)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, inner, gpt2 = shape["hidden_size"], shape["intermediate_size"], shape["model_type"] == "gpt2"
        self.gate_proj = None if gpt2 else nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=gpt2)
        self.down_proj = nn.Linear(inner, width, bias=gpt2)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up_proj(hidden)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(inner, approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(hidden)) * inner)


def norm_of(shape: dict[str, Any]) -> nn.Module:
    if shape["model_type"] == "gpt2":
        return nn.LayerNorm(shape["hidden_size"], eps=shape["norm_eps"])
    return nn.RMSNorm(shape["hidden_size"], eps=shape["norm_eps"])


def angles_of(shape: dict[str, Any]) -> Tensor:
    half = shape["hidden_size"] // shape["num_attention_heads"] // 2
    return torch.arange(shape["max_position_embeddings"])[:, None] * shape["rope_theta"] ** (-torch.arange(half) / half)


def rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def load_model(job: Job) -> Model:
    """The model with the job's weights, on the host."""
    with torch.device("meta"):
        model = Model(job.shape)
    if model.angles is not None:  # on the meta device it has no values
        model.angles = angles_of(job.shape)
    weights = load_file(job.folder / OWN_WEIGHTS)
    if job.shape["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if job.shape["tie_word_embeddings"]:
        model.lm_head.weight = model.embed_tokens.weight
    return model
