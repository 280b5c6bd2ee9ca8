"""wait: which of many results are there."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import state_of, wait_for
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def held(gate: Callable[[str], Gate]) -> Any:
    """A function that makes results which come when the test lets them: (reference, gate)."""
    count = iter(range(1000))

    def make() -> tuple[Any, Gate]:
        mine = gate(f"held{next(count)}")
        return zray.remote(num_cpus=0)(mine.wait).remote(), mine

    return make


def test_ready_come_first_and_both_lists_keep_order(held: Any) -> None:
    (a, open_a), (b, _), (c, open_c) = held(), held(), held()
    done = zray.put(1)
    open_c.open()
    zray.get(c)
    refs = [a, b, c, done]
    assert zray.wait(refs, num_returns=2) == ([c, done], [a, b])
    open_a.open()
    assert zray.wait(refs, num_returns=3, timeout=30) == ([a, c, done], [b])
    _.open()
    assert zray.wait(refs, num_returns=4) == (refs, [])


def test_at_most_num_returns_are_ready() -> None:
    refs = [zray.put(i) for i in range(10)]
    ready, rest = zray.wait(refs)
    assert (ready, rest) == (refs[:1], refs[1:])
    ready, rest = zray.wait(refs, num_returns=7)
    assert (ready, rest) == (refs[:7], refs[7:])


def test_a_timeout_returns_what_is_there(held: Any) -> None:
    (a, gate), done = held(), zray.put(1)
    assert zray.wait([a], timeout=0) == ([], [a])
    assert zray.wait([a], timeout=0.05) == ([], [a])
    assert zray.wait([a, done], num_returns=2, timeout=0.05) == ([done], [a])
    gate.open()
    assert zray.wait([a], timeout=30) == ([a], [])


def test_errors_count_as_ready() -> None:
    @zray.remote(max_retries=0)
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @zray.remote
    def fail() -> None:
        raise ValueError

    refs = [die.remote(), fail.remote()]
    assert zray.wait(refs, num_returns=2, timeout=30) == (refs, [])
    with pytest.raises(exceptions.WorkerCrashedError):
        zray.get(refs[0])


def test_any_of_thousands(held: Any) -> None:
    waiting = [held() for _ in range(5)]
    refs = [zray.put(i) for i in range(1000)]
    mixed = [ref for ref, _ in waiting] + refs
    ready, rest = zray.wait(mixed, num_returns=1000)
    assert ready == refs
    assert rest == mixed[:5]
    echo = zray.remote(lambda x: x)
    pending = [echo.remote(i) for i in range(2000)]
    seen = []
    while pending:
        ready, pending = zray.wait(pending, num_returns=min(100, len(pending)))
        seen += ready
    assert sorted(zray.get(seen)) == list(range(2000))
    for _, gate in waiting:
        gate.open()


def test_slow_ones_do_not_hold_up_fast_ones(held: Any) -> None:
    slow, gate = held()
    fast = [zray.remote(lambda x: x).remote(i) for i in range(50)]
    got = []
    rest = [slow, *fast]
    for _ in range(50):
        (ready,), rest = zray.wait(rest)
        got.append(zray.get(ready))
    assert sorted(got) == list(range(50))
    assert rest == [slow]
    gate.open()
    assert zray.wait(rest) == ([slow], [])


def test_inside_a_task() -> None:
    @zray.remote
    def race(box: list[Any]) -> int:
        child = zray.remote(lambda x: x)
        ready, rest = zray.wait([*box, child.remote(1), child.remote(2)], num_returns=2, timeout=30)
        return len(ready) * 10 + len(rest)

    assert zray.get(race.remote([zray.put(0)])) == 21


def test_several_threads_wait_for_the_same(held: Any) -> None:
    ref, gate = held()
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(zray.wait([ref], timeout=30))) for _ in range(5)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(30)
    assert results == [([ref], [])] * 5


def test_wrong_use_is_refused() -> None:
    ref = zray.put(1)
    with pytest.raises(ValueError, match="more than once"):
        zray.wait([ref, ref])
    with pytest.raises(ValueError, match="at least 1"):
        zray.wait([ref], num_returns=0)
    with pytest.raises(ValueError, match="only 1"):
        zray.wait([ref], num_returns=2)
    with pytest.raises(ValueError, match="negative"):
        zray.wait([ref], timeout=-1)
    with pytest.raises(TypeError, match="list"):
        zray.wait(ref)
    with pytest.raises(TypeError, match="item 1"):
        zray.wait([ref, 5])


def test_tuples_and_fetch_local() -> None:
    refs = zray.put(1), zray.put(2)
    assert zray.wait(refs, num_returns=2, fetch_local=False) == (list(refs), [])


def test_the_list_that_is_waited_for_may_be_changed_by_another_thread(held: Any) -> None:
    for wait in (zray.get, lambda refs: zray.wait(refs, num_returns=20)):
        made = [held() for _ in range(20)]
        refs = [ref for ref, _ in made]
        found: list[Any] = []
        waiter = threading.Thread(target=lambda wait=wait, refs=refs, found=found: found.append(wait(refs)))
        waiter.start()
        wait_for(lambda thread=waiter: thread.native_id is not None and state_of(thread.native_id) == "S", 20)
        refs.clear()
        for _, opened in made:
            opened.open()
        waiter.join(60)
        assert len(found) == 1
