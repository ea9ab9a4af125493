"""A whole training step of one rank, played: what it holds before, in forward and backward passes, in the update."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.estimate import policy, vla
from scaling.estimate.decoder import PlayedDecoder
from scaling.estimate.deepspeed_engines import BF16, ZeRO3, ZeRO12
from scaling.estimate.ops import FLOAT, LONG, Ops, Shape
from scaling.estimate.replay import Replay, recorded_ledger
from scaling.estimate.tape import Storage, Tape, Value, backward
from scaling.estimate.torch_engines import DDP, FSDP, Single
from scaling.groups import Group
from scaling.inventory import attended_length, feature_bytes, inventory_of, sequences, still, text_length
from scaling.records import BatchPlan
from scaling.spec.sections import DDP as DDPSpec
from scaling.spec.sections import (
    DPO,
    PPO,
    Decoder,
    FactoryModel,
    HuggingFace,
    HuggingFaceVla,
    Spec,
    Vla,
    caches_features,
    in_chunks,
    packs,
)
from scaling.spec.sections import FSDP as FSDPSpec
from scaling.spec.sections import DeepSpeed as DeepSpeedSpec
from scaling.units import WIDTHS


@dataclass(frozen=True)
class Cast:
    """Who plays a step: this project's own code, or in benchmarks another's."""

    ops: type[Ops] = Ops
    decoder: type[PlayedDecoder] = PlayedDecoder
    engine: type[Single] | None = None
    """None: the one of the spec's backend."""

    def engine_for(self, spec: Spec) -> type[Single]:
        """The engine that is played for a spec."""
        return self.engine or engine_of(spec)


OWN = Cast()


def engine_of(spec: Spec) -> type[Single]:
    """The engine that is played for a spec."""
    match spec.backend:
        case DeepSpeedSpec():
            return _zero_engine(spec, spec.backend)
        case FSDPSpec():
            return FSDP
        case DDPSpec():
            return DDP
        case _:
            return Single


def _zero_engine(spec: Spec, backend: DeepSpeedSpec) -> type[Single]:
    """As DeepSpeed chooses."""
    if backend.zero_stage == 3:
        return ZeRO3
    return BF16 if backend.zero_stage == 1 and spec.precision == "bf16" and not backend.offload_optimizer else ZeRO12


def batch_sizes(spec: Spec, plan: BatchPlan, *, cuda: bool) -> list[int]:
    """Bytes of each tensor of a step's micro-batches; a vla's are on a GPU one at a time."""
    match spec.model:
        case Decoder() if isinstance(spec.objective, PPO):  # on a GPU one at a time
            tokens = plan.micro_batch * plan.sequence_length
            return [width * tokens for width in policy.BATCH] * (1 if cuda else plan.accumulation)
        case Decoder() | FactoryModel() | HuggingFace():
            sizes = [LONG * plan.micro_batch * plan.sequence_length] * (3 if packs(spec.data) else 2)
            if isinstance(spec.objective, DPO):  # what the reference makes of each
                sizes.append(FLOAT * plan.micro_batch * sequences(spec))
            return sizes * plan.accumulation
        case Vla() | HuggingFaceVla() as model:
            text = text_length(model, plan.sequence_length)
            features = feature_bytes(model, spec.precision) if caches_features(spec.data) else None
            return vla.batch_sizes(model, plan.micro_batch, text, features) * (1 if cuda else plan.accumulation)


def _played_model(
    spec: Spec, frozen: Collection[str], ops: Ops, engine: Single, cast: Cast
) -> PlayedDecoder | vla.PlayedVla | Replay:
    checkpointing, compiled = spec.activation_checkpointing, spec.compile and ops.cuda
    match spec.model:
        case Decoder() as model:
            chunked = in_chunks(spec.objective)
            return cast.decoder(
                *(model, ops, engine),
                chunked=chunked,
                checkpointing=checkpointing,
                compiled=compiled,
                lora=spec.lora,
                packed=packs(spec.data) or isinstance(spec.objective, PPO),
                compares=isinstance(spec.objective, DPO),
                by_token=isinstance(spec.objective, PPO),
            )
        case Vla() as model:
            parts = still(model, frozen)
            return vla.PlayedVla(
                *(model, spec.objective, ops, engine),
                still=parts,
                checkpointing=checkpointing,
                compiled=compiled,
                features=caches_features(spec.data),
            )
        case FactoryModel() | HuggingFace() | HuggingFaceVla() as model:
            ledger = recorded_ledger(spec, model, frozen)
            kernels, recorded = "gpu" if ops.cuda else "cpu", ledger["events"]
            if ops.zero3_linear:
                kernels = next(name for name in (f"{kernels}-zero3", kernels) if name in recorded)
            return Replay(recorded[kernels][checkpointing], ops, engine, inventory_of(model).buffer_bytes)


def play(
    spec: Spec,
    plan: BatchPlan,
    groups: Sequence[Group],
    rendered: dict[str, Any],
    *,
    cuda: bool = False,
    rough: int = 0,
    cast: Cast = OWN,
) -> Tape:
    """A step of rank 0 once Adam has its moments; with the kernels of a CPU, or of a GPU.

    `rough` as in `Ops`: without what the batch itself takes.
    """
    tape = Tape()
    shape = Shape(plan.micro_batch * sequences(spec), attended_length(spec), WIDTHS[spec.precision])
    ops = cast.ops(tape, shape, cuda=cuda, rough=rough)
    engine = cast.engine_for(spec)(ops, spec, groups, rendered, plan)
    frozen = {name for group in groups if group.frozen for name in group.names}
    model = _played_model(spec, frozen, ops, engine, cast)
    rollouts = _Rollouts(spec, plan, ops, engine, model)
    held: list[Storage] = []
    if not rough:
        with tape.during("data", "activations"):
            held = [Storage(tape, size) for size in batch_sizes(spec, plan, cuda=cuda)]
    # Targets, scale and loss of the step; of the step before, what the optimizer was given.
    held += [Storage(tape, FLOAT, "other") for _ in range(3)] + [Storage(tape, FLOAT, "workspace") for _ in range(2)]
    loss: Value | None = None
    rollouts.play()
    for _ in range(engine.steps):
        for index in range(plan.accumulation):
            engine.begin(last=index == plan.accumulation - 1)
            with tape.during("forward", "activations"):
                loss = rollouts.loss(model.forward())
            with tape.during("backward", "workspace"):
                weight = Storage(tape, FLOAT)
                if isinstance(model, Replay):
                    model.backward()
                else:
                    assert loss is not None
                    node, loss = loss.node, Value(loss.storage, 1)  # the loss is held, what it came from is not
                    assert node is not None, "something trains: the spec refuses others"
                    backward(tape, node, weight)
                    del node
                del weight
                engine.end()
        with tape.during("optimizer", "workspace"):
            engine.step()
    if engine.steps > 1:
        rollouts.play()  # now that the order of a training step is known
    del held
    return tape


class _Rollouts:
    """What `ppo` plays beside a step; of other objectives nothing."""

    def __init__(
        self,
        spec: Spec,
        plan: BatchPlan,
        ops: Ops,
        engine: Single,
        model: PlayedDecoder | vla.PlayedVla | Replay,
    ) -> None:
        self._objective, self._ops, self._engine, self._model = spec.objective, ops, engine, model
        self._answers = 0
        if not isinstance(spec.objective, PPO):
            return
        self._answers = 0 if ops.rough else policy.answers_bytes(spec.objective, plan)
        with ops.tape.during("build", "other"):
            self._reference = [ops.held(count, FLOAT, "other", on_host=True) for count in engine.masters()]
            engine.fill()
            if not ops.rough:
                kept = policy.rollout_bytes(spec.objective, plan)
                self._kept = ops.held(kept, 1, "activations", on_host=True)

    def play(self) -> None:
        """A rollout."""
        if not isinstance(self._objective, PPO):
            return
        assert isinstance(self._model, PlayedDecoder), "the spec refuses others"
        with self._ops.tape.during("rollout", "activations"):
            answers = Storage(self._ops.tape, self._answers)
        policy.play_rollout(self._objective, self._ops, self._engine, self._model)
        del answers

    def loss(self, found: Value | None) -> Value | None:
        """The loss of what the model says."""
        if not isinstance(self._objective, PPO):
            return found
        assert found is not None
        return policy.policy_loss(self._ops, found)
