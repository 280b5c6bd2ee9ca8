"""Tasks on other nodes: arguments, results, errors, references, cancelling, deaths; and that nothing of it is left."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, Program, Tally, query, wait_for
from tests.reach import ReachedCluster
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zray.cluster_utils import Cluster


@pytest.fixture
def cluster(way: str) -> Iterator[Cluster]:
    """A head without CPUs and one node with two; this process is connected to the head, or from outside."""
    with ReachedCluster(way, initialize_head=True, head_node_args={"num_cpus": 0}) as found:
        found.add_node(num_cpus=2, resources={"wheels": 1})
        found.connect()
        found.wait_for_nodes()
        yield found
        wait_nothing_is_owed()


def wait_nothing_is_owed() -> None:
    """References that crossed nodes have all gone back. (Code stays on the other node as long as its job.)"""
    if zray.is_initialized():
        wait_for(lambda: not query("statistics")["objects_borrowed"], 5, "nothing is borrowed")
        wait_for(lambda: query("statistics")["used"] < 1 << 20, 5, f"no value is left: {query('statistics')}")


@zray.remote
def node_of(value: Any = None) -> tuple[str, Any]:
    return zray.get_runtime_context().get_node_id(), value


@zray.remote
def total(array: Any) -> float:
    return float(array.sum())


def test_tasks_run_where_there_are_cpus(cluster: Cluster) -> None:
    away = cluster.worker_nodes[0].node_id
    assert zray.get(node_of.remote("x"), timeout=30) == (away, "x")
    found = zray.get([node_of.remote(i) for i in range(2000)], timeout=60)
    assert found == [(away, i) for i in range(2000)]


def test_all_nodes_share_the_work(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    hold = gate("hold")

    @zray.remote
    def where() -> str:
        hold.wait()
        return zray.get_runtime_context().get_node_id()

    refs = [where.remote() for _ in range(4)]
    wait_for(lambda: zray.available_resources().get("CPU", 0) == 0, what="all four run at once")
    hold.open()
    places = zray.get(refs, timeout=30)
    assert sorted(places.count(node.node_id) for node in cluster.worker_nodes) == [2, 2]


@pytest.mark.parametrize("size", [10, 100_000, 3_000_000])
def test_arguments_and_results_of_all_sizes(cluster: Cluster, size: int) -> None:
    array = np.arange(size, dtype=np.float64)
    ref = zray.put(array)
    assert zray.get(total.remote(ref), timeout=60) == array.sum()
    assert zray.get(total.remote(array), timeout=60) == array.sum()
    back = zray.get(zray.remote(lambda x: x * 2).remote(ref), timeout=60)
    assert (back == array * 2).all()
    del back, ref


def test_several_results(cluster: Cluster) -> None:
    one, two = zray.remote(lambda: (1, np.ones(100_000))).options(num_returns=2).remote()
    assert zray.get(one, timeout=30) == 1
    assert zray.get(two, timeout=30).sum() == 100_000


def test_chains_of_results(cluster: Cluster) -> None:
    increase = zray.remote(lambda x: x + 1)
    ref = zray.put(0)
    for _ in range(30):
        ref = increase.remote(ref)
    assert zray.get(ref, timeout=60) == 30


def test_errors_come_back_as_themselves(cluster: Cluster) -> None:
    class Odd(ValueError):
        pass

    @zray.remote(max_retries=0)
    def fail() -> None:
        raise Odd("there")

    with pytest.raises(ValueError, match="there"):
        zray.get(fail.remote(), timeout=30)


def test_exceptions_that_are_retried(cluster: Cluster, tally: Tally) -> None:
    @zray.remote(max_retries=3, retry_exceptions=True)
    def third_time() -> int:
        if tally.add() < 3:
            raise ValueError
        return len(tally)

    assert zray.get(third_time.remote(), timeout=30) == 3


def test_a_worker_that_dies_there_is_replaced_there(cluster: Cluster, tally: Tally) -> None:
    @zray.remote
    def dies_once() -> int:
        if tally.add() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(tally)

    assert zray.get(dies_once.remote(), timeout=30) == 2

    @zray.remote(max_retries=1)
    def always() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerCrashedError, match="SIGKILL"):
        zray.get(always.remote(), timeout=30)


def test_references_inside_arguments_and_results(cluster: Cluster) -> None:
    @zray.remote
    def open_box(box: list[Any]) -> list[Any]:
        return [float(zray.get(box[0]).sum()), zray.put(np.ones(50_000)), box[0]]

    inner = zray.put(np.full(50_000, 2.0))
    number, made_there, same = zray.get(open_box.remote([inner]), timeout=30)
    assert number == 100_000
    assert zray.get(made_there, timeout=30).sum() == 50_000
    assert same == inner
    again = zray.get(total.remote(made_there), timeout=30)  # back to where it was made
    assert again == 50_000


def test_tasks_of_tasks(cluster: Cluster) -> None:
    @zray.remote
    def parent(n: int) -> int:
        return sum(value for _, value in zray.get([node_of.remote(i) for i in range(n)]))

    assert zray.get(parent.remote(20), timeout=60) == 190


def test_values_that_are_not_there_yet(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote
    def late() -> int:
        hold.wait()
        return 5

    @zray.remote
    def reads(box: list[Any]) -> int:
        return int(zray.get(box[0])) + 1

    ref = late.remote()
    after = reads.remote([ref])
    assert zray.wait([after], timeout=0.3) == ([], [after])
    hold.open()
    assert zray.get(after, timeout=30) == 6


def test_what_only_one_node_has(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=4)
    cluster.wait_for_nodes()
    needs = node_of.options(resources={"wheels": 1})
    assert {zray.get(needs.remote(), timeout=30)[0] for _ in range(5)} == {cluster.worker_nodes[0].node_id}


def test_what_no_node_has_waits_for_one_that_does(cluster: Cluster) -> None:
    ref = node_of.options(resources={"wings": 1}).remote()
    assert zray.wait([ref], timeout=0.3) == ([], [ref])
    node = cluster.add_node(num_cpus=1, resources={"wings": 1})
    assert zray.get(ref, timeout=30)[0] == node.node_id


def test_cancelling(cluster: Cluster, tally: Tally) -> None:
    @zray.remote
    def endless() -> None:
        tally.add()
        while True:
            time.sleep(0.01)

    for begun, force in ((1, False), (2, True)):
        ref = endless.remote()
        wait_for(lambda begun=begun: len(tally) == begun)
        zray.cancel(ref, force=force)
        with pytest.raises(exceptions.TaskCancelledError):
            zray.get(ref, timeout=30)
    wait_for(lambda: zray.available_resources().get("CPU") == 2, what="the CPUs there are free again")


def test_tasks_of_a_node_that_is_killed_run_elsewhere(
    cluster: Cluster, tally: Tally, gate: Callable[[str], Gate]
) -> None:
    hold = gate("hold")

    @zray.remote
    def work(i: int) -> tuple[str, int]:
        tally.add()
        hold.wait()
        return zray.get_runtime_context().get_node_id(), i

    refs = [work.remote(i) for i in range(4)]
    wait_for(lambda: len(tally) == 2)
    victim = cluster.worker_nodes[0]
    rescue = cluster.add_node(num_cpus=2)
    wait_for(lambda: len(tally) == 4)
    victim.kill()
    hold.open()
    assert zray.get(refs, timeout=60) == [(rescue.node_id, i) for i in range(4)]


def test_a_task_that_may_not_be_retried_fails_with_its_node(cluster: Cluster, tally: Tally) -> None:
    @zray.remote(max_retries=0)
    def endless() -> None:
        tally.add()
        time.sleep(1000)

    ref = endless.remote()
    wait_for(lambda: len(tally) == 1)
    cluster.worker_nodes[0].kill()
    with pytest.raises(exceptions.NodeDiedError, match="port refuses"):
        zray.get(ref, timeout=30)


def test_values_that_only_a_dead_node_had_are_lost(cluster: Cluster) -> None:
    @zray.remote
    def put_there() -> list[Any]:
        return [zray.put(np.ones(3_000_000))]

    [ref] = zray.get(put_there.remote(), timeout=30)
    zray.get(ref, timeout=30)
    cluster.worker_nodes[0].kill()
    assert zray.get(ref, timeout=30).sum() == 3_000_000, "this node has a copy"


def test_a_driver_that_ends_takes_its_tasks_along(cluster: Cluster, tally: Tally) -> None:
    @zray.remote
    def endless() -> None:
        tally.add(os.getpid())
        time.sleep(1000)

    ref = endless.remote()
    wait_for(lambda: len(tally) == 1)
    pid = int(tally.lines[0])
    zray.shutdown()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"), what="the worker on the other node has ended")
    del ref
    cluster.connect()
    assert zray.get(node_of.remote(1), timeout=30)[1] == 1


def test_everything_that_crossed_goes_when_nobody_refers_to_it(cluster: Cluster) -> None:
    refs = [zray.put(np.full(20_000, i)) for i in range(30)]
    assert zray.get([total.remote(ref) for ref in refs], timeout=60) == [20_000.0 * i for i in range(30)]
    results = [zray.remote(np.ones).remote(20_000) for _ in range(30)]
    zray.wait(results, num_returns=30, timeout=60)
    del refs, results
    wait_nothing_is_owed()
    zray.shutdown()
    zray.init(address=cluster.worker_nodes[0].address)
    wait_for(lambda: query("statistics")["guests"] == 0)
    wait_nothing_is_owed()


def test_the_books_of_both_nodes_hold_after_much_work(cluster: Cluster) -> None:
    refs = [node_of.remote(i) for i in range(500)]
    more = [total.remote(zray.put(np.ones(100 * i))) for i in range(100)]
    zray.get(refs + more, timeout=60)
    assert not query("check")
    zray.shutdown()
    zray.init(address=cluster.worker_nodes[0].address)
    assert not query("check")


def test_output_of_other_nodes_comes_before_get_returns(program: Callable[..., Program]) -> None:
    running = program(
        """
from zray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, resources={"there": 4})
cluster.connect()
@zray.remote(resources={"there": 1}, num_cpus=0)
def speak(i):
    print(f"hello {i}")
    print(f"worry {i}", file=sys.stderr)
    return zray.get(deeper.remote(i)) if i % 5 == 0 else 0
@zray.remote(num_cpus=0)
def deeper(i):
    print(f"deeper {i}")
@zray.remote(resources={"there": 1}, num_cpus=0)
class Speaker:
    def speak(self, i):
        print(f"actor {i}")
for i in range(10):
    zray.get(speak.remote(i))
    print("after", i)
speaker = Speaker.remote()
for i in range(10):
    zray.get(speaker.speak.remote(i))
    print("after actor", i)
zray.shutdown()
cluster.shutdown()
"""
    )
    lines = running.succeed(timeout=120).splitlines()
    for i in range(10):
        before = lines[: lines.index(f"after {i}")]
        assert re.fullmatch(
            r"\(speak pid=\d+, ip=127\.0\.0\.1\) hello .*", next(x for x in before if x.endswith(f"hello {i}"))
        )
        assert i % 5 or any(x.endswith(f"deeper {i}") for x in before)
        assert any(x.endswith(f"actor {i}") for x in lines[: lines.index(f"after actor {i}")])
    assert len(re.findall(r"\(speak pid=\d+, ip=127\.0\.0\.1\) worry", running.err)) == 10
