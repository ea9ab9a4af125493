"""What several origins have in common: batch sizes, ZeRO, ratios, names."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from scaling.errors import UserError
from scaling.spec.foreign.draft import Draft
from scaling.spec.foreign.values import wrong

PRECISIONS = {
    **{name: "bf16" for name in ("bf16", "bfloat16")},
    **{name: "fp16" for name in ("fp16", "float16", "half")},
    **{name: "fp32" for name in ("fp32", "float32", "no")},
}
"""Names of precisions as accelerate and torch have them."""


def put_batch(draft: Draft, keys: tuple[str, str, str], sizes: tuple[int | None, ...], processes: int | None) -> None:
    """Set the batch from global, micro (per process) and accumulation, sequences and passes, whose names are `keys`.

    The world size is in no spec: where the global batch is known, it and the micro-batch are kept, and the accumulation
    follows from the number of ranks.
    """
    whole, micro, accumulation = sizes
    for key, size in zip(keys, sizes, strict=True):
        if size is not None and size < 1:
            raise wrong(key, "at least 1", size)
    known = [
        (name, size) for name, size in ((keys[1], micro), (keys[2], accumulation), ("processes", processes)) if size
    ]
    unit = 1
    for _, size in known:
        unit *= size
    if whole is not None and (whole % unit or (len(known) == 3 and whole != unit)):
        rule = "" if len(known) == 3 else "a multiple of "
        product = f"{' x '.join(name for name, _ in known)} = {' x '.join(str(size) for _, size in known)} = {unit}"
        raise UserError(f"`{keys[0]}` must be {rule}{product}, but is {whole}; correct one of them")
    if whole is not None and micro is not None:
        draft.put("batch", {"global_batch_size": whole, "micro_batch_size": micro})
        if accumulation is not None:
            ranks = processes or whole // unit  # unit divides it, see above
            draft.notes.append(
                f'`{keys[2]}` ({accumulation}) becomes "auto": the file is for {ranks} ranks, and on any '
                f"other number the global batch stays {whole}"
            )
    elif whole is not None:
        draft.put("batch.global_batch_size", whole)
        draft.move("batch.gradient_accumulation_steps", accumulation)
    elif micro is not None and accumulation is not None and processes is not None:
        draft.put("batch", {"global_batch_size": unit, "micro_batch_size": micro})
    else:
        draft.move("batch.micro_batch_size", micro)
        draft.move("batch.gradient_accumulation_steps", accumulation)
        if micro is not None and accumulation is not None:
            draft.notes.append(
                f"the global batch is {micro * accumulation} x the number of processes, which the file does not say: "
                "it changes with them; `--num-processes N` fixes it"
            )


def put_zero_defaults(draft: Draft, stage: int, prefix: str = "") -> None:
    """What DeepSpeed does where its config is silent (runtime/zero/config.py), and spec.json would do otherwise."""
    keys = {name: f"{prefix}{name}" for name in ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm")}
    draft.default("backend.reduce_bucket_size", 500_000_000, keys["reduce_bucket_size"])
    if stage < 3:
        draft.default("backend.allgather_bucket_size", 500_000_000, keys["allgather_bucket_size"])
    draft.default("backend.overlap_comm", stage == 3, keys["overlap_comm"])


def put_offload(draft: Draft, stage: int, devices: tuple[str, str], paths: tuple[str, str]) -> None:
    """Set both offloads of ZeRO and their folder; `devices` and `paths` name the keys for optimizer and parameters."""
    fields = ("backend.offload_optimizer", "backend.offload_parameters")
    for key, path, place in zip(devices, paths, fields, strict=True):
        device = draft.text(key)
        if device not in (None, "none", "cpu", "nvme"):
            raise wrong(key, '"none", "cpu" or "nvme"', device)
        used = device if device != "none" else None
        if used and place == fields[1] and stage < 3:
            draft.lose(key, f"parameters are whole on each rank at ZeRO stage {stage}")
            used = None
        draft.move(place, used)
        folder = draft.text(path)
        if folder is None or folder == "none":
            continue
        if used != "nvme":
            draft.lose(path, "nothing is offloaded to nvme there")
        elif draft.values["backend"].setdefault("nvme_path", folder) != folder:
            draft.lose(path, "both offloads have one folder, `backend.nvme_path`")


def ratio(low: Any, high: Any) -> float:
    """low / high as decimals, so that 6e-5 of 6e-4 is 0.1 and not 0.09999999999999999."""
    try:
        return float(Decimal(str(low)) / Decimal(str(high)))
    except (InvalidOperation, ZeroDivisionError):
        raise UserError(
            f"the lowest learning rate must be a share of the peak, but is {json.dumps(low)} of {json.dumps(high)}; "
            "correct one of them"
        ) from None


def put_name(draft: Draft, text: str, key: str) -> None:
    """Set the run's name from a text that may hold what a folder's name should not."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip("-_.")[:100].rstrip("-.")
    if not name:
        draft.lose(key, "nothing in it can name a folder")
        return
    draft.put("name", name)
    if name != text:
        draft.notes.append(f"`{key}` becomes `name` {name}: letters, digits, - _ and . alone name a folder")


def put_clip(draft: Draft, key: str) -> None:
    """Set the clipping; 0 and null are none, as everywhere."""
    value = draft.number(key)
    if value is not None or key in draft.null:
        draft.put("max_grad_norm", value or None)


_STRATEGIES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
"""Of FSDP1, in the order of torch's ShardingStrategy, which files also number from 1."""


def put_fsdp(draft: Draft, key: str, value: Any, machines: int | None = None) -> None:
    """Set the backend from what `key` says of FSDP: whether to reshard (FSDP2), or a name or number (FSDP1)."""
    name = str(value).lower()
    name = _STRATEGIES[int(name) - 1] if name in ("1", "2", "3", "4", "5") else name
    name = {"true": "full_shard", "false": "shard_grad_op"}.get(name, name)
    if name not in _STRATEGIES:
        raise wrong(key, f"true, false or one of {', '.join(_STRATEGIES)}", value)
    if name == "no_shard":
        draft.put("backend", {"kind": "ddp"})
        draft.notes.append(f"`{key}` no_shard becomes `backend` ddp, which does the same")
        return
    draft.put("backend.kind", "fsdp")
    draft.put("backend.reshard_after_forward", name in ("full_shard", "hybrid_shard"))
    if name.startswith("hybrid") and machines is not None:
        draft.put("backend.replicate", machines)
    elif name.startswith("hybrid"):
        draft.lose(key, "hybrid sharding has a replica on each machine; set `backend.replicate` to their number")
