"""Storage in a real Redis server: the contract, fencing, and a server that is away, full, or back without its newest writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zray
from tests.helpers import wait_for
from tests.storage_contract import SHARDS, DurableStorageContract, Open, put
from zray.cluster_utils import Cluster
from zray.gcs.client import GcsClient
from zray.gcs.messages import RequestRefused
from zray.gcs.service import GcsService
from zray.gcs.storage import Storage, StorageBehind, StorageError, StorageTaken, open_storage

redis = pytest.importorskip("redis", reason="storage in Redis needs the package redis: pip install 'zray[redis]'")
from zray.gcs.redis_storage import RedisStorage  # noqa: E402 - of no use without it

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


class Server:
    """A redis-server on a socket in a directory of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.socket = str(place / "s")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> None:
        """Start it (again), and wait until it answers."""
        log = open(self.place / "log", "ab")  # noqa: SIM115 - the child's
        self.process = subprocess.Popen(
            [
                "redis-server",
                "--port",
                "0",
                "--unixsocket",
                self.socket,
                "--save",
                "",
                "--dir",
                str(self.place),
                *settings,
            ],
            stdout=log,
            stderr=log,
        )
        log.close()
        wait_for(self.answers, 10.0, "the server answers")

    def answers(self) -> bool:
        db = self.client()
        try:
            return bool(db.ping())
        except redis.RedisError:
            return False
        finally:
            db.close()

    def client(self) -> Any:
        return redis.Redis(unix_socket_path=self.socket)

    def do(self, *words: Any) -> Any:
        """Send one command."""
        db = self.client()
        try:
            return db.execute_command(*words)
        finally:
            db.close()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def name(self, prefix: str = "p") -> str:
        return f"redis+unix://{self.socket}?prefix={prefix}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the module's tests share; each has a prefix of its own."""
    made = Server(tmp_path_factory.mktemp("redis"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server for one test alone."""
    made = Server(tmp_path)
    made.start()
    yield made
    if made.process is not None:
        made.process.send_signal(signal.SIGCONT)
    made.kill()


class TestRedis(DurableStorageContract):
    @pytest.fixture
    def reopen(self, shared: Server, request: pytest.FixtureRequest) -> Open:
        prefix = f"t{abs(hash(request.node.name))}"
        return lambda: RedisStorage(f"unix://{shared.socket}", SHARDS, prefix, lease_s=0.3)

    def test_a_second_head_is_refused(self, shared: Server) -> None:
        storage = RedisStorage(f"unix://{shared.socket}", SHARDS, "second", lease_s=2.0)
        done = threading.Event()

        def live() -> None:
            while not done.wait(0.05):
                storage.tick()

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(StorageTaken, match="in use by another head"):
                RedisStorage(f"unix://{shared.socket}", SHARDS, "second", lease_s=2.0)
        finally:
            done.set()
            thread.join()
        storage.write([put(b"a", b"1", 1)])
        storage.close()

    @pytest.fixture
    def crash(self) -> Callable[[Storage], None]:
        def drop(storage: Storage) -> None:
            assert isinstance(storage, RedisStorage)
            storage._db.close()  # nobody lets go of the lease: the next head waits for its end

        return drop


def test_prefixes_keep_clusters_apart(shared: Server) -> None:
    one, two = (open_storage(shared.name(prefix), SHARDS) for prefix in ("one", "two"))
    one.write([put(b"a", b"1", 1)])
    assert two.load(0) == (0, [])
    assert {key.partition(b":")[0] for key in shared.do("KEYS", "*one*")} == {b"{one}"}
    one.close()
    two.close()


def test_what_cannot_be_used_is_refused_in_one_line(shared: Server, tmp_path: Path) -> None:
    open_storage(shared.name("shape"), SHARDS).close()
    with pytest.raises(StorageError, match=f"written with {SHARDS} shards, this head has 8"):
        open_storage(shared.name("shape"), 8)
    shared.do("HSET", "{shape}:facts", "format", 99)
    with pytest.raises(StorageError, match=r"written by a newer zray \(format 99"):
        open_storage(shared.name("shape"), SHARDS)
    storage = open_storage(shared.name("bits"), SHARDS)
    storage.write([put(b"a", b"1", 1)])
    field = shared.do("HKEYS", "{bits}:rows:0")[0]
    shared.do("HSET", "{bits}:rows:0", field, b"not what was written")
    with pytest.raises(StorageError, match="is damaged"):
        storage.load(0)
    storage.close()
    with pytest.raises(StorageError, match=r"the server does not answer .*") as caught:
        open_storage(f"redis+unix://{tmp_path}/nobody", SHARDS)
    assert caught.value.errno == errno.EHOSTUNREACH
    with pytest.raises(ValueError, match="is no prefix"):
        open_storage(shared.name("a{b"), SHARDS)


def test_a_server_that_may_throw_rows_away_is_refused(server: Server) -> None:
    server.do("CONFIG", "SET", "maxmemory", "100mb")
    server.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(StorageError, match="set it to noeviction"):
        open_storage(server.name(), SHARDS)
    server.do("CONFIG", "SET", "maxmemory-policy", "noeviction")
    open_storage(server.name(), SHARDS).close()


def test_a_full_server_refuses_writes_and_nothing_else(server: Server) -> None:
    storage = open_storage(server.name(), SHARDS)
    gcs = GcsService(None, "", shards=SHARDS, storage=storage)
    client = GcsClient(gcs.handle_request)
    client.kv_put("a", b"1")
    server.do("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(RequestRefused, match="raise its maxmemory") as caught:
        client.kv_put("b", b"2")
    assert caught.value.code == "storage"
    assert client.kv_get("a") == b"1"
    server.do("CONFIG", "SET", "maxmemory", "0")
    assert client.kv_put("b", b"2")
    gcs.close()


def test_a_paused_head_whose_place_was_taken_changes_nothing(shared: Server) -> None:
    now = [0.0]
    old = RedisStorage(f"unix://{shared.socket}", SHARDS, "fence", lease_s=0.2, clock=lambda: now[0])
    told: list[str] = []
    gcs = GcsService(None, "", shards=SHARDS, storage=old)
    gcs.on_taken = told.append
    client = GcsClient(gcs.handle_request)
    client.kv_put("a", b"1")
    wait_for(lambda: shared.do("EXISTS", "{fence}:owner") == 0, what="its lease is over")
    assert not told
    new = RedisStorage(f"unix://{shared.socket}", SHARDS, "fence")
    new.write([put(b"b", b"2", 50)])
    now[0] += 1.0
    assert old.lapsed()
    with pytest.raises(RequestRefused, match="another head has taken"):
        client.kv_get("a")
    with pytest.raises(RequestRefused, match="another head has taken"):
        client.kv_put("a", b"3")
    assert told
    assert new.load(0)[0] == 50
    values = [row.value for shard in range(SHARDS) for _, _, row in new.load(shard)[1]]
    assert sorted(values) == [b"1", b"2"]
    with pytest.raises(StorageTaken):
        old.tick()
    gcs.close()
    new.write([put(b"b", b"4", 51)])
    new.close()


def test_the_lease_of_a_process_that_was_killed_here_is_not_waited_for(shared: Server) -> None:
    source = (
        "import sys, time\n"
        "from zray.gcs.storage import open_storage\n"
        "open_storage(sys.argv[1], 4)\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", source, shared.name("killed")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    open_storage(shared.name("killed"), SHARDS).close()
    assert time.monotonic() - started < 5.9, "it waited for the lease"


def test_a_lost_server_is_an_error_in_bounded_time_and_nothing_is_lost(server: Server) -> None:
    gcs = GcsService(None, "", shards=SHARDS, storage=open_storage(server.name(), SHARDS))
    client = GcsClient(gcs.handle_request)
    for number in range(10):
        client.kv_put(f"k{number}", b"v")
    server.kill()
    with pytest.raises(RequestRefused, match=r"the server (does not answer|did not answer)"):
        client.kv_put("new", b"1")
    assert client.kv_get("k3") == b"v", "reads go on"
    assert gcs.storage_failure
    server.start()  # empty: it kept nothing

    def taken() -> bool:
        gcs.tick(time.monotonic())
        return not gcs.storage_failure and not gcs._behind

    wait_for(taken, 10.0, "the server has all rows again")
    assert client.kv_put("new", b"2")
    gcs.close()
    gcs = GcsService(None, "", shards=SHARDS, storage=open_storage(server.name(), SHARDS))
    assert GcsClient(gcs.handle_request).kv_keys() == [b"k%d" % n for n in range(10)] + [b"new"]
    gcs.close()


def test_a_stopped_server_costs_seconds_at_most(server: Server) -> None:
    storage = open_storage(server.name(), SHARDS)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(StorageError, match="does not answer"):
        storage.write([put(b"a", b"1", 1)])
    with pytest.raises(StorageError, match="did not answer a moment ago"):
        storage.write([put(b"a", b"1", 1)])
    server.process.send_signal(signal.SIGCONT)

    def written() -> bool:
        try:
            storage.write([put(b"a", b"2", 2)])
        except StorageBehind:  # the write whose answer never came was made after all
            storage.rewrite([put(b"a", b"2", 2)])
        except StorageError:
            return False
        return True

    wait_for(written, what="it answers again")
    assert [row.value for _, _, row in storage.load(0)[1]] == [b"2"]
    storage.close()


def test_a_write_whose_answer_was_lost_is_made_once(shared: Server) -> None:
    storage = RedisStorage(f"unix://{shared.socket}", SHARDS, "once")
    run, failures = storage._write_script, [redis.ConnectionError("the connection broke")]

    def breaks_once(**arguments: Any) -> Any:
        answer = run(**arguments)
        if failures:
            raise failures.pop()
        return answer

    storage._write_script = breaks_once
    storage.write([put(b"a", b"1", 1)], [b"record"])
    assert not failures
    assert list(storage.load_records()) == [b"record"]
    storage.write([put(b"a", b"2", 2)])
    storage.close()


def test_a_cluster_over_redis_is_killed_and_started_again(server: Server, tmp_path: Path) -> None:
    settings = {"storage": server.name("cluster"), "key_file": str(tmp_path / "key"), "head_grace": 30.0}
    with Cluster(initialize_head=True, **settings) as cluster:
        node = cluster.add_node()
        zray.init(address=node.address, namespace="n")
        zray.kv.put("colour", b"green")
        assert cluster.head_node is not None
        cluster.head_node.kill()
        cluster.restart_head()
        assert zray.kv.get("colour") == b"green"
        cluster.wait_for_nodes()
        # A server that comes back empty gets all rows again from the head.
        server.kill()
        with pytest.raises(RequestRefused, match=r"the server (does not answer|did not answer)"):
            zray.kv.put("colour", b"blue")
        assert zray.kv.get("colour") == b"green"
        server.start()
        wait_for(lambda: server.do("HLEN", "{cluster}:facts") > 0, what="it has all rows again")
        zray.kv.put("colour", b"blue")
        cluster.head_node.kill()
        cluster.restart_head()
        assert zray.kv.get("colour") == b"blue"
        zray.shutdown()
