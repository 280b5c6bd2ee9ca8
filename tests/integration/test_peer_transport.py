"""Encrypted sockets between brokers: who gets in, who does not, and what is told of connections."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from tests.helpers import wait_for
from zray.peer_transport import MAX_FRAME, Arrived, ClusterKey, Connected, Disconnected, PeerEvent, PeerSockets
from zray.transport import Context, Poller, ipc_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


class Peer:
    """A node's sockets in a context of its own, and all that they told."""

    def __init__(self, own: bytes, key: ClusterKey, directory: str) -> None:
        self.context = Context()
        self.inbox = self.context.inbox(ipc_endpoint(directory, own[:1].hex()))
        self.poller = Poller(self.inbox)
        self.sockets = PeerSockets(self.context, own, key, self.poller)
        self.events: list[PeerEvent] = []

    def listen(self, port: int = 0) -> str:
        return f"127.0.0.1:{self.sockets.listen('127.0.0.1', port)}"

    def look(self) -> list[PeerEvent]:
        """Take in what there is."""
        _, _, ready = self.poller.wait(5)
        if ready:
            self.events += self.sockets.receive()
        return self.events

    def close(self) -> None:
        self.sockets.close()
        self.poller.close()
        self.context.close()


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    key = ClusterKey.new()
    peers: list[Peer] = []
    short = os.path.join("/tmp", f"zp{os.getpid()}")
    os.makedirs(short)

    def make(own: bytes, other_key: ClusterKey | None = None) -> Peer:
        peers.append(Peer(own, other_key or key, short))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()
    for name in os.listdir(short):
        os.unlink(os.path.join(short, name))
    os.rmdir(short)


def all_look(*peers: Peer) -> Callable[[Callable[[], Any]], None]:
    def until(condition: Callable[[], Any]) -> None:
        def look() -> Any:
            for peer in peers:
                peer.look()
            return condition()

        wait_for(look)

    return until


def test_both_directions_on_one_connection(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    near.sockets.dial(B, far.listen())
    assert near.sockets.send(B, b"there")
    until = all_look(near, far)
    until(lambda: Arrived(A, b"there") in far.events)
    until(lambda: Connected(B) in near.events)
    assert far.sockets.send(A, b"and back")
    until(lambda: Arrived(B, b"and back") in near.events)
    assert near.sockets.refused == far.sockets.refused == near.sockets.malformed == far.sockets.malformed == 0


def test_frames_wait_for_who_is_not_there_yet(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    near.sockets.dial(B, f"127.0.0.1:{port}")
    for number in range(10):
        near.sockets.send(B, b"%d" % number)
    far.listen(port)
    all_look(near, far)(lambda: len([e for e in far.events if isinstance(e, Arrived)]) == 10)
    assert [event.frame for event in far.events if isinstance(event, Arrived)] == [b"%d" % n for n in range(10)]


def test_who_never_connected_cannot_be_answered(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(A)
    peer.listen()
    assert not peer.sockets.send(B, b"x")
    assert not peer.sockets.reaches(B)


def test_the_end_of_a_peer_is_told(make_peer: Callable[..., Peer]) -> None:
    near, far, third = make_peer(A), make_peer(B), make_peer(C)
    address = far.listen()
    near.sockets.dial(B, address)
    third.sockets.dial(B, address)
    near.sockets.send(B, b"x")
    third.sockets.send(B, b"x")
    all_look(near, far, third)(lambda: len([e for e in far.events if isinstance(e, Arrived)]) == 2)
    far.close()
    all_look(near, third)(lambda: Disconnected(B) in near.events and Disconnected(B) in third.events)


def test_one_who_had_connected_and_went_is_told_without_a_name(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    near.sockets.dial(B, far.listen())
    near.sockets.send(B, b"x")
    all_look(near, far)(lambda: Arrived(A, b"x") in far.events)
    near.close()
    all_look(far)(lambda: Disconnected(b"") in far.events)
    assert not far.sockets.send(A, b"y")


def test_looking_at_a_port_is_no_disconnection(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    address = far.listen()
    for _ in range(20):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()
    all_look(far)(lambda: far.sockets.refused == 20)
    near.sockets.dial(B, address)
    near.sockets.send(B, b"x")
    until = all_look(near, far)
    until(lambda: Arrived(A, b"x") in far.events)
    assert [event for event in far.events if not isinstance(event, Arrived)] == []
    near.sockets.hang_up(B)
    until(lambda: Disconnected(b"") in far.events)


def test_a_wrong_key_gets_no_answer_and_is_counted(make_peer: Callable[..., Peer]) -> None:
    stranger, far = make_peer(A, ClusterKey.new()), make_peer(B)
    stranger.sockets.dial(B, far.listen())
    stranger.sockets.send(B, b"let me in")
    all_look(stranger, far)(lambda: far.sockets.refused)
    assert not any(isinstance(event, (Arrived, Connected)) for event in far.events + stranger.events)


def test_a_key_of_ones_own_behind_the_right_server_key_is_refused(make_peer: Callable[..., Peer]) -> None:
    """The public half is no secret: who knows only that is a stranger."""
    key, other = ClusterKey.new(), ClusterKey.new()
    far, stranger = make_peer(B, key), make_peer(A, other)
    port = int(far.listen().rpartition(":")[2])
    socket_ = stranger.context.zmq.socket(zmq.DEALER)
    socket_.setsockopt(zmq.LINGER, 0)
    socket_.setsockopt(zmq.CURVE_SERVERKEY, key.public.encode())
    socket_.setsockopt(zmq.CURVE_PUBLICKEY, other.public.encode())
    socket_.setsockopt(zmq.CURVE_SECRETKEY, other.secret.encode())
    socket_.connect(f"tcp://127.0.0.1:{port}")
    socket_.send(b"let me in")
    all_look(far)(lambda: far.sockets.refused)
    assert not any(isinstance(event, Arrived) for event in far.events)
    socket_.close()


def test_one_without_any_encryption_is_refused(make_peer: Callable[..., Peer]) -> None:
    far = make_peer(B)
    port = int(far.listen().rpartition(":")[2])
    other = Context()
    plain = other.zmq.socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(f"tcp://127.0.0.1:{port}")
    plain.send(b"hello")
    all_look(far)(lambda: far.sockets.refused)
    assert not any(isinstance(event, Arrived) for event in far.events)
    plain.close()
    other.close()


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.0\r\n\r\n", bytes(200), b"\xff" * 500])
def test_bytes_that_are_no_handshake_do_no_harm(make_peer: Callable[..., Peer], junk: bytes) -> None:
    near, far = make_peer(A), make_peer(B)
    address = far.listen()
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
        stranger.sendall(junk)
        stranger.settimeout(0.05)
        near.sockets.dial(B, address)
        near.sockets.send(B, b"x")
        all_look(near, far)(lambda: Arrived(A, b"x") in far.events)
    assert [event for event in far.events if isinstance(event, Arrived)] == [Arrived(A, b"x")]


def test_messages_of_several_parts_are_dropped(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    near.sockets.dial(B, far.listen())
    near.sockets._dialled[B][0].send_multipart([b"one", b"two"])
    near.sockets.send(B, b"x")
    all_look(near, far)(lambda: Arrived(A, b"x") in far.events)
    assert far.sockets.malformed == 1


def test_a_frame_that_is_too_long_ends_the_connection_and_no_more(make_peer: Callable[..., Peer]) -> None:
    near, far = make_peer(A), make_peer(B)
    near.sockets.dial(B, far.listen())
    near.sockets.send(B, bytes(MAX_FRAME + 1))
    until = all_look(near, far)
    until(lambda: Disconnected(B) in near.events)
    until(lambda: near.events.count(Connected(B)) >= 2)
    near.sockets.send(B, b"x")
    until(lambda: Arrived(A, b"x") in far.events)


def test_an_address_that_is_taken_says_so(make_peer: Callable[..., Peer]) -> None:
    port = int(make_peer(A).listen().rpartition(":")[2])
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
        make_peer(B).listen(port)


# -- key files ---------------------------------------------------------------------------------------------------------


def test_keys_survive_their_file(tmp_path: Path) -> None:
    key = ClusterKey.new()
    path = str(tmp_path / "key")
    key.write(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert ClusterKey.read(path) == key
    ClusterKey.new().write(path)
    assert ClusterKey.read(path) != key
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"public": 1, "secret": 2}', '{"public": "a", "secret": "b"}'])
def test_what_is_no_key_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="holds no cluster key: copy the file"):
        ClusterKey.read(str(path))


def test_halves_that_do_not_belong_together_are_no_key(tmp_path: Path) -> None:
    path = str(tmp_path / "key")
    ClusterKey(ClusterKey.new().public, ClusterKey.new().secret).write(path)
    with pytest.raises(ValueError, match="no cluster key"):
        ClusterKey.read(path)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "key")
    ClusterKey.new().write(path)
    os.chmod(path, 0o640)
    with pytest.raises(ValueError, match="can be read by others: chmod 600"):
        ClusterKey.read(path)
