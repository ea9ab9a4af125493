"""One training job: its sections, and what they get wrong together."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from scaling.spec.scan import quoted
from scaling.spec.sections.backend import FSDP, Backend, DeepSpeed
from scaling.spec.sections.base import Count, Positive, Section, Text, divisors
from scaling.spec.sections.data import (
    ChatData,
    Data,
    EpisodeData,
    FactoryData,
    PreferenceData,
    SyntheticData,
    TokenData,
    curriculum_of,
)
from scaling.spec.sections.model import AnyVla, Decoder, HuggingFace, Lora, Model, PartWeights, Vla
from scaling.spec.sections.objective import DPO, PPO, SFT, BehaviourCloning, CausalLM, Factory, Objective
from scaling.spec.sections.optimization import WSD, AdamW, AnySchedule, Batch, Constant, LRScaling, ParamGroup
from scaling.spec.sections.running import Checkpoint, Profile, Timeouts, Tracking, Validation


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
        if isinstance(self.model, AnyVla):
            yield (
                f'`data.sequence_curriculum` must be null for a model of kind "{self.model.kind}", whose '
                "samples cannot be cut, but is set; drop it"
            )
        if longest % grows.min_length or longest == grows.min_length:
            shorter = [length for length in divisors(longest) if length < longest]
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
        if isinstance(data, EpisodeData) and not isinstance(model, AnyVla):
            yield (
                f'`data.kind` must be one of text for a model of kind "{model.kind}", but is "episodes"; '
                "change one of them"
            )
        if isinstance(model, AnyVla) and not isinstance(data, EpisodeData | SyntheticData | FactoryData):
            yield (
                f'`data.kind` must be "episodes" or "synthetic" for a model of kind "{model.kind}", but is '
                f'"{data.kind}": text has neither images nor actions; change one of them'
            )
        reader, field = (model.language, "model.language") if isinstance(model, AnyVla) else (model, "model")
        if not isinstance(reader, Decoder):
            return  # how many words it knows, and how long a text it reads, is not in the spec
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

    def _model_and_objective(self) -> Iterator[str]:
        model, objective = self.model, self.objective
        wanted = ("behaviour_cloning",) if isinstance(model, AnyVla) else ("causal_lm", "sft")
        if not isinstance(model, AnyVla):
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
        if isinstance(model, AnyVla) and isinstance(objective, BehaviourCloning):
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
