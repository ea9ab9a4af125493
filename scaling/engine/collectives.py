"""Which collective this rank is in, from torch's flight recorder. For the watchdog, when the run stands still.

The recorder's functions are private to torch: where they are missing, or say something else, nothing is known.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

_ENTRIES = "1000"


def record_collectives() -> None:
    """Have torch keep the last collectives in memory; before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)


def current_collective() -> dict[str, Any]:
    """`waiting`: the first collective entered and not left, as the fields of `scaling.watch.blame.Waiting`, or None;
    `joined`: group -> number of the last collective entered.
    """
    members = _members()
    joined: dict[str, int] = {}
    waiting: dict[str, Any] | None = None
    for recorded in _recorded():
        for entry in recorded.get("entries", ()):
            group = entry["process_group"][0]
            joined[group] = max(joined.get(group, 0), entry["collective_seq_id"])
            if not entry["retired"] and entry["state"] != "completed" and not entry["is_p2p"] and waiting is None:
                waiting = {
                    "operation": entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
                    "group": group,
                    "sequence": entry["collective_seq_id"],
                    "sizes": ", ".join(map(str, entry["input_sizes"])) + " " + ", ".join(entry["input_dtypes"]),
                    "members": members.get(group),
                }
    return {"waiting": waiting, "joined": joined}


def _recorded() -> Iterator[dict[str, Any]]:
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo, NCCL
        if dump := getattr(c10d, name, None):
            yield json.loads(dump())


def _members() -> dict[str, list[int]]:
    """Name of each group -> its ranks."""
    groups = dist.distributed_c10d._world.pg_group_ranks  # pyright: ignore[reportPrivateImportUsage]
    return {group.group_name: sorted(ranks) for group, ranks in groups.items()}
