"""Weights out of a checkpoint and in again: logits against transformers', files, memory, the command line."""

import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, python, torchrun
from safetensors import safe_open
from test_models import GPT2, LLAMA, decoder_spec, random_decoder, token_ids
from torch import Tensor, nn

from scaling.checkpoint import saver, weights
from scaling.checkpoint.saver import Saver
from scaling.checkpoint.store import BEST, Store
from scaling.checkpoint.weights import WeightSource, find_weights, open_weights
from scaling.engine.process import Process
from scaling.engine.protocol import FlatShard
from scaling.errors import CheckpointError, StorageError, UserError
from scaling.export import export, main
from scaling.inventory import parameters
from scaling.models.decoder import Decoder, decoder_recipe
from scaling.parity import BACKENDS
from scaling.spec import load_spec
from scaling.spec.sections import Decoder as DecoderSpec
from scaling.spec.sections import Lora

FAMILIES = [
    pytest.param("gpt2", decoder_spec(**GPT2), id="gpt2"),
    pytest.param(
        "gpt2", decoder_spec(**(GPT2 | {"tie_word_embeddings": False, "activation": "gelu"})), id="gpt2 untied"
    ),
    pytest.param("llama", decoder_spec(**LLAMA), id="llama with grouped queries"),
    pytest.param("llama", decoder_spec(**LLAMA, tie_word_embeddings=True, head_dim=6), id="llama tied, head_dim"),
    pytest.param("llama", decoder_spec(**LLAMA, bias=True), id="llama with biases"),
    pytest.param("qwen2", decoder_spec(**LLAMA, qkv_bias=True, norm_eps=1e-6), id="qwen2"),
    pytest.param("qwen2", decoder_spec(**LLAMA, qkv_bias=True, head_dim=10, tie_word_embeddings=True), id="qwen2 tied"),
    pytest.param("qwen3", decoder_spec(**LLAMA, qk_norm=True, head_dim=16, norm_eps=1e-6), id="qwen3"),
]


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Process(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def write_checkpoint(
    folder: Path,
    process: Process,
    spec: DecoderSpec,
    values: dict[str, Tensor],
    *,
    step: int = 3,
    data: Any = None,
    lora: Lora | None = None,
) -> Path:
    """A checkpoint of these weights as some ranks would have left it: cut in uneven ranges, moments beside them."""
    state: dict[str, Any] = dict.fromkeys(("samples_seen", "tokens_seen", "global_batch", "sequence_length", "seed"), 1)
    shapes = {name: list(value.shape) for name, value in values.items()}
    state |= {"format_version": 1, "step": step, "skipped": [], "trainable": [], "counters": {}, "shapes": shapes}
    state |= {"best": None, "data": "", "origin": None}
    document = {"model": spec.model_dump(mode="json"), "data": data or {"kind": "synthetic", "sequence_length": 8}}
    document |= {"lora": lora.model_dump(mode="json")} if lora else {}
    shards = [FlatShard(next(iter(values)), "exp_avg", 7, 0, torch.ones(7))]
    for name, value in values.items():
        flat, third = value.detach().reshape(-1), value.numel() // 3 + 1
        cuts = range(0, flat.numel(), third)
        shards += [FlatShard(name, "master", flat.numel(), at, flat[at : at + third]) for at in cuts]
    writer = Saver(Store(folder), process, asynchronous=False)
    writer.save(step, shards, {"state.json": json.dumps(state), "spec.json": json.dumps(document)}, lambda: None)
    outcome = writer.wait()
    assert outcome is not None and outcome.problem is None, outcome
    return Store(folder).path(step)


def checkpoint_of(model: Decoder, folder: Path, process: Process, **more: Any) -> Path:
    return write_checkpoint(folder, process, model.spec, dict(model.named_parameters()), **more)


def filled(source: WeightSource, spec: DecoderSpec) -> Decoder:
    """A model with the weights of `source`, each read in uneven ranges as ranks would."""
    model = Decoder(spec).eval()
    with torch.no_grad():
        assert set(source.names()) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert source.shape(name) == tuple(parameter.shape)
            size = parameter.numel()
            cuts = [0, 1, size // 3, size // 3, size - size // 5, size]
            parts = [source.read(name, a, b - a) for a, b in itertools.pairwise(sorted(cuts))]
            parameter.copy_(torch.cat(parts).view_as(parameter))
    source.close()
    return model


def loaded(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def assert_same_logits(spec: DecoderSpec, have: nn.Module, want: Decoder) -> None:
    ids = token_ids(2, spec.max_position_embeddings, vocabulary=spec.vocab_size)
    with torch.no_grad():
        logits, reference = have(ids), want(ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


# ---------------------------------------------------------------- both directions


@pytest.mark.parametrize("family, spec", FAMILIES)
def test_out_to_transformers_and_in_again(tmp_path, process, family: str, spec: DecoderSpec, monkeypatch) -> None:
    monkeypatch.setattr(weights, "_BAND", 500)  # several bands for each transposed tensor
    ours = random_decoder(spec)
    found = export(checkpoint_of(ours, tmp_path / "c", process), tmp_path / "out")
    assert (found.family, found.files) == (family, 1)
    theirs = loaded(tmp_path / "out")
    assert theirs.config.model_type == family
    assert_same_logits(spec, theirs, ours)

    theirs.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "again", tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        back = filled(open_weights(find_weights(folder), spec), spec)
        assert all(torch.equal(back.get_parameter(name), value) for name, value in ours.named_parameters()), folder
    assert_same_logits(spec, back, ours)


@pytest.mark.parametrize("family, spec", FAMILIES)
def test_keys_and_shapes_are_those_of_the_family(tmp_path, process, family: str, spec: DecoderSpec) -> None:
    transformers = pytest.importorskip("transformers")
    export(checkpoint_of(random_decoder(spec), tmp_path / "c", process), tmp_path / "out")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path / "out")
        )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert written == {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}


def test_a_model_of_no_family_keeps_our_names(tmp_path, process, capsys) -> None:
    spec = decoder_spec(**(LLAMA | {"activation": "relu"}))
    ours = random_decoder(spec)
    checkpoint = checkpoint_of(ours, tmp_path / "c", process)
    assert main([str(checkpoint), "--to", str(tmp_path / "out")]) == 0
    assert "our own names" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "scaling_spec.json"]
    assert_same_logits(spec, filled(open_weights(tmp_path / "out", spec), spec), ours)
    other = spec.model_copy(update={"rope_theta": 9.0})
    with pytest.raises(CheckpointError, match=r"`model.rope_theta` must be as in .* but is 9.0"):
        open_weights(tmp_path / "out", other)


def test_shards_have_an_index_and_stay_below_their_size(tmp_path, process) -> None:
    spec = decoder_spec(**GPT2)
    ours = random_decoder(spec)
    found = export(checkpoint_of(ours, tmp_path / "c", process), tmp_path / "out", shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert found.files == len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert sum(file.stat().st_size for file in files) > found.bytes
    assert all(file.stat().st_size < 30_000 + 3000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.bytes and len(index["weight_map"]) == found.tensors
    for name in (".", "model.safetensors.index.json"):
        assert_same_logits(spec, filled(open_weights(tmp_path / "out" / name, spec), spec), ours)
    assert_same_logits(spec, loaded(tmp_path / "out"), ours)


def test_bf16_rounds_once(tmp_path, process) -> None:
    spec = decoder_spec(**LLAMA)
    ours = random_decoder(spec)
    export(checkpoint_of(ours, tmp_path / "c", process), tmp_path / "out", dtype="bf16")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name, value in ours.named_parameters():
            written = file.get_tensor(name if name == "lm_head.weight" else f"model.{name}")
            assert torch.equal(written, value.bfloat16()), name
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


# ---------------------------------------------------------------- from checkpoints


def test_our_own_checkpoint_is_a_source(tmp_path, process) -> None:
    spec = decoder_spec(**LLAMA)
    ours = random_decoder(spec)
    checkpoint = checkpoint_of(ours, tmp_path / "run" / "checkpoints", process)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "latest", checkpoint, checkpoint.parent):
        assert find_weights(path) == checkpoint
    assert_same_logits(spec, filled(open_weights(checkpoint, spec), spec), ours)
    with pytest.raises(CheckpointError, match=r"lacks layers.0.self_attn.q_norm.weight, .* and 3 more"):
        open_weights(checkpoint, spec.model_copy(update={"qk_norm": True}))
    with pytest.raises(CheckpointError, match=r"`model.num_attention_heads` must be as in .* \(4 in"):
        open_weights(
            checkpoint, spec.model_copy(update={"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4})
        )


def test_which_checkpoint_of_a_run(tmp_path, process, caplog) -> None:
    spec = decoder_spec(**LLAMA)
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        checkpoint_of(random_decoder(spec, seed=step), folder, process, step=step)
    store, run = Store(folder), tmp_path / "run"
    store.point(BEST, 1)
    assert find_weights(run) == find_weights(run, "latest") == store.path(3)
    assert find_weights(run, "best") == find_weights(folder / "best") == store.path(1)
    assert find_weights(run, "2") == store.path(2)
    for which in ("4", "newest", "-1", "9" * 5000):
        with pytest.raises(CheckpointError, match="latest, best or one of the steps 1, 2, 3"):
            find_weights(run, which)
    with pytest.raises(UserError, match="`--which` must be given with a run folder"):
        find_weights(store.path(2), "best")

    with open(next(store.path(3).glob("*.distcp")), "r+b") as file:  # one flipped byte
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert find_weights(run) == store.path(2)
    assert "damaged checkpoint passed over" in caplog.text
    for path, which in ((run, "3"), (store.path(3), None)):
        with pytest.raises(CheckpointError, match=r"must be whole, but .* SHA-256"):
            find_weights(path, which)


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_from_training_to_transformers_by_the_commands(tmp_path, backend: str) -> None:
    """From two ranks, with a frozen block."""
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ("max_steps=2", "schedule.warmup_steps=1", f"backend={json.dumps(BACKENDS[backend])}")
    changes = [argument for setting in settings for argument in ("--set", setting)]
    source = "tests/specs/gpt-parity.json"
    done = torchrun(2, "launch/train.py", "--spec", source, *changes, "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    done = python("-m", "scaling.export", str(run), "--to", str(out))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "step-00000002" in done.stdout and "gpt2" in done.stdout

    spec = load_spec(source)
    ours = filled(open_weights(find_weights(run), spec.model), spec.model)
    assert_same_logits(spec.model, loaded(out), ours)
    recipe = decoder_recipe(spec.model, spec.objective, spec.seed)
    for name, value in ours.named_parameters():
        untouched = torch.equal(value, recipe.initial_value(name, value.shape))
        assert untouched == name.startswith("layers.1."), name


# ---------------------------------------------------------------- the folder that is written


def test_a_folder_with_something_in_it_is_refused(tmp_path, process) -> None:
    checkpoint = checkpoint_of(random_decoder(decoder_spec(**LLAMA)), tmp_path / "c", process)
    out = tmp_path / "out"
    out.mkdir()
    export(checkpoint, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = python("-m", "scaling.export", str(checkpoint), "--to", str(out))
    assert done.returncode == 6 and done.stderr.startswith("`--to` must be an empty or a new folder")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(StorageError, match="must be a folder that can be written to"):
        export(checkpoint, out / "config.json")


def test_an_export_that_fails_leaves_nothing(tmp_path, process, monkeypatch) -> None:
    checkpoint = checkpoint_of(random_decoder(decoder_spec(**LLAMA)), tmp_path / "c", process)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("scaling.export.free_bytes", lambda folder: 10)
    for name in ("there", "new"):
        with pytest.raises(StorageError, match="are needed, 10 B are free"):
            export(checkpoint, tmp_path / name)
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "new").exists()


FULL = """
import resource, signal, sys
from scaling.export import main
from scaling.errors import run_command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
sys.exit(run_command(lambda: main(sys.argv[1:])))
"""


def test_a_disk_that_fills_is_told_and_leaves_nothing(tmp_path, process) -> None:
    checkpoint = checkpoint_of(random_decoder(decoder_spec(**LLAMA)), tmp_path / "c", process)
    done = python("-c", FULL, str(checkpoint), "--to", str(tmp_path / "out"))
    assert done.returncode == 6 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_all_weights_is_refused(tmp_path, process) -> None:
    ours = random_decoder(decoder_spec(**LLAMA))
    values = dict(ours.named_parameters())
    values["other"] = values.pop("layers.1.mlp.up_proj.weight")
    checkpoint = write_checkpoint(tmp_path / "c", process, ours.spec, values)
    with pytest.raises(CheckpointError, match=r"lacks layers.1.mlp.up_proj.weight and has other"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    done = python("-m", "scaling.export", str(tmp_path / "nothing"), "--to", str(tmp_path / "out"))
    assert done.returncode == 5 and done.stderr.startswith("`RUN_DIR_OR_CHECKPOINT` must be")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="must hold a checkpoint, but has none yet"):
        find_weights(tmp_path / "run")


# ---------------------------------------------------------------- tokenizer


def test_the_tokenizer_goes_along(tmp_path, process) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    data = {"kind": "text", "tokenizer": str(tmp_path / "tokenizer.json")}
    checkpoint = checkpoint_of(random_decoder(decoder_spec(**GPT2)), tmp_path / "c", process, data=data)
    assert export(checkpoint, tmp_path / "out").notes == ()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("two one")["input_ids"] == [2, 1] and tokenizer.eos_token_id == 3
    assert loaded(tmp_path / "out").config.eos_token_id == 3


@pytest.mark.parametrize("content", ["no json", '{"key": "secret"}', None])
def test_a_file_that_is_no_tokenizer_does_not_go_along(tmp_path, process, content: str | None) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    data = {"kind": "text", "tokenizer": str(tmp_path / "secret")}
    checkpoint = checkpoint_of(random_decoder(decoder_spec(**GPT2)), tmp_path / "c", process, data=data)
    (note,) = export(checkpoint, tmp_path / "out").notes
    assert note.startswith("no tokenizer:")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------- memory

PEAK = r"""
import json, re, sys
from pathlib import Path
import torch
from scaling.checkpoint.weights import CheckpointWeights, open_weights
from scaling.export import export
def peak():  # not getrusage's: that begins at the size of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
checkpoint, out = map(Path, sys.argv[1:])
import torch.distributed.checkpoint
peaks = [peak()]
export(checkpoint, out)
peaks.append(peak())
weights = CheckpointWeights(checkpoint)
source = open_weights(out, weights.model)
for name in source.names():
    source.read(name, 0, torch.Size(source.shape(name)).numel())
peaks.append(peak())
everything = [weights.read(name, 0, torch.Size(weights.shape(name)).numel()) for name in weights.names()]
peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.parametrize(
    "family", [GPT2, pytest.param(LLAMA, marks=pytest.mark.long)], ids=["gpt2, transposed", "llama"]
)
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path, process, family: dict[str, Any]) -> None:
    sizes = dict(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16)
    spec = decoder_spec(**family, **sizes)
    values = {parameter.name: torch.full(parameter.shape, 0.5) for parameter in parameters(spec)}
    checkpoint = write_checkpoint(tmp_path / "c", process, spec, values)
    largest, total = 4 * 4096 * 1024, 4 * sum(value.numel() for value in values.values())
    command = [sys.executable, "-c", PEAK, checkpoint, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, exported, imported, everything = json.loads(done.stdout)
    bound = before + 2 * largest + 64 * 2**20
    assert exported < bound and imported < bound, (before, exported, imported)
    assert everything > bound and everything > before + 0.9 * total, "the measure sees what is held"


def test_the_pieces_of_a_save_do_not_matter(tmp_path, process, monkeypatch) -> None:
    monkeypatch.setattr(saver, "CHUNK_BYTES", 1024)
    spec = decoder_spec(**GPT2)
    ours = random_decoder(spec)
    export(checkpoint_of(ours, tmp_path / "c", process), tmp_path / "out")
    assert_same_logits(spec, filled(open_weights(tmp_path / "out", spec), spec), ours)
