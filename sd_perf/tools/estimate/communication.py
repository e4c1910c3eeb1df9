"""Seconds of a step's collectives on several GPUs, by NCCL's own model of its rings and trees.

A collective takes the latency of its hops, and its bytes over the bandwidth of the slowest link:
NVLink inside a node, the network ports of all its GPUs together between nodes. NCCL tries the
protocols Simple and LL128 and takes the faster; so does this. Source of the model and of its
latencies: NCCL 2.27, src/graph/tuning.cc (ncclTopoTuneModel). Nothing is fitted to training runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sd_kernels.targets import GPU

BUCKETS = 6
"""parts of the flat gradient and weight buffers, each with collectives of its own"""


class _Protocol(NamedTuple):
    """Microseconds of a collective's start and of a hop, and the share of bytes that are data."""

    start: float
    nvlink_ring: float
    network_ring: float
    nvlink_tree: float
    network_tree: float
    payload: float


_PROTOCOLS = (
    _Protocol(8.4, nvlink_ring=3.4, network_ring=14, nvlink_tree=4, network_tree=14, payload=1),
    # LL128 sends 8 bytes of flags with each 120 bytes.
    _Protocol(
        14, nvlink_ring=1.9, network_ring=4, nvlink_tree=1.25, network_tree=8.5, payload=0.92
    ),
)


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of one kind of GPU."""

    gpu: GPU
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def bus(self) -> float:
        """Bytes per second over the slowest link of a ring through all GPUs.

        A node has a port for each GPU, and NCCL leads as many rings through it.
        """
        network = self.gpu.network.value * self.gpus_per_node
        nvlink = self.gpu.nvlink.value if self.gpus_per_node > 1 else math.inf
        return nvlink if self.nodes == 1 else min(nvlink, network)

    def node(self) -> Cluster:
        """One node of these."""
        return Cluster(self.gpu, nodes=1, gpus_per_node=self.gpus_per_node)

    def across(self) -> Cluster:
        """One GPU of each node: as many such groups share the network as a node has GPUs."""
        return Cluster(self.gpu, nodes=self.nodes, gpus_per_node=1)


def ring_seconds(size: float, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter, or of an all-gather, of `size` bytes over all ranks."""
    hops = cluster.ranks - 1
    if not hops:
        return 0.0
    # A ring enters and leaves every node once, so all other hops are inside nodes.
    between = cluster.nodes - 1
    sent = size * hops / cluster.ranks
    return min(
        1e-6
        * (
            protocol.start
            + (hops - between) * protocol.nvlink_ring
            + between * protocol.network_ring
        )
        + sent / (cluster.bus * protocol.payload)
        for protocol in _PROTOCOLS
    )


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """Seconds of an all-reduce of `size` bytes: a ring twice, or a tree up and down."""
    if cluster.ranks == 1:
        return 0.0
    # A tree over the nodes; the GPUs of a node are a chain on each of its branches.
    depth = math.log2(cluster.nodes)
    tree = min(
        1e-6
        * (
            protocol.start
            + 2 * (cluster.gpus_per_node - 1) * protocol.nvlink_tree
            + 2 * depth * protocol.network_tree
        )
        # Every byte goes up and comes down; NCCL counts a tree's links at 0.92 of a ring's.
        + 2 * size / (cluster.bus * 0.92 * protocol.payload)
        for protocol in _PROTOCOLS
    )
    return min(tree, 2 * ring_seconds(size, cluster))


@dataclass(frozen=True)
class Communication:
    """Seconds of a step's collectives, all and those that computing cannot hide."""

    total: float
    exposed: float


def zero1(parameters: int, cluster: Cluster, forward: float, backward: float) -> Communication:
    """training.strategy zero1: 16-bit gradients reduced and scattered, 16-bit weights gathered.

    A bucket is reduced as soon as backward has completed it, and gathered before forward first
    needs it. So at least the last bucket's reduction and the first one's gathering are waited for,
    and whatever takes longer than the computing beside it.
    """
    bucket = ring_seconds(2.0 * parameters / BUCKETS, cluster)
    rest = (BUCKETS - 1) * bucket
    exposed = 2 * bucket + max(rest - backward, 0.0) + max(rest - forward, 0.0)
    return Communication(total=2 * BUCKETS * bucket, exposed=exposed)


def ddp(parameters: int, cluster: Cluster, backward: float) -> Communication:
    """training.strategy ddp: 16-bit gradients are summed on all ranks, bucket by bucket."""
    bucket = all_reduce_seconds(2.0 * parameters / BUCKETS, cluster)
    rest = (BUCKETS - 1) * bucket
    return Communication(total=rest + bucket, exposed=bucket + max(rest - backward, 0.0))


def node_sharded(parameters: int, cluster: Cluster, backward: float) -> Communication:
    """The submissions' distributed optimizer, whose state is divided inside each node.

    16-bit gradients are reduced and scattered in the node, each share is reduced over the nodes,
    and backward hides both; 16-bit weights are gathered in the node while nothing else runs.
    """
    size = 2.0 * parameters
    # A reduce-scatter takes as long as the all-gather.
    gather = ring_seconds(size, cluster.node())
    reduce = gather + all_reduce_seconds(size / cluster.gpus_per_node, cluster.across())
    hidden = min((BUCKETS - 1) / BUCKETS * reduce, backward)
    return Communication(total=reduce + gather, exposed=reduce - hidden + gather)


def torch_ddp(parameters: int, cluster: Cluster, backward: float) -> Communication:
    """torch's DistributedDataParallel: float32 gradients, all but the last bucket beside backward.

    Its buckets are of 25 MB (`bucket_cap_mb`).
    """
    size = 4.0 * parameters
    buckets = math.ceil(size / 25e6)
    bucket = all_reduce_seconds(size / buckets, cluster)
    rest = (buckets - 1) * bucket
    return Communication(total=rest + bucket, exposed=bucket + max(rest - backward, 0.0))
