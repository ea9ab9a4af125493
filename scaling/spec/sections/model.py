"""What is trained: models, adapters, and the weights that parts start from."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from scaling.spec.scan import quoted
from scaling.spec.sections.base import Fraction, Positive, Section, Size, Target, Text, divisors


class Decoder(Section):
    """A causal transformer: GPT-2 (layernorm, gelu, learned positions) or Llama/Qwen (rmsnorm, swiglu, rope, GQA)."""

    kind: Literal["decoder"]
    vocab_size: Size
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""
    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width inside the MLP: usually 4 x hidden_size for gelu, about 8/3 x for swiglu."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)]
    """Number of transformer blocks."""
    num_attention_heads: Size
    """Query heads in each block."""
    num_key_value_heads: Size | None = None
    """Key and value heads; fewer than the query heads is grouped-query attention. Default: as many as query heads."""
    head_dim: Size | None = None
    """Width of one head. Default: hidden_size / num_attention_heads."""
    max_position_embeddings: Size
    """Longest sequence, tokens; with learned positions also the number of their rows."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the head. Default: as Llama."""
    norm_eps: Positive = 1e-5
    """Added to the variance before its root: GPT-2 and Llama 3 use 1e-5, Qwen and Llama 1 use 1e-6."""
    activation: Literal["swiglu", "gelu", "gelu_new", "relu"] = "swiglu"
    """MLP non-linearity: swiglu has a gate matrix; gelu is exact, gelu_new is GPT-2's tanh form. Default: as Llama."""
    position: Literal["rope", "learned"] = "rope"
    """Position information: rotary embeddings on queries and keys, or a learned table added to the embeddings."""
    rope_theta: Positive = 10000.0
    """Base wavelength of the rotary embeddings."""
    bias: bool = False
    """Bias in every linear layer and in layernorm, as GPT-2. Default: none, as Llama."""
    qkv_bias: bool = False
    """Bias in the query, key and value projections alone, as Qwen2 (implied by `bias`)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, as Qwen3."""
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix, counted and trained once."""
    dropout: Fraction = 0.0
    """Dropout probability on embeddings, attention and residual branches. Default: none, as pretraining does today."""
    initializer_range: Positive = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it over sqrt(2 x layers)."""
    value_head: bool = False
    """A number for each token beside the logits, by which `ppo` foretells the reward; no other objective has it."""

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Last names of the linear layers in each block, in the order of the module."""
        gate = ("gate_proj",) if self.activation == "swiglu" else ()
        return ("q_proj", "k_proj", "v_proj", "o_proj", *gate, "up_proj", "down_proj")

    def contradictions(self) -> Iterator[str]:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            yield (
                f"`hidden_size` must be a multiple of num_attention_heads ({self.num_attention_heads}), "
                f"but is {self.hidden_size}; use {_nearest_multiples(self.hidden_size, self.num_attention_heads)}, "
                "or set `head_dim`"
            )
        elif self.position == "rope" and (width := self.head_dim or self.hidden_size // self.num_attention_heads) % 2:
            yield f"`head_dim` must be even for rope, but is {width}; change it or use learned positions"
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"`num_key_value_heads` must divide num_attention_heads ({self.num_attention_heads}), "
                f"but is {self.num_key_value_heads}; use one of {divisors(self.num_attention_heads)}"
            )


class _Transformer(Section):
    """What its kinds share: layernorm, gelu, biases."""

    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width inside the MLP."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)]
    """Number of blocks."""
    num_attention_heads: Size
    """Heads of each attention."""
    dropout: Fraction = 0.0
    """Dropout probability on embeddings, attention and residual branches."""
    initializer_range: Positive = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it over sqrt(2 x layers),
    those of pixels, states, actions and times 1 / sqrt(inputs). A narrow part learns sooner from about
    1 / sqrt(hidden_size)."""

    def contradictions(self) -> Iterator[str]:
        if self.hidden_size % self.num_attention_heads:
            yield (
                f"`hidden_size` must be a multiple of num_attention_heads ({self.num_attention_heads}), "
                f"but is {self.hidden_size}; use {_nearest_multiples(self.hidden_size, self.num_attention_heads)}"
            )


class Vision(_Transformer):
    """A vision transformer over several camera views (Dosovitskiy et al., 2021; layernorm, gelu, learned positions).

    Its attention alternates as VGGT's (Wang et al., 2025): even blocks look within a view, odd ones over all views.
    """

    kind: Literal["vit"] = "vit"
    """A transformer of this project's own."""
    image_size: Size
    """Height and width of each view, pixels."""
    patch_size: Size
    """Height and width of the square that becomes one token, pixels; divides image_size."""
    views: Size = 1
    """Number of cameras."""
    norm_eps: Positive = 1e-6
    """Added to the variance before its root. Default: as ViT and DINOv2."""

    def contradictions(self) -> Iterator[str]:
        if self.image_size % self.patch_size:
            yield (
                f"`image_size` must be a multiple of patch_size ({self.patch_size}), but is {self.image_size}; "
                f"use {_nearest_multiples(self.image_size, self.patch_size)}"
            )
        yield from super().contradictions()


class Language(Decoder):
    """The encoder of instructions: a decoder's blocks without its head."""

    kind: Literal["decoder"] = "decoder"
    """Its blocks are a decoder's."""
    causal: bool = False
    """Each token sees those before it alone, as in a language model that was trained to predict; false: all of them."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.tie_word_embeddings:
            yield "`tie_word_embeddings` must be false for an encoder, which has no output head, but is true; drop it"
        if self.value_head:
            yield "`value_head` must be false for an encoder, which has no output head, but is true; drop it"


class Fusion(_Transformer):
    """A transformer of learned action queries: self-attention, cross-attention over vision and language, MLP.

    Vision, language and state are projected to its `hidden_size`.
    """

    norm_eps: Positive = 1e-5
    """Added to the variance before its root."""


class Action(Section):
    """What the robot is asked to do: a chunk of continuous actions, predicted at once (Zhao et al., 2023)."""

    action_dim: Size
    """Numbers in one action: joints, gripper."""
    chunk_size: Size
    """Actions predicted at a time; also the number of queries."""
    state_dim: Size
    """Numbers that describe the robot's own state (proprioception)."""
    head: Literal["direct", "velocity"] = "direct"
    """direct: from queries alone to actions; velocity: queries take noised actions and a time between 0 and 1 too, and
    the head predicts how noise flows to actions (for `objective.loss` "flow_matching")."""


class Vla(Section):
    """A vision-language-action model: camera views, an instruction and the robot's state to a chunk of actions.

    Its parts are `vision.*`, `language.*`, `fusion.*` and `action_head.*`. A part of which nothing trains, and which
    reads nothing that trains, runs without gradients and without dropout.
    """

    kind: Literal["vla"]
    vision: Vision
    """Images to tokens."""
    language: Language
    """The instruction to tokens; `max_position_embeddings` is the longest."""
    fusion: Fusion
    """Both, and the state, to one token for each action."""
    action: Action
    """What is predicted, and from what state."""


class FactoryModel(Section):
    """A module of your own: the function `target`, called with `arguments`, returns it. Its package must be allowed on
    the command line (--allow-import). Its initial values are those that its code gives it after torch.manual_seed."""

    kind: Literal["factory"]
    target: Target
    """Where the function is, "package.module:function"; the working folder is looked in first. Its module takes token
    ids, int64 [batch, sequence], and returns logits, [batch, sequence, vocabulary], or an object that has `logits`."""
    arguments: dict[str, Any] = {}
    """Its keyword arguments."""
    inventory: Text | None = None
    """File that `python -m scaling.inventory SPEC` writes once, and all else reads: names and shapes of the parameters,
    and what a step makes, keeps and frees. Relative to the working folder. Null: training looks at the module itself;
    memory and speed are then not known before, and the planner refuses."""

    def __hash__(self) -> int:
        return hash((self.target, self.inventory))  # its arguments have none


class HuggingFace(Section):
    """A causal language model by the transformers library, of any of its architectures whose code it has itself; code
    in the folder wants --allow-import transformers_modules. It starts from the safetensors in its folder, or where none
    are from transformers' initial values."""

    kind: Literal["huggingface"]
    path: Text
    """Folder with its config.json, relative to the working folder; or the name of a model of the hub, as far as `hf
    download` has fetched it: nothing is fetched here."""
    inventory: Text | None = None
    """As of a factory."""


class HuggingFaceVision(Section):
    """Images to tokens by a model of the transformers library: a vision transformer or any other whose
    `last_hidden_state` is tokens or a map of features, or what is that in a model of images and texts (CLIP, SigLIP).
    It sees each view by itself; the fusion tells them apart."""

    kind: Literal["huggingface"]
    path: Text
    """As of a causal language model of this kind; with a preprocessor_config.json, where it has one, for the mean and
    deviation of its pixels. It starts from the safetensors there, or where none are from transformers' initial values;
    each rank then has the whole of it in host memory until the engine is built."""
    image_size: Size
    """Height and width of each view, pixels: what it takes."""
    views: Size = 1
    """Number of cameras."""


class HuggingFaceLanguage(Section):
    """The instruction to tokens by a model of the transformers library: an encoder, that of an encoder and a decoder
    (T5), a causal language model without its head, or the text half of a model of images and texts."""

    kind: Literal["huggingface"]
    path: Text
    """As of vision."""


class HuggingFaceVla(Section):
    """A vla whose vision, language or both are the transformers library's. What a step never reads of them, such as
    heads and poolers, is left out."""

    kind: Literal["huggingface_vla"]
    vision: Annotated[Vision | HuggingFaceVision, Field(discriminator="kind")]
    """Images to tokens."""
    language: Annotated[Language | HuggingFaceLanguage, Field(discriminator="kind")]
    """The instruction to tokens."""
    fusion: Fusion
    """As of vla."""
    action: Action
    """As of vla."""
    inventory: Text | None = None
    """As of a factory."""

    def contradictions(self) -> Iterator[str]:
        if isinstance(self.vision, Vision) and isinstance(self.language, Language):
            yield (
                '`kind` must be "vla" where neither vision nor language is of kind "huggingface", but is '
                '"huggingface_vla"; change it'
            )


Recorded = FactoryModel | HuggingFace | HuggingFaceVla
"""Models of which all that is known without torch is in an inventory file."""

AnyVla = Vla | HuggingFaceVla
"""Camera views, an instruction and a state to actions, whatever its parts are."""

Model = Annotated[Decoder | Vla | FactoryModel | HuggingFace | HuggingFaceVla, Field(discriminator="kind")]


class Lora(Section):
    """Low-rank adapters (Hu et al., 2021) by the peft library: the model's own weights are frozen, adapters train."""

    rank: Size = 8
    """Rows of each lora_A and columns of each lora_B. Default: peft's."""
    alpha: Positive = 16.0
    """What an adapter adds is scaled by alpha / rank. Default: twice the default rank, as is usual."""
    dropout: Fraction = 0.0
    """Dropout probability on the input of each lora_A."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)] | Literal["all-linear"] = (
        "q_proj",
        "v_proj",
    )
    """Linear layers that get an adapter, by their last name, in every block; or all of them ("all-linear"). The output
    head is none of them. Default: queries and values, as in the paper; of GPT-2 in transformers it is ["c_attn"]."""

    def targets(self, model: Decoder) -> tuple[str, ...]:
        """Last names of the layers with an adapter, in the order of the module."""
        layers = model.linear_layers
        return layers if self.target_modules == "all-linear" else tuple(n for n in layers if n in self.target_modules)


class PartWeights(Section):
    """Weights that one part of a vla starts from."""

    part: Literal["vision", "language", "fusion"]
    """Which part."""
    path: Text
    """Folder or file of safetensors; relative to the working folder. Tensors that the part has not are not used."""
    names: dict[Text, Text] = {}
    """Globs over the part's own names (as `python -m scaling.inventory` lists them, without "vision.") and what the
    files call those: each `*` there stands for what the same one of the glob matches. The first that matches counts;
    what none matches is called as here. Parameters with one name there are the rows of one tensor, in the order of the
    model: query, key and value, say. Empty: our own names, or for language Llama's, Qwen's or GPT-2's."""

    def contradictions(self) -> Iterator[str]:
        for glob, name in self.names.items():
            if glob.count("*") != name.count("*") or re.search(r"[?\[\]]", glob):
                yield (
                    f"`names` must map globs to names with as many `*`, and no other wildcard, but has "
                    f"'{quoted(glob)}' for '{quoted(name)}'; write one for each"
                )


def _nearest_multiples(value: int, step: int) -> str:
    low = value - value % step
    return f"{low} or {low + step}" if low else f"{step}"
