"""One simulated node of a cluster: the real broker, with every door of it replaced.

Covers the doors (`Doors`: clock, sockets, fork parent, signals, store) and a machine's life: starting, joining, pausing, being killed, ending.
Does not cover what its processes do (`cluster_processes`) or what happens to it and when (`cluster_scenario`).

What runs is the source that runs in a real node: `zray.broker.server.Broker` with its performer, records, scheduler, membership, links,
lending, tasks and actors of other nodes. Only names that those modules use for the world outside are replaced while a scenario runs.
"""

from __future__ import annotations

import functools
import os
import signal
import types
from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from tests.simulation.cluster_network import Network, SimPeerSockets, SimProber
from tests.simulation.cluster_store import BROKER, SimObjects, SimStore
from tests.simulation.cluster_transfer import SimTransfer
from tests.simulation.world import World
from zray.broker import (
    cluster,
    groups,
    object_exchange,
    object_sharing,
    performer,
    remote_actors,
    replicated_tables,
    revival,
    server,
    store_replica,
    worker_ends,
)
from zray.broker import records as records_
from zray.broker.config import BrokerConfig, ClusterConfig
from zray.broker.fork_parent import Exited, Fork, Started
from zray.broker.settings import SchedulerConfig
from zray.ids import task_id

if TYPE_CHECKING:
    from tests.simulation.cluster_processes import Process, Worker
    from zray.task import CallShape, TaskSpec

FORKS = 999
"""Descriptor of the fork parent's channel."""
_PIDFDS = 1000


class Site:
    """The world of all machines: time, network, process ids."""

    def __init__(self, seed: int, directory: str, node_timeout: float) -> None:
        self.world = World(seed)
        self.network = Network(self.world)
        self.directory = directory
        self.node_timeout = node_timeout
        self.replicas = 1
        """Nodes that keep the head's tables."""
        self.head_grace = 0.0
        self.machines: list[Machine] = []
        self.processes: dict[int, Process] = {}
        """By process id."""
        self.next_pid = 100
        self.building: Machine | None = None
        """Whose broker is being made: its doors are asked for."""
        self.make_worker: Callable[[Machine, int, Fork], Worker]
        self.shapes: dict[bytes, CallShape] = {}
        """All there are, by key."""
        self.began: Callable[[Worker, bytes, int], None] = lambda worker, actor, incarnation: None
        self.executed: Callable[[Machine, bytes, int], None] = lambda machine, task, attempt: None
        self.refused: Callable[[Machine, TaskSpec], None] = lambda machine, spec: None
        """Told of copies that a worker may not run."""

    def enter(self, process: Process) -> int:
        """A new process id."""
        self.next_pid += 1
        self.processes[self.next_pid] = process
        return self.next_pid

    def by_id(self, node: bytes) -> Machine:
        """The machine with that node id."""
        return next(machine for machine in self.machines if machine.id == node)


class SimPoller:
    """`zray.transport.Poller`: says what is ready, waits for nothing."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ready: dict[int, None] = {}

    def add(self, fd: int, *, writing: bool = False) -> None:
        """Every descriptor is watched anyway."""

    def remove(self, fd: int) -> None:
        """Whoever was told has seen to it."""
        self.ready.pop(fd, None)

    def interrupt(self) -> None:
        """There is no wait."""

    def wait(self, timeout_ms: int) -> tuple[bool, list[int], bool]:
        """What is ready now."""
        descriptors = list(self.ready)
        self.ready.clear()
        sockets = self.machine.sockets
        return bool(self.machine.inbox), descriptors, sockets is not None and bool(sockets.events)


class SimContext:
    """`zray.transport.Context` of a broker; its own inbox, too."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def inbox(self, endpoint: str) -> SimContext:
        """The broker's inbox."""
        return self

    def next_frame_nowait(self) -> bytes | None:
        """The next frame of the inbox."""
        return self.machine.inbox.popleft() if self.machine.inbox else None

    def outbox(self, endpoint: str) -> SimOutbox:
        """The way to a worker's inbox."""
        return SimOutbox(self.machine, int(endpoint.rpartition("/w")[2]))

    def publisher(self, endpoint: str) -> SimContext:
        """Nobody subscribes here."""
        return self

    def send(self, *parts: bytes) -> None:
        """As a publisher."""

    def close(self) -> None:
        """Nothing to close."""


class SimOutbox:
    """The broker's way to a worker."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self.number = number

    def send(self, frame: bytes) -> None:
        """Send a frame."""
        worker = self.machine.workers.get(self.number)
        if worker is not None:
            worker.from_broker.send(frame)

    def close(self) -> None:
        """Nothing to close."""


class SimForks:
    """`zray.broker.processes.ForkChannel`."""

    def __init__(self, machine: Machine, pid: int) -> None:
        self.machine = machine
        self.pid = 0
        self.said: list[Any] = []
        self.free_at = 0.0
        machine.forks = self

    def fileno(self) -> int:
        """A descriptor."""
        return FORKS

    def request(self, fork: Fork) -> None:
        """Make a worker, one after another."""
        world = self.machine.site.world
        self.free_at = max(self.free_at, world.now) + world.rng.uniform(0.001, 0.006)
        world.at(self.free_at - world.now, self._forked, fork)

    def _forked(self, fork: Fork) -> None:
        machine = self.machine
        if machine.alive:
            worker = machine.workers[fork.config.number] = machine.site.make_worker(machine, fork.config.number, fork)
            self.report(Started(fork.config.number, worker.pid))
            machine.site.world.at(machine.site.world.rng.uniform(0.001, 0.004), worker.begin)

    def report(self, report: Any) -> None:
        """Say something to the broker."""
        self.said.append(report)
        self.machine.descriptor(FORKS)

    def reports(self) -> list[Any]:
        """What was said."""
        said, self.said = self.said, []
        return said


class SimOs:
    """`os` as brokers use it: signals and process descriptors are of this world."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pidfd_open(self, pid: int) -> int:
        """A descriptor that becomes ready when the process ends."""
        process = self.site.processes.get(pid)
        if process is None or not process.alive:
            raise ProcessLookupError(pid)
        return _PIDFDS + pid

    def kill(self, pid: int, number: int) -> None:
        """Send a signal."""
        process = self.site.processes.get(pid)
        if process is None or not process.alive:
            raise ProcessLookupError(pid)
        self.site.world.at(20e-6, process.signalled, number)

    def close(self, fd: int) -> None:
        """Close a descriptor of this world."""

    def unlink(self, path: str) -> None:
        """There is no such file."""


class Doors:
    """While it is entered, brokers that are made live in a simulated world."""

    def __init__(self, site: Site, debug: bool = True) -> None:
        """debug: have the schedulers check their books after each event."""
        world = site.world
        clock = types.SimpleNamespace(
            monotonic=lambda: world.now,
            time=lambda: 1e9 + world.now,
            time_ns=lambda: int((1e9 + world.now) * 1e9),
        )
        unix = SimOs(site)

        def building() -> Machine:
            assert site.building is not None
            return site.building

        def kill(pid: int) -> None:
            process = site.processes.get(pid)
            if process is not None:
                process.kill()

        def connect(address: tuple[str, int], timeout: float) -> Any:
            if f"{address[0]}:{address[1]}" not in site.network.ports:
                raise ConnectionRefusedError("nobody listens")
            return types.SimpleNamespace(close=lambda: None)

        signals = types.SimpleNamespace(**{name: getattr(signal, name) for name in ("SIGTERM", "SIGKILL", "SIGUSR2")})
        signals.signal = lambda number, handler: None
        self._replaced: list[tuple[Any, str, Any]] = [
            *(
                (module, "time", clock)
                for module in (
                    server,
                    worker_ends,
                    cluster,
                    remote_actors,
                    records_,
                    groups,
                    object_sharing,
                    revival,
                    replicated_tables,
                )
            ),
            (store_replica, "Random", lambda: Random(site.world.seed)),
            (server, "os", unix),
            (performer, "os", unix),
            (server, "signal", signals),
            (server, "Context", lambda threads: SimContext(building())),
            (server, "Poller", lambda inbox: building().poller),
            (server, "ForkChannel", SimForks),
            (server, "ObjectStore", SimObjects),
            (server, "Scheduler", functools.partial(server.Scheduler, seed=site.world.seed)),
            (server, "SchedulerConfig", functools.partial(SchedulerConfig, debug=debug)),
            (server, "kill_group", kill),
            (worker_ends, "kill_group", kill),
            (performer, "kill_group", kill),
            (worker_ends, "kernel_oom_kills", lambda: -1),
            (cluster, "PeerSockets", lambda context, own, key, poller: building().open_sockets(own)),
            (cluster, "Prober", lambda poller: building().open_prober()),
            (cluster, "ClusterKey", types.SimpleNamespace(read=lambda path: None)),
            (
                cluster,
                "socket",
                types.SimpleNamespace(gethostname=lambda: "host", create_connection=connect),
            ),
            (
                object_exchange,
                "Transfer",
                lambda own, links, objects, receiver, watch, path: building().open_transfer(receiver),
            ),
            # Small, so that values that stay where they are made are common.
            (object_exchange, "INLINE_BYTES", 400),
            (object_sharing, "INLINE_BYTES", 400),
        ]
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Doors:
        for module, name, replacement in self._replaced:
            self._originals.append((module, name, getattr(module, name)))
            setattr(module, name, replacement)
        return self

    def __exit__(self, *error: object) -> None:
        while self._originals:
            module, name, original = self._originals.pop()
            setattr(module, name, original)


class Machine:
    """One node."""

    def __init__(self, site: Site, resources: dict[str, float], version: str = "0.1.0") -> None:
        self.site = site
        self.index = len(site.machines)
        site.machines.append(self)
        self.id = task_id(bytes(16), 1_000_000 + self.index)
        self.resources = resources
        self.version = version
        self.store = SimStore()
        self.store.on_reap = self._reaped
        self.store.on_claim = lambda task, attempt: site.executed(self, task, attempt)
        self.poller = SimPoller(self)
        self.inbox: deque[bytes] = deque()
        self.sockets: SimPeerSockets | None = None
        self.forks: SimForks
        self.broker: server.Broker
        self.transfer: SimTransfer
        self.workers: dict[int, Worker] = {}
        self.by_handle: dict[int, Process] = {}
        self.next_handle = BROKER
        self.alive = False
        self.serving = False
        """It has joined, and its loop runs."""
        self.paused = False
        self.verdict = ""
        """Why it ended."""
        self._due = float("inf")

    def __repr__(self) -> str:
        return f"<Machine {self.index} {self.id.hex()[:8]}{'' if self.alive else ' ' + (self.verdict or 'dead')}>"

    # -- birth ---------------------------------------------------------------------------------------------------------

    def start(self, head: str) -> None:
        """Start the broker and join; raises what a real start would."""
        site = self.site
        place = ClusterConfig(
            f"10.0.0.{self.index}",
            7000 + self.index,
            head,
            "",
            self.version,
            site.node_timeout,
            head_grace=0.0 if head else site.head_grace,
            replicas=1 if head else site.replicas,
        )
        config = BrokerConfig(
            directory=site.directory,
            spill_directory=site.directory + "/none",
            session=f"s{self.index}",
            node=self.id.hex(),
            driver_pid=0,
            ready_fd=-1,
            resources=self.resources,
            labels={},
            store_capacity=1 << 30,
            max_objects=1 << 20,
            preload=[],
            cluster=place,
            rebuild_s=0.002,  # short, so that second copies are common
        )
        site.building = self
        self.broker = server.Broker(config, self.store, 0, self, 1)  # type: ignore[arg-type]
        site.building = None
        assert self.broker.cluster is not None
        self.alive = True
        try:
            self.broker.begin_life()
        except BaseException:
            self.die("it could not join")
            raise
        self.serving = True
        self.kick()

    def open_sockets(self, own: bytes) -> SimPeerSockets:
        """Its door to other nodes."""
        self.sockets = SimPeerSockets(self.site.network, own, self.kick)
        return self.sockets

    def open_transfer(self, receiver: Any) -> SimTransfer:
        """Its way to large values of others."""
        transfer = self.transfer = SimTransfer(self.site.world, self.id, receiver, self.descriptor)
        transfer.store = self.store
        transfer.find = self._other_end
        return transfer

    def _other_end(self, node: bytes) -> SimTransfer | None:
        other = self.site.by_id(node)
        reached = other.alive and not other.paused and self.site.network.joined(self.id, node)
        return other.transfer if reached else None

    def open_prober(self) -> SimProber:
        """Its eye on ports."""
        return SimProber(self.site.network, self.id, self.descriptor)

    def enter(self, process: Process) -> int:
        """A process enters itself in the store."""
        self.next_handle += 1
        self.by_handle[self.next_handle] = process
        self.store.living.add(self.next_handle)
        self.store.entered.append(self.next_handle)
        return self.next_handle

    # -- the loop ------------------------------------------------------------------------------------------------------

    def kick(self) -> None:
        """There is something to see to."""
        self._schedule(self.site.world.now + 5e-6)

    def _schedule(self, due: float) -> None:
        if due < self._due:
            self._due = due
            self.site.world.at(max(0.0, due - self.site.world.now), self._go, due)

    def _go(self, due: float) -> None:
        if due != self._due or not self.alive:
            return
        self._due = float("inf")
        if self.paused or not self.serving:
            return
        broker = self.broker
        broker.round(0.0)
        if not broker.running:
            self.die("the broker has ended")
            return
        sockets = self.sockets
        if self.inbox or self.poller.ready or (sockets is not None and sockets.events):
            self.kick()
        self._schedule(max(broker.wake_at, self.site.world.now) + 1e-6)

    def deliver(self, frame: bytes) -> None:
        """A frame of a process for the broker."""
        if self.alive:
            self.inbox.append(frame)
            self.kick()

    def descriptor(self, fd: int) -> None:
        """A descriptor is ready."""
        if self.alive:
            self.poller.ready[fd] = None
            self.kick()

    # -- processes -----------------------------------------------------------------------------------------------------

    def process_ended(self, process: Process, status: int) -> None:
        """A process of this machine is gone; whoever looks after it is told a little later."""
        self.store.living.discard(process.handle)
        late = self.site.world.rng.uniform(0.0001, 0.004)
        if process.is_worker:
            self.site.world.at(late, self._tell_exit, process.pid, status)
        else:
            self.site.world.at(late, self.descriptor, _PIDFDS + process.pid)

    def _tell_exit(self, pid: int, status: int) -> None:
        if self.alive:
            self.forks.report(Exited(pid, status, 0))

    def _reaped(self, handle: int) -> None:
        self.by_handle[handle].release()

    # -- disturbances --------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """SIGSTOP of the broker."""
        assert self.sockets is not None
        self.paused = self.sockets.paused = True
        self.site.world.say(f"{self} is paused")
        self.site.world.at(4.0, self._stalled)

    def _stalled(self) -> None:
        """Heartbeats end the connections of a process that says nothing."""
        if self.paused and self.alive:
            for connection in list(self.site.network.connections):
                if self.sockets in (connection.near, connection.far):
                    connection.end()

    def resume(self) -> None:
        """SIGCONT."""
        if self.paused and self.alive:
            assert self.sockets is not None
            self.paused = self.sockets.paused = False
            self.site.world.say(f"{self} goes on")
            self.kick()

    def leave(self) -> None:
        """SIGTERM: the node ends in order."""
        if self.alive:
            assert self.broker.cluster is not None
            self.broker.cluster.close("it was ended")
            # What was sent last has a moment to leave.
            self.die("it left")

    def die(self, verdict: str) -> None:
        """The broker is gone, and all its processes with it."""
        if not self.alive:
            return
        self.alive = False
        self.verdict = verdict
        self.site.world.say(f"{self} dies: {verdict}")
        self.store.closed = True
        if self.sockets is not None:
            self.sockets.close()
        for process in list(self.by_handle.values()):
            process.vanish()
