"""Brokers of large clusters in virtual time: the very machines, with a clock on what they do.

Covers what membership costs the head and an ordinary node of a cluster of any size (`head_load`, `node_load`), and how many tasks a second one driver
gets through when its tasks run on many nodes (`one_driver`). Does not cover what links and workers cost: those are arguments, measured by
`scale_costs`. Needs the simulation of clusters in `tests/`, so it runs from a source tree.

The brokers are those of `zray.broker.server`, with the doors of `tests.simulation.cluster_machine`. `head_load` and `node_load` run one broker; all
other nodes are frames that it is sent. `one_driver` runs the broker of every node: each round of a broker is timed, and takes that long in virtual
time; what it sends in a round leaves when the round begins, so delays are too short by at most one round.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from tests.simulation.cluster_machine import Doors, Machine, Site
from tests.simulation.cluster_processes import Driver, Process
from tests.simulation.world import Get, Link
from zray import resources, wire
from zray._store import with_index
from zray.broker import membership
from zray.broker import peer_messages as pm
from zray.broker.fork_parent import Fork
from zray.broker.links import Links
from zray.broker.membership import NodeInfo, NodeLoad
from zray.ids import task_id
from zray.peer_transport import Arrived, Connected
from zray.task import TASK, CallShape, JobSpec, TaskSpec

from .scale_costs import LinkCost

CPUS = 2.0
CHANGING = 1.0
"""Share of nodes whose load is another one at each beat: all, in a busy cluster."""


@contextmanager
def without_windows() -> Iterator[None]:
    """As it was before: everybody is told of everybody with every beat, and each report is encoded for itself."""
    before = membership.LOADS_AT_ONCE, membership.BEATS_A_SECOND, Links.send_encoded

    def encode_again(self: Links, node: bytes, body: bytes) -> None:
        message = _decoded.get(id(body))
        if message is None:
            _decoded.clear()
            message = _decoded[id(body)] = pm.decode(body)
        self._put(node, pm.PLAIN, pm.encode(message))

    membership.LOADS_AT_ONCE, membership.BEATS_A_SECOND = 1 << 30, 1 << 30  # type: ignore[misc]
    Links.send_encoded = encode_again  # type: ignore[method-assign]
    try:
        yield
    finally:
        membership.LOADS_AT_ONCE, membership.BEATS_A_SECOND, Links.send_encoded = before  # type: ignore[misc,method-assign]


_decoded: dict[int, pm.PeerMessage] = {}


@dataclass
class Chatter:
    """What membership costs one broker, per second."""

    nodes: int
    machine: float
    """Processor seconds of the broker's own work."""
    frames_out: float
    bytes_out: float
    frames_in: float
    bytes_in: float
    beat: float
    """Seconds between two beats."""

    def busy(self, out: LinkCost, into: LinkCost) -> float:
        """Cores that it keeps busy, with its sockets."""
        return self.machine + out.of(self.frames_out, self.bytes_out) + into.of(self.frames_in, self.bytes_in)


class _Sockets:
    """Sockets of the one broker that is run: count what it sends, bring what the others would."""

    def __init__(self, own: bytes) -> None:
        self.own = own
        self.paused = self.closed = False
        self.events: list[Any] = []
        self.frames = self.bytes = 0
        self.arrived = self.arrived_bytes = 0
        self.keep: dict[bytes, list[bytes]] = {}
        """Frames to these nodes are kept."""
        self.refused = self.malformed = 0

    def listen(self, host: str, port: int) -> int:
        return port or 1

    def dial(self, node: bytes, address: str) -> None:
        self.events.append(Connected(node))

    def rename(self, node: bytes, now: bytes) -> None:
        pass

    def hang_up(self, node: bytes) -> None:
        pass

    def reaches(self, node: bytes) -> bool:
        return True

    def send(self, node: bytes, frame: bytes) -> bool:
        self.frames += 1
        self.bytes += len(frame)
        if node in self.keep:
            self.keep[node].append(frame)
        return True

    def bring(self, node: bytes, frame: bytes) -> None:
        self.events.append(Arrived(node, frame))
        self.arrived += 1
        self.arrived_bytes += len(frame)

    def receive(self, most: int = 256) -> list[Any]:
        events, self.events = self.events[:most], self.events[most:]
        return events

    def close(self) -> None:
        self.closed = True


class _Alone(Machine):
    """A broker whose cluster consists of frames."""

    def open_sockets(self, own: bytes) -> Any:
        self.sockets = _Sockets(own)  # type: ignore[assignment]
        return self.sockets

    def kick(self) -> None:
        """Rounds are asked for by whoever measures."""


def _site(directory: str, kind: type[Machine]) -> tuple[Site, Machine]:
    os.makedirs(f"{directory}/logs", exist_ok=True)
    site = Site(1, directory, 30.0)
    return site, kind(site, {"CPU": CPUS})


def _info(index: int) -> NodeInfo:
    return NodeInfo(
        task_id(bytes(16), 5_000_000 + index),
        f"10.1.{index >> 8}.{index & 255}:7000",
        "host",
        1,
        {"CPU": CPUS},
        {},
        "0.1.0",
        "{}.{}".format(*__import__("sys").version_info[:2]),
    )


def _load(rng: Random) -> NodeLoad:
    return NodeLoad({"CPU": float(rng.randint(0, 2)), "memory": float(rng.getrandbits(30))}, rng.randint(0, 9), 2, 900)


def head_load(nodes: int, periods: int = 4) -> tuple[Chatter, list[bytes]]:
    """What membership costs the head of so many busy nodes; and the reports that one of them was sent meanwhile."""
    rng = Random(nodes)
    with tempfile.TemporaryDirectory() as directory:
        site, head = _site(directory, _Alone)
        with Doors(site, debug=False):
            head.start("")
            broker, sockets, world = head.broker, head.sockets, site.world
            assert isinstance(sockets, _Sockets)
            assert broker.cluster is not None
            others = [_info(index) for index in range(nodes - 1)]
            _admit(broker.cluster, others)
            sockets.events.clear()
            beat = membership.beat_seconds(nodes)
            if others:
                sockets.keep[others[0].id] = []
            sockets.frames = sockets.bytes = 0
            spent = 0.0
            to = head.id
            for _ in range(periods):
                for info in others:
                    if rng.random() < CHANGING:
                        sockets.bring(info.id, pm.envelope(pm.PLAIN, to, pm.encode(pm.Beat(_load(rng)))))
                spent += _rounds(site, head, beat)
            seconds = periods * beat
            kept = next(iter(sockets.keep.values()), [])
    world.heap.clear()
    found = Chatter(
        nodes,
        spent / seconds,
        sockets.frames / seconds,
        sockets.bytes / seconds,
        sockets.arrived / seconds,
        sockets.arrived_bytes / seconds,
        beat,
    )
    return found, kept


def _admit(cluster: Any, others: list[NodeInfo]) -> None:
    """Make members of all, without telling each of each other: joining is not what is measured."""
    for info in others:
        cluster._membership.join(info, 0.0)
        cluster._learn(info, 0.0)


def _rounds(site: Site, machine: Machine, seconds: float) -> float:
    """Let a broker see to what has come, and time pass; return the processor time it took."""
    world, spent = site.world, 0.0
    end = world.now + seconds
    sockets = machine.sockets
    assert sockets is not None
    while True:
        begun = time.process_time()
        machine.broker.round(0.0)
        spent += time.process_time() - begun
        if sockets.events:
            continue
        world.now = max(world.now + 1e-6, min(end, machine.broker.wake_at))
        if world.now >= end:
            return spent


def node_load(nodes: int, reports: list[bytes], beat: float) -> Chatter:
    """What membership costs an ordinary node that is told what `head_load` has kept."""
    with tempfile.TemporaryDirectory() as directory:
        site, node = _site(directory, _Alone)
        with Doors(site, debug=False):
            node.start("")  # it need not join: what it does with reports is the same
            broker, sockets = node.broker, node.sockets
            assert isinstance(sockets, _Sockets)
            assert broker.cluster is not None
            for index in range(nodes - 1):
                broker.cluster._learn(_info(index), 0.0)
            sockets.events.clear()
            broker.cluster.is_head = False
            broker.cluster.head = _info(0).id
            broker.cluster.watch.joined(_info(0).id, 0.0, site.world.now)
            _rounds(site, node, 0.01)
            sockets.frames = sockets.bytes = 0
            spent, begun = 0.0, site.world.now
            for frame in reports:
                sockets.bring(_info(0).id, pm.envelope(pm.PLAIN, node.id, frame[10:]))
                spent += _rounds(site, node, beat)
            seconds = max(site.world.now - begun, beat)
    return Chatter(
        nodes,
        spent / seconds,
        sockets.frames / seconds,
        sockets.bytes / seconds,
        sockets.arrived / seconds,
        sockets.arrived_bytes / seconds,
        beat,
    )


# -- one driver, many nodes --------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of processor time, measured with real processes."""

    driver: float
    """A task in its driver: the call, and reading the result."""
    worker: float
    """A task in its worker."""
    local: float
    """A frame between processes of a node, per frame."""
    out: LinkCost
    into: LinkCost


class _TimedMachine(Machine):
    """A machine whose broker is busy for as long as its rounds really take."""

    times: Times
    busy_until = 0.0
    busy = 0.0
    started = 0.0
    sent_frames = sent_bytes = 0

    def _go(self, due: float) -> None:
        if due != self._due or not self.alive:
            return
        world = self.site.world
        if world.now < self.busy_until:
            self._due = float("inf")
            self._schedule(self.busy_until)
            return
        counts = _Counter.of(self)
        arrived, inbox = counts.arrived(), len(self.inbox)
        out, size = counts.frames, counts.bytes
        begun = time.process_time()
        super()._go(due)
        took = time.process_time() - begun
        took += self.times.out.of(counts.frames - out, counts.bytes - size)
        took += self.times.into.of(*arrived) + self.times.local * (inbox + counts.local)
        counts.local = 0
        self.busy_until = world.now + took
        self.busy += took


class _Counter:
    """Frames that a broker sends, by wrapping its sockets' and outboxes' methods."""

    known: dict[int, _Counter]

    def __init__(self, machine: Machine) -> None:
        self.frames = self.bytes = self.local = 0
        self.machine = machine
        sockets = machine.sockets
        assert sockets is not None
        send = sockets.send

        def count(node: bytes, frame: bytes) -> bool:
            self.frames += 1
            self.bytes += len(frame)
            return send(node, frame)

        sockets.send = count  # type: ignore[method-assign]

    @classmethod
    def of(cls, machine: Machine) -> _Counter:
        found = cls.known.get(machine.index)
        if found is None:
            found = cls.known[machine.index] = cls(machine)
        return found

    def arrived(self) -> tuple[int, int]:
        """Frames that wait at the sockets, and their bytes."""
        sockets = self.machine.sockets
        assert sockets is not None
        frames = [event.frame for event in sockets.events if isinstance(event, Arrived)]
        return len(frames), sum(len(frame) for frame in frames)


class _Worker(Process):
    """Runs empty tasks: each takes as long as it does in a real worker."""

    is_worker = True
    seconds = 0.0

    def __init__(self, machine: Machine, number: int, fork: Fork) -> None:
        super().__init__(machine)
        self.number = number
        self.job = fork.config.job.number
        self.from_broker = Link(self.world, self.receive)
        self.queue: list[TaskSpec] = []
        self.running = False

    def begin(self) -> None:
        """It is ready."""
        self.tell(wire.WorkerReady(self.number, self.handle))

    def receive(self, frame: bytes) -> None:
        """Tasks have come."""
        message = wire.decode(frame)
        if isinstance(message, wire.RunTasks):
            self.queue += message.tasks
            if not self.running:
                self._run()

    def _run(self) -> None:
        if not self.queue:
            self.running = False
            return
        self.running = True
        # As a worker does that reports once a millisecond.
        count = max(1, min(len(self.queue), int(0.001 / self.seconds)))
        tasks, self.queue = self.queue[:count], self.queue[count:]
        self.world.at(count * self.seconds, self._done, tasks)

    def _done(self, tasks: list[TaskSpec]) -> None:
        statuses = bytearray()
        for spec in tasks:
            entry = self.store.claim(spec.id, 1, spec.attempt, self.handle)
            if entry is None:
                statuses.append(wire.DONE_SKIPPED)
                continue
            answer = self.store.seal(entry, spec.attempt, self.handle, b"v", 0, [])
            statuses.append(wire.DONE_OK)
            if answer == 1:
                self.tell(wire.Sealed(with_index(spec.id, 1)))
        micros = [int(self.seconds * 1e6)] * len(tasks)
        ids = b"".join(spec.id for spec in tasks)
        self.tell(wire.TasksDone(self.number, ids, bytes(statuses), micros, not self.queue))
        self._run()


@dataclass
class Run:
    """What became of one driver's tasks."""

    nodes: int
    tasks: int
    seconds: float
    """Virtual."""
    driver: float
    broker: float
    others: float
    """Shares of the time in which the driver, its broker, and the busiest other broker were busy."""

    @property
    def rate(self) -> float:
        """Tasks a second."""
        return self.tasks / self.seconds


def one_driver(nodes: int, times: Times, tasks: int = 20_000, in_flight: int = 4_000, seed: int = 1) -> Run:
    """Let one driver submit empty tasks from the head to all nodes of a cluster, at most so many in flight."""
    _Counter.known = {}
    _TimedMachine.times = times
    _Worker.seconds = times.worker
    with tempfile.TemporaryDirectory() as directory:
        os.makedirs(f"{directory}/logs")
        site = Site(seed, directory, 30.0)
        site.make_worker = _Worker  # type: ignore[assignment]
        world = site.world
        shape = CallShape(
            b"empty".ljust(16, b"."), TASK, b"", "empty", resources=resources.pack(resources.parse({"CPU": 1}))
        )
        site.shapes[shape.key] = shape
        with Doors(site, debug=False):
            for index in range(nodes):
                machine = _TimedMachine(site, {"CPU": CPUS})
                machine.start("" if index == 0 else site.machines[0].sockets.address)  # type: ignore[union-attr]
            end = world.now + 1.0
            while world.heap and world.heap[0][0] < end:
                world.step()
            head = site.machines[0]
            assert isinstance(head, _TimedMachine)
            driver = Driver(head, task_id(bytes(16), 1))
            state = _Submission(driver, shape, times.driver, tasks, in_flight)
            driver.run(state.program())
            while not state.over:
                world.step()
            took = state.ended - state.begun
            machines = [machine for machine in site.machines if isinstance(machine, _TimedMachine)]
            busy = [machine.busy - state.busy.get(machine.index, 0.0) for machine in machines]
            for machine in site.machines:
                machine.store.closed = True
    return Run(nodes, tasks, took, state.spent / took, busy[0] / took, max(busy[1:], default=0.0) / took)


class _Submission:
    """A driver that submits frames of 64 tasks, and reads results in order."""

    def __init__(self, driver: Driver, shape: CallShape, each: float, tasks: int, in_flight: int) -> None:
        self.driver, self.shape, self.each, self.tasks, self.in_flight = driver, shape, each, tasks, in_flight
        self.over = False
        self.begun = self.ended = self.spent = 0.0
        self.busy: dict[int, float] = {}

    def program(self) -> Any:
        """First some tasks that start workers everywhere, then those that count."""
        driver, world = self.driver, self.driver.world
        reply = driver.new_reply()
        job = JobSpec(0, driver.root, driver.pid, "ns", [], "/")
        driver.tell(wire.Hello(driver.handle, job, reply, "0.1.0", "3"))
        yield Get([reply])
        driver.job = msgspec.msgpack.decode(driver.store.entries[reply].data, type=wire.HelloReply).job
        yield from self._go(max(4000, 100 * len(driver.machine.site.machines)))
        self.busy = {m.index: m.busy for m in driver.machine.site.machines if isinstance(m, _TimedMachine)}
        self.begun, self.spent = world.now, 0.0
        yield from self._go(self.tasks)
        self.ended = world.now
        self.over = True

    def _go(self, tasks: int) -> Any:
        driver = self.driver
        waiting: list[list[bytes]] = []
        for _ in range(0, tasks, 64):
            first = driver.next_child(64)
            driver.define([self.shape])
            specs, names = [], []
            for index in range(64):
                task = task_id(driver.root, first + index)
                name = with_index(task, 1)
                driver.held[name] = driver.store.expect(name, 0, [], None, "", 0, driver.handle)
                specs.append(TaskSpec(task, self.shape.key))
                names.append(name)
            self.spent += 64 * self.each
            yield 64 * self.each
            driver.tell(wire.SubmitTasks(driver.handle, driver.job, driver.root, specs))
            waiting.append(names)
            if len(waiting) * 64 >= self.in_flight:
                done = waiting.pop(0)
                yield Get(done)
                driver.drop(done)
        for names in waiting:
            yield Get(names)
            driver.drop(names)


Progress = Callable[[str], None]
