"""The model of collectives: its sums by hand, its directions, what is hidden."""

from __future__ import annotations

import pytest

from sd_kernels.targets import GPUS
from sd_perf.tools.estimate.communication import (
    BUCKETS,
    Cluster,
    all_reduce_seconds,
    ddp,
    node_sharded,
    ring_seconds,
    torch_ddp,
    zero1,
)

H100 = GPUS["h100"]
ONE, NODE = Cluster(H100, 1, 1), Cluster(H100, 1, 8)
PARAMETERS = 865_910_724


def test_a_ring_in_a_node_by_hand() -> None:
    size = 2.0 * PARAMETERS
    sent = size * 7 / 8
    simple = 8.4e-6 + 7 * 3.4e-6 + sent / (18 * 20.6e9)
    assert ring_seconds(size, NODE) == pytest.approx(simple)
    # Small messages take the protocol of lower latency.
    assert ring_seconds(8.0, NODE) == pytest.approx(14e-6 + 7 * 1.9e-6, rel=1e-3)


def test_a_ring_over_nodes_by_hand() -> None:
    four = Cluster(H100, 4, 8)
    assert four.ranks == 32 and four.bus == 18 * 20.6e9  # eight ports have 400 GB/s
    few_ports = Cluster(H100, 4, 2)
    assert few_ports.bus == 2 * 50e9
    size = 1e9
    simple = 8.4e-6 + 28 * 3.4e-6 + 3 * 14e-6 + size * 31 / 32 / four.bus
    assert ring_seconds(size, four) == pytest.approx(simple)


def test_a_tree_is_for_many_nodes() -> None:
    size = 2.0 * PARAMETERS
    assert all_reduce_seconds(size, NODE) == pytest.approx(2 * ring_seconds(size, NODE))
    many = Cluster(H100, 128, 8)
    bucket = size / BUCKETS
    assert all_reduce_seconds(bucket, many) < ring_seconds(bucket, many)


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
def test_more_nodes_take_longer(nodes: int) -> None:
    fewer, more = Cluster(H100, nodes, 8), Cluster(H100, 2 * nodes, 8)
    for seconds in (ring_seconds, all_reduce_seconds):
        assert 0 < seconds(1e9, fewer) < seconds(1e9, more)


def test_one_gpu_waits_for_nobody() -> None:
    for communication in (
        zero1(PARAMETERS, ONE, 0, 0),
        ddp(PARAMETERS, ONE, 0),
        node_sharded(PARAMETERS, ONE, 0),
        torch_ddp(PARAMETERS, ONE, 0),
    ):
        assert communication.total == communication.exposed == 0


def test_computing_hides_all_but_the_ends() -> None:
    bucket = ring_seconds(2.0 * PARAMETERS / BUCKETS, NODE)
    long, nothing = zero1(PARAMETERS, NODE, 1, 1), zero1(PARAMETERS, NODE, 0, 0)
    assert nothing.exposed == pytest.approx(nothing.total) == pytest.approx(2 * BUCKETS * bucket)
    assert long.total == nothing.total and long.exposed == pytest.approx(2 * bucket)
    # Beside a forward pass of two buckets' time, three more are waited for.
    some = zero1(PARAMETERS, NODE, forward=2 * bucket, backward=1)
    assert some.exposed == pytest.approx(5 * bucket)
    summed = ddp(PARAMETERS, NODE, backward=1)
    assert summed.exposed == pytest.approx(summed.total / BUCKETS)


def test_a_node_sharded_optimizer_gathers_in_the_open() -> None:
    eight = Cluster(H100, 8, 8)
    inside = ring_seconds(2.0 * PARAMETERS, NODE)
    across = all_reduce_seconds(2.0 * PARAMETERS / 8, Cluster(H100, 8, 1))
    assert Cluster(H100, 8, 1).bus == 50e9
    hidden = node_sharded(PARAMETERS, eight, backward=1)
    assert hidden.total == pytest.approx(2 * inside + across)
    assert hidden.exposed == pytest.approx(inside + (inside + across) / BUCKETS)
