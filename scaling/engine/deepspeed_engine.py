"""DeepSpeed ZeRO-1, 2 and 3 behind the engine protocol. The only module that imports deepspeed."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.engine.blocks import prepare_blocks
from scaling.engine.extensions import remove_stale_locks
from scaling.engine.frozen import gather, hide_frozen, keep_whole, on_host, replica
from scaling.engine.optimizer import build_adamw, make_moments, moments, set_updates, updates
from scaling.engine.precision import DTYPES
from scaling.engine.process import Process
from scaling.engine.protocol import FlatShard
from scaling.errors import UserError
from scaling.groups import Group
from scaling.models.recipe import ModelRecipe, canonical_name
from scaling.spec.sections import DeepSpeed, Spec


def build_deepspeed(
    spec: Spec,
    backend: DeepSpeed,
    rendered: dict[str, Any],
    recipe: ModelRecipe,
    groups: Sequence[Group],
    process: Process,
) -> "DeepSpeedEngine":
    """Model, then optimizer, then `deepspeed.initialize`; then the fp32 initial values into its master weights."""
    deepspeed = import_deepspeed(process)
    _check_abilities(deepspeed, spec, backend)
    stage3 = backend.zero_stage == 3
    if stage3:
        with deepspeed.zero.Init(config_dict_or_path=rendered):
            model = recipe.build()
    else:
        with torch.device(process.device), _default_dtype(DTYPES[spec.precision]):
            model = recipe.build()
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    frozen = {name for group in groups if group.frozen for name in group.names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    if stage3 and not backend.shards_frozen:
        keep_whole(model, DTYPES[spec.precision], process.device)
        parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
        hide_frozen(model)  # DeepSpeed cuts every parameter that it finds
    _fill(deepspeed, parameters, recipe, process)
    prepare_blocks(model, recipe.blocks, checkpointing=spec.activation_checkpointing, compiled=spec.compile)
    if stage3 and (spec.compile or spec.activation_checkpointing == "selective"):
        # Parameters gathered block by block: hooks on every layer inside would break every graph, and what they run
        # would count among the operations that selective checkpointing expects to find again.
        if recipe.blocks:
            deepspeed.utils.set_z3_leaf_modules(model, {type(model.get_submodule(path)) for path in recipe.blocks})
        for block in map(model.get_submodule, recipe.blocks):
            if any(parameter.requires_grad for parameter in block.parameters()):
                block.register_forward_pre_hook(_ask_for_gradient)
    optimizer = build_adamw(parameters, groups, spec.optimizer)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=rendered, dist_init_required=False)
    engine = DeepSpeedEngine(wrapped, parameters, process, stage3=stage3)
    engine.start_from(recipe)
    return engine


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters of this type: made in fp32, the whole model would take twice the memory that it trains in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class DeepSpeedEngine:
    """A model that a DeepSpeed engine trains. See `Engine` for the contract."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], process: Process, *, stage3: bool) -> None:
        self.module: nn.Module = engine
        self._engine = engine
        self._parameters = parameters
        self._process = process
        self._stage3 = stage3
        half = engine.bfloat16_enabled() or engine.fp16_enabled()
        # In 16 bits DeepSpeed has no fp32 values of what is frozen; without them a move to another backend would round.
        self._frozen_masters = {shard.name: on_host(shard) for shard in self._frozen()} if half else {}
        if engine.fp16_enabled():
            # The loop ends a run whose scale is 1 and whose gradients are not finite, and says where they came from.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.cur_scale) if self._engine.fp16_enabled() else 1.0

    @property
    def waits_below_python(self) -> bool:
        return False

    def live_names(self) -> list[list[str]]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        found: list[list[str]] = [[] for _ in self.param_groups]
        for group, parameters in _live_groups(self._engine.optimizer):
            found[group] += [names[id(parameter)] for parameter in parameters]
        return found

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        return self._process.begin_sum(values)

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        self._engine.backward(loss * weight, scale_wrt_gas=False)

    def gradient_norms(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        # The whole gradients of bf16 at stage 1 are on every rank.
        copies = dist.get_world_size() if hasattr(self._engine.optimizer, "bf16_groups") else 1
        factor = 1.0 / (self.loss_scale * copies**0.5)
        norms = _gradient_norms(self._engine.optimizer)
        device = self._engine.device
        return {names[id(parameter)]: norm.to(device, torch.float32) * factor for parameter, norm in norms}

    def step(self) -> Tensor:
        self._engine.step()
        self._forget_refused_gradients()
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self._engine.device)
        # DeepSpeed says inf, or -1, where it refused a non-finite step.
        return torch.where(norm < 0, torch.inf, norm)

    def _forget_refused_gradients(self) -> None:
        """DeepSpeed 0.19.8 at stages 1 and 2 with offload keeps a non-finite gradient and adds later ones to it."""
        optimizer = self._engine.optimizer
        if not self._stage3 and getattr(optimizer, "cpu_offload", False) and optimizer.overflow:
            for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))

    def state(self) -> Iterator[FlatShard]:
        yield from self._frozen_masters.values() or self._frozen()
        shards = _stage3_state if self._stage3 else _stage12_state
        yield from shards(self._parameters, self._engine.optimizer)

    def counters(self) -> dict[str, float]:
        optimizer = self._engine.optimizer
        scaler = scaler_counters(optimizer.loss_scaler) if self._engine.fp16_enabled() else {}
        return {"updates": updates(optimizer.optimizer)} | scaler

    @contextlib.contextmanager
    def loading(self, counters: Mapping[str, float]) -> Iterator[None]:
        optimizer = self._engine.optimizer
        if self._stage3:
            optimizer._partition_all_parameters()  # what is gathered would outlive the shards that it came from
        for index, flat in enumerate(_flats(optimizer)):
            if not moments(optimizer.optimizer, flat):
                with _swapped_in(optimizer, index):
                    make_moments(optimizer.optimizer, flat)
        yield
        set_updates(optimizer.optimizer, counters["updates"])
        if self._engine.fp16_enabled():
            load_scaler(optimizer.loss_scaler, counters)
        refresh = _refresh_stage3 if self._stage3 else _refresh_stage12
        refresh(self._parameters, optimizer, self._frozen_masters)

    def _frozen(self) -> Iterator[FlatShard]:
        """Frozen parameters as they are kept: whole on every rank, or cut at stage 3."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                continue
            if _is_cut(parameter):
                with _partition(parameter) as part:
                    yield _stage3_shard(name, "master", parameter, part)
            else:
                yield replica(name, parameter)

    def close(self) -> None:
        self._engine.destroy()

    @torch.no_grad()
    def start_from(self, recipe: ModelRecipe) -> None:
        """Write the initial values into the fp32 masters: DeepSpeed made them of parameters rounded to 16 bits."""
        if not (self._engine.bfloat16_enabled() or self._engine.fp16_enabled()):
            return
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        values: dict[str, Tensor] = {}
        for shard in self.state():
            if shard.kind == "master":
                if shard.name not in values:
                    values = {shard.name: recipe.initial_value(shard.name, shapes[shard.name]).flatten()}
                shard.values.copy_(values[shard.name][shard.start : shard.start + shard.values.numel()])


def scaler_counters(scaler: Any) -> dict[str, float]:
    """The state of a DynamicLossScaler as `Engine.counters` says it."""
    finite = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"loss_scale": float(scaler.cur_scale), "finite_steps": float(finite)}


def load_scaler(scaler: Any, counters: Mapping[str, float]) -> None:
    """Let a DynamicLossScaler go on from `counters`; without a "loss_scale" among them, from where it is."""
    if "loss_scale" in counters:
        scaler.cur_scale = counters["loss_scale"]
        # Only the distance of the two matters.
        scaler.cur_iter, scaler.last_overflow_iter = int(counters["finite_steps"]), -1


def import_deepspeed(process: Process) -> Any:
    """The library, told what is decided already; again costs nothing."""
    # DeepSpeed guesses its device from what is installed; ours is decided already.
    os.environ.setdefault("DS_ACCELERATOR", process.device.type)
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))  # absent without a launcher, and it insists
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that newer torch versions deprecate: hundreds of lines that nobody here can act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory op serves inference alone (`inference_all_reduce`); building it takes a compiler and 40 s at
    # the first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Four reports of memory on standard output, which no setting turns off.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    deepspeed.init_distributed(dist_backend="nccl" if process.device.type == "cuda" else "gloo", verbose=False)
    if process.local_rank == 0:
        remove_stale_locks(deepspeed.ops.op_builder.all_ops.ALL_OPS)
    process.gather_objects(None)  # until then nobody compiles, so that no lock of another rank is in question
    return deepspeed


def _check_abilities(deepspeed: Any, spec: Spec, backend: DeepSpeed) -> None:
    """Refuse, as the user's matter, what DeepSpeed would refuse from its depths on this machine."""
    if spec.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError(
            '`precision` must be "bf16" or "fp32" for DeepSpeed on this device, which has no fp16, but is "fp16"; '
            "change it"
        )
    wants_nvme = "nvme" in (backend.offload_optimizer, backend.offload_parameters)
    if wants_nvme and not deepspeed.ops.__compatible_ops__.get("async_io", False):
        raise UserError(
            '`backend.offload_optimizer` and `backend.offload_parameters` must be "cpu" or null on this machine, where '
            'DeepSpeed finds no libaio, but one is "nvme"; install libaio (libaio-dev on Debian), or offload to the CPU'
        )


def _ask_for_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the gradient flow to a block's input even where nothing before it trains.

    DeepSpeed reduces a leaf module's gradients in its full backward hook, which torch calls before the module's own
    backward pass when no input wants a gradient: zeros would be reduced, and the weights freed too early.
    """
    hidden, *rest = inputs
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *rest


@torch.no_grad()
def _fill(deepspeed: Any, parameters: dict[str, nn.Parameter], recipe: ModelRecipe, process: Process) -> None:
    for name, parameter in parameters.items():
        if not _is_cut(parameter):
            parameter.copy_(recipe.initial_value(name, parameter.shape))
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if process.is_main:
                parameter.copy_(recipe.initial_value(name, parameter.shape))


def _live_groups(optimizer: Any) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """(index of the optimizer's group, parameters in it), as DeepSpeed holds them; stage 3 cuts groups into several."""
    if hasattr(optimizer, "sub_group_to_group_id"):
        yield from ((optimizer.sub_group_to_group_id[i], group) for i, group in enumerate(optimizer.fp16_groups))
    else:
        yield from enumerate(optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups)


def _flats(optimizer: Any) -> list[Tensor]:
    """This rank's fp32 masters, one tensor for each group, or sub-group at stage 3."""
    # ZeRO-3; ZeRO-1 and 2; ZeRO-1 in bf16.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _gradient_norms(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters and the norms of what this rank holds of their gradients, of which DeepSpeed takes its global norm."""
    if hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16
        held = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    elif getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        known = optimizer.norm_for_param_grads  # taken before the gradients went to the host
        parameters = [parameter for group in _held_groups(optimizer) for parameter in group]
        yield from ((one, known[optimizer.get_param_id(one)]) for one in parameters)
        return
    else:
        held = ((group, optimizer.averaged_gradients[i]) for i, group in enumerate(_held_groups(optimizer)))
    for parameters, gradients in held:
        # After the last of them may come padding.
        gradients = [gradient.float() for gradient in gradients[: len(parameters)]]
        if gradients:  # of a small group some ranks hold nothing
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            yield from zip(parameters, norms, strict=True)


def _held_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The parameters of whose gradients this rank has a part, as stages 2 and 3, and 1 but in bf16, keep them."""
    return optimizer.fp16_groups if hasattr(optimizer, "sub_group_to_group_id") else optimizer.params_in_partition


def _stage12_state(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> Iterator[FlatShard]:
    """ZeRO-1/2: what `_hp_mapping` says this rank owns of each trainable parameter."""
    flats = _flats(optimizer)
    for name, parameter in parameters.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        # Not `optim_fragment`: DeepSpeed 0.19.8 links the moments while the first group steps, when others have none.
        flat, place = flats[mapping.param_group_index], mapping.hp_fragment_address
        for kind, values in {"master": flat, **moments(optimizer.optimizer, flat)}.items():
            fragment = values.detach().narrow(0, place.start, place.numel)
            yield FlatShard(name, kind, parameter.numel(), mapping.lp_fragment_address.start, fragment)


@torch.no_grad()
def _refresh_stage12(parameters: Mapping[str, Any], optimizer: Any, frozen_masters: Mapping[str, FlatShard]) -> None:
    """Masters to the parameters of all ranks. Of a frozen one each rank has a part: rounded, they are gathered."""
    optimizer.update_lp_params()
    for name, shard in frozen_masters.items():
        gather(parameters[name], shard)


def _stage3_state(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> Iterator[FlatShard]:
    """ZeRO-3: rank r owns [r*k, (r+1)*k) of each flattened parameter; what lies beyond its end is padding.

    A sub-group that is kept on NVMe is read before its shards are handed out and written back after.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, members in enumerate(optimizer.fp16_groups):
        with _swapped_in(optimizer, index):
            flat = _flats(optimizer)[index]
            for kind, values in {"master": flat, **moments(optimizer.optimizer, flat)}.items():
                for parameter in members:
                    _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    part = values.detach().narrow(0, offset, length)
                    yield _stage3_shard(names[id(parameter)], kind, parameter, part)


@torch.no_grad()
def _refresh_stage3(parameters: Mapping[str, Any], optimizer: Any, frozen_masters: Mapping[str, FlatShard]) -> None:
    """Masters to shards, to the second shards of hpZ, to the small parameters that stay gathered."""
    for index in range(len(optimizer.fp16_groups)):
        with _swapped_in(optimizer, index):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
    for name, shard in frozen_masters.items():
        if not _is_cut(parameters[name]):
            gather(parameters[name], shard)
            continue
        with _partition(parameters[name]) as part:
            part[: shard.values.numel()].copy_(shard.values)
    for parameter in parameters.values():
        # hpZ: the next gathering makes them anew. DeepSpeed itself takes those of frozen parameters to last for ever.
        parameter.ds_secondary_tensor = None
    optimizer.checkpoint_event_epilogue()  # gathers the persistent ones


@contextlib.contextmanager
def _partition(parameter: Any) -> Iterator[Tensor]:
    """This rank's shard [padded] of a parameter at stage 3; from NVMe and back where it is kept there."""
    swapped = parameter.ds_tensor.status.name == "NOT_AVAILABLE"
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor.detach().view(-1)
    finally:
        if swapped:
            parameter.nvme_swapper.swap_out_and_release([parameter])


def _stage3_shard(name: str, kind: str, parameter: Any, part: Tensor) -> FlatShard:
    start = parameter.ds_tensor.ds_numel * parameter.ds_process_group.rank()
    kept = max(0, min(part.numel(), parameter.ds_numel - start))
    return FlatShard(name, kind, parameter.ds_numel, min(start, parameter.ds_numel), part[:kept])


def _is_cut(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def _swapped_in(optimizer: Any, index: int) -> Iterator[None]:
    """Around use of a sub-group of stage 3 that may be on NVMe; elsewhere it does nothing."""
    swapped = hasattr(optimizer, "_swappable_optimizer_subgroup") and optimizer._swappable_optimizer_subgroup(index)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)
