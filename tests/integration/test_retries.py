"""Trying again: tasks after deaths and exceptions, actors after deaths, calls of restarted actors."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import alive, wait_for
from zray import exceptions
from zray.exceptions import ActorDiedError, ActorUnavailableError, DeathCause, WorkerCrashedError

if TYPE_CHECKING:
    from tests.helpers import Tally

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def dies_until(tally: Tally) -> Any:
    """A function that ends its process the first `times` times and then returns the number of its attempt."""

    def run(times: int) -> int:
        attempt = tally.add()
        if attempt <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt

    return run


@pytest.fixture
def fails_until(tally: Tally) -> Any:
    """A function that raises the first `times` times and then returns the number of its attempt."""

    def run(times: int, kind: str = "ValueError") -> int:
        attempt = tally.add()
        if attempt <= times:
            raise {"ValueError": ValueError, "KeyError": KeyError, "OSError": OSError}[kind](f"attempt {attempt}")
        return attempt

    return run


# -- tasks ----------------------------------------------------------------------------------------------------------------


def test_a_dead_worker_costs_a_retry(dies_until: Any, tally: Tally) -> None:
    assert zray.get(zray.remote(max_retries=2)(dies_until).remote(2), timeout=60) == 3
    assert len(tally) == 3


def test_three_retries_unless_said_otherwise(dies_until: Any, tally: Tally) -> None:
    with pytest.raises(WorkerCrashedError) as raised:
        zray.get(zray.remote(dies_until).remote(100), timeout=60)
    assert raised.value.cause is DeathCause.SIGKILL
    assert len(tally) == 4


def test_no_retries(dies_until: Any, tally: Tally) -> None:
    with pytest.raises(WorkerCrashedError):
        zray.get(zray.remote(dies_until).options(max_retries=0).remote(1), timeout=60)
    assert len(tally) == 1


def test_retries_without_limit(dies_until: Any, tally: Tally) -> None:
    assert zray.get(zray.remote(dies_until).options(max_retries=-1).remote(7), timeout=60) == 8


def test_arguments_are_there_again_for_the_retry(tally: Tally) -> None:
    @zray.remote(max_retries=1)
    def work(array: Any, nested: list[Any]) -> Any:
        if tally.add() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(array), zray.get(nested[0])

    big, small = zray.put(b"x" * 1_000_000), zray.put(5)
    ref = work.remote(big, [small])
    del big, small
    assert zray.get(ref, timeout=60) == (1_000_000, 5)


def test_several_results_after_a_retry(dies_until: Any) -> None:
    two = zray.remote(lambda times: (dies_until(times), "b")).options(num_returns=2, max_retries=1)
    a, b = two.remote(1)
    assert zray.get([a, b], timeout=60) == [2, "b"]


def test_exceptions_are_not_retried_unless_asked(fails_until: Any, tally: Tally) -> None:
    with pytest.raises(ValueError, match="attempt 1"):
        zray.get(zray.remote(max_retries=5)(fails_until).remote(1))
    assert len(tally) == 1


def test_retry_exceptions_retries_all(fails_until: Any, tally: Tally) -> None:
    assert zray.get(zray.remote(max_retries=2, retry_exceptions=True)(fails_until).remote(2)) == 3


def test_retry_exceptions_are_limited_by_max_retries(fails_until: Any, tally: Tally) -> None:
    with pytest.raises(ValueError, match="attempt 3"):
        zray.get(zray.remote(max_retries=2, retry_exceptions=True)(fails_until).remote(100))
    assert len(tally) == 3


def test_retry_exceptions_of_listed_classes_only(fails_until: Any, tally: Tally) -> None:
    chosen = zray.remote(max_retries=3, retry_exceptions=[LookupError, OSError])(fails_until)
    assert zray.get(chosen.remote(1, "KeyError")) == 2
    with pytest.raises(ValueError, match="attempt 3"):
        zray.get(chosen.remote(100, "ValueError"))
    assert len(tally) == 3


def test_an_own_class_among_retry_exceptions(tally: Tally) -> None:
    class OwnError(Exception):
        pass

    @zray.remote(max_retries=3, retry_exceptions=[OwnError])
    def work() -> int:
        attempt = tally.add()
        if attempt < 3:
            raise OwnError
        return attempt

    assert zray.get(work.remote()) == 3


def test_tasks_behind_a_dying_one_still_run(dies_until: Any, tally: Tally) -> None:
    doomed = zray.remote(max_retries=0)(dies_until)
    echo = zray.remote(lambda x: x)
    refs = [echo.remote(i) if i % 10 else doomed.remote(1000) for i in range(100)]
    for i, ref in enumerate(refs):
        if i % 10:
            assert zray.get(ref, timeout=60) == i
        else:
            with pytest.raises(WorkerCrashedError):
                zray.get(ref, timeout=60)


def test_a_parent_that_dies_runs_its_children_again(tally: Tally) -> None:
    @zray.remote
    def child(x: int) -> int:
        return x * 10

    @zray.remote(max_retries=2)
    def parent() -> int:
        values = zray.get([child.remote(i) for i in range(5)])
        if tally.add() <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return sum(values)

    assert zray.get(parent.remote(), timeout=60) == 100
    assert len(tally) == 3


def test_a_parent_that_branches_differently_in_its_second_run_gets_its_own_values(tally: Tally) -> None:
    @zray.remote(max_retries=1)
    def parent() -> str:
        again = tally.add() > 1
        name = "second" if again else "first"
        value = zray.get(zray.remote(lambda: name).remote())
        put = zray.get(zray.put(name))
        if not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{value} {put}"

    assert zray.get(parent.remote(), timeout=60) == "second second"


# -- actors ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def phoenix(tally: Tally) -> Any:
    class Phoenix:
        def __init__(self, start: int = 0) -> None:
            self.life = tally.add("born")
            self.value = start

        def increase(self) -> int:
            self.value += 1
            return self.value

        def pid(self) -> int:
            return os.getpid()

        def facts(self) -> tuple[int, bool]:
            return self.life, zray.get_runtime_context().was_current_actor_reconstructed

        def die(self) -> None:
            tally.add("dies")
            os.kill(os.getpid(), signal.SIGKILL)

        def die_once(self) -> int:
            if tally.add("dies") < 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.life

    return zray.remote(Phoenix)


def when_back(call: Any) -> Any:
    """Call until the actor is not between two lives any more; return the value."""

    def attempt() -> Any:
        try:
            return [zray.get(call(), timeout=30)]
        except ActorUnavailableError:
            return None

    return wait_for(attempt, 30, "the actor is back")[0]


def test_an_actor_is_not_restarted_unless_asked(phoenix: Any) -> None:
    actor = phoenix.remote()
    with pytest.raises(ActorDiedError):
        zray.get(actor.die.remote(), timeout=30)
    with pytest.raises(ActorDiedError):
        zray.get(actor.increase.remote(), timeout=30)


def test_max_restarts_makes_a_new_instance(phoenix: Any, tally: Tally) -> None:
    actor = phoenix.options(max_restarts=2).remote(10)
    assert zray.get(actor.increase.remote()) == 11
    assert zray.get(actor.facts.remote()) == (1, False)
    for lives in (2, 3):
        os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)
        assert when_back(actor.increase.remote) == 11
        life, again = zray.get(actor.facts.remote())
        assert again
        assert tally.lines.count("born") == lives
        assert life == lives
    os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)

    def dead() -> bool:
        try:
            zray.get(actor.increase.remote(), timeout=30)
        except ActorDiedError:
            return True
        except ActorUnavailableError:
            pass
        return False

    wait_for(dead, what="it is dead for good")


def test_the_call_that_died_is_an_error_without_task_retries(phoenix: Any) -> None:
    actor = phoenix.options(max_restarts=1).remote()
    with pytest.raises((ActorUnavailableError, ActorDiedError)) as raised:
        zray.get(actor.die.remote(), timeout=30)
    assert isinstance(raised.value, ActorUnavailableError)
    assert when_back(actor.increase.remote) == 1


def test_max_task_retries_runs_the_call_again(phoenix: Any, tally: Tally) -> None:
    actor = phoenix.options(max_restarts=5, max_task_retries=5).remote()
    assert zray.get(actor.die_once.remote(), timeout=60) == 3  # the third line
    assert tally.lines == ["born", "dies", "born", "dies"]


def test_calls_in_flight_survive_a_death_in_order(phoenix: Any, tally: Tally) -> None:
    class Log:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def add(self, i: int) -> list[int]:
            self.seen.append(i)
            if i == 5 and tally.add() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return list(self.seen)

    actor = zray.remote(max_restarts=1, max_task_retries=1)(Log).remote()
    refs = [actor.add.remote(i) for i in range(20)]
    rows = zray.get(refs, timeout=60)
    assert rows[4] == [0, 1, 2, 3, 4]
    # The new instance saw the call that died, and what came after it, in order; whatever was sealed before is not repeated.
    last = rows[-1]
    assert last == sorted(last)
    assert last[-15:] == list(range(5, 20))
    assert len(set(last)) == len(last)


def test_restarts_without_limit(phoenix: Any) -> None:
    actor = phoenix.options(max_restarts=-1).remote()
    for _ in range(6):
        os.kill(when_back(actor.pid.remote), signal.SIGKILL)
    assert when_back(actor.increase.remote) == 1


def test_kill_can_let_it_restart(phoenix: Any) -> None:
    actor = phoenix.options(max_restarts=1).remote()
    pid = zray.get(actor.pid.remote())
    zray.kill(actor, no_restart=False)
    wait_for(lambda: not alive(pid))
    assert when_back(actor.pid.remote) != pid
    other = phoenix.options(max_restarts=-1).remote()
    assert zray.get(other.increase.remote()) == 1
    pid = zray.get(other.pid.remote())
    zray.kill(other)
    wait_for(lambda: not alive(pid))
    with pytest.raises(ActorDiedError, match=r"zray\.kill"):
        zray.get(other.increase.remote(), timeout=30)


def test_a_restarted_actor_keeps_its_name_and_its_arguments(phoenix: Any) -> None:
    start = zray.put(41)
    actor = phoenix.options(max_restarts=1, name="phoenix").remote(start)
    del start
    os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)
    assert when_back(lambda: zray.get_actor("phoenix").increase.remote()) == 42


def test_handles_everywhere_find_the_new_incarnation(phoenix: Any) -> None:
    actor = phoenix.options(max_restarts=1, max_task_retries=2).remote()

    class User:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def use(self) -> int:
            return int(zray.get(self.handle.increase.remote()))

    user = zray.remote(User).remote(actor)
    assert zray.get(user.use.remote()) == 1
    os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)
    assert zray.get(user.use.remote(), timeout=60) == 1
    assert zray.get(zray.remote(lambda a: zray.get(a.increase.remote())).remote(actor), timeout=60) == 2


def test_a_constructor_that_fails_in_the_second_life(tally: Tally) -> None:
    class Once:
        def __init__(self) -> None:
            if tally.add() > 1:
                raise RuntimeError("only one life")

        def pid(self) -> int:
            return os.getpid()

    actor = zray.remote(max_restarts=5)(Once).remote()
    os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)

    def reason() -> Any:
        try:
            zray.get(actor.pid.remote(), timeout=30)
        except ActorDiedError as error:
            return str(error)
        except exceptions.ActorUnavailableError:
            pass
        return None

    assert "only one life" in wait_for(reason)
