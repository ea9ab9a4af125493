"""One causal decoder: GPT-2 or Llama/Qwen by configuration. Hugging Face's names for its parts.

`Decoder(spec)(ids)` gives logits; `Decoder(spec)(ids, targets)` gives the summed cross-entropy, without ever holding
the logits of the whole micro-batch when `cross_entropy` is "chunked".
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.inventory import VALUE_HEAD, blocks, head_dim, is_adapter
from scaling.models.lora import adapter_inserter, fill_adapter
from scaling.models.loss import summed_cross_entropy, token_cross_entropy
from scaling.models.on_cpu import Embedding, RMSNorm, rotate
from scaling.models.recipe import ModelRecipe, WritesGrad
from scaling.spec.sections import Decoder as DecoderSpec
from scaling.spec.sections import Lora, Objective, in_chunks


def decoder_recipe(spec: DecoderSpec, objective: Objective, seed: int, lora: Lora | None = None) -> ModelRecipe:
    """The recipe of a decoder for `objective`, with the adapters of `lora` in it."""
    chunked = in_chunks(objective)
    insert = adapter_inserter(lora, lora.targets(spec)) if lora is not None else None

    def build() -> nn.Module:
        model = Decoder(spec, chunked=chunked)
        if insert is not None:
            insert(model)
        return model

    def fill(name: str, value: Tensor, generator: torch.Generator) -> None:
        if is_adapter(name):
            fill_adapter(name, value, generator)
        else:
            fill_parameter(spec, name, value, generator)

    return ModelRecipe(build=build, fill=fill, blocks=blocks(spec), seed=seed)


def fill_parameter(spec: DecoderSpec, name: str, value: Tensor, generator: torch.Generator) -> None:
    """Initial values as GPT-2 (Radford et al., 2019): normal, smaller for projections back into the residual stream."""
    module, kind = name.split(".")[-2:]
    if kind == "bias" or module == VALUE_HEAD:
        value.zero_()
    elif "norm" in module:
        value.fill_(1.0)
    else:
        residual = module in ("o_proj", "down_proj")
        std = spec.initializer_range / (math.sqrt(2 * spec.num_hidden_layers) if residual else 1.0)
        value.normal_(0.0, std, generator=generator)


class Decoder(nn.Module):
    """A causal transformer with pre-normalisation."""

    def __init__(self, spec: DecoderSpec, *, chunked: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_positions = (
            Embedding(spec.max_position_embeddings, spec.hidden_size) if spec.position == "learned" else None
        )
        self.dropout = dropout_of(spec.dropout)
        self.layers = nn.ModuleList([Block(spec) for _ in range(spec.num_hidden_layers)])
        self.norm = norm_of(spec)
        self.lm_head = Head(spec.hidden_size, spec.vocab_size, chunked=chunked)
        self.value_head = Linear(spec.hidden_size, 1) if spec.value_head else None
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        starts: Tensor | None = None,
        *,
        by_sequence: bool = False,
        by_token: bool = False,
        memory: "list[KeyValues] | None" = None,
    ) -> Tensor:
        """Logits [batch, sequence, vocabulary], or with `targets` the summed loss (fp32 scalar), or the sum of each
        sequence (fp32 [batch]) where `by_sequence`; `by_token` the loss of each token and what the value head says
        there, fp32 [2, batch, sequence].

        `input_ids` and `targets`: int64 [batch, sequence]; targets of -100 are masked. Where a sequence holds several
        texts, `starts`, int64 [batch, sequence], says where the text of each token begins: tokens see those of their
        own text alone, and positions count from its beginning. With `memory`, one for each layer, `input_ids` follow
        those that it knows, `starts` must be given, and the logits are those of the last token alone.
        """
        hidden = self.embed_tokens(input_ids)
        before = memory[0].length if memory is not None else 0
        positions = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)
        mask = None
        if starts is not None:
            mask = mask_of(starts, hidden.dtype, before)
            positions = positions - starts
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(positions)
        rotation = rotation_of(self.spec, positions, hidden.dtype) if self.spec.position == "rope" else None
        hidden = self.dropout(hidden)
        for index, layer in enumerate(self.layers):
            if memory is not None:
                hidden = layer(hidden, rotation, mask, memory[index])
            else:
                hidden = layer(hidden, rotation) if mask is None else layer(hidden, rotation, mask)
        hidden = self.norm(hidden)
        if by_token:
            assert self.value_head is not None, "the spec wants one of who asks for values"
            losses = self.lm_head(hidden, targets, by_token=True)
            return torch.stack((losses, self.value_head(hidden).squeeze(-1).float()))
        return self.lm_head(hidden if memory is None else hidden[:, -1:], targets, by_sequence=by_sequence)


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, spec: DecoderSpec, *, causal: bool = True) -> None:
        super().__init__()
        self.input_layernorm = norm_of(spec)
        self.self_attn = Attention(spec, causal=causal)
        self.post_attention_layernorm = norm_of(spec)
        self.mlp = MLP(spec)
        self.dropout = dropout_of(spec.dropout)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        memory: "KeyValues | None" = None,
    ) -> Tensor:
        """[batch, sequence, hidden] -> the same; `mask` as of `mask_of`, `memory` of this layer."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), rotation, mask, memory))
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))


class Attention(nn.Module):
    """Self-attention with grouped queries (Ainslie et al., 2023); of a decoder causal."""

    def __init__(self, spec: DecoderSpec, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.width = head_dim(spec)
        queries = spec.num_attention_heads * self.width
        keys = (spec.num_key_value_heads or spec.num_attention_heads) * self.width
        qkv_bias = spec.bias or spec.qkv_bias
        self.q_proj = Linear(spec.hidden_size, queries, bias=qkv_bias)
        self.k_proj = Linear(spec.hidden_size, keys, bias=qkv_bias)
        self.v_proj = Linear(spec.hidden_size, keys, bias=qkv_bias)
        self.o_proj = Linear(queries, spec.hidden_size, bias=spec.bias)
        self.q_norm = nn.RMSNorm(self.width, eps=spec.norm_eps) if spec.qk_norm else same
        self.k_norm = nn.RMSNorm(self.width, eps=spec.norm_eps) if spec.qk_norm else same
        self.grouped = keys != queries
        self.dropout = spec.dropout

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        memory: "KeyValues | None" = None,
    ) -> Tensor:
        """[batch, sequence, hidden] -> the same; `mask` as of `mask_of`, in place of a causal one."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if memory is not None:
            key, value = memory.extend(key, value)
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and mask is None
        mixed = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, dropout_p=dropout, enable_gqa=self.grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class KeyValues:
    """Keys and values of one layer for the tokens so far, in room for `longest`."""

    def __init__(self, longest: int) -> None:
        self.length = 0
        self._longest = longest
        self._kept: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens, these [batch, heads, sequence, width] being the last."""
        if self._kept is None:
            batch, heads, _, width = key.shape
            self._kept = key.new_empty(2, batch, heads, self._longest, width)
        end = self.length + key.shape[2]
        self._kept[0, :, :, self.length : end] = key
        self._kept[1, :, :, self.length : end] = value
        self.length = end
        return self._kept[0, :, :, :end], self._kept[1, :, :, :end]


class MLP(nn.Module):
    """Two matrices and a non-linearity, or three with a gate (SwiGLU; Shazeer, 2020)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        gated = spec.activation == "swiglu"
        self.activation = spec.activation
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, bias=spec.bias) if gated else None
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, bias=spec.bias)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, bias=spec.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same."""
        inner = self.up_proj(hidden)
        if self.gate_proj is not None:
            inner = F.silu(self.gate_proj(hidden)) * inner
        elif self.activation == "relu":
            inner = F.relu(inner)
        else:
            inner = F.gelu(inner, approximate="tanh" if self.activation == "gelu_new" else "none")
        return self.down_proj(inner)


class Linear(nn.Linear):
    """nn.Linear that leaves its weights as they are allocated: they are filled by name (`fill_parameter`) later."""

    def reset_parameters(self) -> None:
        """Nothing: torch's initial values would be computed only to be overwritten."""


class Head(WritesGrad, Linear):
    """The output projection. The loss is its own so that whatever gathers its weight gathers it for the loss too."""

    def __init__(self, inputs: int, outputs: int, *, chunked: bool) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.chunked = chunked

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        by_sequence: bool = False,
        by_token: bool = False,
    ) -> Tensor:
        """Logits [batch, sequence, outputs], or with `targets` [batch, sequence] the summed cross-entropy (fp32); that
        of each sequence, [batch], where `by_sequence`, of each token, [batch, sequence], where `by_token`."""
        if targets is None:
            return F.linear(hidden, self.weight)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()
        if by_sequence or by_token:
            losses = token_cross_entropy(rows, self.weight, wanted, chunked=self.chunked).view(targets.shape)
            return losses if by_token else losses.sum(dim=1)
        return summed_cross_entropy(rows, self.weight, wanted, chunked=self.chunked, writes_grad=self.writes_grad)


def same(hidden: Tensor) -> Tensor:
    """Stands where a module would do nothing: calling a module takes the host ten times as long."""
    return hidden


def dropout_of(rate: float) -> Callable[[Tensor], Tensor]:
    """nn.Dropout, if anything is to be dropped."""
    return nn.Dropout(rate) if rate else same


def norm_of(spec: DecoderSpec) -> nn.Module:
    """The normalisation of `spec`, over its width."""
    if spec.norm == "layernorm":
        return nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps, bias=spec.bias)
    return RMSNorm(spec.hidden_size, eps=spec.norm_eps)


def mask_of(starts: Tensor, dtype: torch.dtype, before: int = 0) -> Tensor:
    """What is added to the scores of attention where texts are packed: 0 from each token to itself and to those before
    it in its text, -inf to all others. [batch, 1, sequence, before + sequence], of the queries' type, or each layer
    would cast.

    `starts`: int64 [batch, sequence], where in its sequence the text of each token begins; the first of these tokens is
    the one after `before` others.
    """
    places = torch.arange(before + starts.shape[1], device=starts.device)
    seen = (places >= starts.unsqueeze(2)) & (places <= places[before:].unsqueeze(1))
    mask = torch.zeros(seen.shape, dtype=dtype, device=starts.device)
    return mask.masked_fill_(seen.logical_not_(), float("-inf")).unsqueeze(1)


def rotation_of(spec: DecoderSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al., 2021), halves laid out as Llama's: [sequence, head_dim], or
    [batch, 1, sequence, head_dim] for positions [batch, sequence]."""
    width = head_dim(spec)
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float().unsqueeze(-1) * spec.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
