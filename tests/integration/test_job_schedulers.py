"""A scheduler beside its driver: it queues and places one job's tasks, keeps others out of its queues, and ends with the driver."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import RUNTIME, Program, cpus_are_free, query, wait_for
from zray.cluster_utils import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAVY = """
import pathlib
zray.init(address={address!r}, own_scheduler=True)
def step(n):
    time.sleep(0.005)
    return n
refs = [zray.remote(step).remote(n) for n in range({tasks})]
print("submitted", zray.get(refs[0]), flush=True)
found = zray.get(refs)
assert found == list(range({tasks}))
print("all", sum(found), flush=True)
time.sleep(1000)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two nodes with a CPU each."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 1}) as found:
        for _ in range(2):
            found.add_node(num_cpus=1)
        yield found


def test_everything_works_as_beside_a_node(cluster: Cluster) -> None:
    context = cluster.connect(own_scheduler=True)
    cluster.wait_for_nodes()
    assert context["node_id"] not in {row["NodeID"] for row in zray.nodes()}, "it is no node to people"
    assert zray.cluster_resources()["CPU"] == 3
    assert query("workers") == []

    @zray.remote
    def add(a: Any, b: Any) -> Any:
        return a + b

    array = zray.put(np.arange(200_000))
    assert (zray.get(add.remote(array, add.remote(array, 1))) == 2 * np.arange(200_000) + 1).all()

    @zray.remote(num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def increase(self) -> int:
            self.count += 1
            return self.count

        def node(self) -> str:
            return zray.get_runtime_context().get_node_id()

    counter = Counter.options(name="counter", namespace="shared").remote()
    assert zray.get([counter.increase.remote() for _ in range(100)]) == list(range(1, 101))
    assert zray.get(counter.node.remote()) in {row["NodeID"] for row in zray.nodes()}
    assert zray.get(zray.get_actor("counter", namespace="shared").increase.remote()) == 101
    found = zray.get([add.remote(n, n) for n in range(3000)])
    assert found == [2 * n for n in range(3000)]
    for n in range(200):
        assert zray.get(add.remote(n, 1)) == n + 1
    with pytest.raises(TypeError):
        zray.get(add.remote(1, "a"))
    del array


def test_a_heavy_job_queues_beside_its_driver_and_keeps_nobody_waiting(
    cluster: Cluster, program: Callable[..., Program]
) -> None:
    cluster.connect()
    cluster.wait_for_nodes()
    tasks = 2000
    heavy = program(HEAVY.format(address=cluster.address, tasks=tasks), env={RUNTIME: os.environ[RUNTIME]})
    heavy.wait_line("submitted")

    @zray.remote
    def light(n: int) -> int:
        return n

    # Three CPUs are shared fairly between the two jobs: the light one is done long before the heavy one.
    assert zray.get([light.remote(n) for n in range(50)], timeout=60) == list(range(50))
    assert "all" not in heavy.out
    # What the heavy one has still to do lies with its own scheduler, not in the queue of any node.
    queued = query("statistics")["tasks_queued"]
    assert queued < tasks / 10
    assert heavy.wait_line("all", 120) == str(sum(range(tasks)))
    os.kill(heavy.pid, signal.SIGKILL)
    heavy.finish()
    wait_for(cpus_are_free, 20, "all CPUs are free")


def test_it_ends_with_its_driver(cluster: Cluster, program: Callable[..., Program]) -> None:
    cluster.connect()
    cluster.wait_for_nodes()
    sessions = set(os.listdir(os.environ[RUNTIME]))
    heavy = program(HEAVY.format(address=cluster.address, tasks=2000), env={RUNTIME: os.environ[RUNTIME]})
    heavy.wait_line("submitted")
    assert set(os.listdir(os.environ[RUNTIME])) > sessions
    os.kill(heavy.pid, signal.SIGKILL)
    heavy.finish()
    wait_for(lambda: set(os.listdir(os.environ[RUNTIME])) == sessions, 20, "its directory is gone")
    wait_for(cpus_are_free, 20, "its tasks have ended")


def test_nobody_else_connects_to_it(cluster: Cluster, program: Callable[..., Program]) -> None:
    heavy = program(HEAVY.format(address=cluster.address, tasks=1), env={RUNTIME: os.environ[RUNTIME]})
    heavy.wait_line("all")
    zray.init(address="auto")
    assert zray.get_runtime_context().get_node_id() in {row["NodeID"] for row in zray.nodes()}
    assert len([row for row in zray.nodes() if row["Alive"]]) == 3


def test_a_session_of_ones_own_has_nothing_to_share() -> None:
    with pytest.raises(ValueError, match="connect to a cluster"):
        zray.init(own_scheduler=True)
