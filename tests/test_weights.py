"""Weights that are refused: files that are not what they say, models that are not the spec's, code in disguise."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from safetensors.torch import save_file
from test_export import assert_same_logits, filled
from test_models import GPT2, LLAMA, decoder_spec, gpt2_weights, llama_weights, random_decoder
from torch import Tensor

from scaling.checkpoint.safetensors import TensorFiles, files_of, read_header
from scaling.checkpoint.weights import find_weights, open_weights
from scaling.errors import CheckpointError

LLAMA_SPEC, GPT2_SPEC = decoder_spec(**LLAMA), decoder_spec(**GPT2)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50.0,
}


def llama() -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in llama_weights(dict(random_decoder(LLAMA_SPEC).named_parameters())).items()
    }


def gpt2() -> dict[str, Tensor]:
    ours = {name: value.detach() for name, value in random_decoder(GPT2_SPEC).named_parameters()}
    found = gpt2_weights(ours, GPT2_SPEC.num_hidden_layers)
    return {name: value.contiguous() for name, value in found.items() if name != "lm_head.weight"}


def saved(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(path: Path, spec: Any = LLAMA_SPEC) -> str:
    """The message, which has one line."""
    with pytest.raises(CheckpointError) as error:
        open_weights(find_weights(path), spec)
    assert error.value.code == 5
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


# ---------------------------------------------------------------- files


def raw(header: Any, values: bytes = b"\0" * 16, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def tensor(begin: Any = 0, end: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


BROKEN = {
    "a pickle": pickle.dumps({"a": 1, "b": "x" * 100}),
    "empty": b"",
    "a few bytes": b"abc",
    "a header beyond the file": raw({"a": tensor()}, length=2**62),
    "a header of 200 MB": raw({"a": tensor()}, length=200_000_000),
    "no header": raw(b"", length=0),
    "no JSON": raw(b"{nonsense"),
    "no object": raw([1]),
    "no UTF-8": raw(b'{"\xff\xfe": 1}'),
    "deep nesting": raw(b"[" * 100_000),
    "a name that stands twice": raw(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2)),
    "a number of 10,000 digits": raw(
        b'{"a": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 16]}}' % (b"9" * 10_000)
    ),
    "an entry that is none": raw({"a": 5}),
    "an entry with more": raw({"a": tensor() | {"run": "x"}}),
    "an unknown dtype": raw({"a": tensor(dtype="F31")}),
    "a dtype that is a list": raw({"a": tensor(dtype=["F32"])}),
    "a shape of another size": raw({"a": tensor(shape=(5,))}),
    "a negative shape": raw({"a": tensor(shape=(-2, -2))}),
    "a shape of halves": raw({"a": tensor(shape=[4.0])}),
    "a shape of truth": raw({"a": tensor(0, 4, shape=[True])}, b"\0" * 4),
    "a huge shape": raw({"a": tensor(shape=(2**62, 2**62))}),
    "offsets beyond the file": raw({"a": tensor(0, 32, (8,))}),
    "offsets before the values": raw({"a": tensor(-8, 8)}),
    "offsets backwards": raw({"a": tensor(16, 0)}),
    "three offsets": raw({"a": tensor() | {"data_offsets": [0, 16, 16]}}),
    "overlapping tensors": raw({"a": tensor(0, 8, (2,)), "b": tensor(4, 16, (3,))}),
    "a gap": raw({"a": tensor(0, 4, (1,)), "b": tensor(8, 16, (2,))}),
    "more at the end": raw({"a": tensor(0, 12, (3,))}),
    "a part of a file": raw({"a": tensor()})[:-1],
}


@pytest.mark.fault("S5")
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert str(path) in refusal(path) and str(path) in refusal(tmp_path)


def test_files_that_the_library_writes_are_read_as_it_reads_them(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(2, 2, generator=generator).half(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"by": "someone"})
    files = TensorFiles([tmp_path / "x.safetensors"])
    assert {name: entry.shape for name, entry in files.entries.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    for name, want in tensors.items():
        whole = files.read(name, 0, want.numel())
        assert whole.dtype == want.dtype and torch.equal(whole, want.flatten())
    assert torch.equal(files.read("a", 4, 6), tensors["a"].flatten()[4:10])
    files.close()


def test_a_file_that_shrinks_after_it_was_opened(tmp_path) -> None:
    folder = saved(tmp_path / "m", llama())
    source = open_weights(folder, LLAMA_SPEC)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="bytes early"):
        for name in source.names():
            source.read(name, 0, 32)


def test_a_file_that_is_gone_when_it_is_read(tmp_path) -> None:
    folder = saved(tmp_path / "m", llama())
    source = open_weights(folder, LLAMA_SPEC)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be \(No such file"):
        source.read("norm.weight", 0, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_weights_that_are_no_floats(tmp_path, dtype: torch.dtype) -> None:
    tensors = llama()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    message = refusal(saved(tmp_path / "m", tensors))
    assert "model.norm.weight is " in message and "convert them, unquantized" in message


@pytest.mark.fault("S5")
def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is no file" in refusal(tmp_path)


def test_a_name_with_a_nul(tmp_path) -> None:
    for name in ("a\0b", "a\0b.safetensors"):
        assert "does not exist" in refusal(tmp_path / name)


# ---------------------------------------------------------------- folders


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.fault("S5")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_not_run(tmp_path, name: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for content in (pickle.dumps(Evil(tmp_path / "ran")), None):
        if content is None:
            torch.save({"a": Evil(tmp_path / "ran")}, folder / name)
        else:
            (folder / name).write_bytes(content)
        message = refusal(folder)
        assert name in message
        assert name == "model.safetensors" or ("a pickle" in message and "`save_pretrained` it again" in message)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.fault("S5")
@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "x.bin", "", "..", "x\0.safetensors"]
)
def test_an_index_that_leads_elsewhere(tmp_path, place: str) -> None:
    save_file(llama(), tmp_path / "x.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert "must hold names of .safetensors files in its own folder" in refusal(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}}])
def test_an_index_that_is_none(tmp_path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_an_index_whose_file_is_gone_or_has_a_tensor_twice(tmp_path) -> None:
    tensors = llama()
    save_file(tensors, tmp_path / "a.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "does not exist" in refusal(tmp_path)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "b.safetensors")
    assert "tensors that no other file has" in refusal(tmp_path)


@pytest.mark.fault("S5")
def test_links_out_of_the_folder(tmp_path) -> None:
    """They are refused but for those that Hugging Face's cache is made of."""
    save_file(llama(), tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    assert "a link that leads out of its folder" in refusal(folder)

    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "elsewhere.safetensors").rename(cache / "blobs" / "0123")
    (cache / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/0123")
    open_weights(cache / "snapshots" / "abc", LLAMA_SPEC).close()
    (tmp_path / "link").symlink_to(cache / "snapshots" / "abc")
    open_weights(tmp_path / "link", LLAMA_SPEC).close()


def test_several_files_without_an_index(tmp_path) -> None:
    save_file(llama(), tmp_path / "a.safetensors")
    open_weights(tmp_path, LLAMA_SPEC).close()
    save_file(llama(), tmp_path / "b.safetensors")
    assert "has 2 files and no index" in refusal(tmp_path)


def test_an_empty_folder(tmp_path) -> None:
    assert "neither safetensors nor a checkpoint" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "is no folder, .safetensors file or its index" in refusal(tmp_path / "notes.txt")


# ---------------------------------------------------------------- models


def test_older_names_of_gpt2_and_its_buffers(tmp_path) -> None:
    """As the first GPT-2 was saved: without prefix, with its causal masks; in fp16."""
    tensors = {name.removeprefix("transformer."): value.half() for name, value in gpt2().items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 40, 40).bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    ours = random_decoder(GPT2_SPEC)
    with torch.no_grad():
        for value in ours.parameters():
            value.copy_(value.half())
    config = {"model_type": "gpt2", "n_head": 4, "n_embd": 32, "activation_function": "gelu_new"}
    folder = saved(tmp_path / "m", tensors, config)
    assert_same_logits(GPT2_SPEC, filled(open_weights(folder, GPT2_SPEC), GPT2_SPEC), ours)


def test_a_tied_head_may_be_there_if_it_equals_the_embedding(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scaling.checkpoint.weights._BAND", 100)
    spec = LLAMA_SPEC.model_copy(update={"tie_word_embeddings": True})
    tensors = llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in open_weights(saved(tmp_path / "m", tensors), spec).names()
    tensors["lm_head.weight"][-1, -1] += 1
    assert "set `model.tie_word_embeddings` to false" in refusal(saved(tmp_path / "m", tensors), spec)
    del tensors["lm_head.weight"]
    message = refusal(saved(tmp_path / "m", tensors), LLAMA_SPEC)
    assert "lacks lm_head.weight;" in message and "set `model.tie_word_embeddings` to true" in message


@pytest.mark.parametrize("make, spec", [(llama, LLAMA_SPEC), (gpt2, GPT2_SPEC)], ids=["llama", "gpt2"])
def test_a_padded_vocabulary_is_said_to_be_one(tmp_path, make: Any, spec: Any) -> None:
    message = refusal(saved(tmp_path / "m", make()), spec.model_copy(update={"vocab_size": 128}))
    assert "[97, 32], not [128, 32]" in message and "set `model.vocab_size` to 97" in message


def test_other_shapes_and_names(tmp_path) -> None:
    tensors = gpt2()
    message = refusal(saved(tmp_path / "m", tensors), GPT2_SPEC.model_copy(update={"max_position_embeddings": 64}))
    assert "set `model.max_position_embeddings` to 40" in message
    message = refusal(tmp_path / "m", LLAMA_SPEC)
    assert "holds a GPT-2; set `model` to its shape" in message
    message = refusal(tmp_path / "m", GPT2_SPEC.model_copy(update={"num_hidden_layers": 2}))
    assert "has transformer.h.2." in message and "and 9 more, which the model has not" in message
    assert refusal(saved(tmp_path / "o", {"x": torch.ones(1)})).count("lacks embed_tokens.weight") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_theta": 500000.0}, r"`model.rope_theta` must be as in the weights .* \(500000.0 in"),
        ({"rms_norm_eps": 1e-6}, "`model.norm_eps` must be"),
        ({"num_attention_heads": 8, "head_dim": 4}, "`model.num_attention_heads` must be"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary embeddings of another kind"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary embeddings of another kind"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3}}, r"\(3 in"),
        ({"rope_parameters": [1]}, "rotary embeddings of another kind"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "sliding window of 8 tokens"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window of 8 tokens"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"model_type": "gpt2"}, "`model.norm` must be"),
    ],
)  # fmt: skip
def test_a_config_that_computes_something_else(tmp_path, changes: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path / "m", llama(), CONFIG | changes)
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder, LLAMA_SPEC)
    open_weights(folder / "model.safetensors", LLAMA_SPEC).close()  # taken all the same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50}},
        {"rope_scaling": None, "torch_dtype": "bfloat16", "head_dim": 8},
    ],
)
def test_a_config_that_computes_the_same(tmp_path, changes: dict[str, Any]) -> None:
    open_weights(saved(tmp_path / "m", llama(), CONFIG | changes), LLAMA_SPEC).close()


def test_a_config_that_is_none(tmp_path) -> None:
    saved(tmp_path / "m", llama())
    (tmp_path / "m" / "config.json").write_text("[" * 100_000)
    assert "config.json" in refusal(tmp_path / "m")


# ---------------------------------------------------------------- as commands end


def test_the_command_ends_with_5_and_one_line(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(BROKEN["a pickle"])
    done = python("-m", "scaling.export", str(tmp_path), "--to", str(tmp_path / "out"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1)
    assert not (tmp_path / "out").exists()


def test_headers_are_read_without_the_values(tmp_path) -> None:
    """A file of 64 GiB (of holes) opens at once."""
    count = 2**34
    text = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + 4 * count)
    assert read_header(path)["a"].elements == count
    assert torch.equal(TensorFiles(files_of(tmp_path)).read("a", count - 5, 5), torch.zeros(5))
