"""Actors on other nodes than the one that asked: placing, restarts, names, detached ones, ends of nodes."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import query, wait_for
from tests.reach import MOSTLY_AT_HEAD, ReachedCluster
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zray.cluster_utils import Cluster

THERE = {"wheels": 1}
"""What the first node, where the driver is if it is not outside, does not have."""


@pytest.fixture(params=MOSTLY_AT_HEAD)
def way(request: pytest.FixtureRequest) -> str:
    """How the driver reaches the cluster."""
    return str(request.param)


@pytest.fixture
def cluster(way: str) -> Iterator[Cluster]:
    """Three nodes; this process is connected to the first, the head, or from outside; the others have wheels."""
    with ReachedCluster(way, initialize_head=True, head_node_args={"num_cpus": 1}) as found:
        found.add_node(num_cpus=1, resources={"wheels": 10})
        found.add_node(num_cpus=1, resources={"wheels": 10})
        found.connect(namespace="here")
        found.wait_for_nodes()
        yield found


@zray.remote
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def increase(self) -> int:
        self.count += 1
        return self.count

    def where(self) -> str:
        return zray.get_runtime_context().get_node_id()

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@zray.remote(resources=THERE)
class There(Counter._cls):  # type: ignore[name-defined,misc]
    def fail(self) -> None:
        raise KeyError("in the actor")


@zray.remote(resources=THERE, num_cpus=0)
def call_there(handle: Any, times: int) -> list[int]:
    return zray.get([handle.increase.remote() for _ in range(times)])


@zray.remote(resources=THERE, num_cpus=0)
def call_by_name(name: str) -> int:
    return zray.get(zray.get_actor(name, namespace="here").increase.remote())


@zray.remote(resources=THERE, num_cpus=0)
def make_named(name: str, **options: Any) -> str:
    handle = Counter.options(name=name, namespace="here", num_cpus=0, **options).remote()
    return zray.get(handle.where.remote())


def available(name: str) -> float:
    return zray.available_resources().get(name, 0.0)


def node_of(cluster: Cluster, node_id: str) -> Any:
    return next(node for node in cluster.worker_nodes if node.node_id == node_id)


def test_an_actor_lives_where_it_fits(cluster: Cluster) -> None:
    counter = There.remote(10)
    numbers = zray.get([counter.increase.remote() for _ in range(500)], timeout=60)
    assert numbers == list(range(11, 511))
    assert zray.get(counter.where.remote()) in {node.node_id for node in cluster.worker_nodes}
    with pytest.raises(KeyError, match="in the actor"):
        zray.get(counter.fail.remote())


def test_actors_that_do_not_fit_at_home_spread_over_the_nodes(cluster: Cluster) -> None:
    counters = [Counter.options(num_cpus=1).remote() for _ in range(3)]
    places = zray.get([counter.where.remote() for counter in counters], timeout=60)
    assert len(set(places)) == 3
    del counters
    wait_for(lambda: available("CPU") == 3)


def test_what_it_occupies_is_given_back_with_its_last_handle(cluster: Cluster) -> None:
    counters = [There.options(num_cpus=0).remote() for _ in range(4)]
    zray.get([counter.increase.remote() for counter in counters], timeout=60)
    wait_for(lambda: available("wheels") == 16)
    pids = zray.get([counter.pid.remote() for counter in counters])
    del counters
    wait_for(lambda: available("wheels") == 20)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    assert query("check") == {}


def test_handles_of_it_work_on_every_node(cluster: Cluster) -> None:
    counter = There.remote()
    assert zray.get(counter.increase.remote(), timeout=60) == 1
    found = [
        number for part in zray.get([call_there.remote(counter, 20) for _ in range(4)], timeout=60) for number in part
    ]
    assert sorted(found) == list(range(2, 82))


def test_its_process_is_started_again_where_it_was(cluster: Cluster) -> None:
    counter = There.options(max_restarts=1, max_task_retries=1).remote()
    place = zray.get(counter.where.remote(), timeout=60)
    pid = zray.get(counter.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert zray.get(counter.increase.remote(), timeout=60) == 1
    assert zray.get(counter.where.remote()) == place
    counter.die.remote()
    with pytest.raises(exceptions.RayActorError):
        for _ in range(100):
            zray.get(counter.increase.remote(), timeout=60)
    with pytest.raises(exceptions.ActorDiedError, match="SIGKILL"):
        zray.get(counter.increase.remote(), timeout=60)
    wait_for(lambda: available("wheels") == 20)


def test_when_its_node_is_lost_it_comes_back_on_another(cluster: Cluster) -> None:
    counter = There.options(max_restarts=1, max_task_retries=-1).remote()
    place = zray.get(counter.where.remote(), timeout=60)
    assert zray.get(counter.increase.remote()) == 1
    cluster.remove_node(node_of(cluster, place), allow_graceful=False)
    assert zray.get([counter.increase.remote() for _ in range(20)], timeout=60) == list(range(1, 21))
    assert zray.get(counter.where.remote()) != place
    assert query("check") == {}


def test_without_restarts_it_dies_with_its_node(cluster: Cluster) -> None:
    counter = There.remote()
    place = zray.get(counter.where.remote(), timeout=60)
    cluster.remove_node(node_of(cluster, place), allow_graceful=False)
    with pytest.raises(exceptions.ActorDiedError, match="node"):
        zray.get(counter.increase.remote(), timeout=60)


def test_one_that_fits_nowhere_yet_waits_for_a_node(cluster: Cluster) -> None:
    counter = Counter.options(resources={"wings": 1}).remote()
    with pytest.raises(exceptions.GetTimeoutError):
        zray.get(counter.increase.remote(), timeout=0.3)
    cluster.add_node(num_cpus=1, resources={"wings": 1})
    assert zray.get(counter.increase.remote(), timeout=60) == 2


def test_kill_from_anywhere(cluster: Cluster) -> None:
    counter = There.remote()
    pid = zray.get(counter.pid.remote(), timeout=60)
    zray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=60)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    wait_for(lambda: available("wheels") == 20)


def test_a_name_holds_in_the_whole_cluster(cluster: Cluster) -> None:
    counter = Counter.options(name="one", num_cpus=0).remote()
    assert zray.get(counter.increase.remote(), timeout=60) == 1
    assert zray.get(call_by_name.remote("one"), timeout=60) == 2
    with pytest.raises(ValueError, match="is taken"):
        zray.get(make_named.remote("one"), timeout=60)
    assert zray.get(make_named.remote("one", get_if_exists=True), timeout=60) == zray.get(counter.where.remote())
    assert zray.get(counter.increase.remote()) == 3
    del counter
    wait_for(lambda: is_free("one"))


def is_free(name: str) -> bool:
    try:
        zray.get_actor(name, namespace="here")
    except ValueError:
        return True
    return False


def test_a_detached_actor_of_another_node_outlives_that_node(cluster: Cluster) -> None:
    place = zray.get(make_named.remote("lasting", lifetime="detached", max_restarts=-1), timeout=60)
    counter = zray.get_actor("lasting", namespace="here")
    assert zray.get(counter.increase.remote(), timeout=60) == 1
    assert zray.get(call_by_name.remote("lasting"), timeout=60) == 2
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    survivor = zray.get_actor("lasting", namespace="here")
    count = zray.get(survivor.increase.remote(), timeout=60)
    assert count == (3 if place == cluster.head_node.node_id else 1)
    zray.kill(survivor)
    wait_for(lambda: is_free("lasting"))


def test_the_name_of_an_actor_goes_with_the_node_that_owned_it(cluster: Cluster) -> None:
    zray.get(keep_named.remote("passing"), timeout=60)
    counter = zray.get_actor("passing", namespace="here")
    owner = node_of(cluster, zray.get(counter.where.remote(), timeout=60))
    cluster.remove_node(owner, allow_graceful=False)
    wait_for(lambda: is_free("passing"))
    with pytest.raises(exceptions.RayActorError):
        zray.get(counter.increase.remote(), timeout=60)


_kept: list[Any] = []


@zray.remote(resources=THERE, num_cpus=0)
def keep_named(name: str) -> None:
    handle = Counter.options(name=name, namespace="here", num_cpus=0).remote()
    zray.get(handle.increase.remote())
    _kept.append(handle)
