"""transformers' causal language models: adapters, preferences, exports; chat templates and tables."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from processes import ENVIRONMENT, python, torchrun
from test_export import process, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scaling.data.build import build_datasets
from scaling.data.order import sample_indices
from scaling.data.prompts import open_prompt_data
from scaling.errors import UserError
from scaling.export import export
from scaling.models.build import model_recipe
from scaling.models.recipe import canonical_name
from scaling.models.recorded import look_at
from scaling.spec import Spec, load_spec
from scaling.spec.sections import ChatData, HuggingFace, Lora
from scaling.train import main

__all__ = ["process"]  # a fixture

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 64,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
}
LORA: dict[str, dict[str, Any]] = {
    "llama": {"rank": 4, "alpha": 6.0, "target_modules": ["v_proj", "q_proj", "down_proj"]},
    "gpt2": {"rank": 3, "target_modules": "all-linear"},
}
SPEC: dict[str, Any] = {
    "name": "hf",
    "data": {"kind": "synthetic", "sequence_length": 32, "masked_fraction": 0.3},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 3e-3},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 6,
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


def made(folder: Path, name: str, **more: Any) -> Path:
    """A spec of a random model in folder/hf, with weights twenty times as wide as transformers would have them."""
    values = dict(CONFIGS[name])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values, initializer_range=0.4)
    )
    model.save_pretrained(folder / "hf")
    path = folder / "spec.json"
    path.write_text(json.dumps(SPEC | {"model": {"kind": "huggingface", "path": str(folder / "hf")}} | more))
    return path


def opened(path: Path) -> Spec:
    spec = load_spec(str(path))
    look_at(spec.model, ())
    return spec


def curves(path: Path, backends: str, steps: int = 6) -> list[list[float]]:
    """The losses of each step under these backends, on two ranks, which parity has found to be the same."""
    out = path.with_name("parity.json")
    command = ("-m", "scaling.parity", "--spec", str(path), "--world-sizes", "2", "--backends", backends)
    done = python(*command, "--steps", str(steps), "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["curves"]
    return [[step["loss"] for step in curve["steps"]] for curve in found]


# ---------------------------------------------------------------- adapters


def pairs(folder: Path) -> dict[str, Any]:
    """`data` and `objective` of so many pairs."""
    lines = [{"prompt": f"{n}?", "chosen": "Yes" + "!" * (n % 5), "rejected": "No."} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"kind": "preference", "train": [str(folder / "pairs.jsonl")], "validation": 0, "sequence_length": 48}
    data |= {"template": "instruction", "cache": str(folder / "cache")}
    return {"data": data, "objective": {"kind": "dpo", "beta": 0.5}}


CASES = [
    pytest.param("llama", "causal_lm", "single,fsdp,zero2,zero3", id="llama"),
    pytest.param("gpt2", "dpo", "single,fsdp,zero3", id="gpt2, pairs", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "objective", "backends"), CASES)
def test_adapters_learn_as_pefts_do_in_a_plain_loop(tmp_path: Path, name: str, objective: str, backends: str) -> None:
    """On every backend, on two ranks: losses of six updates."""
    path = made(tmp_path, name, lora=LORA[name], **(pairs(tmp_path) if objective == "dpo" else {}))
    found = curves(path, backends)
    spec = opened(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    config = peft.LoraConfig(
        r=LORA[name]["rank"], lora_alpha=LORA[name].get("alpha", 16), target_modules=LORA[name]["target_modules"]
    )
    module = peft.get_peft_model(theirs, config)
    recipe = model_recipe(spec, filled=True)
    adapters: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for long_name, parameter in module.named_parameters():
            if parameter.requires_grad:
                inner = canonical_name(long_name).removeprefix("base_model.model.")
                adapters[inner] = parameter
                parameter.copy_(recipe.initial_value(inner, parameter.shape))
    assert {canonical_name(one) for one, _ in recipe.build().named_parameters() if "lora_" in one} == set(adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    dataset, expected = build_datasets(spec)[0], list[float]()
    for step in range(6):
        batch = dataset.read(sample_indices(8 * step, 8, len(dataset), spec.seed))
        if objective == "dpo":
            with torch.no_grad(), module.disable_adapter():
                reference = likely(module, batch)
            gained = likely(module, batch) - reference
            loss = -F.logsigmoid(0.5 * (gained[:, 0] - gained[:, 1])).mean()
        else:
            loss = F.cross_entropy(module(batch.inputs).logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert expected[-1] < expected[0]
    assert objective == "dpo" or expected[0] > 1.2 * math.log(256), "weights of one's own must show"
    for curve in found:
        assert curve == pytest.approx(expected, rel=1e-5)


def likely(module: nn.Module, batch: Any) -> Tensor:
    """Log-probabilities of the responses, [pairs, 2]."""
    told = module(batch.inputs.flatten(0, 1)).logits.log_softmax(-1).view(*batch.inputs.shape, -1)
    picked = told.gather(3, batch.targets.clamp(min=0).unsqueeze(3)).squeeze(3)
    return torch.where(batch.targets >= 0, picked, 0.0).sum(2)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            "`lora.target_modules.0` must be a linear layer of the model's blocks, but is",
        ),
        ({"target_modules": ["c_attn", "x"]}, 'use some of c_attn, c_proj, c_fc, or "all-linear"'),
    ],
)
def test_layers_that_are_none_are_refused(tmp_path: Path, lora: Any, message: str, capsys) -> None:
    assert main(["--spec", str(made(tmp_path, "gpt2", lora=lora)), "--run-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- preferences


@pytest.mark.long
def test_preferences_are_learnt_as_by_our_own_decoder(tmp_path: Path) -> None:
    """The same weights in both, on two ranks."""
    path = made(tmp_path, "llama", **pairs(tmp_path))
    found = curves(path, "fsdp,zero3")
    ours = {"kind": "decoder", **SMALL, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 2048}
    values = json.loads(path.read_text()) | {"model": ours, "initialize_from": str(tmp_path / "hf"), "checkpoint": None}
    (tmp_path / "ours.json").write_text(json.dumps(values))
    assert main(["--spec", str(tmp_path / "ours.json"), "--run-dir", str(tmp_path / "run")]) == 0
    expected = losses(tmp_path / "run")
    assert expected[0] == pytest.approx(math.log(2), rel=1e-6) and expected[-1] < 0.9 * expected[0]
    for curve in found:
        assert curve == pytest.approx(expected, rel=1e-5)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- exports


def logits_of(folder: Path | nn.Module, ids: Tensor) -> Tensor:
    module = folder
    if isinstance(folder, Path):
        module, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        return module.eval()(ids).logits


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_loaded_by_transformers(tmp_path: Path, process, name: str, adapted: bool) -> None:
    lora = Lora.model_validate_json(json.dumps(LORA[name])) if adapted else None
    spec = opened(made(tmp_path, name, **({"lora": LORA[name]} if adapted else {})))
    tokenizer_in(tmp_path / "hf")
    module = model_recipe(spec).build()
    values = {canonical_name(one): parameter for one, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in values.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    checkpoint = write_checkpoint(tmp_path / "c", process, spec.model, values, lora=lora)
    found = export(checkpoint, tmp_path / "merged", shard_bytes=20_000)
    assert found.family == name and found.files > 1
    ids = torch.randint(256, (2, 32), generator=generator)
    expected = logits_of(module, ids)
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(logits_of(tmp_path / "merged", ids), expected, **close)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    if lora is None:
        return
    for part in ("base", "adapters"):
        export(checkpoint, tmp_path / part, part=part)  # pyright: ignore[reportArgumentType]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits_of(base, ids) - expected).abs().max() > 0.01
    joined = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    torch.testing.assert_close(logits_of(joined, ids), expected, **close)


def test_from_a_folder_to_a_folder(tmp_path: Path) -> None:
    """Instructions in a parquet file by the folder's own template; from these weights preferences, as adapters on two
    ranks; the adapters, and both merged, into folders that transformers and peft load."""
    path, folder = made(tmp_path, "llama"), tmp_path / "hf"
    tokenizer_in(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "ho"}]} for n in range(64)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    said = [{"prompt": row["messages"][:1], "chosen": "ho", "rejected": "hi"} for row in rows]
    Dataset.from_list(said).save_to_disk(tmp_path / "pairs")
    common = {"tokenizer": str(folder), "template": "tokenizer", "validation": 0, "sequence_length": 32}
    common |= {"cache": str(tmp_path / "cache")}
    chat = {"kind": "chat", "train": [str(tmp_path / "chat.parquet")], "packing": False, **common}
    liked = {"kind": "preference", "train": [str(tmp_path / "pairs")], **common}
    values = json.loads(path.read_text()) | {"checkpoint": {"best": False}}
    path.write_text(json.dumps(values | {"data": chat, "objective": {"kind": "sft"}}))
    done = python("launch/train.py", "--spec", str(path), "--run-dir", str(tmp_path / "sft"))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    more = {"data": liked, "objective": {"kind": "dpo"}, "lora": {"rank": 2}, "initialize_from": str(tmp_path / "sft")}
    path.write_text(json.dumps(values | more | {"backend": {"kind": "fsdp"}, "optimizer": {"lr": 3e-2}}))
    done = torchrun(2, "launch/train.py", "--spec", str(path), "--run-dir", str(tmp_path / "dpo"))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    curve = losses(tmp_path / "dpo")
    assert curve[0] == pytest.approx(math.log(2), rel=1e-6) and curve[-1] < 0.9 * curve[0]
    for run, part in (("sft", "--merge"), ("dpo", "--merge"), ("dpo", "--adapters")):
        out = tmp_path / f"{run}{part}"
        done = python("-m", "scaling.export", str(tmp_path / run), "--to", str(out), part)
        assert done.returncode == 0, done.stderr
    ids = torch.arange(32).view(1, 32)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft--merge")
    before, after = logits_of(start, ids), logits_of(tmp_path / "dpo--merge", ids)
    joined = logits_of(peft.PeftModel.from_pretrained(start, str(tmp_path / "dpo--adapters")), ids)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(joined, after, rtol=0, atol=1e-5 * after.abs().max().item())


def test_the_folders_own_code_is_refused_unless_allowed(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": places, "vocab_size": 256}))
    (folder / "own.py").write_text(OWN)
    values = SPEC | {"model": {"kind": "huggingface", "path": str(folder)}, "max_steps": 1}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(values))
    assert main(["--spec", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "brings its own along (auto_map" in told and told.count("\n") == 1 and "own code ran" not in told
    flags = ("--allow-import", "transformers_modules")
    monkeypatch.setitem(ENVIRONMENT, "HF_MODULES_CACHE", str(tmp_path / "code"))
    done = python("launch/train.py", "--spec", str(path), "--run-dir", str(tmp_path / "run"), *flags)
    assert done.returncode == 0 and "own code ran" in done.stdout, done.stdout + done.stderr


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

print("own code ran")


class OwnConfig(LlamaConfig):
    model_type = "own-kind"

    def __init__(self, **more):
        super().__init__(**{**more, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                            "num_attention_heads": 2, "num_key_value_heads": 2})


class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_of_the_hub_is_found_where_it_was_fetched(tmp_path: Path, monkeypatch) -> None:
    commit, cache = "0" * 40, tmp_path / "models--some--one"
    path = made(tmp_path, "llama")
    for folder in ("refs", "snapshots"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (tmp_path / "hf").rename(cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    section = {"kind": "huggingface", "path": "some/one"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": section}))
    spec = opened(path)
    found = model_recipe(spec, filled=True).initial_value("model.norm.weight", torch.Size([32]))
    assert torch.equal(found, torch.ones(32)), "the weights are read"
    other = HuggingFace(kind="huggingface", path="some/other")
    with pytest.raises(UserError, match=r"neither here .*; correct it, or run `hf download some/other`"):
        look_at(other, ())


# ---------------------------------------------------------------- chat templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %} {{ message.content }}."
    "{% endgeneration %}{% else %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "U: {{ message.content }};{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ message.role }}:{% if loop.last or message.role == 'user' %}{{ message.content }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer_in(folder: Path, template: str | None = CHATML) -> Any:
    """A tokenizer of bytes, and of pairs of letters, that knows this template."""
    folder.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:-4]
    words = {letter: number for number, letter in enumerate([*letters, "ho", "Ġy"])}
    inner = Tokenizer(models.BPE(words, [("h", "o"), ("Ġ", "y")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    found.chat_template = template
    found.save_pretrained(folder)
    return found


def chat_spec(folder: Path, *conversations: list[str], **more: Any) -> Spec:
    """Of a file of conversations, in which the user begins."""
    lines = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}
        for texts in conversations
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"kind": "chat", "train": [str(folder / "chat.jsonl")], "validation": 0, "sequence_length": 96}
    data |= {"tokenizer": str(folder / "tok"), "cache": str(folder / "cache"), "packing": False, **more}
    model = {"kind": "decoder", **SMALL, "vocab_size": 512, "max_position_embeddings": 96}
    return Spec.model_validate(SPEC | {"model": model, "data": data, "objective": {"kind": "sft"}})


SAID = (["Hi?", "ho ho"], ["a", "yes", "b", " yes\n no "], ["x", "ho"])


def test_the_folders_template_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tok")
    both = [build_datasets(chat_spec(tmp_path, *SAID, template=name))[0] for name in ("chatml", "tokenizer")]
    one, other = (dataset.read(np.arange(3)) for dataset in both)
    assert torch.equal(one.targets, other.targets) and (one.targets >= 0).any(dim=1).all()
    for row, targets in enumerate(one.targets >= 0):  # but for the line break at the end
        length = int(targets.nonzero()[-1]) + 1
        assert torch.equal(one.inputs[row, :length], other.inputs[row, :length])


def test_words_that_a_template_marks_are_the_targets(tmp_path: Path) -> None:
    theirs = tokenizer_in(tmp_path / "tok", MARKED)
    spec = chat_spec(tmp_path, *SAID, template="tokenizer")
    batch = build_datasets(spec)[0].read(np.arange(3))
    for row, texts in enumerate(SAID):
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        told = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor(told["input_ids"]), torch.tensor(told["assistant_masks"]).bool()
        length = len(ids) - 1
        assert torch.equal(batch.inputs[row, :length], ids[:-1])
        assert torch.equal(batch.targets[row, :length], torch.where(mask[1:], ids[1:], -100)) and mask.any()


def test_templates_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    cases = ((None, "has none; set it"), (FORGETFUL, "writes what was said otherwise once more is said"))
    for template, message in cases:
        tokenizer_in(tmp_path / "tok", template)
        with pytest.raises(UserError, match=r"`data\.template` must be") as raised:
            build_datasets(chat_spec(tmp_path, *SAID, template="tokenizer"))
        assert message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="`template` must be"):
        chat_spec(tmp_path, *SAID, template="tokenizer", tokenizer="bytes")


def test_a_conversation_that_the_template_does_not_take_is_named_or_left_out(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tok", MARKED)
    spec = chat_spec(tmp_path, *SAID, template="tokenizer")
    with (tmp_path / "chat.jsonl").open("a") as file:
        roles = ("system", "user", "assistant")
        file.write("\n" + json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}))
    with pytest.raises(UserError, match=r"chat.jsonl:4: .* no system here; correct the line"):
        build_datasets(spec)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"malformed": "skip"})})
    assert len(build_datasets(spec)[0]) == 3


def test_prompts_end_where_the_assistant_begins(tmp_path: Path) -> None:
    theirs = tokenizer_in(tmp_path / "tok")
    data = chat_spec(tmp_path, *SAID, template="tokenizer").data
    assert isinstance(data, ChatData)
    prompts = open_prompt_data(data, 512, 16)[0]
    assert prompts.stop.tolist() == [theirs.eos_token_id]
    asked = theirs.apply_chat_template([{"role": "user", "content": "Hi?"}], add_generation_prompt=True)
    assert prompts.prompt(0).tolist() == asked["input_ids"] and prompts.expected(0) == "ho ho"


# ---------------------------------------------------------------- tables

TEXTS = [{"text": f"{n} " * 40} for n in range(20)]
CHATS = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "ho"}]} for n in range(20)]
PREFERRED = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(20)]
WHOLE = [
    {"prompt": f"{n}?"}
    | {
        side: [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}]
        for side, answer in (("chosen", "yes"), ("rejected", "no"))
    }
    for n in range(20)
]
KINDS = {
    "text": (TEXTS, TEXTS, "causal_lm"),
    "chat": (CHATS, CHATS, "sft"),
    "preference": (PREFERRED, WHOLE, "dpo"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_read_as_lines_are(tmp_path: Path, kind: str) -> None:
    rows, in_table, objective = KINDS[kind]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = Dataset.from_list([{**row, "other": None if n % 2 else n} for n, row in enumerate(in_table)])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    found = []
    for name in ("a.jsonl", "a.parquet", "saved", "saved/*.arrow"):
        data = {"kind": kind, "train": [str(tmp_path / name)], "validation": 0, "sequence_length": 48}
        data |= {"cache": str(tmp_path / "cache")} | ({"template": "instruction"} if kind != "text" else {})
        model = {"kind": "decoder", **SMALL, "vocab_size": 256, "max_position_embeddings": 48}
        spec = Spec.model_validate(SPEC | {"model": model, "data": data, "objective": {"kind": objective}})
        dataset = build_datasets(spec)[0]
        found.append(dataset.read(np.arange(len(dataset))))
    for other in found[1:]:
        assert torch.equal(other.inputs, found[0].inputs) and torch.equal(other.targets, found[0].targets)


def test_tables_that_are_none_are_named(tmp_path: Path) -> None:
    def opened(name: str) -> None:
        data = {"kind": "chat", "train": [str(tmp_path / name)], "validation": 0, "sequence_length": 32}
        model = {"kind": "decoder", **SMALL, "vocab_size": 256, "max_position_embeddings": 32}
        values = SPEC | {
            "model": model,
            "data": data | {"cache": str(tmp_path / "cache")},
            "objective": {"kind": "sft"},
        }
        build_datasets(Spec.model_validate(values))

    Dataset.from_list(CHATS).save_to_disk(tmp_path / "both" / "train")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"must name one split of a saved data set, but .*; name .*both/train$"):
        opened("both")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a.parquet must be a whole parquet file, but is not"):
        opened("a.parquet")
    (tmp_path / "both" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"must name whole saved data sets, but .* lacks data-00000-of-00001.arrow"):
        opened("both/train")
    Dataset.from_list([*CHATS, {"messages": None}]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet:21: the line must have `messages`"):
        opened("b.parquet")
