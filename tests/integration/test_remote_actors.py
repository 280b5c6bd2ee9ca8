"""Calls to actors that live on other nodes: order, arguments, errors, kills, deaths, and ends of handles."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, Tally, query, wait_for
from tests.reach import MOSTLY_AT_HEAD, ReachedCluster
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zray.cluster_utils import Cluster

THERE = {"wheels": 1}
"""What only the second node has."""


@pytest.fixture(params=MOSTLY_AT_HEAD)
def way(request: pytest.FixtureRequest) -> str:
    """How the driver reaches the cluster."""
    return str(request.param)


@pytest.fixture
def cluster(way: str) -> Iterator[Cluster]:
    """Two nodes with two CPUs each; this process is connected to the first, the head, or from outside."""
    with ReachedCluster(way, initialize_head=True, head_node_args={"num_cpus": 2}) as found:
        found.add_node(num_cpus=2, resources={"wheels": 10})
        found.connect()
        found.wait_for_nodes()
        yield found


class Counter:
    def __init__(self) -> None:
        self.count = 0
        self.seen: list[Any] = []

    def increase(self) -> int:
        self.count += 1
        return self.count

    def keep(self, value: Any) -> int:
        self.seen.append(value)
        return len(self.seen)

    def read(self) -> Any:
        return self.seen[-1]

    def total(self, array: Any) -> float:
        return float(array.sum())

    def fail(self) -> None:
        raise KeyError("in the actor")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def node(self) -> str:
        return zray.get_runtime_context().get_node_id()


@zray.remote(resources=THERE)
def make_there(**options: Any) -> Any:
    """Make an actor on the second node."""
    handle = zray.remote(Counter).options(num_cpus=0, **options).remote()
    zray.get(handle.increase.remote())
    return handle


def actor_states() -> list[str]:
    return [row["state"] for row in query("actors")]


def test_calls_of_two_nodes_keep_each_callers_order(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    assert zray.get(counter.node.remote(), timeout=30) == cluster.worker_nodes[0].node_id
    assert zray.get([counter.increase.remote() for _ in range(1000)], timeout=60) == list(range(2, 1002))

    @zray.remote(resources=THERE)
    def use(box: list[Any]) -> list[int]:
        return zray.get([box[0].increase.remote() for _ in range(100)])

    ref = use.remote([counter])
    here = zray.get([counter.increase.remote() for _ in range(100)], timeout=30)
    there = zray.get(ref, timeout=30)
    assert here == sorted(here)
    assert there == sorted(there)
    assert sorted(here + there) == list(range(1002, 1202))


def test_an_actor_here_is_called_from_there(cluster: Cluster) -> None:
    counter = zray.remote(Counter).options(num_cpus=0).remote()

    @zray.remote(resources=THERE)
    def use(box: list[Any], n: int) -> list[int]:
        return zray.get([box[0].increase.remote() for _ in range(n)])

    # The first calls come before the actor lives.
    assert zray.get(use.remote([counter], 50), timeout=30) == list(range(1, 51))
    assert zray.get(counter.increase.remote()) == 51


def test_arguments_results_and_errors(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    array = np.arange(500_000, dtype=np.float64)
    assert zray.get(counter.total.remote(array), timeout=30) == array.sum()
    assert zray.get(counter.total.remote(zray.put(array)), timeout=30) == array.sum()
    zray.get(counter.keep.remote(array), timeout=30)
    assert (zray.get(counter.read.remote(), timeout=30) == array).all()
    inner = zray.put("inner")
    zray.get(counter.keep.remote([inner]), timeout=30)
    del inner
    [back] = zray.get(counter.read.remote(), timeout=30)
    assert zray.get(back, timeout=30) == "inner"
    with pytest.raises(KeyError, match="in the actor"):
        zray.get(counter.fail.remote(), timeout=30)
    one, two = counter.keep.options(num_returns=1).remote(1), counter.keep.remote(2)
    assert zray.get([one, two], timeout=30) == [3, 4]


def test_a_handle_that_is_passed_on(cluster: Cluster) -> None:
    """From the second node to the first to a third: each sends calls back the way the handle came."""
    cluster.add_node(num_cpus=2, resources={"wings": 1})
    cluster.wait_for_nodes()
    counter = zray.get(make_there.remote(), timeout=30)

    @zray.remote(resources={"wings": 1})
    def use(box: list[Any]) -> list[int]:
        return zray.get([box[0].increase.remote() for _ in range(100)])

    assert zray.get(use.remote([counter]), timeout=30) == list(range(2, 102))


def test_asynchronous_actors(cluster: Cluster) -> None:
    class Room:
        async def double(self, value: int) -> int:
            await asyncio.sleep(0)
            return 2 * value

    room = zray.remote(Room).options(num_cpus=0).remote()

    @zray.remote(resources=THERE)
    def use(box: list[Any]) -> list[int]:
        return zray.get([box[0].double.remote(i) for i in range(100)])

    assert zray.get(use.remote([room]), timeout=30) == [2 * i for i in range(100)]


def test_an_actor_that_dies_says_so_to_callers_elsewhere(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    with pytest.raises(exceptions.ActorDiedError, match="SIGKILL"):
        zray.get(counter.die.remote(), timeout=30)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=30)


def test_an_actor_that_comes_back(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(max_restarts=1, max_task_retries=1), timeout=30)
    died = counter.die.remote()
    after = [counter.increase.remote() for _ in range(5)]
    with pytest.raises(exceptions.ActorError):
        zray.get(died, timeout=30)
    with pytest.raises(exceptions.ActorError):  # the second death, by the retried call, was the last
        zray.get(after, timeout=30)


def test_killing_from_elsewhere(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    zray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=30)


def test_the_death_of_the_actors_node(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    cluster.worker_nodes[0].kill()
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=30)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=30)


def test_an_actor_ends_with_its_last_handle_wherever_that_is(cluster: Cluster) -> None:
    counter = zray.get(make_there.remote(), timeout=30)
    zray.get(counter.increase.remote(), timeout=30)
    address = cluster.worker_nodes[0].address
    boxed = zray.put([counter])
    del counter
    [again] = zray.get(boxed)
    assert zray.get(again.increase.remote(), timeout=30) == 3
    del again, boxed
    wait_for(lambda: not query("statistics")["objects_borrowed"], 5, "the handle has gone back")
    zray.shutdown()
    zray.init(address=address)
    wait_for(lambda: actor_states() == ["DEAD"], 10, f"the actor has ended: {actor_states()}")


@zray.remote(num_cpus=1, resources=THERE)
def call_until(gate: Gate, tally: Tally, actor: Any) -> int:
    """Call an actor again and again from its own node."""
    calls = 0
    while not gate.is_open:
        zray.get(actor.node.remote())
        calls += 1
        if calls == 50:
            tally.add()
    return calls


def test_a_threaded_actor_that_is_busy_with_calls_of_its_node_answers_others(
    cluster: Cluster, gate: Callable[[str], Gate], tally: Tally
) -> None:
    over = gate("over")
    actor = zray.remote(Counter).options(num_cpus=0, resources=THERE, max_concurrency=2).remote()
    busy = call_until.remote(over, tally, actor)
    wait_for(lambda: len(tally) == 1)
    try:
        for number in range(20):
            assert zray.get(actor.increase.remote(), timeout=30) == number + 1
    finally:
        over.open()
    assert zray.get(busy, timeout=30) >= 50
