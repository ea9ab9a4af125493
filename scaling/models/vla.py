"""A vision-language-action model: camera views, an instruction and the robot's state to a chunk of actions.

Vision and language are encoders of a decoder's blocks, or are given (huggingface_vla.py); the fusion is a transformer
of one learned query for each action, which looks at the tokens of both and at the state. Called with images, an
instruction and a state it gives actions; of images alone it gives what vision makes of them, which may stand in their
place.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.inventory import CHANNELS, TIME_FEATURES, blocks, fusion_shape, patches, shapes, vision_shape
from scaling.models.decoder import MLP, Attention, Block, Linear, dropout_of, fill_parameter, norm_of, rotation_of
from scaling.models.on_cpu import Embedding
from scaling.models.recipe import ModelRecipe
from scaling.spec.sections import AnyVla, HuggingFaceVision
from scaling.spec.sections import Decoder as DecoderSpec
from scaling.spec.sections import Language as LanguageSpec
from scaling.spec.sections import Vision as VisionSpec
from scaling.spec.sections import Vla as VlaSpec

PATCH_WAVES = 4.0, 40.0
"""Shortest and longest wavelength that tells a patch's place at first, in patches."""
VIEW_STD = 0.5
"""Of what tells the views apart at first: beside places and patches, each about 0.7 to 1, neither lost nor too loud."""
INWARDS = "vision.patch_embed", "fusion.state_proj", "fusion.action_proj", "fusion.time_proj"
"""What projects data begins by giving of it what has about its deviation, however few numbers it has."""
HEAD_STD = 0.02
"""Actions begin near their mean."""
LONGEST_WAVE = 10_000.0
"""Of the features of a time, whose unit is a thousandth of its way from 0 to 1; radians (as DiT)."""


def vla_recipe(spec: VlaSpec, seed: int) -> ModelRecipe:
    """The recipe of a vla."""

    def build() -> Vla:
        return Vla(spec, Vision(spec.vision), Language(spec.language))

    return ModelRecipe(build, vla_filler(spec), blocks(spec), seed)


def vla_filler(spec: AnyVla) -> Callable[[str, Tensor, torch.Generator], None]:
    """What `ModelRecipe.fill` is for the parts that are this project's own."""
    by_part = shapes(spec)

    def fill(name: str, value: Tensor, generator: torch.Generator) -> None:
        if name == "vision.embed_positions.weight":
            _fill_with_places(value)
        elif name in ("vision.embed_views.weight", "fusion.embed_views.weight"):
            value.normal_(0.0, VIEW_STD, generator=generator)
        elif name.endswith(".weight") and name.removesuffix(".weight") in INWARDS:
            value.normal_(0.0, value.shape[1] ** -0.5, generator=generator)
        elif name == "action_head.weight":
            value.normal_(0.0, HEAD_STD, generator=generator)
        else:
            fill_parameter(by_part.get(name.partition(".")[0], by_part["fusion"]), name, value, generator)

    return fill


class Vla(nn.Module):
    """The whole model."""

    def __init__(self, spec: AnyVla, vision: nn.Module, language: nn.Module) -> None:
        """`vision` and `language`: images and instructions to tokens, as `Vision` and `Language`."""
        super().__init__()
        self.vision = vision
        self.language = language
        self.fusion = Fusion(spec, cast(int, vision.width), cast(int, language.width))
        self.action_head = Linear(spec.fusion.hidden_size, spec.action.action_dim)
        self._still: tuple[str, ...] = ()

    def forward(
        self,
        images: Tensor,
        instruction: Tensor | None = None,
        state: Tensor | None = None,
        noised: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Actions [batch, chunk, action_dim] in the compute type; with `noised` and `time` their velocity there.

        `images`: uint8 [batch, views, height, width, 3], or what vision makes of them, [batch, views x patches, hidden]
        in the compute type; `instruction`: int64 [batch, tokens], padded with a token of its own that is attended to as
        any other; `state`: [batch, state_dim]; `noised`: [batch, chunk, action_dim] and `time`: [batch] in 0 .. 1, for
        a head that predicts velocities. Of images alone the result is what vision makes of them.
        """
        with self._gradients("vision"):
            seen = images if images.is_floating_point() else self.vision(images)
        if instruction is None or state is None:
            return seen.clone()  # as below
        with self._gradients("language"):
            read = self.language(instruction)
        with self._gradients("fusion"):
            fused = self.fusion(seen, read, state, noised, time)
        return self.action_head(fused).clone()  # FSDP2 warns of results that are views

    def train(self, mode: bool = True) -> "Vla":
        """As nn.Module's; parts that are still stay in eval mode, since what never changes needs no dropout."""
        super().train(mode)
        self._still = self._find_still()
        for name in self._still:
            getattr(self, name).eval()
        return self

    def _gradients(self, part: str) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and part not in self._still)

    def _find_still(self) -> tuple[str, ...]:
        """Parts in which nothing trains and that read nothing that trains: no gradient ever comes to them."""
        still = [name for name in ("vision", "language") if not _trains(getattr(self, name))]
        if len(still) == 2 and not _trains(self.fusion):
            still.append("fusion")
        return tuple(still)


class Vision(nn.Module):
    """A vision transformer; even blocks attend within each view, odd ones over all views (VGGT; Wang et al., 2025)."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.width = spec.hidden_size
        shape = vision_shape(spec)
        self.patch_embed = PatchEmbed(spec.patch_size, spec.hidden_size)
        self.embed_positions = Embedding(patches(spec), spec.hidden_size)
        self.embed_views = Embedding(spec.views, spec.hidden_size)
        self.dropout = dropout_of(spec.dropout)
        self.layers = nn.ModuleList([Block(shape, causal=False) for _ in range(spec.num_hidden_layers)])
        self.norm = norm_of(shape)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [batch, views, height, width, 3] -> [batch, views x patches, hidden]."""
        hidden = self.patch_embed(images)
        hidden = hidden + self.embed_positions(torch.arange(hidden.shape[2], device=images.device))
        hidden = hidden + self.embed_views(torch.arange(hidden.shape[1], device=images.device)).unsqueeze(1)
        hidden = self.dropout(hidden)
        for index, layer in enumerate(self.layers):
            # [batch x views, patches] or [batch, views x patches]: views of one memory.
            hidden = layer(hidden.flatten(1, 2) if index % 2 else hidden.flatten(0, 1), None).view_as(hidden)
        return self.norm(hidden).flatten(1, 2)


class Language(nn.Module):
    """A decoder's embeddings, blocks and last norm over an instruction."""

    def __init__(self, spec: LanguageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.width = spec.hidden_size
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_positions = (
            Embedding(spec.max_position_embeddings, spec.hidden_size) if spec.position == "learned" else None
        )
        self.dropout = dropout_of(spec.dropout)
        self.layers = nn.ModuleList([Block(spec, causal=spec.causal) for _ in range(spec.num_hidden_layers)])
        self.norm = norm_of(spec)

    def forward(self, instruction: Tensor) -> Tensor:
        """int64 [batch, tokens] -> [batch, tokens, hidden]."""
        hidden = self.embed_tokens(instruction)
        positions = torch.arange(instruction.shape[1], device=instruction.device)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(positions)
        rotation = rotation_of(self.spec, positions, hidden.dtype) if self.spec.position == "rope" else None
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, rotation)
        return self.norm(hidden)


class Fusion(nn.Module):
    """One query for each action, which looks at the others, and at vision, language and state."""

    def __init__(self, spec: AnyVla, seen: int, read: int) -> None:
        """`seen` and `read`: widths of what vision and language give."""
        super().__init__()
        shape, width, action = fusion_shape(spec.fusion), spec.fusion.hidden_size, spec.action
        self.queries = Embedding(action.chunk_size, width)
        self.vision_proj = Linear(seen, width)
        tells_views = isinstance(spec.vision, HuggingFaceVision) and spec.vision.views > 1
        self.embed_views = Embedding(spec.vision.views, width) if tells_views else None
        self.language_proj = Linear(read, width)
        self.state_proj = Inwards(action.state_dim, width)
        velocity = action.head == "velocity"
        self.action_proj = Inwards(action.action_dim, width) if velocity else None
        self.time_proj = TimeEmbed(TIME_FEATURES, width) if velocity else None
        self.layers = nn.ModuleList([FusionBlock(shape) for _ in range(spec.fusion.num_hidden_layers)])
        self.norm = norm_of(shape)

    def forward(self, seen: Tensor, read: Tensor, state: Tensor, noised: Tensor | None, time: Tensor | None) -> Tensor:
        """[batch, tokens, width] of vision and of language, [batch, state_dim] -> [batch, chunk, hidden]."""
        views = self.vision_proj(seen)
        if self.embed_views is not None:
            each = self.embed_views(torch.arange(self.embed_views.num_embeddings, device=state.device))
            views = views + each.repeat_interleave(views.shape[1] // len(each), dim=0)
        context = torch.cat((views, self.language_proj(read), self.state_proj(state).unsqueeze(1)), dim=1)
        places = torch.arange(self.queries.num_embeddings, device=state.device)
        hidden = self.queries(places.expand(len(state), -1))
        if self.action_proj is not None and self.time_proj is not None:
            hidden = hidden + self.action_proj(noised)
            hidden = hidden + self.time_proj(time).unsqueeze(1)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return self.norm(hidden)


class FusionBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each normalised before and added to the residual stream."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = norm_of(spec)
        self.self_attn = Attention(spec, causal=False)
        self.cross_attention_layernorm = norm_of(spec)
        self.cross_attn = CrossAttention(spec, causal=False)
        self.post_attention_layernorm = norm_of(spec)
        self.mlp = MLP(spec)
        self.dropout = dropout_of(spec.dropout)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """[batch, chunk, hidden] and [batch, tokens, hidden] -> as the first."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), None))
        hidden = hidden + self.dropout(self.cross_attn(self.cross_attention_layernorm(hidden), context))
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))


class CrossAttention(Attention):
    """Attention of one sequence to another, of which it takes keys and values."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - what is attended to stands where rotation did
        self, hidden: Tensor, context: Tensor
    ) -> Tensor:
        """[batch, chunk, hidden] and [batch, tokens, hidden] -> as the first."""
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection, inputs in ((self.q_proj, hidden), (self.k_proj, context), (self.v_proj, context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class PatchEmbed(Linear):
    """Squares of pixels to tokens."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__(CHANNELS * patch_size**2, width)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [batch, views, height, width, 3] -> [batch, views, patches, width]; pixels from -1 to 1."""
        weight = self.weight
        squares = images.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        pixels = squares.transpose(3, 4).flatten(4).to(weight.dtype, memory_format=torch.contiguous_format)
        return F.linear(pixels.div_(127.5).sub_(1.0).flatten(2, 3), weight, self.bias)


class Inwards(Linear):
    """A projection of data, whatever their type."""

    def forward(self, values: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        weight = self.weight
        return F.linear(values.to(weight.dtype), weight, self.bias)


class TimeEmbed(Inwards):
    """A projection of a time, told by sines and cosines of many periods."""

    def forward(self, values: Tensor) -> Tensor:
        """[batch] from 0 to 1 -> [batch, outputs]."""
        half = self.in_features // 2
        exponents = torch.arange(half, device=values.device, dtype=torch.float32) / half
        angles = 1000 * values.float().unsqueeze(1) * LONGEST_WAVE**-exponents
        return super().forward(torch.cat((angles.sin(), angles.cos()), dim=1))


def _fill_with_places(value: Tensor) -> None:
    """Sines and cosines of row and column (as He et al., 2022), [patches, hidden].

    They and the patches begin at one scale: a backbone that is neither loaded nor trained still lets through what it
    sees, and where.
    """
    count, width = value.shape
    waves = width // 4
    shortest, longest = PATCH_WAVES
    lengths = shortest * (longest / shortest) ** (torch.arange(waves) / max(1, waves))
    places = torch.arange(count)
    value.zero_()
    for first, along in ((0, places // math.isqrt(count)), (2 * waves, places % math.isqrt(count))):
        angles = 2 * math.pi * along.unsqueeze(1) / lengths
        value[:, first : first + 2 * waves] = torch.cat((angles.sin(), angles.cos()), dim=1)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
