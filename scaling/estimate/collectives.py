"""Seconds of collectives among equal nodes: rings limited by their slowest link, and a latency for each hop.

A ring over n ranks sends (n - 1)/n of the whole message over each of its links, twice for an all-reduce. NCCL runs as
many rings as a node has network cards, each leaving the node by its own, so that all ranks of a node in the group
share the sum of their network bandwidths. Bandwidths that `GPU.measured` has are taken as they are, those of the table
through the factors here. Latencies are those with which NCCL itself chooses its algorithms.
"""

import math
from dataclasses import dataclass

from scaling.estimate.caching import cached
from scaling.estimate.rates import known
from scaling.hardware import GPU, Cluster

LINK_EFFICIENCY = 0.81
"""Bus bandwidth of a ring within a node over the link's: nccl-tests, all-reduce of 8 GiB on 8 H200, 365.6 of 450 GB/s
(github.com/stas00/ml-engineering, network; B200: 0.76)."""
SWITCH_EFFICIENCY = 473.1 / 450
"""The same where the switch adds up (NVLS), of an all-reduce alone; same source."""
SWITCH_LINK_BYTES_PER_S = 450e9
"""Links from which on the switch can add up: NVLink 4 and 5."""
SWITCH_RANKS = 4
"""NVLS pays off for more ranks than this; same source."""
NETWORK_EFFICIENCY = 0.75
"""Bus bandwidth over the network cards' together. Engineering judgement: a ring alone reaches 0.92 to 0.96
(NVIDIA/nccl-tests#290), an all-gather over 32 nodes that others share 0.5 (NVIDIA/nccl#1218)."""
TREE_EFFICIENCY = 0.64
"""Bandwidth of an all-reduce by trees, which have fewer hops, over that of rings: 0.92 times treeCorrectionFactor in
NCCL, src/graph/tuning.cc, which is 0.7 at 32 MiB and 0.5 to 0.9 at other sizes."""
BASE_SECONDS, LINK_SECONDS, NETWORK_SECONDS = 8.4e-6, 3.4e-6, 14e-6
"""Of a collective, and of each of its hops within and between nodes: NCCL, src/graph/tuning.cc, baseLat and hwLat of
rings with the simple protocol, which large messages use."""


@dataclass(frozen=True)
class Ring:
    """Ranks that communicate."""

    ranks: int
    nodes: int
    bandwidth: float
    """Bytes/s on each link, in one direction; infinite for a rank by itself."""
    switch_bandwidth: float
    """The same for an all-reduce."""

    def gather(self, size: float, calls: int = 1) -> float:
        """All-gather to `size` bytes on each rank, or reduce-scatter from `size`, in `calls` equal messages."""
        if self.ranks == 1:
            return 0.0
        hops = (self.ranks - self.nodes) * LINK_SECONDS + (self.nodes - 1) * NETWORK_SECONDS
        return (self.ranks - 1) / self.ranks * size / self.bandwidth + calls * (BASE_SECONDS + hops)

    def all_reduce(self, size: float, calls: int = 1) -> float:
        """All-reduce of `size` bytes, in `calls` equal messages; by ring or by tree, whichever is faster."""
        if self.ranks == 1:
            return 0.0
        hops = 2 * ((self.ranks - self.nodes) * LINK_SECONDS + (self.nodes - 1) * NETWORK_SECONDS)
        deep = 2 * ((self.ranks / self.nodes - 1) * LINK_SECONDS + math.log2(self.nodes) * NETWORK_SECONDS)
        moved = 2 * (self.ranks - 1) / self.ranks * size / self.switch_bandwidth
        return min(moved + calls * (BASE_SECONDS + hops), moved / TREE_EFFICIENCY + calls * (BASE_SECONDS + deep))


@cached
def ring(cluster: Cluster, ranks: int, stride: int = 1) -> Ring:
    """Ranks r, r + stride, r + 2 stride, ... of a job whose ranks fill one node after the other.

    Raises UserError where the bandwidth of a link that they need is not known.
    """
    if ranks == 1:
        return Ring(1, 1, math.inf, math.inf)
    local, nodes = _places(cluster, ranks, stride)
    within = _gather_rate(cluster.gpu, ranks) if local > 1 else math.inf
    if nodes == 1:
        return Ring(ranks, 1, within, _reduce_rate(cluster.gpu, ranks))
    bandwidth = min(within, local * _network_rate(cluster.gpu, nodes))
    return Ring(ranks, nodes, bandwidth, bandwidth)


def _places(cluster: Cluster, ranks: int, stride: int) -> tuple[int, int]:
    """Ranks of the group on a node, and nodes that it is on. A group that fits a node but not evenly is somewhere cut
    in two, and all wait for that one."""
    span = ranks * stride
    if span <= cluster.gpus_per_node:
        cut = cluster.nodes > 1 and cluster.gpus_per_node % span > 0
        return (-(-ranks // 2), 2) if cut else (ranks, 1)
    local = max(1, cluster.gpus_per_node // stride)
    return local, -(-ranks // local)


def _gather_rate(gpu: GPU, ranks: int) -> float:
    """Bus bandwidth of an all-gather within a node."""
    return gpu.measured.all_gather_bytes_per_s or LINK_EFFICIENCY * _link(gpu, ranks)


def _reduce_rate(gpu: GPU, ranks: int) -> float:
    """The same of an all-reduce."""
    return gpu.measured.all_reduce_bytes_per_s or _switch(_link(gpu, ranks), ranks)


def _network_rate(gpu: GPU, nodes: int) -> float:
    """Bus bandwidth between nodes for each GPU of a node."""
    if measured := gpu.measured.network_bytes_per_s:
        return measured
    return NETWORK_EFFICIENCY * known(gpu.network_bytes_per_s, gpu, "network_bytes_per_s", f"for {nodes} nodes")


def _link(gpu: GPU, ranks: int) -> float:
    return known(gpu.link_bytes_per_s, gpu, "link_bytes_per_s", f"for {ranks} ranks")


def _switch(link: float, ranks: int) -> float:
    """Bus bandwidth of an all-reduce within a node."""
    adds = link >= SWITCH_LINK_BYTES_PER_S and ranks > SWITCH_RANKS
    return link * (SWITCH_EFFICIENCY if adds else LINK_EFFICIENCY)
