"""One rank of tests/test_engine.py: builds each engine in turn and says what it saw, as JSON lines on rank 0."""

import gc
import json
import sys
import zlib

import torch
import torch.distributed as dist

from scaling.engine.build import build_engine
from scaling.engine.process import Process, process_from_environment
from scaling.engine.protocol import Engine
from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.models.decoder import decoder_recipe
from scaling.models.recipe import ModelRecipe
from scaling.parity import BACKENDS
from scaling.render import render
from scaling.spec import load_spec


def main() -> None:
    out, source, names, *assignments = sys.argv[1:]
    with process_from_environment() as process:
        for name in names.split(","):
            backend = dict(BACKENDS[name])
            spec = load_spec(source, [f"backend={json.dumps(backend)}", *assignments])
            groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model))
            recipe = decoder_recipe(spec.model, spec.objective, spec.seed)
            engine = build_engine(spec, render(spec, process.world_size), recipe, groups, process)
            seen = observe(engine, recipe, process, spec)
            if process.is_main:
                with open(out, "a") as file:
                    file.write(json.dumps({"backend": name, **seen}) + "\n")
            engine.close()
            del engine
            gc.collect()


def observe(engine: Engine, recipe: ModelRecipe, process: Process, spec) -> dict:
    shapes = {p.name: torch.Size(p.shape) for p in parameters(spec.model)}
    seen: dict = {"trained": sorted(name for names in engine.live_names() for name in names)}

    start = whole(engine, shapes, "master")
    rounded = spec.precision == "bf16" and spec.backend.kind == "deepspeed"
    seen["starts_as_recipe"] = True
    for name, value in start.items():
        want = recipe.initial_value(name, shapes[name]).flatten()
        if rounded and name not in seen["trained"]:
            want = want.bfloat16().float()  # DeepSpeed has no master of a frozen parameter
        seen["starts_as_recipe"] &= torch.equal(value, want)
    seen["complete"] = start.keys() == shapes.keys()

    ids = torch.arange(2 * 64).view(2, 64).to(process.device) % spec.model.vocab_size + process.rank
    step(engine, ids, 1.0)
    after = whole(engine, shapes, "master")
    seen["moved"] = sorted(name for name in start if not torch.equal(start[name], after[name]))
    seen["moments"] = sorted(whole(engine, shapes, "exp_avg"))
    seen["digest"] = digest(after)

    for group in engine.param_groups:
        group["lr"] = 0.0
    step(engine, ids, 1.0)
    seen["still_at_lr_0"] = same(after, whole(engine, shapes, "master"))
    for group in engine.param_groups:
        group["lr"] = group["initial_lr"]

    moments = whole(engine, shapes, "exp_avg")
    norm = step(engine, ids, float("nan") if process.rank == process.world_size - 1 else 1.0)
    seen["nan_norm_is_not_finite"] = not bool(torch.isfinite(norm))
    seen["unchanged_by_nan"] = same(after, whole(engine, shapes, "master")) and same(
        moments, whole(engine, shapes, "exp_avg")
    )
    norm = step(engine, ids, 1.0)
    seen["goes_on_after_nan"] = bool(torch.isfinite(norm)) and not same(after, whole(engine, shapes, "master"))
    return seen


def step(engine: Engine, ids: torch.Tensor, factor: float) -> torch.Tensor:
    for last in (False, True):
        with engine.micro_step(last=last):
            loss = engine.module(ids, ids) * factor / ids.numel()
            engine.backward(loss)
    return engine.step()


def whole(engine: Engine, shapes: dict[str, torch.Size], kind: str) -> dict[str, torch.Tensor]:
    """Every tensor of a kind put together from the ranges of all ranks; each element must come exactly once."""
    values = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    counts = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    for shard in engine.state():
        if shard.kind == kind:
            assert shard.elements == shapes[shard.name].numel(), shard.name
            place = slice(shard.start, shard.start + shard.values.numel())
            values[shard.name][place] += shard.values.detach().float().cpu()
            counts[shard.name][place] += 1
    for tensors in (values, counts):
        for tensor in tensors.values():
            dist.all_reduce(tensor)
    found = {name: value for name, value in values.items() if counts[name].any()}
    assert all(bool((counts[name] == 1).all()) for name in found), "an element is owned twice, or by nobody"
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def digest(values: dict[str, torch.Tensor]) -> int:
    return zlib.crc32(b"".join(values[name].numpy().tobytes() for name in sorted(values)))


if __name__ == "__main__":
    main()
