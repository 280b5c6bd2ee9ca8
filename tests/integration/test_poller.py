"""How a broker waits (`zray.transport.Poller`): whatever wakes it, and signals, which by themselves do not."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from tests.helpers import state_of, wait_for
from zray.transport import Context, Poller, ipc_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

FOREVER_MS = 100_000


class Place:
    """An inbox, one who sends to it, and what waits for it."""

    def __init__(self, directory: str) -> None:
        self.context = Context()
        endpoint = ipc_endpoint(directory, "w1")
        self.inbox = self.context.inbox(endpoint)
        self.outbox = self.context.outbox(endpoint)
        self.poller = Poller(self.inbox)

    def close(self) -> None:
        self.poller.close()
        self.context.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="zp", dir="/tmp") as directory:
        made = Place(directory)
        yield made
        made.close()


def test_messages_and_descriptors_end_a_wait(place: Place) -> None:
    assert place.poller.wait(0) == (False, [], False)
    place.outbox.send(b"one")
    while not place.poller.wait(FOREVER_MS)[0]:
        pass
    assert place.inbox.next_frame_nowait() == b"one"
    reading, writing = os.pipe()
    place.poller.add(reading)
    os.write(writing, b"x")
    while not (found := place.poller.wait(FOREVER_MS)[1]):
        pass
    assert found == [reading]
    place.poller.remove(reading)
    os.close(reading)
    os.close(writing)


def test_an_interrupt_ends_the_next_wait_and_no_other(place: Place) -> None:
    place.poller.interrupt()
    place.poller.interrupt()
    assert place.poller.wait(FOREVER_MS) == (False, [], False)
    assert place.poller.wait(0) == (False, [], False)


def test_a_signal_handler_ends_the_wait_that_goes_on(place: Place) -> None:
    def send() -> None:
        wait_for(lambda: state_of(os.getpid()) == "S", 20)  # of the main thread
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: place.poller.interrupt())
    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert place.poller.wait(FOREVER_MS) == (False, [], False)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_after_the_end_does_nothing(place: Place) -> None:
    place.poller.close()
    place.poller.interrupt()
    place.poller = Poller(place.inbox)
