"""Values that are lost with nodes, and made again: chains, fan-ins, nested references, limits of retries; and what cannot be made again."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, Tally, alive, query, wait_for
from zray import exceptions
from zray.cluster_utils import Cluster, ClusterNode
from zray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 100_000
"""Numbers in a large value: 800 kB, more than travels with the news of an end."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and three nodes, each with two CPUs and a resource of its own: a, b, c. This process is connected to the head."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 0}) as found:
        for name in "abc":
            found.add_node(num_cpus=2, resources={name: 100})
        found.connect()
        found.wait_for_nodes()
        yield found
        wait_nothing_is_owed()


def wait_nothing_is_owed() -> None:
    """References that crossed nodes have all gone back, and no lineage is remembered."""

    def left() -> dict[str, int]:
        found = query("statistics")
        names = ("objects_borrowed", "objects_elsewhere", "objects_kept_elsewhere", "lineage_tasks", "lineage_bytes")
        return {name: found[name] for name in names if found[name]}

    if zray.is_initialized():
        wait_for(lambda: not left(), 5, f"nothing is left: {left()}")
        wait_for(lambda: query("statistics")["used"] < 1 << 20, 5, f"no value is left: {query('statistics')}")


def on(name: str) -> dict[str, float]:
    return {name: 1}


def kill(cluster: Cluster, node: ClusterNode) -> None:
    cluster.remove_node(node, allow_graceful=False)


def node_with(cluster: Cluster, name: str) -> ClusterNode:
    wanted = {row["NodeID"] for row in zray.nodes() if name in row["Resources"]}
    return next(node for node in cluster.worker_nodes if node.node_id in wanted)


@zray.remote(num_cpus=0)
def make(tally: Tally | None, start: int, *inputs: Any) -> Any:
    if tally is not None:
        tally.add()
    return np.arange(SIZE, dtype=np.int64) + start + sum(int(value[0]) for value in inputs)


@zray.remote(num_cpus=0)
def first(value: Any) -> int:
    return int(value[0])


def expected(start: int) -> Any:
    return np.arange(SIZE, dtype=np.int64) + start


def elsewhere() -> int:
    return int(query("statistics")["objects_elsewhere"])


def reruns() -> int:
    return int(query("statistics")["lineage_reruns"])


# -- values stay where they are made -----------------------------------------------------------------------------------


def test_large_results_come_when_they_are_wanted(cluster: Cluster) -> None:
    ref = make.options(resources=on("a")).remote(None, 5)
    assert zray.wait([ref], timeout=30, fetch_local=False) == ([ref], [])
    assert query("statistics")["used"] < 1 << 20
    assert elsewhere() == 1
    assert zray.wait([ref], timeout=30) == ([ref], [])
    assert query("statistics")["used"] > 8 * SIZE
    assert (zray.get(ref) == expected(5)).all()
    del ref


def test_a_future_brings_its_value(cluster: Cluster) -> None:
    ref = make.options(resources=on("a")).remote(None, 5)
    zray.wait([ref], timeout=30, fetch_local=False)
    assert (ref.future().result(30) == expected(5)).all()
    del ref


def test_values_go_from_node_to_node(cluster: Cluster) -> None:
    ref = make.options(resources=on("a")).remote(None, 5)
    for name in "abcabc":
        assert zray.get(first.options(resources=on(name)).remote(ref), timeout=30) == 5
    assert query("statistics")["used"] < 1 << 20, "it never came here"
    del ref


def test_copies_that_go_do_not_stop_others_from_coming(cluster: Cluster) -> None:
    """Each value is fetched here while another node gives its copy up."""
    for _ in range(30):
        refs = [make.options(resources=on("ab"[i % 2])).remote(None, i) for i in range(6)]
        ends = [first.options(resources=on("ba"[i % 2])).remote(ref) for i, ref in enumerate(refs)]
        assert zray.get(ends, timeout=30) == list(range(6))
        assert [int(value[0]) for value in zray.get(refs, timeout=30)] == list(range(6))
    del refs, ends


def test_many_large_values_leave_nothing(cluster: Cluster) -> None:
    """Also on the other nodes: their stores are empty, and they owe nothing."""
    count = 300

    @zray.remote(num_cpus=0)
    def left() -> tuple[int, int]:
        found = query("statistics")
        return found["used"] >> 20, found["objects_lent"]

    refs = [make.options(resources=on("abc"[i % 3])).remote(None, i) for i in range(count)]
    ends = [first.options(resources=on("abc"[i // 3 % 3])).remote(ref) for i, ref in enumerate(refs)]
    assert zray.get(ends, timeout=120) == list(range(count))
    for i, value in enumerate(zray.get(refs[:30], timeout=30)):
        assert value[0] == i
    del refs, ends, value
    wait_nothing_is_owed()
    for name in "abc":
        wait_for(
            lambda name=name: zray.get(left.options(resources=on(name)).remote(), timeout=30) == (0, 0),
            5,
            f"{name} is empty",
        )


# -- and are made again ------------------------------------------------------------------------------------------------


def test_a_lost_result_is_made_again(cluster: Cluster, tally: Tally) -> None:
    ref = make.options(num_cpus=1).remote(tally, 7)
    zray.wait([ref], timeout=30, fetch_local=False)
    kill(cluster, cluster.worker_nodes[0])
    kill(cluster, cluster.worker_nodes[0])
    assert (zray.get(ref, timeout=30) == expected(7)).all()
    assert len(tally) <= 3
    del ref


def test_a_copy_elsewhere_is_as_good(cluster: Cluster, tally: Tally) -> None:
    ref = make.options(resources=on("a")).remote(tally, 7)
    assert zray.get(first.options(resources=on("b")).remote(ref), timeout=30) == 7
    assert (zray.get(ref, timeout=30) == expected(7)).all()
    kill(cluster, node_with(cluster, "a"))
    assert (zray.get(ref, timeout=30) == expected(7)).all()
    assert len(tally) == 1
    del ref


@pytest.mark.parametrize("keep", [False, True])
def test_a_chain_over_nodes_survives_the_death_of_one(cluster: Cluster, tally: Tally, keep: bool) -> None:
    """With all its links referenced, or only the last one."""
    cluster.add_node(num_cpus=2, resources={"a": 100})
    cluster.wait_for_nodes()
    ref = make.options(resources=on("a")).remote(tally, 1)
    kept = [ref]
    for name in "bcabcabc":
        ref = make.options(resources=on(name)).remote(tally, 1, ref)
        if keep:
            kept.append(ref)
    kept = kept if keep else []
    zray.wait([ref], timeout=60, fetch_local=False)
    kill(cluster, node_with(cluster, "c"))
    cluster.add_node(num_cpus=2, resources={"c": 100})
    assert (zray.get(ref, timeout=60) == expected(9)).all()
    if keep:
        assert [int(value[0]) for value in zray.get(kept, timeout=60)] == list(range(1, 10))
        assert len(tally) <= 9 + 3, "only what was lost ran again"
    else:
        assert len(tally) <= 2 * 9
    del ref, kept


def test_a_node_dies_in_the_middle_of_a_chain(cluster: Cluster, tally: Tally, gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def link(value: Any, wait: bool) -> Any:
        tally.add()
        if wait:
            hold.wait()
        return value + 1

    ref = make.options(resources=on("a")).remote(tally, 0)
    for _ in range(3):
        ref = link.options(resources=on("b")).remote(ref, False)
    ref = link.options(resources=on("c")).remote(ref, True)
    ref = link.options(resources=on("a")).remote(ref, False)
    wait_for(lambda: len(tally) == 5, 30, "the one that waits runs")
    kill(cluster, node_with(cluster, "c"))
    kill(cluster, node_with(cluster, "b"))
    cluster.add_node(num_cpus=2, resources={"b": 100, "c": 100})
    hold.open()
    assert (zray.get(ref, timeout=60) == expected(5)).all()
    del ref


def test_a_wide_fan_in_makes_only_what_is_missing(cluster: Cluster, tally: Tally) -> None:
    width = 60
    refs = [make.options(resources=on("abc"[i % 3])).remote(tally, i) for i in range(width)]
    zray.wait(refs, num_returns=width, timeout=60, fetch_local=False)
    kill(cluster, node_with(cluster, "b"))
    cluster.add_node(num_cpus=2, resources={"b": 100})
    total = make.options(resources=on("a")).remote(None, 0, *refs)
    assert zray.get(total, timeout=60)[0] == sum(range(width))
    assert width < len(tally) <= width + width // 3
    del refs, total


def test_references_inside_values_are_made_again(cluster: Cluster, tally: Tally) -> None:
    @zray.remote(num_cpus=0)
    def look_into(box: list[Any]) -> int:
        return int(zray.get(box[0])[0])

    inner = make.options(resources=on("a")).remote(tally, 3)
    zray.wait([inner], timeout=30, fetch_local=False)
    box = zray.put([inner])
    del inner
    kill(cluster, node_with(cluster, "a"))
    cluster.add_node(num_cpus=2, resources={"a": 100})
    assert zray.get(look_into.options(resources=on("b")).remote(box), timeout=60) == 3
    assert len(tally) == 2
    del box


def test_a_result_that_holds_references_is_made_again_with_them(cluster: Cluster) -> None:
    @zray.remote(num_cpus=0)
    def boxed() -> list[Any]:
        return [zray.put(expected(4)), expected(5)]

    ref = boxed.options(resources=on("a")).remote()
    zray.wait([ref], timeout=30, fetch_local=False)
    kill(cluster, node_with(cluster, "a"))
    cluster.add_node(num_cpus=2, resources={"a": 100})
    inner, array = zray.get(ref, timeout=60)
    assert (array == expected(5)).all()
    assert (zray.get(inner, timeout=60) == expected(4)).all()
    del ref, inner, array


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_task_without_retries_is_not_run_again(cluster: Cluster, tally: Tally) -> None:
    ref = make.options(resources=on("a"), max_retries=0).remote(tally, 3)
    zray.wait([ref], timeout=30, fetch_local=False)
    name = ref.hex()
    kill(cluster, node_with(cluster, "a"))
    with pytest.raises(exceptions.ObjectLostError, match="max_retries=0") as caught:
        zray.get(ref, timeout=30)
    assert name in str(caught.value)
    assert len(tally) == 1
    del ref, caught


def test_retries_are_used_up(cluster: Cluster, tally: Tally) -> None:
    ref = make.options(resources=on("a"), max_retries=1).remote(tally, 3)
    for _ in range(2):
        wait_for(lambda: elsewhere() == 1, 30, "the value exists")
        zray.wait([ref], timeout=30, fetch_local=False)
        kill(cluster, node_with(cluster, "a"))
        wait_for(lambda: elsewhere() == 0, 30, "the death is known")
        cluster.add_node(num_cpus=2, resources={"a": 100})
        cluster.wait_for_nodes()
    with pytest.raises(exceptions.ObjectLostError, match="1 times"):
        zray.get(ref, timeout=30)
    assert len(tally) == 2
    del ref


def test_what_a_dead_node_put_is_lost(cluster: Cluster) -> None:
    @zray.remote(num_cpus=0)
    def put() -> list[Any]:
        return [zray.put(expected(4))]

    [inner] = zray.get(put.options(resources=on("a")).remote(), timeout=30)
    zray.wait([inner], timeout=30, fetch_local=False)
    kill(cluster, node_with(cluster, "a"))
    with pytest.raises(exceptions.ObjectLostError, match=inner.hex()):
        zray.get(inner, timeout=30)
    with pytest.raises(exceptions.OwnerDiedError):
        zray.get(inner, timeout=30)
    del inner


def test_what_a_dead_node_had_asked_for_ends_unless_somebody_waits_for_it(
    cluster: Cluster, gate: Callable[[str], Gate], tally: Tally
) -> None:
    wanted, unwanted = gate("wanted"), gate("unwanted")

    @zray.remote(num_cpus=0, resources=on("b"))
    def run(gate: Gate) -> str:
        tally.add(f"{gate.path.name} {os.getpid()}")
        gate.wait()
        return "ran"

    @zray.remote(num_cpus=0, resources=on("b"))
    class Keeper:
        def keep(self, refs: list[Any]) -> None:
            self.refs = refs

        def read(self) -> Any:
            return zray.get(self.refs[0])

    @zray.remote(num_cpus=0, resources=on("a"))
    def ask(keeper: Any) -> None:
        zray.get(keeper.keep.remote([run.remote(wanted)]))
        _lost = run.remote(unwanted)
        zray.get(zray.remote(time.sleep).options(num_cpus=0).remote(1000))

    keeper = Keeper.remote()
    asking = ask.options(max_retries=0).remote(keeper)
    wait_for(lambda: len(tally) == 2, 30, "both run")
    [pid] = [int(line.split()[1]) for line in tally.lines if line.startswith(unwanted.path.name)]
    kill(cluster, node_with(cluster, "a"))
    with pytest.raises(exceptions.NodeDiedError):
        zray.get(asking, timeout=30)
    value = keeper.read.remote()
    wait_for(lambda: not alive(pid), 30, "what nobody waits for ends")
    wanted.open()
    assert zray.get(value, timeout=30) == "ran"
    del keeper, asking, value


def test_who_depends_on_what_cannot_be_made_again_learns_why(cluster: Cluster) -> None:
    lost = make.options(resources=on("a"), max_retries=0).remote(None, 3)
    zray.wait([lost], timeout=30, fetch_local=False)
    after = make.options(resources=on("a")).remote(None, 1, lost)
    zray.wait([after], timeout=30, fetch_local=False)
    name = lost.hex()
    kill(cluster, node_with(cluster, "a"))
    with pytest.raises(exceptions.ObjectLostError, match=name):
        zray.get(after, timeout=30)
    del after, lost


def test_results_of_actors_are_lost_with_them(cluster: Cluster) -> None:
    @zray.remote(num_cpus=0)
    def owner() -> Any:
        @zray.remote(num_cpus=0)
        class Maker:
            def make(self) -> Any:
                return expected(2)

        return Maker.remote()

    maker = zray.get(owner.options(resources=on("a")).remote(), timeout=30)
    ref = maker.make.remote()
    assert zray.wait([ref], timeout=30, fetch_local=False) == ([ref], [])
    kill(cluster, node_with(cluster, "a"))
    with pytest.raises(exceptions.ZrayError):
        zray.get(ref, timeout=30)
    del maker, ref


def test_one_of_several_results_is_made_again(cluster: Cluster, tally: Tally) -> None:
    @zray.remote(num_cpus=0, num_returns=2)
    def two() -> tuple[int, Any]:
        tally.add()
        return 1, expected(2)

    small, large = two.options(resources=on("a")).remote()
    assert zray.get(small, timeout=30) == 1
    zray.wait([large], timeout=30, fetch_local=False)
    kill(cluster, node_with(cluster, "a"))
    cluster.add_node(num_cpus=2, resources={"a": 100})
    assert (zray.get(large, timeout=30) == expected(2)).all()
    assert len(tally) == 2
    del small, large


@pytest.mark.parametrize("ended", [True, False], ids=["its child has ended", "its child runs"])
def test_a_parent_that_branches_differently_each_time(
    cluster: Cluster, gate: Callable[[str], Gate], tally: Tally, ended: bool
) -> None:
    """Runs of a task that differ make children that differ, also when two of them have the same number: the second run on a node that dies
    and the second one for who submitted it. What survivors hold of an earlier run stays what it was."""
    opened = gate("opened")
    if ended:
        opened.open()

    @zray.remote(num_cpus=0, resources=on("b"))
    def child(run: int) -> str:
        tally.add(f"child {run}")
        if run == 2:
            opened.wait()
        return f"made by run {run}"

    @zray.remote(num_cpus=0, resources=on("b"))
    def other(run: int) -> list[int]:
        return [run]

    @zray.remote(num_cpus=0, resources=on("b"))
    class Keeper:
        def __init__(self) -> None:
            self.refs: list[Any] = []

        def keep(self, refs: list[Any], wait: bool) -> None:
            self.refs += refs
            if wait:
                zray.get(self.refs)

        def read(self) -> Any:
            return zray.get(self.refs)

    @zray.remote(num_cpus=0, max_retries=5)
    def parent(keeper: Any) -> Any:
        run = sum(line == "parent" for line in tally.lines) + 1
        tally.add("parent")
        if run == 1:
            os._exit(1)
        made = (child if run == 2 else other).remote(run)
        if run > 2:
            return zray.get(made)
        zray.get(keeper.keep.remote([made], ended))
        tally.add("kept")
        return zray.get(zray.remote(time.sleep).options(num_cpus=0).remote(1000))

    keeper = Keeper.remote()
    first = node_with(cluster, "a")
    near = NodeAffinitySchedulingStrategy(first.node_id, soft=True)
    answer = parent.options(scheduling_strategy=near).remote(keeper)
    wait_for(lambda: {"kept", "child 2"} <= set(tally.lines), 30, "the second run has made its child")
    kill(cluster, first)
    assert zray.get(answer, timeout=60) == [3]
    opened.open()
    assert zray.get(keeper.read.remote(), timeout=30) == ["made by run 2"]
    del keeper, answer
