"""What is measured, as data: specs x backends x options x numbers of GPUs, in matrix.json or a file like it.

A file has the lists "gpu" and "cpu"; which of them is taken, the machine decides. An entry:

    {"spec": "gpt2-124m",                    a recipe's name or a path
     "backends": ["ddp", "zero2"],           names of scaling.parity.BACKENDS
     "set": ["a.b.c=VALUE", …],              changes to the spec, as --set takes them
     "options": {"weak": ["…"], …},          further changes by name; each is measured
     "launcher": "torchrun"}                 or "deepspeed", or "python" for one rank

"weak" is what a batch is called that grows with the number of ranks, "strong" one that stays.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.parity import BACKENDS

MATRIX = Path(__file__).parent / "matrix.json"
LAUNCHERS = ("torchrun", "deepspeed", "python")
KEYS = {"spec", "backends", "set", "options", "launcher"}
LEAST_RANKS = {"hsdp": 4, "zero3-hpz": 4}
"""Of backends that cut the ranks in two."""


@dataclass(frozen=True)
class Cell:
    """One row of the result: a spec under a backend on a number of ranks."""

    spec: str
    backend: str
    option: str
    ranks: int
    settings: tuple[str, ...]
    """As --set takes them."""
    launcher: str = "torchrun"

    @property
    def name(self) -> str:
        """What the row is called; files are compared by it."""
        return " ".join(
            filter(None, (Path(self.spec).name.removesuffix(".json"), self.backend, f"x{self.ranks}", self.option))
        )


def load_matrix(path: Path = MATRIX) -> dict[str, list[dict[str, Any]]]:
    """The file, checked. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"`--matrix` must be a JSON file, but {path} cannot be read as one ({error}); correct it"
        ) from None
    if not isinstance(found, dict) or set(found) - {"gpu", "cpu"}:
        raise UserError(f'`--matrix` must hold {{"gpu": […], "cpu": […]}}, but {path} does not; correct it')
    for kind, entries in found.items():
        for place, entry in enumerate(entries):
            if problem := _problem(entry):
                raise UserError(f"`{kind}[{place}]` of {path} {problem}")
    return found


def _problem(entry: Any) -> str | None:
    """What is wrong with an entry, if anything."""
    if not isinstance(entry, dict) or not {"spec", "backends"} <= set(entry) <= KEYS:
        return f"must have spec and backends, and no keys but {', '.join(sorted(KEYS))}; correct it"
    for name in entry["backends"]:
        if name not in BACKENDS:
            return f"must name backends of {', '.join(BACKENDS)}, but names {name!r}; correct it"
    if (launcher := entry.get("launcher", LAUNCHERS[0])) not in LAUNCHERS:
        return f"must have a launcher of {', '.join(LAUNCHERS)}, but has {launcher!r}; correct it"
    return None


def cells(entries: Sequence[dict[str, Any]], counts: Sequence[int], only: str = "") -> Iterator[Cell]:
    """All rows of `entries` at each of `counts` whose name has `only` in it; not those that no backend can be."""
    for entry in entries:
        launcher = entry.get("launcher", LAUNCHERS[0])
        for option, more in (entry.get("options") or {"": []}).items():
            for backend in entry["backends"]:
                alone = backend == "single" or launcher == "python"
                for ranks in counts:
                    if (alone and ranks > 1) or ranks < LEAST_RANKS.get(backend, 1):
                        continue
                    settings = (*entry.get("set", []), *more, f"backend={json.dumps(BACKENDS[backend])}")
                    cell = Cell(entry["spec"], backend, option, ranks, settings, launcher)
                    if only in cell.name:
                        yield cell
