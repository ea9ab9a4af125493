"""Rendered configs: DeepSpeed reads every value as it was meant, and what is shipped is what is rendered."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.errors import UserError, run_command
from scaling.inventory import tied
from scaling.models.decoder import Decoder
from scaling.render import render
from scaling.render.__main__ import KINDS, main
from scaling.render.shipped import GPUS, RECIPES, STRATEGIES, shipped
from scaling.spec import load_spec
from scaling.spec.sections import Spec
from scaling.spec.source import recipes

ROOT = Path(__file__).parent.parent
WORLD_SIZES = (1, 4, 8)

# ---------------------------------------------------------------- DeepSpeed reads what we mean


ZERO: dict[str, dict[str, Any]] = {
    "1": {"zero_stage": 1},
    "1 offload": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "1 tuned": {"zero_stage": 1, "overlap_comm": False, "reduce_bucket_size": 2048, "allgather_bucket_size": 4096},
    "2": {"zero_stage": 2},
    "2 offload": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "3": {"zero_stage": 3},
    "3 optimizer offload": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "3 parameter offload": {"zero_stage": 3, "offload_parameters": "cpu"},
    "3 offload": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "3 nvme": {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/nvme"},
    "3 tuned": {
        "zero_stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 2048,
        "prefetch_bucket_size": 0,
        "param_persistence_threshold": 0,
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
        "sub_group_size": 4096,
    },
}

ZERO_KEYS = {
    "zero_stage": "stage",
    "overlap_comm": "overlap_comm",
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "prefetch_bucket_size": "prefetch_bucket_size",
    "param_persistence_threshold": "param_persistence_threshold",
    "max_live_parameters": "max_live_parameters",
    "max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
    "zero_hpz_partition_size": "zero_hpz_partition_size",
}
"""Field of our spec -> attribute of DeepSpeed's parsed zero section."""


class Asked(dict[str, Any]):
    """A dict that knows which of its keys were looked up, of those that a removed feature is not refused by."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def run(*arguments: str) -> int:
    """The command in this process; the exit code."""
    return run_command(lambda: main(arguments))


class Ranks:
    """What DeepSpeed asks for the number of data-parallel ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def get_data_parallel_world_size(self) -> int:
        return self.world_size


@pytest.fixture
def deepspeed_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own parser, which takes the world size from `mpu` once there is a rank."""
    config = pytest.importorskip("deepspeed.runtime.config")
    monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
    return config.DeepSpeedConfig


def values(node: Any) -> Iterator[Any]:
    """All keys and leaves of nested JSON."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    else:
        yield node


def zero_spec(recipe: str, backend: dict[str, Any], precision: str, clip: float | None) -> Spec:
    spec = load_spec(recipe)
    frozen = spec.lora is not None or any(group.freeze for group in spec.param_groups)
    if backend.get("offload_parameters") == "nvme" and frozen:
        backend = backend | {"prefetch_bucket_size": 0}  # DeepSpeed reads frozen ones ahead wrongly
    settings = {"backend": {"kind": "deepspeed", **backend}, "precision": precision, "max_grad_norm": clip}
    return load_spec(recipe, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("backend", ZERO)
@pytest.mark.parametrize("recipe", ["atlas-vla", "gpt-stdlib", "gpt2-124m", "llama-8b", "minimind-lora"])
def test_deepspeed_reads_every_value_as_given(recipe: str, backend: str, precision: str, deepspeed_config: Any) -> None:
    for clip in (None, 0.7):
        spec = zero_spec(recipe, ZERO[backend], precision, clip)
        for world_size in WORLD_SIZES:
            rendered = render(spec, world_size)
            copy = json.loads(json.dumps(rendered))
            assert copy == rendered, "plain JSON"
            asked = Asked(rendered | {name: Asked(rendered[name]) for name in ("data_types",)})
            read = deepspeed_config(asked, mpu=Ranks(world_size))
            assert read.world_size == world_size
            assert rendered == copy, "DeepSpeed changed its input"
            assert set(rendered) <= asked.asked, "keys that DeepSpeed never looks at"
            assert set(rendered["data_types"]) <= asked["data_types"].asked
            assert_read_as_rendered(read, rendered)
            assert_read_as_specified(read, spec, clip)
            assert "auto" not in list(values(rendered))
            assert not {"optimizer", "scheduler"} & set(rendered)
            assert read.optimizer_name is None and read.scheduler_name is None


def assert_read_as_rendered(read: Any, rendered: dict[str, Any]) -> None:
    """Every rendered key is somewhere in what DeepSpeed read, with the rendered value."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    parsed = {"bf16": read.bfloat16_config, "fp16": read.float16_config, "zero_optimization": read.zero_config}
    for key, value in rendered.items():
        if key in parsed:
            assert_section(parsed[key].model_dump(by_alias=True), value)
        elif key == "communication_data_type":
            assert read.communication_data_type is dtypes[value]
        elif key == "data_types":
            assert {name: getattr(read, name) for name in value} == value
        else:
            assert getattr(read, key) == value, key


def assert_section(read: dict[str, Any], rendered: dict[str, Any]) -> None:
    for key, value in rendered.items():
        if isinstance(value, dict):
            assert_section(read[key], value)
        else:
            have = str(read[key]) if isinstance(read[key], Path) else read[key]
            assert have == value and isinstance(have, bool) == isinstance(value, bool), key


def sizes(spec: Spec, world_size: int) -> tuple[float, float, float]:
    """Global batch, micro-batch and accumulation, the open one solved."""
    whole: Any = spec.batch.global_batch_size
    micro: Any = spec.batch.micro_batch_size
    accumulation: Any = spec.batch.gradient_accumulation_steps
    if spec.batch.global_batch_tokens is not None:
        whole = spec.batch.global_batch_tokens / spec.data.sequence_length
    if whole is None:
        return micro * accumulation * world_size, micro, accumulation
    if micro == "auto":
        return whole, whole / world_size / accumulation, accumulation
    return whole, micro, whole / world_size / micro


def assert_read_as_specified(read: Any, spec: Spec, clip: float | None) -> None:
    """What the spec asked for is what DeepSpeed read, by DeepSpeed's own names."""
    backend = spec.backend
    assert backend.kind == "deepspeed"
    whole, micro, accumulation = sizes(spec, read.world_size)
    assert read.train_batch_size == whole
    assert read.train_micro_batch_size_per_gpu == micro
    assert read.gradient_accumulation_steps == accumulation
    assert read.gradient_clipping == (clip or 0)
    assert read.bfloat16_config.enabled == (spec.precision == "bf16")
    assert read.float16_config.enabled == (spec.precision == "fp16")
    assert read.float16_config.loss_scale == 0
    assert read.grad_accum_dtype == "fp32"
    assert read.communication_data_type is torch.float32
    assert read.gradient_allreduce_op == "mean"
    assert not read.prescale_gradients and read.gradient_predivide_factor == 1
    assert not read.torch_autocast_enabled and not read.bfloat16_config.bf16_master_weights_and_grads
    zero = read.zero_config
    for ours, theirs in ZERO_KEYS.items():
        if getattr(backend, ours) is not None:
            assert getattr(zero, theirs) == getattr(backend, ours), ours
    if backend.zero_stage < 3:
        assert zero.allgather_bucket_size == (backend.allgather_bucket_size or backend.reduce_bucket_size)
    for asked, section in ((backend.offload_optimizer, zero.offload_optimizer),
                           (backend.offload_parameters, zero.offload_param)):  # fmt: skip
        assert (None if section is None else section.device) == asked
        assert section is None or (section.nvme_path and str(section.nvme_path)) == (
            backend.nvme_path if asked == "nvme" else None
        )


def test_hpz_is_rendered_and_must_divide_the_world_size(deepspeed_config: Any) -> None:
    spec = zero_spec("gpt2-124m", {"zero_stage": 3, "zero_hpz_partition_size": 4}, "bf16", 1.0)
    assert deepspeed_config(render(spec, 8), mpu=Ranks(8)).zero_config.zero_hpz_partition_size == 4
    with pytest.raises(UserError, match="zero_hpz_partition_size"):
        render(spec, 2)


def test_a_key_that_deepspeed_does_not_know_would_be_noticed(deepspeed_config: Any) -> None:
    """DeepSpeed ignores unknown top-level keys; the test above relies on noticing which it looks at."""
    asked = Asked(render(zero_spec("gpt2-124m", {"zero_stage": 2}, "bf16", 1.0), 4) | {"gradient_cliping": 1.0})
    deepspeed_config(asked, mpu=Ranks(4))
    assert set(asked) - asked.asked == {"gradient_cliping"}


# ---------------------------------------------------------------- ds_configs


def test_shipped_configs_are_what_is_rendered() -> None:
    want = dict(shipped())
    folder = ROOT / "ds_configs"
    have = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    remedy = "run `python -m scaling.render --write-shipped ds_configs`, and delete what it does not name"
    assert sorted(have) == sorted(want), remedy
    assert [name for name in want if have[name] != want[name].encode()] == [], remedy


def test_every_recipe_is_shipped_for_every_strategy_and_count() -> None:
    for_a_cpu = {name for name in recipes() if name.endswith("-tiny")} - {"atlas-vla-tiny"}
    assert sorted(RECIPES) == sorted(set(recipes()) - for_a_cpu)
    assert len(dict(shipped())) == len(RECIPES) * len(STRATEGIES) * len(GPUS)


def test_write_shipped_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--write-shipped", str(tmp_path / "new")) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(line).relative_to(tmp_path / "new").as_posix() for line in printed] == list(dict(shipped()))
    assert all(Path(line).is_file() for line in printed)


# ---------------------------------------------------------------- torch's backends


def fsdp(recipe: str, **backend: Any) -> Spec:
    return load_spec(recipe, [f"backend={json.dumps({'kind': 'fsdp', **backend})}"])


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if load_spec(name).model.kind == "decoder"])
def test_wrap_plan_gathers_every_parameter_once(recipe: str, tie: bool, reshard: bool) -> None:
    spec = load_spec(
        recipe,
        [
            f"model.tie_word_embeddings={json.dumps(tie)}",
            f'backend={{"kind": "fsdp", "reshard_after_forward": {json.dumps(reshard)}}}',
        ],
    )
    plan = render(spec, 4)["wrap"]
    with torch.device("meta"):
        model = Decoder(spec.model)
    owners: dict[str, list[int]] = {name: [] for name, _ in model.named_parameters(remove_duplicate=False)}
    for index, entry in enumerate(plan):
        assert set(entry) == {"modules", "reshard_after_forward"}
        for path in entry["modules"]:
            for name, _ in model.get_submodule(path).named_parameters(prefix=path, remove_duplicate=False):
                owners[name].append(index)
    assert all(len(found) <= 1 for found in owners.values()), "wrapped twice"
    for names in tied(spec.model):
        assert len({tuple(owners[name]) for name in names}) == 1, "tied weights in two groups"
    root = {name for name, found in owners.items() if not found}
    assert not any(name.startswith("layers.") for name in root)
    assert ("lm_head.weight" in root) == tie
    # In the order of the forward pass; freed after it as asked, except the last, whose backward pass comes next.
    assert [name for name, found in owners.items() if found] == [
        name for index in range(len(plan)) for name, found in owners.items() if found == [index]
    ]
    assert [entry["reshard_after_forward"] for entry in plan] == [reshard] * (len(plan) - 1) + [False]


@pytest.mark.parametrize("reshard", [True, False])
def test_a_vla_is_gathered_block_by_block_with_its_words_apart(reshard: bool) -> None:
    plan = render(fsdp("atlas-vla-tiny", reshard_after_forward=reshard), 4)["wrap"]
    parts = [f"{part}.layers.{index}" for part in ("vision", "language", "fusion") for index in range(2)]
    assert [entry["modules"] for entry in plan] == [
        [path] for path in [*parts[:2], "language.embed_tokens", *parts[2:]]
    ]
    assert [entry["reshard_after_forward"] for entry in plan] == [reshard] * 6 + [False]


@pytest.mark.parametrize("replicate", [1, 2, 4])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_mesh_has_all_ranks(world_size: int, replicate: int) -> None:
    spec = fsdp("gpt2-124m", replicate=replicate)
    if world_size % replicate:
        with pytest.raises(UserError, match="replicate"):
            render(spec, world_size)
        return
    mesh = render(spec, world_size)["mesh"]
    shard = mesh.pop("dp_shard")
    assert mesh == ({} if replicate == 1 else {"dp_replicate": replicate})
    assert shard * replicate == world_size


def test_the_replicas_come_first_in_the_mesh() -> None:
    """Ranks of one shard group are neighbours, so that sharding stays within a node."""
    assert list(render(fsdp("gpt2-124m", replicate=2), 8)["mesh"]) == ["dp_replicate", "dp_shard"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_backend_gets_the_same_batch_clipping_and_precision(recipe: str, kind: str) -> None:
    spec = load_spec(recipe, [*KINDS[kind], "max_grad_norm=0.5", "precision=bf16"])
    world_size = 1 if kind == "single" else 4
    rendered = render(spec, world_size)
    assert json.loads(json.dumps(rendered)) == rendered
    assert "auto" not in list(values(rendered))
    whole, micro, accumulation = sizes(spec, world_size)
    batch = {"global_batch_size": whole, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    if kind.startswith("zero"):
        assert rendered["zero_optimization"]["stage"] == int(kind[-1])
        assert rendered["train_batch_size"] == whole
        assert rendered["train_micro_batch_size_per_gpu"] == micro
        assert rendered["gradient_accumulation_steps"] == batch["gradient_accumulation_steps"]
        assert rendered["gradient_clipping"] == 0.5
        return
    assert rendered["kind"] == kind
    assert rendered["batch"] == batch
    assert rendered["max_grad_norm"] == 0.5
    assert [rendered[f"{name}_dtype"] for name in ("param", "reduce", "master")] == ["bfloat16", "float32", "float32"]
    assert all(hasattr(torch, rendered[f"{name}_dtype"]) for name in ("param", "reduce", "master"))


def test_single_is_one_process() -> None:
    with pytest.raises(UserError, match="single"):
        render(load_spec("gpt2-124m", ["backend.kind=single"]), 2)


# ---------------------------------------------------------------- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m scaling.render` in a process of its own, that says on its last line of stderr what it imported."""
    code = (
        "import runpy, sys\n"
        "sys.argv[0] = 'scaling.render'\n"
        "try:\n"
        "    runpy.run_module('scaling.render', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules], file=sys.stderr)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_command_prints_json_without_torch() -> None:
    done = command("gpt2-124m", "--world-size", "8")
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert json.loads(done.stdout) == render(load_spec("gpt2-124m"), 8)


def test_command_refuses_without_a_traceback() -> None:
    done = command("gpt2-124m", "--gpus", "8xH1000-80GB")
    message, imported, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout, imported, rest) == (2, "", "[]", [])
    assert "H100-80GB" in message


def test_command_names_the_sum_of_a_world_size_that_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gpt2-124m", "--world-size", "3") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "16 x 3 x 1024 = 49152" in printed.err
    assert "524288" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["gpt3-124m"],
        ["gpt2-124m", "--world-size", "0"],
        ["gpt2-124m", "--world-size", "eight"],
        ["gpt2-124m", "--backend", "zero4"],
        ["gpt2-124m", "--backend", "single", "--gpus", "8xH100-80GB"],
        ["gpt2-124m", "--set", "backend.zero_stage=2"],
    ],
    ids=" ".join,
)
def test_command_exits_2_for_what_the_user_got_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "must be" in printed.err


@pytest.mark.parametrize("kind", KINDS)
def test_command_renders_any_backend(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    world_size = 1 if kind == "single" else 8
    assert run("gpt2-124m", "--backend", kind, "--gpus", f"{world_size}xH100-80GB") == 0
    rendered = json.loads(capsys.readouterr().out)
    assert rendered == render(load_spec("gpt2-124m", KINDS[kind]), world_size)
    found = f"zero{rendered['zero_optimization']['stage']}" if "zero_optimization" in rendered else rendered["kind"]
    assert found == kind


def test_set_comes_after_backend(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        "--set",
        "backend.zero_stage=3",
        "--set",
        "backend.offload_parameters=cpu",
        "--set",
        "max_grad_norm=null",
    ]
    assert run("gpt2-124m", "--backend", "zero2", *changes) == 0
    rendered = json.loads(capsys.readouterr().out)
    assert rendered["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert rendered["gradient_clipping"] == 0.0
