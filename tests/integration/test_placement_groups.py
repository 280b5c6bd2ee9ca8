"""Placement groups: reserved, used, captured, removed, and placed again when a node dies; on one machine and on clusters."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import Gate, query, wait_for
from zray import exceptions
from zray.cluster_utils import Cluster
from zray.util import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from zray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@zray.remote
def where() -> str:
    return zray.get_runtime_context().get_node_id()


@zray.remote
class Dweller:
    def where(self) -> str:
        return zray.get_runtime_context().get_node_id()


def within(group: PlacementGroup, bundle: int = -1, capture: bool | None = None) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle, capture)}


def free() -> float:
    return zray.available_resources().get("CPU", 0.0)


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


def nodes_of(group: PlacementGroup) -> list[str]:
    return list(placement_group_table(group)["bundles_to_node_id"].values())


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster of nodes with these CPUs and connects to its head."""
    clusters: list[Cluster] = []

    def make(*cpus: int) -> Cluster:
        cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": cpus[0]})
        clusters.append(cluster)
        for count in cpus[1:]:
            cluster.add_node(num_cpus=count)
        cluster.wait_for_nodes()
        return cluster

    yield make
    for cluster in clusters:
        if zray.is_initialized():
            assert not query("check"), query("check")
        cluster.shutdown()


# -- one machine ---------------------------------------------------------------------------------------------------------


def test_a_group_reserves_and_gives_back(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=3, resources={"wheels": 2})
    group = placement_group([{"CPU": 1, "wheels": 1}, {"CPU": 1}], name="pair")
    assert zray.get(group.ready(), timeout=30) == group
    assert group.wait(0)
    assert free() == 1
    assert zray.available_resources()["wheels"] == 1
    assert zray.available_resources()[f"CPU_group_{group.id.hex()}"] == 2
    assert group.bundle_specs == [{"CPU": 1, "wheels": 1}, {"CPU": 1}]
    assert group.bundle_count == 2
    table = placement_group_table(group)
    assert (table["name"], table["state"], table["strategy"]) == ("pair", "CREATED", "PACK")
    assert table["bundles"] == {0: {"CPU": 1.0, "wheels": 1.0}, 1: {"CPU": 1.0}}
    assert set(table["bundles_to_node_id"].values()) == {zray.nodes()[0]["NodeID"]}
    assert get_placement_group("pair") == group
    assert placement_group_table()[group.id.hex()] == table
    assert zray.get(where.options(**within(group, 0), resources={"wheels": 1}).remote(), timeout=30)
    remove_placement_group(group)
    remove_placement_group(group)
    assert state(group) == "REMOVED"
    wait_for(lambda: free() == 3)
    with pytest.raises(ValueError, match="pair"):
        get_placement_group("pair")


def test_calls_take_no_more_than_their_bundle_has(
    zray_session: Callable[..., Any], gate: Callable[[str], Gate]
) -> None:
    zray_session(num_cpus=4)
    group = placement_group([{"CPU": 1}, {"CPU": 2}])
    hold = gate("hold")

    @zray.remote
    def wait_there() -> None:
        hold.wait()

    refs = [wait_there.options(**within(group, 0)).remote() for _ in range(2)]
    refs += [wait_there.options(**within(group)).remote() for _ in range(4)]
    key = f"CPU_group_{group.id.hex()}"
    wait_for(lambda: group.wait(0) and zray.available_resources().get(key) == 0, what="all of the group is in use")
    assert free() == 1
    assert zray.get(where.remote(), timeout=30), "the rest of the machine is free for others"
    busy = [row for row in query("tasks") if row["name"] == "wait_there" and row["ended"] == 0]
    assert len(busy) == 6
    hold.open()
    zray.get(refs, timeout=30)
    wait_for(lambda: zray.available_resources().get(key) == 3)
    remove_placement_group(group)
    wait_for(lambda: free() == 4)


def test_who_waits_lends_the_cpu_of_its_bundle(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=1)
    group = placement_group([{"CPU": 1}])

    @zray.remote
    def child(n: int) -> int:
        return n + 1

    @zray.remote
    def parent() -> list[int]:
        assert get_current_placement_group() == group
        assert zray.get_runtime_context().get_placement_group_id() == group.id.hex()
        return zray.get([child.remote(n) for n in range(20)])

    found = parent.options(**within(group, 0, capture=True)).remote()
    assert zray.get(found, timeout=30) == list(range(1, 21)), "captured: there is no other CPU"
    assert get_current_placement_group() is None
    stuck = parent.options(**within(group, 0, capture=False)).remote()
    assert zray.wait([stuck], timeout=0.3)[0] == [], "without capture the children wait for a CPU that the group has"
    remove_placement_group(group)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        zray.get(stuck, timeout=30)


def test_actors_capture_too_and_live_in_their_bundle(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=2)
    group = placement_group([{"CPU": 2}])

    @zray.remote(num_cpus=1)
    class Parent:
        def child_group(self) -> tuple[Any, Any]:
            inside = zray.remote(lambda: get_current_placement_group()).remote()
            outside = zray.remote(lambda: get_current_placement_group())
            outside = outside.options(num_cpus=0, scheduling_strategy="DEFAULT")
            return zray.get([inside, outside.remote()])

    parent = Parent.options(**within(group, capture=True)).remote()
    assert zray.get(parent.child_group.remote(), timeout=30) == [group, None]
    key = f"CPU_group_{group.id.hex()}"
    wait_for(lambda: zray.available_resources()[key] == 1, what="the actor alone is in the group")
    remove_placement_group(group)
    with pytest.raises(exceptions.ActorDiedError, match="placement group was removed"):
        zray.get(parent.child_group.remote(), timeout=30)
    wait_for(lambda: free() == 2)


def test_removal_ends_what_runs_and_what_waits(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=2)
    group = placement_group([{"CPU": 1}])

    @zray.remote(max_retries=5)
    def endless() -> None:
        time.sleep(1000)

    refs = [endless.options(**within(group, 0)).remote() for _ in range(3)]
    key = f"CPU_group_{group.id.hex()}"
    wait_for(lambda: zray.available_resources().get(key) == 0, what="one runs")
    after = zray.remote(lambda _: 1).remote(refs[0])
    remove_placement_group(group)
    for ref in (*refs, where.options(**within(group)).remote(), group.ready()):
        with pytest.raises(exceptions.TaskPlacementGroupRemoved):
            zray.get(ref, timeout=30)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        zray.get(after, timeout=30)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        group.wait(5)
    dweller = Dweller.options(**within(group)).remote()
    with pytest.raises(exceptions.ActorPlacementGroupRemoved):
        zray.get(dweller.where.remote(), timeout=30)
    wait_for(lambda: free() == 2, what="all is free when the last process has gone")
    assert not [name for name in zray.available_resources() if "_group_" in name]


def test_a_group_that_does_not_fit_waits(zray_session: Callable[..., Any], gate: Callable[[str], Gate]) -> None:
    zray_session(num_cpus=2)
    hold = gate("hold")
    ref = zray.remote(hold.wait).remote()
    wait_for(lambda: free() == 1)
    both = placement_group([{"CPU": 2}])
    early = where.options(**within(both)).remote()
    assert not both.wait(0.2)
    assert state(both) == "PENDING"
    hold.open()
    zray.get(ref, timeout=30)
    assert both.wait(30)
    assert zray.get(early, timeout=30)
    huge = placement_group([{"CPU": 3}])
    assert not huge.wait(0.2), "infeasible: it is pending, as long as nobody removes it"
    waits = where.options(**within(huge), num_cpus=3).remote()
    remove_placement_group(huge)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        zray.get(waits, timeout=30)
    remove_placement_group(both)


def test_leases_give_way_to_groups(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=1)
    for _ in range(50):
        zray.get(where.remote(), timeout=30)  # a worker is lent to this process by now
    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    for _ in range(20):  # in the group, too
        zray.get(where.options(**within(group)).remote(), timeout=30)
    inside = where.options(**within(group))
    for _ in range(20):
        zray.get(inside.remote(), timeout=30)
    remove_placement_group(group)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        zray.get(inside.remote(), timeout=30)
    wait_for(lambda: free() == 1)


def test_gpus_of_a_bundle_are_its_own(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=4, num_gpus=3)
    group = placement_group([{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}])
    assert group.wait(30)

    @zray.remote(num_gpus=1)
    def gpus() -> list[str]:
        time.sleep(0.05)
        return zray.get_runtime_context().get_accelerator_ids()["GPU"]

    first = zray.get([gpus.options(**within(group, 0)).remote() for _ in range(3)], timeout=30)
    second = zray.get([gpus.options(**within(group, 1)).remote() for _ in range(3)], timeout=30)
    others = zray.get([gpus.remote() for _ in range(3)], timeout=30)
    assert [len({tuple(one) for one in many}) for many in (first, second, others)] == [1, 1, 1]
    assert sorted([first[0][0], second[0][0], others[0][0]]) == ["0", "1", "2"]
    anywhere = zray.get([gpus.options(**within(group)).remote() for _ in range(6)], timeout=30)
    assert {one[0] for one in anywhere} <= {first[0][0], second[0][0]}
    remove_placement_group(group)


def test_bad_groups(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=1)
    for bundles in ([], [{}], [{"CPU": 0}], {"CPU": 1}, ["CPU"]):
        with pytest.raises(ValueError):
            placement_group(bundles)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="STRICT_SPREAD"):
        placement_group([{"CPU": 1}], strategy="SOMEHOW")
    with pytest.raises(ValueError, match="lifetime"):
        placement_group([{"CPU": 1}], lifetime="long")
    group = placement_group([{"CPU": 1}], name="one")
    with pytest.raises(ValueError, match="taken"):
        placement_group([{"CPU": 1}], name="one")
    with pytest.raises(ValueError, match="bundle index 1 is invalid"):
        PlacementGroupSchedulingStrategy(group, 1)
    with pytest.raises(TypeError, match="PlacementGroup"):
        PlacementGroupSchedulingStrategy("one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot fit into any bundle"):
        where.options(**within(group), num_cpus=2).remote()
    unknown = PlacementGroup(os.urandom(12) + bytes(4), ({"CPU": 10_000},))
    with pytest.raises(exceptions.TaskPlacementGroupRemoved, match="no placement group with this id"):
        zray.get(where.options(**within(unknown)).remote(), timeout=30)
    remove_placement_group(group)


# -- clusters ------------------------------------------------------------------------------------------------------------


def test_the_four_strategies(start: Callable[..., Cluster]) -> None:
    cluster = start(2, 2, 2)
    everywhere = {node.node_id for node in cluster.list_all_nodes()}
    for strategy, bundles, expected in (
        ("PACK", 2, 1),
        ("PACK", 3, 2),
        ("STRICT_PACK", 2, 1),
        ("SPREAD", 3, 3),
        ("SPREAD", 6, 3),
        ("STRICT_SPREAD", 3, 3),
    ):
        group = placement_group([{"CPU": 1}] * bundles, strategy=strategy)
        assert group.wait(30), (strategy, bundles, zray.available_resources())
        places = nodes_of(group)
        assert len(set(places)) == expected, (strategy, places)
        assert set(places) <= everywhere
        ran = zray.get([where.options(**within(group, index)).remote() for index in range(bundles)], timeout=30)
        assert ran == places, "calls run where their bundle is"
        remove_placement_group(group)
        wait_for(lambda: free() == 6, what="all is given back")
    for strategy, bundles in (("STRICT_PACK", 3), ("STRICT_SPREAD", 4)):
        group = placement_group([{"CPU": 1}] * bundles, strategy=strategy)
        assert not group.wait(0.2)
        remove_placement_group(group)
    wait_for(lambda: free() == 6, what="all is given back")


def test_groups_are_used_from_every_node(start: Callable[..., Cluster]) -> None:
    cluster = start(1, 1, 1)
    away = cluster.worker_nodes[1].node_id
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")

    @zray.remote(num_cpus=0)
    def use(group: PlacementGroup) -> list[str]:
        inside = PlacementGroupSchedulingStrategy(group, 1)
        dweller = Dweller.options(scheduling_strategy=inside).remote()
        found = [zray.get(dweller.where.remote()), zray.get(where.options(scheduling_strategy=inside).remote())]
        own = placement_group([{"CPU": 1}])
        assert zray.get(own.ready()) == own
        found.append(zray.get(where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(own)).remote()))
        remove_placement_group(own)
        return found

    found = zray.get(use.options(label_selector={"ray.io/node-id": away}).remote(group), timeout=60)
    places = nodes_of(group)
    assert found[:2] == [places[1]] * 2
    assert {*places, found[2]} == {node.node_id for node in cluster.list_all_nodes()}
    remove_placement_group(group)
    wait_for(lambda: free() == 3, what="all is given back")


def test_bundles_lost_with_their_node_are_placed_again(start: Callable[..., Cluster]) -> None:
    cluster = start(1, 1, 1)
    victim = cluster.worker_nodes[0]
    group = placement_group([{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    assert group.wait(30)
    lost = nodes_of(group).index(victim.node_id)
    dweller = Dweller.options(**within(group, lost), max_restarts=-1, max_task_retries=-1).remote()
    assert zray.get(dweller.where.remote(), timeout=30) == victim.node_id
    kept = [index for index in range(3) if index != lost]
    before = zray.get([where.options(**within(group, index)).remote() for index in kept], timeout=30)
    victim.kill()
    wait_for(lambda: state(group) == "RESCHEDULING", what="its loss is noticed")
    assert zray.get([where.options(**within(group, index)).remote() for index in kept], timeout=30) == before
    waits = where.options(**within(group, lost)).remote()
    assert zray.wait([waits], timeout=0.2)[0] == []
    cluster.remove_node(victim)
    fresh = cluster.add_node(num_cpus=2)
    assert zray.get(waits, timeout=30) == fresh.node_id
    assert state(group) == "CREATED"
    assert zray.get(dweller.where.remote(), timeout=30) == fresh.node_id
    remove_placement_group(group)
    wait_for(lambda: free() == 4, what="all is given back")


def test_removal_reaches_other_nodes(start: Callable[..., Cluster]) -> None:
    start(0, 2)
    group = placement_group([{"CPU": 2}])

    @zray.remote(max_retries=-1)
    def endless() -> None:
        time.sleep(1000)

    refs = [endless.options(**within(group)).remote() for _ in range(3)]
    dweller = Dweller.options(**within(group, 0), num_cpus=0).remote()
    zray.get(dweller.where.remote(), timeout=30)
    key = f"CPU_group_{group.id.hex()}"
    wait_for(lambda: zray.available_resources().get(key) == 0, what="two run there")
    remove_placement_group(group)
    for ref in refs:
        with pytest.raises(exceptions.TaskPlacementGroupRemoved):
            zray.get(ref, timeout=30)
    with pytest.raises((exceptions.ActorDiedError, exceptions.ActorPlacementGroupRemoved)):
        zray.get(dweller.where.remote(), timeout=30)
    wait_for(lambda: free() == 2, what="all is free again")
    wait_for(lambda: key not in zray.available_resources())


def test_groups_end_with_their_job_unless_detached(start: Callable[..., Cluster]) -> None:
    cluster = start(1, 2)
    passing = placement_group([{"CPU": 1}])
    lasting = placement_group([{"CPU": 1}], name="lasting", lifetime="detached")
    assert passing.wait(30)
    assert lasting.wait(30)
    namespace = zray.get_runtime_context().namespace
    zray.shutdown()
    zray.init(address=cluster.worker_nodes[0].address, namespace=namespace)
    wait_for(lambda: state(passing) == "REMOVED")
    found = get_placement_group("lasting")
    assert found == lasting
    assert zray.get(where.options(**within(found)).remote(), timeout=30) in nodes_of(lasting)
    remove_placement_group(found)
    wait_for(lambda: free() == 3, what="all is given back")


def test_labels_of_bundles(start: Callable[..., Cluster]) -> None:
    cluster = start(1)
    node = cluster.add_node(num_cpus=1, labels={"zone": "east"})
    cluster.wait_for_nodes()
    group = placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": "east"}])
    assert group.wait(30)
    assert nodes_of(group) == [node.node_id]
    remove_placement_group(group)
