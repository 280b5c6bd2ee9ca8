"""Nodes that join, beat, pause, leave and die: real brokers on the loopback address."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import zray
from tests.helpers import Gate, alive, all_processes_of, query, stop, wait_for
from tests.reach import ReachedCluster
from zray import exceptions
from zray import node as nodes_
from zray.cluster_utils import Cluster, ClusterNode
from zray.peer_transport import ClusterKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster and connects to its head."""
    clusters: list[Cluster] = []

    def make(others: int = 0, **settings: Any) -> Cluster:
        cluster = Cluster(initialize_head=True, **settings)
        clusters.append(cluster)
        for _ in range(others):
            cluster.add_node()
        cluster.connect()
        cluster.wait_for_nodes()
        return cluster

    yield make
    for cluster in clusters:
        cluster.shutdown()


def states() -> dict[str, str]:
    return {row["NodeID"]: row["state"] for row in zray.nodes()}


def wait_state(node: ClusterNode, state: str, timeout: float = 15.0) -> None:
    wait_for(lambda: states().get(node.node_id) == state, timeout, f"{node} is {state}")


def row_of(node: ClusterNode) -> dict[str, Any]:
    return next(row for row in zray.nodes() if row["NodeID"] == node.node_id)


def test_nodes_join_and_are_seen_by_all(start: Callable[..., Cluster]) -> None:
    cluster = start()
    assert [row["is_head"] for row in zray.nodes()] == [True]
    first = cluster.add_node(num_cpus=3, resources={"wheels": 4}, labels={"zone": "east"})
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    assert zray.cluster_resources()["CPU"] == 6
    assert zray.cluster_resources()["wheels"] == 4
    wait_for(lambda: zray.available_resources()["CPU"] == 6, what="what is free everywhere is known")
    assert row_of(first)["Labels"] == {"zone": "east"}
    assert row_of(first)["Resources"]["CPU"] == 3
    assert len({row["address"] for row in zray.nodes()}) == 3
    zray.shutdown()
    for node in (first, second):  # every node sees the same
        zray.init(address=node.address)
        assert zray.nodes()[0]["NodeID"] == node.node_id
        cluster.wait_for_nodes()
        assert zray.cluster_resources()["CPU"] == 6
        assert [row["NodeID"] for row in zray.nodes() if row["is_head"]] == [cluster.list_all_nodes()[0].node_id]
        assert zray.get(zray.remote(lambda: 7).remote()) == 7
        zray.shutdown()


def test_to_wait_for_nodes_needs_no_connection_and_leaves_none() -> None:
    with Cluster(initialize_head=True) as cluster:
        cluster.add_node()
        cluster.wait_for_nodes()
        assert not zray.is_initialized()


def test_a_node_that_is_killed_is_dead_at_once(start: Callable[..., Cluster]) -> None:
    cluster = start(2)
    victim, other = cluster.worker_nodes
    victim.kill()
    wait_state(victim, "DEAD", 5.0)
    assert "port refuses" in row_of(victim)["reason"]
    assert states()[other.node_id] == "ALIVE"
    assert zray.cluster_resources()["CPU"] == 2
    assert row_of(victim)["Alive"] is False


def test_a_node_that_leaves_says_so(start: Callable[..., Cluster]) -> None:
    cluster = start(1)
    [node] = cluster.worker_nodes
    cluster.remove_node(node)
    wait_state(node, "DEAD")
    wait_for(lambda: len([row for row in zray.nodes() if row["Alive"]]) == 1)


def test_a_pause_makes_a_node_silent_and_nothing_worse(start: Callable[..., Cluster]) -> None:
    cluster = start(1)
    [node] = cluster.worker_nodes
    stop(node.pid)
    wait_state(node, "SILENT")
    os.kill(node.pid, signal.SIGCONT)
    wait_state(node, "ALIVE")
    assert alive(node.pid)


@zray.remote(resources={"there": 1})
class Ledger:
    def __init__(self) -> None:
        self.entries: list[int] = []

    def add(self, entry: int) -> int:
        self.entries.append(entry)
        return len(self.entries)

    def all(self) -> list[int]:
        return self.entries


@zray.remote(resources={"there": 1})
def squares(count: int) -> Any:
    return numpy.arange(count) ** 2


@pytest.mark.soak
@pytest.mark.parametrize("stopped", ["the head", "another node"])
def test_a_node_that_is_stopped_for_twenty_seconds_loses_nothing(stopped: str) -> None:
    with Cluster() as cluster:
        there, here = {"resources": {"there": 3}}, {}
        head = cluster.add_node(num_cpus=2, **(there if stopped == "the head" else here))
        other = cluster.add_node(num_cpus=2, **(here if stopped == "the head" else there))
        cluster.wait_for_nodes()
        node, its_friend = (head, other) if stopped == "the head" else (other, head)
        zray.init(address=its_friend.address)
        # (Nobody but the head judges how others are, and nobody judges the head before it is lost.)
        _stop_for_twenty_seconds(node, expected="ALIVE" if node is head else "SILENT")


def _stop_for_twenty_seconds(node: ClusterNode, expected: str) -> None:
    ledger = Ledger.remote()
    assert zray.get(ledger.add.remote(0)) == 1
    kept = squares.remote(300_000)  # its value stays there
    zray.wait([kept], fetch_local=False)
    processes = all_processes_of(node.pid)
    for pid in processes:
        stop(pid)
    calls = [ledger.add.remote(entry) for entry in range(1, 2001)]
    tasks = [squares.remote(count) for count in range(1000)]
    time.sleep(20)
    assert states()[node.node_id] == expected
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    wait_state(node, "ALIVE")
    assert zray.get(calls, timeout=60) == list(range(2, 2002))
    assert zray.get(ledger.all.remote(), timeout=60) == list(range(2001))
    assert [int(found.sum()) for found in zray.get(tasks, timeout=60)] == [
        (n - 1) * n * (2 * n - 1) // 6 for n in range(1000)
    ]
    assert numpy.array_equal(zray.get(kept, timeout=60), numpy.arange(300_000) ** 2)


def test_a_node_that_was_declared_dead_is_fenced(start: Callable[..., Cluster]) -> None:
    cluster = start(1, node_timeout=2.0)
    [node] = cluster.worker_nodes
    stop(node.pid)
    wait_state(node, "DEAD")
    assert "not heard of" in row_of(node)["reason"]
    os.kill(node.pid, signal.SIGCONT)
    wait_for(lambda: not alive(node.pid), what="it learns that it is dead, and ends")
    assert states()[node.node_id] == "DEAD"
    cluster.add_node()
    cluster.remove_node(node)
    cluster.wait_for_nodes()


def test_nodes_end_with_their_head(start: Callable[..., Cluster]) -> None:
    cluster = start(2)
    others = [node.pid for node in cluster.worker_nodes]
    zray.shutdown()
    head = cluster.head_node
    assert head is not None
    head.kill()
    wait_for(lambda: not any(map(alive, others)), what="the other nodes have ended")


def test_key_values_are_the_clusters(start: Callable[..., Cluster]) -> None:
    cluster = start(1)
    zray.kv.put("colour", b"green")
    zray.shutdown()
    zray.init(address=cluster.worker_nodes[0].address)
    assert zray.kv.get("colour") == b"green"
    zray.kv.put("colour", b"blue")
    zray.shutdown()
    cluster.connect()
    assert zray.kv.get("colour") == b"blue"


def test_several_drivers_on_one_node(start: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start(head_node_args={"num_cpus": 2})
    program = (
        "import zray, sys\n"
        f"zray.init(address={cluster.address!r})\n"
        "@zray.remote\n"
        "def square(x): return x * x\n"
        "assert zray.get([square.remote(i) for i in range(300)]) == [i * i for i in range(300)]\n"
        "class Count:\n"
        "    def __init__(self): self.n = 0\n"
        "    def up(self): self.n += 1; return self.n\n"
        "counter = zray.remote(Count).options(num_cpus=0).remote()\n"
        "assert zray.get([counter.up.remote() for _ in range(100)])[-1] == 100\n"
        "print(zray.get_runtime_context().get_job_id())\n"
    )
    drivers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [driver.communicate(timeout=60)[0].strip() for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0, 0]
    assert len(set(outputs)) == 3
    # The node goes on, and nothing of the drivers is left.
    wait_for(lambda: query("statistics")["jobs"] == 1)
    wait_for(lambda: not [row for row in query("actors") if row["state"] != "DEAD"])
    assert zray.get(zray.remote(lambda: 5).remote()) == 5
    wait_for(lambda: query("statistics")["processes"] <= 4, what="processes of ended drivers have left the store")


# -- who may not join ------------------------------------------------------------------------------------------------------


def place(cluster: Cluster, **changes: Any) -> nodes_.ClusterSettings:
    settings = {"host": "127.0.0.1", "head": cluster.address, "key_file": cluster._key_file(), **changes}
    return nodes_.ClusterSettings(**settings)


def refused(where: nodes_.ClusterSettings) -> str:
    with pytest.raises(exceptions.ZraySystemError) as caught:
        nodes_.start(nodes_.NodeSettings(num_cpus=1, num_gpus=0), os.getpid(), where)
    return str(caught.value)


def test_a_wrong_key_is_refused_and_counted(start: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start()
    key = str(tmp_path / "key")
    ClusterKey.new().write(key)
    assert "does not take the key" in refused(place(cluster, key_file=key))
    assert query("statistics")["refused_connections"] > 0
    assert len(zray.nodes()) == 1


def test_a_missing_key_file_says_so(start: Callable[..., Cluster]) -> None:
    assert "No such file" in refused(place(start(), key_file="/nowhere/key"))


def test_another_minor_version_is_refused_in_one_line(
    start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start()
    monkeypatch.setattr(zray, "__version__", "99.1.0")
    text = refused(place(cluster))
    assert "this node 99.1.0: install" in text
    assert "\n" not in text
    monkeypatch.undo()
    major, minor, _ = zray.__version__.split(".")
    monkeypatch.setattr(zray, "__version__", f"{major}.{minor}.99")
    nodes_.start(nodes_.NodeSettings(num_cpus=1, num_gpus=0), os.getpid(), place(cluster)).stop()


def test_a_port_where_nobody_listens_is_named(start: Callable[..., Cluster]) -> None:
    cluster = start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot connect to {address}" in refused(place(cluster, head=address))


def test_a_node_that_is_not_the_head_names_the_head(start: Callable[..., Cluster]) -> None:
    cluster = start(1)
    text = refused(place(cluster, head=cluster.worker_nodes[0].address))
    assert f"is not the head: join {cluster.address}" in text


# -- init ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "host:99999", 5])
def test_addresses_that_are_none(address: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        zray.init(address=address)


def test_no_cluster_here() -> None:
    with pytest.raises(exceptions.ZrayUsageError, match="zray start --head"):
        zray.init(address="auto")
    with pytest.raises(exceptions.ZrayUsageError, match=r"zray start --address 10\.0\.0\.1:6379"):
        zray.init(address="10.0.0.1:6379")


def test_what_running_nodes_have_cannot_be_chosen(start: Callable[..., Cluster]) -> None:
    cluster = start()
    zray.shutdown()
    with pytest.raises(ValueError, match="num_cpus, labels cannot be chosen"):
        zray.init(address=cluster.address, num_cpus=3, labels={})


def test_the_environment_names_the_cluster(start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start()
    zray.shutdown()
    monkeypatch.setenv("ZRAY_ADDRESS", "auto")
    context = zray.init()
    assert context["gcs_address"] == cluster.address
    zray.shutdown()
    context = zray.init(address="local", num_cpus=1)
    assert context["gcs_address"] != cluster.address


# -- the command line --------------------------------------------------------------------------------------------------------


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


def test_a_cluster_by_commands() -> None:
    told = zray_command("start", "--head", "--host", "127.0.0.1", "--num-cpus", "1")
    address = told.split("listens on ")[1].split(",")[0]
    try:
        zray_command(
            "start", "--address", address, "--host", "127.0.0.1", "--num-cpus", "2", "--resources", '{"wheels": 3}'
        )
        shown = zray_command("status")
        assert "CPU 3 of 3" in shown
        assert "wheels 3 of 3" in shown
        assert shown.count("ALIVE") == 2
        assert f'"address":"{address}"' in zray_command("status", "--json").replace(" ", "")
        with zray.init(address="auto"):
            assert zray.get(zray.remote(lambda: 5).remote()) == 5
    finally:
        ended = zray_command("stop")
    assert ended.count("has ended") == 2
    assert "no node runs here" in zray_command("stop")
    assert os.listdir(os.environ["ZRAY_RUNTIME_DIR"]) == []


def test_status_tells_what_holds_tasks_up_and_who_is_connected(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=1)
    def wait_there() -> None:
        hold.wait()

    with ReachedCluster("outside", initialize_head=True, head_node_args={"num_cpus": 1}) as cluster:
        cluster.connect()
        refs = [wait_there.remote() for _ in range(2)]
        wait_for(lambda: zray.available_resources()["CPU"] == 0)
        shown = zray_command("status", "--address", cluster.address, "--verbose")
        assert "(a program outside)" in shown
        assert f"tasks: {refs[0].task_id().hex()}" in shown
        assert "guests: " in shown
        assert len(json.loads(zray_command("status", "--address", cluster.address, "--json"))["clients"]) == 1
        hold.open()
        zray.get(refs, timeout=30)


def test_a_node_with_a_key_made_before_tells_itself_in_json(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert str(key) in zray_command("key", str(key))
    assert key.stat().st_mode & 0o777 == 0o600
    assert "is there already" in zray_command("key", str(key), check=False)
    line = zray_command("start", "--head", "--host", "127.0.0.1", "--num-cpus", "1", "--key", str(key), "--json")
    told = json.loads(line.splitlines()[0])
    try:
        assert told["address"] == told["head"]
        assert told["key"] == str(key)
        assert alive(told["pid"])
        assert told["node"] == nodes_.running_nodes()[0].record.node
    finally:
        zray_command("stop")
    assert key.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_node_that_is_waited_for_ends_with_who_waits(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "zray.cli", "start", "--head", "--host", "127.0.0.1", "--num-cpus", "1"]
    process = subprocess.Popen([*command, "--block", "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        broker = json.loads(process.stdout.readline())["pid"]
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == (-number if number == signal.SIGKILL else 0)
    wait_for(lambda: not alive(broker), what="the node has ended")
    wait_for(lambda: not nodes_.running_nodes())
    nodes_.remove_stale_sessions(os.environ["ZRAY_RUNTIME_DIR"])


def test_who_waits_for_a_node_is_told_of_its_end() -> None:
    command = [sys.executable, "-m", "zray.cli", "start", "--head", "--host", "127.0.0.1", "--num-cpus", "1"]
    process = subprocess.Popen(
        [*command, "--block", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    os.kill(json.loads(process.stdout.readline())["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the broker had ended" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start"], "either --head or --address"),
        (["start", "--head", "--address", "a:1"], "either --head or --address"),
        (["start", "--address", "nonsense"], "is not host:port"),
        (["start", "--address", "127.0.0.1:9"], "--key FILE is needed"),
        (["start", "--head", "--resources", "{"], "not JSON"),
        (["start", "--head", "--labels", "[]"], "not a JSON object"),
        (["start", "--head", "--host", "203.0.113.77"], "cannot listen on 203.0.113.77"),
        (["status"], "no node of a cluster runs here"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], words: str) -> None:
    assert words in zray_command(*arguments, check=False)
