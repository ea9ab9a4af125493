"""What is learnt from."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from scaling.spec.sections.base import Count, Fraction, Section, Size, Target, Text


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
