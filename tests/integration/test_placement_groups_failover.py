"""Placement groups whose head dies: what is on living nodes goes on, the rest is placed again, and nothing is left behind.

Real brokers on the loopback address; the head's broker is killed, and another node becomes the head, or it is started again with its storage.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import SLACK, query, stop, wait_for, wait_for_replicas
from tests.tcp_relay import Relay
from zray import exceptions
from zray.cluster_utils import Cluster, ClusterNode
from zray.util import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from zray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CPUS = 2


@zray.remote
def where() -> str:
    return zray.get_runtime_context().get_node_id()


@zray.remote
class Dweller:
    """Remembers, so that one sees whether it is still the same."""

    def __init__(self) -> None:
        self.visits = 0

    def visit(self) -> tuple[str, int]:
        self.visits += 1
        return zray.get_runtime_context().get_node_id(), self.visits


def within(group: PlacementGroup, bundle: int = -1) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle)}


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group).get("state"))


def nodes_of(group: PlacementGroup) -> list[str]:
    return list(placement_group_table(group)["bundles_to_node_id"].values())


def all_is_given_back(cluster: Cluster) -> None:
    """Every CPU of every living node is free, and no bundle is left anywhere."""
    living = [row for row in zray.nodes() if row["Alive"]]

    def is_so() -> bool:
        free = zray.available_resources()
        return free.get("CPU", 0.0) == CPUS * len(living) and not any("_group_" in name for name in free)

    wait_for(is_so, what="all is given back")
    assert not query("check"), query("check")


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    """Clusters to be ended."""
    made: list[Cluster] = []
    yield made
    if zray.is_initialized():
        zray.shutdown()
    for cluster in made:
        cluster.shutdown()


@pytest.fixture(params=["replicas", "storage"])
def lose_head(
    request: pytest.FixtureRequest, clusters: list[Cluster], tmp_path: Path
) -> tuple[Cluster, Callable[[], ClusterNode]]:
    """A cluster of four nodes of two CPUs, this process connected to the last; and a function that kills the head with `kill -9`
    and returns the node that is the head then."""
    kept = {"replicas": 3} if request.param == "replicas" else {"storage": f"sqlite:{tmp_path / 'gcs.db'}"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS}, **kept)
    clusters.append(cluster)
    for _ in range(3):
        cluster.add_node(num_cpus=CPUS)
    zray.init(address=cluster.worker_nodes[-1].address, namespace="n")
    cluster.wait_for_nodes()
    if request.param == "replicas":
        wait_for_replicas()

    def kill() -> ClusterNode:
        old = query("cluster")["head"]
        next(node for node in cluster.list_all_nodes() if node.node_id == old).kill()
        if request.param == "storage":
            cluster.restart_head(num_cpus=CPUS)
        wait_for(lambda: query("cluster")["head"] != old and not query("cluster")["head_lost"], what="there is a head")
        return next(node for node in cluster.list_all_nodes() if node.node_id == query("cluster")["head"])

    return cluster, kill


def test_groups_survive_the_head(lose_head: tuple[Cluster, Callable[[], ClusterNode]]) -> None:
    cluster, kill = lose_head
    head = cluster.list_all_nodes()[0]
    # One bundle on every node, the head's too; and a group that the head's node has no part in.
    everywhere = placement_group([{"CPU": 1}] * 4, strategy="STRICT_SPREAD", name="everywhere")
    assert everywhere.wait(30)
    beside = placement_group(
        [{"CPU": 1}] * 2,
        strategy="STRICT_SPREAD",
        bundle_label_selector=[{"zray.io/node-id": f"!in({head.node_id})"}] * 2,
        lifetime="detached",
        name="beside",
    )
    assert beside.wait(30)
    waits = placement_group([{"CPU": CPUS}] * 4, strategy="STRICT_SPREAD", name="waits")
    gone = placement_group([{"CPU": 1}], name="gone")
    assert gone.wait(30)
    remove_placement_group(gone)
    assert head.node_id in nodes_of(everywhere)
    assert head.node_id not in nodes_of(beside)
    before, others = nodes_of(beside), nodes_of(everywhere)
    lost = others.index(head.node_id)
    dwellers = [Dweller.options(**within(beside, bundle), num_cpus=0.5).remote() for bundle in range(2)]
    assert zray.get([dweller.visit.remote() for dweller in dwellers], timeout=30) == [(before[0], 1), (before[1], 1)]
    ready_later = waits.ready()
    for life in (2, 3):
        kill()
        if life == 2:
            assert nodes_of(beside) == before
            assert state(beside) == "CREATED"
        # (A node that replaces one that had a bundle of it may hold that bundle of `beside` now.)
        assert zray.get(beside.ready(), timeout=30) == beside
        if nodes_of(beside) == before:
            calls = [dweller.visit.remote() for dweller in dwellers]
            assert zray.get(calls, timeout=30) == [(before[0], life), (before[1], life)], "the same actors"
            tasks = [where.options(**within(beside, bundle), num_cpus=0.5).remote() for bundle in (0, 1)]
            assert zray.get(tasks, timeout=30) == before
        if len([row for row in zray.nodes() if row["Alive"]]) < 4:
            wait_for(lambda: state(everywhere) == "RESCHEDULING", what="the head's bundle is missed")
            kept = [bundle for bundle in range(4) if nodes_of(everywhere)[bundle]]
            assert zray.get([where.options(**within(everywhere, bundle)).remote() for bundle in kept], timeout=30) == [
                nodes_of(everywhere)[bundle] for bundle in kept
            ]
            cluster.add_node(num_cpus=CPUS)
        assert zray.get(everywhere.ready(), timeout=30) == everywhere
        wait_for(lambda: state(everywhere) == "CREATED")
        assert sorted(nodes_of(everywhere)) == sorted(row["NodeID"] for row in zray.nodes() if row["Alive"])
        found = zray.get([where.options(**within(everywhere, bundle)).remote() for bundle in range(4)], timeout=30)
        assert found == nodes_of(everywhere)
        if life == 2:
            assert [place for bundle, place in enumerate(found) if bundle != lost] == [
                place for bundle, place in enumerate(others) if bundle != lost
            ], "what was not lost stayed"
            query_replicas = query("cluster").get("replicas")
            if query_replicas:
                wait_for_replicas()
    assert get_placement_group("everywhere") == everywhere
    with pytest.raises(ValueError, match="Failed to look up"):
        get_placement_group("gone")
    with pytest.raises(ValueError, match="is taken"):
        placement_group([{"CPU": 1}], name="beside")
    assert zray.wait([ready_later], timeout=0)[0] == []
    for actor in dwellers:
        zray.kill(actor)
    remove_placement_group(everywhere)
    remove_placement_group(get_placement_group("beside"))
    assert zray.get(ready_later, timeout=30) == waits, "who waited for it was told by the third head"
    remove_placement_group(waits)
    all_is_given_back(cluster)


def test_groups_that_are_made_and_removed_while_heads_die(lose_head: tuple[Cluster, Callable[[], ClusterNode]]) -> None:
    cluster, kill = lose_head
    groups: list[PlacementGroup] = []
    ends = threading.Event()
    failures: list[BaseException] = []

    def make_and_remove(number: int) -> None:
        count = 0
        try:
            while not ends.is_set():
                count += 1
                group = placement_group([{"CPU": 1}] * 2, strategy="SPREAD", name=f"g{number}.{count}")
                groups.append(group)
                if count % 3:
                    assert group.wait(60)
                remove_placement_group(group)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make_and_remove, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            count = len(groups)
            wait_for(lambda count=count: len(groups) > count + 20 or failures, 60, "groups come and go")
            kill()
            if len([row for row in zray.nodes() if row["Alive"]]) < 4:
                cluster.add_node(num_cpus=CPUS)
                wait_for_replicas()
        count = len(groups)
        wait_for(lambda: len(groups) > count + 20 or failures, 60, "groups come and go")
    finally:
        ends.set()
        for thread in threads:
            thread.join(90)
    assert not failures, failures
    rows = placement_group_table()
    assert {row["state"] for row in rows.values()} == {"REMOVED"}
    all_is_given_back(cluster)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        zray.get(groups[0].ready(), timeout=30)


def test_groups_of_drivers_that_left_while_there_was_no_head(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS}, storage=f"sqlite:{tmp_path / 'gcs.db'}")
    clusters.append(cluster)
    node = cluster.add_node(num_cpus=CPUS)
    zray.init(address=node.address, namespace="n")
    cluster.wait_for_nodes()
    passing = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
    lasting = placement_group([{"CPU": 1}], name="lasting", lifetime="detached")
    assert passing.wait(30)
    assert lasting.wait(30)
    assert cluster.head_node is not None
    stop(cluster.head_node.pid)  # nothing that this program says now is heard by anybody
    zray.shutdown()
    cluster.head_node.kill()
    cluster.restart_head(num_cpus=CPUS)
    zray.init(address=node.address, namespace="n")
    wait_for(lambda: state(passing) == "REMOVED", what="its driver has left")
    assert zray.get(get_placement_group("lasting").ready(), timeout=30) == lasting
    remove_placement_group(lasting)
    all_is_given_back(cluster)


def test_everything_killed_and_groups_placed_again(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": CPUS},
        storage=f"sqlite:{tmp_path / 'gcs.db'}",
        head_grace=1.0,
    )
    clusters.append(cluster)
    node = cluster.add_node(num_cpus=CPUS)
    zray.init(address=cluster.address, namespace="n")
    cluster.wait_for_nodes()
    lasting = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD", name="lasting", lifetime="detached")
    assert lasting.wait(30)
    before = nodes_of(lasting)
    passing = placement_group([{"CPU": 1}])
    assert passing.wait(30)
    zray.shutdown()
    node.kill()
    assert cluster.head_node is not None
    cluster.head_node.kill()
    cluster.remove_node(node)
    cluster.restart_head(num_cpus=CPUS)
    cluster.add_node(num_cpus=CPUS)
    zray.init(address=cluster.address, namespace="n")
    found = get_placement_group("lasting")
    assert found == lasting
    assert zray.get(found.ready(), timeout=30) == lasting
    wait_for(lambda: not set(nodes_of(lasting)) & {*before, ""}, what="all of it is placed again")
    tasks = [where.options(**within(found, bundle)).remote() for bundle in range(2)]
    assert zray.get(tasks, timeout=30) == nodes_of(lasting)
    assert state(passing) == "REMOVED"
    remove_placement_group(found)
    all_is_given_back(cluster)


def test_groups_of_a_client_and_a_head_that_only_sleeps(clusters: list[Cluster]) -> None:
    cluster = Cluster(initialize_head=True, replicas=3, node_timeout=2.0 * SLACK, head_node_args={"num_cpus": CPUS})
    clusters.append(cluster)
    for _ in range(3):
        cluster.add_node(num_cpus=CPUS)
    inside = cluster.worker_nodes[-1].address
    zray.init(address=inside)
    wait_for_replicas()
    zray.shutdown()
    head = cluster.head_node
    assert head is not None
    tunnel = Relay(cluster.address)
    try:
        zray.init(address=tunnel.address, cluster_key=cluster._key_file())
        group = placement_group([{"CPU": 1}] * 4, strategy="STRICT_SPREAD")
        assert group.wait(30)
        before = nodes_of(group)
        kept = [bundle for bundle in range(4) if before[bundle] != head.node_id]
        stop(head.pid)
        zray.kv.put("colour", b"green")  # waits until there is another head
        wait_for(lambda: state(group) == "RESCHEDULING", what="the sleeping head's bundle is missed")
        tasks = [where.options(**within(group, bundle), num_cpus=0.5).remote() for bundle in kept]
        assert zray.get(tasks, timeout=30) == [before[bundle] for bundle in kept]
        os.kill(head.pid, signal.SIGCONT)  # it comes back, as another node that has room
        assert zray.get(group.ready(), timeout=30) == group
        wait_for(lambda: state(group) == "CREATED")
        after = nodes_of(group)
        assert [bundle for bundle in range(4) if after[bundle] == before[bundle]] == kept
        everywhere = [where.options(**within(group, bundle)).remote() for bundle in range(4)]
        assert zray.get(everywhere, timeout=30) == after
        zray.shutdown()
    finally:
        if zray.is_initialized():
            zray.shutdown()
        tunnel.close()
    zray.init(address=inside)
    wait_for(lambda: state(group) == "REMOVED", what="the client's group ends with the client")
    all_is_given_back(cluster)
