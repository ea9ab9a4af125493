"""DeepSpeed ZeRO-1, 2 and 3 behind the engine protocol. The only module that imports deepspeed."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaling.engine.blocks import prepare_blocks
from scaling.engine.optimizer import build_adamw
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
    deepspeed = _import_deepspeed(process)
    _check_abilities(deepspeed, spec, backend)
    stage3 = backend.zero_stage == 3
    context = deepspeed.zero.Init(config_dict_or_path=rendered) if stage3 else torch.device(process.device)
    with context:
        model = recipe.build()
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    _fill(deepspeed, parameters, recipe, process, sharded=stage3)
    frozen = {name for group in groups if group.frozen for name in group.names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    prepare_blocks(model, recipe.blocks, checkpointing=spec.activation_checkpointing, compiled=spec.compile)
    if spec.compile and stage3:
        # Parameters gathered block by block: hooks on every layer inside would break every graph.
        deepspeed.utils.set_z3_leaf_modules(model, {type(model.get_submodule(path)) for path in recipe.blocks})
    optimizer = build_adamw(parameters, groups, spec.optimizer)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=rendered, dist_init_required=False)
    engine = DeepSpeedEngine(wrapped, parameters, stage3=stage3)
    engine.restore_masters(recipe)
    return engine


class DeepSpeedEngine:
    """A model that a DeepSpeed engine trains. See `Engine` for the contract."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], *, stage3: bool) -> None:
        self.module: nn.Module = engine
        self._engine = engine
        self._parameters = parameters
        self._stage3 = stage3

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.cur_scale) if self._engine.fp16_enabled() else 1.0

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

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

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
        optimizer = self._engine.optimizer
        if self._stage3:
            yield from _stage3_state(self._parameters, optimizer)
            return
        for name, parameter in self._parameters.items():
            yield from _stage12_shards(name, parameter, optimizer, self._engine.global_rank)

    def close(self) -> None:
        self._engine.destroy()

    @torch.no_grad()
    def restore_masters(self, recipe: ModelRecipe) -> None:
        """Write the initial values into the fp32 masters: DeepSpeed made them of parameters rounded to 16 bits."""
        if not (self._engine.bfloat16_enabled() or self._engine.fp16_enabled()):
            return
        whole = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items() if p.requires_grad}
        values: dict[str, Tensor] = {}
        for shard in self.state():
            if shard.kind == "master" and shard.name in whole:
                if shard.name not in values:
                    values = {shard.name: recipe.initial_value(shard.name, whole[shard.name]).flatten()}
                shard.values.copy_(values[shard.name][shard.start : shard.start + shard.values.numel()])


def _import_deepspeed(process: Process) -> Any:
    # DeepSpeed guesses its device from what is installed; ours is decided already.
    os.environ.setdefault("DS_ACCELERATOR", process.device.type)
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))  # absent without a launcher, and it insists
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that newer torch versions deprecate: hundreds of lines that nobody here can act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory op serves inference alone (`inference_all_reduce`); building it takes a compiler and 40 s at
    # the first start on a CPU, and a process killed meanwhile leaves a lock on which every later start hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if process.device.type == "cuda" else "gloo", verbose=False)
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


@torch.no_grad()
def _fill(
    deepspeed: Any, parameters: dict[str, nn.Parameter], recipe: ModelRecipe, process: Process, *, sharded: bool
) -> None:
    for name, parameter in parameters.items():
        if not sharded:
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


def _stage12_shards(name: str, parameter: nn.Parameter, optimizer: Any, rank: int) -> Iterator[FlatShard]:
    """ZeRO-1/2: what `_hp_mapping` says this rank owns; frozen parameters are whole on every rank, rank 0's counts."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        if rank == 0 and not parameter.requires_grad:
            yield FlatShard(name, "master", parameter.numel(), 0, parameter.detach().view(-1))
        return
    # Not `optim_fragment`: DeepSpeed 0.19.8 links the moments while the first group steps, when others have none yet.
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")  # ZeRO; ZeRO-1 in bf16
    flats = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    flat, place = flats[mapping.param_group_index], mapping.hp_fragment_address
    for kind, values in {"master": flat, **_moments(optimizer, flat)}.items():
        fragment = values.detach().narrow(0, place.start, place.numel)
        yield FlatShard(name, kind, parameter.numel(), mapping.lp_fragment_address.start, fragment)


def _moments(optimizer: Any, flat: Tensor) -> dict[str, Tensor]:
    state = optimizer.optimizer.state.get(flat, {})
    return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}


def _stage3_state(parameters: dict[str, nn.Parameter], optimizer: Any) -> Iterator[FlatShard]:
    """ZeRO-3: rank r owns [r*k, (r+1)*k) of each flattened parameter; what lies beyond its end is padding.

    A sub-group that is kept on NVMe is read before its shards are handed out and written back after.
    """
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            yield _stage3_shard(name, "master", parameter, _partition(parameter))
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, members in enumerate(optimizer.fp16_groups):
        with _swapped_in(optimizer, index):
            flat = optimizer.fp32_partitioned_groups_flat[index]
            for kind, values in {"master": flat, **_moments(optimizer, flat)}.items():
                for parameter in members:
                    _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    part = values.detach().narrow(0, offset, length)
                    yield _stage3_shard(names[id(parameter)], kind, parameter, part)


def _partition(parameter: Any) -> Tensor:
    return parameter.ds_tensor.detach().view(-1)


def _stage3_shard(name: str, kind: str, parameter: Any, part: Tensor) -> FlatShard:
    start = parameter.ds_tensor.ds_numel * parameter.ds_process_group.rank()
    kept = max(0, min(part.numel(), parameter.ds_numel - start))
    return FlatShard(name, kind, parameter.ds_numel, min(start, parameter.ds_numel), part[:kept])


@contextlib.contextmanager
def _swapped_in(optimizer: Any, index: int) -> Iterator[None]:
    swapped = optimizer._swappable_optimizer_subgroup(index)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)
