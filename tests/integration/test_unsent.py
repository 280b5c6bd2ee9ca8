"""Callers that are killed between making a call and sending it, while others hold references to its result."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

import zray
from zray.exceptions import OwnerDiedError, WorkerCrashedError

if TYPE_CHECKING:
    from tests.helpers import Tally

pytestmark = pytest.mark.usefixtures("warm")


class Shelf:
    """Keeps references, so that they outlive whoever made them."""

    def __init__(self) -> None:
        self.refs: list[Any] = []

    def keep(self, refs: list[Any]) -> None:
        self.refs = refs

    def read(self) -> list[Any]:
        return self.refs


class Notes:
    def __init__(self) -> None:
        self.noted: list[int] = []

    def note(self, n: int) -> int:
        self.noted.append(n)
        return n

    def read(self) -> list[int]:
        return self.noted


def seven() -> int:
    return 7


def leave_a_task_unsent(shelf: Any) -> None:
    """Pack a task, let it never leave, hand its reference out, die."""
    from zray import api

    api.submitter_of(api.current_session())._send_tasks = lambda: None  # type: ignore[method-assign]
    ref = zray.remote(seven).remote()
    zray.get(shelf.keep.remote([ref]))
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_call_unsent(shelf: Any, notes: Any) -> None:
    """Call an actor three times; the second call never leaves. Hand the references out and die."""
    from zray import api

    class Nowhere:
        def send(self, _frame: bytes) -> None: ...

    session: Any = api.current_session()
    refs = [notes.note.remote(1)]
    zray.get(refs)
    peer = session.peer
    session.peer = lambda _worker: Nowhere()
    refs.append(notes.note.remote(2))
    api.submitter_of(session).flush()
    session.peer = peer
    refs.append(notes.note.remote(3))
    zray.get(shelf.keep.remote(refs))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_result_of_a_task_that_never_left_is_an_error() -> None:
    shelf = zray.remote(Shelf).remote()
    with pytest.raises(WorkerCrashedError):
        zray.get(zray.remote(leave_a_task_unsent).options(max_retries=0).remote(shelf))
    (ref,) = zray.get(shelf.read.remote())
    with pytest.raises(OwnerDiedError, match="before the call had left"):
        zray.get(ref, timeout=30)


def test_a_call_that_never_left_is_sent_by_the_broker_and_in_order() -> None:
    shelf, notes = zray.remote(Shelf).remote(), zray.remote(Notes).remote()
    with pytest.raises(WorkerCrashedError):
        zray.get(zray.remote(leave_a_call_unsent).options(max_retries=0).remote(shelf, notes))
    refs = zray.get(shelf.read.remote())
    assert zray.get(refs, timeout=30) == [1, 2, 3]
    assert zray.get(notes.read.remote()) == [1, 2, 3]


def test_a_task_that_runs_again_makes_calls_of_its_own(tally: Tally) -> None:
    """What the first run left to others is its own: the second may have drawn other numbers."""

    def caller(shelf: Any) -> int:
        drawn = 10 * tally.add(os.getpid())
        ref, kept = zray.remote(lambda x: x).remote(drawn), zray.put(drawn)
        if drawn == 10:
            zray.get(shelf.keep.remote([ref, kept]))
            os.kill(os.getpid(), signal.SIGKILL)
        assert zray.get(kept) == drawn
        return int(zray.get(ref))

    shelf = zray.remote(Shelf).remote()
    assert zray.get(zray.remote(caller).options(max_retries=1).remote(shelf), timeout=30) == 20
    ref, kept = zray.get(shelf.read.remote())
    assert zray.get(ref, timeout=30) == 10
    assert zray.get(kept, timeout=30) == 10
