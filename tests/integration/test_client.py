"""Drivers outside the cluster: what they need, what others see of them, and how each side learns that the other is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import zray
from tests import namespaces, ssh_tunnel
from tests.helpers import PROJECT, RUNTIME, SLACK, Program, Tally, alive, query, wait_for
from tests.tcp_relay import Relay
from zray import api, exceptions
from zray.broker.cluster import TUNNEL_S
from zray.cluster_utils import Cluster
from zray.node import Node
from zray.peer_transport import ClusterKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and a node with two, which give up one another, and clients, after two seconds of silence."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 0}, node_timeout=2.0 * SLACK) as found:
        found.add_node(num_cpus=2, resources={"wheels": 4})
        yield found


@pytest.fixture
def tunnel(cluster: Cluster) -> Iterator[Relay]:
    """All that a client has of the cluster."""
    made = Relay(cluster.address)
    yield made
    if zray.is_initialized():
        zray.shutdown()
    made.close()


def connect(cluster: Cluster, tunnel: Relay, **settings: Any) -> api.SessionContext:
    return zray.init(address=tunnel.address, cluster_key=cluster._key_file(), **settings)


def check_connections(address: str) -> None:
    """The broker of this process's session has connections to that address, and neither others nor a port."""
    started = api._node
    assert isinstance(started, Node)
    connections = psutil.Process(started.process.pid).net_connections("inet")
    assert connections
    assert {connection.status for connection in connections} == {psutil.CONN_ESTABLISHED}
    ends = {f"{c.raddr.ip}:{c.raddr.port}".removeprefix("::ffff:") for c in connections}
    assert ends == {address}


@zray.remote
def square(x: float) -> float:
    return x * x


@zray.remote
def endless(tally: Tally) -> None:
    tally.add(os.getpid())
    signal.pause()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def up(self) -> int:
        self.count += 1
        return self.count

    def pid(self) -> int:
        return os.getpid()


# -- what there is of a client -------------------------------------------------------------------------------------------


def test_one_connection_of_its_own_making_and_no_port(cluster: Cluster, tunnel: Relay) -> None:
    context = connect(cluster, tunnel)
    assert zray.get([square.remote(i) for i in range(100)], timeout=60) == [i * i for i in range(100)]
    check_connections(tunnel.address)
    assert context["gcs_address"] == tunnel.address
    assert query("workers") == []


def test_it_is_no_node_to_anybody(cluster: Cluster, tunnel: Relay) -> None:
    context = connect(cluster, tunnel)
    assert sorted(row["NodeID"] for row in zray.nodes()) == sorted(n.node_id for n in cluster.list_all_nodes())
    assert zray.cluster_resources()["CPU"] == 2

    @zray.remote(num_cpus=0)
    def where() -> str:
        return zray.get_runtime_context().get_node_id()

    # Even what asks for nothing does not run here.
    places = set(zray.get([where.remote() for _ in range(50)], timeout=60))
    assert places <= {node.node_id for node in cluster.list_all_nodes()}
    actor = zray.remote(Counter).options(num_cpus=0).remote()
    assert zray.get(actor.up.remote(), timeout=60) == 1
    assert query("workers") == []
    zray.shutdown()
    cluster.connect()  # as the head sees it
    wait_for(lambda: query("clients") == [], what="the client has left")
    assert len(zray.nodes()) == 2
    assert context["node_id"] not in {row["NodeID"] for row in zray.nodes()}


_PEER = """
zray.init(address=sys.argv[1], cluster_key=sys.argv[2], namespace="shared")
class Board:
    def __init__(self): self.things = {}
    def write(self, key, value): self.things[key] = value
    def read(self, key): return self.things[key]
board = zray.remote(Board).options(name="board", num_cpus=0).remote()
zray.get(board.write.remote("large", zray.put(b"x" * 3_000_000)))
print("ready", zray.get_runtime_context().get_job_id(), flush=True)
sys.stdin.read() if len(sys.argv) < 4 else signal.pause()
"""


def test_clients_reach_one_another(cluster: Cluster, tunnel: Relay, program: Callable[..., Program]) -> None:
    """An actor that one client owns is called by another one, and large values travel between them."""
    other = program(_PEER, tunnel.address, cluster._key_file(), "stay")
    job = other.wait_line("ready ")
    connect(cluster, tunnel, namespace="shared")
    assert zray.get_runtime_context().get_job_id() != job
    board = zray.get_actor("board")
    assert zray.get(board.read.remote("large"), timeout=60) == b"x" * 3_000_000
    array = np.arange(400_000)
    zray.get(board.write.remote("array", array), timeout=60)
    assert (zray.get(board.read.remote("array"), timeout=60) == array).all()
    [row] = query("clients")
    os.kill(other.pid, signal.SIGKILL)  # its actor and its name go with it
    other.wait_nothing_left()
    wait_for(lambda: query("clients") == [], what=f"{row} is gone")
    with pytest.raises(exceptions.RayActorError):
        zray.get(board.read.remote("array"), timeout=60)
    with pytest.raises(ValueError, match="board"):
        zray.get_actor("board")


# -- who may not connect -------------------------------------------------------------------------------------------------


def test_without_a_key_there_is_no_way_in(cluster: Cluster, tunnel: Relay, tmp_path: Path) -> None:
    with pytest.raises(exceptions.ZrayUsageError, match="cluster_key=FILE"):
        zray.init(address=tunnel.address)
    with pytest.raises(FileNotFoundError):
        zray.init(address=tunnel.address, cluster_key="/nowhere/key")
    wrong = str(tmp_path / "key")
    ClusterKey.new().write(wrong)
    with pytest.raises(exceptions.ZraySystemError, match="does not take the key"):
        zray.init(address=tunnel.address, cluster_key=wrong)
    os.chmod(wrong, 0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        zray.init(address=tunnel.address, cluster_key=wrong)
    with pytest.raises(exceptions.ZraySystemError, match=f"not the head: join {cluster.address}"):
        zray.init(
            address=cluster.worker_nodes[0].address.replace("127.0.0.1", "localhost"), cluster_key=cluster._key_file()
        )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(exceptions.ZraySystemError, match=f"no way into the cluster at {nobody}: cannot connect"):
            zray.init(address=nobody, cluster_key=cluster._key_file())


def test_the_environment_names_address_and_key(
    cluster: Cluster, tunnel: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAY_ADDRESS", tunnel.address)
    monkeypatch.setenv("ZRAY_CLUSTER_KEY", cluster._key_file())
    zray.init(object_store_memory=50 << 20)
    assert query("statistics")["capacity"] <= 50 << 20
    assert zray.get(square.remote(3), timeout=60) == 9
    zray.shutdown()
    with pytest.raises(ValueError, match="num_cpus cannot be chosen"):
        zray.init(num_cpus=1)


def test_where_a_node_runs_it_is_used(cluster: Cluster) -> None:
    zray.init(address=cluster.address, cluster_key=cluster._key_file())
    assert zray.nodes()[0]["NodeID"] == zray.get_runtime_context().get_node_id()
    zray.shutdown()
    with pytest.raises(ValueError, match="object_store_memory cannot be chosen"):
        zray.init(address=cluster.address, object_store_memory=50 << 20)


# -- ends ----------------------------------------------------------------------------------------------------------------

_DRIVER = """
zray.init(address=sys.argv[1], cluster_key=sys.argv[2])
tally = Tally(__import__("pathlib").Path(sys.argv[3]))
@zray.remote
def endless():
    tally.add(os.getpid())
    signal.pause()
class Counter:
    def pid(self): return os.getpid()
actor = zray.remote(Counter).options(num_cpus=0).remote()
print("actor", zray.get(actor.pid.remote()), flush=True)
ref = endless.remote()
zray.get(ref)
"""


def test_a_driver_that_is_killed_leaves_nothing(
    cluster: Cluster, tunnel: Relay, program: Callable[..., Program], tally: Tally
) -> None:
    driver = program(_DRIVER, tunnel.address, cluster._key_file(), str(tally.path))
    actor = int(driver.wait_line("actor "))
    wait_for(lambda: len(tally) == 1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait_nothing_left(2.0)
    wait_for(lambda: not alive(int(tally.lines[0])) and not alive(actor), 10, "its task and its actor have ended")
    cluster.connect()
    wait_for(lambda: query("clients") == [])
    wait_for(lambda: zray.available_resources()["CPU"] == 2)


@pytest.mark.parametrize("how", ["network", "machine"])
def test_a_client_that_vanishes_is_given_up(
    how: str, cluster: Cluster, tunnel: Relay, program: Callable[..., Program], tally: Tally
) -> None:
    """Nothing tells the head: the client's machine or the network between is gone."""
    driver = program(_DRIVER, tunnel.address, cluster._key_file(), str(tally.path))
    driver.wait_line("actor ")
    wait_for(lambda: len(tally) == 1)
    if how == "network":
        tunnel.tell("hold both")
    else:
        for pid in driver.processes():
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(int(tally.lines[0])), 15, "its task has ended")
    if how == "network":
        assert driver.finish(30) == 1
        assert "ZraySystemError: the connection to the cluster has ended: the head is gone" in driver.err
        assert "was not heard of for" in driver.err
        driver.wait_nothing_left(2.0)


def test_when_the_head_dies_a_client_is_told(cluster: Cluster, tunnel: Relay, tally: Tally) -> None:
    connect(cluster, tunnel)
    ref = endless.remote(tally)
    wait_for(lambda: len(tally) == 1)
    head = cluster.head_node
    assert head is not None
    head.kill()
    # The tunnel still takes connections, which lead nowhere: so it is silence that tells.
    with pytest.raises(exceptions.ZraySystemError, match=r"the connection to the cluster has ended: the head is gone"):
        zray.get(ref, timeout=(2.0 * SLACK + TUNNEL_S + 10))
    with pytest.raises(exceptions.ZraySystemError):
        zray.get(square.remote(2), timeout=30)


def test_a_tunnel_that_is_made_again_costs_nothing(cluster: Cluster, tunnel: Relay) -> None:
    connect(cluster, tunnel)
    counter = zray.remote(Counter).options(num_cpus=0, resources={"wheels": 1}).remote()
    refs = [counter.up.remote() for _ in range(50)]
    array = np.arange(2_000_000)
    total = zray.remote(resources={"wheels": 1})(lambda x: int(x.sum())).remote(array)
    tunnel.tell("refuse")
    refs += [counter.up.remote() for _ in range(50)]
    more = [square.remote(i) for i in range(50)]
    wait_for(lambda: zray.nodes()[0]["state"] == "SILENT", what="it knows that the head is away")
    tunnel.tell("accept")
    assert zray.get(refs, timeout=60) == list(range(1, 101))
    assert zray.get(more, timeout=60) == [i * i for i in range(50)]
    assert zray.get(total, timeout=60) == array.sum()
    for _ in range(3):
        tunnel.tell("cut")
        assert zray.get([counter.up.remote() for _ in range(20)], timeout=60)[-1]
    assert zray.get(counter.up.remote(), timeout=60) == 161


# -- by ssh ----------------------------------------------------------------------------------------------------------------

_INSIDE = """
import sys, zray.cluster_utils as c
from zray import node
c._HOST = sys.argv[1]
cluster = c.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
c._HOST = sys.argv[2]
cluster.add_node(num_cpus=2, resources={"wheels": 4})
print(cluster.address, cluster._key_file(), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def far_cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and key of a cluster in a network of its own; what is yielded is a tunnel's end and the key file."""
    why_not = namespaces.missing()
    if why_not:
        pytest.skip(why_not)
    place = ssh_tunnel.Namespace(tmp_path, ["10.213.99.1", "10.213.99.2"])
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), RUNTIME: os.path.join(os.environ[RUNTIME], "far")}
    inside = subprocess.Popen(
        place.command(sys.executable, "-c", _INSIDE, "10.213.99.1", "10.213.99.2"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    tunnel: ssh_tunnel.Tunnel | None = None
    try:
        assert inside.stdout is not None
        address, key = inside.stdout.readline().split()
        tunnel = ssh_tunnel.Tunnel(place, address)
        yield tunnel.address, key
    finally:
        if zray.is_initialized():
            zray.shutdown()
        if tunnel is not None:
            tunnel.close()
        inside.communicate(timeout=30)
        place.close()
        shutil.rmtree(environment[RUNTIME], ignore_errors=True)


def test_through_one_port_by_ssh(far_cluster: tuple[str, str]) -> None:
    address, key = far_cluster
    zray.init(address=address, cluster_key=key, namespace="here")
    assert {row["NodeManagerAddress"] for row in zray.nodes()} == {"10.213.99.1", "10.213.99.2"}
    away = square.options(resources={"wheels": 1})
    assert zray.get([away.remote(i) for i in range(200)], timeout=60) == [i * i for i in range(200)]
    array = np.random.default_rng(1).random(2_000_000)
    assert (zray.get(away.remote(array), timeout=60) == array * array).all()
    assert (zray.get(square.remote(zray.put(array)), timeout=60) == array * array).all()
    counter = zray.remote(Counter).options(name="one", num_cpus=0, resources={"wheels": 1}).remote()
    assert zray.get([counter.up.remote() for _ in range(100)], timeout=60) == list(range(1, 101))
    assert zray.get(zray.get_actor("one").up.remote(), timeout=60) == 101
    zray.kv.put("colour", b"green")
    assert zray.kv.get("colour") == b"green"
    assert query("check") == {}
    check_connections(address)
