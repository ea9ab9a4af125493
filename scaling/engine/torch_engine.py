"""torch's own backends: one process, DistributedDataParallel and FSDP2. One engine, three builders.

The optimizer works on plain tensors: under FSDP2 on the local shards, which share storage with the sharded parameters.
Clipping, the fp16 loss scale and the refusal of a non-finite step are two scalars that the fused AdamW kernel takes,
so none of them costs a pass over the gradients or waits for the device.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from scaling.engine.blocks import prepare_blocks
from scaling.engine.frozen import gather, keep_whole, on_host, replica
from scaling.engine.optimizer import build_adamw, make_moments, moments, set_updates, updates
from scaling.engine.precision import compute_in
from scaling.engine.process import Process
from scaling.engine.protocol import FlatShard
from scaling.engine.rider import Rider
from scaling.engine.scaler import LossScaler
from scaling.groups import Group
from scaling.models.recipe import ModelRecipe, canonical_name, let_write_grad
from scaling.spec.sections import Spec


def build_single(spec: Spec, rendered: dict[str, Any], recipe: ModelRecipe, groups: Sequence[Group], process: Process):
    """The whole model on one device."""
    model = _whole_model(spec, rendered, recipe, groups, process)
    return TorchEngine(model, spec, rendered, groups, process)


def build_ddp(spec: Spec, rendered: dict[str, Any], recipe: ModelRecipe, groups: Sequence[Group], process: Process):
    """The whole model on each rank, gradients averaged in fp32 while the backward pass goes on."""
    model = _whole_model(spec, rendered, recipe, groups, process)
    # Every rank has filled in the same values by name: broadcasting them again would only cost time.
    with warnings.catch_warnings():
        # torch 2.13 announces another name for broadcast_buffers, which older versions lack.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        rider = Rider(model, process)
        wrapped = DistributedDataParallel(model, init_sync=False, **rendered["ddp"])
        rider.get_off(model)
    if dist.get_backend() == "fake":  # a rehearsal, whose collectives have no result that DDP could wait for
        wrapped.register_comm_hook(None, _as_it_is)
    _settle_buckets(wrapped, model, rider)
    return TorchEngine(wrapped, spec, rendered, groups, process, rider=rider)


def build_fsdp(spec: Spec, rendered: dict[str, Any], recipe: ModelRecipe, groups: Sequence[Group], process: Process):
    """Shards of fp32 parameters on each rank, gathered block by block in the compute type."""
    with torch.device("meta"):
        model = recipe.build()
    _freeze(model, groups)
    prepare_blocks(model, recipe.blocks, checkpointing=spec.activation_checkpointing, compiled=spec.compile)
    whole = {p for p in model.parameters() if not p.requires_grad} if rendered["frozen"] == "replicate" else set()
    axes: dict[str, int] = rendered["mesh"]
    mesh = init_device_mesh(process.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    _apply_wrap_plan(model, rendered, mesh, whole)
    if whole:
        keep_whole(model, getattr(torch, rendered["param_dtype"]), process.device)
    device = torch.device("cpu") if rendered["cpu_offload"] else process.device
    # As `to_empty` does, which would make what has its memory anew.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.device.type == "meta" else tensor)
    masters = _fill(model, recipe)
    _fill_buffers(model, recipe)
    shard_group = mesh["dp_shard"].get_group()
    return TorchEngine(model, spec, rendered, groups, process, shard_group=shard_group, frozen_masters=masters)


class TorchEngine:
    """A model that torch's autograd and optimizer train as they stand. See `Engine` for the contract."""

    def __init__(
        self,
        module: nn.Module,
        spec: Spec,
        rendered: dict[str, Any],
        groups: Sequence[Group],
        process: Process,
        *,
        shard_group: dist.ProcessGroup | None = None,
        frozen_masters: Mapping[str, FlatShard] | None = None,
        rider: Rider | None = None,
    ) -> None:
        """`frozen_masters`: of parameters that are kept in 16 bits this rank's part of their fp32 values.

        `rider`: where DDP brings gradients together.
        """
        self.module = module
        self._frozen_masters = frozen_masters or {}
        self._parameters = {canonical_name(name): p for name, p in module.named_parameters()}
        grouped = {name for group in groups for name in group.names}
        assert grouped == set(self._parameters), f"the wrapped model differs in {grouped ^ set(self._parameters)}"
        self._local = {name: _local_shard(p) for name, p in self._parameters.items()}
        self._optimizer = build_adamw(self._local, groups, spec.optimizer)
        self._trainable = [name for group in groups if not group.frozen for name in group.names]
        self._max_grad_norm: float | None = rendered["max_grad_norm"]
        self._shard_group = shard_group
        self._process = process
        self._rider = rider
        self._meets = True
        """The next backward pass is the last of its step."""
        self._scaler = LossScaler() if spec.precision == "fp16" else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def loss_scale(self) -> float:
        return self._scaler.scale if self._scaler else 1.0

    @property
    def waits_below_python(self) -> bool:
        return isinstance(self.module, DistributedDataParallel)  # its reducer is C++

    def live_names(self) -> list[list[str]]:
        names = {id(local): name for name, local in self._local.items()}
        return [[names[id(parameter)] for parameter in group["params"]] for group in self.param_groups]

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        self._meets = last
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        if isinstance(self.module, FSDPModule):
            # Gradients are cut at every micro-step, as ZeRO-2 and 3 do: whole ones would cost four bytes a parameter.
            # Replicas are averaged once, after the last.
            self.module.set_requires_all_reduce(last)
            self.module.set_is_last_backward(last)
        return contextlib.nullcontext()

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        return (self._rider or self._process).begin_sum(values)

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        weight = weight * self._scaler.scale if self._scaler else weight
        if self._rider is not None and self._meets:
            self._rider.backward(loss, weight)
        else:
            loss.backward(weight)

    def gradient_norms(self) -> dict[str, Tensor]:
        norms = torch._foreach_norm(self._take_gradients())  # pyright: ignore[reportPrivateImportUsage] - as torch itself
        norms = torch.stack(norms).to(self._process.device)
        _, copies, _ = _place(self._parameters[self._trainable[0]])
        return dict(zip(self._trainable, (norms / (self.loss_scale * copies**0.5)).unbind(), strict=True))

    def step(self) -> Tensor:
        gradients = self._take_gradients()
        norm, scale = self._global_norm(gradients), self.loss_scale
        if scale != 1.0:
            norm = norm / scale
        # The kernel divides gradients by grad_scale and does nothing at all where found_inf is 1.
        if self._max_grad_norm is None:
            divisor = torch.full_like(norm, scale)
        else:
            divisor = ((norm + 1e-6) / (self._max_grad_norm / scale)).clamp(min=scale)
        found = (norm - norm).ne_(0.0)  # finite: 0, else NaN, which is not 0; `isfinite` would take six kernels
        device = gradients[0].device
        self._optimizer.grad_scale = divisor.to(device)  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.found_inf = found.to(device)  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        for name in self._trainable:
            self._parameters[name].grad = self._local[name].grad = None
        if self._scaler:
            self._scaler.update(bool(norm.isfinite()))  # a wait for the device, which fp16's dynamic scale needs
        return norm

    def state(self) -> Iterator[FlatShard]:
        for name, parameter in self._parameters.items():
            if name in self._frozen_masters:
                yield self._frozen_masters[name]
                continue
            local = self._local[name]
            start, copies, copy = _place(parameter)
            tensors = {"master": local.detach(), **moments(self._optimizer, local)}
            for kind, values in tensors.items():
                # `view`, not `reshape`: a copy would lose what is written to it.
                yield FlatShard(name, kind, parameter.numel(), start, values.view(-1), copies, copy)

    def counters(self) -> dict[str, float]:
        return {"updates": updates(self._optimizer)} | (self._scaler.counters() if self._scaler else {})

    @contextlib.contextmanager
    def loading(self, counters: Mapping[str, float]) -> Iterator[None]:
        for name in self._trainable:
            make_moments(self._optimizer, self._local[name])
        yield
        for name, part in self._frozen_masters.items():
            gather(self._parameters[name], part)
        set_updates(self._optimizer, counters["updates"])
        if self._scaler:
            self._scaler.load(counters)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves parameters gathered, with their values of that time

    def close(self) -> None:
        self._optimizer.state.clear()

    def _take_gradients(self) -> list[Tensor]:
        """Hand each local shard the gradient of its shard; returns those with any element."""
        for name in self._trainable:
            gradient = self._parameters[name].grad
            assert gradient is not None, f"{name} got no gradient"
            self._local[name].grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        found = [self._local[name].grad for name in self._trainable]
        return [gradient for gradient in found if gradient is not None]

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        # As torch.nn.utils.get_total_norm, which first sorts tensors by device and type: these are all alike.
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage] - as torch itself
        total = torch.linalg.vector_norm(torch.stack(norms)).to(self._process.device)
        if self._shard_group is None:
            return total
        total = total.square()
        dist.all_reduce(total, group=self._shard_group)
        return total.sqrt()


def _as_it_is(
    _: object,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage] - DDP insists on this very annotation
) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _settle_buckets(wrapped: DistributedDataParallel, model: nn.Module, rider: Rider) -> None:
    """Have DDP arrange its buckets now, and not after the first step, by the order in which gradients arrived.

    Where an element lies in a bucket decides in which order three or more ranks add it up: a run that resumes would
    differ from one that went on by the rounding of its first step.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = model.forward
    # Gradients in the order of real ones, nearly: from the last parameter to the first, since autograd begins with what
    # was computed last. A bucket can then be reduced while earlier layers still compute.
    model.forward = lambda: torch.stack([parameter.sum() for parameter in trainable]).sum()
    loss = wrapped()
    rider.backward(loss, torch.zeros_like(loss))
    wrapped.reducer._rebuild_buckets()  # as the next forward pass would
    model.forward = forward
    for parameter in trainable:
        parameter.grad = None


def _whole_model(
    spec: Spec, rendered: dict[str, Any], recipe: ModelRecipe, groups: Sequence[Group], process: Process
) -> nn.Module:
    # Not by way of the meta device: `to_empty` would make tied weights two tensors.
    with process.device:
        model = recipe.build()
    _fill(model, recipe)
    _freeze(model, groups)
    let_write_grad(model)
    dtype = getattr(torch, rendered["param_dtype"])
    if dtype != torch.float32:
        compute_in(model, dtype)
    prepare_blocks(model, recipe.blocks, checkpointing=spec.activation_checkpointing, compiled=spec.compile)
    return model


def _apply_wrap_plan(model: nn.Module, rendered: dict[str, Any], mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """`whole`: parameters that are not to be cut."""
    dtype, reduce_dtype = getattr(torch, rendered["param_dtype"]), getattr(torch, rendered["reduce_dtype"])
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
    offload: OffloadPolicy = OffloadPolicy()
    if rendered["cpu_offload"]:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for entry in rendered["wrap"]:
        modules = [model.get_submodule(path) for path in entry["modules"]]
        fully_shard(
            modules if len(modules) > 1 else modules[0],  # pyright: ignore[reportArgumentType]
            mesh=mesh,
            reshard_after_forward=entry["reshard_after_forward"],
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=whole,
        )
    # The root keeps what it gathered until its backward pass ends: gathering it twice would gain nothing.
    fully_shard(
        model,
        mesh=mesh,
        reshard_after_forward=False,
        mp_policy=policy,
        offload_policy=offload,
        ignored_params=whole,
    )


def _freeze(model: nn.Module, groups: Sequence[Group]) -> None:
    frozen = {name for group in groups if group.frozen for name in group.names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(canonical_name(name) not in frozen)


@torch.no_grad()
def _fill(model: nn.Module, recipe: ModelRecipe) -> dict[str, FlatShard]:
    """Write the initial values, one whole parameter at a time on the host, each rank keeping its part.

    Returns this rank's part in fp32 of those that are in 16 bits, by canonical name.
    """
    rounded: dict[str, FlatShard] = {}
    for name, parameter in model.named_parameters():
        value = recipe.initial_value(canonical_name(name), parameter.shape)
        if parameter.dtype != value.dtype:
            rounded[canonical_name(name)] = on_host(replica(canonical_name(name), value))
        if isinstance(parameter, DTensor):
            device = parameter.device_mesh.device_type
            # Every rank has the whole value: no rank is the source, nothing is sent.
            cut = distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(cut.to_local())
        else:
            parameter.copy_(value)
    return rounded


@torch.no_grad()
def _fill_buffers(model: nn.Module, recipe: ModelRecipe) -> None:
    """What a module on the meta device could not compute: tables of angles, say."""
    buffers = dict(model.named_buffers())
    values = recipe.buffers() if buffers else {}
    for name, buffer in buffers.items():
        if canonical_name(name) in values:  # in a rehearsal there are none
            buffer.copy_(values[canonical_name(name)])


def _local_shard(parameter: nn.Parameter) -> nn.Parameter:
    """A plain parameter over the storage of this rank's shard."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)


def _place(parameter: nn.Parameter) -> tuple[int, int, int]:
    """Where this rank's range begins in the flattened parameter, how many ranks hold it, and which of them this is.

    FSDP2 cuts along dim 0 like torch.chunk.
    """
    if not isinstance(parameter, DTensor):
        return 0, dist.get_world_size(), dist.get_rank()
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    size, rest = divmod(parameter.shape[0], mesh.size(mesh.ndim - 1))
    rows = size + (rest > 0)
    row = min(rows * coordinate[-1], parameter.shape[0])
    start = row * (parameter.numel() // max(1, parameter.shape[0]))  # exact: whole rows
    return (start, mesh.size(0), coordinate[0]) if mesh.ndim == 2 else (start, 1, 0)
