"""What to change where nothing fits: how much is short, and the smallest changes that would do."""

from scaling.errors import UserError
from scaling.estimate.search import Candidate, Found, first_fit, largest_parts, sequences_per_rank
from scaling.hardware import Cluster
from scaling.schedule import at_length
from scaling.spec import Spec
from scaling.spec.sections import PPO
from scaling.units import GiB

MOST_GPUS = 4096
"""As far as more GPUs are looked at."""
SHORTEST = 128
"""Tokens: as far as shorter sequences are looked at."""
NODE = 8
"""GPUs of a node where a machine grows beyond the one it has: what most nodes have."""


def nothing_fits(spec: Spec, found: Found, margin: float) -> str:
    """The message for a search that found nothing: what the leanest candidate needs, and what would help."""
    assert found.candidates and found.usable_bytes is not None, "only what is known can be short"
    leanest = found.candidates[0]
    memory, usable = leanest.memory, found.usable_bytes
    short = memory.high_bytes - usable
    changes = [*_more_gpus(spec, found.cluster, margin), *_shorter(spec, found.cluster, margin)]
    advice = ["; or ".join(changes)] if changes else ["neither more of these GPUs nor shorter sequences would do"]
    away = [candidate for candidate in found.candidates if _offloads(candidate.spec)]
    if away:
        over = min(candidate.memory.high_bytes for candidate in away) - usable
        advice.append(f"offload to host memory is not enough: {over / GiB:.1f} GiB short with it")
    return (
        f"`--gpus` must be a machine on which {spec.name} fits, but on {found.cluster.name} the leanest of "
        f"{len(found.candidates)} candidates needs {memory.high_bytes / GiB:.1f} GiB of each GPU in "
        f"{memory.peak_phase}, {usable / GiB:.1f} are usable, {short / GiB:.1f} short "
        f"({largest_parts(memory.parts)}); {'; '.join(advice)}"
    )


def grown(cluster: Cluster, world_size: int) -> Cluster | None:
    """So many GPUs of the same kind: in one node up to what it has or 8, then in whole nodes; None if uneven."""
    per_node = cluster.gpus_per_node if cluster.nodes > 1 else max(cluster.gpus_per_node, NODE)
    if world_size <= per_node:
        return Cluster(1, world_size, cluster.gpu)
    nodes, rest = divmod(world_size, per_node)
    return None if rest else Cluster(nodes, per_node, cluster.gpu)


def _offloads(spec: Spec) -> bool:
    """Whether some of the state is to lie in host memory or on disk."""
    backend = spec.backend.model_dump()
    return any(backend.get(name) for name in ("cpu_offload", "offload_optimizer", "offload_parameters"))


def _more_gpus(spec: Spec, cluster: Cluster, margin: float) -> list[str]:
    """The next power of two of GPUs with which something fits; the global batch bounds how many there can be."""
    sizes = [2**power for power in range(1, MOST_GPUS.bit_length()) if 2**power > cluster.world_size]
    tried = [larger for size in sizes if (larger := grown(cluster, size)) is not None]
    tried = [larger for larger in tried if _divides(spec, larger)]
    if not tried or first_fit(spec, tried[-1], margin) is None:
        return []
    for larger in tried:
        fit = first_fit(spec, larger, margin)
        if fit is not None:
            return [f"use {larger.name} ({_told(fit)})"]
    return []


def _shorter(spec: Spec, cluster: Cluster, margin: float) -> list[str]:
    """The longest sequence, of halves of the spec's own, with which something fits."""
    lengths: list[int] = []
    length = spec.data.sequence_length
    answers = spec.objective.max_new_tokens if isinstance(spec.objective, PPO) else 0
    while length % 2 == 0 and length > SHORTEST and length >> 1 > answers:
        length >>= 1
        lengths.append(length)
    specs = {length: at_length(spec, length) for length in lengths}
    specs = {length: shorter for length, shorter in specs.items() if _divides(shorter, cluster)}
    if not specs or first_fit(specs[min(specs)], cluster, margin) is None:
        return []
    for length, shorter in specs.items():
        fit = first_fit(shorter, cluster, margin)
        if fit is not None:
            return [f"set `data.sequence_length` to {length} ({_told(fit)})"]
    return []


def _divides(spec: Spec, cluster: Cluster) -> bool:
    try:
        sequences_per_rank(spec, cluster.world_size)
    except UserError:
        return False
    return True


def _told(fit: Candidate) -> str:
    backend = fit.spec.backend.model_dump(exclude_defaults=True)
    settings = [f"{name} {value}" for name, value in backend.items() if name != "kind" and value is not None]
    return f"{fit.memory.high_bytes / GiB:.1f} GiB with {', '.join([str(backend['kind']), *settings])}"
