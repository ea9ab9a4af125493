"""The memory of any micro-batch, from a few played steps, against the step itself played; and what stands around it."""

import itertools
import re

import pytest

from scaling.batch import resolve_batch
from scaling.estimate.formulas import formulas
from scaling.estimate.memory import MemoryModel
from scaling.groups import resolve_groups
from scaling.hardware import find_gpu
from scaling.inventory import parameters
from scaling.records import BatchPlan
from scaling.render import render
from scaling.spec import load_spec
from scaling.units import GiB

BACKENDS = {
    "single": '{"kind": "single"}',
    "ddp": '{"kind": "ddp"}',
    "fsdp": '{"kind": "fsdp"}',
    "fsdp-keep": '{"kind": "fsdp", "reshard_after_forward": false}',
    "fsdp-offload": '{"kind": "fsdp", "cpu_offload": true}',
    "hsdp": '{"kind": "fsdp", "replicate": 2}',
    "zero1": '{"kind": "deepspeed", "zero_stage": 1}',
    "zero2": '{"kind": "deepspeed", "zero_stage": 2}',
    "zero2-offload": '{"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}',
    "zero3": '{"kind": "deepspeed", "zero_stage": 3}',
}


def resolved(recipe, backend, *settings):
    world_size = 1 if backend == "single" else 8
    batch = 'batch={"global_batch_size": 512, "micro_batch_size": 1}'
    spec = load_spec(recipe, [f"backend={BACKENDS[backend]}", batch, *settings])
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    return spec, groups, resolve_batch(spec, world_size)


def model_of(recipe, backend, *settings, gpu="H100-80GB"):
    spec, groups, plan = resolved(recipe, backend, *settings)
    return MemoryModel(spec, groups, render(spec, plan.world_size), plan, find_gpu(gpu)), plan


def cut(plan, micro, accumulation):
    ranks = plan.world_size
    return BatchPlan(micro * ranks * accumulation, micro, accumulation, ranks, plan.sequence_length)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_line_over_the_micro_batch_is_the_played_step(backend, mode):
    memory, plan = model_of("gpt2-124m", backend, f"activation_checkpointing={mode}")
    for micro, accumulation in itertools.product((1, 5, 32), (1, 3)):
        quick, whole = memory.at(micro, accumulation), memory.exactly(cut(plan, micro, accumulation))
        assert quick.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=2e-3)
        assert quick.host_bytes == pytest.approx(whole.host_bytes, rel=1e-3)
        assert sum(quick.parts.values()) == quick.peak_allocated_bytes


@pytest.mark.parametrize("frozen", ['["embed*"]', '["layers.3.*"]', '["layers.*.mlp.*"]'])
def test_frozen_parts_of_some_blocks_or_of_all(frozen):
    rules = f'param_groups=[{{"name": "f", "match": {frozen}, "freeze": true}}, {{"name": "rest", "match": ["*"]}}]'
    for backend in ("fsdp", "zero1"):
        memory, plan = model_of("gpt2-124m", backend, rules)
        quick, whole = memory.at(4, 2), memory.exactly(cut(plan, 4, 2))
        assert quick.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=2e-3)


def test_short_sequences_take_one_chunk_of_the_loss():
    memory, plan = model_of("gpt2-124m", "fsdp", "data.sequence_length=256")
    for micro in (1, 2, 3, 5, 6, 40):  # 667 tokens are a chunk
        quick, whole = memory.at(micro, 2), memory.exactly(cut(plan, micro, 2))
        assert quick.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=0.02)
        assert quick.peak_allocated_bytes >= 0.999 * whole.peak_allocated_bytes, "never too little"


@pytest.mark.parametrize("cuda", [True, False])
def test_another_moment_may_be_the_highest_for_each_micro_batch(cuda):
    """At 1 the reduction of the last gradients, at 6 of the first, at 40 the start of the backward pass."""
    spec, groups, plan = resolved("atlas-vla", "zero2")
    memory = MemoryModel(spec, groups, render(spec, plan.world_size), plan, None, cuda=cuda)
    for micro in (1, 3, 5, 6, 8, 11, 16, 40):
        quick, whole = memory.at(micro, 1), memory.exactly(cut(plan, micro, 1))
        assert quick.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=1e-4), micro


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "hsdp"])
@pytest.mark.parametrize("recipe", ["atlas-vla-tiny", "gpt-stdlib"])
def test_any_number_of_micro_steps_is_as_played(recipe, backend, cuda):
    spec, groups, plan = resolved(recipe, backend, 'activation_checkpointing="full"')
    memory = MemoryModel(spec, groups, render(spec, plan.world_size), plan, None, cuda=cuda)
    for micro, accumulation in itertools.product((1, 4), (1, 2, 3, 5)):
        quick, whole = memory.at(micro, accumulation), memory.exactly(cut(plan, micro, accumulation))
        assert quick.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=5e-3), (micro, accumulation)


def test_state_is_what_the_paper_says():
    """ZeRO, section 3: 16 bytes a parameter of which the optimizer's are cut; FSDP cuts all."""
    count = sum(parameter.elements for parameter in parameters(load_spec("gpt2-124m").model))
    whole = model_of("gpt2-124m", "ddp")[0].at(1, 1).parts
    cut_parts = model_of("gpt2-124m", "fsdp")[0].at(1, 1).parts
    assert whole["parameters"] == pytest.approx(4 * count, rel=1e-3)
    assert whole["optimizer"] == pytest.approx(8 * count, rel=1e-3)
    assert cut_parts["optimizer"] == pytest.approx(count, rel=0.01)
    zero = model_of("gpt2-124m", "zero2")[0].at(1, 1).parts
    assert zero["parameters"] == pytest.approx(2 * count, rel=1e-3)
    assert zero["optimizer"] == pytest.approx(12 * count / 8, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"])
def test_the_formulas_told_are_what_is_held(backend, precision):
    """ "4 B x 124,475,904 / 8; …": the played sizes, but for rows that are rounded up."""
    frozen = 'param_groups=[{"name": "f", "match": ["layers.3.*"], "freeze": true}, {"name": "rest", "match": ["*"]}]'
    spec, groups, plan = resolved("gpt2-124m", backend, frozen, f"precision={precision}")
    rendered = render(spec, plan.world_size)
    told = formulas(spec, groups, rendered, plan.world_size)
    parts = MemoryModel(spec, groups, rendered, plan, find_gpu("H100-80GB")).at(4, 1).parts
    for part in ("parameters", "optimizer"):
        found = re.match(r"(\d+) B x ([\d,]+)(?: / (\d+))?;", told[part])
        assert found is not None, told[part]
        width, elements, shares = (int((number or "1").replace(",", "")) for number in found.groups())
        assert width * elements / shares == pytest.approx(parts[part], rel=5e-3), told[part]


def test_offloading_moves_state_to_the_host():
    here, away = (model_of("llama-8b", name)[0].at(1, 2) for name in ("zero2", "zero2-offload"))
    assert here.host_bytes == 0 and away.host_bytes > 14 * 8e9 / 8
    # 12 bytes a parameter of an eighth, less a buffer for the largest gradient on its way: the embeddings', 1 GB.
    assert away.peak_allocated_bytes < here.peak_allocated_bytes - 10 * GiB


def test_the_band_and_what_is_around():
    alone, many = model_of("gpt2-124m", "single")[0].at(1, 1), model_of("gpt2-124m", "hsdp")[0].at(1, 1)
    for memory in (alone, many):
        assert memory.peak_allocated_bytes < memory.low_bytes < memory.device_used_bytes < memory.high_bytes
    around = [memory.device_used_bytes - memory.peak_reserved_bytes for memory in (alone, many)]
    assert around[1] - around[0] == pytest.approx(2 * 0.67 * GiB, rel=1e-6), "two communicators"


def test_compiled_blocks_keep_less():
    """The gate after its non-linearity is made again; what matrix products want is kept (test_compiled_ledger.py)."""
    eager, compiled = (
        model_of("llama-8b", "fsdp", f"compile={c}", "activation_checkpointing=none")[0].at(1, 1)
        for c in ("false", "true")
    )
    model = load_spec("llama-8b").model
    gates = 2 * model.num_hidden_layers * model.intermediate_size * load_spec("llama-8b").data.sequence_length
    assert eager.parts["activations"] - compiled.parts["activations"] == gates


def test_the_batch_is_not_there_while_the_model_is_built():
    """On a CPU the initial values of two large tables in fp32, whole, may be the peak."""
    tables = ("model.vocab_size=100000", "model.max_position_embeddings=100000", "precision=bf16")
    rest = ("model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=1", "data.sequence_length=8")
    frozen = 'param_groups=[{"name": "f", "match": ["embed*"], "freeze": true}, {"name": "rest", "match": ["*"]}]'
    spec, groups, plan = resolved("gpt-stdlib", "ddp", *tables, *rest, frozen)
    memory = MemoryModel(spec, groups, render(spec, plan.world_size), plan, None, cuda=False)
    quick, whole = memory.at(1, 64), memory.exactly(cut(plan, 1, 64))
    assert quick.peak_phase == whole.peak_phase == "build"
    assert quick.parts == whole.parts
