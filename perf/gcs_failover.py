"""The replicated control store under load while its replicas are killed: the longest time that a client waits.

Covers real processes (`zray.broker.replica_process`) on this machine, encrypted TCP between them, one client that keeps some
requests under way, SIGKILL of head, middle and tail in turn, a fresh process in the place of each, and the judgement of the whole
history (`history`). Does not cover partitions (the simulation), nor brokers that are replicas.

    python -m perf.gcs_failover --kills 60 --json perf/results

For each kill the *gap* is the longest time, from the kill until all is as before, in which not one of the client's requests of a
kind was answered, and the *wait* the longest that any one request took. `before` is the same gap in the half second before the kill:
on a machine that is busy with other things, the gaps contain those.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from zray.broker.links import Heard, Impostor, Links, Prober, Refused
from zray.broker.peer_messages import Replicate
from zray.broker.replica_process import ReplicaConfig
from zray.broker.store_replica import StoreAccess
from zray.gcs import messages as m
from zray.gcs.replication.configuration import Configuration, Place
from zray.gcs.replication.timing import Timing
from zray.gcs.tables import ANY, Table, namespaced_key
from zray.peer_transport import ClusterKey, PeerSockets
from zray.transport import Context, Poller, ipc_endpoint

from . import timing as results
from .history import PUT, READ, SWAP, Operation, check

_PARENT: Final = str(Path(__file__).resolve().parents[1])
_START: Final = "import sys; sys.path.insert(0, {parent!r}); from zray.broker.replica_process import main; main()"
_KEYS: Final = [namespaced_key(b"", b"key%d" % number) for number in range(16)]
_WRITES: Final = 4
_READS: Final = 2
_BEFORE_S: Final = 0.5
PARTS: Final = ("head", "middle", "tail")


class Replica:
    """A process that was started."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self.name = name
        self.address = ""
        """Empty until it has said that it is ready."""

    def poll(self) -> bool:
        """Whether it is ready."""
        assert self.process.stdout is not None
        if not self.address and select.select([self.process.stdout], [], [], 0)[0]:
            word, _, rest = self.process.stdout.readline().decode().strip().partition(" ")
            if word != "ready":
                raise RuntimeError(f"a replica could not start: {rest}")
            self.address = rest
        return bool(self.address)

    @property
    def place(self) -> Place:
        """Where it is; its life it knows itself."""
        return Place(bytes.fromhex(self.name), 0, self.address)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def reap(self) -> None:
        """Wait for its end and let go of its pipes."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class ReplicaSet:
    """Replica processes of one store. Used in a `with` statement they end with it."""

    def __init__(self, timing: Timing | None = None) -> None:
        self.timing = timing or Timing()
        self.directory = tempfile.mkdtemp(prefix="zray-r", dir="/tmp")
        self.key_file = os.path.join(self.directory, "key")
        ClusterKey.new().write(self.key_file)
        self.replicas: dict[bytes, Replica] = {}

    def start(self, *, first: bool = False) -> Replica:
        """Start a process; `wait_ready`, or `Replica.poll`, tells when it listens."""
        name = os.urandom(16).hex()
        contacts = [(other.name, other.address) for other in self.replicas.values() if other.address]
        config = ReplicaConfig(
            name, self.directory, self.key_file, first=first, contacts=contacts, timing=self.timing, shards=2
        )
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(parent=_PARENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        process.stdin.flush()
        replica = self.replicas[bytes.fromhex(name)] = Replica(process, name)
        return replica

    def wait_ready(self, replica: Replica, seconds: float = 30.0) -> None:
        """Wait until it listens. TimeoutError: it does not."""
        assert replica.process.stdout is not None
        if not replica.address and not select.select([replica.process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"a replica gave no sign of life for {seconds:g} s")
        replica.poll()

    def begin(self, count: int) -> None:
        """Start so many processes; the first one is the store, the others join it."""
        first = self.start(first=True)
        self.wait_ready(first)
        # Two more make the council; the rest are told of all three, any one of which may be gone before they ask.
        for some in (min(2, count - 1), max(0, count - 3)):
            for replica in [self.start() for _ in range(some)]:
                self.wait_ready(replica)

    def remove(self, replica: Replica) -> None:
        """Forget one that has ended."""
        replica.reap()
        del self.replicas[bytes.fromhex(replica.name)]

    def close(self) -> None:
        """End all."""
        for replica in self.replicas.values():
            replica.kill()
        for replica in list(self.replicas.values()):
            self.remove(replica)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> ReplicaSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Load:
    """A client that keeps some writes and some reads under way, and notes what became of each."""

    def __init__(self, replicas: ReplicaSet, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._context = Context()
        self._inbox = self._context.inbox(ipc_endpoint(replicas.directory, "c"))
        self._poller = Poller(self._inbox)
        own = os.urandom(16)
        sockets = PeerSockets(self._context, own, ClusterKey.read(replicas.key_file), self._poller)
        self._links = Links(sockets, Prober(self._poller), own)
        places = [replica.place for replica in replicas.replicas.values() if replica.address]
        self.access = StoreAccess(self._links, places, replicas.timing)
        self.operations: list[Operation] = []
        self.open: dict[str, int] = {READ: 0, PUT: 0}
        self._known: dict[bytes, int] = {}
        self.busy = True
        """Whether answered requests are followed by others."""

    @property
    def configuration(self) -> Configuration | None:
        """The newest that the client knows."""
        return self.access.router.configuration

    def step(self, seconds: float = 0.05) -> None:
        """Ask, and take in answers; waits at most so long."""
        now = time.monotonic()
        if self.busy:
            while self.open[PUT] < _WRITES:
                self._ask(self._rng.choice([PUT, SWAP]))
            while self.open[READ] < _READS:
                self._ask(READ)
        self.access.flush(now)
        wait = max(0.0, min(self.access.wake_at, self._links.wake_at, now + seconds) - now)
        _, descriptors, news = self._poller.wait(int(wait * 1000) + (wait > 0))
        now = time.monotonic()
        events = self._links.receive(now) if news else []
        events += self._links.probed(descriptors)
        if now >= self._links.wake_at:
            events += self._links.tick(now)
        for event in events:
            if isinstance(event, Heard):
                if isinstance(event.message, Replicate):
                    self.access.handle(event.node, event.message, now)
            elif isinstance(event, (Refused, Impostor)):
                self._links.forget(event.node)
                self.access.lost(event.node, now)
        if now >= self.access.wake_at:
            self.access.tick(now)
        self.access.flush(now)

    def _ask(self, kind: str) -> None:
        key = self._rng.choice(_KEYS)
        value = b"" if kind == READ else b"v%d" % len(self.operations)
        expected = self._known.get(key, 0) if kind == SWAP else ANY
        request: m.Request = m.Get(Table.KV, key) if kind == READ else m.Put(Table.KV, key, value, expected)
        operation = Operation(0, kind, key, value, expected, time.monotonic())
        self.operations.append(operation)
        self.open[READ if kind == READ else PUT] += 1
        self.access.ask(
            m.encode(request), operation.began, lambda body: self._take(operation, body), write=kind != READ
        )

    def _take(self, operation: Operation, body: bytes) -> None:
        operation.ended = time.monotonic()
        self.open[READ if operation.kind == READ else PUT] -= 1
        operation.take(m.decode_reply(body))
        self._known[operation.key] = operation.version

    def run_until(self, condition: Any, seconds: float, what: str) -> None:
        """Go on until something holds. TimeoutError: it does not within so many seconds."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"not within {seconds:g} s: {what}; {self.configuration}")
            self.step()

    def is_whole(self) -> bool:
        """Whether the client knows of a chain of three."""
        configuration = self.configuration
        return configuration is not None and len(configuration.chain) == len(configuration.council) == 3

    def finish(self, seconds: float = 30.0) -> None:
        """Ask for nothing more, and wait until everything is answered."""
        self.busy = False
        self.run_until(lambda: not any(self.open.values()), seconds, "all requests are answered")

    def close(self) -> None:
        """Let go of the sockets."""
        self._links.close()
        self._poller.close()
        self._context.close()


class Kill(msgspec.Struct):
    """What a kill did to the client."""

    part: str
    before_ms: float
    """Longest time without an answer to any write right before the kill: what the machine does by itself."""
    write_gap_ms: float
    """Longest time without an answer to any write."""
    read_gap_ms: float
    wait_ms: float
    """Longest that one request took."""
    whole_ms: float
    """Until there were three replicas again."""


def kill_one(replicas: ReplicaSet, load: Load, part: str) -> Kill:
    """Kill a replica under load and wait until another has taken a place in the chain."""
    load.run_until(load.is_whole, 30.0, "there are three replicas")
    first = len(load.operations)
    begun = time.monotonic()
    load.run_until(
        lambda: len(load.operations) > first + 50 and time.monotonic() > begun + _BEFORE_S,
        30.0,
        "requests are answered",
    )
    before = [one for one in load.operations[first:] if one.kind != READ and one.ended < float("inf")]
    configuration = load.configuration
    assert configuration is not None
    victim = replicas.replicas[configuration.chain[PARTS.index(part)].id]
    epoch = configuration.epoch
    since = len(load.operations) - sum(load.open.values()) - 50
    killed = time.monotonic()
    victim.kill()

    def whole() -> bool:
        return load.is_whole() and load.configuration is not None and load.configuration.epoch > epoch

    # Whose life is over is seen by its port; its successor in the chain waits ready (`ReplicaSet.begin`).
    load.run_until(whole, 30.0, f"three replicas again after the {part} was killed")
    again = time.monotonic()
    count = len(load.operations)

    def answered() -> bool:
        """Both reads and writes: fifty reads may be through before the first write is."""
        kinds = {one.kind == READ for one in load.operations[count:] if one.ended < float("inf")}
        return len(kinds) == 2 and len(load.operations) > count + 50

    load.run_until(answered, 30.0, "reads and writes are answered after the kill")
    replicas.remove(victim)
    seen = [one for one in load.operations[max(0, since) :] if one.ended >= killed]
    return Kill(
        part,
        _gap(before, begun),
        _gap([one for one in seen if one.kind != READ], killed),
        _gap([one for one in seen if one.kind == READ], killed),
        max((one.ended - max(one.began, killed)) * 1e3 for one in seen if one.ended < float("inf")),
        (again - killed) * 1e3,
    )


def _gap(operations: list[Operation], since: float) -> float:
    ends = [since, *sorted(one.ended for one in operations if one.ended < float("inf"))]
    return max((after - before) * 1e3 for before, after in itertools.pairwise(ends))


def measure(kills: int, seconds: float = float("inf"), seed: int = 0) -> tuple[list[Kill], Load]:
    """Kill so many replicas one after the other (or stop after so many seconds), judge the history, return both.

    Raises:
        AssertionError: an acknowledged write was lost or carried out twice, or a read was not right.
    """
    until = time.monotonic() + seconds
    found: list[Kill] = []
    with ReplicaSet() as replicas:
        replicas.begin(4)
        load = Load(replicas, seed)
        with contextlib.closing(load):
            load.run_until(load.is_whole, 30.0, "there are three replicas")
            while len(found) < kills and time.monotonic() < until:
                found.append(kill_one(replicas, load, PARTS[len(found) % len(PARTS)]))
                spare = replicas.start()
                load.run_until(spare.poll, 30.0, "the next process is ready")
            load.finish()
    check(load.operations)
    return found, load


def summary(found: list[Kill]) -> dict[str, Any]:
    """Return the figures of each part of the chain."""
    rows: dict[str, Any] = {}
    for part in PARTS:
        kills = [kill for kill in found if kill.part == part]
        if kills:
            rows[part] = {"kills": len(kills)}
            for name in ("before_ms", "write_gap_ms", "read_gap_ms", "wait_ms", "whole_ms"):
                values = sorted(getattr(kill, name) for kill in kills)
                rows[part][name] = {
                    "median": round(statistics.median(values), 2),
                    "p90": round(values[int(0.9 * (len(values) - 1))], 2),
                    "largest": round(values[-1], 2),
                }
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.gcs_failover", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="directory for the figures")
    chosen = parser.parse_args(arguments)
    found, load = measure(chosen.kills, chosen.seconds, chosen.seed)
    rows = summary(found)
    waits = sorted((one.ended - one.began) * 1e3 for one in load.operations)
    quiet = {"p50_ms": round(statistics.median(waits), 3), "p99_ms": round(waits[int(0.99 * len(waits))], 3)}
    body = {
        "kills": len(found),
        "operations": len(load.operations),
        "under_way": {"writes": _WRITES, "reads": _READS},
        "all_requests": quiet,
        "parts": rows,
        "lost_or_repeated_writes": 0,
    }
    for part, row in rows.items():
        print(f"{part:7s} {row['kills']} kills")
        for name, values in row.items():
            if isinstance(values, dict):
                print(f"        {name:14s} " + "  ".join(f"{key} {value:8.2f}" for key, value in values.items()))
    print(f"{len(load.operations)} requests, {quiet}; the history is right")
    if chosen.json:
        print(f"wrote {results.write_result(results.document('gcs-failover', body), chosen.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
