"""Every recipe that a laptop can train, trained: two ranks, FSDP2 and ZeRO-2, each from the one before it."""

import json

import pytest
from processes import ROOT, torchrun

from benchmarks.recipe_pages import ABOUT, pages
from scaling.run import resolve
from scaling.spec import load_spec
from scaling.spec.source import recipes
from scaling.trace import trace

TINY = ("gpt2-tiny", "gpt2-dolly-tiny", "minimind-pretrain-tiny", "minimind-sft-tiny", "minimind-lora-tiny",
        "minimind-dpo-tiny", "minimind-ppo-tiny", "atlas-vla-tiny")  # fmt: skip
BACKENDS = {"fsdp": {"kind": "fsdp"}, "zero2": {"kind": "deepspeed", "zero_stage": 2}}
ALSO = {"minimind-lora-tiny": {"zero3": {"kind": "deepspeed", "zero_stage": 3}}}
"""Where stage 3 differs: frozen parameters, which it gathers."""


def words(folder, data, *, ppo):
    """A little of what the recipe reads: files of this project, and what is made of them."""
    if data.kind == "episodes":
        return ["data.simulated_episodes=20"]
    if data.kind == "text":
        return [f"data.train={json.dumps([str(ROOT / 'scaling' / '*.py')])}"]
    path = folder / f"{data.kind}.jsonl"
    answers = [{"prompt": f"{n}?", "chosen": "Yes. " * (n % 7 + 1), "rejected": "No."} for n in range(40)]
    chats = [{"instruction": pair["prompt"], "response": pair["chosen"]} for pair in answers]
    path.write_text("\n".join(map(json.dumps, answers if data.kind == "preference" else chats)))
    sampling = ["objective.max_new_tokens=8"] if ppo else []
    return [f"data.train={json.dumps([str(path)])}", *sampling]


@pytest.mark.parametrize("backend", ["fsdp", "zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_tiny_recipes_train_one_after_the_other(tmp_path, backend):
    runs = {}
    for name in TINY:
        kind = (BACKENDS | ALSO.get(name, {})).get(backend)
        if kind is None and name != "minimind-pretrain-tiny":
            continue
        spec, run = load_spec(name), tmp_path / name
        sets = [
            *(f"backend={json.dumps(kind or BACKENDS['zero2'])}", "max_steps=2", "schedule.warmup_steps=1"),
            'batch={"global_batch_size":8,"micro_batch_size":2}',
            *('validation={"interval":2,"batches":1}', "profile.interval=1", f"data.cache={tmp_path / 'cache'}"),
            *words(tmp_path, spec.data, ppo=spec.objective.kind == "ppo"),
        ]
        if spec.initialize_from:
            sets.append(f"initialize_from={json.dumps(str(runs[spec.initialize_from.removeprefix('runs/')]))}")
        flags = [word for setting in sets for word in ("--set", setting)]
        done = torchrun(2, "launch/train.py", "--spec", name, "--run-dir", str(run), *flags)
        assert done.returncode == 0, f"{name}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        runs[name] = run
        assert json.loads((run / "exit.json").read_text())["code"] == 0
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        assert len((run / "validation.jsonl").read_text().splitlines()) == 1
    assert len(runs) == (len(TINY) if backend != "zero3" else 2)


def test_none_is_forgotten():
    assert {name for name in recipes() if name.endswith("-tiny")} == set(TINY)


@pytest.mark.parametrize("name", [name for name in recipes() if not name.endswith("-tiny")])
def test_full_recipes_resolve_on_one_four_and_eight(name):
    for world_size in (1, 4, 8):
        assert resolve(load_spec(name), world_size).plan.world_size == world_size


@pytest.mark.long
@pytest.mark.parametrize("name", [one for one in recipes() if not one.endswith(("-tiny", "-ppo"))])
def test_full_recipes_take_a_step_on_tensors_without_values(name):
    """At full size, on eight ranks; that of ppo samples, which wants values."""
    found = trace(load_spec(name), 8)
    assert found["predicted_to_traced"] == pytest.approx(1, abs=0.01)


def test_each_full_recipe_has_a_page_that_says_what_is_planned():
    assert set(ABOUT) == {name for name in recipes() if not name.endswith("-tiny")} - {"gpt-stdlib"}
    for path, text in pages():
        assert path.read_text(encoding="utf-8") == text, "python -m benchmarks.recipe_pages"


# The guides' own numbers.


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1.5b"])
def test_gpt2_is_trained_as_the_guide_says(name):
    spec = load_spec(name)
    assert (spec.batch.global_batch_tokens, spec.batch.micro_batch_size) == (524_288, 16)
    assert (spec.optimizer.lr, spec.optimizer.betas, spec.optimizer.weight_decay) == (6e-4, (0.9, 0.95), 0.1)
    assert spec.optimizer.decay == "matrices" and spec.max_grad_norm == 1.0 and spec.compile
    assert (spec.schedule.warmup_steps, spec.schedule.min_lr_ratio, spec.max_steps) == (2000, 0.1, 40_000)
    assert spec.precision == "bf16"


def test_dolly_is_tuned_as_the_guide_says():
    spec = load_spec("gpt2-dolly")
    assert spec.objective.kind == "sft" and spec.data.packing
    assert (spec.optimizer.lr, spec.schedule.warmup_steps, spec.max_steps) == (3e-5, 100, 1750)
    assert spec.validation.interval == 50


@pytest.mark.parametrize(
    ("name", "lr"), [("pretrain", 5e-4), ("sft", 1e-6), ("lora", 1e-4), ("dpo", 4e-8), ("ppo", 8e-8)]
)
def test_minimind_is_trained_as_the_guide_says(name, lr):
    spec = load_spec(f"minimind-{name}")
    assert (spec.model.hidden_size, spec.model.num_hidden_layers, spec.data.sequence_length) == (512, 8, 340)
    assert (spec.optimizer.lr, spec.max_grad_norm, spec.precision) == (lr, 1.0, "bf16")
    assert (spec.schedule.kind, spec.schedule.min_lr_ratio) == ("cosine", 0.1)
    if name != "lora":
        assert (spec.batch.global_batch_size, spec.batch.micro_batch_size) == (256, 32)
