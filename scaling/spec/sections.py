"""The vocabulary of spec.json: frozen values whose validators only reject.

Every field has its unit, its meaning and the reason for its default below it; the same text is in the JSON Schema.
World size is no field: it is an argument of everything that needs it.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scaling.spec.scan import quoted

Count = Annotated[int, Field(ge=1, le=2**40)]
"""A positive whole number, bounded so that products of a few of them stay exact and finite."""
Size = Annotated[int, Field(ge=1, le=2**24)]
"""One extent of a tensor: width, heads, layers, tokens."""
Elements = Annotated[int, Field(ge=0, le=2**40)]
"""A number of tensor elements (not bytes), as DeepSpeed counts its buckets."""
Positive = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Auto = Literal["auto"]


class Section(BaseModel):
    """What all parts of a spec share: frozen, strict, finite, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def contradictions(self) -> Iterator[str]:
        """What the fields, each right by itself, get wrong together: a message each, naming fields of this section."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("\n".join(found))  # all at once; the reader of the error splits them
        return self


# ---------------------------------------------------------------- model


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
                f"but is {self.num_key_value_heads}; use one of {_divisors(self.num_attention_heads)}"
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


Target = Annotated[str, Field(max_length=500, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
"""A function in a module: "package.module:function"."""


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


Recorded = FactoryModel | HuggingFace
"""Models of which all that is known without torch is in an inventory file."""

Model = Annotated[Decoder | Vla | FactoryModel | HuggingFace, Field(discriminator="kind")]


# ---------------------------------------------------------------- adapters


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


# ---------------------------------------------------------------- objective


class CausalLM(Section):
    """Next-token prediction: cross-entropy summed over the target tokens of the whole step, divided by their number."""

    kind: Literal["causal_lm"] = "causal_lm"
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """chunked: logits exist for a slice of the tokens at a time (least memory); plain: for the whole micro-batch, as it
    always is for models of the kinds factory and huggingface."""


class SFT(Section):
    """Supervised fine-tuning on conversations: as causal_lm, with what the assistant says as the only targets."""

    kind: Literal["sft"]
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of causal_lm."""


class DPO(Section):
    """Direct preference optimisation (Rafailov et al., 2023): of two responses the chosen one is made more probable,
    compared with the model that training starts from, than the rejected one; the loss is the mean over pairs."""

    kind: Literal["dpo"]
    beta: Positive = 0.1
    """How closely the model is held to the one it starts from; larger is closer. Default: as the paper and trl."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to have been swapped by mistake (cDPO). Default: none."""
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of causal_lm; chunked logits are computed a second time in the backward pass."""


class Factory(Section):
    """Code of your own: the function `target` is called with `arguments`. Its package must be allowed on the command
    line (--allow-import); a spec cannot do that."""

    kind: Literal["factory"]
    target: Target
    """Where the function is, "package.module:function"; the working folder is looked in first. As an objective it
    returns a function of (module, micro-batch) to the loss summed over the target tokens."""
    arguments: dict[str, Any] = {}
    """Its keyword arguments."""


class Overlap(Section):
    """Reward: how much of the expected answer, the assistant's last words in the data, a response has; the F1 of their
    words, 0 to 1, each word counted as often as it stands there (as SQuAD; Rajpurkar et al., 2016)."""

    kind: Literal["overlap"]


class Pattern(Section):
    """Reward: 1 where a regular expression is found in the response, else 0."""

    kind: Literal["pattern"]
    pattern: Text
    """As Python's `re.search` has it; `.` also matches line breaks."""

    def contradictions(self) -> Iterator[str]:
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError) as error:
            yield f"`pattern` must be a regular expression, but is not: {error}; correct it"


class PPO(Section):
    """Proximal policy optimisation (Schulman et al., 2017) of sampled responses to the prompts of `data`: all before
    the assistant's last words. The reward comes with the last token; each token pays for what it is more probable than
    by the model that training starts from (Ziegler et al., 2019). The loss is the mean over response tokens."""

    kind: Literal["ppo"]
    reward: Annotated[Overlap | Pattern | Factory, Field(discriminator="kind")]
    """What a response is worth. A factory returns a function of (prompts, responses), lists of texts, to a list of
    numbers."""
    max_new_tokens: Size
    """Longest response, tokens; prompts may have what that leaves of `data.sequence_length`."""
    temperature: Positive = 1.0
    """What logits are divided by, in sampling alone."""
    rollout_steps: Count = 4
    """Optimizer steps whose prompts are answered at a time, by the model as it is then."""
    epochs: Count = 1
    """How often each such set of responses is gone through."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """A token's probability earns nothing beyond this change of it. Default: as the paper."""
    value_clip: Positive = 0.2
    """The same of the value, absolute. Default: as trl."""
    value_coef: NonNegative = 0.5
    """Weight of the value's squared error. Default: as the paper's for shared weights."""
    kl_coef: NonNegative = 0.05
    """Price of a nat away from the model that training starts from. Default: as trl."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a reward for each token that it lies ahead. Default: none, as usual for responses."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (Schulman et al., 2016). Default: as the paper."""
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of dpo."""


class BehaviourCloning(Section):
    """Actions as a demonstrator's: the error summed over the numbers of all actions that are no padding, over the whole
    step, divided by how many they are."""

    kind: Literal["behaviour_cloning"]
    loss: Literal["regression", "flow_matching"] = "regression"
    """regression: the distance of the predicted actions; flow_matching: the squared error of the predicted velocity
    from noise to actions, at a time and noise drawn by seed and place in the data (Lipman et al., 2023)."""
    error: Literal["l1", "mse"] | None = None
    """Of a regression: absolute or squared. Default: l1, as ACT (Zhao et al., 2023)."""

    def contradictions(self) -> Iterator[str]:
        if self.loss == "flow_matching" and self.error is not None:
            yield f'`error` must be absent for the loss "flow_matching", but is "{self.error}"; drop it'


Objective = Annotated[CausalLM | SFT | DPO | PPO | BehaviourCloning | Factory, Field(discriminator="kind")]


def in_chunks(objective: Objective) -> bool:
    """Whether a decoder's loss takes a slice of the tokens at a time: for code of one's own it does."""
    return not isinstance(objective, CausalLM | SFT | DPO | PPO) or objective.cross_entropy == "chunked"


# ---------------------------------------------------------------- data


class SequenceCurriculum(Section):
    """Short sequences first (Shortformer: Press et al., 2021): a step has the samples that it would have anyway, each
    cut into equal pieces, none of which sees another. So tokens, samples and epochs are what they are without it, and
    every target is learnt from; validation is at full length always.

    The length is the longest that is reached by then, on a straight line from min_length to sequence_length, of those
    that are a multiple of min_length and divide sequence_length: 64, 128, 256, 512, 1024, say. It is a function of the
    step alone, the same on every rank.
    """

    min_length: Size
    """Tokens in each piece at the first step; divides sequence_length."""
    steps: Count
    """Optimizer steps until sequences have their full length."""


class TextData(Section):
    """Text files, tokenised once into a cached memory-mapped file and cut into windows."""

    kind: Literal["text"]
    train: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs of UTF-8 files, relative to the working folder; "python-stdlib" means the standard library's .py files. Of
    a .jsonl file each line, and of a .parquet or .arrow file or a folder that `datasets` has saved each row, is an
    object whose `text` is a document of its own."""
    validation: Fraction | Annotated[list[Text], Field(min_length=1, max_length=1000)] = 0.05
    """The share of files (by a hash of their content; of a lone file, its end) held out for validation, or globs of
    validation files; 0 holds out none."""
    tokenizer: Text = "bytes"
    """"bytes" (vocabulary of 256; the byte 0 ends a document), or the path of a Hugging Face tokenizer.json or
    of its folder."""
    sequence_length: Size
    """Tokens in one sample."""
    sequence_curriculum: SequenceCurriculum | None = None
    """Null: sequences have their full length from the first step on."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What happens to a line of a .jsonl file that has no text: the run does not start, and file and line are named; or
    it is left out, and counted in the log."""
    cache: Text = ".cache/scaling"
    """Folder of the tokenised files, keyed by content and tokenizer; safe to delete."""


class TokenData(Section):
    """Token files as the nano-gpt family writes them: memory-mapped .npy, or raw little-endian .bin."""

    kind: Literal["tokens"]
    train: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs of .npy or .bin files, each a one-dimensional array of token ids, read in sorted order as one stream."""
    validation: Fraction | Annotated[list[Text], Field(min_length=1, max_length=1000)] = 0.05
    """The share of samples at the end of the stream held out for validation, or globs of validation files; 0: none."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Element type of .bin files, which do not say it themselves (.npy files do)."""
    ignore_token_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """Targets with this id (padding, say) are masked: they add nothing to the loss nor to its token count."""
    sequence_length: Size
    """Tokens in one sample."""
    sequence_curriculum: SequenceCurriculum | None = None
    """As of text."""


class ChatData(Section):
    """Conversations in jsonl, one object a line, or in tables, one a row: `messages` (role, content), MiniMind's and
    ShareGPT's `conversations` (role, content or from, value), or Dolly's and Alpaca's fields (instruction, context or
    input, response or output).

    Targets are the words of the assistant and what ends them, for the objective causal_lm those of everybody.
    """

    kind: Literal["chat"]
    train: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs of .jsonl, .parquet or .arrow files, or of folders that `datasets` has saved, relative to the working
    folder; "python-stdlib" means conversations made of the standard library: a function without its docstring, and what
    its docstring says first."""
    validation: Fraction | Annotated[list[Text], Field(min_length=1, max_length=1000)] = 0.05
    """The share of conversations (by a hash of their content) held out for validation, or globs of validation files; 0
    holds out none."""
    tokenizer: Text = "bytes"
    """"bytes" (vocabulary of 256; the byte 0 ends a text), or the path of a Hugging Face tokenizer.json or
    of its folder."""
    template: Literal["chatml", "instruction", "tokenizer"] = "chatml"
    """How a conversation becomes text. chatml: <|im_start|>role … <|im_end|>, as Qwen and MiniMind; instruction:
    "### Instruction:" and "### Response:", for models that know no such tokens, as GPT-2; tokenizer: the chat template
    in the tokenizer's own folder, by transformers."""
    sequence_length: Size
    """Tokens in one sample."""
    packing: bool = True
    """Several conversations in one sample, none of which sees another; false: one in each, and padding."""
    too_long: Literal["truncate", "skip", "refuse"] = "truncate"
    """What happens to a conversation longer than sequence_length + 1 tokens: its end is cut off, it is left out, or the
    run does not start. What is cut off and left out is counted in the log."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What happens to a line that is no conversation: the run does not start, and file and line are named; or it is
    left out, and counted in the log."""
    cache: Text = ".cache/scaling"
    """Folder of the tokenised conversations, keyed by content, tokenizer and template; safe to delete."""

    def contradictions(self) -> Iterator[str]:
        yield from _template_of(self)


class PreferenceData(Section):
    """Pairs of responses in jsonl, one object a line, or in tables, one a row: `chosen` and `rejected`, each a
    conversation that ends with the assistant (a list of messages, as MiniMind's), or, after a `prompt`, the response
    alone (as text or messages); messages that begin with those of the prompt are taken to be the whole."""

    kind: Literal["preference"]
    train: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs as of chat; "python-stdlib" means pairs made of the standard library: what a function's docstring says
    first, preferred to the same words in another order."""
    validation: Fraction | Annotated[list[Text], Field(min_length=1, max_length=1000)] = 0.05
    """The share of pairs (by a hash of their content) held out for validation, or globs of validation files; 0 holds
    out none."""
    tokenizer: Text = "bytes"
    """As of chat."""
    template: Literal["chatml", "instruction", "tokenizer"] = "chatml"
    """As of chat."""
    sequence_length: Size
    """Tokens in each of a sample's two sequences."""
    too_long: Literal["truncate", "skip", "refuse"] = "truncate"
    """What happens to a pair of which one is longer than sequence_length + 1 tokens: its end is cut off, the pair is
    left out, or the run does not start. What is cut off and left out is counted in the log."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What happens to a line that is no pair: the run does not start, and file and line are named; or it is left out,
    and counted in the log."""
    cache: Text = ".cache/scaling"
    """As of chat."""

    def contradictions(self) -> Iterator[str]:
        yield from _template_of(self)


def _template_of(data: ChatData | PreferenceData) -> Iterator[str]:
    if data.template == "tokenizer" and data.tokenizer == "bytes":
        yield (
            '`template` must be "chatml" or "instruction" for the tokenizer "bytes", which has no chat template, but '
            'is "tokenizer"; change it, or name a tokenizer\'s folder'
        )


SIMULATED_ARM = "simulated-arm"
"""Demonstrations that every machine can make."""


class EpisodeData(Section):
    """Demonstrations of a robot in LeRobot's layout (versions 2.0 to 3.0): folders with meta/info.json, parquet files
    of states and actions, images or videos of each camera, and an instruction for each episode."""

    kind: Literal["episodes"]
    train: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Folders, relative to the working folder; "simulated-arm" means demonstrations that are made: an arm of two links
    touches the disc of the colour that it is told."""
    validation: Fraction | Annotated[list[Text], Field(min_length=1, max_length=1000)] = 0.05
    """The share of episodes (by a hash of their content) held out for validation, or folders; 0 holds out none."""
    cameras: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    """Names of the cameras, one for each of the model's views and in their order. Default: all, by name."""
    state: Text = "observation.state"
    """Column of the robot's own state."""
    action: Text = "action"
    """Column of what was done."""
    normalization: Literal["mean_std", "min_max", "none"] = "mean_std"
    """How states and actions are scaled, by what the training episodes hold: to a mean of 0 and a deviation of 1, to
    -1 .. 1, or not at all. Checkpoints hold the numbers."""
    tokenizer: Text = "bytes"
    """Of instructions: "bytes" (vocabulary of 256), or the path of a Hugging Face tokenizer.json or
    of its folder."""
    sequence_length: Size
    """Tokens of an instruction; shorter ones are filled up."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What happens to an episode with numbers that are not finite, or images that are not as they should be: the run
    does not start, and file and episode are named; or it is left out, and counted in the log."""
    simulated_episodes: Count = 500
    """Episodes of "simulated-arm"."""
    cache: Text = ".cache/scaling"
    """Folder of the decoded images, keyed by the folder's files, and of what vision makes of them; safe to delete."""
    cache_features: bool = False
    """Ask a frozen `model.vision` once about each image, before the first step, and train from its answers, which are
    kept in `cache`, keyed by the images, its weights and the precision. Same losses; takes disk in place of time."""

    @property
    def simulated_folder(self) -> str:
        """Path of the demonstrations of "simulated-arm", once they are made."""
        return f"{self.cache}/{SIMULATED_ARM}-1-{self.simulated_episodes}"


def caches_features(data: "Data") -> bool:
    """Whether samples hold what a frozen vision made of their images, in place of the images."""
    return isinstance(data, EpisodeData) and data.cache_features


class FactoryData(Section):
    """Data of your own: the function `target`, called with `arguments`, returns a data set with `__len__` and
    `__getitem__` (as torch.utils.data.Dataset), or two of them, the second one for validation.

    Items are collated as torch's DataLoader does it. Items that are {"inputs", "targets"} of token ids are text, for
    every objective for text; for all others `objective` is a factory's as well, and its loss gives a number for each
    sample: [micro_batch].
    """

    kind: Literal["factory"]
    target: Target
    """Where the function is, "package.module:function"; the working folder is looked in first. Its package must be
    allowed on the command line (--allow-import)."""
    arguments: dict[str, Any] = {}
    """Its keyword arguments."""
    sequence_length: Size = 1
    """Tokens in one sample, which throughput is counted by; 1 where samples are no text."""


def packs(data: "Data") -> bool:
    """Whether samples hold several texts each, which do not see one another."""
    return isinstance(data, ChatData) and data.packing


class SyntheticData(Section):
    """Made samples with a pattern that can be learnt, for tests and for benchmarks of speed; no file is read.

    Token sequences; for a vla images, instructions and states, with actions that follow from all three.
    """

    kind: Literal["synthetic"]
    samples: Count = 1_000_000
    """Training samples in one epoch; each is a pure function of the seed and its index."""
    validation_samples: Annotated[int, Field(ge=0, le=2**40)] = 256
    """Samples of the validation set."""
    masked_fraction: Fraction = 0.0
    """Mean share of masked targets (of a vla: of padding at the end of a chunk of actions); it varies from sample to
    sample, so that means of means would show."""
    sequence_length: Size
    """Tokens in one sample; of a vla: in its instruction."""
    sequence_curriculum: SequenceCurriculum | None = None
    """As of text."""


Data = Annotated[
    TextData | TokenData | ChatData | PreferenceData | EpisodeData | SyntheticData | FactoryData,
    Field(discriminator="kind"),
]


def curriculum_of(data: "Data") -> SequenceCurriculum | None:
    """By what the sequences of `data` grow; None where they do not."""
    return data.sequence_curriculum if isinstance(data, TextData | TokenData | SyntheticData) else None


# ---------------------------------------------------------------- batch, optimizer, groups, schedule


class Batch(Section):
    """Sequences per optimizer step: global = micro x world size x accumulation, exactly."""

    global_batch_size: Count | Auto | None = None
    """Sequences per optimizer step over all ranks; stays the same at any world size."""
    global_batch_tokens: Count | None = None
    """Tokens per optimizer step, in place of global_batch_size; a multiple of the sequence length."""
    micro_batch_size: Count | Auto = "auto"
    """Sequences per forward pass on one rank; what memory depends on. "auto": what the other two sizes leave; where
    accumulation is "auto" as well, the fastest that fits, found when training starts."""
    gradient_accumulation_steps: Count | Auto = "auto"
    """Forward and backward passes per optimizer step on each rank. "auto": what the other two sizes leave."""

    def contradictions(self) -> Iterator[str]:
        if self.global_batch_tokens is not None and self.global_batch_size is not None:
            yield (
                "`global_batch_tokens` must not be set together with global_batch_size, "
                f"but they are {self.global_batch_tokens} and {self.global_batch_size!r}; drop one"
            )
        whole = self.global_batch_tokens or self.global_batch_size or "auto"
        sizes = {
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        unknown = [name for name, value in sizes.items() if value == "auto"]
        if whole == "auto" and unknown:
            yield (
                "`global_batch_size` must be a number, or both micro_batch_size and gradient_accumulation_steps, but "
                f'{" and ".join(["global_batch_size", *unknown])} are "auto" or absent; set one of them'
            )


class AdamW(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), torch's implementation on every backend."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive
    """Peak learning rate, before lr_scaling; a group may set its own."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment. Default: as GPT-3 and Llama."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Share of each weight taken off per step, times the LR. Default: as GPT-3 and Llama."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay applies to: all tensors, or those of two or more dimensions (no norms and biases)."""


class ParamGroup(Section):
    """One rule: the parameters that match it and no earlier rule train with these settings."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    """What logs and tables call the group."""
    match: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """Globs over parameter names; `*` also crosses dots. Each must match something."""
    lr: Positive | None = None
    """Peak learning rate of the group. Default: the optimizer's."""
    weight_decay: NonNegative | None = None
    """Default: the optimizer's."""
    betas: tuple[Beta, Beta] | None = None
    """Default: the optimizer's."""
    freeze: bool = False
    """Not trained: no gradient and no optimizer state."""

    def contradictions(self) -> Iterator[str]:
        given = [name for name in ("lr", "weight_decay", "betas") if getattr(self, name) is not None]
        if self.freeze and given:
            yield (f"`{given[0]}` must not be set on a frozen group, but is; drop it or `freeze`")


class LRScaling(Section):
    """How the learning rates change with the size of the job."""

    rule: Literal["none", "linear", "sqrt"] = "none"
    """Factor on every LR: none 1; linear r; sqrt the root of r, where r is this job's size over the reference's."""
    reference_world_size: Count | None = None
    """The number of ranks that the LRs in this spec were found at."""
    reference_global_batch_size: Count | None = None
    """The global batch (sequences) that the LRs in this spec were found at."""

    def contradictions(self) -> Iterator[str]:
        given = [self.reference_world_size, self.reference_global_batch_size]
        if self.rule != "none" and (given[0] is None) == (given[1] is None):
            yield (
                f"exactly one of `reference_world_size` and `reference_global_batch_size` must be set for rule "
                f'"{self.rule}", but {"neither" if given[0] is None else "both"} is; set the one the LR was found at'
            )


class Schedule(Section):
    """What all schedules share: linear warm-up from 0, then the curve of its kind down to min_lr_ratio."""

    warmup_steps: Annotated[int, Field(ge=0, le=2**40)] = 0
    """Optimizer steps over which the LR rises linearly to its peak; step 0 trains at peak / warmup_steps."""


class Constant(Schedule):
    """The peak LR to the end."""

    kind: Literal["constant"]


class Linear(Schedule):
    """Straight from the peak to min_lr_ratio x peak at step max_steps."""

    kind: Literal["linear"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The LR that the curve ends at, over the peak LR."""


class Cosine(Schedule):
    """Half a cosine from the peak to min_lr_ratio x peak at step max_steps (Loshchilov and Hutter, 2017)."""

    kind: Literal["cosine"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The LR that the curve ends at, over the peak LR. Default: as GPT-3."""


class CosineWithRestarts(Schedule):
    """Several half cosines of equal length, each starting at the peak again."""

    kind: Literal["cosine_with_restarts"]
    cycles: Count
    """Number of half cosines after the warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The lowest LR over the peak LR."""


class WSD(Schedule):
    """Warm-up, stable, decay: the peak LR until decay_steps before the end, then straight down (Hu et al., 2024)."""

    kind: Literal["wsd"]
    decay_steps: Count
    """Optimizer steps of the final descent."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The LR that the curve ends at, over the peak LR."""


AnySchedule = Annotated[Constant | Linear | Cosine | CosineWithRestarts | WSD, Field(discriminator="kind")]


# ---------------------------------------------------------------- backend


class Single(Section):
    """One process on one device, no sharding."""

    kind: Literal["single"]

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return False


class DDP(Section):
    """Every rank holds everything; gradients are averaged (torch DistributedDataParallel)."""

    kind: Literal["ddp"]
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: whole on every rank (replicate, the default), as all others here."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return False

    def contradictions(self) -> Iterator[str]:
        if self.frozen == "shard":
            yield (
                '`frozen` must be "replicate" or null for ddp, where every rank holds all parameters, but is '
                '"shard"; drop it, or set `backend` to {"kind": "fsdp"}'
            )


class FSDP(Section):
    """Parameters, gradients and optimizer state cut over the ranks (torch FSDP2, `fully_shard`)."""

    kind: Literal["fsdp"]
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass and gather them again in the backward pass (as ZeRO-3);
    false keeps them in between (as ZeRO-2): more memory, less communication."""
    replicate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Hybrid sharding (HSDP): this many replicas, each sharded over world size / replicate ranks."""
    cpu_offload: bool = False
    """Keep the sharded parameters, gradients and optimizer state in host memory."""
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: cut over the ranks and gathered as all others (shard, the default), or
    whole on every rank's device, in the precision that computes (replicate): more memory, less communication."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return self.frozen != "replicate"


class DeepSpeed(Section):
    """DeepSpeed ZeRO. Sizes are elements, not bytes, and have DeepSpeed's own names."""

    kind: Literal["deepspeed"]
    zero_stage: Annotated[int, Field(ge=1, le=3)]
    """What is cut over the ranks: 1 optimizer state, 2 gradients too, 3 parameters too. (For 0 use `ddp`.)"""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer state and its step live in place of the GPU; nvme wants stage 3 and nvme_path."""
    offload_parameters: Literal["cpu", "nvme"] | None = None
    """Where the parameter shards of stage 3 live in place of the GPU."""
    nvme_path: Text | None = None
    """Folder on a fast local disk, for the nvme offloads."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on; takes a second reduce bucket."""
    reduce_bucket_size: Annotated[int, Field(ge=1024, le=2**40)] = 50_000_000
    """Gradient elements reduced at a time. Default: 100 MB of bf16, which fills a network; a tenth of DeepSpeed's."""
    allgather_bucket_size: Annotated[int, Field(ge=1024, le=2**40)] | None = None
    """Stages 1 and 2: parameter elements gathered at a time after the step. Default: as reduce_bucket_size."""
    prefetch_bucket_size: Elements | None = None
    """Stage 3: parameter elements fetched ahead of use. Default: 50,000,000, DeepSpeed's own."""
    param_persistence_threshold: Elements | None = None
    """Stage 3: tensors up to this many elements stay whole on every rank. Default: 100,000, DeepSpeed's own."""
    max_live_parameters: Elements | None = None
    """Stage 3: gathered elements alive at a time. Default: 1,000,000,000, DeepSpeed's own."""
    max_reuse_distance: Elements | None = None
    """Stage 3: parameters used again within so many elements are not freed. Default: 1,000,000,000, DeepSpeed's own."""
    sub_group_size: Annotated[int, Field(ge=1024, le=2**40)] | None = None
    """Stage 3: elements that the optimizer updates at a time. Default: 1,000,000,000, DeepSpeed's own."""
    zero_hpz_partition_size: Count | None = None
    """Stage 3: ranks in a secondary partition (ZeRO++ hpZ), usually those of a node; divides the world size."""
    frozen: Literal["shard", "replicate"] | None = None
    """Where parameters that do not train are: cut over the ranks and gathered as all others (shard, stage 3 alone), or
    whole on every rank's device, in the precision that computes (replicate). Default: shard at stage 3, replicate at
    stages 1 and 2."""

    @property
    def shards_frozen(self) -> bool:
        """Whether parameters that do not train are cut over the ranks."""
        return self.zero_stage == 3 and self.frozen != "replicate"

    def contradictions(self) -> Iterator[str]:
        stage3 = [
            *("offload_parameters", "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters"),
            *("max_reuse_distance", "sub_group_size", "zero_hpz_partition_size"),
        ]
        for name in stage3 if self.zero_stage < 3 else ["allgather_bucket_size"]:
            if getattr(self, name) is not None:
                right = "stage 3" if self.zero_stage < 3 else "stages 1 and 2"
                yield (
                    f"`{name}` must be absent at ZeRO stage {self.zero_stage}, but is {getattr(self, name)!r}: "
                    f"DeepSpeed would ignore it; drop it or use {right}"
                )
        if self.frozen == "shard" and self.zero_stage < 3:
            yield (
                f'`frozen` must be "replicate" or null at ZeRO stage {self.zero_stage}, where every rank holds all '
                'parameters, but is "shard"; drop it or use stage 3'
            )
        if self.offload_optimizer == "nvme" and self.zero_stage < 3:
            yield (
                f'`offload_optimizer` must be "cpu" or null at ZeRO stage {self.zero_stage}, but is "nvme"; use stage 3'
            )
        wants_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if wants_nvme != (self.nvme_path is not None):
            yield (
                "`nvme_path` must be set when, and only when, something is offloaded to nvme, but "
                + (
                    "is absent; name a folder on a local disk"
                    if self.nvme_path is None
                    else f"is '{quoted(self.nvme_path)}'; drop it"
                )
            )


Backend = Annotated[Single | DDP | FSDP | DeepSpeed, Field(discriminator="kind")]


# ---------------------------------------------------------------- the rest


class Validation(Section):
    """When and on how much the validation loss is measured."""

    interval: Count
    """Optimizer steps between two validations; one more follows the last step."""
    batches: Count
    """Size of the fixed validation set, in global batches, as far as the data have that many samples."""


Seconds = Annotated[float, Field(gt=0, le=1e7)]


class Checkpoint(Section):
    """When the state of training is saved, and which of the saved states are kept."""

    interval: Count = 1000
    """Optimizer steps between two checkpoints; one more follows the last step."""
    keep_last: Annotated[int, Field(ge=1, le=2**20)] | None = 5
    """Checkpoints kept, the newest ones; null keeps all. Two or more leave another where the newest is damaged."""
    permanent: Annotated[list[Count], Field(max_length=10_000)] = []
    """Steps that are saved, and kept for ever."""
    best: bool = True
    """Save after each validation that is better than all before, and keep it: checkpoints/best names it."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in host memory; false makes training wait."""
    restart_limit: Annotated[int, Field(ge=1, le=2**20)] | None = 3
    """A run that is started again this many times after a failure, with no newer checkpoint in between, ends with exit
    code 7; null lets it try for ever."""
    grace: Seconds | None = None
    """Seconds that the scheduler gives between asking a run to stop and killing it. A stop that finds less of them left
    than the save before took begins none, and ends with exit code 143; null: it always saves."""


class Timeouts(Section):
    """How long a rank may go without a sign of life, by phase, before its watchdog ends the run with exit code 8.

    Within a step every part of every micro-batch is a sign, within a validation every batch.
    """

    startup: Seconds = 3600.0
    """Until the first step: tokenising, building, reading a checkpoint; seconds, as all of these."""
    first_step: Seconds = 1800.0
    """The first step of a start, which compiles."""
    step: Seconds = 600.0
    """A part of a later step."""
    validation: Seconds = 600.0
    """A batch of a validation."""
    save: Seconds = 1800.0
    """Copying the state for a checkpoint, and waiting for the one before or the last one to be written."""
    closing: Seconds = 600.0
    """From the last step to the end of the process."""


class Profile(Section):
    """What is recorded while training."""

    interval: Count = 10
    """Optimizer steps between two lines of metrics.jsonl; the last step is always recorded."""
    log_gradients: bool = False
    """At each of these lines also the norm of the gradient of each block, of each module outside of them (embeddings,
    norm, head) and of each parameter group, before clipping."""
    trace_steps: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """First and last step of a trace by torch.profiler, for Perfetto or chrome://tracing; written to traces/ of the run
    folder, for each rank. Null: none."""
    memory_step: Count | None = None
    """At this step every tensor is counted by what it is (parameters, gradients, activations, …), on rank 0, into
    memory.json; that step is slow. Null: never."""
    memory_snapshot: bool = False
    """On a GPU record every allocation, and write torch's snapshot for https://pytorch.org/memory_viz to memory/ of the
    run folder: after the first record, and where memory runs out."""
    device_interval: Seconds = 1.0
    """Seconds between two readings of the GPU (power, temperature, clocks) in the background."""
    hardware: Text | None = None
    """File of `scaling.calibrate` for this machine, to tell speed against what it measured; null: against the card's
    dense peak alone."""

    def contradictions(self) -> Iterator[str]:
        if self.trace_steps is not None and self.trace_steps[0] > self.trace_steps[1]:
            first, last = self.trace_steps
            yield f"`trace_steps` must be its first and its last step, but is [{first}, {last}]; use [{last}, {first}]"
        if self.trace_steps is not None and self.trace_steps[1] - self.trace_steps[0] >= MOST_TRACED:
            yield (
                f"`trace_steps` must be at most {MOST_TRACED} steps, but is {self.trace_steps}: a trace holds every "
                f"kernel; use [{self.trace_steps[0]}, {self.trace_steps[0] + 2}]"
            )


MOST_TRACED = 100
"""Steps of a trace: what viewers still open."""


class Wandb(Section):
    """A run of Weights & Biases (pip install wandb; its key comes from its own login, never from here)."""

    project: Text
    """Where the run is listed."""
    entity: Text | None = None
    """User or team; null: its default."""
    group: Text | None = None
    """Runs of one experiment, shown together; null: none."""
    tags: Annotated[list[Text], Field(max_length=100)] = []
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """offline: into the run folder alone, for `wandb sync`."""


class Prometheus(Section):
    """An address that says the newest record in Prometheus' text format, at /metrics."""

    port: Annotated[int, Field(ge=0, le=65535)]
    """0: any free one; the log says which."""
    host: Text = "127.0.0.1"
    """Address to listen on: this machine alone, unless you ask for more ("0.0.0.0")."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: Wandb | None = None
    """Null: nothing is sent to Weights & Biases."""
    prometheus: Prometheus | None = None
    """Null: nothing listens."""


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


class Spec(Section):
    """One training job."""

    schema_: Text | None = Field(default=None, alias="$schema")
    """Path or address of the JSON Schema, for editors."""
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run: its folder is runs/NAME."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1337
    """Of the initial weights, the data order and dropout."""
    model: Model
    lora: Lora | None = None
    """Train low-rank adapters in place of the model's own weights, which are frozen then whatever `param_groups` say.
    Null: no adapters."""
    objective: Objective = CausalLM()
    data: Data
    batch: Batch
    optimizer: AdamW
    param_groups: Annotated[list[ParamGroup], Field(min_length=1, max_length=1000)] = [
        ParamGroup(name="all", match=["*"])
    ]
    """Rules in order: the first that matches a parameter decides. Default: one group of everything."""
    lr_scaling: LRScaling = LRScaling()
    schedule: AnySchedule = Constant(kind="constant")
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of parameters in the forward and backward pass; master weights, moments and reductions are fp32 always."""
    backend: Backend = FSDP(kind="fsdp")
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What each block keeps for its backward pass: everything; matrix products and attention; or its input alone."""
    compile: bool = False
    """torch.compile each block."""
    max_steps: Count | None = None
    """Optimizer steps to train; or give `epochs`."""
    epochs: Positive | None = None
    """Passes over the training samples, in place of max_steps; the number of steps is rounded down."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this global 2-norm; null leaves them."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a loss or gradient that is not finite on some rank; its update is applied on none. stop: the run
    ends with exit code 4; skip: it goes on with the next batch; rollback: it goes back to the last checkpoint, and
    passes over that batch when it comes there again."""
    nonfinite_limit: Count = 5
    """skip and rollback end the run, as stop does, at more than this many such steps in a row."""
    initialize_from: Text | None = None
    """Weights to start from, with a fresh optimizer and at step 0: a checkpoint or a run folder of this project, or a
    Hugging Face folder or file of safetensors. A run that has a checkpoint of its own goes on from that instead."""
    initialize_parts: Annotated[list[PartWeights], Field(max_length=3)] = []
    """Weights that parts of a vla start from, in place of `initialize_from`; others start from fresh values."""
    validation: Validation | None = None
    """Null: no validation."""
    checkpoint: Checkpoint | None = Checkpoint()
    """Null: nothing is saved."""
    timeouts: Timeouts = Timeouts()
    profile: Profile = Profile()
    tracking: Tracking = Tracking()

    def contradictions(self) -> Iterator[str]:
        yield from self._adapters()
        yield from self._parts()
        if (self.max_steps is None) == (self.epochs is None):
            both = self.max_steps is not None
            yield (
                f"exactly one of `max_steps` and `epochs` must be set, but {'both are' if both else 'neither is'}; "
                + ("drop one" if both else "set max_steps")
            )
        decay = self.schedule.decay_steps if isinstance(self.schedule, WSD) else 0
        needed = self.schedule.warmup_steps + decay
        if self.max_steps is not None and needed > self.max_steps:
            yield (
                f"`schedule.warmup_steps`{' + decay_steps' if decay else ''} must be at most max_steps "
                f"({self.max_steps}), but is {needed}; shorten it or train longer"
            )
        yield from self._curriculum()
        yield from self._model_and_data()
        yield from self._model_and_objective()
        backend = self.backend
        if (
            isinstance(backend, DeepSpeed)
            and backend.shards_frozen
            and backend.offload_parameters == "nvme"
            and backend.prefetch_bucket_size != 0
            and (self.lora is not None or any(group.freeze for group in self.param_groups))
        ):
            yield (
                "`backend.prefetch_bucket_size` must be 0 where something is frozen and parameters are on nvme, but is "
                f"{backend.prefetch_bucket_size}: DeepSpeed 0.19 reads a frozen one twice into one buffer; set it to "
                '0, or `backend.frozen` to "replicate"'
            )
        if self.profile.memory_step is not None and self.compile:
            yield (
                f"`profile.memory_step` must be null where blocks are compiled, but is {self.profile.memory_step}: "
                "what a compiled kernel makes cannot be counted; set `compile` to false for it"
            )
        if self.on_nonfinite == "rollback" and self.checkpoint is None:
            yield '`on_nonfinite` must be "stop" or "skip" where nothing is saved, but is "rollback"; set `checkpoint`'
        names = [group.name for group in self.param_groups]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"`param_groups` must have distinct names, but '{quoted(name)}' stands more than once; rename one"
        if isinstance(self.data, FactoryData):
            return  # what it holds out it says itself
        held_out = self.data.validation_samples if isinstance(self.data, SyntheticData) else self.data.validation
        if self.validation is not None and held_out == 0:
            yield "`validation` must be null when no data are held out, but is set; set `data.validation` to 0.05, say"

    def _parts(self) -> Iterator[str]:
        named = [one.part for one in self.initialize_parts]
        if named and not isinstance(self.model, Vla):
            yield f'`initialize_parts` must be empty for a model of kind "{self.model.kind}", but is not; drop it'
        elif named and self.initialize_from is not None:
            yield "`initialize_parts` must be empty where `initialize_from` gives all weights, but is not; drop one"
        for part in dict.fromkeys(part for part in named if named.count(part) > 1):
            yield f'`initialize_parts` must name a part once, but names "{part}" more often; drop one'

    def _adapters(self) -> Iterator[str]:
        lora, model = self.lora, self.model
        if lora is not None and not isinstance(model, Decoder | HuggingFace):
            yield f'`lora` must be null for a model of kind "{model.kind}", but is set; set it to null'
        elif lora is not None and isinstance(model, Decoder) and lora.target_modules != "all-linear":
            known, named = model.linear_layers, lora.target_modules
            for index in [index for index, name in enumerate(named) if name not in known]:
                yield (
                    f"`lora.target_modules.{index}` must be a linear layer of the model's blocks, but is "
                    f"'{quoted(named[index])}'; use some of {', '.join(known)}, or \"all-linear\" in place of the list"
                )

    def _curriculum(self) -> Iterator[str]:
        grows, longest = curriculum_of(self.data), self.data.sequence_length
        if grows is None:
            return
        if isinstance(self.model, Vla):
            yield (
                '`data.sequence_curriculum` must be null for a model of kind "vla", whose samples cannot be cut, '
                "but is set; drop it"
            )
        if longest % grows.min_length or longest == grows.min_length:
            shorter = [length for length in _divisors(longest) if length < longest]
            near = [length for length in shorter if length <= grows.min_length][-1:]
            near += [length for length in shorter if length > grows.min_length][:1]
            yield (
                f"`data.sequence_curriculum.min_length` must divide data.sequence_length ({longest}) and be less, "
                f"but is {grows.min_length}; "
                + (f"use {' or '.join(map(str, near))}" if near else "lengthen data.sequence_length")
            )
        if self.max_steps is not None and grows.steps > self.max_steps:
            yield (
                f"`data.sequence_curriculum.steps` must be at most max_steps ({self.max_steps}), but is {grows.steps}; "
                "shorten it or train longer"
            )

    def _model_and_data(self) -> Iterator[str]:
        model, data = self.model, self.data
        if isinstance(data, EpisodeData) and not isinstance(model, Vla):
            yield (
                f'`data.kind` must be one of text for a model of kind "{model.kind}", but is "episodes"; '
                "change one of them"
            )
        if isinstance(model, Recorded):
            return  # how many words it knows, and how long a text it reads, is not in the spec
        reader, field = (model.language, "model.language") if isinstance(model, Vla) else (model, "model")
        if data.sequence_length > reader.max_position_embeddings:
            yield (
                f"`data.sequence_length` must be at most {field}.max_position_embeddings "
                f"({reader.max_position_embeddings}), but is {data.sequence_length}; change one of them"
            )
        in_bytes = not isinstance(data, TokenData | SyntheticData | FactoryData) and data.tokenizer == "bytes"
        if in_bytes and reader.vocab_size < 256:
            yield (
                f'`{field}.vocab_size` must be at least 256 for the tokenizer "bytes", '
                f"but is {reader.vocab_size}; set it to 256"
            )
        if isinstance(model, Vla) and not isinstance(data, EpisodeData | SyntheticData | FactoryData):
            yield (
                f'`data.kind` must be "episodes" or "synthetic" for a model of kind "vla", but is "{data.kind}": text '
                "has neither images nor actions; change one of them"
            )

    def _model_and_objective(self) -> Iterator[str]:
        model, objective = self.model, self.objective
        wanted = ("behaviour_cloning",) if isinstance(model, Vla) else ("causal_lm", "sft")
        if not isinstance(model, Vla):
            wanted += ("dpo",)
        if isinstance(model, Decoder):
            wanted += ("ppo",)
        if not isinstance(objective, Factory) and objective.kind not in wanted:
            *most, last = [f'"{kind}"' for kind in wanted]
            either = f"{', '.join(most)} or {last}" if most else last
            yield (
                f'`objective.kind` must be {either} for a model of kind "{model.kind}", but is "{objective.kind}"; '
                f'set `objective` to {{"kind": "{wanted[0]}"}}'
            )
        elif isinstance(objective, SFT) and not isinstance(self.data, ChatData):
            yield (
                f'`data.kind` must be "chat" for the objective "sft", but is "{self.data.kind}", which does not say '
                'whose words are whose; change it, or set `objective` to {"kind": "causal_lm"}'
            )
        elif isinstance(objective, DPO) != isinstance(self.data, PreferenceData) and not isinstance(objective, Factory):
            fitting = "preference" if isinstance(objective, DPO) else "chat"
            yield (
                f'`data.kind` must be "preference" for the objective "dpo" and no other, but is "{self.data.kind}" for '
                f'"{objective.kind}"; set it to "{fitting}", or change `objective`'
            )
        yield from self._sampling()
        if isinstance(self.data, ChatData) and self.data.packing and not isinstance(model, Decoder):
            yield (
                f'`data.packing` must be false for a model of kind "{model.kind}", but is true: it cannot keep '
                "conversations apart; set it to false"
            )
        if isinstance(model, Vla) and isinstance(objective, BehaviourCloning):
            head = "velocity" if objective.loss == "flow_matching" else "direct"
            if model.action.head != head:
                yield (
                    f'`model.action.head` must be "{head}" for the loss "{objective.loss}", '
                    f'but is "{model.action.head}"; change one of them'
                )

    def _sampling(self) -> Iterator[str]:
        """What ppo wants of the other sections, and what no other objective wants."""
        model, objective, data = self.model, self.objective, self.data
        if isinstance(model, Decoder) and model.value_head != isinstance(objective, PPO):
            wanted = "true" if isinstance(objective, PPO) else "false"
            yield (
                f'`model.value_head` must be {wanted} for the objective "{objective.kind}", but is '
                f"{str(model.value_head).lower()}; set it to {wanted}"
            )
        if not isinstance(objective, PPO):
            return
        if not isinstance(data, ChatData) or data.packing:
            found = f"packed {data.kind}" if isinstance(data, ChatData) else data.kind
            yield (
                f'`data.kind` must be "chat", without packing, for the objective "ppo", but is {found}; set it, and '
                "`data.packing` to false"
            )
        if objective.max_new_tokens >= data.sequence_length:
            yield (
                f"`objective.max_new_tokens` must be less than data.sequence_length ({data.sequence_length}), for "
                f"prompts to have room, but is {objective.max_new_tokens}; lower it or lengthen the sequence"
            )
        if self.compile:
            yield (
                '`compile` must be false for the objective "ppo", whose sampling has another shape with each token, '
                "but is true; set it to false"
            )

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values, every default spelt out; `Spec` parses it back to an equal value."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=False)


def _nearest_multiples(value: int, step: int) -> str:
    low = value - value % step
    return f"{low} or {low + step}" if low else f"{step}"


def _divisors(value: int) -> list[int]:
    return [d for d in range(1, min(value, 4096) + 1) if value % d == 0]
