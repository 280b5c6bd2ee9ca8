"""Where tasks and actors run when they say so: spread, node affinity, labels; and a task that goes to where its file lies."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, wait_for
from zray import exceptions
from zray.cluster_utils import Cluster
from zray.util.scheduling_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@zray.remote
def where() -> str:
    return zray.get_runtime_context().get_node_id()


@zray.remote
class Dweller:
    def where(self) -> str:
        return zray.get_runtime_context().get_node_id()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two nodes in zones east and west, one CPU each."""
    with Cluster(initialize_head=True, connect=True, head_node_args={"labels": {"zone": "centre"}}) as found:
        found.add_node(labels={"zone": "east", "disk": "fast"}, resources={"archive": 1})
        found.add_node(labels={"zone": "west"})
        found.wait_for_nodes()
        yield found


def ids_of(cluster: Cluster) -> list[str]:
    return [node.node_id for node in cluster.list_all_nodes()]


def test_spread_takes_one_node_after_the_other(cluster: Cluster) -> None:
    spread = where.options(scheduling_strategy="SPREAD")
    zray.get([spread.remote() for _ in range(6)], timeout=30)  # workers are up everywhere
    places = [zray.get(spread.remote(), timeout=30) for _ in range(9)]
    assert Counter(places) == dict.fromkeys(ids_of(cluster), 3)
    wait_for(lambda: zray.available_resources()["CPU"] == 3, what="all is free")
    assert zray.get(where.remote(), timeout=30) == ids_of(cluster)[0], "others stay at home"
    many = Counter(zray.get([spread.remote() for _ in range(300)], timeout=30))
    assert set(many) == set(ids_of(cluster))


def test_a_node_is_named(cluster: Cluster) -> None:
    for node in ids_of(cluster):
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        assert set(zray.get([where.options(scheduling_strategy=there).remote() for _ in range(20)], timeout=30)) == {
            node
        }
        dweller = Dweller.options(scheduling_strategy=there).remote()
        assert zray.get(dweller.where.remote(), timeout=30) == node


def test_a_node_that_is_not_there(cluster: Cluster) -> None:
    nowhere = "ab" * 16
    hard = NodeAffinitySchedulingStrategy(nowhere, soft=False)
    with pytest.raises(exceptions.TaskUnschedulableError, match=nowhere):
        zray.get(where.options(scheduling_strategy=hard).remote(), timeout=30)
    with pytest.raises(
        exceptions.TaskUnschedulableError, match="soft=True"
    ):  # the second is known to be in vain at once
        zray.get(where.options(scheduling_strategy=hard).remote(), timeout=30)
    dweller = Dweller.options(scheduling_strategy=hard).remote()
    with pytest.raises(exceptions.ActorUnschedulableError, match=nowhere):
        zray.get(dweller.where.remote(), timeout=30)
    soft = NodeAffinitySchedulingStrategy(nowhere, soft=True)
    assert zray.get(where.options(scheduling_strategy=soft).remote(), timeout=30) in ids_of(cluster)


def test_labels(cluster: Cluster) -> None:
    head, east, west = ids_of(cluster)

    def at(**labels: object) -> str:
        strategy = NodeLabelSchedulingStrategy(labels)  # type: ignore[arg-type]
        return zray.get(where.options(scheduling_strategy=strategy).remote(), timeout=30)

    assert at(zone=In("east", "north")) == east
    assert at(zone=NotIn("east", "centre")) == west
    assert at(disk=Exists()) == east
    assert at(disk=DoesNotExist(), zone=NotIn("centre")) == west
    preferred = NodeLabelSchedulingStrategy({"zone": Exists()}, soft={"zone": In("west")})
    assert zray.get(where.options(scheduling_strategy=preferred).remote(), timeout=30) == west
    hopeless = NodeLabelSchedulingStrategy({"zone": Exists()}, soft={"zone": In("moon")})
    assert zray.get(where.options(scheduling_strategy=hopeless).remote(), timeout=30) == head
    assert zray.get(where.options(label_selector={"zone": "west"}).remote(), timeout=30) == west
    assert zray.get(where.options(label_selector={"zone": "!in(west, centre)"}).remote(), timeout=30) == east
    assert zray.get(where.options(label_selector={"ray.io/node-id": west}).remote(), timeout=30) == west
    dweller = Dweller.options(label_selector={"disk": "fast"}).remote()
    assert zray.get(dweller.where.remote(), timeout=30) == east


def test_a_task_goes_to_where_its_file_lies(cluster: Cluster, tmp_path: Path) -> None:
    _, east, west = ids_of(cluster)

    @zray.remote(num_cpus=0)
    def write(path: str) -> str:
        node = zray.get_runtime_context().get_node_id()
        with open(f"{path}-{node}", "w") as file:  # stands for a disk that only that node has
            file.write(node)
        return node

    @zray.remote
    def read(path: str) -> str:
        with open(f"{path}-{zray.get_runtime_context().get_node_id()}") as file:
            return file.read()

    path = str(tmp_path / "data")
    assert zray.get(write.options(label_selector={"zone": "west"}).remote(path), timeout=30) == west
    assert zray.get(read.options(label_selector={"zone": "west"}).remote(path), timeout=30) == west
    assert zray.get(write.options(resources={"archive": 0.1}).remote(path), timeout=30) == east
    assert zray.get(read.options(resources={"archive": 1}).remote(path), timeout=30) == east
    assert zray.get(zray.remote(lambda: zray.get_runtime_context().get_node_labels()).remote(), timeout=30) == {
        "zone": "centre"
    }


def test_a_task_goes_to_where_its_large_input_is(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    head, east, _ = ids_of(cluster)

    @zray.remote
    def make(count: int) -> Any:
        return np.ones(count)

    @zray.remote
    def where_with(array: Any) -> tuple[str, float]:
        return zray.get_runtime_context().get_node_id(), float(array.sum())

    large = make.options(label_selector={"zone": "east"}).remote(4_000_000)
    small = make.options(label_selector={"zone": "east"}).remote(10)
    zray.wait([large, small], num_returns=2, timeout=30, fetch_local=False)
    wait_for(lambda: zray.available_resources()["CPU"] == 3, what="all is free")
    assert zray.get(where_with.remote(large), timeout=30) == (east, 4_000_000), "although it would fit at home"
    wait_for(lambda: zray.available_resources()["CPU"] == 3, what="all is free")
    assert zray.get(where_with.remote(small), timeout=30) == (head, 10)
    hold = gate("hold")

    @zray.remote(label_selector={"zone": "east"})
    def occupy() -> None:
        hold.wait()

    busy = occupy.remote()
    wait_for(lambda: zray.available_resources()["CPU"] == 2, what="the node of the input is busy")
    place, found = zray.get(where_with.remote(large), timeout=30)
    assert place != east, "it is not waited for longer than the input travels"
    assert found == 4_000_000
    hold.open()
    zray.get(busy, timeout=30)
    del large


def test_labels_that_no_node_has_are_waited_for() -> None:
    with Cluster(initialize_head=True, connect=True) as cluster:
        ref = where.options(label_selector={"zone": "north"}).remote()
        assert zray.wait([ref], timeout=0.3)[0] == []
        node = cluster.add_node(labels={"zone": "north"})
        assert zray.get(ref, timeout=30) == node.node_id


def test_tasks_that_insist_on_a_node_fail_with_it() -> None:
    with Cluster(initialize_head=True, connect=True) as cluster:
        node = cluster.add_node()
        cluster.wait_for_nodes()
        hard = NodeAffinitySchedulingStrategy(node.node_id, soft=False)

        @zray.remote(scheduling_strategy=hard)
        def endless() -> None:
            import time

            time.sleep(1000)

        refs = [endless.remote() for _ in range(3)]
        dweller = Dweller.options(scheduling_strategy=hard, num_cpus=0, max_restarts=-1).remote()
        assert zray.get(dweller.where.remote(), timeout=30) == node.node_id
        wait_for(lambda: zray.available_resources()["CPU"] == 1, what="one of them runs")
        node.kill()
        for ref in refs:
            with pytest.raises(exceptions.TaskUnschedulableError, match=node.node_id):
                zray.get(ref, timeout=30)
        with pytest.raises((exceptions.ActorUnschedulableError, exceptions.ActorDiedError)):
            zray.get(dweller.where.remote(), timeout=30)
        with pytest.raises(exceptions.TaskUnschedulableError):
            zray.get(where.options(scheduling_strategy=hard).remote(), timeout=30)
        cluster.remove_node(node)


def test_bad_strategies() -> None:
    with pytest.raises(ValueError, match="not an id"):
        NodeAffinitySchedulingStrategy("here", soft=False)
    with pytest.raises(TypeError, match="soft"):
        NodeAffinitySchedulingStrategy("ab" * 16, soft="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs conditions"):
        NodeLabelSchedulingStrategy({})
    with pytest.raises(TypeError, match=r"In\(\.\.\.\)"):
        NodeLabelSchedulingStrategy({"zone": "east"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="one or more values"):
        In()
    with pytest.raises(ValueError, match="DEFAULT"):
        where.options(scheduling_strategy="SOMEWHERE")
