"""Weights out of a checkpoint: safetensors, in Hugging Face's layout where one of its models computes the same.

    python -m scaling.export RUN_DIR_OR_CHECKPOINT --to DIR [--which latest|best|STEP] [--dtype fp32|bf16]
                             [--merge | --base | --adapters] [--allow-import PACKAGE]

One process, no GPU, one tensor in memory at a time. DIR then loads with transformers'
`AutoModelForCausalLM.from_pretrained(DIR)`, and `initialize_from` takes it too. A decoder that is no GPT-2, Llama,
Qwen2 or Qwen3 keeps its own names; `initialize_from` takes those as well. A model of transformers (`model.kind`
"huggingface") goes back to what it came from: its config.json and its tokenizer's files come along.

Of a run with `lora` the weights are those with the adapters merged into them (--merge, the default), those without
(--base), or the adapters alone (--adapters), which `peft.PeftModel.from_pretrained(base, DIR)` loads.
"""

import argparse
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling.checkpoint.huggingface import CONFIG, OWN_CONFIG, Stored, family, layout, render_config
from scaling.checkpoint.store import free_bytes, sync_folder, write_synced
from scaling.data.progress import progress_in_bytes
from scaling.errors import CheckpointError, CommandLine, StorageError, positive, run_program
from scaling.imports import add_allow_import
from scaling.inventory import parameters
from scaling.spec.sections import Decoder, HuggingFace, Model, Recorded
from scaling.units import format_bytes

if TYPE_CHECKING:  # torch takes seconds to import: a wrong command line is refused before
    from torch import Tensor

    from scaling.checkpoint.weights import CheckpointWeights, WeightSource

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
Part = Literal["merged", "base", "adapters"]
SHARD_BYTES = 5 * 10**9
"""Largest file, as transformers has it."""
_TOKENIZER_BYTES = 1 << 28


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    family: str | None
    """The `model_type` in Hugging Face's config.json; None: the layout is our own."""
    tensors: int
    bytes: int
    """Of the tensors."""
    files: int
    """With tensors."""
    notes: tuple[str, ...]
    """What a user may miss in it, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    to = _destination(Path(options.to))

    from scaling.checkpoint.weights import find_weights, is_checkpoint

    source = find_weights(Path(options.source), options.which)
    if not is_checkpoint(source):
        raise CheckpointError(
            f"`RUN_DIR_OR_CHECKPOINT` must be a run folder or a checkpoint of this project, but {source} is none; "
            "look for folders named step-*"
        )
    shard_bytes, allow_import = options.shard_size_mb * 10**6, tuple(options.allow_import)
    found = export(
        source, to, dtype=options.dtype, shard_bytes=shard_bytes, part=options.part, allow_import=allow_import
    )
    layout = f"Hugging Face's {found.family} layout" if found.family else "our own names (no Hugging Face model fits)"
    count = f"{found.tensors} tensors, {format_bytes(found.bytes)} in {options.dtype}, {found.files} file(s)"
    print(f"{source} -> {to}: {layout}; {count}")
    for note in found.notes:
        print(f"note: {note}")
    return 0


def export(
    checkpoint: Path,
    to: Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    part: Part = "merged",
    allow_import: Sequence[str] = (),
) -> Exported:
    """Write the weights of a checkpoint, verified before, into the folder `to`, which must be empty or absent.

    `part`: of weights with adapters, which. `allow_import`: packages that a module's own code may come from.
    What makes the folder loadable is written last; after an error, or a kill, it holds nothing that could be taken for
    a model. Raises CheckpointError for the checkpoint and StorageError for the folder.
    """
    from scaling.checkpoint.weights import CheckpointWeights

    to = _destination(to)
    with closing(CheckpointWeights(checkpoint)) as weights:
        if isinstance(weights.model, Recorded):
            from scaling.models.recorded import look_at

            look_at(weights.model, allow_import)
        _check_complete(weights, checkpoint)
        if weights.lora is None and part != "merged":
            raise CheckpointError(f"`--{part}` must be absent for a run without `lora`, but is given; drop it")
        made = not to.exists()
        incomplete = to / f".incomplete-{uuid.uuid4().hex[:8]}"
        try:
            os.makedirs(incomplete)
            if part == "adapters":
                found = _write_adapters(weights, incomplete, DTYPES[dtype])
            else:
                found = _write_all(weights, incomplete, DTYPES[dtype], shard_bytes, merged=part == "merged")
            _publish(incomplete, to)
            return found
        except BaseException as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            if made:
                with suppress(OSError):
                    to.rmdir()
            if isinstance(error, OSError):
                raise _unwritable(to, error.strerror or str(error)) from None
            raise


def _publish(incomplete: Path, to: Path) -> None:
    """Move what is written to where it belongs: the weights, then their index, and what says whose they are last."""
    names = sorted(
        os.listdir(incomplete), key=lambda name: (name in (CONFIG, OWN_CONFIG), name.endswith(".json"), name)
    )
    try:
        for name in names:
            os.rename(incomplete / name, to / name)
        os.rmdir(incomplete)
        sync_folder(to)
    except BaseException:
        for name in names:
            (to / name).unlink(missing_ok=True)  # `to` was empty
        raise


def _write_all(weights: "CheckpointWeights", folder: Path, dtype: str, shard_bytes: int, *, merged: bool) -> Exported:
    import torch

    from scaling.checkpoint.adapters import BaseWeights, MergedWeights

    model = weights.model
    model_type, stored = _layout(model)
    total = sum(math.prod(tensor.shape) for tensor in stored) * getattr(torch, dtype).itemsize
    if free_bytes(folder) < total:
        raise OSError(f"{format_bytes(total)} are needed, {format_bytes(free_bytes(folder))} are free")
    source: WeightSource = weights
    if weights.lora is not None:
        source = MergedWeights(weights, weights.lora) if merged else BaseWeights(weights)
    files = _write_tensors(source, stored, folder, dtype, shard_bytes)
    if isinstance(model, HuggingFace):
        return Exported(model_type, len(stored), total, files, _copy_from(model, weights.spec, folder, dtype))
    end_of_text, notes = _copy_tokenizer(weights.spec, folder)
    if model_type is None or not isinstance(model, Decoder):
        document = {"format_version": 1, "model": model.model_dump(mode="json")}
        _write_json(folder / OWN_CONFIG, document)
    else:
        _write_json(folder / CONFIG, render_config(model, model_type, dtype, end_of_text))
    return Exported(model_type, len(stored), total, files, notes)


def _write_adapters(weights: "CheckpointWeights", folder: Path, dtype: str) -> Exported:
    import torch

    from scaling.checkpoint.adapters import write_adapters

    assert weights.lora is not None
    model_type, stored = _layout(weights.model)
    tensors, size = write_adapters(weights, weights.lora, stored, model_type, folder, getattr(torch, dtype))
    return Exported(model_type, tensors, size, 1, ("adapters alone: peft puts them into the model of --base",))


def _layout(model: Model) -> tuple[str | None, tuple[Stored, ...]]:
    """The `model_type` of the Hugging Face model that computes the same, if there is one, and its tensors."""
    model_type = _config_of(model)["model_type"] if isinstance(model, HuggingFace) else family(model)
    stored = layout(model, "own" if model_type is None else "gpt2" if model_type == "gpt2" else "llama")
    assert stored is not None, "the family has a word for every part"
    return model_type, stored


def _check_complete(weights: "CheckpointWeights", checkpoint: Path) -> None:
    from scaling.checkpoint.weights import mismatch

    found = {name: weights.shape(name) for name in weights.names()}
    if problem := mismatch(found, {p.name: p.shape for p in parameters(weights.model, weights.lora)}):
        raise CheckpointError(
            f"`{checkpoint}` must hold every weight of its model and no other, but {problem}; use another checkpoint"
        )


def _write_tensors(
    weights: "WeightSource", stored: Sequence[Stored], folder: Path, dtype: str, shard_bytes: int
) -> int:
    """The tensors in as many files as it takes, with an index where there are several; returns their number."""
    import torch

    from scaling.checkpoint.safetensors import INDEX, SINGLE, write_file

    kind = getattr(torch, dtype)
    sizes = {tensor.name: math.prod(tensor.shape) * kind.itemsize for tensor in stored}
    shards = _shards(sizes, shard_bytes)
    by_name = {tensor.name: tensor for tensor in stored}
    places: dict[str, str] = {}
    with progress_in_bytes("writing weights", sum(sizes.values())) as advance:
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = [(name, by_name[name].shape) for name in names]
            write_file(folder / file, tensors, kind, lambda name: _parts(weights, by_name[name], kind), advance)
            places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
    return len(shards)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes, or of one."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _parts(weights: "WeightSource", tensor: Stored, dtype: Any) -> "Iterator[Callable[[], Tensor]]":
    """Functions that read the parts of a tensor, in order."""
    if tensor.transposed:
        yield partial(_transposed, weights, tensor, dtype)
        return
    for member in tensor.members:
        yield partial(weights.read, member.name, 0, member.elements)


def _transposed(weights: "WeightSource", tensor: Stored, dtype: Any) -> "Tensor":
    import torch

    found = torch.empty(tensor.shape, dtype=dtype)
    column = 0
    for member in tensor.members:
        rows = member.shape[0]
        found[:, column : column + rows] = weights.read(member.name, 0, member.elements).view(rows, -1).T
        column += rows
    return found


# ---------------------------------------------------------------- what lies beside the weights

_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "LICENSE", "NOTICE"),
)
"""Files of a model's folder that go with it, by transformers' names; nothing else of what may lie there."""


def _config_of(model: HuggingFace) -> dict[str, Any]:
    """The config.json of the folder. CheckpointError where it is gone."""
    from scaling.models.initial import folder_of

    path = folder_of(model) / CONFIG
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict) and isinstance(found.get("model_type"), str):
            return found
    raise CheckpointError(
        f"`model.path` of the run must be a folder with the model's {CONFIG}, but {path} cannot be read as one; start "
        "from the folder that it is relative to, or put the file back"
    )


def _copy_from(model: HuggingFace, spec: Mapping[str, Any], folder: Path, dtype: str) -> tuple[str, ...]:
    """Copy what describes the model and its tokenizer; returns what a user may miss."""
    from scaling.models.initial import folder_of

    config, source = _config_of(model), folder_of(model)
    _write_json(folder / CONFIG, {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype})
    for name in _BESIDE:
        path = source / name
        if path.is_file() and path.stat().st_size <= _TOKENIZER_BYTES:
            shutil.copyfile(path, folder / name)
    notes: tuple[str, ...] = ()
    data = spec.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if isinstance(named, str) and source.resolve() not in (Path(named).resolve(), Path(named).parent.resolve()):
        notes = (f"the tokenizer is that of {model.path}; the run's data were read with {named}",)
    if "auto_map" in config:
        notes += (f"the model's own code is not copied: put the .py files of {model.path} beside the weights",)
    return notes


def _copy_tokenizer(spec: Mapping[str, Any], folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """Copy the run's tokenizer.json; returns the id of its end-of-text token, and why there is none, if so."""
    from scaling.data.tokenizer import ENDS_OF_TEXT

    data = spec.get("data")
    name = data.get("tokenizer") if isinstance(data, dict) else None
    if name == "bytes":
        return 0, ("the tokenizer is bytes: a token is a byte of UTF-8, and 0 ends a document",)
    if not isinstance(name, str):
        return None, ()
    text = _read_tokenizer(Path(name))
    if text is None:
        return None, (f"no tokenizer: {name} of the run's spec is no tokenizer.json here; put it in yourself",)
    write_synced(folder / "tokenizer.json", text)
    added = json.loads(text).get("added_tokens") or []
    ids = {token.get("content"): token.get("id") for token in added if isinstance(token, dict)}
    end = next((token for token in ENDS_OF_TEXT if isinstance(ids.get(token), int)), None)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": end} if end else {})
    _write_json(folder / "tokenizer_config.json", settings)
    return ids[end] if end else None, ()


def _read_tokenizer(path: Path) -> str | None:
    """The text of a tokenizer.json; of nothing else, since a spec may name any file, and exports are given away."""
    try:
        if not path.is_file() or path.stat().st_size > _TOKENIZER_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(document, dict) and isinstance(document.get("model"), dict) and "added_tokens" in document
    return text if ours else None


def _write_json(path: Path, value: Any) -> None:
    write_synced(path, json.dumps(value, indent=2) + "\n")


def _destination(to: Path) -> Path:
    """The folder to write to, with links resolved. StorageError unless it is empty or absent."""
    to = to.resolve()
    try:
        names = os.listdir(to)
    except FileNotFoundError:
        return to
    except OSError as error:
        raise _unwritable(to, error.strerror or str(error)) from None
    if names:
        raise StorageError(f"`--to` must be an empty or a new folder, but {to} has {sorted(names)[0]}; name another")
    return to


def _unwritable(to: Path, reason: str) -> StorageError:
    return StorageError(f"`--to` must be a folder that can be written to, but {to} is not ({reason}); name another")


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m scaling.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN_DIR_OR_CHECKPOINT", help="a run folder, or a checkpoint in one")
    parser.add_argument("--to", required=True, metavar="DIR", help="an empty or a new folder")
    parser.add_argument(
        "--which", metavar="CHECKPOINT", help="of a run folder: latest (default; the newest whole one), best, or a step"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32, as trained)")
    add_allow_import(parser)
    parser.add_argument(
        "--shard-size-mb", type=positive, default=SHARD_BYTES // 10**6, metavar="MB", help="largest file (default 5000)"
    )
    adapters = parser.add_mutually_exclusive_group()
    for name, part, told in (
        ("--merge", "merged", "weights with the adapters of `lora` merged into them (default)"),
        ("--base", "base", "weights without them"),
        ("--adapters", "adapters", "the adapters alone, in peft's layout"),
    ):
        adapters.add_argument(name, dest="part", action="store_const", const=part, default="merged", help=told)
    return parser


if __name__ == "__main__":
    run_program(main)
