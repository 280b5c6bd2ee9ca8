"""Heads that pause, die and come back: what nodes, drivers and tables make of it. Real brokers on the loopback address."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import alive, stop, wait_for
from zray.cluster_utils import Cluster, ClusterNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster; nobody is connected."""
    clusters: list[Cluster] = []

    def make(others: int = 1, **settings: Any) -> Cluster:
        cluster = Cluster(initialize_head=True, **settings)
        clusters.append(cluster)
        for _ in range(others):
            cluster.add_node()
        return cluster

    yield make
    for cluster in clusters:
        cluster.shutdown()


def head_of(cluster: Cluster) -> ClusterNode:
    assert cluster.head_node is not None
    return cluster.head_node


def state_of(node: ClusterNode) -> str:
    return next((str(row["state"]) for row in zray.nodes() if row["NodeID"] == node.node_id), "")


@zray.remote
def double(x: int) -> int:
    return 2 * x


def test_a_stopped_head_is_lost_and_goes_on_where_it_was(start: Callable[..., Cluster]) -> None:
    cluster = start(node_timeout=1.0, head_grace=30.0)
    head, [node] = head_of(cluster), cluster.worker_nodes
    zray.init(address=node.address)
    zray.kv.put("colour", b"green")
    stop(head.pid)
    wait_for(lambda: state_of(head) == "SILENT", what="the head is lost")
    assert zray.get(double.remote(4)) == 8, "local tasks do not need it"
    os.kill(head.pid, signal.SIGCONT)
    wait_for(lambda: state_of(head) == "ALIVE", what="the head is back")
    assert zray.kv.get("colour") == b"green"
    assert [row["state"] for row in zray.nodes()] == ["ALIVE"] * 2
    assert alive(node.pid)


def test_a_node_whose_head_never_returns_ends_in_time(start: Callable[..., Cluster]) -> None:
    cluster = start(node_timeout=1.0, head_grace=1.5)
    [node] = cluster.worker_nodes
    zray.init(address=node.address)
    waiting = zray.remote(time.sleep).remote(60)
    head_of(cluster).kill()
    with pytest.raises(zray.exceptions.ZraySystemError):
        zray.get(waiting, timeout=20)
    wait_for(lambda: not alive(node.pid), 5.0, "the node has ended")
    zray.shutdown()
