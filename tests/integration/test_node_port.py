"""The one port of a node: who comes to it reaches the broker, or the socket that he asks for; nobody disturbs anybody."""

from __future__ import annotations

import os
import resource
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from tests.helpers import wait_for
from zray._door import Door
from zray.node_port import BROKER, NUMBERS, NodePort, opened_socket

if TYPE_CHECKING:
    from collections.abc import Iterator


class Echo:
    """A Unix socket that gives back what it gets, with its name before it."""

    def __init__(self, path: str, name: bytes) -> None:
        self.name = name
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self.threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.sendall(self.name)
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def directory() -> Iterator[str]:
    place = f"/tmp/zd{os.getpid()}"
    os.mkdir(place)
    yield place
    for name in os.listdir(place):
        os.unlink(os.path.join(place, name))
    os.rmdir(place)


@pytest.fixture
def port(directory: str) -> Iterator[NodePort]:
    """A port with a broker and a worker, number 40, behind it."""
    echoes = [
        Echo(os.path.join(directory, BROKER), b"broker:"),
        Echo(os.path.join(directory, opened_socket(40)), b"x40:"),
    ]
    made = NodePort("127.0.0.1", 0, directory)
    yield made
    made.close()
    for echo in echoes:
        echo.close()


def _from_odd_port(port: NodePort) -> socket.socket:
    """Connect as callers of opened processes do."""
    return socket.create_connection(("127.0.0.1", port.port), timeout=20, source_address=("", 0))


def come_to(port: NodePort, said: bytes) -> socket.socket:
    connection = _from_odd_port(port)
    connection.sendall(said)
    return connection


def ask(number: int) -> bytes:
    """With which libzmq begins when its routing id is so long."""
    return b"\xff" + (number + 1).to_bytes(8, "big") + b"\x7f"


def read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := connection.recv(size - len(found))):
        found += data
    return found


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side has nothing more to say."""
    found = b""
    while data := connection.recv(1 << 16):
        found += data
    return found


def test_brokers_come_to_a_socket_of_their_own(port: NodePort) -> None:
    with socket.socket(fileno=port.take_listener()) as listener:
        listener.settimeout(20)
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port.port), timeout=20) as connection:
                accepted, address = listener.accept()
                assert address == connection.getsockname()
                assert address[1] % 2 == 0
                accepted.close()
            with _from_odd_port(port) as connection:
                assert connection.getsockname()[1] % 2 == 1
                connection.sendall(bytes(10))
                assert read(connection, 17) == b"broker:" + bytes(10)


def test_a_broker_from_an_odd_port_comes_through_the_door(port: NodePort) -> None:
    with come_to(port, ask(16)) as connection:
        assert read(connection, 17) == b"broker:" + ask(16)
    assert port.door.accepted == 1


def test_who_does_not_ask_reaches_the_broker(port: NodePort) -> None:
    with come_to(port, b"\xff first words") as connection:
        assert read(connection, 20) == b"broker:\xff first words"
        connection.sendall(b"and more")
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).endswith(b"and more")
    wait_for(lambda: port.door.open == 0, 20, "the connection is gone")
    assert port.door.turned_away == 0


@pytest.mark.parametrize("number", [0, 16, 17, 31, 256, 1 << 40])
def test_ordinary_greetings_go_to_the_broker(port: NodePort, number: int) -> None:
    with come_to(port, ask(number)) as connection:
        assert read(connection, 17) == b"broker:" + ask(number)


def test_who_asks_reaches_the_socket_of_that_number(port: NodePort) -> None:
    with come_to(port, ask(40) + b"at once") as connection:
        assert read(connection, 20) == b"x40:" + ask(40) + b"at once"[:6]


def test_a_greeting_may_come_in_pieces(port: NodePort) -> None:
    with _from_odd_port(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in ask(40):
            connection.sendall(bytes([byte]))
        assert read(connection, 14) == b"x40:" + ask(40)


def test_one_who_breaks_off_is_brought_to_the_broker_with_what_he_said(port: NodePort) -> None:
    with come_to(port, b"\xff\0\0") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b"broker:\xff\0\0"


@pytest.mark.parametrize("number", [32, 41, 255])
def test_a_number_that_nobody_has_is_turned_away(port: NodePort, number: int) -> None:
    with come_to(port, ask(number)) as connection:
        assert rest(connection) == b""
    wait_for(lambda: port.door.open == 0, 20, "the connection is gone")
    assert port.door.turned_away == 1


def test_nobody_is_there_yet(directory: str) -> None:
    made = NodePort("127.0.0.1", 0, directory)
    try:
        with come_to(made, bytes(10)) as connection:
            assert rest(connection) == b""
        wait_for(lambda: made.door.turned_away == 1, 20, "it is counted")
    finally:
        made.close()


def test_who_says_nothing_is_sent_away(directory: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        door = Door(listener.fileno(), os.path.join(directory, "x"), os.path.join(directory, BROKER), greeting_ms=50)
        thread = threading.Thread(target=door.serve)
        thread.start()
        silent = [socket.create_connection(listener.getsockname(), timeout=20) for _ in range(3)]
        silent[1].sendall(ask(40)[:9])
        for connection in silent:
            assert rest(connection) == b""
            connection.close()
        door.stop()
        thread.join()
        door.close()
        assert (door.open, door.turned_away, door.accepted) == (0, 3, 3)


def test_much_goes_through_in_order_whatever_the_pace(port: NodePort) -> None:
    sent = os.urandom(1 << 20) * 24
    with come_to(port, bytes(10)) as connection:
        assert read(connection, 17) == b"broker:" + bytes(10)
        writer = threading.Thread(target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR)))
        writer.start()
        with come_to(port, ask(40)) as other:  # others have their turn meanwhile
            assert read(other, 14) == b"x40:" + ask(40)
            other.sendall(b"ping")
            assert read(other, 4) == b"ping"
        assert rest(connection) == sent
        writer.join()


def test_the_end_of_either_side_is_told(port: NodePort, directory: str) -> None:
    path = os.path.join(directory, opened_socket(41))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        connection = come_to(port, ask(41))
        inner, _ = listener.accept()
        inner.settimeout(20)
        connection.sendall(b"last words")
        connection.close()
        assert rest(inner) == ask(41) + b"last words"
        inner.close()
        connection = come_to(port, ask(41))
        inner, _ = listener.accept()
        assert read(inner, 10) == ask(41)
        inner.sendall(b"bye")
        inner.close()
        assert rest(connection) == b"bye"
        connection.close()
    wait_for(lambda: port.door.open == 0, 20, "the connections are gone")


def test_without_descriptors_people_wait_outside(port: NodePort) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = [socket.socket() for _ in range(3)]
    taken = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        fillers = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(0))
        for connection in connections:
            connection.settimeout(20)
            connection.bind(("", 0))
            connection.connect(("127.0.0.1", port.port))
            connection.sendall(bytes(10))
        for filler in fillers:
            os.close(filler)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for connection in connections:
        assert read(connection, 17) == b"broker:" + bytes(10)
        connection.close()


def test_a_port_that_is_taken_says_so(port: NodePort, directory: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port.port}: Address already in use"):
        NodePort("127.0.0.1", port.port, directory)
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid:1"):
        NodePort("no.such.host.invalid", 1, directory)


def test_a_directory_that_is_too_long_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ValueError, match="too long"):
        Door(listener.fileno(), "/" + "x" * 110, "/p")


@pytest.mark.parametrize("number", [NUMBERS[0], NUMBERS[-1]])
def test_zeromq_asks_by_the_length_of_its_routing_id(port: NodePort, directory: str, number: int) -> None:
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.linger = dealer.linger = 0
        router.rcvtimeo = dealer.rcvtimeo = 20_000
        router.curve_server, router.curve_publickey, router.curve_secretkey = True, public, secret
        router.bind(f"ipc://{os.path.join(directory, opened_socket(number))}")
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = public
        dealer.setsockopt(zmq.ROUTING_ID, os.urandom(number))
        dealer.connect(f"tcp://0.0.0.0:0;127.0.0.1:{port.port}")
        dealer.send(b"there")
        sender, frame = router.recv_multipart()
        router.send_multipart([sender, frame + b" and back"])
        assert dealer.recv() == b"there and back"


def test_ends_while_people_are_inside(directory: str) -> None:
    echo = Echo(os.path.join(directory, BROKER), b"")
    made = NodePort("127.0.0.1", 0, directory)
    inside: list[Any] = [come_to(made, bytes(10)) for _ in range(20)]
    for connection in inside:
        assert read(connection, 10) == bytes(10)
    made.close()
    for connection in inside:
        assert rest(connection) == b""
        connection.close()
    assert made.door.open == 0
    echo.close()
