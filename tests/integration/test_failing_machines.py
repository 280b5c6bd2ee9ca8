"""What may befall the network between nodes and the machines below them: each ends in a right result or one documented error, in due time.

Networks are a relay between a node and the head (`tests/tcp_relay.py`), so everything that the two say to one another passes through it. Out of
memory and killed processes: `test_remote_tasks.py`; damaged, cut and repeated frames: `test_links.py`, `test_peer_transport.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import zray
from tests.helpers import Tally, alive, query, wait_for
from tests.tcp_relay import Relay
from zray import exceptions
from zray import node as nodes_
from zray.cluster_utils import Cluster, ClusterNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NODE_TIMEOUT = 3.0
IN_TIME = NODE_TIMEOUT + 12.0
"""Seconds within which whatever waits for a lost node has its answer."""


class Far(Cluster):
    """A head without CPUs, where the driver is, and nodes that reach it through relays."""

    def __init__(self) -> None:
        self.relays: list[Relay] = []
        super().__init__(initialize_head=True, head_node_args={"num_cpus": 0}, node_timeout=NODE_TIMEOUT)

    def add_far(self, seed: int = 0, **settings: Any) -> tuple[ClusterNode, Relay]:
        """Add a node."""
        relay = Relay(self.address, seed)
        self.relays.append(relay)
        place = nodes_.ClusterSettings(
            "127.0.0.1", head=relay.address, key_file=self._key_file(), node_timeout=NODE_TIMEOUT
        )
        node = ClusterNode(nodes_.start(nodes_.NodeSettings(num_gpus=0, **settings), os.getpid(), place))
        self.worker_nodes.append(node)
        return node, relay

    def shutdown(self) -> None:
        for relay in self.relays:
            relay.tell("pass")
        super().shutdown()
        for relay in self.relays:
            relay.close()
        self.relays.clear()


@pytest.fixture
def cluster() -> Iterator[Far]:
    with Far() as found:
        yield found


def state(node: ClusterNode) -> str:
    return next((row["state"] for row in zray.nodes() if row["NodeID"] == node.node_id), "")


@zray.remote
def double(x: Any) -> Any:
    return x * 2


@zray.remote
def work(tally: Tally, seconds: float) -> str:
    tally.add()
    time.sleep(seconds)
    return zray.get_runtime_context().get_node_id()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def up(self) -> int:
        self.count += 1
        return self.count


# -- networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["both", "in", "out"])
def test_a_short_silence_costs_nothing(way: str, cluster: Far) -> None:
    """Partition (both), or a link that is open one way only, for less than the node timeout: all calls run once, in order."""
    node, relay = cluster.add_far(num_cpus=1)
    cluster.connect()
    cluster.wait_for_nodes()
    counter = zray.remote(Counter).options(num_cpus=0).remote()
    before = [counter.up.remote() for _ in range(20)]
    relay.tell(f"hold {way}")
    refs = [counter.up.remote() for _ in range(100)]
    more = [double.remote(i) for i in range(100)]
    if way != "out":  # what the node says (in: to the head) is held back
        wait_for(lambda: state(node) == "SILENT", what="the head notices")
    relay.tell("pass")
    assert zray.get(before + refs, timeout=IN_TIME) == list(range(1, 121))
    assert zray.get(more, timeout=IN_TIME) == [2 * i for i in range(100)]
    wait_for(lambda: state(node) == "ALIVE")


@pytest.mark.parametrize("way", ["both", "in", "out"])
def test_a_long_silence_is_death(way: str, cluster: Far, tally: Tally) -> None:
    """The node is fenced and ends, what it ran runs elsewhere, and what only it could do fails with a documented error."""
    node, relay = cluster.add_far(num_cpus=1, resources={"wheels": 1})
    cluster.connect()
    cluster.wait_for_nodes()
    counter = zray.remote(Counter).options(num_cpus=0, resources={"wheels": 1}).remote()
    assert zray.get(counter.up.remote(), timeout=30) == 1
    ref = work.remote(tally, 2.0)
    wait_for(lambda: len(tally) == 1)
    relay.tell(f"hold {way}")
    other = cluster.add_node(num_cpus=1)
    started = time.monotonic()
    # Where the node can still speak (out: it only hears nothing) its result comes, and is right.
    assert zray.get(ref, timeout=IN_TIME) in ({other.node_id} if way != "out" else {other.node_id, node.node_id})
    with pytest.raises(exceptions.RayActorError):
        zray.get(counter.up.remote(), timeout=IN_TIME)
    assert time.monotonic() - started < 2 * IN_TIME
    assert state(node) == "DEAD"
    relay.tell("pass")
    wait_for(lambda: not alive(node.pid), IN_TIME, "the node has learnt that it is dead, and ended")
    assert len(tally) <= 2


@pytest.mark.parametrize("seed", [1, 2])
def test_a_slow_link_is_only_slow(seed: int, cluster: Far) -> None:
    """300 kB/s in pieces with pauses: values take their time, beats and small calls get through beside them."""
    node, relay = cluster.add_far(seed, num_cpus=2)
    cluster.connect()
    cluster.wait_for_nodes()
    assert zray.get(double.remote(1), timeout=30) == 2
    relay.tell("rate 300000")
    draw = np.random.default_rng(seed)
    arrays = [draw.random(size) for size in (1000, 20_000, 40_000)]
    refs = [double.remote(array) for array in arrays]
    small = [double.remote(i) for i in range(20)]
    for _ in range(5):
        assert state(node) != "DEAD"
        zray.wait(refs, num_returns=len(refs), timeout=0.2)
    assert zray.get(small, timeout=30) == [2 * i for i in range(20)]
    for ref, array in zip(refs, arrays, strict=True):
        assert (zray.get(ref, timeout=30) == 2 * array).all()
    assert state(node) in ("ALIVE", "SILENT")


# -- machines --------------------------------------------------------------------------------------------------------------


def test_a_node_without_free_descriptors_recovers(cluster: Far) -> None:
    """Whoever wants to connect is told (or gets in late); what is connected goes on; when descriptors are free, all is well."""
    cluster.connect()
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    assert zray.get(double.remote(1), timeout=30) == 2
    head = cluster.head_node
    assert head is not None
    process = psutil.Process(head.pid)
    limits = resource.prlimit(head.pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{head.pid}/fd"))
    resource.prlimit(head.pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    fill = [socket.create_connection(("127.0.0.1", int(head.address.rpartition(":")[2]))) for _ in range(20)]
    try:
        assert zray.get([double.remote(i) for i in range(50)], timeout=30) == [2 * i for i in range(50)]
        with pytest.raises(exceptions.ZraySystemError, match=r"gave no answer|does not take|cannot connect"):
            cluster.add_node(num_cpus=1)
        assert process.is_running()
    finally:
        for end in fill:
            end.close()
        resource.prlimit(head.pid, resource.RLIMIT_NOFILE, limits)
    assert state(node) == "ALIVE"
    last = cluster.add_node(num_cpus=1, resources={"wheels": 1})
    assert zray.get(double.options(resources={"wheels": 1}).remote(4), timeout=30) == 8
    assert state(last) == "ALIVE"


@pytest.fixture
def wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets processes that are started from now on have a wall clock of their own; returns a function that makes it jump by seconds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, place = tmp_path / "wall_clock.so", tmp_path / "shift"
    source = Path(__file__).parents[1] / "wall_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-lm"], check=True)
    place.write_bytes(struct.pack("d", 0.0))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("ZRAY_TEST_WALL_CLOCK", str(place))
    told = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True, check=True)
    assert abs(float(told.stdout) - time.time()) < 100

    def jump(seconds: float) -> None:
        with place.open("r+b") as file:
            file.write(struct.pack("d", seconds))

    return jump


@pytest.mark.parametrize("seed", [1])
def test_jumps_of_the_wall_clock_change_nothing(
    seed: int, wall_clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """By days, to and fro, on the head and a node, while tasks and actors run and a value waits with a timeout."""
    draw = random.Random(seed)
    with Far() as cluster:
        cluster.add_node(num_cpus=2)
        monkeypatch.delenv("LD_PRELOAD")
        cluster.connect()
        cluster.wait_for_nodes()
        shown = zray.remote(lambda: time.time())
        pid = cluster.head_node.pid if cluster.head_node is not None else 0
        counter = zray.remote(Counter).options(num_cpus=0).remote()
        expected = 0
        for _ in range(8):
            shift = draw.choice([-1, 1]) * draw.uniform(1e3, 3e7)
            wall_clock(shift)
            refs = [counter.up.remote() for _ in range(20)]
            assert zray.get([double.remote(i) for i in range(30)], timeout=30) == [2 * i for i in range(30)]
            expected += 20
            assert zray.get(refs, timeout=30)[-1] == expected
            assert abs(zray.get(shown.remote(), timeout=30) - time.time() - shift) < 100, "the clock there has jumped"
            with pytest.raises(exceptions.GetTimeoutError):
                zray.get(work.remote(tally, 1.0), timeout=0.1)
            assert {row["state"] for row in zray.nodes()} == {"ALIVE"}
        assert alive(pid)
        assert query("check") == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs root, to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_far_store(count: int, megabytes: int) -> tuple[list[Any], list[Any]]:
    """Make values on the far node that are kept there; return their references and the errors that calls ended with."""
    make = zray.remote(resources={"wheels": 1}, max_retries=0)(lambda i: [zray.put(np.full(megabytes << 17, float(i)))])
    kept, errors = [], []
    for i in range(count):
        with contextlib.suppress(exceptions.ZrayError):
            try:
                kept.append(zray.get(make.remote(i), timeout=IN_TIME)[0])
            except exceptions.ZrayError as error:
                errors.append(error)
                raise
    return kept, errors


def test_a_full_disk_under_the_spill_directory_of_a_node(
    small_disk: Path, cluster: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that fit nowhere any more fail with an error that names the disk; those that are there are right; the node goes on."""
    monkeypatch.setenv("ZRAY_SPILL_DIR", str(small_disk))
    cluster.add_far(num_cpus=1, resources={"wheels": 1}, object_store_memory=8 << 20)
    monkeypatch.delenv("ZRAY_SPILL_DIR")
    cluster.connect()
    cluster.wait_for_nodes()
    kept, errors = fill_far_store(14, 1)
    assert kept
    assert errors
    for error in errors:
        assert isinstance(error, (exceptions.OutOfDiskError, exceptions.ObjectStoreFullError)), repr(error)
    for ref in kept[:3]:
        assert len(set(zray.get(ref, timeout=IN_TIME).tolist())) == 1
    # A value that comes from another node finds no room either, or finds it: nothing hangs.
    takes = double.options(resources={"wheels": 1})
    try:
        assert (zray.get(takes.remote(np.ones(300_000)), timeout=IN_TIME) == 2).all()
    except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError):
        pass
    del kept
    del ref
    wait_for(lambda: zray.get(takes.remote(3), timeout=IN_TIME) == 6, what="the node goes on")


def test_full_memory_on_the_receiving_node(cluster: Far) -> None:
    """Values that arrive where memory is full push others to disk, and all are right."""
    cluster.add_far(num_cpus=1, resources={"wheels": 1}, object_store_memory=8 << 20)
    cluster.connect()
    cluster.wait_for_nodes()
    kept, errors = fill_far_store(10, 1)
    assert not errors
    arrays = [np.full(400_000, float(i)) for i in range(5)]
    total = zray.remote(resources={"wheels": 1})(lambda x: float(x.sum()))
    refs = [total.remote(zray.put(array)) for array in arrays]
    assert zray.get(refs, timeout=2 * IN_TIME) == [array.sum() for array in arrays]
    assert [float(zray.get(ref, timeout=IN_TIME)[0]) for ref in kept] == [float(i) for i in range(10)]


def test_a_value_larger_than_the_memory_of_the_receiving_node(cluster: Far) -> None:
    """It lies in a file there."""
    cluster.add_far(num_cpus=1, resources={"wheels": 1}, object_store_memory=4 << 20)
    cluster.connect()
    cluster.wait_for_nodes()
    array = np.arange(1_500_000, dtype=np.float64)
    total = zray.remote(resources={"wheels": 1})(lambda x: float(x.sum()))
    assert zray.get(total.remote(zray.put(array)), timeout=2 * IN_TIME) == array.sum()
