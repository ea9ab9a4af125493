"""The search: every candidate is the spec run differently, none of them another training; ranks, fronts and reasons."""

import json
from dataclasses import replace

import pytest
from rough import RoughMemory, rough  # noqa: F401 - a fixture

from scaling.errors import UserError
from scaling.estimate import workers
from scaling.estimate.remedies import grown, nothing_fits
from scaling.estimate.search import MOST_MICRO, first_fit, flags, search
from scaling.hardware import parse_gpus
from scaling.render import render
from scaling.spec import change_spec, load_spec

pytestmark = pytest.mark.usefixtures("rough")

EIGHT = parse_gpus("8xH100-80GB")
FOUR_NODES = parse_gpus("4x8xH100-80GB")
MACHINES = ("1xH200", "2xA100-40GB", "8xH100-80GB", "4x8xH100-80GB", "3x4xH200")
CHANGES = {
    "as shipped": [],
    "tuned stage 3": [
        'backend={"kind": "deepspeed", "zero_stage": 3, "prefetch_bucket_size": 1000, "reduce_bucket_size": 5000}'
    ],
    "stage 2": ['backend={"kind": "deepspeed", "zero_stage": 2, "allgather_bucket_size": 4096, "overlap_comm": false}'],
    "nvme": [
        'backend={"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/fast"}',
    ],
    "hsdp, no reshard": ['backend={"kind": "fsdp", "replicate": 2, "reshard_after_forward": false}'],
    "ddp, selective": ["backend.kind=ddp", "activation_checkpointing=selective"],
    "single": ["backend.kind=single"],
    "steps and micro": ['batch={"micro_batch_size": 3, "gradient_accumulation_steps": 4}'],
    "whole and steps": ['batch={"global_batch_size": 96, "gradient_accumulation_steps": 2}'],
    "all three": ['batch={"global_batch_size": 96, "micro_batch_size": 4, "gradient_accumulation_steps": 1}'],
}


def loaded(name="gpt2-124m", changes=()):
    """The spec with a batch that most machines can share."""
    return load_spec(name, ['batch={"global_batch_size": 96, "micro_batch_size": 4}', *changes])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_candidate_is_the_spec_with_its_flags_and_keeps_the_global_batch(changes, machine):
    base, cluster = ['batch={"global_batch_size": 96, "micro_batch_size": 4}', *changes], parse_gpus(machine)
    spec = load_spec("gpt2-124m", base)
    found = search(spec, cluster)
    whole = 12 * cluster.world_size if changes is CHANGES["steps and micro"] else 96
    assert found.candidates
    assert {candidate.plan.global_batch for candidate in found.candidates} == {whole}
    # Reading a spec takes milliseconds: one micro-batch of each structure, and all of the first one's.
    first = found.candidates[0].plan.micro_batch
    for place, candidate in enumerate(found.candidates):
        assert candidate.spec.model == spec.model and candidate.spec.data == spec.data
        if candidate.plan.micro_batch == first or place < 8:
            again = load_spec("gpt2-124m", [*base, *flags(candidate.changes)])
            assert again == candidate.spec, candidate.changes
            assert render(again, cluster.world_size)


def test_what_is_tried_on_many_ranks():
    spec = loaded()
    kinds = [json.dumps(c.spec.backend.model_dump(exclude_none=True)) for c in search(spec, FOUR_NODES).candidates]
    kinds = sorted({kind for kind in kinds})
    assert sum("ddp" in kind for kind in kinds) == 1 and not any("single" in kind for kind in kinds)
    sharded = [json.loads(kind) for kind in kinds if "fsdp" in kind]
    assert {(one["replicate"], one["reshard_after_forward"], one["cpu_offload"]) for one in sharded} == {
        *((count, reshard, False) for count in (1, 2, 4) for reshard in (True, False)),
        (1, True, True),
    }
    zero = [json.loads(kind) for kind in kinds if "zero_stage" in kind]
    offloads = {(o["zero_stage"], o.get("offload_optimizer"), o.get("offload_parameters")) for o in zero}
    assert offloads == {(stage, place, None) for stage in (1, 2, 3) for place in (None, "cpu")} | {(3, "cpu", "cpu")}


def test_frozen_parts_are_tried_cut_and_whole():
    frozen = 'param_groups=[{"name": "a", "match": ["embed*"], "freeze": true}, {"name": "b", "match": ["*"]}]'

    def whole(*changes):
        spec = loaded(changes=changes)
        found = search(spec, EIGHT).candidates
        for candidate in found[::7]:
            again = loaded(changes=[*changes, *flags(candidate.changes)])
            assert again.backend == candidate.spec.backend
        backends = {candidate.spec.backend for candidate in found if candidate.spec.backend.kind != "ddp"}
        return sorted((one.kind, getattr(one, "zero_stage", 0)) for one in backends if one.frozen == "replicate")

    assert whole() == []
    assert whole(frozen) == [("deepspeed", 3), ("fsdp", 0)]
    assert whole(frozen, 'backend={"kind": "ddp", "frozen": "replicate"}') == [("deepspeed", 3), ("fsdp", 0)]
    assert whole(frozen, 'backend={"kind": "fsdp", "frozen": "replicate"}') == [("deepspeed", 3), ("fsdp", 0)]
    stage3 = 'backend={"kind": "deepspeed", "zero_stage": 3, "frozen": "%s"}'
    assert whole(frozen, stage3 % "replicate") == whole(frozen, stage3 % "shard") == [("deepspeed", 3), ("fsdp", 0)]


def test_what_is_tried_on_one_gpu():
    found = search(loaded(changes=["backend.kind=single"]), parse_gpus("1xH200"))
    backends = {(c.spec.backend.kind, getattr(c.spec.backend, "offload_optimizer", None)) for c in found.candidates}
    assert backends == {("single", None), ("deepspeed", "cpu")}
    assert {c.spec.activation_checkpointing for c in found.candidates} == {"none", "selective", "full"}


def test_one_memory_model_for_each_structure(monkeypatch):
    monkeypatch.setattr(workers, "MOST_WORKERS", 1)  # counted in this process
    found = search(loaded(), parse_gpus("8xH100-80GB"))
    structures = {(repr(c.spec.backend), c.spec.activation_checkpointing) for c in found.candidates}
    assert RoughMemory.made == len(structures) + 1  # and one for the spec as written
    assert len(found.candidates) == len(structures) * len({1, 2, 3, 4, 6, 12})


def test_workers_find_what_one_process_does(monkeypatch):
    several = search(loaded(), EIGHT)
    monkeypatch.setattr(workers, "MOST_WORKERS", 1)
    assert replace(several, seconds=0.0) == replace(search(loaded(), EIGHT), seconds=0.0)


def test_illegal_micro_batches_are_rejected_with_the_sum():
    reasons = [rejected.reason for rejected in search(loaded(changes=["batch.micro_batch_size=5"]), EIGHT).rejected]
    assert "micro-batch 5 does not divide 12 sequences per rank" in reasons
    assert "micro-batch 7 does not divide 12 sequences per rank" in reasons
    assert not any("micro-batch 6 " in reason for reason in reasons)
    assert "`batch.global_batch_size` must be" in reasons[0]  # the spec as written


def test_micro_batches_are_bounded():
    spec = load_spec("gpt-stdlib", ["batch.global_batch_size=1048576"])
    assert max(c.plan.micro_batch for c in search(spec, EIGHT).candidates) == MOST_MICRO


def test_what_the_validator_refuses_has_its_reason():
    frozen = 'param_groups=[{"name": "a", "match": ["embed*"], "freeze": true}, {"name": "b", "match": ["*"]}]'
    found = search(loaded(changes=[frozen]), EIGHT)
    assert all(any(group.frozen for group in found.groups) for _ in found.candidates)
    refused = search(change_spec(loaded(), backend={"kind": "fsdp", "replicate": 5}), EIGHT)
    assert any("`backend.replicate` must divide" in rejected.reason for rejected in refused.rejected)
    assert refused.as_written is None and refused.candidates


def test_ranked_by_speed_then_memory_and_what_fails_comes_last():
    found = search(loaded("llama-8b"), parse_gpus("8xA100-40GB"))
    fits = [candidate.fits for candidate in found.candidates]
    assert fits == sorted(fits, reverse=True) and {True, False} == set(fits)
    keys = [(-c.speed, c.memory.high_bytes) for c in found.candidates if c.fits]
    assert keys == sorted(keys)
    sizes = [c.memory.high_bytes for c in found.candidates if not c.fits]
    assert sizes == sorted(sizes)
    assert all((c.memory.high_bytes <= found.usable_bytes) == c.fits for c in found.candidates)


def test_the_front_has_what_nothing_beats():
    found = search(loaded("llama-8b"), parse_gpus("8xA100-40GB"))
    fitting = [c for c in found.candidates if c.fits]

    def beaten(one):
        size = one.memory.device_used_bytes
        return any(
            o.speed >= one.speed
            and o.memory.device_used_bytes <= size
            and (o.speed, o.memory) != (one.speed, one.memory)
            for o in fitting
        )

    front = [found.candidates[place] for place in found.pareto]
    assert len(front) > 1 and not any(beaten(one) for one in front)
    points = {(one.speed, one.memory.device_used_bytes) for one in front}
    assert all((c.speed, c.memory.device_used_bytes) in points or beaten(c) for c in fitting)
    assert [c.speed for c in front] == sorted(c.speed for c in front)


def test_reasons_are_sentences_with_numbers():
    found = search(loaded("llama-8b"), parse_gpus("8xA100-40GB"))
    best, last = found.candidates[0], found.candidates[-1]
    assert " GiB of 38.6, backward; " in best.reason and best.reason.endswith(" GiB of host memory; the fastest")
    assert any("% slower than the best" in candidate.reason for candidate in found.candidates if candidate.fits)
    assert last.reason.startswith("needs ") and ", 38.6 usable: activations" in last.reason
    assert all(candidate.reason for candidate in found.candidates)


def test_a_margin_of_more_leaves_less():
    some, more = (search(loaded("llama-8b"), EIGHT, margin) for margin in (0.0, 0.5))
    assert some.usable_bytes == EIGHT.gpu.memory_bytes and more.usable_bytes < some.usable_bytes
    assert sum(bool(c.fits) for c in more.candidates) < sum(bool(c.fits) for c in some.candidates)


def test_unknown_memory_and_speed_stay_unknown():
    found = search(loaded(), parse_gpus("8xH100-PCIe-80GB"))
    assert found.usable_bytes is None and {c.fits for c in found.candidates} == {None}
    assert found.best is not None and "not known" in found.best.reason
    slow = search(loaded(), parse_gpus("8xT4"))
    assert {c.speed for c in slow.candidates} == {None} and slow.pareto == ()
    assert "speed not known" in slow.candidates[0].reason


def test_an_open_micro_batch_is_not_as_written():
    batch = 'batch={"global_batch_size": 96, "gradient_accumulation_steps": 1}'
    assert search(load_spec("gpt2-124m", [batch]), EIGHT).as_written is None
    assert search(loaded(), EIGHT).as_written is not None


@pytest.mark.parametrize("machine", ["7xH100-80GB", "999999999x8xH100-80GB"])
def test_a_batch_that_the_ranks_cannot_share_is_refused(machine):
    with pytest.raises(UserError, match=r"`batch.global_batch_size` must be|`--gpus` must be at most"):
        search(loaded(), parse_gpus(machine))


def test_only_as_written():
    found = search(loaded(), EIGHT, only_as_written=True)
    assert found.as_written is not None and not found.candidates and RoughMemory.made == 1


# ---------------------------------------------------------------- nothing fits


def test_nothing_fits_says_by_how_much_and_what_would_do():
    spec, cluster = load_spec("llama-8b", ["backend.kind=single"]), parse_gpus("1xT4")
    found = search(spec, cluster, 0.5)
    assert found.best is None
    message = nothing_fits(spec, found, 0.5)
    short = (found.candidates[0].memory.high_bytes - found.usable_bytes) / 2**30
    assert f"{short:.1f} short" in message and message.startswith("`--gpus` must be")
    assert "offload to host memory is not enough" in message
    length = int(message.partition("`data.sequence_length` to ")[2].split()[0])
    shorter = change_spec(spec, data={**spec.data.model_dump(), "sequence_length": length})
    longer = change_spec(spec, data={**spec.data.model_dump(), "sequence_length": 2 * length})
    assert first_fit(shorter, cluster, 0.5) and not first_fit(longer, cluster, 0.5)


def test_more_gpus_are_the_next_power_of_two_that_does(monkeypatch):
    class Sharded(RoughMemory):  # nothing can be offloaded
        def __init__(self, spec, groups, rendered, plan, gpu, **more):
            super().__init__(spec, groups, rendered, plan, gpu, **more)
            self.states = 16 * sum(group.parameters for group in groups) // plan.world_size
            self.host = 0

    monkeypatch.setattr("scaling.estimate.search.MemoryModel", Sharded)
    spec, cluster = load_spec("llama-8b", ["data.sequence_length=512"]), parse_gpus("2xA100-40GB")
    found = search(spec, cluster)
    assert found.best is None and "use 4xA100-40GB (" in nothing_fits(spec, found, 0.02)


@pytest.mark.parametrize(
    ("machine", "count", "larger"),
    [
        ("1xT4", 4, (1, 4)),
        ("1xT4", 8, (1, 8)),
        ("1xT4", 16, (2, 8)),
        ("4x4xT4", 32, (8, 4)),
        ("4x4xT4", 2, (1, 2)),
        ("1x16xT4", 64, (4, 16)),
        ("4x6xT4", 32, None),
    ],
)
def test_machines_grow_by_whole_nodes(machine, count, larger):
    found = grown(parse_gpus(machine), count)
    assert (found and (found.nodes, found.gpus_per_node)) == larger


# ---------------------------------------------------------------- speed


def test_a_thousand_candidates_take_one_model_for_each_structure():
    """What makes a thousand a second possible: micro-batches share what is costly."""
    spec = load_spec("llama-8b", ["batch.global_batch_tokens=null", "batch.global_batch_size=5760"])
    before = RoughMemory.made
    count = len(search(spec, EIGHT).candidates)
    assert count > 700 and RoughMemory.made - before < count / 20
