"""The network between simulated nodes: connections that delay, break, lose, and are made anew; partitions; ports that refuse.

Covers what `zray.peer_transport.PeerSockets` and `zray.broker.links.Prober` look like to a broker. Does not cover what is in a frame.

A connection belongs to who dialled it and carries both directions. Each has delays of its own, keeps order, and loses what is under way when
it breaks; what the dialler had not let go of yet stays with it and leaves over the next one, as in a DEALER socket. So frames of a node may
overtake one another only where it uses two connections, and what comes twice is what was sent twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulation.world import World
from zray.peer_transport import Arrived, Connected, Disconnected

STALLED_S = 4.0
"""Seconds without a frame after which ZeroMQ's heartbeats end a connection."""


class Network:
    """All that lies between nodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.ports: dict[str, SimPeerSockets] = {}
        """By address: who listens there now."""
        self.blocked: set[tuple[bytes, bytes]] = set()
        """(from, to): nothing gets through."""
        self.slow: dict[tuple[bytes, bytes], float] = {}
        self.connections: list[Connection] = []
        self.frames = 0
        self.lost = 0
        self.repeat_frames = 0.0
        """Probability that a frame comes twice (no real connection does so; the machines must bear it)."""

    def passes(self, sender: bytes, receiver: bytes) -> bool:
        """Whether frames get from one node to another."""
        return (sender, receiver) not in self.blocked

    def joined(self, one: bytes, other: bytes) -> bool:
        """Whether a connection can be made between two nodes."""
        return self.passes(one, other) and self.passes(other, one)

    def block(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """A partition begins: what is under way is lost; connections break when their ends notice that nothing comes."""
        self.blocked.update(pairs)
        self.world.at(STALLED_S + self.rng.uniform(0, 0.5), self._stalled, list(pairs))

    def _stalled(self, pairs: list[tuple[bytes, bytes]]) -> None:
        for connection in list(self.connections):
            for one, other in pairs:
                if (one, other) in self.blocked and {connection.near.own, connection.far_id} == {one, other}:
                    connection.end()

    def heal(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """A partition ends."""
        self.blocked.difference_update(pairs)

    def cut(self, one: bytes, other: bytes) -> None:
        """All connections between two nodes break now."""
        for connection in list(self.connections):
            if {connection.near.own, connection.far_id} == {one, other}:
                connection.end()


class Connection:
    """What a node has dialled, through all its connections one after another."""

    def __init__(self, network: Network, near: SimPeerSockets, node: bytes, address: str) -> None:
        self.network = network
        self.near = near
        self.node = node
        """Who is dialled, by the name under which."""
        self.address = address
        self.far: SimPeerSockets | None = None
        self.life = 0
        self.closed = False
        self.waiting: deque[bytes] = deque()
        """Frames that wait for a connection."""
        self.last = {True: 0.0, False: 0.0}
        self.pause = 0.02
        self.delay = network.rng.choice([1, 1, 1, 3])
        network.connections.append(self)
        network.world.at(network.rng.uniform(1e-4, 2e-3), self.attempt)

    @property
    def far_id(self) -> bytes:
        """Who is behind the address."""
        far = self.far or self.network.ports.get(self.address)
        return far.own if far is not None else self.node

    def attempt(self) -> None:
        """Try to connect."""
        if self.closed or self.near.closed or self.far is not None:
            return
        network = self.network
        far = network.ports.get(self.address)
        if far is None or far.paused or self.near.paused or not network.joined(self.near.own, far.own):
            self.pause = min(1.0, 2 * self.pause)
            network.world.at(self.pause * network.rng.uniform(0.8, 1.2), self.attempt)
            return
        self.far = far
        self.pause = 0.02
        self.life += 1
        self.last = {True: 0.0, False: 0.0}
        far.inbound[self.near.own] = self
        self.near.event(Connected(self.node))
        while self.waiting:
            self.put(True, self.waiting.popleft())

    def end(self) -> None:
        """It breaks: what is under way is lost, both ends are told."""
        far, self.far = self.far, None
        if far is None:
            return
        self.life += 1
        if far.inbound.get(self.near.own) is self:
            del far.inbound[self.near.own]
        for side, node in ((self.near, self.node), (far, b"")):
            if not side.closed:
                side.event(Disconnected(node))
        if not self.closed and not self.near.closed:
            self.network.world.at(self.pause, self.attempt)

    def send(self, out: bool, frame: bytes) -> None:
        """Send in one of the two directions (out: from the dialler)."""
        if self.far is None:
            if out:
                self.waiting.append(frame)
            return
        self.put(out, frame)

    def put(self, out: bool, frame: bytes) -> None:
        """Let a frame go."""
        network, world, far = self.network, self.network.world, self.far
        assert far is not None
        network.frames += 1
        sender, receiver = (self.near, far) if out else (far, self.near)
        slow = network.slow.get((sender.own, receiver.own), 0.0)
        arrival = max(self.last[out], world.now + world.delay() * self.delay + slow)
        self.last[out] = arrival
        world.at(arrival - world.now, self._arrive, self.life, sender, receiver, out, frame)
        if world.chance(network.repeat_frames):
            world.at(arrival - world.now, self._arrive, self.life, sender, receiver, out, frame)

    def _arrive(self, life: int, sender: SimPeerSockets, receiver: SimPeerSockets, out: bool, frame: bytes) -> None:
        if life != self.life or receiver.closed or not self.network.passes(sender.own, receiver.own):
            self.network.lost += 1
            return
        receiver.event(Arrived(self.near.own if out else self.node, frame))

    def close(self) -> None:
        """The dialler hangs up."""
        self.closed = True
        self.waiting.clear()
        if self.far is not None:
            self.end()
        if self in self.network.connections:
            self.network.connections.remove(self)


class SimPeerSockets:
    """`zray.peer_transport.PeerSockets` of a node."""

    def __init__(self, network: Network, own: bytes, wake: Callable[[], None]) -> None:
        self.network = network
        self.own = own
        self.wake = wake
        self.address = ""
        self.closed = False
        self.paused = False
        self.dialled: dict[bytes, Connection] = {}
        self.inbound: dict[bytes, Connection] = {}
        """Living connections of others' making."""
        self.accepted: set[bytes] = set()
        self.events: deque[Any] = deque()
        self.refused = 0
        self.malformed = 0

    def listen_behind_door(self, host: str, port: int, directory: str) -> int:
        """Take a port that nobody has had."""
        port = port or 1000 + len(self.network.ports)
        self.address = f"{host}:{port}"
        self.network.ports[self.address] = self
        return port

    def event(self, event: Any) -> None:
        """Something for `receive`."""
        self.events.append(event)
        self.wake()

    def dial(self, node: bytes, address: str) -> None:
        """Connect, again and again."""
        if node not in self.dialled:
            self.dialled[node] = Connection(self.network, self, node, address)

    def rename(self, node: bytes, now: bytes) -> None:
        """A node has told its name."""
        self.dialled[now] = self.dialled.pop(node)
        self.dialled[now].node = now

    def hang_up(self, node: bytes) -> None:
        """Close the connection of this node's making."""
        self.accepted.discard(node)
        connection = self.dialled.pop(node, None)
        if connection is not None:
            connection.close()

    def reaches(self, node: bytes) -> bool:
        """Whether there is, or may be, a connection."""
        return node in self.dialled or node in self.accepted

    def send(self, node: bytes, frame: bytes) -> bool:
        """Send, or let it wait; False when there is no connection."""
        connection = self.dialled.get(node)
        if connection is not None:
            connection.send(True, frame)
            return True
        if node not in self.accepted:
            return False
        back = self.inbound.get(node)
        if back is None:
            self.accepted.discard(node)
            return False
        back.send(False, frame)
        return True

    def receive(self, most: int = 256) -> list[Any]:
        """What has come."""
        events = []
        while self.events:
            event = self.events.popleft()
            if isinstance(event, Arrived) and event.node not in self.dialled:
                self.accepted.add(event.node)
            events.append(event)
        return events

    def wait(self, seconds: float) -> None:
        """Let the world go on until something has come (used by whoever joins)."""
        world = self.network.world
        end = world.now + seconds
        while not self.events and not self.closed and world.heap and world.heap[0][0] <= end:
            world.step()
        if not self.events:
            world.now = max(world.now, end)

    def close(self) -> None:
        """The end of the process: ports refuse, connections end."""
        if self.closed:
            return
        self.closed = True
        self.network.ports.pop(self.address, None)
        for connection in list(self.network.connections):
            if connection.near is self:
                connection.close()
            elif connection.far is self:
                connection.end()


class SimProber:
    """`zray.broker.links.Prober`: a port refuses when its process is gone; nobody answers across a partition."""

    def __init__(self, network: Network, own: bytes, ready: Callable[[int], None]) -> None:
        self.network = network
        self.own = own
        self.ready = ready
        self.open: dict[int, bytes] = {}
        self.number = 1 << 20

    def ask(self, node: bytes, address: str, now: float) -> bool | None:
        """Begin a probe; the answer comes through a descriptor."""
        if node in self.open.values():
            return None
        far = self.network.ports.get(address)
        if far is not None:
            return None if far.paused else False
        if not self.network.joined(self.own, node):
            return None
        self.number += 1
        self.open[self.number] = node
        self.network.world.at(self.network.world.delay(), self.ready, self.number)
        return None

    def answered(self, descriptors: list[int]) -> list[bytes]:
        """Nodes whose port refused."""
        return [self.open.pop(fd) for fd in descriptors if fd in self.open]

    def tick(self, now: float) -> None:
        """Nothing is given up: every probe is answered."""

    def close(self) -> None:
        """Drop all probes."""
        self.open.clear()
