"""A seeded world of replicas, councils and clients: frames are lost, late, repeated and out of order; processes are killed,
started again and paused; the network falls apart in halves or in one direction; clocks run fast and slow.

Covers the surroundings of `zray.gcs.replication` with the real control store as its state. Does not cover sockets
(`tests/integration/test_replicas.py`) or judging histories (`perf.history`). A world runs from its seed alone. After each event:

    the machines' own equations hold
    each epoch has one configuration                       at any true time at most one head has a lease, and one tail, but for
                                                           one that has heard too little to harm
    all replicas agree on the history as far as it counts
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

from perf.history import PUT, READ, SWAP, Operation, check
from zray.gcs import messages as m
from zray.gcs.limits import GcsLimits
from zray.gcs.replication.client import Router
from zray.gcs.replication.configuration import Configuration, Place
from zray.gcs.replication.council import Votes
from zray.gcs.replication.faults import NO_CHAIN_FAULTS, ChainFault, ChainFaults
from zray.gcs.replication.member import Member
from zray.gcs.replication.messages import AnyMessage, Outgoing
from zray.gcs.replication.state import SnapshotSource, StoreState
from zray.gcs.replication.timing import Timing
from zray.gcs.service import GcsService
from zray.gcs.tables import ANY, Table, namespaced_key

TIMINGS = [
    Timing(),
    # Leases that outlast the patience of others, coarse clocks, proposers that get in one another's way.
    Timing(beat=0.03, silent=0.15, lease=0.3, drift=0.1, stagger=0.001),
    Timing(beat=0.03, silent=0.2, lease=0.1, drift=0.05, resend=0.01),
]
SHARDS = 2
LIMITS = GcsLimits(log_changes=8)
KEYS = [namespaced_key(b"", b"k%d" % number) for number in range(3)]
KEYS_OF_BALLAST = [namespaced_key(b"", b"ballast%d" % number) for number in range(40)]


class Disk:
    """Votes that outlive their process."""

    def __init__(self) -> None:
        self.votes: Votes | None = None

    def load(self) -> Votes | None:
        return self.votes

    def save(self, votes: Votes) -> None:
        self.votes = votes


class TracedState:
    """The real store, and a digest of the history that made it."""

    def __init__(self) -> None:
        self.store = StoreState(GcsService(None, "/nowhere", shards=SHARDS, limits=LIMITS, epoch=1))
        self.digests: dict[int, bytes] = {0: b""}
        """Entry -> digest of the history up to it, as far as this process saw it happen."""
        self.last = 0

    def _note(self, changes: bytes) -> None:
        digest = blake2b(self.digests[self.last] + changes, digest_size=8).digest()
        self.last += 1
        self.digests[self.last] = digest

    def execute(self, body: bytes) -> tuple[bytes, bytes]:
        changes, answer = self.store.execute(body)
        self._note(changes)
        return changes, answer

    def apply(self, changes: bytes) -> None:
        self.store.apply(changes)
        self._note(changes)

    def read(self, body: bytes) -> bytes:
        return self.store.read(body)

    def snapshot(self) -> SnapshotSource:
        return TracedSnapshot(self.last, self.digests[self.last], self.store.snapshot())

    def restore(self, parts: Sequence[bytes]) -> None:
        if not parts:
            self.last, self.digests = 0, {0: b""}
        else:
            self.last = int.from_bytes(parts[0][:8], "big")
            self.digests = {self.last: parts[0][8:]}
        self.store.restore(parts[1:])


class TracedSnapshot:
    def __init__(self, last: int, digest: bytes, inner: SnapshotSource) -> None:
        self.first = last.to_bytes(8, "big") + digest
        self.inner = inner

    @property
    def count(self) -> int:
        return self.inner.count + 1

    def part(self, index: int) -> bytes:
        return self.first if index == 0 else self.inner.part(index - 1)


class Process:
    """A seat at which one life of a process after the other sits."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.id = bytes([number]) * 16
        self.disk = Disk()
        self.life = 0
        self.member: Member | None = None
        self.state = TracedState()
        self.paused = False
        self.inbox: list[tuple[bytes, AnyMessage]] = []
        drift = world.timing.drift
        self.rate = world.rng.choice([1 - drift, 1.0, 1 + drift, world.rng.uniform(1 - drift, 1 + drift)])
        self.offset = world.rng.uniform(0, 1000)
        self.wake = 0
        """Number of the newest alarm; older ones do not ring."""

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    def start(self, first: bool = False) -> None:
        self.life += 1
        self.inbox = []
        self.paused = False
        self.state = TracedState()
        self.member = Member(
            Place(self.id, self.life),
            self.state,
            self.disk,
            self.world.timing,
            self.clock(),
            random.Random(self.world.rng.random()),
            first=first,
            contacts=[process.id for process in self.world.processes],
            faults=self.world.faults,
        )
        self.settle()

    def receive(self, sender: bytes, message: AnyMessage) -> None:
        if self.member is None:
            return
        if self.paused:
            self.inbox.append((sender, message))
            return
        self.member.handle(sender, message, self.clock())
        if self.world.rng.random() < 0.8:  # sometimes several are taken in before anything is sent
            self.settle()
        else:
            self.alarm(0.0)

    def ring(self, number: int) -> None:
        if self.member is None or self.paused or number != self.wake:
            return
        self.member.tick(self.clock())
        self.settle()

    def settle(self) -> None:
        assert self.member is not None
        self.world.send(self.id, self.member.flush(self.clock()))
        self.alarm(max(0.0, (self.member.wake_at - self.clock()) / self.rate))
        self.member.validate()
        self.world.look_at(self)

    def alarm(self, seconds: float) -> None:
        self.wake += 1
        number = self.wake
        self.world.after(seconds + 1e-6, lambda: self.ring(number))

    def resume(self) -> None:
        self.paused = False
        waiting, self.inbox = self.inbox, []
        for sender, message in waiting:
            self.receive(sender, message)
        if self.member is not None:
            self.member.tick(self.clock())
            self.settle()


class Client:
    """Asks for one or two things at a time, and notes what it was told."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.id = bytes([100 + number]) * 16
        self.router = Router([process.id for process in world.processes], world.timing)
        self.open: dict[int, Operation] = {}
        self.known: dict[bytes, int] = {}
        """Versions that were seen last."""
        self.made = 0
        self.wake = 0

    def act(self) -> None:
        """Ask for something, and again after a while."""
        rng = self.world.rng
        kind = rng.choice([PUT, PUT, SWAP, SWAP, READ, READ, READ])
        # Reads go on while writes wait: who is cut off together with an old tail should find out.
        waiting = sum((operation.kind == READ) == (kind == READ) for operation in self.open.values())
        if waiting < 2 and not self.world.closing:
            self.ask(kind, rng.choice(KEYS))
        self.world.after(rng.uniform(0.001, 0.04), self.act)

    def ask(self, kind: str, key: bytes) -> None:
        rng, now = self.world.rng, self.world.now
        self.made += 1
        value = b"" if kind == READ else b"c%d-%d" % (self.number, self.made)
        expected = ANY
        request: m.Request = m.Get(Table.KV, key)
        if kind == SWAP:
            expected = rng.choice([self.known.get(key, 0), self.known.get(key, 0), rng.randrange(20)])
        if kind != READ:
            request = m.Put(Table.KV, key, value, expected)
        operation = Operation(self.number, kind, key, value, expected, now)
        self.world.operations.append(operation)
        self.open[self.router.ask(m.encode(request), now, write=kind != READ)] = operation
        if kind == READ and not self.world.closing and rng.random() < 0.1:
            # It asks somebody who is not the tail, as one does who has not heard the news.
            self.router.out = [(rng.choice(self.world.processes).id, sent) for _, sent in self.router.out]
        self.settle()

    def receive(self, message: AnyMessage) -> None:
        self.router.handle(message, self.world.now)
        self.settle()

    def settle(self) -> None:
        for number, body in self.router.answers:
            operation = self.open.pop(number, None)
            if operation is not None:
                self.take(operation, m.decode_reply(body))
        self.router.answers.clear()
        out, self.router.out = self.router.out, []
        self.world.send(self.id, out)
        self.router.validate()
        self.wake += 1
        number = self.wake
        self.world.after(max(0.0, self.router.wake_at - self.world.now) + 1e-6, lambda: self.ring(number))

    def take(self, operation: Operation, reply: m.Reply) -> None:
        operation.ended = self.world.now
        operation.take(reply)
        self.known[operation.key] = operation.version

    def ring(self, number: int) -> None:
        if number == self.wake:
            self.router.tick(self.world.now)
            self.settle()


class World:
    """Processes, clients, the network between them, and what happens to them."""

    def __init__(self, seed: int, faults: ChainFaults = NO_CHAIN_FAULTS, processes: int = 0, clients: int = 3) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = faults
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.timing = self.rng.choice(TIMINGS)
        self.loss = self.rng.choice([0.0, 0.0, 0.01, 0.1])
        self.repeats = self.rng.choice([0.0, 0.02, 0.1])
        self.slow = self.rng.choice([0.0, 0.01, 0.1])
        self.trouble = self.rng.choice([0.1, 0.3, 0.8])
        """Seconds between two misfortunes, on average."""
        self.malice = self.rng.choice([0.0, 0.1, 0.3])
        """How often the worst moment is chosen for one."""
        self.cut: set[tuple[bytes, bytes]] = set()
        self.closing = False
        self.operations: list[Operation] = []
        self.configurations: dict[int, Configuration] = {}
        self.history: dict[int, bytes] = {}
        self.kills = self.partitions = self.pauses = 0
        self.processes = [
            Process(self, number) for number in range(1, 1 + (processes or self.rng.choice([3, 3, 4, 5])))
        ]
        self.clients = [Client(self, number) for number in range(clients)]
        self._by_id: dict[bytes, Process | Client] = {one.id: one for one in [*self.processes, *self.clients]}
        self.processes[0].start(first=True)
        for process in self.processes[1:]:
            self.after(self.rng.uniform(0.0, 0.2), process.start)
        for client in self.clients:
            self.after(0.01, client.act)

    # -- time and network ----------------------------------------------------------------------------------------------

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        self._number += 1
        if seconds < float("inf"):
            heapq.heappush(self._events, (self.now + seconds, self._number, happen))

    def send(self, sender: bytes, out: list[Outgoing]) -> None:
        for to, message in out:
            if self.rng.random() < self.loss:
                continue
            for _ in range(2 if self.rng.random() < self.repeats else 1):
                delay = self.rng.uniform(0.0001, 0.001)
                if self.rng.random() < self.slow:
                    delay = self.rng.choice([0.005, 0.05, 0.3, 2.0]) * self.rng.random()
                self.after(delay, lambda to=to, message=message: self.deliver(sender, to, message))  # type: ignore[misc]

    def deliver(self, sender: bytes, to: bytes, message: AnyMessage) -> None:
        if (sender, to) in self.cut:
            return
        receiver = self._by_id[to]
        if isinstance(receiver, Process):
            receiver.receive(sender, message)
        else:
            receiver.receive(message)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            if until is not None and until():
                return True
        self.now = end
        return until is None

    # -- misfortunes ---------------------------------------------------------------------------------------------------

    def misfortune(self) -> None:
        if self.closing:
            return
        kind = self.rng.choice(
            [self.kill, self.kill, self.kill, self.pause, self.separate, self.deafen, self.isolate, self.isolate]
        )
        kind()
        self.after(self.rng.expovariate(1 / self.trouble), self.misfortune)

    def _may_end(self, process: Process) -> bool:
        """Whether every chain that is decided, or may be, keeps a replica: without any, rows are rightly lost."""
        newest = max(self.configurations, default=0)
        chains = [self.configurations[newest].chain] if newest else []
        for other in self.processes:
            votes = other.disk.votes or Votes()
            if other.member is not None and other.member.campaign is not None:
                chains.append(other.member.campaign.value.chain)
            chains += [one.chain for one in (votes.accepted, votes.decided) if one is not None and one.epoch > newest]
        lives = {
            (other.id, other.life) for other in self.processes if other.member is not None and other is not process
        }
        return all(any((place.id, place.life) in lives for place in chain) for chain in chains)

    def kill(self) -> None:
        process = self.rng.choice(self.processes)
        if process.member is not None and self._may_end(process):
            self.end(process)

    def end(self, process: Process) -> None:
        process.member = None
        self.kills += 1
        for other in [*self.processes, *self.clients]:
            if other is not process and self.rng.random() < 0.9:
                self.after(self.rng.uniform(0.0003, 0.003), lambda other=other: self.find_refused(process, other))  # type: ignore[misc]
        self.after(self.rng.choice([0.001, 0.02, 0.3, 1.5]) * self.rng.random(), lambda: self.start_again(process))

    def start_again(self, process: Process) -> None:
        if process.member is None:
            process.start()

    def find_refused(self, process: Process, other: Process | Client) -> None:
        """`other` looks whether somebody listens where `process` was."""
        if process.member is not None or (process.id, other.id) in self.cut or (other.id, process.id) in self.cut:
            return
        if isinstance(other, Client):
            other.router.lost(process.id, self.now)
            other.settle()
        elif other.member is not None and not other.paused:
            other.member.refused(process.id, other.clock())
            other.settle()

    def pause(self) -> None:
        process = self.rng.choice(self.processes)
        if process.member is not None and not process.paused:
            self.pauses += 1
            process.paused = True
            life = process.life

            def resume() -> None:
                if process.paused and process.life == life:
                    process.resume()

            self.after(self.rng.choice([0.02, 0.3, 1.2, 3.0]) * self.rng.random(), resume)

    def separate(self) -> None:
        """The network falls apart in two halves."""
        everybody = [one.id for one in [*self.processes, *self.clients]]
        half = {name for name in everybody if self.rng.random() < 0.5}
        self._cut_for_a_while({(a, b) for a in everybody for b in everybody if (a in half) != (b in half)})

    def deafen(self) -> None:
        """Some are not heard by some others; the other way round all is well."""
        everybody = [one.id for one in [*self.processes, *self.clients]]
        self._cut_for_a_while({(a, b) for a in everybody for b in everybody if self.rng.random() < 0.2})

    def isolate(self) -> None:
        """A head or tail is cut off together with a client or two, and may not notice."""
        newest = self.configurations[max(self.configurations)]
        island = {self.rng.choice([newest.head.id, newest.tail.id])}
        island |= {client.id for client in self.rng.sample(self.clients, self.rng.choice([0, 1, 1, 2]))}
        everybody = [one.id for one in [*self.processes, *self.clients]]
        self._cut_for_a_while({(a, b) for a in everybody for b in everybody if (a in island) != (b in island)})

    def _at_the_worst_moment(self, process: Process) -> None:
        """A process has just heard that its proposal was accepted, and nobody else has."""
        if self.rng.random() < 0.5:
            if self._may_end(process):
                self.end(process)
        else:
            everybody = [one.id for one in [*self.processes, *self.clients]]
            own = process.id
            self._cut_for_a_while({(a, b) for a in everybody for b in everybody if (a == own) != (b == own)})

    def _cut_for_a_while(self, cut: set[tuple[bytes, bytes]]) -> None:
        if not self.cut:
            self.partitions += 1
            self.cut = cut
            self.after(self.rng.choice([0.1, 0.5, 2.5]) * self.rng.random(), self.cut.clear)

    # -- what must hold ------------------------------------------------------------------------------------------------

    def look_at(self, process: Process) -> None:
        member = process.member
        assert member is not None
        configuration = member.configuration
        if configuration is not None:
            if configuration.epoch not in self.configurations and not self.closing and self.rng.random() < self.malice:
                self.after(0.0, lambda: self._at_the_worst_moment(process))
            known = self.configurations.setdefault(configuration.epoch, configuration)
            assert known == configuration, f"epoch {configuration.epoch} has two configurations"
        replica = member.replica
        if replica.index >= 0:
            digest = process.state.digests.get(replica.committed)
            if digest is not None and replica.committed:
                known_digest = self.history.setdefault(replica.committed, digest)
                assert known_digest == digest, f"two histories up to entry {replica.committed}, both of which count"
        self._check_leases()

    def _check_leases(self) -> None:
        heads: list[Process] = []
        tails: list[Process] = []
        for process in self.processes:
            if process.member is not None and process.member.replica.has_lease(process.clock()):
                heads += [process] * process.member.replica.is_head
                tails += [process] * process.member.replica.is_tail
        assert len(heads) <= 1, "two heads have a lease at the same time"
        if len(tails) > 1:
            # One that does not know yet that another was added behind it may read: it has all that the other has.
            newest = max(filter(None, (tail.member and tail.member.configuration for tail in tails)), key=_epoch)
            for tail in tails:
                assert newest.position(Place(tail.id, tail.life)) >= 0, "two tails have a lease at the same time"

    def live(self, seconds: float = 5.0) -> None:
        """Misfortunes for a while; then all is well again, everybody must come to rest, and the history is judged."""
        self.after(0.4, self.misfortune)
        self.run(seconds)
        self.heal()
        rested = self.run(30.0, until=self.is_at_rest)
        assert rested, f"seed {self.seed}: the world does not come to rest: {self.describe()}"
        for key in KEYS:
            self.clients[0].ask(READ, key)
        rested = self.run(10.0, until=lambda: not any(client.open for client in self.clients))
        assert rested, f"seed {self.seed}: reads after all are not answered: {self.describe()}"
        self.check_rows()
        check(self.operations)

    def heal(self) -> None:
        self.closing = True
        self.cut.clear()
        self.loss = self.repeats = self.slow = 0.0
        for process in self.processes:
            if process.member is None:
                process.start()
            elif process.paused:
                process.resume()

    def is_at_rest(self) -> bool:
        if any(client.open for client in self.clients):
            return False
        found = [process.member.replica for process in self.processes if process.member is not None]
        configuration = found[0].configuration
        if configuration is None or any(replica.configuration != configuration for replica in found):
            return False
        chain = [replica for replica in found if replica.index >= 0]
        return len(configuration.chain) == len(chain) == 3 and len({replica.last for replica in chain}) == 1

    def check_rows(self) -> None:
        """All replicas have the same rows, and their stores' own equations hold."""
        images = []
        for process in self.processes:
            assert process.member is not None
            if process.member.replica.index >= 0:
                service = process.state.store.service
                service.validate()
                images.append([(image.revision, image.numbers, sorted(image.rows)) for image in service.image()])
        assert all(image == images[0] for image in images), "replicas have different rows"

    def describe(self) -> str:
        lines = []
        for process in self.processes:
            member = process.member
            if member is not None:
                replica, configuration = member.replica, member.configuration
                chain = "" if configuration is None else "".join(str(place.id[0]) for place in configuration.chain)
                joiner = replica.joiner
                lines.append(
                    f"{process.id[0]}.{process.life} epoch {replica.epoch} chain {chain} {replica.role.value}"
                    f" last {replica.last} committed {replica.committed}"
                    + (f" joiner {joiner.place.id[0]} gated {joiner.gated_at}" if joiner is not None else "")
                    + (f" campaign {member.campaign.state}" if member.campaign is not None else "")
                )
        lines.append(f"open: {[str(operation) for client in self.clients for operation in client.open.values()]}")
        return "\n".join(lines)


def _epoch(configuration: Configuration) -> int:
    return configuration.epoch


def planted(fault: ChainFault, seed: int, seconds: float = 5.0) -> str:
    """Run a world with a fault; return how it was noticed, empty: it was not."""
    try:
        World(seed, frozenset({fault})).live(seconds)
    except (AssertionError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
