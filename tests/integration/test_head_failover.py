"""Heads, and other nodes that keep the tables, that are killed, paused, or lost in numbers. Real brokers on the loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.counter import Counter
from tests.helpers import PROJECT, SLACK, alive, query, stop, wait_for, wait_for_replicas
from tests.tcp_relay import Relay
from zray import exceptions
from zray.cluster_utils import Cluster, ClusterNode
from zray.node import running_nodes
from zray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster whose tables are on three nodes, and connects this process to the last of its nodes."""
    clusters: list[Cluster] = []

    def make(nodes: int = 4, **settings: Any) -> Cluster:
        cluster = Cluster(initialize_head=True, replicas=3, **settings)
        clusters.append(cluster)
        for _ in range(nodes - 1):
            cluster.add_node()
        zray.init(address=cluster.worker_nodes[-1].address, namespace="n")
        wait_for_replicas()
        return cluster

    yield make
    if zray.is_initialized():
        zray.shutdown()
    for cluster in clusters:
        cluster.shutdown()


def came_back(pid: int, before: str) -> str:
    """Wait until the process of a node (with the id `before`) that was replaced is a node again, which can be found; return the id that it has now."""

    def again() -> str:
        found = [running.record for running in running_nodes() if running.record.broker_pid == pid]
        return found[0].node if found and found[0].node != before else ""

    return wait_for(again, what="it is back, as another node")


def node_of(cluster: Cluster, name: str) -> ClusterNode:
    return next(node for node in cluster.list_all_nodes() if node.node_id == name)


@zray.remote
def double(x: int) -> int:
    return 2 * x


@zray.remote
def double_later(x: int) -> int:
    time.sleep(0.02)
    return 2 * x


class Writer:
    """Writes keys one after the other from a thread, until it is told to stop."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.twice: list[int] = []
        """Writes of new keys of which the answer says that the key was there already: they were made twice."""
        self.gap = 0.0
        """Longest time between two acknowledgements, in seconds."""
        self._ends = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ends:
            if not zray.kv.put(f"w{self.acknowledged}", b"%d" % self.acknowledged, overwrite=False):
                self.twice.append(self.acknowledged)
            self.acknowledged += 1
            now = time.monotonic()
            self.gap = max(self.gap, now - last)
            last = now

    def wait_for_more(self, count: int) -> None:
        wanted = self.acknowledged + count
        wait_for(lambda: self.acknowledged >= wanted, what="writes go on")

    def finish(self) -> None:
        self._ends = True
        self._thread.join()


def test_whoever_keeps_the_tables_is_killed_under_load(start: Callable[..., Cluster]) -> None:
    cluster = start()
    driver = cluster.worker_nodes[2]
    mine = Counter.options(name="mine", num_cpus=0).remote()  # type: ignore[call-arg]
    calls = [mine.add.remote(1)]
    assert zray.get(calls[0]) == 1
    writer = Writer()
    try:
        for part in (2, 1, 0, 0):  # the tail, the middle, the head, and the head that took its place
            victim = node_of(cluster, [name for name in wait_for_replicas() if name != driver.node_id][part])
            tasks = [double_later.remote(n) for n in range(30)]
            writer.wait_for_more(20)
            writer.gap = 0.0
            victim.kill()
            calls += [mine.add.remote(1) for _ in range(10)]
            writer.wait_for_more(20)
            gap = writer.gap
            assert zray.get(tasks, timeout=30) == [2 * n for n in range(30)]
            wait_for(
                lambda victim=victim: (
                    victim.node_id not in [row["NodeID"] for row in zray.nodes() if row["Alive"]]
                    and not query("cluster")["head_lost"]
                )
            )
            print(f"part {part} of the chain was killed: longest gap between writes {1000 * gap:.1f} ms")
            cluster.add_node()
    finally:
        writer.finish()
    assert not writer.twice
    assert zray.get(calls, timeout=30) == list(range(1, len(calls) + 1)), "the actor was not disturbed"
    assert zray.get(zray.get_actor("mine").add.remote(0)) == len(calls)
    found = [zray.kv.get(f"w{number}") for number in range(writer.acknowledged)]
    assert found == [b"%d" % number for number in range(writer.acknowledged)]
    wait_for_replicas()
    place = query("cluster")
    assert place["head"] == place["replicas"][0]
    told = subprocess.run(
        [sys.executable, "-m", "zray.cli", "status", "--address", driver.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "tables on 3 of 3 nodes: " + place["head"][:8] in told
    assert "(head)" in told


def test_what_the_dead_head_owned_and_who_was_connected_elsewhere(start: Callable[..., Cluster]) -> None:
    cluster = start(node_timeout=2.0 * SLACK)
    head = cluster.head_node
    assert head is not None
    dies_too = cluster.add_node()
    Counter.options(name="kept", lifetime="detached", num_cpus=0).remote(100)  # type: ignore[call-arg]
    assert zray.get(zray.get_actor("kept").add.remote(5)) == 105
    mine = Counter.options(name="mine", num_cpus=0).remote(7)  # type: ignore[call-arg]
    assert zray.get(mine.add.remote(1)) == 8
    zray.kv.put("colour", b"green")
    zray.shutdown()

    # A client, to which the head is behind a tunnel.
    tunnel = Relay(cluster.address)
    try:
        zray.init(address=tunnel.address, cluster_key=cluster._key_file(), namespace="n")
        theirs = Counter.options(name="theirs", num_cpus=1).remote(20)  # type: ignore[call-arg]
        assert zray.get(theirs.add.remote(1)) == 21
        waiting = double_later.remote(21)
        where = zray.get(theirs.place.remote())
        gone = [head.node_id, dies_too.node_id]
        head.kill()
        dies_too.kill()
        assert zray.kv.get("colour") == b"green"
        wait_for(
            lambda: sorted(row["NodeID"] for row in zray.nodes() if not row["Alive"]) == sorted(gone),
            what="the next head finds that another node has died, too",
        )
        assert zray.get(zray.get_actor("kept").add.remote(1), timeout=30) == 101, "made again, by its constructor"
        if where not in gone:
            assert zray.get(theirs.add.remote(1), timeout=30) == 22
        assert zray.get(waiting, timeout=30) == 42
        assert zray.get([double.remote(n) for n in range(5)], timeout=30) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="Failed to look up"):
            zray.get_actor("mine")  # its driver has left
        zray.kill(zray.get_actor("kept"))
        zray.shutdown()
    finally:
        if zray.is_initialized():
            zray.shutdown()
        tunnel.close()


_OLD_DRIVER = """
import sys, zray
zray.init(address=sys.argv[1], namespace="n", log_to_driver=False)
zray.kv.put("said", b"before")
print("ready", flush=True)
sys.stdin.readline()
try:
    zray.kv.put("said", b"late")
    print("acknowledged", flush=True)
except zray.exceptions.ZrayError as error:
    print("refused:", error, flush=True)
try:
    zray.kv.get("said")
    print("answered", flush=True)
except zray.exceptions.ZrayError as error:
    print("again:", type(error).__name__, flush=True)
zray.shutdown()
sys.stdin.readline()
zray.init(address=sys.argv[1], namespace="n", log_to_driver=False)
print(zray.get_runtime_context().get_node_id(), zray.kv.get("said"), flush=True)
"""


def test_a_head_that_sleeps_longer_than_its_lease_comes_back_as_an_ordinary_node(start: Callable[..., Cluster]) -> None:
    cluster = start(node_timeout=4.0 * SLACK)
    old = cluster.head_node
    assert old is not None
    program = subprocess.Popen(
        [sys.executable, "-c", _OLD_DRIVER, old.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "ready\n"
        mine = Counter.options(name="mine", num_cpus=0).remote()  # type: ignore[call-arg]
        assert zray.get(mine.add.remote(1)) == 1
        stop(old.pid)
        program.stdin.write("\n")
        program.stdin.flush()
        zray.kv.put("colour", b"green")  # waits until there is another head
        wait_for_replicas(but=old.node_id)
        place = query("cluster")
        assert place["head"] != old.node_id
        os.kill(old.pid, signal.SIGCONT)
        refusal = program.stdout.readline()
        assert "another node has become the head" in refusal
        assert "begins again as an ordinary node" in refusal
        assert program.stdout.readline() == "again: ZraySystemError\n"
        back = came_back(old.pid, old.node_id)
        program.stdin.close()
        assert program.stdout.readline() == f"{back} b'before'\n", "the same program, at the same address"
    finally:
        program.stdin.close()
        program.wait(20)
        program.stdout.close()
    assert zray.kv.get("said") == b"before", "what it was asked when it woke never happened"
    assert zray.kv.get("colour") == b"green"
    assert query("cluster")["head"] == place["head"]
    assert zray.get(mine.add.remote(1)) == 2
    there = double.options(scheduling_strategy=NodeAffinitySchedulingStrategy(back, soft=False))  # type: ignore[attr-defined]
    assert zray.get(there.remote(4), timeout=30) == 8
    assert "node:__internal_head__" not in zray.cluster_resources()


def test_heads_sleep_one_after_the_other_and_all_come_back(start: Callable[..., Cluster]) -> None:
    cluster = start(nodes=3, node_timeout=2.0 * SLACK)
    driver = cluster.worker_nodes[-1]
    first = cluster.head_node
    assert first is not None
    zray.kv.put("colour", b"green")
    for life in range(3):
        head = next(row for row in zray.nodes() if row["NodeID"] == query("cluster")["head"])
        if head["NodeID"] == driver.node_id:
            break
        stop(head["broker_pid"])
        zray.kv.put(f"n{life}", b"kept")
        os.kill(head["broker_pid"], signal.SIGCONT)
        came_back(head["broker_pid"], head["NodeID"])
        wait_for_replicas(but=head["NodeID"])
    assert life
    assert zray.kv.get("colour") == b"green"
    assert [zray.kv.get(f"n{number}") for number in range(life)] == [b"kept"] * life
    assert sorted(os.listdir(first._node.directory)) == ["alive", "broker.log", "cluster.key"]
    log = Path(first._node.directory, "broker.log").read_text()
    assert "the node ends: another node has become the head" in log
    assert "begins again as node" in log
    found = subprocess.run(
        [sys.executable, "-m", "zray.cli", "status", "--address", first.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    processes = [node.pid for node in cluster.list_all_nodes()]
    cluster.shutdown()
    assert not any(alive(pid) for pid in processes)
    assert not {node.record.broker_pid for node in running_nodes()} & set(processes)
    assert not os.path.exists(first._node.directory)


def test_without_a_majority_nodes_wait_and_then_end(start: Callable[..., Cluster]) -> None:
    cluster = start(head_grace=2.0)
    names = wait_for_replicas()
    driver = cluster.worker_nodes[-1]
    waiting = zray.remote(time.sleep).remote(60)
    victims = [node_of(cluster, name) for name in names[:2]]
    for victim in victims:  # both at once: of one alone the others would notice, and invite a third
        os.kill(victim.pid, signal.SIGKILL)
    for victim in victims:
        victim.kill()
    with pytest.raises(exceptions.ZraySystemError, match=r"within 2 s\. Most of the nodes that kept"):
        zray.get(waiting, timeout=30)
    for node in [node_of(cluster, names[2]), driver]:
        wait_for(lambda node=node: not alive(node.pid), what="the node has ended")


def test_a_head_alone_ends_too(start: Callable[..., Cluster]) -> None:
    cluster = start(nodes=3, head_grace=1.0)
    zray.shutdown()
    zray.init(address=cluster.address)
    for node in cluster.worker_nodes:
        os.kill(node.pid, signal.SIGKILL)
    with pytest.raises(exceptions.ZraySystemError, match=r"for 1 s has not reached enough of the nodes"):
        for number in range(1 << 20):
            zray.kv.put("n", b"%d" % number)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 2}, "1 or 3 replicas, not 2"),
        ({"replicas": 3, "storage": "sqlite:x"}, "either replicas or storage"),
        ({"replicas": 3, "head_grace": 0.0}, "head_grace must be above 0"),
    ],
)
def test_replicas_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cluster(initialize_head=True, **settings)
