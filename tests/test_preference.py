"""Pairs of responses: what is read of them, what their loss is, and what it is compared with."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import TINY_MODEL

from scaling.data.build import build_datasets
from scaling.data.dataset import PairBatch
from scaling.data.preference import open_preference_data
from scaling.errors import UserError
from scaling.models.build import model_recipe
from scaling.models.loss import token_cross_entropy
from scaling.objectives import build_objective
from scaling.objectives.preference import log_probabilities
from scaling.records import IGNORED
from scaling.spec.sections import PreferenceData, Spec


def written(folder: Path, *records: object, name: str = "pairs.jsonl") -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")


def section(folder: Path, **fields) -> PreferenceData:
    defaults = {"train": [str(folder / "pairs.jsonl")], "validation": 0, "sequence_length": 96}
    return PreferenceData(kind="preference", cache=str(folder / "cache"), **(defaults | fields))


def opened(folder: Path, **fields):
    return open_preference_data(section(folder, **fields), 256)[0]


def spec_of(folder: Path, **changes) -> Spec:
    values = {
        "name": "t",
        "model": {**TINY_MODEL, "vocab_size": 256, "max_position_embeddings": 96},
        "objective": {"kind": "dpo"},
        "data": section(folder).model_dump(),
        "batch": {"global_batch_size": 4, "micro_batch_size": 4},
        "optimizer": {"lr": 1e-2},
        "precision": "fp32",
        "backend": {"kind": "single"},
        "max_steps": 4,
        "tracking": {"tensorboard": False},
        "profile": {"interval": 1},
        **changes,
    }
    return Spec.model_validate(values)


def pair(index: int = 0) -> dict[str, str]:
    return {"prompt": f"Number {index}?", "chosen": "Yes" + "!" * (index % 5), "rejected": "No, never."}


def text(tokens: torch.Tensor) -> str:
    return bytes(token for token in tokens.tolist() if token not in (IGNORED, 0)).decode()


MESSAGES = [{"role": "user", "content": "Number 0?"}]


@pytest.mark.parametrize(
    "record",
    [
        pair(),
        {**pair(), "prompt": MESSAGES},
        {"prompt": MESSAGES, **{s: [{"role": "assistant", "content": pair()[s]}] for s in ("chosen", "rejected")}},
        {s: [*MESSAGES, {"role": "assistant", "content": pair()[s]}] for s in ("chosen", "rejected")},
    ],
)
def test_every_form_says_the_same(tmp_path, record):
    written(tmp_path, record)
    batch = opened(tmp_path).read(np.array([0]))
    assert batch.inputs.shape == batch.targets.shape == (1, 2, 96) and batch.reference.shape == (1, 2)
    asked = "<|im_start|>user\nNumber 0?<|im_end|>\n<|im_start|>assistant\n"
    assert [text(row) for row in batch.inputs[0]] == [f"{asked}Yes<|im_end|", f"{asked}No, never.<|im_end|"]
    assert [text(row) for row in batch.targets[0]] == ["Yes<|im_end|>", "No, never.<|im_end|>"] and batch.terms == 1


def test_what_both_have_said_is_no_target(tmp_path):
    shared = [*MESSAGES, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "0?"}]
    ends = {"chosen": "Yes", "rejected": "No"}
    written(tmp_path, {side: [*shared, {"role": "assistant", "content": end}] for side, end in ends.items()})
    batch = opened(tmp_path, sequence_length=192).read(np.array([0]))
    assert [text(row) for row in batch.targets[0]] == ["Yes<|im_end|>", "No<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "chosen": "y"}, "the line must have `chosen` and `rejected`, but has no `rejected`"),
        ({"chosen": "y", "rejected": "z"}, "`chosen` must be a list of messages where there is no `prompt`"),
        ({"prompt": "x", "chosen": "y", "rejected": " "}, "`rejected` must be text, but is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "must differ from the other in what the assistant says"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "`prompt` must be a list of messages, but is a number"),
        ({"prompt": "x", "chosen": "y", "rejected": []}, "`rejected` must be a list of messages, but is empty"),
        ("[]", "the line must be a JSON object, but is empty"),
    ],
)
def test_a_line_that_is_no_pair_is_named_or_left_out(tmp_path, record, message):
    written(tmp_path, pair(), record)
    with pytest.raises(UserError) as raised:
        opened(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ") and message in str(raised.value)
    assert len(opened(tmp_path, malformed="skip")) == 1


def test_a_pair_is_as_long_as_the_longer_of_its_two(tmp_path):
    written(tmp_path, pair(), {**pair(1), "rejected": "x" * 100}, {**pair(2), "prompt": "y" * 200})
    assert len(opened(tmp_path)) == 2 and len(opened(tmp_path, too_long="skip")) == 1
    with pytest.raises(UserError, match=r"at most 97 tokens .* but 2 of 3 are longer"):
        opened(tmp_path, too_long="refuse")


def test_pairs_with_one_chosen_response_stay_together(tmp_path):
    written(tmp_path, *(pair(i) | {"rejected": f"No {j}"} for i in range(100) for j in range(2)))
    train, held_out = open_preference_data(section(tmp_path, validation=0.2), 256)
    sides = [{text(part.read(np.array([i])).inputs[0, 0]) for i in range(len(part))} for part in (train, held_out)]
    assert len(sides[0] | sides[1]) == 100 and not sides[0] & sides[1] and 2 * len(sides[1]) == len(held_out)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_the_loss_is_that_of_the_paper(tmp_path, loss, smoothing):
    written(tmp_path, *map(pair, range(6)))
    objective = {"kind": "dpo", "beta": 0.3, "cross_entropy": loss, "label_smoothing": smoothing}
    spec = spec_of(tmp_path, objective=objective)
    recipe, dataset = model_recipe(spec), build_datasets(spec)[0]
    reference = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)) - 50
    batch = dataset.with_reference(reference).read(np.array([4, 0, 5]))
    assert torch.equal(batch.reference, reference[[4, 0, 5]])
    found = []
    for by_hand in (False, True):
        module = recipe.build()
        for name, parameter in module.named_parameters():
            parameter.data = recipe.initial_value(name, parameter.shape) * 5
        if by_hand:
            likely = module(batch.inputs.flatten(0, 1)).float().log_softmax(-1).view(3, 2, 96, 256)
            kept = batch.targets != IGNORED
            picked = likely.gather(3, batch.targets.clamp(min=0).unsqueeze(3)).squeeze(3)
            gained = torch.where(kept, picked, 0.0).sum(2) - batch.reference
            margin = 0.3 * (gained[:, 0] - gained[:, 1])
            total = -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)).sum()
        else:
            total = build_objective(spec.objective)(module, batch)
        total.backward()
        found.append((total.detach(), [p.grad for p in module.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    largest = max(float(grad.abs().max()) for grad in found[1][1])
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_each_token_may_count_as_much_as_one_likes(monkeypatch, trained):
    monkeypatch.setattr("scaling.models.loss.CHUNK_ELEMENTS", 7 * 11)  # chunks of 7 rows, the last of 3
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(11, (24,), generator=generator)
    targets[::5] = IGNORED
    counts = torch.randn(24, generator=generator)
    found = []
    for chunked in (True, False):
        hidden, weight = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (24, 11))
        hidden.requires_grad_(trained[0])
        weight.requires_grad_(trained[1])
        losses = token_cross_entropy(hidden, weight, targets, chunked=chunked)
        (losses * counts).sum().backward()
        found.append((losses.detach(), hidden.grad, weight.grad))
    assert (found[0][0][::5] == 0).all()
    for mine, theirs in zip(*found, strict=True):
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs)


def test_pairs_that_are_left_out_add_nothing(tmp_path):
    written(tmp_path, *map(pair, range(4)))
    spec = spec_of(tmp_path)
    recipe, dataset = model_recipe(spec), build_datasets(spec)[0]
    module = recipe.build()
    for name, parameter in module.named_parameters():
        parameter.data = recipe.initial_value(name, parameter.shape)
    objective = build_objective(spec.objective)
    whole, part = (dataset.read(np.arange(count)) for count in (4, 3))
    whole.leave_out(torch.tensor([False, False, False, True]))
    assert whole.terms == part.terms == 3
    torch.testing.assert_close(objective(module, whole), objective(module, part))
    sums = objective.measures(module, whole)
    torch.testing.assert_close(sums["loss"], objective(module, part))
    assert 0 <= float(sums["accuracy"]) <= 3


def trained(folder: Path, spec: Spec, *flags: str) -> int:
    from scaling.train import main

    path = folder / "spec.json"
    path.write_text(json.dumps(spec.to_json()))
    return main(["--spec", str(path), "--run-dir", str(folder / "run"), *flags])


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def test_a_run_prefers_what_it_is_shown_and_goes_on_with_the_same_reference(tmp_path, capsys):
    written(tmp_path, *map(pair, range(64)))
    spec = spec_of(
        tmp_path,
        data=section(tmp_path, validation=0.2).model_dump(),
        validation={"interval": 4, "batches": 2},
        max_steps=8,
    )
    assert trained(tmp_path, spec, "--stop-after", "4") == 0, capsys.readouterr().err
    files = [tmp_path / "run" / f"reference-{part}.npy" for part in ("train", "validation")]
    before = [path.read_bytes() for path in files]
    steps = lines(tmp_path, "metrics.jsonl")
    assert steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-6), "at the start nothing has been gained"
    assert trained(tmp_path, spec) == 0, capsys.readouterr().err
    assert [path.read_bytes() for path in files] == before
    losses = [step["loss"] for step in lines(tmp_path, "metrics.jsonl")]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    last = lines(tmp_path, "validation.jsonl")[-1]
    assert last["measures"]["accuracy"] == 1.0 and last["measures"]["margin"] > 0.5 and last["loss"] < 0.5

    files[0].write_bytes(before[0][:100])
    assert trained(tmp_path, spec, "--set", "max_steps=9") == 5
    assert "reference-train.npy must hold what the model that training started from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "causal_lm"}}, '`data.kind` must be "preference" for the objective "dpo" and no other'),
        ({"data": {"kind": "synthetic", "sequence_length": 8}}, '`data.kind` must be "preference" for the objective'),
        ({"objective": {"kind": "dpo", "label_smoothing": 0.5}}, "label_smoothing"),
        (
            {"objective": {"kind": "behaviour_cloning"}},
            'must be "causal_lm", "sft", "dpo" or "ppo" for a model of kind',
        ),
    ],
)
def test_specs_that_cannot_be(tmp_path, changes, message):
    spec_of(tmp_path)
    with pytest.raises(ValueError, match=r"must|should") as raised:
        spec_of(tmp_path, **changes)
    assert message in str(raised.value)


def words(count: int):
    """A tokenizer of so many words, w0 w1 …; w0 ends a text, w1 fills up."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({f"w{index}": index for index in range(count)}, unk_token="w2"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token="w1")


def ours_of(theirs, folder: Path, spec: Spec) -> dict[str, torch.Tensor]:
    """The tensors of a transformers' model, by the names and in the layout of ours."""
    from scaling.checkpoint.weights import open_weights

    theirs.save_pretrained(folder)
    source = open_weights(folder, spec.model, None)
    shapes = {name: parameter.shape for name, parameter in model_recipe(spec).build().named_parameters()}
    found = {name: source.read(name, 0, shape.numel()).view(shape).clone() for name, shape in shapes.items()}
    source.close()
    return found


def test_loss_and_gradients_are_those_of_trl(tmp_path):
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    config = GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    rows = [
        {"prompt": f"w{n + 5} w{n + 6}", "chosen": " w9" * (n + 1), "rejected": f" w{n + 20} w30 w31"} for n in range(3)
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to="none",
        bf16=False,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words(64),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    model = {
        "kind": "decoder",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "norm": "layernorm",
        "activation": "gelu_new",
        "position": "learned",
        "bias": True,
        "tie_word_embeddings": True,
    }
    written(tmp_path, pair())
    small = section(tmp_path, sequence_length=32).model_dump() | {"tokenizer": "words.json"}
    spec = spec_of(tmp_path, model=model, data=small, objective={"kind": "dpo", "beta": 0.3})
    ids, wanted = batch["input_ids"], batch["completion_mask"].bool()
    ids, wanted = (torch.stack(tensor.chunk(2), dim=1) for tensor in (ids, wanted))
    targets = torch.where(wanted[..., 1:], ids[..., 1:], IGNORED)
    pairs = PairBatch(ids[..., :-1].contiguous(), targets, torch.zeros(3, 2))
    modules = []
    for name, one in (("policy", trainer.accelerator.unwrap_model(trainer.model)), ("reference", reference)):
        module = model_recipe(spec).build()
        module.load_state_dict(ours_of(one, tmp_path / name, spec), strict=False)
        modules.append(module)
    with torch.no_grad():
        pairs = replace(pairs, reference=log_probabilities(modules[1], pairs))
    mine = build_objective(spec.objective)(modules[0], pairs) / 3
    mine.backward()
    assert abs(float(mine.detach()) - np.log(2)) > 0.1, "nothing was compared"
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.grad)
    grads = ours_of(policy, tmp_path / "grads", spec)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, parameter in modules[0].named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-5 * largest, msg=name)
