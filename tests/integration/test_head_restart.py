"""Heads that pause, die and come back: what nodes, drivers and tables make of it. Real brokers on the loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.counter import Counter
from tests.helpers import alive, all_processes_of, query, stop, wait_for
from zray import wire
from zray.cluster_utils import Cluster, ClusterNode
from zray.gcs.client import GcsClient
from zray.gcs.tables import ActorRow, ActorState, JobRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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
    cluster = start(node_timeout=2.0, head_grace=30.0)
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
    with pytest.raises(zray.exceptions.ZraySystemError, match=r"did not come back within 1\.5 s\. Start it again"):
        zray.get(waiting, timeout=20)
    wait_for(lambda: not alive(node.pid), 5.0, "the node has ended")
    zray.shutdown()


# -- heads with storage ------------------------------------------------------------------------------------------------------


def kill_all_of(node: ClusterNode) -> None:
    """SIGKILL for the broker of a node and for every process that it has started."""
    found = all_processes_of(node.pid)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    node._node.process.wait()
    for pid in found:
        wait_for(lambda pid=pid: not alive(pid), what=f"process {pid} is gone")


@pytest.fixture
def stored(start: Callable[..., Cluster], tmp_path: Path) -> Callable[..., Cluster]:
    """A function that starts a cluster whose head keeps its tables in a file."""
    return lambda others=1, **settings: start(others, storage=f"sqlite:{tmp_path / 'gcs.db'}", **settings)


def test_a_program_on_another_node_outlives_the_head(stored: Callable[..., Cluster]) -> None:
    cluster = stored(head_node_args={"num_cpus": 1}, head_grace=60.0)
    head, [node] = head_of(cluster), cluster.worker_nodes
    zray.init(address=cluster.address, namespace="n")
    lineage = zray.get([double.remote(n) for n in range(5)])
    assert lineage == [0, 2, 4, 6, 8]
    tasks = {row["task_id"] for row in query("tasks")}
    assert len(tasks) == 5
    Counter.options(name="kept", lifetime="detached", num_cpus=0).remote(100)  # type: ignore[call-arg]
    kept = zray.get_actor("kept")
    assert zray.get(kept.add.remote(5)) == 105
    old_place = zray.get(kept.place.remote())
    wait_for(lambda: query("cluster")["is_stored"], what="the lineage is stored")
    zray.shutdown()

    zray.init(address=node.address, namespace="n")
    zray.kv.put("colour", b"green")
    mine = Counter.options(name="mine", num_cpus=0).remote(7)  # type: ignore[call-arg]
    assert zray.get(mine.add.remote(1)) == 8
    pid = zray.get(mine.pid.remote())
    running = zray.remote(lambda: time.sleep(3) or "done").options(num_cpus=1).remote()
    kill_all_of(head)
    wait_for(lambda: query("cluster")["head_lost"], what="the head is lost")
    assert zray.get(mine.add.remote(1)) == 9, "what needs no head goes on"
    next_head = cluster.restart_head(num_cpus=1)
    assert next_head.address == head.address
    assert next_head.node_id != head.node_id
    assert zray.kv.get("colour") == b"green", "asked while the node came back"
    cluster.wait_for_nodes()
    assert zray.get(running) == "done"
    assert zray.get(mine.add.remote(1)) == 10
    assert zray.get(zray.get_actor("mine").pid.remote()) == pid
    again = zray.get_actor("kept")
    assert zray.get(again.add.remote(1)) == 101, "made again: its state is that of its constructor"
    assert zray.get(again.place.remote()) != old_place or old_place == node.node_id
    assert zray.get([double.options(num_cpus=1).remote(n) for n in range(20)]) == [2 * n for n in range(20)]
    zray.kv.put("colour", b"blue")
    zray.shutdown()

    zray.init(address=next_head.address, namespace="n")
    assert zray.kv.get("colour") == b"blue"
    assert tasks <= {row["task_id"] for row in query("tasks")}, "lineage of the last life"
    assert {row["name"]: row["state"] for row in query("actors") if row["state"] == "ALIVE"}["kept"] == "ALIVE"
    zray.kill(zray.get_actor("kept"))


def test_everything_killed_and_started_again(stored: Callable[..., Cluster]) -> None:
    cluster = stored(head_grace=1.5)
    [node] = cluster.worker_nodes
    zray.init(address=node.address, namespace="n")
    Counter.options(name="kept", lifetime="detached", num_cpus=0).remote(40)  # type: ignore[call-arg]
    kept = zray.get_actor("kept")
    assert zray.get(kept.add.remote(1)) == 41
    for number in range(50):
        zray.kv.put(f"k{number}", b"%d" % number)
    job = zray.api.current_session().job
    zray.shutdown()
    zray.init(address=cluster.address, namespace="n")
    head_job = zray.api.current_session().job
    for victim in (head_of(cluster), node):
        kill_all_of(victim)
    zray.shutdown()
    cluster.worker_nodes.clear()
    node._node.stop(quiet=True)

    cluster.restart_head(num_cpus=1)
    zray.init(address=cluster.address, namespace="n")
    assert [zray.kv.get(f"k{number}") for number in range(50)] == [b"%d" % number for number in range(50)]
    again = zray.get_actor("kept")
    assert zray.get(again.add.remote(1)) == 41
    wait_for(lambda: state_of(node) == "DEAD", what="the node that does not return is dead")
    assert zray.api.current_session().job > head_job, "numbers of jobs go on"
    assert job >> 20 == 1
    newcomer = cluster.add_node()
    zray.shutdown()
    zray.init(address=newcomer.address)
    assert zray.api.current_session().job >> 20 == 2, "so do those of nodes"
    zray.shutdown()
    # Twice is no other than once.
    for victim in (head_of(cluster), newcomer):
        kill_all_of(victim)
    cluster.worker_nodes.clear()
    newcomer._node.stop(quiet=True)
    cluster.restart_head(num_cpus=1)
    zray.init(address=cluster.address, namespace="n")
    assert zray.get(zray.get_actor("kept").add.remote(1)) == 41
    zray.kill(zray.get_actor("kept"))
    wait_for(lambda: not any(row["state"] == "ALIVE" for row in query("actors")))
    zray.shutdown()
    kill_all_of(head_of(cluster))
    cluster.restart_head(num_cpus=1)
    zray.init(address=cluster.address, namespace="n")
    with pytest.raises(ValueError, match="Failed to look up"):
        zray.get_actor("kept")


def test_a_second_head_is_refused(stored: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = stored(0)
    stop(head_of(cluster).pid)
    second = Cluster(storage=f"sqlite:{tmp_path / 'gcs.db'}")
    with pytest.raises(zray.exceptions.ZraySystemError, match="in use by another process") as caught:
        second.add_node()
    assert "\n" not in str(caught.value)
    os.kill(head_of(cluster).pid, signal.SIGCONT)
    cluster.connect()
    assert query("cluster")["storage"] == "sqlite"


def test_a_head_without_the_storage_takes_nobody_back(start: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start(head_grace=20.0, key_file=str(tmp_path / "key"))
    [node] = cluster.worker_nodes
    kill_all_of(head_of(cluster))
    cluster.restart_head()
    wait_for(lambda: not alive(node.pid), what="the node has ended")


def test_jobs_and_named_actors_of_all_nodes_are_in_the_heads_tables(stored: Callable[..., Cluster]) -> None:
    cluster = stored()
    [node] = cluster.worker_nodes
    zray.init(address=node.address, namespace="n")
    mine = Counter.options(name="mine", num_cpus=0).remote()
    zray.get(mine.add.remote(1))
    zray.get(Counter.options(num_cpus=0).remote().add.remote(1))
    rows = GcsClient(lambda body: zray.api.current_session().request(lambda reply: wire.GcsRequest(body, reply)))
    wait_for(lambda: [row.name for row in rows.rows(ActorRow) if row.state == ActorState.ALIVE] == ["mine"])
    assert [(row.node.hex(), row.running) for row in rows.rows(JobRow)] == [(node.node_id, True)]
    zray.shutdown()
    cluster.connect()
    rows = GcsClient(lambda body: zray.api.current_session().request(lambda reply: wire.GcsRequest(body, reply)))
    wait_for(lambda: [row.running for row in rows.rows(JobRow) if row.node.hex() == node.node_id] == [False])
    wait_for(lambda: [row.state for row in rows.rows(ActorRow) if row.name == "mine"] == [ActorState.DEAD])


# -- the command line ----------------------------------------------------------------------------------------------------------


def zray_command(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "zray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == check, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_a_head_with_storage_by_commands(tmp_path: Path) -> None:
    start = ["start", "--head", "--host", "127.0.0.1", "--num-cpus", "1", "--storage", f"sqlite:{tmp_path / 'gcs.db'}"]
    for life in (1, 2):
        told = zray_command(*start)
        assert str(tmp_path / "gcs.db.key") in told
        try:
            assert "storage: sqlite\n" in zray_command("status")
            with zray.init(address="auto"):
                assert zray.kv.get("life") == (None if life == 1 else b"1")
                zray.kv.put("life", b"%d" % life)
        finally:
            assert "has ended" in zray_command("stop")
    assert sorted(os.listdir(tmp_path)) == ["gcs.db", "gcs.db.key"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start", "--head", "--storage", "mysql:x"], "no storage is called 'mysql:x'"),
        (["start", "--address", "127.0.0.1:9", "--key", "k", "--storage", "sqlite:x"], "only the head keeps tables"),
        (["start", "--head", "--host", "127.0.0.1", "--storage", "sqlite:/dev/null/x"], "Not a directory"),
        (["start", "--head", "--host", "127.0.0.1", "--storage", "sqlite:x?sync=off"], "sync='off'"),
    ],
)
def test_storage_that_cannot_be(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    told = zray_command(*arguments, check=False)
    assert words in told
    assert "Traceback" not in told
