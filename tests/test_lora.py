"""Low-rank adapters: against peft itself, over all backends, in checkpoints, in exports, in the ledger."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import SPECS, TINY_MODEL, python, torchrun
from test_engine import TOLERANCE, check_return, check_taking_over, launch
from test_export import assert_same_logits, loaded, write_checkpoint
from test_inventory import BATCH, LENGTH
from test_models import GPT2, LLAMA, decoder_spec, random_decoder, token_ids
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ledger import PART, WORST, compare, draw
from scaling.checkpoint.format import Reader
from scaling.checkpoint.store import Store
from scaling.checkpoint.weights import open_weights
from scaling.engine.build import build_engine
from scaling.engine.process import Process
from scaling.errors import UserError
from scaling.estimate.flops import train_flops_per_token
from scaling.export import export
from scaling.groups import BASE, empty_groups
from scaling.inventory import is_adapter, parameters
from scaling.models.decoder import Decoder, decoder_recipe
from scaling.models.recipe import canonical_name
from scaling.run import resolve
from scaling.spec import load_spec
from scaling.spec.sections import CausalLM, Lora
from scaling.spec.sections import Decoder as DecoderSpec
from scaling.train import main

peft = pytest.importorskip("peft")

LORA = Lora(rank=4, alpha=6.0, target_modules=("v_proj", "q_proj", "down_proj"))
ALL = Lora(rank=3, target_modules="all-linear")
MODELS = {
    "gpt2": decoder_spec(**GPT2),
    "llama": decoder_spec(**LLAMA),
    "qwen2 tied": decoder_spec(**LLAMA, qkv_bias=True, tie_word_embeddings=True),
}


def assignment(lora: Lora) -> str:
    return f"lora={lora.model_dump_json()}"


@pytest.fixture
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Process(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def adapted(spec: DecoderSpec, lora: Lora) -> nn.Module:
    return decoder_recipe(spec, CausalLM(), 3, lora).build()


# ---------------------------------------------------------------- names, groups, work


@pytest.mark.parametrize("lora", [LORA, ALL, Lora()], ids=["some", "all", "default"])
@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_the_modules(model: str, lora: Lora) -> None:
    with torch.device("meta"):
        real = adapted(MODELS[model], lora).named_parameters()
    want = [(canonical_name(name), tuple(parameter.shape), not parameter.requires_grad) for name, parameter in real]
    assert [(p.name, p.shape, p.frozen) for p in parameters(MODELS[model], lora)] == want
    base = [(p.name, p.shape) for p in parameters(MODELS[model], lora) if not is_adapter(p.name)]
    assert base == [(p.name, p.shape) for p in parameters(MODELS[model])], "the model's own names stay"


def test_initial_values_are_pefts_and_made_by_name() -> None:
    spec = MODELS["llama"]
    recipe = decoder_recipe(spec, CausalLM(), 3, LORA)
    down, up = (f"layers.1.mlp.down_proj.lora_{part}.weight" for part in "AB")
    value = recipe.initial_value(down, torch.Size((400, spec.intermediate_size)))
    bound = 1 / math.sqrt(spec.intermediate_size)  # kaiming uniform with a = sqrt(5)
    assert value.abs().max() <= bound and value.abs().max() > 0.99 * bound
    assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not recipe.initial_value(up, torch.Size((8, 4))).any()
    assert not torch.equal(value[:8], recipe.initial_value(down.replace("1", "0", 1), torch.Size((8, value.shape[1]))))


def test_rules_are_for_adapters_and_the_model_is_frozen() -> None:
    rules = [
        {"name": "tables", "match": ["embed*"], "lr": 1e-2},
        {"name": "queries", "match": ["*.q_proj.*"], "lr": 1e-4, "weight_decay": 0.0},
        {"name": "none", "match": ["layers.2.*"], "freeze": True},
        {"name": "rest", "match": ["*"]},
    ]
    spec = load_spec(str(SPECS / "llama-parity.json"), [assignment(LORA), f"param_groups={json.dumps(rules)}"])
    base, queries, none, rest = resolve(spec, 1).groups
    assert (base.name, base.frozen) == (BASE, True)
    assert set(base.names) == {p.name for p in parameters(spec.model)}
    assert queries.names == tuple(f"layers.{i}.self_attn.q_proj.lora_{part}.weight" for i in range(3) for part in "AB")
    assert (queries.lr, queries.weight_decay) == (1e-4, 0.0)
    assert none.frozen and all(is_adapter(name) for name in (*none.names, *rest.names))
    assert empty_groups(spec.param_groups, resolve(spec, 1).groups) == ("tables",)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('{"target_modules": ["q_proj", "lm_head"]}', "`lora.target_modules.1` must be a linear layer of the model's"),
        ('{"target_modules": ["gate_proj"]}', "use some of q_proj, k_proj, v_proj, o_proj, up_proj, down_proj"),
        ('{"target_modules": []}', "`lora.target_modules` must be"),
        ('{"target_modules": "all"}', '"all-linear"'),
        ('{"r": 8}', "did you mean `rank`?"),
        ('{"rank": 0}', "`lora.rank` must be a whole number of at least 1"),
        ('{"dropout": 1.0}', "`lora.dropout` must be"),
    ],
)
def test_what_cannot_be_is_refused(section: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        load_spec(str(SPECS / "gpt-parity.json"), [f"lora={section}"])
    assert message in str(found.value) and str(found.value).count("\n") == 0


def test_it_is_for_decoders() -> None:
    with pytest.raises(UserError, match='`lora` must be null for a model of kind "vla"'):
        load_spec(str(SPECS / "vla-parity.json"), ["lora={}"])


FROZEN = {"nothing": (), "some adapters": ("layers.0.", "layers.2.mlp"), "all lora_A": ("lora_A",)}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("lora", [LORA, ALL], ids=["some", "all"])
@pytest.mark.parametrize("model", MODELS)
def test_flops_are_what_torch_counts(model: str, lora: Lora, frozen: str) -> None:
    spec = MODELS[model]
    names = {p.name for p in parameters(spec, lora) if p.frozen or any(part in p.name for part in FROZEN[frozen])}
    with torch.device("meta"):
        module = adapted(spec, lora)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(canonical_name(name) not in names)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(ids, ids).backward()
    counted = counter.get_total_flops() / (BATCH * LENGTH)
    assert train_flops_per_token(spec, LENGTH, names, lora) == pytest.approx(counted, rel=1e-9)


# ---------------------------------------------------------------- against peft


@pytest.mark.parametrize("name", ["gpt-parity", "llama-parity"])
def test_a_run_is_a_plain_loop_with_peft(process, name: str) -> None:
    """Losses, gradients and weights of six steps; from the second on lora_A has gradients too."""
    spec = load_spec(str(SPECS / f"{name}.json"), [assignment(LORA), 'param_groups=[{"name":"all","match":["*"]}]'])
    job = resolve(spec, 1)
    recipe = decoder_recipe(spec.model, spec.objective, spec.seed, spec.lora)
    plain = peft.get_peft_model(
        Decoder(spec.model),
        peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    theirs = {canonical_name(n.removeprefix("base_model.model.")): p for n, p in plain.named_parameters()}
    with torch.no_grad():
        for parameter, value in theirs.items():
            value.copy_(recipe.initial_value(parameter, value.shape))
    trained = {n: p for n, p in theirs.items() if p.requires_grad}
    settings = spec.optimizer
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    engine = build_engine(spec, job.rendered, recipe, job.groups, process)
    ours = {canonical_name(n): p for n, p in engine.module.named_parameters()}
    assert {n for n, p in ours.items() if p.requires_grad} == trained.keys()
    with closing(engine):
        for step in range(6):
            ids = token_ids(4, 65, seed=step, vocabulary=spec.model.vocab_size)
            with engine.micro_step(last=True):
                have = engine.module(ids[:, :-1], ids[:, 1:])
                engine.backward(have, torch.tensor(1 / 256))
            want = plain(ids[:, :-1], ids[:, 1:])
            (want / 256).backward()
            torch.testing.assert_close(have, want, rtol=1e-5, atol=0)
            for parameter, value in trained.items():
                assert value.grad is not None and bool(value.grad.any()) == (step > 0 or ".lora_B." in parameter)
                close = {"rtol": 1e-5, "atol": 1e-5 * value.grad.abs().max().item()}
                torch.testing.assert_close(ours[parameter].grad, value.grad, **close)
            norm = engine.step()
            theirs_norm = nn.utils.clip_grad_norm_(trained.values(), spec.max_grad_norm or math.inf)
            torch.testing.assert_close(norm, theirs_norm, rtol=1e-5, atol=0)
            optimizer.step()
            optimizer.zero_grad()


# ---------------------------------------------------------------- over backends

GATES = {
    "GPT, accumulation 4": ("gpt-parity", "2", "single,ddp,fsdp,zero1,zero2,zero3", LORA, ()),
    "Llama, all linear layers": ("llama-parity", "2", "single,hsdp,fsdp-offload,zero2-offload,zero3", ALL, ()),
    "bf16": ("llama-parity", "2", "single,ddp,fsdp,zero1,zero2,zero3", ALL, ("precision=bf16",)),
    "selective checkpointing": (
        "gpt-parity", "2", "single,zero3", LORA, ('activation_checkpointing="selective"',),
    ),
    "full checkpointing, plain loss": (
        "llama-parity", "2", "single,ddp,zero1,zero3", ALL,
        ('activation_checkpointing="full"', "objective.cross_entropy=plain"),
    ),
    "compiled": ("llama-parity", "2", "single,fsdp,zero2,zero3", ALL, ("compile=true",)),
}  # fmt: skip
CHECKED_GATES = ("selective checkpointing",)
"""The others are long."""
LONG = pytest.mark.long
LEARNS = ("optimizer.lr=0.003", "schedule.warmup_steps=0")
"""Adapters start from nothing: at the rates of the specs little would be learnt in a few steps."""
GROUPS = 'param_groups=[{"name":"queries","match":["*.q_proj.*"],"lr":1e-4},{"name":"rest","match":["*"]}]'


@pytest.mark.parametrize("gate", [one if one in CHECKED_GATES else pytest.param(one, marks=LONG) for one in GATES])
def test_curves_agree(gate: str, tmp_path: Path) -> None:
    spec, world_sizes, backends, lora, settings = GATES[gate]
    sets = [text for setting in (assignment(lora), GROUPS, *LEARNS, *settings) for text in ("--set", setting)]
    command = ["-m", "scaling.parity", "--spec", str(SPECS / f"{spec}.json"), "--json", str(tmp_path / "out"), *sets]
    done = python(*command, "--backends", backends, "--world-sizes", world_sizes, "--steps", "8", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out").read_text())
    losses = [step["loss"] for step in report["curves"][0]["steps"]]
    assert losses[-1] < losses[0] - 0.01, "nothing was learnt: the curves would agree whatever"


@LONG
@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "bf16")])
def test_engines(tmp_path: Path, world_size: int, precision: str) -> None:
    """Start values, groups, frozen and trained, refused steps, and states handed from one backend to all others."""
    names = "single,ddp,fsdp,zero1,zero2,zero3" if world_size == 1 else "fsdp,ddp,zero1,zero2,zero3"
    case = ("gpt-parity", world_size, precision)
    seen, done = launch(tmp_path / "seen.jsonl", case, names, tmp_path, assignment(LORA), GROUPS)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = sorted(p.name for p in parameters(load_spec(str(SPECS / "gpt-parity.json")).model, LORA) if not p.frozen)
    for name in names.split(","):
        one = seen[name]
        assert one["complete"] and one["starts_as_recipe"] and one["starts_at_0"] and one["counts_updates"]
        assert one["trained"] == one["moved"] == one["moments"] == trained
        assert one["still_at_lr_0"] and one["unchanged_by_nan"] and one["goes_on_after_nan"]
        check_return(one, from_start=True)
        check_taking_over(one, TOLERANCE[precision])


# ---------------------------------------------------------------- checkpoints


SPEC: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "model": TINY_MODEL,
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    "data": {"kind": "synthetic", "samples": 40, "sequence_length": 16},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-2},
    "precision": "bf16",
    "backend": {"kind": "single"},
    "max_steps": 6,
    "checkpoint": {"interval": 3},
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


def tiny(folder: Path, **changes: Any) -> str:
    path = folder / "spec.json"
    path.write_text(json.dumps(SPEC | changes))
    return str(path)


def metrics(folder: Path) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    reader = Reader(Store(folder / "checkpoints").path(step))
    return {key: reader.read(key, 0, count) for key, count in reader.elements.items()}


@pytest.mark.parametrize(
    "backends",
    [
        pytest.param(('{"kind": "fsdp"}', '{"kind": "fsdp"}'), id="fsdp", marks=LONG),
        pytest.param(('{"kind": "deepspeed", "zero_stage": 3}',) * 2, id="zero3", marks=LONG),
        pytest.param(('{"kind": "deepspeed", "zero_stage": 1}', '{"kind": "fsdp"}'), id="zero1 to fsdp"),
    ],
)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, backends: tuple[str, str]) -> None:
    """On two ranks; from one backend to another to the rounding of sums, what is restored bit for bit."""
    first, second = backends
    train = ("launch/train.py", "--spec", tiny(tmp_path))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, backend, more in (
        (whole, first, ()),
        (parts, first, ("--stop-after", "3")),
        (parts, second, ()),
    ):
        done = torchrun(2, *train, "--set", f"backend={backend}", "--run-dir", str(folder), *more, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {parts / 'checkpoints' / 'step-00000003'}" in (parts / "train.log").read_text()
    have, want = metrics(parts), metrics(whole)
    assert have.keys() == want.keys() == set(range(1, 7))
    names = {p.name for p in parameters(load_spec(tiny(tmp_path)).model, load_spec(tiny(tmp_path)).lora)}
    end, there = saved(parts, 6), saved(whole, 6)
    assert {key.partition("/")[2] for key in end if key.startswith("master/")} == names
    assert {key.partition("/")[2] for key in end if key.startswith("exp_avg/")} == set(filter(is_adapter, names))
    if first == second:
        assert have == want
        assert all(torch.equal(end[key], there[key]) for key in there)
    else:
        assert have[6] == pytest.approx(want[6], rel=2e-2)


def test_weights_without_adapters_are_started_from_and_stay(tmp_path: Path) -> None:
    """From a run without LoRA, from its export, and, with the adapters, from a run with the same ones."""
    full, out = tmp_path / "full", tmp_path / "out"
    assert main(["--spec", tiny(tmp_path, lora=None), "--run-dir", str(full)]) == 0
    export(Store(full / "checkpoints").path(6), out)
    trained = saved(full, 6)
    for number, source in enumerate((full, out)):
        run = tmp_path / f"run-{number}"
        assert main(["--spec", tiny(tmp_path, initialize_from=str(source)), "--run-dir", str(run)]) == 0
        found = saved(run, 6)
        base = [name for name in found if name.startswith("master/") and not is_adapter(name)]
        assert base and all(torch.equal(found[name], trained[name]) for name in base)
        assert all(found[name].any() for name in found if "lora_B" in name), "adapters have moved"
    assert metrics(tmp_path / "run-0") == metrics(tmp_path / "run-1")

    spec = load_spec(tiny(tmp_path))
    weights = open_weights(Store(tmp_path / "run-0" / "checkpoints").path(6), spec.model, spec.lora)
    assert set(weights.names()) == {p.name for p in parameters(spec.model, spec.lora)}


@pytest.mark.parametrize(
    ("lora", "told"),
    [(None, "but is null"), ({"rank": 4}, "but is rank 4"), (SPEC["lora"] | {"alpha": 8}, "alpha 8")],
)
def test_other_adapters_are_refused(tmp_path: Path, capsys, lora: Any, told: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["--spec", tiny(tmp_path, max_steps=1), "--run-dir", str(run)]) == 0
    capsys.readouterr()
    assert main(["--spec", tiny(tmp_path, lora=lora, initialize_from=str(run)), "--run-dir", str(other)]) == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert "`lora` must be as in the weights of `initialize_from` (rank 2, alpha 4, q_proj, down_proj" in error
    assert told in error and "export" in error
    assert main(["--spec", tiny(tmp_path, lora=lora, max_steps=2), "--run-dir", str(run)]) == 5
    assert "`lora" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- exports


def random_adapters(spec: DecoderSpec, lora: Lora) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with adapters, all of whose tensors are random; and those by name."""
    model = adapted(spec, lora).eval()
    values = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    base = dict(random_decoder(spec).named_parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 if is_adapter(name) else base[name])
    return model, values


@pytest.mark.parametrize(
    "lora", [LORA, ALL, Lora(rank=2, target_modules=("o_proj", "k_proj"))], ids=["some", "all", "k"]
)
@pytest.mark.parametrize("model", [*MODELS, "own"])
def test_exports(tmp_path: Path, process: Process, model: str, lora: Lora, monkeypatch) -> None:
    """Merged, the base, and the adapters, which peft puts into the base: the same logits as the model's."""
    spec = MODELS[model] if model != "own" else decoder_spec(**LLAMA, norm="layernorm")
    ours, values = random_adapters(spec, lora)
    checkpoint = write_checkpoint(tmp_path / "c", process, spec, values, lora=lora)
    found = {part: export(checkpoint, tmp_path / part, part=part) for part in ("merged", "base", "adapters")}
    plain = export(
        write_checkpoint(tmp_path / "p", process, spec, dict(random_decoder(spec).named_parameters())),
        tmp_path / "plain",
    )
    assert found["merged"].tensors == found["base"].tensors == plain.tensors
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    if model == "own":
        base: nn.Module = random_decoder(spec)
        merged = filled_from(tmp_path / "merged", spec)
    else:
        base, merged = loaded(tmp_path / "base"), loaded(tmp_path / "merged")
    assert_same_logits(spec, merged, ours)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError):  # the adapters do something
        assert_same_logits(spec, base, ours)  # pyright: ignore[reportArgumentType]
    assert_same_logits(spec, peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval(), ours)  # pyright: ignore


def filled_from(folder: Path, spec: DecoderSpec) -> Decoder:
    with closing(open_weights(folder, spec)) as source:
        model = Decoder(spec).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(source.read(name, 0, parameter.numel()).view_as(parameter))
    return model


def test_merged_weights_are_read_in_any_ranges(tmp_path: Path, process: Process) -> None:
    from scaling.checkpoint.adapters import MergedWeights
    from scaling.checkpoint.weights import CheckpointWeights

    spec = MODELS["llama"]
    _, values = random_adapters(spec, LORA)
    weights = CheckpointWeights(write_checkpoint(tmp_path / "c", process, spec, values, lora=LORA))
    with closing(MergedWeights(weights, LORA)) as merged:
        name = "layers.2.mlp.down_proj.weight"
        rows, columns = merged.shape(name)
        whole = merged.read(name, 0, rows * columns)
        up, down = (values[name.replace(".weight", f".lora_{part}.weight")] for part in "BA")
        torch.testing.assert_close(whole.view(rows, columns), values[name] + up @ down * 1.5)
        for start, count in ((0, 1), (5, columns), (columns - 1, 2), (columns * rows - 3, 3), (7, 0)):
            torch.testing.assert_close(merged.read(name, start, count), whole[start : start + count])


def test_the_command_exports_a_run(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["--spec", tiny(tmp_path), "--run-dir", str(run)]) == 0
    for flag, files in (
        ("--merge", ["config.json", "model.safetensors"]),
        ("--adapters", ["adapter_config.json", "adapter_model.safetensors"]),
    ):
        out = tmp_path / flag
        done = python("-m", "scaling.export", str(run), "--to", str(out), flag)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert sorted(path.name for path in out.iterdir()) == files
    assert main(["--spec", tiny(tmp_path, lora=None, max_steps=1), "--run-dir", str(tmp_path / "plain")]) == 0
    done = python("-m", "scaling.export", str(tmp_path / "plain"), "--to", str(tmp_path / "no"), "--adapters")
    assert (
        done.returncode == 5 and done.stderr.startswith("`--adapters` must be absent") and done.stderr.count("\n") == 1
    )


# ---------------------------------------------------------------- the ledger

CHECKED = ("fsdp", "zero1", "zero2-small", "zero3")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict[str, Any]]:
    return list(compare(list(draw(len(CHECKED), 5, list(CHECKED), tmp_path_factory.mktemp("drawn"), lora=1.0))))


@pytest.mark.long  # in CI: what draws have found (test_ledger.py)
@pytest.mark.parametrize("backend", CHECKED)
def test_the_played_peak_is_the_counted_one(rows: list[dict[str, Any]], backend: str) -> None:
    (row,) = (row for row in rows if row["name"].split()[1] == backend)
    assert "error" not in row and '"lora"' in row["name"], row
    assert abs(row["off"]) <= WORST and row["worst_part"] <= PART, row


def test_adapters_change_nothing_else_in_a_draw(tmp_path: Path) -> None:
    def specs(share: float) -> list[dict[str, Any]]:
        return [json.loads(Path(cell["spec"]).read_text()) for cell in draw(30, 7, list(CHECKED), tmp_path, lora=share)]

    without, half, every = specs(0.0), specs(0.5), specs(1.0)
    assert all("lora" not in spec for spec in without) and all("lora" in spec for spec in every)
    assert 5 < sum("lora" in spec for spec in half) < 25
    for some in (half, every):
        assert [{k: v for k, v in spec.items() if k != "lora"} for spec in some] == without
