"""The time model: what must hold whatever the constants are, a few cases by hand, and published runs."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published
from scaling.batch import resolve_batch
from scaling.errors import UserError
from scaling.estimate.collectives import BASE_SECONDS, LINK_EFFICIENCY, LINK_SECONDS, NETWORK_SECONDS, ring
from scaling.estimate.compute import block_passes, product_seconds
from scaling.estimate.flops import structure, train_flops_per_token
from scaling.estimate.rates import rates_of
from scaling.estimate.results import TimeEstimate
from scaling.estimate.time import estimate_time
from scaling.groups import resolve_groups
from scaling.hardware import GPUS, Cluster, find_gpu, load_hardware, parse_gpus
from scaling.inventory import parameters
from scaling.render import render
from scaling.spec import load_spec

BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-keep": {"kind": "fsdp", "reshard_after_forward": False},
    "fsdp-offload": {"kind": "fsdp", "cpu_offload": True},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero2-offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero3-offload": {
        "kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"
    },
    "zero3-nvme": {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/scratch"},
}  # fmt: skip
SAMPLED = ["sampling", "scoring"]
PLAIN: dict[str, Any] = {"objective": {"kind": "causal_lm", "cross_entropy": "plain"}}


def estimate(
    gpus: str | Cluster, recipe: str = "llama-8b", *, micro: int = 1, accumulation: int = 1, **changes: Any
) -> TimeEstimate:
    cluster = parse_gpus(gpus) if isinstance(gpus, str) else gpus
    batch = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    spec = load_spec(recipe, [f"{key}={json.dumps(value)}" for key, value in ({"batch": batch} | changes).items()])
    plan = resolve_batch(spec, cluster.world_size)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    return estimate_time(spec, plan, groups, render(spec, cluster.world_size), cluster)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_parts_add_up_and_are_sane(backend: str, accumulation: int) -> None:
    found = estimate("2x8xH100-80GB", micro=2, accumulation=accumulation, backend=BACKENDS[backend])
    names = ["compute", "communication_exposed", "optimizer", "offload_exposed", "overhead"]
    assert list(found.parts) == names
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert all(seconds >= 0 and math.isfinite(seconds) for seconds in found.parts.values())
    assert found.tokens_per_second_per_gpu == pytest.approx(2 * accumulation * 8192 / found.step_seconds)
    assert found.mfu is not None and 0 < found.mfu < 1
    offloads = "offload" in backend or "nvme" in backend
    assert (found.parts["offload_exposed"] > 0) == offloads
    assert (found.parts["optimizer"] == 0) == offloads


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_gpus_of_a_node_never_slow_what_a_rank_computes(backend: str) -> None:
    found = [estimate(f"{count}xH100-80GB", backend=BACKENDS[backend]) for count in (1, 2, 4, 8)]
    for fewer, more in pairwise(found):
        assert more.parts["compute"] <= fewer.parts["compute"] * (1 + 1e-9)
        assert more.parts["optimizer"] <= fewer.parts["optimizer"]
        assert more.parts["communication_exposed"] > 0


def test_one_rank_communicates_nothing() -> None:
    for backend in BACKENDS.values():
        assert estimate("1xH200", backend=backend).parts["communication_exposed"] == 0


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_communication_grows_with_nodes(backend: str) -> None:
    found = [estimate(f"{nodes}x8xH100-80GB", backend=BACKENDS[backend]) for nodes in (1, 2, 16, 128, 1024)]
    exposed = [one.parts["communication_exposed"] for one in found]
    assert exposed == sorted(exposed) and exposed[-1] < 60


def test_replicas_save_communication_among_thousands() -> None:
    whole = estimate("512x8xH100-80GB", backend={"kind": "fsdp"})
    hybrid = estimate("512x8xH100-80GB", backend={"kind": "fsdp", "replicate": 512})
    assert hybrid.step_seconds < whole.step_seconds


def test_zero1_reduces_once_a_step_zero2_at_every_micro_step() -> None:
    def exposed(stage: int, accumulation: int) -> float:
        backend = {"kind": "deepspeed", "zero_stage": stage}
        found = estimate("8xH100-80GB", accumulation=accumulation, backend=backend)
        return found.parts["communication_exposed"]

    assert exposed(1, 8) == pytest.approx(exposed(1, 1))
    assert exposed(2, 8) > 4 * exposed(2, 1)


def test_keeping_gathered_parameters_saves_communication() -> None:
    freed, kept = (estimate("8xH100-80GB", backend=BACKENDS[name]) for name in ("fsdp", "fsdp-keep"))
    assert kept.parts["communication_exposed"] < freed.parts["communication_exposed"]


def test_twice_the_micro_batch_is_nearly_twice_the_compute_of_a_large_model() -> None:
    one, two = (estimate("8xH100-80GB", micro=micro, backend={"kind": "fsdp"}, **PLAIN) for micro in (2, 4))
    assert 1.85 < two.parts["compute"] / one.parts["compute"] < 2


def test_full_checkpointing_adds_about_a_third_to_compute() -> None:
    none, selective, full = (
        estimate("8xH100-80GB", micro=2, activation_checkpointing=mode, **PLAIN).parts["compute"]
        for mode in ("none", "selective", "full")
    )
    assert none < selective < full
    assert 1.2 < full / none < 1.38
    assert selective / none < 1.08


def test_recomputation_is_not_in_mfu() -> None:
    none, full = (estimate("8xH100-80GB", activation_checkpointing=mode) for mode in ("none", "full"))
    assert none.mfu is not None and full.mfu is not None
    assert none.mfu / full.mfu == pytest.approx(full.step_seconds / none.step_seconds)


def test_a_frozen_backbone_costs_less() -> None:
    rules = [{"name": "backbone", "match": ["layers.*", "embed_tokens.*"], "freeze": True}]
    whole, frozen = (
        estimate("8xH100-80GB", param_groups=[*more, {"name": "rest", "match": ["*"]}], **PLAIN) for more in ([], rules)
    )
    assert frozen.parts["compute"] < 0.5 * whole.parts["compute"]
    assert frozen.parts["optimizer"] < 0.2 * whole.parts["optimizer"]
    assert frozen.parts["communication_exposed"] < whole.parts["communication_exposed"]


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_frozen_parts_that_are_whole_are_not_gathered(backend: str) -> None:
    rules = [{"name": "backbone", "match": ["layers.*", "embed_tokens.*"], "freeze": True}]
    groups = {"param_groups": [*rules, {"name": "rest", "match": ["*"]}]}
    cut, whole = (
        estimate("2x8xA100-40GB", backend=BACKENDS[backend] | {"frozen": policy}, **groups, **PLAIN)
        for policy in ("shard", "replicate")
    )
    assert whole.parts["communication_exposed"] < 0.5 * cut.parts["communication_exposed"]
    assert whole.parts["optimizer"] == cut.parts["optimizer"] and whole.step_seconds < cut.step_seconds
    trained = [{"name": "all", "match": ["*"]}]
    same = [
        estimate("2x8xA100-40GB", backend=BACKENDS[backend] | {"frozen": policy}, param_groups=trained, **PLAIN)
        for policy in ("shard", "replicate")
    ]
    assert same[0] == same[1], "nothing is frozen"


def test_compiling_saves_memory_traffic() -> None:
    eager, compiled = (estimate("8xH100-80GB", compile=value).parts["compute"] for value in (False, True))
    assert 0.8 * eager < compiled < eager


def test_a_tiny_model_is_bound_by_the_host() -> None:
    model = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
    model["vocab_size"] = 256
    spec = load_spec("gpt2-124m").model.model_dump() | model
    found = estimate("1xH100-80GB", "gpt2-124m", model=spec, backend={"kind": "single"})
    assert found.parts["overhead"] > found.parts["compute"]


def test_small_and_thin_products_are_less_efficient() -> None:
    rates = rates_of(find_gpu("H100-80GB"), "bf16")

    def rate(rows: int, inner: int, columns: int) -> float:
        return 2 * rows * inner * columns / product_seconds(rows, inner, columns, rates)

    assert rate(8192, 8192, 8192) < rates.matmul
    assert rate(8192, 8192, 8192) > rate(1024, 8192, 8192) > rate(128, 8192, 8192)
    assert rate(8192, 8192, 8192) > rate(8192, 512, 8192) > rate(8192, 64, 8192)
    # One row: its time is that of reading the matrix.
    assert product_seconds(1, 8192, 8192, rates) == pytest.approx(2 * 8192 * 8192 / rates.hbm, rel=0.01)


# ---------------------------------------------------------------- by hand


def test_sampling_is_told_apart_and_wants_the_weights_for_every_token() -> None:
    def tuned(gpus: str, backend: str, tokens: int = 170, **changes: Any) -> TimeEstimate:
        objective = load_spec("minimind-ppo").objective.model_dump() | {"max_new_tokens": tokens} | changes
        return estimate(gpus, "minimind-ppo", micro=32, objective=objective, backend=BACKENDS[backend])

    found = tuned("8xH100-80GB", "ddp")
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds) and list(found.parts)[-2:] == SAMPLED
    assert found.tokens_per_second_per_gpu == pytest.approx(32 * 340 / found.step_seconds)
    half = tuned("8xH100-80GB", "ddp", 85)
    assert half.parts["sampling"] == pytest.approx(found.parts["sampling"] / 2, rel=0.05)
    twice = tuned("8xH100-80GB", "ddp", epochs=2)
    for part in SAMPLED:
        assert twice.parts[part] == pytest.approx(found.parts[part] / 2)
    kept, freed, cut = (tuned("8xH100-80GB", name).parts["sampling"] for name in ("fsdp-keep", "fsdp", "zero3"))
    assert found.parts["sampling"] <= kept <= freed < cut, "gathered never, once, by block and by module"
    assert set(estimate("8xH100-80GB", "minimind-sft", micro=32).parts).isdisjoint(SAMPLED)


def test_collectives_by_hand() -> None:
    node = ring(parse_gpus("4xH100-80GB"), 4)
    # 3/4 of 1 GB over 450 GB/s x 0.81, and three hops.
    assert node.gather(1e9) == pytest.approx(0.75 / (450 * LINK_EFFICIENCY) + BASE_SECONDS + 3 * LINK_SECONDS)
    assert node.all_reduce(1e9) == pytest.approx(1.5 / (450 * LINK_EFFICIENCY) + BASE_SECONDS + 6 * LINK_SECONDS)
    # Two nodes of slow network: four ranks of a node share 4 x 6.25 GB/s; six hops within nodes and one between.
    slow = replace(find_gpu("A100-40GB"), network_bytes_per_s=6.25e9)
    two = ring(Cluster(2, 4, slow), 8)
    assert two.bandwidth == pytest.approx(0.75 * 25e9)
    assert two.gather(1e9) == pytest.approx(7 / 8 / 18.75 + BASE_SECONDS + 6 * LINK_SECONDS + NETWORK_SECONDS)
    # Replicas over nodes, rank 0 with rank 4: each has its own card.
    assert ring(Cluster(2, 4, slow), 2, 4).bandwidth == pytest.approx(0.75 * 6.25e9)
    # A fast network is no faster than the links within the node.
    assert ring(Cluster(2, 8, replace(slow, network_bytes_per_s=1e12)), 16).bandwidth == LINK_EFFICIENCY * 300e9


def test_a_group_that_fits_no_node_evenly_crosses_nodes() -> None:
    assert ring(parse_gpus("3x8xH100-80GB"), 6).nodes == 2
    assert ring(parse_gpus("3x8xH100-80GB"), 4).nodes == 1


def test_the_switch_helps_an_all_reduce_of_a_whole_node() -> None:
    eight, four = ring(parse_gpus("8xH100-80GB"), 8), ring(parse_gpus("4xH100-80GB"), 4)
    assert eight.switch_bandwidth > eight.bandwidth
    assert four.switch_bandwidth == four.bandwidth
    assert ring(parse_gpus("8xA100-80GB"), 8).switch_bandwidth == LINK_EFFICIENCY * 300e9


def test_the_structure_has_the_flops_that_mfu_counts() -> None:
    model = load_spec("llama-8b").model
    work = structure(model)
    ((block, count),) = work.blocks
    assert count == 32 and work.elements == work.trained == 8_030_261_248
    assert block.trained == block.elements == 218_112_000
    products = count * sum(p.inputs * p.outputs for p in block.products) + 4096 * 128256
    assert train_flops_per_token(model, 8192) == 6 * products + 12 * 32 * 4096 * 8192


def test_blocks_that_differ_are_told_apart() -> None:
    model = load_spec("llama-8b").model
    frozen = {p.name for p in parameters(model) if p.name.startswith(("embed_", "layers.0.", "layers.1."))}
    kinds = structure(model, frozenset(frozen)).blocks
    # Two that train nothing and pass nothing on; one whose gradient stops at its norm; those after it.
    assert [count for _, count in kinds] == [2, 1, 29]
    assert [(block.backward, block.reads) for block, _ in kinds] == [(False, False), (True, False), (True, True)]
    rates = rates_of(find_gpu("H200"), "bf16")
    backward = [block_passes(model, b, 8192, 8192, "full", False, rates).backward.seconds for b, _ in kinds]
    assert backward[0] == 0 < backward[1] <= backward[2]


# ---------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("gpus", "missing", "changes"),
    [
        ("1xH100-80GB", "hbm_bytes_per_s", {"backend": {"kind": "single"}}),
        ("1xH100-80GB", "bf16_flops", {"backend": {"kind": "single"}}),
        ("8xH100-80GB", "link_bytes_per_s", {}),
        ("2x8xH100-80GB", "network_bytes_per_s", {}),
        ("8xH100-80GB", "host_bytes_per_s", {"backend": {"kind": "fsdp", "cpu_offload": True}}),
    ],
)
def test_a_rate_that_is_not_known_is_asked_for(gpus: str, missing: str, changes: dict[str, Any]) -> None:
    cluster = parse_gpus(gpus)
    blind = replace(cluster, gpu=replace(cluster.gpu, **{missing: None}))
    with pytest.raises(UserError, match=rf"`{missing}` of the H100-80GB must be known .* `--hardware FILE.json`"):
        estimate(blind, **changes)


def test_what_is_not_needed_is_not_asked_for() -> None:
    gpu = replace(find_gpu("H100-80GB"), network_bytes_per_s=None, host_bytes_per_s=None, memory_bytes=None)
    estimate(Cluster(1, 8, gpu))
    estimate(Cluster(1, 1, replace(gpu, link_bytes_per_s=None)), backend={"kind": "single"})


def test_a_card_without_bf16_says_so() -> None:
    with pytest.raises(UserError, match="`bf16_flops` of the T4"):
        estimate("1xT4", "gpt2-124m", backend={"kind": "single"})
    assert estimate("1xT4", "gpt2-124m", backend={"kind": "single"}, precision="fp16").mfu


def test_an_unmeasured_matmul_is_taken_from_the_family() -> None:
    small, large = (rates_of(find_gpu(name), "bf16") for name in ("A100-40GB", "A100-80GB"))
    assert small.matmul == pytest.approx(large.matmul)
    for gpu in GPUS:
        if gpu.bf16_flops and gpu.hbm_bytes_per_s:
            assert rates_of(gpu, "bf16").matmul < gpu.bf16_flops


def test_fp32_has_a_rate_but_no_mfu() -> None:
    found = estimate("8xH100-80GB", precision="fp32")
    assert found.mfu is None
    assert found.step_seconds > 4 * estimate("8xH100-80GB").step_seconds


# ---------------------------------------------------------------- --hardware


def test_hardware_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text('{"name": "X1", "bf16_flops": 1e15, "hbm_bytes_per_s": 3e12, "device_names": ["ACME X1"]}')
    gpu = load_hardware(path)
    assert (gpu.name, gpu.bf16_flops, gpu.device_names) == ("X1", 1e15, ("ACME X1",))
    assert gpu.link_bytes_per_s is None and gpu.matmul_flops is None
    assert estimate(Cluster(1, 1, gpu), backend={"kind": "single"}).mfu


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "X1", "hbm_bytes": 1}', "'hbm_bytes'; did you mean 'hbm_bytes_per_s'"),
        ('{"bf16_flops": 1e15}', "`name` must be in a `--hardware` file"),
        ('{"name": "X1", "bf16_flops": "fast"}', "`bf16_flops` must be a positive number or null, but is 'fast'"),
        ('{"name": "X1", "bf16_flops": -1}', "`bf16_flops` must be a positive number"),
        ('{"name": "X1", "bf16_flops": true}', "`bf16_flops` must be a positive number"),
        ('{"name": "X1", "bf16_flops": NaN}', "`bf16_flops` must be a positive number"),
        ('{"name": "X1", "memory_bytes": 79.5}', "`memory_bytes` must be a whole number"),
        ('{"name": "X1", "device_names": "ACME"}', "`device_names` must be a list of texts"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot be read as one"),
    ],
)
def test_wrong_hardware_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_hardware(path)
    assert message in str(caught.value)


def test_an_absent_hardware_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_hardware(tmp_path / "absent.json")


# ---------------------------------------------------------------- published runs


def test_published_runs_are_met() -> None:
    rows = published.compare(published.load_runs())
    scored = published.summaries(rows)["scored, grade A"]
    assert scored["rows"] > 80
    assert scored["median"] < published.MEDIAN and scored["p90"] < published.NINETIETH


def test_fitted_rows_are_named_and_never_scored() -> None:
    runs = published.load_runs()
    assert tuple(run.row["id"] for run in runs if run.fitted and run.row["grade"] == "A") == published.FITTED_ON
    rows = [row for row in published.compare(runs) if row["fitted"]]
    assert {row["id"] for row in rows} >= set(published.FITTED_ON)
    found = published.summaries(rows)
    assert not any(part["rows"] for name, part in found.items() if name.startswith("scored"))
