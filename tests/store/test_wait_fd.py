"""Waiting for a descriptor, as lanes do: what comes, what does not, and signals."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from zray._store import PROC_WORKER, Store

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store() -> Iterator[Store]:
    fd = os.memfd_create("zray-test")
    Store.format(fd, 1 << 20, 100)
    found = Store(fd)
    found.register(PROC_WORKER)
    yield found
    found.close()
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_what_is_there_and_what_is_not(store: Store, pipe: tuple[int, int]) -> None:
    there, write = pipe
    for seconds in (0.0, 0.00001, 0.001):
        assert not store.wait_fd(there, seconds)
    os.write(write, b"x")
    for seconds in (0.0, 1.0, -1.0):
        assert store.wait_fd(there, seconds)


def test_what_comes_while_it_is_waited_for(store: Store, pipe: tuple[int, int]) -> None:
    there, write = pipe
    begun = threading.Event()

    def answer() -> None:
        begun.wait()
        os.write(write, b"x")

    thread = threading.Thread(target=answer)
    thread.start()
    begun.set()
    assert store.wait_fd(there, -1.0)
    thread.join()


def test_a_handler_that_raises_ends_it(store: Store, pipe: tuple[int, int]) -> None:
    class Alarm(Exception):
        pass

    def handler(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        with pytest.raises(Alarm):
            store.wait_fd(pipe[0], -1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_no_descriptor(store: Store) -> None:
    there, write = os.pipe()
    os.close(there)
    os.close(write)
    with pytest.raises(OSError, match=f"cannot wait for descriptor {there}"):
        store.wait_fd(there, 0.1)
