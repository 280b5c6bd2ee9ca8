"""Real nodes, real programs, and seeded bad luck: what comes out must be right to the last byte.

Covers a cluster of node processes (one of them reaches its head through a relay), a mixed workload whose every result can be computed again here, and
a thread that kills workers and nodes, stops brokers for a while, cuts, holds up and damages connections. Does not cover the head's death (its
program ends with it) or simulated failures (`tests/simulation`).

What must hold: every call ends within `PATIENCE` seconds. Calls that may be repeated end in the right value, always: tasks are run again, and values
that only a dead node had are made again. Otherwise a call may end in one of `DOCUMENTED`: one that must not be repeated; a large result of an actor's
call, which stays where the actor lives until somebody wants it; what a task submitted and returned the reference of, when its node is dead. In the end
nothing but code is borrowed, and nothing runs.

    python -m tests.chaos --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import zray
from tests.helpers import PROJECT, SLACK, alive, children, query, wait_for
from tests.tcp_relay import Relay
from zray import exceptions
from zray import node as nodes_
from zray.cluster_utils import Cluster, ClusterNode

NODE_TIMEOUT: Final = 5.0
PATIENCE: Final = 90.0
DOCUMENTED: Final = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.ActorDiedError,
    exceptions.ActorUnavailableError,
)
"""How a call may end that must not be run twice."""
LARGE: Final = 300_000
"""Bytes: more than travels in one message."""


# -- the workload ------------------------------------------------------------------------------------------------------


def mixed(salt: int, size: int, *values: bytes) -> bytes:
    """What every task returns: bytes that follow from its arguments."""
    digest = hashlib.sha256(salt.to_bytes(8, "little"))
    for value in values:
        digest.update(value)
    seed = digest.digest()
    return (seed * (size // len(seed) + 1))[: max(size, len(seed))]


@zray.remote(max_retries=-1)
def mix(salt: int, size: int, pause: float, *values: bytes) -> bytes:
    """A task that may be repeated."""
    time.sleep(pause)
    return mixed(salt, size, *values)


@zray.remote(max_retries=0)
def mix_once(salt: int, size: int, pause: float, *values: bytes) -> bytes:
    """A task that must not be."""
    time.sleep(pause)
    return mixed(salt, size, *values)


@zray.remote(max_retries=-1)
def nested(salts: list[int], pause: float) -> bytes:
    """A task that submits others and waits."""
    return mixed(0, 0, *zray.get([mix.remote(salt, 100, pause) for salt in salts]))


@zray.remote(max_retries=-1)
def box(salt: int, size: int) -> list[Any]:
    """A task that returns the reference of another's result."""
    return [mix.remote(salt, size, 0.0)]


@zray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, resources={"seats": 1})
class Mixer:
    """An actor on some other node; without state, so that its calls may be repeated."""

    def mix(self, salt: int, size: int, *values: bytes) -> bytes:
        """As the task."""
        return mixed(salt, size, *values)


class Workload:
    """Submits rounds of calls, collects their results and compares."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.waiting: list[tuple[Any, bytes, str]] = []
        """(reference, what it must be, kind)."""
        self.mixers = [Mixer.remote() for _ in range(2)]
        self.right = 0
        self.failed: dict[str, int] = {}

    def _expect(self, ref: Any, value: bytes, kind: str) -> Any:
        self.waiting.append((ref, value, kind))
        return ref

    def submit(self) -> None:
        """One round."""
        rng = self.rng
        pause = rng.choice([0.0, 0.0, 0.01, 0.1])
        for _ in range(rng.choice([5, 40])):
            salt, size = rng.getrandbits(60), rng.choice([0, 0, 2000, LARGE])
            function, kind = (mix_once, "once") if rng.random() < 0.2 else (mix, "task")
            self._expect(function.remote(salt, size, pause), mixed(salt, size), kind)
        self._chain(pause)
        self._fan_in()
        salts = [rng.getrandbits(60) for _ in range(rng.randint(1, 4))]
        self._expect(nested.remote(salts, pause), mixed(0, 0, *(mixed(salt, 100) for salt in salts)), "nested")
        salt = rng.getrandbits(60)
        self._expect(box.remote(salt, LARGE), mixed(salt, LARGE), "box")
        for _ in range(rng.choice([2, 10])):
            salt, size = rng.getrandbits(60), rng.choice([0, LARGE])
            self._expect(rng.choice(self.mixers).mix.remote(salt, size), mixed(salt, size), "call")
        for _ in range(rng.choice([0, 20, 100])):
            self._talk()

    def _talk(self) -> None:
        """A task and a call on other nodes, each waited for: many of them go over lanes."""
        rng = self.rng
        salt, size = rng.getrandbits(60), rng.choice([0, 0, 0, LARGE])
        function, kind = (mix_once, "once") if rng.random() < 0.2 else (mix, "task")
        ref = function.options(num_cpus=0.5, resources={"seats": 0.01}).remote(salt, size, 0.0)
        self._take(ref, mixed(salt, size), kind)
        salt = rng.getrandbits(60)
        self._take(rng.choice(self.mixers).mix.remote(salt, 0), mixed(salt, 0), "call")

    def _chain(self, pause: float) -> None:
        rng = self.rng
        size = rng.choice([0, LARGE])
        value = rng.randbytes(50 if size == 0 else LARGE)
        ref = zray.put(value)
        for _ in range(rng.randint(2, 6)):
            salt = rng.getrandbits(60)
            ref, value = mix.remote(salt, size, pause, ref), mixed(salt, size, value)
        self._expect(ref, value, "chain")

    def _fan_in(self) -> None:
        rng = self.rng
        parts = [(rng.getrandbits(60), rng.choice([0, LARGE])) for _ in range(rng.randint(2, 12))]
        refs = [mix.remote(salt, size, 0.0) for salt, size in parts]
        values = [mixed(salt, size) for salt, size in parts]
        self._expect(mix.remote(1, 0, 0.0, *refs), mixed(1, 0, *values), "fan-in")

    def collect(self) -> None:
        """Wait for all that was submitted; AssertionError when a result is wrong or missing."""
        waiting, self.waiting = self.waiting, []
        for ref, expected, kind in waiting:
            self._take(ref, expected, kind)

    def _take(self, ref: Any, expected: bytes, kind: str) -> None:
        try:
            found = zray.get(ref, timeout=PATIENCE * SLACK)
            if kind == "box":
                found = zray.get(found[0], timeout=PATIENCE * SLACK)
        except DOCUMENTED as error:
            lost = kind in ("call", "box") and isinstance(error, exceptions.ObjectLostError)
            if not (kind == "once" or lost):
                raise AssertionError(f"a {kind} failed: {type(error).__name__}: {error}") from error
            name = type(error).__name__
            self.failed[name] = self.failed.get(name, 0) + 1
            return
        assert found == expected, f"a {kind} returned {len(found)} bytes that are not the {len(expected)} expected"
        self.right += 1


# -- bad luck ----------------------------------------------------------------------------------------------------------


class Trouble(threading.Thread):
    """Does things to nodes, one after another, until it is told to stop; then it puts right what is not."""

    def __init__(self, cluster: Cluster, relay: Relay, seed: int, calm: float) -> None:
        """calm: seconds between two things, at most."""
        super().__init__(name="trouble")
        self.cluster = cluster
        self.relay = relay
        self.rng = Random(seed)
        self.calm = calm
        self.over = threading.Event()
        self.story: list[str] = []
        self.error: BaseException | None = None
        self._began = time.monotonic()
        self._acts = {
            self.kill_worker: 5,
            self.kill_node: 2,
            self.pause: 3,
            self.pause_too_long: 1,
            self.cut: 4,
            self.hold: 2,
            self.damage: 2,
            self.slow: 1,
        }

    def run(self) -> None:
        """Until `over` is set."""
        try:
            while not self.over.wait(self.rng.uniform(0.05, self.calm)):
                act = self.rng.choices(list(self._acts), list(self._acts.values()))[0]
                self.story.append(f"{time.monotonic() - self._began:.2f} {act.__name__}")
                act()
        except BaseException as error:
            self.error = error
        finally:
            for command in ("damage 0", "rate 0", "pass"):
                self.relay.tell(command)

    def stop(self) -> None:
        """End the thread; raise what it met."""
        self.over.set()
        self.join()
        if self.error is not None:
            raise self.error

    def _any(self) -> ClusterNode:
        """A node that is there. Where the machine stood still, or several troubles met, one may have been declared dead, and have ended: it is told."""
        while True:
            node = self.rng.choice(self.cluster.worker_nodes)
            if node._node.process.poll() is None:
                return node
            self.story.append(f"{time.monotonic() - self._began:.2f} {node} had ended by itself")
            self._replace(node)

    def kill_worker(self) -> None:
        """SIGKILL of a worker of any node."""
        node = self.rng.choice(self.cluster.list_all_nodes())
        workers = sorted(pid for parent in children(node.pid) for pid in children(parent))
        if workers:
            try:
                os.kill(self.rng.choice(workers), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself

    def kill_node(self) -> None:
        """SIGKILL of a broker; another node comes soon."""
        node = self._any()
        node.kill()
        self._replace(node)

    def _replace(self, node: ClusterNode) -> None:
        self.cluster.remove_node(node)
        add_node(self.cluster)

    def pause(self, seconds: float = 0.0) -> None:
        """SIGSTOP of a broker for a while: nothing may be lost."""
        node = self._any()
        os.kill(node.pid, signal.SIGSTOP)
        self.over.wait(seconds or self.rng.uniform(0.1, NODE_TIMEOUT / 3))
        os.kill(node.pid, signal.SIGCONT)

    def pause_too_long(self) -> None:
        """Until it is taken for dead. When it goes on it must find that out, and end."""
        node = self._any()
        os.kill(node.pid, signal.SIGSTOP)
        time.sleep(NODE_TIMEOUT * 1.3 * SLACK)
        os.kill(node.pid, signal.SIGCONT)
        wait_for(lambda: node._node.process.poll() is not None, 30, f"{node}, declared dead, ends")
        self._replace(node)

    def cut(self) -> None:
        """Connections through the relay break."""
        for _ in range(self.rng.randint(1, 4)):
            self.relay.tell("cut")
            self.over.wait(self.rng.uniform(0.0, 0.1))

    def hold(self) -> None:
        """A partition, or half of one, shorter than what counts as death."""
        self.relay.tell(f"hold {self.rng.choice(['in', 'out', 'both'])}")
        self.over.wait(self.rng.uniform(0.1, NODE_TIMEOUT / 3))
        self.relay.tell("pass")

    def damage(self) -> None:
        """Bytes are changed on their way."""
        self.relay.tell("damage 0.2")
        self.over.wait(self.rng.uniform(0.1, 0.5))
        self.relay.tell("damage 0")

    def slow(self) -> None:
        """A slow link."""
        self.relay.tell("rate 3000000")
        self.over.wait(self.rng.uniform(0.2, 1.0))
        self.relay.tell("rate 0")


def add_node(cluster: Cluster, head: str = "") -> ClusterNode:
    """Start a node, perhaps one that finds the head at another address."""
    if not head:
        return cluster.add_node(num_cpus=2, resources={"seats": 4})
    assert cluster.head_node is not None
    place = nodes_.ClusterSettings(
        "127.0.0.1", head=head, key_file=cluster.head_node._node.record.key_file, node_timeout=NODE_TIMEOUT
    )
    settings = nodes_.NodeSettings(num_cpus=2, num_gpus=0, resources={"seats": 4})
    node = ClusterNode(nodes_.start(settings, os.getpid(), place))
    cluster.worker_nodes.append(node)
    return node


def run(seed: int, seconds: float, calm: float) -> Workload:
    """Play for so long.

    Args:
        seed: of everything that is drawn.
        seconds: after which no new round begins.
        calm: most seconds between two disturbances.

    Raises:
        AssertionError: something was wrong; the text names the seed and what was done.
    """
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 1}, node_timeout=NODE_TIMEOUT) as cluster:
        relay = Relay(cluster.address, seed)
        trouble = Trouble(cluster, relay, seed + 1, calm)
        try:
            add_node(cluster, relay.address)
            add_node(cluster)
            add_node(cluster)
            cluster.connect()
            cluster.wait_for_nodes()
            trouble.start()
            return _play(seed, seconds, trouble)
        except BaseException as error:
            told = "\n".join([*trouble.story[-40:], *_books(cluster)])
            raise AssertionError(f"chaos with seed {seed}: {error}\nwhat was done:\n{told}") from error
        finally:
            trouble.over.set()
            if trouble.is_alive():
                trouble.join()
            relay.close()


_ASK = """
import zray
from zray import api
zray.init(address={address!r}, log_to_driver=False)
for name, lines in api.query("books").items():
    for line in lines:
        print(" ", name, line)
"""


def _books(cluster: Cluster) -> Iterator[str]:
    """What the scheduler of each node says of itself."""
    for node in cluster.list_all_nodes():
        yield repr(node)
        asked = subprocess.run(
            [sys.executable, "-c", _ASK.format(address=node.address)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        yield asked.stdout or asked.stderr


def _play(seed: int, seconds: float, trouble: Trouble) -> Workload:
    workload = Workload(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(workload.rng.choice([1, 1, 3])):
            workload.submit()
        workload.collect()
    trouble.stop()
    workload.submit()
    workload.collect()
    workload.mixers.clear()
    gc.collect()  # errors and the frames that they came through keep one another, and references
    try:
        wait_for(_nothing_is_borrowed, 30, "nothing is borrowed")
    except AssertionError as error:
        raise AssertionError(f"{error}: {query('statistics')}; {query('objects')}") from None
    return workload


def _nothing_is_borrowed() -> bool:
    """Nothing but code that was first used on other nodes, which stays until the program ends."""
    found = query("statistics")
    return bool(found["objects_borrowed"] == found["code_borrowed"])


def main(arguments: list[str]) -> int:
    """Run it as a program; the exit status is that of the first failure."""
    parser = argparse.ArgumentParser(description="seeded chaos on a cluster of node processes")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--calm", type=float, default=1.5, help="most seconds between two disturbances")
    chosen = parser.parse_args(arguments)
    seed = int(time.time()) if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    before = set(children(os.getpid()))
    workload = run(seed, chosen.seconds, chosen.calm)
    left = [pid for pid in set(children(os.getpid())) - before if alive(pid)]
    assert not left, f"processes {left} are left"
    print(f"{workload.right} results were right; calls that must not be repeated: {workload.failed or 'all right'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
