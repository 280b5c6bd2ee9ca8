"""A process's inbox, when processes of other nodes send to it as well: nothing is lost, whoever sends, and an answer finds its way."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest
import zmq

from zray.sealed_stream import SealedStream
from zray.transport import Context, Inbox, Outbox, ipc_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = bytes(32)


class Place:
    """An inbox that is open to other nodes, one who sends to it here, and those who come from elsewhere."""

    def __init__(self, directory: str) -> None:
        self.context = Context()
        self.endpoint = ipc_endpoint(directory, "w1")
        self.inbox: Inbox = self.context.inbox(self.endpoint)
        self.outbox: Outbox = self.context.outbox(self.endpoint)
        self._path = os.path.join(directory, "x1")
        self.visitors = self.inbox.open(self._path)
        self._callers: list[SealedStream] = []

    def caller(self, ticket: int) -> SealedStream:
        """One who comes with a ticket, as the door hands him over."""
        outer, inner = socket.socketpair()
        outer.sendall(ticket.to_bytes(8, "little"))
        with inner, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            door.connect(self._path)
            socket.send_fds(door, [bytes(10)], [inner.fileno()])
        self._callers.append(SealedStream(outer, SECRET, calling=True))
        return self._callers[-1]

    def close(self) -> None:
        for caller in self._callers:
            caller.close()
        self.inbox.close()
        self.outbox.close()
        self.context.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="zi", dir="/tmp") as directory:
        made = Place(directory)
        yield made
        made.close()


def test_an_answer_goes_to_whom_the_newest_frame_came_from(place: Place) -> None:
    place.visitors.expect(7, SECRET)
    caller = place.caller(7)
    for number in range(3):
        caller.send(b"%d" % number)
        assert place.inbox.wait_frame(20_000) == b"%d" % number
        sender = place.inbox.sender
        assert sender is not None
        place.outbox.send(b"from here")
        assert place.inbox.wait_frame() == b"from here"
        assert place.inbox.sender is None
        place.inbox.answer(sender, b"answer")
        assert caller.receive() == [b"answer"]
    assert place.inbox.next_frame_nowait() is None
    assert place.inbox.wait_frame(0) is None
    assert place.inbox.wait_frame(10) is None


def test_messages_that_are_not_one_frame_are_dropped(place: Place) -> None:
    place.visitors.expect(7, SECRET)
    place.outbox.socket.send_multipart([b"two", b"frames"])
    place.caller(7).send(b"from elsewhere")
    assert place.inbox.wait_frame(20_000) == b"from elsewhere"
    place.outbox.socket.send_multipart([b"two", b"frames"])
    place.outbox.send(b"from here")
    assert place.inbox.wait_frame(20_000) == b"from here"
    assert place.inbox.malformed == 2


@pytest.mark.parametrize("timeout_ms", [-1, 60_000])
def test_nothing_is_lost_whoever_sends(place: Place, timeout_ms: int) -> None:
    count = 2000
    callers = []
    for ticket in (1, 2):
        place.visitors.expect(ticket, SECRET)
        callers.append(place.caller(ticket))

    def from_here() -> None:
        outbox = place.context.outbox(place.endpoint)
        for number in range(count):
            outbox.send(b"0:%d" % number)
        outbox.socket.setsockopt(zmq.LINGER, 20_000)
        outbox.close()

    def from_elsewhere(ticket: int, caller: SealedStream) -> None:
        for number in range(count):
            caller.send(b"%d:%d" % (ticket, number))
        while caller.waits_to_write():
            caller.flush()

    threads = [threading.Thread(target=from_here)]
    threads += [threading.Thread(target=from_elsewhere, args=(ticket, callers[ticket - 1])) for ticket in (1, 2)]
    for thread in threads:
        thread.start()
    found = [place.inbox.wait_frame(timeout_ms) for _ in range(3 * count)]
    for thread in threads:
        thread.join()
    for source in range(3):
        expected = [b"%d:%d" % (source, number) for number in range(count)]
        assert [frame for frame in found if frame is not None and frame.startswith(b"%d:" % source)] == expected
    assert place.inbox.next_frame_nowait() is None
