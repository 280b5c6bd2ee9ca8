"""Finalizers and signal handlers run in the midst of sending and printing, and may call and get themselves, in the same thread."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.counter import Counter
from zray import api
from zray.log_tail import LogTail

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")


IDLE = Counter.options(num_cpus=0)


@zray.remote
def double(value: int) -> int:
    return 2 * value


class Meddling:
    """The way to the broker, or to a worker: as a frame is sent, something else happens in the same thread."""

    acting = False

    def __init__(self, outbox: Any, act: Callable[[], None]) -> None:
        self._outbox = outbox
        self._act = act

    def send(self, frame: Any) -> None:
        if not Meddling.acting:
            Meddling.acting = True
            self._act()
            Meddling.acting = False
        self._outbox.send(frame)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outbox, name)


@pytest.mark.parametrize("waits", [False, True], ids=["it calls", "it calls and gets"])
def test_tasks_that_are_made_while_others_are_sent(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = api.current_session()
    zray.get([double.remote(number) for number in range(10)])
    inner: list[Any] = []

    def act() -> None:
        if len(inner) < 300:
            inner.append(double.remote(1000 + len(inner)))
            if waits:
                assert zray.get(inner[-1], timeout=30) == 2 * (1000 + len(inner) - 1)
                inner.append(double.remote(1000 + len(inner)))

    monkeypatch.setattr(session, "broker", Meddling(session.broker, act))
    outer = [double.remote(number) for number in range(1000)]
    assert zray.get(outer, timeout=60) == [2 * number for number in range(1000)]
    monkeypatch.undo()
    assert zray.get(inner, timeout=60) == [2 * (1000 + number) for number in range(len(inner))]
    assert inner


def test_calls_of_an_actor_that_are_made_while_others_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    session = api.current_session()
    first, second = IDLE.remote(), IDLE.remote()
    for _ in range(3):  # from the second on they go straight
        made = zray.get([first.add.remote(1), second.add.remote(1)])
    assert made == [3, 3]
    assert len(session.peers) >= 2
    inner: list[Any] = []

    def act() -> None:
        if len(inner) < 100:
            inner.append(second.add.remote(1))
            inner.append(second.add.remote(1))

    for worker, outbox in [*session.peers.items()]:
        monkeypatch.setitem(session.peers, worker, Meddling(outbox, act))
    outer = [first.add.remote(1) for _ in range(500)]
    assert zray.get(outer, timeout=60) == list(range(4, 504))
    monkeypatch.undo()
    assert zray.get(inner, timeout=60) == list(range(4, 4 + len(inner)))
    assert len(inner) >= 2


def test_a_signal_handler_calls_the_actor_that_is_being_called() -> None:
    counter = IDLE.remote()
    zray.get([counter.add.remote(1) for _ in range(3)])
    inner: list[Any] = []
    before = signal.signal(signal.SIGALRM, lambda *_: inner.append(counter.add.remote(1)))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        outer = [counter.add.remote(1) for _ in range(15_000)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = zray.get(outer, timeout=60)
    assert found == sorted(found)
    assert sorted(found + zray.get(inner, timeout=60)) == list(range(4, 4 + len(outer) + len(inner)))
    assert inner


def test_output_is_printed_once_though_the_stream_gets_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w1.7.out").write_text("\x1ework\x1f12\none\ntwo\n")
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            tail.drain()  # as `zray.get` does that finds new output
            written.append(text)

        def flush(self) -> None:
            tail.drain()

    monkeypatch.setattr(sys, "stdout", Stream())
    tail = LogTail(str(tmp_path), 7)
    tail.drain()
    tail.stop()
    monkeypatch.undo()
    assert "".join(written) == "(work pid=12) one\n(work pid=12) two\n"
