"""Conversations between brokers over connections that a relay cuts, delays and damages."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import wait_for
from zray.broker import peer_messages as pm
from zray.broker.links import Heard, Impostor, LinkEvent, Links, Prober, Refused
from zray.clock import SystemClock
from zray.peer_transport import ClusterKey, PeerSockets
from zray.transport import Context, Poller, ipc_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
now = SystemClock.now


class Relay:
    """Passes bytes between who connects to it and a port, until told to do something else with them."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.draw = random.Random(1)
        self.damage = 0.0
        """Probability that a byte of a piece is changed."""
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.sockets: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self.closed = False
        self._run(self._accept)

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args)
        self.threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.closed:
                near.close()
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self.sockets += (near, far)
            self.pairs.append((near, far))
            self._run(self._pump, near, far)
            self._run(self._pump, far, near)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.draw.random() < self.damage:
                    at = self.draw.randrange(len(data))
                    data = data[:at] + bytes((data[at] ^ 255,)) + data[at + 1 :]
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self) -> None:
        """End all connections; what is under way is lost."""
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self) -> None:
        self.closed = True
        self.cut()
        with socket.create_connection(("127.0.0.1", self.port)):
            pass
        self.listener.close()
        for thread in self.threads:
            thread.join()
        for end in self.sockets:
            end.close()


class Broker:
    """One end, with all that it heard."""

    def __init__(self, own: bytes, key: ClusterKey, directory: str, *, client: bool = False) -> None:
        self.context = Context()
        self.poller = Poller(self.context.inbox(ipc_endpoint(directory, own[:1].hex())))
        self.sockets = PeerSockets(self.context, own, key, self.poller)
        self.port = 0 if client else self.sockets.listen("127.0.0.1", 0)
        self.links = Links(self.sockets, Prober(self.poller), own, client=client)
        self.events: list[LinkEvent] = []

    def look(self) -> None:
        _, descriptors, ready = self.poller.wait(2)
        if ready:
            self.events += self.links.receive(now())
        if descriptors:
            self.events += self.links.probed(descriptors)
        self.events += self.links.tick(now())

    def heard(self) -> list[int]:
        return [
            event.message.number
            for event in self.events
            if isinstance(event, Heard) and isinstance(event.message, pm.StoreReply)
        ]

    def close(self) -> None:
        self.links.close()
        self.poller.close()
        self.context.close()


@pytest.fixture
def brokers() -> Iterator[tuple[Broker, Broker]]:
    key = ClusterKey.new()
    short = os.path.join("/tmp", f"zl{os.getpid()}")
    os.makedirs(short)
    near, far = Broker(A, key, short), Broker(B, key, short)
    yield near, far
    near.close()
    far.close()
    for name in os.listdir(short):
        os.unlink(os.path.join(short, name))
    os.rmdir(short)


@pytest.fixture
def relay(brokers: tuple[Broker, Broker]) -> Iterator[Relay]:
    """What the near broker takes for the far one."""
    found = Relay(brokers[1].port)
    brokers[0].links.know(B, f"127.0.0.1:{found.port}")
    yield found
    found.close()


def until(brokers: tuple[Broker, ...], condition: Callable[[], Any], timeout: float = 30.0) -> None:
    def look() -> Any:
        for broker in brokers:
            broker.look()
        return condition()

    wait_for(look, timeout)


def talk(brokers: tuple[Broker, Broker], count: int, each: Callable[[int], None]) -> None:
    """Both send numbered messages, while something happens; each must arrive once, in order."""
    near, far = brokers
    near.links.send(B, pm.StoreReply(0, b"first"), now())
    until(brokers, far.heard)
    for number in range(1, count):
        near.links.send(B, pm.StoreReply(number, bytes(300)), now())
        far.links.send(A, pm.StoreReply(number, bytes(300)), now())
        each(number)
        if number % 10 == 0:
            near.look()
            far.look()
    until(brokers, lambda: len(far.heard()) >= count and len(near.heard()) >= count - 1)
    assert far.heard() == list(range(count))
    assert near.heard() == list(range(1, count))
    until(brokers, lambda: not near.links.unacked_bytes(B) and not far.links.unacked_bytes(A))


def test_without_disturbance(brokers: tuple[Broker, Broker], relay: Relay) -> None:
    talk(brokers, 2000, lambda number: None)


def test_connections_that_are_cut_again_and_again(brokers: tuple[Broker, Broker], relay: Relay) -> None:
    talk(brokers, 2000, lambda number: relay.cut() if number % 150 == 0 else None)


def test_bytes_that_are_changed_on_the_way(brokers: tuple[Broker, Broker], relay: Relay) -> None:
    """CURVE notices, the connection ends, and what was lost comes again."""

    def damage(number: int) -> None:
        relay.damage = 0.3 if 500 <= number < 1000 else 0.0

    talk(brokers, 2000, damage)


def test_a_port_that_refuses_is_told(brokers: tuple[Broker, Broker]) -> None:
    near, far = brokers
    near.links.know(B, f"127.0.0.1:{far.port}")
    near.links.send(B, pm.Leave("x"), now())
    until(brokers, lambda: far.events)
    far.links.close()
    wait_for(lambda: near.look() or Refused(B) in near.events)


def test_a_cut_connection_to_a_living_broker_is_no_refusal(brokers: tuple[Broker, Broker], relay: Relay) -> None:
    near, far = brokers
    talk(brokers, 10, lambda number: None)
    for _ in range(5):
        relay.cut()
        near.links.send(B, pm.StoreReply(99, b""), now())
        count = len(far.heard())
        until(brokers, lambda count=count: len(far.heard()) > count)
    assert not [event for event in near.events + far.events if isinstance(event, (Refused, Impostor))]


def test_another_node_behind_the_same_port(brokers: tuple[Broker, Broker]) -> None:
    near, far = brokers
    stranger = b"\7" * 16
    near.links.know(stranger, f"127.0.0.1:{far.port}")
    near.links.send(stranger, pm.Leave("meant for another"), now())
    until(brokers, lambda: Impostor(stranger) in near.events)
    assert not far.events


def test_frames_that_are_none_are_counted(brokers: tuple[Broker, Broker], capfd: pytest.CaptureFixture[str]) -> None:
    near, far = brokers
    near.links.know(B, f"127.0.0.1:{far.port}")
    near.links.send(B, pm.Leave("x"), now())
    until(brokers, lambda: far.events)
    for junk in (b"junk", pm.envelope(pm.PLAIN, B, b"\xff\xff"), pm.envelope(pm.NUMBERED, B, b"short")):
        near.sockets.send(B, junk)
    until(brokers, lambda: far.links.malformed == 3)
    assert capfd.readouterr().err.count("dropped a frame of node 01010101") == 3
    assert len(far.events) == 1


def test_a_node_that_is_forgotten_gets_nothing_more(brokers: tuple[Broker, Broker]) -> None:
    near, far = brokers
    near.links.know(B, f"127.0.0.1:{far.port}")
    near.links.send(B, pm.Leave("x"), now())
    until(brokers, lambda: far.events)
    near.links.forget(B)
    near.links.send(B, pm.Leave("y"), now())
    assert not near.sockets.reaches(B)
    assert near.links.unacked_bytes(B) > 0


# -- through the head --------------------------------------------------------------------------------------------------


@pytest.fixture
def trio() -> Iterator[tuple[Broker, Broker, Broker, Relay]]:
    """A client (A), the head (B), a node (C), and the relay to the head, which is the client's only way."""
    key, directory = ClusterKey.new(), os.path.join("/tmp", f"zl{os.getpid()}")
    os.makedirs(directory)
    near, head, node = Broker(A, key, directory, client=True), Broker(B, key, directory), Broker(C, key, directory)
    for broker in (near, head, node):
        broker.links.head = B
    relay = Relay(head.port)
    near.links.know(B, f"127.0.0.1:{relay.port}")
    near.links.know(C, f"127.0.0.1:{node.port}")
    node.links.know(B, f"127.0.0.1:{head.port}")
    node.links.know(A, "")
    head.links.know(A, "")
    head.links.know(C, f"127.0.0.1:{node.port}")
    yield near, head, node, relay
    for broker in (near, head, node):
        broker.close()
    relay.close()
    shutil.rmtree(directory)


def gossip(trio: tuple[Broker, Broker, Broker, Relay], count: int, each: Callable[[int], None]) -> None:
    """The client and the node send one another numbered messages, while something happens; each arrives once, in order."""
    near, head, node, _ = trio
    brokers = near, head, node
    for number in range(count):
        near.links.send(C, pm.StoreReply(number, bytes(300)), now())
        node.links.send(A, pm.StoreReply(number, bytes(300)), now())
        each(number)
        if number % 10 == 0:
            for broker in brokers:
                broker.look()
    until(brokers, lambda: len(node.heard()) >= count and len(near.heard()) >= count)
    assert node.heard() == near.heard() == list(range(count))
    until(brokers, lambda: not near.links.unacked_bytes(C) and not node.links.unacked_bytes(A))
    assert not near.sockets.reaches(C)
    assert not node.sockets.reaches(A)
    assert not [event for event in head.events if isinstance(event, Heard)], "the head only passes on"


def test_a_client_and_a_node_talk_through_the_head(trio: tuple[Broker, Broker, Broker, Relay]) -> None:
    gossip(trio, 1000, lambda number: None)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_to_the_clients_connection(seed: int, trio: tuple[Broker, Broker, Broker, Relay]) -> None:
    relay = trio[3]
    draw = relay.draw = random.Random(seed)

    def disturb(number: int) -> None:
        if draw.random() < 0.01:
            relay.cut()
        relay.damage = 0.2 if 200 <= number < 400 else 0.0

    gossip(trio, 800, disturb)


def test_what_may_not_pass_through_the_head(
    trio: tuple[Broker, Broker, Broker, Relay], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody speaks in another's name, only the head passes on, and messages of the dead are not passed on."""
    near, head, node, _ = trio
    brokers = near, head, node
    near.links.send(B, pm.Leave("x"), now())
    near.links.send(C, pm.Leave("x"), now())
    node.links.send(B, pm.Leave("x"), now())
    until(brokers, lambda: len(head.events) == 2 and node.events)
    stolen = pm.envelope(pm.PLAIN, C, pm.encode(pm.Rejected("ended by a stranger")))
    near.sockets.send(B, pm.envelope(pm.RELAYED, B, pm.passage(B, C, 0, stolen)))  # in the head's name
    near.sockets.send(B, pm.envelope(pm.RELAYED, B, b"short"))
    node.sockets.send(B, pm.envelope(pm.RELAYED, B, pm.passage(A, B, 0, stolen)))  # to the head itself
    until(brokers, lambda: head.links.malformed == 3)
    head.links.forget(A)
    near.sockets.send(B, pm.envelope(pm.RELAYED, B, pm.passage(A, C, 0, stolen)))
    near.sockets.send(B, b"junk")
    until(brokers, lambda: head.links.malformed == 4)
    head.links.send(C, pm.Leave("the last"), now())
    until(brokers, lambda: len(node.events) == 2)
    assert [event.message for event in node.events if isinstance(event, Heard)] == [pm.Leave("x"), pm.Leave("the last")]
    assert capfd.readouterr().err.count("dropped a frame of node") == 4


def test_a_receiver_that_takes_nothing_holds_up_no_more_than_the_limit(
    trio: tuple[Broker, Broker, Broker, Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head cannot get rid of is dropped beyond a bound, and sent again by who made it."""
    monkeypatch.setattr("zray.broker.relay.LIMIT_BYTES", 1 << 20)
    near, head, node, _ = trio
    near.links.send(B, pm.Leave("x"), now())
    until((near, head), lambda: head.events)
    for number in range(100):
        node.links.send(A, pm.StoreReply(number, bytes(100 << 10)), now())
    until((head, node), lambda: head.links.not_passed > 0)
    assert head.links._passed[A].waiting <= 1 << 20
    until((near, head, node), lambda: len(near.heard()) >= 100, 60)
    assert near.heard() == list(range(100))
