"""One rank of tests/test_engine.py: builds each engine in turn and says what it saw, as JSON lines on rank 0.

Each engine is built twice: once to be looked at from its start (`observe`), once to go on from the state of the first
engine in the list (`take_over`).
"""

import contextlib
import gc
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from scaling.engine.build import build_engine
from scaling.engine.process import Process, process_from_environment
from scaling.engine.protocol import Engine
from scaling.engine.scaler import LossScaler
from scaling.groups import resolve_groups
from scaling.inventory import layers_of, parameters
from scaling.models.build import model_recipe
from scaling.models.recipe import ModelRecipe
from scaling.parity import BACKENDS
from scaling.profile.gradients import GradientNorms
from scaling.render import render
from scaling.spec import load_spec

KINDS = ("master", "exp_avg", "exp_avg_sq")
# At this size of model every parameter would stay gathered and one sub-group would hold all.
CUT = {"param_persistence_threshold": 5000, "sub_group_size": 20000}
VARIANTS = {
    **BACKENDS,
    "zero3-cut": BACKENDS["zero3"] | CUT,
    "hsdp-replicate": BACKENDS["hsdp"] | {"frozen": "replicate"},
    "fsdp-offload-replicate": BACKENDS["fsdp-offload"] | {"frozen": "replicate"},
    "zero3-replicate-cut": BACKENDS["zero3-replicate"] | CUT,
    "zero3-offload-replicate": BACKENDS["zero3-offload"] | CUT | {"frozen": "replicate"},
    "zero3-hpz-cut": BACKENDS["zero3-hpz"] | CUT,
    "zero3-offload-cut": BACKENDS["zero3-offload"] | CUT,
    # With prefetching, DeepSpeed 0.19.8 reads a frozen parameter twice into one buffer, and fails.
    "zero3-nvme": {
        **BACKENDS["zero3"],
        "offload_optimizer": "nvme",
        "offload_parameters": "nvme",
        "prefetch_bucket_size": 0,
        "sub_group_size": 1_000_000,
    },
}
# What is frozen is not read from disk: prefetching does no harm.
VARIANTS["zero3-nvme-replicate"] = VARIANTS["zero3-nvme"] | {"frozen": "replicate", "prefetch_bucket_size": None}


@dataclass(frozen=True)
class Snapshot:
    """A training state, whole on every rank."""

    tensors: dict[str, dict[str, torch.Tensor]]
    """Kind -> name -> flattened tensor."""
    counters: dict[str, float]


def main() -> None:
    out, source, nvme_path, names, *assignments = sys.argv[1:]
    with process_from_environment() as process:
        reference: Reference | None = None
        for name in names.split(","):
            backend = dict(VARIANTS[name])
            if "nvme" in backend.values():
                backend["nvme_path"] = nvme_path
            spec = load_spec(source, [f"backend={json.dumps(backend)}", *assignments])
            with built(spec, process) as (engine, recipe):
                seen = observe(engine, recipe, process, spec)
                if reference is None:
                    reference = make_reference(engine, process, spec)
            with built(spec, process) as (engine, recipe):
                seen |= take_over(engine, reference, process, spec)
            if process.is_main:
                with open(out, "a") as file:
                    file.write(json.dumps({"backend": name, **seen}) + "\n")


@contextlib.contextmanager
def built(spec, process: Process) -> Iterator[tuple[Engine, ModelRecipe]]:
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    recipe = model_recipe(spec)
    engine = build_engine(spec, render(spec, process.world_size), recipe, groups, process)
    yield engine, recipe
    engine.close()
    del engine
    gc.collect()
    if "deepspeed" in sys.modules:
        # hpZ's groups are made once per process, and DeepSpeed refuses to find them made.
        sys.modules["deepspeed"].utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def observe(engine: Engine, recipe: ModelRecipe, process: Process, spec) -> dict:
    shapes = {p.name: torch.Size(p.shape) for p in parameters(spec.model, spec.lora)}
    seen: dict = {"trained": sorted(name for names in engine.live_names() for name in names)}

    fresh = snapshot(engine, shapes)
    start = fresh.tensors["master"]
    seen["starts_as_recipe"] = all(
        torch.equal(value, recipe.initial_value(name, shapes[name]).flatten()) for name, value in start.items()
    )
    seen["complete"] = start.keys() == shapes.keys()
    seen["starts_at_0"] = fresh.counters["updates"] == 0

    ids = some_ids(process, spec)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    trained = {name: group.name for group in groups if not group.frozen for name in group.names}
    norms = GradientNorms(layers_of(spec.model, trained), trained, process.device)
    found: list[torch.Tensor] = []
    whole = step(engine, ids, 1.0, lambda: found.append(norms.over_ranks(engine.gradient_norms(), process)))
    seen["gradient_norms"], seen["grad_norm"] = norms.told(found[0].tolist()), float(whole)
    first = snapshot(engine, shapes)
    after = first.tensors["master"]
    seen["moved"] = sorted(name for name in start if not torch.equal(start[name], after[name]))
    seen["moments"] = sorted(first.tensors["exp_avg"])

    for group in engine.param_groups:
        group["lr"] = 0.0
    step(engine, ids, 1.0)
    second = snapshot(engine, shapes)
    seen["still_at_lr_0"] = same(after, second.tensors["master"])
    for group in engine.param_groups:
        group["lr"] = group["initial_lr"]

    norm = step(engine, ids, float("nan") if process.rank == process.world_size - 1 else 1.0)
    seen["nan_norm_is_not_finite"] = not bool(torch.isfinite(norm))
    refused = snapshot(engine, shapes)
    seen["unchanged_by_nan"] = refused.counters["updates"] == 2 and all(
        same(second.tensors[kind], refused.tensors[kind]) for kind in KINDS
    )
    scale = {"loss_scale": 2.0**15, "finite_steps": 0.0} if spec.precision == "fp16" else {}
    seen["scale_follows_nan"] = refused.counters == {"updates": 2.0, **scale}
    norm = step(engine, ids, 1.0)
    third = snapshot(engine, shapes)
    seen["goes_on_after_nan"] = bool(torch.isfinite(norm)) and not same(after, third.tensors["master"])
    seen["counts_updates"] = [state.counters["updates"] for state in (first, second, third)] == [1, 2, 3]

    evaluate(engine, ids)  # leaves parameters gathered, under some backends
    load(engine, refused)
    seen["rolls_back"] = equal(refused, snapshot(engine, shapes))
    step(engine, ids, 1.0)
    seen["repeats_the_step"] = equal(third, snapshot(engine, shapes))
    load(engine, fresh)
    seen["is_as_fresh"] = is_as_fresh(snapshot(engine, shapes), fresh)
    step(engine, ids, 1.0)
    seen["starts_again_alike"] = equal(first, snapshot(engine, shapes))
    if spec.backend.kind == "deepspeed":
        seen["scalers_agree"] = scalers_agree()
    return seen


@dataclass(frozen=True)
class Reference:
    """Where every engine takes over, and what comes then."""

    state: Snapshot
    losses: list[float]
    """Before the next step, and after it."""
    stale_losses: list[float]
    """What the first would be with the initial parameters, and with the initial frozen parameters alone."""


def make_reference(engine: Engine, process: Process, spec) -> Reference:
    """A state in which the frozen parameters have other values than at the start, and are no 16-bit numbers."""
    shapes = {p.name: torch.Size(p.shape) for p in parameters(spec.model, spec.lora)}
    trained = {name for names in engine.live_names() for name in names}
    ids = some_ids(process, spec)
    stale = [evaluate(engine, ids)]
    for _ in range(6):
        step(engine, ids, 1.0)
    state = snapshot(engine, shapes)
    stale.append(evaluate(engine, ids))
    for name, value in state.tensors["master"].items():
        if name not in trained:
            value.mul_(-7.1)
    if spec.precision == "fp16":
        state.counters.update(loss_scale=2.0**8, finite_steps=7.0)
    load(engine, state)
    return Reference(state, next_losses(engine, ids), stale)


def take_over(engine: Engine, reference: Reference, process: Process, spec) -> dict:
    """Go on from the state of the first engine, on a freshly built one."""
    shapes = {p.name: torch.Size(p.shape) for p in parameters(spec.model, spec.lora)}
    load(engine, reference.state)
    seen: dict = {"takes_over": equal(reference.state, snapshot(engine, shapes))}
    seen["losses"] = next_losses(engine, some_ids(process, spec))
    seen["reference_losses"], seen["stale_losses"] = reference.losses, reference.stale_losses
    seen["update_follows"] = engine.counters()["updates"] == reference.state.counters["updates"] + 1
    if spec.backend.kind == "deepspeed":
        load(engine, reference.state)
        seen["copies_follow"] = copies_follow(engine, reference.state.tensors["master"])
    return seen


def next_losses(engine: Engine, ids: torch.Tensor) -> list[float]:
    losses = [evaluate(engine, ids)]
    step(engine, ids, 1.0)
    return [*losses, evaluate(engine, ids)]


def evaluate(engine: Engine, ids: torch.Tensor) -> float:
    """The mean loss over all ranks."""
    engine.module.eval()
    with torch.no_grad():
        loss = engine.module(ids, ids).double() / ids.numel() / dist.get_world_size()
    engine.module.train()
    dist.all_reduce(loss)
    return float(loss)


def some_ids(process: Process, spec) -> torch.Tensor:
    return torch.arange(2 * 64).view(2, 64).to(process.device) % spec.model.vocab_size + process.rank


def step(engine: Engine, ids: torch.Tensor, factor: float, look: Callable[[], object] = lambda: None) -> torch.Tensor:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own = torch.arange(2.0 + ranks, device=ids.device)
    for last in (False, True):
        with engine.micro_step(last=last):
            loss = engine.module(ids, ids)
            told = engine.begin_sum(own + rank) if last else None
            engine.backward(loss, torch.tensor(factor / ids.numel(), device=ids.device))
    look()
    norm = engine.step()
    assert told is not None
    torch.testing.assert_close(told(), ranks * own + sum(range(ranks)))  # whatever becomes of the gradient
    return norm


def snapshot(engine: Engine, shapes: dict[str, torch.Size]) -> Snapshot:
    """The state put together from the own ranges of all ranks: each element must come exactly once, replicas be equal.

    A kind has the tensors of which there is anything.
    """
    places: dict[tuple[str, str], slice] = {}
    total = 0
    for key in ((kind, name) for kind in KINDS for name in shapes):
        places[key] = slice(total, total := total + shapes[key[1]].numel())
    values, counts = torch.zeros(2, total)
    held: list[tuple[slice, torch.Tensor]] = []
    for shard in engine.state():
        assert shard.elements == shapes[shard.name].numel(), shard.name
        assert shard.values.dtype == torch.float32 and shard.values.ndim == 1
        begin, own = places[shard.kind, shard.name].start, shard.own()
        place = slice(begin + own.start, begin + own.start + own.values.numel())
        values[place] += own.values.detach().cpu()
        counts[place] += 1
        place = slice(begin + shard.start, begin + shard.start + shard.values.numel())
        held.append((place, shard.values.detach().cpu().clone()))
    dist.all_reduce(values)
    dist.all_reduce(counts)
    found = {key: place for key, place in places.items() if counts[place].any()}
    assert all(bool((counts[place] == 1).all()) for place in found.values()), "an element is owned twice, or by nobody"
    assert all(torch.equal(values[place], part) for place, part in held), "a replica differs"
    tensors = {kind: {name: values[place] for (k, name), place in found.items() if k == kind} for kind in KINDS}
    return Snapshot(tensors, engine.counters())


def load(engine: Engine, state: Snapshot) -> None:
    """Write `state`, zeros where it has no moments, to every range that this rank holds."""
    with engine.loading(state.counters):
        for shard in engine.state():
            source = state.tensors[shard.kind].get(shard.name, torch.zeros(shard.elements))
            shard.values.copy_(source[shard.start : shard.start + shard.values.numel()])


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def equal(first: Snapshot, second: Snapshot) -> bool:
    return first.counters == second.counters and all(same(first.tensors[k], second.tensors[k]) for k in KINDS)


def is_as_fresh(state: Snapshot, fresh: Snapshot) -> bool:
    moments = [value for kind in ("exp_avg", "exp_avg_sq") for value in state.tensors[kind].values()]
    same_masters = same(state.tensors["master"], fresh.tensors["master"])
    return same_masters and state.counters == fresh.counters and not any(bool(value.any()) for value in moments)


def copies_follow(engine: Engine, masters: dict[str, torch.Tensor]) -> bool:
    """Whether what each rank computes with are the masters, rounded to its type."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    equal = True
    for name, parameter in engine._parameters.items():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            have = parameter.detach().flatten().cpu()
            equal &= torch.equal(have, masters[name].to(have.dtype))
    return equal


def scalers_agree() -> bool:
    """Whether our loss scaler and DeepSpeed's go the same way, handing over to one another at any moment."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from scaling.engine.deepspeed_engine import load_scaler, scaler_counters

    def theirs() -> DynamicLossScaler:
        return DynamicLossScaler(2.0**16, 5, 1, 1, False, raise_error_at_min_scale=False)

    chance = random.Random(1)
    stays, ours, moves = theirs(), LossScaler(window=5), theirs()
    for _ in range(5000):
        finite = chance.random() < 0.9
        stays.update_scale(not finite)
        ours.update(finite)
        moves.update_scale(not finite)
        if not (scaler_counters(stays) == ours.counters() == scaler_counters(moves)):
            return False
        if chance.random() < 0.3:
            kept, ours, moves = ours.counters(), LossScaler(window=5), theirs()
            ours.load(scaler_counters(stays))
            load_scaler(moves, kept)
    return True


if __name__ == "__main__":
    main()
