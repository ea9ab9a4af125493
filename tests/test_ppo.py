"""Proximal policy optimisation: sampling, credit, the loss, the reference, and runs that end, go on and move."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, python, torchrun

from scaling.data.build import build_datasets
from scaling.engine.process import Process
from scaling.models.build import model_recipe
from scaling.models.decoder import KeyValues
from scaling.objectives.policy import PolicyLoss, build_reward, credit, overlap, whitened
from scaling.records import IGNORED, BatchPlan
from scaling.rollouts import Rollouts, _gumbel
from scaling.spec import load_spec
from scaling.watch.heartbeat import NullHeartbeat

SPEC = {
    "name": "ppo",
    "seed": 5,
    "model": {
        "kind": "decoder",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "value_head": True,
    },
    "objective": {"kind": "ppo", "reward": {"kind": "pattern", "pattern": "[a-z]"}, "max_new_tokens": 12},
    "data": {"kind": "chat", "packing": False, "sequence_length": 96},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 3e-3, "weight_decay": 0.0},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 10,
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


def written(folder: Path, **changes) -> Path:
    """A spec, and the conversations that it reads."""
    lines = [{"instruction": f"Say {n}{'!' * (n % 9)}", "response": f"It is {n}."} for n in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = SPEC["data"] | {"train": [str(folder / "chat.jsonl")], "cache": str(folder / "cache"), "validation": 0.2}
    path = folder / "spec.json"
    objective = SPEC["objective"] | changes.pop("objective", {})
    path.write_text(json.dumps(SPEC | {"data": data, "objective": objective} | changes))
    return path


class Alone:
    """An engine of one module."""

    def __init__(self, module) -> None:
        self.module = module


def module_of(spec):
    recipe = model_recipe(spec)
    module = recipe.build()
    for name, parameter in module.named_parameters():
        parameter.data = recipe.initial_value(name, parameter.shape) * (6 if "value" not in name else 1)
    return module


def rollouts_of(spec, module) -> Rollouts:
    plan = BatchPlan(8, 2, 4, 1, spec.data.sequence_length)
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    reward = build_reward(spec.objective, ())
    return Rollouts(Alone(module), process, spec.objective, plan, 5, reward, [], NullHeartbeat(), None, kept=2)


def test_what_is_sampled_is_what_the_whole_text_would_have_given(tmp_path):
    spec = load_spec(str(written(tmp_path)))
    module = module_of(spec).eval()
    dataset = build_datasets(spec)[0]
    indices, keys = np.array([3, 7, 11]), torch.tensor([12345, -9, 77])
    with torch.no_grad():
        found = rollouts_of(spec, module)._sample(dataset, indices, keys)
    assert len({len(dataset.prompt(index)) for index in indices}) > 1, "prompts of several lengths"
    for row, index in enumerate(indices):
        ids = torch.from_numpy(dataset.prompt(index))
        for place, chosen in enumerate(found.responses[row]):
            with torch.no_grad():
                logits = module(ids.unsqueeze(0))[0, -1]
            assert int((logits + _gumbel(keys[row : row + 1], place, 256)[0]).argmax()) == chosen
            ids = torch.cat([ids, torch.tensor([chosen])])
        count = len(found.responses[row])
        assert found.targets[row, -count:].tolist() == found.responses[row].tolist()
        assert found.inputs[row, -len(ids) + 1 :].tolist() == ids[:-1].tolist()
        assert (found.targets[row, :-count] == IGNORED).all()


def test_by_token_is_the_whole_texts_log_probability(tmp_path):
    spec = load_spec(str(written(tmp_path)))
    module = module_of(spec).eval()
    module.value_head.weight.data.normal_()
    dataset = build_datasets(spec)[0]
    with torch.no_grad():
        found = rollouts_of(spec, module)._sample(dataset, np.array([3, 7]), torch.tensor([1, 2]))
        losses, values = module(found.inputs, found.targets, found.starts, by_token=True)
        for row, index in enumerate((3, 7)):
            ids = torch.from_numpy(np.concatenate([dataset.prompt(index), found.responses[row]]))
            count = len(found.responses[row])
            likely = module(ids[None, :-1])[0].log_softmax(-1)[-count:]
            picked = likely.gather(1, ids[-count:, None]).squeeze(1)
            torch.testing.assert_close(-losses[row, -count:], picked, rtol=1e-4, atol=1e-5)
            alone = module(ids[None, :-1], torch.full_like(ids[None, :-1], IGNORED), by_token=True)[1]
            torch.testing.assert_close(values[row, -count:], alone[0, -count:], rtol=1e-4, atol=1e-5)
    assert (losses[found.targets == IGNORED] == 0).all()


def test_noise_is_gumbels_and_of_its_key_and_place():
    noise = _gumbel(torch.arange(2000), 3, 50)
    assert abs(float(noise.mean()) - 0.5772) < 0.02 and abs(float(noise.std()) - 1.2825) < 0.02
    assert torch.equal(_gumbel(torch.tensor([7]), 3, 50)[0], noise[7])
    assert not torch.equal(_gumbel(torch.tensor([7]), 4, 50)[0], noise[7])
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.bincount((logits + _gumbel(torch.arange(20000), 0, 3)).argmax(1), minlength=3) / 20000
    torch.testing.assert_close(drawn, logits.softmax(0), rtol=0, atol=0.015)


def test_a_memory_knows_what_it_was_told():
    memory, whole = KeyValues(6), torch.randn(2, 3, 5, 4)
    memory.extend(whole[:, :, :3], -whole[:, :, :3])
    key, value = memory.extend(whole[:, :, 3:], -whole[:, :, 3:])
    assert memory.length == 5 and torch.equal(key, whole) and torch.equal(value, -whole)


def test_credit_is_the_sum_over_all_steps_to_come():
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 7, generator=generator), torch.randn(2, 7, generator=generator)
    counted = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()
    advantages, returns = credit(rewards, values, counted, 0.9, 0.8)
    for row, (first, end) in enumerate(((2, 7), (1, 4))):
        for place in range(first, end):
            total = 0.0
            for later in range(place, end):
                after = float(values[row, later + 1]) if later + 1 < end else 0.0
                delta = float(rewards[row, later]) + 0.9 * after - float(values[row, later])
                total += (0.9 * 0.8) ** (later - place) * delta
            assert float(advantages[row, place]) == pytest.approx(total, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(returns, torch.where(counted, advantages + values, 0.0))
    assert (advantages[~counted] == 0).all()
    all_of_it, _ = credit(rewards, values, counted, 1.0, 1.0)
    assert float(all_of_it[0, 2]) == pytest.approx(float(rewards[0, 2:].sum() - values[0, 2]), rel=1e-5)
    even = whitened(advantages, counted)
    assert float(even[counted].mean()) == pytest.approx(0, abs=1e-6)
    assert float(even[counted].std(correction=0)) == pytest.approx(1, rel=1e-5)


class Fixed:
    """A batch, and a module that makes of its tokens what one says."""

    def __init__(self, **parts) -> None:
        self.inputs = self.starts = None
        vars(self).update(parts)


def test_the_loss_stops_where_it_is_clipped():
    targets = torch.tensor([[1, 2, IGNORED, 3]])
    ratios = torch.tensor([[1.5, 0.5, 9.0, 1.5]])
    batch = Fixed(
        targets=targets,
        log_probabilities=torch.tensor([[-1.0, -2.0, -3.0, -1.0]]),
        advantages=torch.tensor([[2.0, -1.0, 5.0, -2.0]]),
        values=torch.tensor([[0.0, 1.0, 7.0, 0.0]]),
        returns=torch.tensor([[1.0, 1.0, 7.0, 1.0]]),
    )
    losses = (-batch.log_probabilities - ratios.log()).requires_grad_()
    values = torch.tensor([[0.5, 0.9, 3.0, -1.0]], requires_grad=True)
    total = PolicyLoss(0.2, 0.2, 0.5)(lambda *_, **__: (losses, values), batch)
    policy = -(min(2 * 1.5, 2 * 1.2) + min(-1 * 0.5, -1 * 0.8) + min(-2 * 1.5, -2 * 1.2))
    error = max(0.5**2, 0.8**2) + max(0.1**2, 0.1**2) + max(2.0**2, 1.2**2)
    assert float(total.detach()) == pytest.approx(policy + 0.5 * error, rel=1e-5)
    total.backward()
    # A good token that has gained enough, and a bad one that has lost enough, are let be; a bad one that gained is not.
    assert losses.grad[0, :3].tolist() == [0, 0, 0] and losses.grad[0, 3] != 0
    assert values.grad[0, 2] == 0


def test_rewards():
    assert overlap("The cat sat.", "the cat SAT") == 1.0 and overlap("dog", "cat") == 0.0 and overlap("", "") == 0.0
    assert overlap("a a b", "a c") == pytest.approx(2 / 5)
    spec = load_spec("minimind-ppo").objective
    assert build_reward(spec, ())([""], ["x y"], ["y z"]) == [0.5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": SPEC["model"] | {"value_head": False}}, '`model.value_head` must be true for the objective "ppo"'),
        ({"objective": {"max_new_tokens": 96}}, "`objective.max_new_tokens` must be less than data.sequence_length"),
        (
            {"objective": {"reward": {"kind": "pattern", "pattern": "("}}},
            "`objective.reward.pattern` must be a regular expression",
        ),
        ({"compile": True}, '`compile` must be false for the objective "ppo"'),
        ({"objective": {"max_new_tokens": 90}}, "must hold prompts of at most 6 tokens"),
        (
            {"objective": {"reward": {"kind": "factory", "target": "own_rewards:short"}}},
            "`objective.reward.target` must be in a package that --allow-import names",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, told):
    done = python("launch/train.py", "--spec", str(written(tmp_path, **changes)), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and told in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_head_is_for_ppo_alone(tmp_path):
    done = python("-m", "scaling.spec", "validate", str(written(tmp_path)), "--set", 'objective={"kind":"sft"}')
    assert done.returncode == 2 and '`model.value_head` must be false for the objective "sft"' in done.stderr


# ---------------------------------------------------------------- runs


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def rewards(folder: Path) -> list[float]:
    return [event["details"]["reward"] for event in read(folder, "events.jsonl") if event["event"] == "rollout"]


def train(ranks: int, path: Path, folder: Path, *flags: str):
    words = ("launch/train.py", "--spec", str(path), "--run-dir", str(folder), *flags)
    done = torchrun(ranks, *words, paths=str(ROOT / "tests"))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


BACKENDS = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}


def test_every_backend_samples_the_same_and_goes_the_same_way(tmp_path):
    path = written(tmp_path, validation={"interval": 4, "batches": 1}, max_steps=8)
    curves = {}
    for name, backend in BACKENDS.items():
        folder = tmp_path / name
        train(1 if name == "single" else 2, path, folder, "--set", f"backend={json.dumps(backend)}")
        curves[name] = [step["loss"] for step in read(folder, "metrics.jsonl")]
    for name, curve in curves.items():
        assert rewards(tmp_path / name) == pytest.approx(rewards(tmp_path / "single"), abs=1e-6), name
        assert curve == pytest.approx(curves["single"], rel=1e-3, abs=1e-4), name
    plan = json.loads((tmp_path / "zero3" / "plan.json").read_text())["memory"]
    assert plan["phases"]["rollout"] > 0 and max(plan["phases"].values()) == plan["peak_allocated_bytes"]
    record = read(tmp_path / "single", "validation.jsonl")[-1]
    assert record["unit"] == "responses" and record["loss"] == -record["measures"]["reward"]


def test_a_dry_run_says_what_is_predicted_of_rollouts_too(tmp_path):
    done = python("launch/train.py", "--spec", str(written(tmp_path)), "--dry-run")
    assert done.returncode == 0 and "dry run done" in done.stdout and "of tensors at the peak, in " in done.stdout


def test_it_goes_on_in_the_midst_of_a_rollout_with_the_very_same_responses(tmp_path):
    path = written(tmp_path, objective={"epochs": 2}, checkpoint={"interval": 3})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(2, path, whole, "--set", "backend.kind=fsdp")
    for flags in (("--stop-after", "5"), ()):
        done = train(2, path, cut, "--set", "backend.kind=fsdp", *flags)
    assert "cannot be read" not in done.stdout
    assert [step["loss"] for step in read(cut, "metrics.jsonl")] == [
        step["loss"] for step in read(whole, "metrics.jsonl")
    ]


def test_the_reference_is_what_training_started_from(tmp_path):
    """Another run goes on from the weights of the first: to them it is as near as can be."""
    path = written(tmp_path, objective={"kl_coef": 0.0})
    first, second = tmp_path / "first", tmp_path / "second"
    train(1, path, first)
    away = [event["details"]["kl"] for event in read(first, "events.jsonl") if event["event"] == "rollout"]
    assert away[0] == pytest.approx(0, abs=1e-5) and away[-1] > 1e-3
    train(1, path, second, "--set", f"initialize_from={json.dumps(str(first))}")
    again = [event["details"]["kl"] for event in read(second, "events.jsonl") if event["event"] == "rollout"]
    assert again[0] == pytest.approx(0, abs=1e-5), "and its value head begins afresh"


@pytest.mark.long
def test_the_reward_rises(tmp_path):
    reward = {"kind": "factory", "target": "own_rewards:letters"}
    objective = {"reward": reward, "kl_coef": 0.0, "epochs": 2}
    changes = {"batch": {"global_batch_size": 32, "micro_batch_size": 32}, "max_steps": 64}
    path = written(tmp_path, objective=objective, **changes, optimizer={"lr": 1e-2, "weight_decay": 0.0})
    train(1, path, tmp_path / "run", "--allow-import", "own_rewards")
    found = rewards(tmp_path / "run")
    assert len(found) == 8 and found[0] < 0.2 and found[-1] > 0.6, found


def test_weights_are_given_away_without_the_value_head(tmp_path):
    path = written(tmp_path, max_steps=2)
    train(1, path, tmp_path / "run")
    done = python("-m", "scaling.export", str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any("value_head" in name for name in file.keys()) and "lm_head.weight" in file.keys()  # noqa: SIM118
    sft = ("objective.kind=sft", "model.value_head=false", "max_steps=1")
    flags = [word for one in (*sft, f"initialize_from={json.dumps(str(tmp_path / 'run'))}") for word in ("--set", one)]
    train(1, path, tmp_path / "sft", *flags)
