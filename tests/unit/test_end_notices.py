"""What workers tell the broker of ended calls (`zray.execution.Notices`): threads end calls while another one tells."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from zray import wire
from zray.execution import Notices
from zray.ids import task_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zray.session import Session

PARENT = bytes(16)


class Broker:
    """What was sent to it."""

    def __init__(self) -> None:
        self.frames: list[wire.TasksDone] = []

    def send(self, frame: Any) -> None:
        message = wire.decode(bytes(frame))
        assert isinstance(message, wire.TasksDone)
        assert len(message.ids) == 16 * len(message.statuses) == 16 * len(message.micros)
        self.frames.append(message)

    def told(self) -> list[tuple[bytes, int, int]]:
        """Every end, as it was noted."""
        return [
            (frame.ids[16 * index : 16 * index + 16], frame.statuses[index], frame.micros[index])
            for frame in self.frames
            for index in range(len(frame.micros))
        ]


class FakeSession:
    worker = 7

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.broker = Broker()


@pytest.fixture
def often_switched() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_ends_are_told_in_order_and_once() -> None:
    session = FakeSession()
    notices = Notices(cast("Session", session))
    noted = [(task_id(PARENT, number), number % 3, number) for number in range(5)]
    for end in noted:
        notices.add(*end)
    assert notices.waiting
    notices.flush()
    assert not notices.waiting
    notices.flush()
    assert session.broker.told() == noted
    assert len(session.broker.frames) == 1


def test_an_idle_worker_says_so_though_nothing_ended() -> None:
    session = FakeSession()
    Notices(cast("Session", session)).flush(idle=True)
    assert [(frame.worker, frame.ids, frame.idle) for frame in session.broker.frames] == [(7, b"", True)]


@pytest.mark.usefixtures("often_switched")
def test_no_end_is_lost_when_several_threads_tell() -> None:
    session = FakeSession()
    notices = Notices(cast("Session", session))
    calls = 3000

    def run(first: int) -> None:
        for number in range(first, first + calls):
            notices.add(task_id(PARENT, number), 0, number)
            if number % 3 == 0:
                notices.flush()

    threads = [threading.Thread(target=run, args=(index * calls,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notices.flush()
    told = session.broker.told()
    assert sorted(micros for _, _, micros in told) == list(range(4 * calls))
    assert all(task == task_id(PARENT, micros) for task, _, micros in told)
