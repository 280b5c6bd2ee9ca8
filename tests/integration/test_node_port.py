"""The one port of a node: who comes to it reaches the broker, or the process that he asks for; nobody disturbs anybody."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from tests.helpers import wait_for
from zray._door import Door
from zray.node_port import BROKER, NUMBERS, VALUES, NodePort, socket_behind_door, source_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

HEARD = 10
"""Bytes that the door reads of a stream."""


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


class Process:
    """A datagram socket behind the door, as a process has it that other nodes may call."""

    def __init__(self, directory: str, number: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(20)
        self.socket.bind(os.path.join(directory, socket_behind_door(number)))

    def take(self) -> tuple[bytes, socket.socket]:
        """Return the next connection that was handed over, and what the door had read of it."""
        said, descriptors, _, _ = socket.recv_fds(self.socket, 100, 4)
        (descriptor,) = descriptors
        connection = socket.socket(fileno=descriptor)
        connection.settimeout(20)
        return said, connection

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def port(directory: str) -> Iterator[NodePort]:
    """A port with a broker behind it."""
    echo = Echo(os.path.join(directory, BROKER), b"broker:")
    made = NodePort("127.0.0.1", 0, directory)
    yield made
    made.close()
    echo.close()


@pytest.fixture
def process(directory: str) -> Iterator[Process]:
    """A process, number 40."""
    made = Process(directory, 40)
    yield made
    made.close()


def _as_broker(port: NodePort) -> socket.socket:
    """Connect as brokers do: from a port that the kernel has drawn for `bind`."""
    return socket.create_connection(("127.0.0.1", port.port), timeout=20, source_address=("", 0))


def _as_caller(port: NodePort) -> socket.socket:
    """Connect as everybody else does."""
    return socket.create_connection(("127.0.0.1", port.port), timeout=20)


def come_to(port: NodePort, said: bytes) -> socket.socket:
    connection = _as_caller(port)
    connection.sendall(said)
    return connection


def ask(number: int) -> bytes:
    """What the door reads of a stream for a number."""
    return b"zray/1" + number.to_bytes(2, "little") + b"\0\0"


def watched(door: Door) -> int:
    """How many descriptors the thread of a door waits for: the one by which it is ended, and those that the door is about. This process must have no
    other epoll. 0: the thread has not begun."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                with open(f"/proc/self/fdinfo/{name}") as lines:
                    found.append(sum(line.startswith("tfd:") for line in lines))
    return max(found, default=0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


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
            with _as_broker(port) as connection:
                accepted, address = listener.accept()
                assert address == connection.getsockname()
                assert address[1] % 2 == 1
                accepted.close()
            with _as_caller(port) as connection:
                assert connection.getsockname()[1] % 2 == 0
                connection.sendall(bytes(10))
                assert read(connection, 17) == b"broker:" + bytes(10)
    assert port.door.accepted == 10


def test_who_does_not_ask_reaches_the_broker(port: NodePort) -> None:
    with come_to(port, b"\xff first words") as connection:
        assert read(connection, 20) == b"broker:\xff first words"
        connection.sendall(b"and more")
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).endswith(b"and more")
    wait_for(lambda: port.door.open == 0, 20, "the connection is gone")
    assert port.door.turned_away == 0


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\0\0\0\0\0\0\0\1\x7f",  # ZeroMQ's
        b"zray/2\x28\0\0\0",
        b"Zray/1\x28\0\0\0",
        b"zray/\0\x28\0\0\0",
    ],
)
def test_what_is_no_preface_goes_to_the_broker(port: NodePort, process: Process, said: bytes) -> None:
    with come_to(port, said) as connection:
        assert read(connection, 17) == b"broker:" + said
    assert port.door.handed_over == 0


def test_a_stream_is_handed_over(port: NodePort, process: Process) -> None:
    with come_to(port, ask(40) + b"at once") as outer:
        said, inner = process.take()
        with inner:
            assert said == ask(40)
            assert inner.getpeername() == outer.getsockname()
            assert read(inner, 7) == b"at once"
            outer.sendall(b"later")
            assert read(inner, 5) == b"later"
            inner.sendall(b"answer")
            assert read(outer, 6) == b"answer"
            wait_for(lambda: port.door.open == 0, 20, "it is nothing to the door any more")
            outer.shutdown(socket.SHUT_WR)
            assert rest(inner) == b""
            inner.sendall(b"last words")
        assert rest(outer) == b"last words"
    assert (port.door.accepted, port.door.handed_over, port.door.turned_away) == (1, 1, 0)


def test_what_was_handed_over_is_not_watched(port: NodePort, process: Process) -> None:
    with come_to(port, ask(40)) as outer:
        _, inner = process.take()
        with inner:
            wait_for(lambda: port.door.open == 0, 20, "the door has closed its descriptor")
            outer.sendall(b"news" * 1000)
            outer.shutdown(socket.SHUT_WR)
            assert watched(port.door) == 2
            assert len(rest(inner)) == 4000


@pytest.mark.parametrize("number", [VALUES, NUMBERS[0], 255, 256, 0x1234, NUMBERS[-1]])
def test_every_number_has_a_socket_of_its_own(port: NodePort, directory: str, process: Process, number: int) -> None:
    asked = Process(directory, number)
    with come_to(port, ask(number) + b"words") as outer:
        said, inner = asked.take()
        with inner:
            assert said == ask(number)
            assert inner.getpeername() == outer.getsockname()
            assert read(inner, 5) == b"words"
    asked.close()


def test_a_preface_may_come_in_pieces(port: NodePort, process: Process) -> None:
    with _as_caller(port) as outer:
        outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in ask(40) + b"words":
            outer.sendall(bytes([byte]))
        said, inner = process.take()
        with inner:
            assert said == ask(40)
            assert read(inner, 5) == b"words"


@pytest.mark.parametrize("said", [b"\xff\0\0", b"z", ask(40)[:9]])
def test_one_who_breaks_off_is_brought_to_the_broker_with_what_he_said(
    port: NodePort, process: Process, said: bytes
) -> None:
    with come_to(port, said) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b"broker:" + said


def test_one_who_breaks_off_behind_the_preface_is_handed_over(port: NodePort, process: Process) -> None:
    come_to(port, ask(40)).close()
    said, inner = process.take()
    with inner:
        assert said == ask(40)
        assert rest(inner) == b""


def test_numbers_that_nobody_has_are_turned_away(port: NodePort, directory: str) -> None:
    Process(directory, 41).close()  # its socket is still there
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.path.join(directory, socket_behind_door(42)))  # of another sort
        other.listen()
        for number in (40, 41, 42, 0, 0xFFFF):
            with come_to(port, ask(number)) as connection:
                assert rest(connection) == b""
    wait_for(lambda: port.door.open == 0, 20, "the connections are gone")
    assert (port.door.turned_away, port.door.handed_over) == (5, 0)
    assert watched(port.door) == 2


def test_who_comes_when_a_process_has_no_room_is_turned_away(port: NodePort, process: Process) -> None:
    people: list[socket.socket] = []
    while not port.door.turned_away:  # as many as the kernel lets wait
        assert len(people) < 10_000
        people.append(come_to(port, ask(40) + b"%5d" % len(people)))
        known = len(people)
        wait_for(lambda known=known: port.door.handed_over + port.door.turned_away == known, 20, "he was seen to")
    with people.pop() as one_too_many, pytest.raises(ConnectionResetError):  # nobody has read what he had to say
        rest(one_too_many)
    for number, outer in enumerate(people):
        said, inner = process.take()
        with inner, outer:
            assert said == ask(40)
            assert read(inner, 5) == b"%5d" % number
            inner.sendall(b"answer")
            assert read(outer, 6) == b"answer"
    with come_to(port, ask(40)):
        process.take()[1].close()


_MORTAL = """
import socket, sys
process = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
process.bind(sys.argv[1])
print("bound", flush=True)
taken = socket.recv_fds(process, 100, 4)
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_process_that_dies_leaves_nobody_waiting(port: NodePort, directory: str) -> None:
    path = os.path.join(directory, socket_behind_door(50))
    with subprocess.Popen(
        [sys.executable, "-c", _MORTAL, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as mortal:
        assert mortal.stdout is not None
        assert mortal.stdout.readline() == "bound\n"
        taken = come_to(port, ask(50))
        assert mortal.stdout.readline() == "taken\n"
        in_queue = come_to(port, ask(50))
        wait_for(lambda: port.door.handed_over == 2, 20, "it was handed over")
        mortal.send_signal(signal.SIGKILL)
        for connection in (taken, in_queue):
            with connection, contextlib.suppress(ConnectionResetError):
                assert rest(connection) == b""
        with come_to(port, ask(50)) as late:
            assert rest(late) == b""
    wait_for(lambda: port.door.open == 0, 20, "nobody is left")
    os.unlink(path)
    next_one = Process(directory, 50)
    with come_to(port, ask(50) + b"words") as outer:
        _, inner = next_one.take()
        with inner:
            assert read(inner, 5) == b"words"
            assert inner.getpeername() == outer.getsockname()
    next_one.close()


def test_no_descriptor_is_left(port: NodePort, process: Process) -> None:
    wait_for(lambda: watched(port.door) == 2, 20, "the door has all that it needs")
    before = descriptors()
    for _ in range(30):
        with come_to(port, ask(40)):
            process.take()[1].close()
        with come_to(port, ask(41)) as stranger:
            assert rest(stranger) == b""
        with come_to(port, bytes(10)) as broker:
            assert read(broker, 17) == b"broker:" + bytes(10)
        come_to(port, ask(40)[:5]).close()
    wait_for(lambda: descriptors() == before, 20, "all are closed")
    assert port.door.open == 0
    assert watched(port.door) == 2
    assert (port.door.accepted, port.door.handed_over, port.door.turned_away) == (120, 30, 30)


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
        silent[2].sendall(b"\xff")
        for connection in silent:
            assert rest(connection) == b""
            connection.close()
        door.stop()
        thread.join()
        door.close()
        assert (door.open, door.turned_away, door.accepted) == (0, 3, 3)


def test_much_goes_through_in_order_whatever_the_pace(port: NodePort, process: Process) -> None:
    sent = os.urandom(1 << 20) * 24
    with come_to(port, bytes(10)) as connection:
        assert read(connection, 17) == b"broker:" + bytes(10)
        writer = threading.Thread(target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR)))
        writer.start()
        with come_to(port, bytes(10)) as other:  # others have their turn meanwhile
            assert read(other, 17) == b"broker:" + bytes(10)
            other.sendall(b"ping")
            assert read(other, 4) == b"ping"
        with come_to(port, ask(40)):
            process.take()[1].close()
        assert rest(connection) == sent
        writer.join()


def test_the_end_of_either_side_is_told(directory: str) -> None:
    port = NodePort("127.0.0.1", 0, directory)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(directory, BROKER))
        listener.listen()
        connection = come_to(port, bytes(10))
        inner, _ = listener.accept()
        inner.settimeout(20)
        connection.sendall(b"last words")
        connection.close()
        assert rest(inner) == bytes(10) + b"last words"
        inner.close()
        connection = come_to(port, bytes(10))
        inner, _ = listener.accept()
        assert read(inner, 10) == bytes(10)
        inner.sendall(b"bye")
        inner.close()
        assert rest(connection) == b"bye"
        connection.close()
    wait_for(lambda: port.door.open == 0, 20, "the connections are gone")
    port.close()


def test_without_descriptors_people_wait_outside(port: NodePort, process: Process) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = [socket.socket() for _ in range(3)]
    taken = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        fillers = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(0))
        for connection, said in zip(connections, (bytes(10), ask(40), bytes(10)), strict=True):
            connection.settimeout(20)
            connection.connect(("127.0.0.1", port.port))
            connection.sendall(said)
        for filler in fillers:
            os.close(filler)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    said, inner = process.take()
    with inner:
        assert said == ask(40)
        assert inner.getpeername() == connections[1].getsockname()
    for connection in (connections[0], connections[2]):
        assert read(connection, 17) == b"broker:" + bytes(10)
    for connection in connections:
        connection.close()


def test_a_port_that_is_taken_says_so(port: NodePort, directory: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port.port}: Address already in use"):
        NodePort("127.0.0.1", port.port, directory)
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid:1"):
        NodePort("no.such.host.invalid", 1, directory)


def test_a_directory_that_is_too_long_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ValueError, match="too long"):
        Door(listener.fileno(), "/" + "x" * 110, "/p")


@pytest.mark.parametrize("at_the_door", [False, True])
def test_zeromq_between_brokers(directory: str, at_the_door: bool) -> None:
    """With the hint that says whom it wants, and without: then through the door."""
    public, secret = zmq.curve_keypair()
    port = NodePort("127.0.0.1", 0, directory)
    address = f"127.0.0.1:{port.port}"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.linger = dealer.linger = 0
        router.rcvtimeo = dealer.rcvtimeo = 20_000
        router.curve_server, router.curve_publickey, router.curve_secretkey = True, public, secret
        router.bind(f"ipc://{os.path.join(directory, BROKER)}")
        router.setsockopt(zmq.USE_FD, port.take_listener())
        router.bind(f"tcp://{address}")
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = public
        dealer.connect(f"tcp://{'' if at_the_door else source_endpoint(address)}{address}")
        for frame in (b"there", os.urandom(1 << 20), b""):
            dealer.send(frame)
            sender, found = router.recv_multipart()
            assert found == frame
            router.send_multipart([sender, frame + b" and back"])
            assert dealer.recv() == frame + b" and back"
        assert (port.door.accepted, port.door.handed_over) == (int(at_the_door), 0)
    port.close()


def test_ends_while_people_are_inside(directory: str) -> None:
    echo = Echo(os.path.join(directory, BROKER), b"")
    process = Process(directory, 40)
    made = NodePort("127.0.0.1", 0, directory)
    with come_to(made, ask(40)) as outer:
        _, inner = process.take()
        inside: list[Any] = [come_to(made, bytes(10)) for _ in range(20)]
        for connection in inside:
            assert read(connection, 10) == bytes(10)
        made.close()
        for connection in inside:
            assert rest(connection) == b""
            connection.close()
        assert made.door.open == 0
        with inner:  # this one the door has no part in
            outer.sendall(b"still here")
            assert read(inner, 10) == b"still here"
    echo.close()
    process.close()
