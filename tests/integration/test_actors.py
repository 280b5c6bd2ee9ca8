"""Actors: state and order, names, handles, life and end."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import SLACK, Program, alive, query, state_of, stop, wait_for, worker_pids
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def counter_class() -> Any:
    class Counter:
        """Counts."""

        def __init__(self, start: int = 0, *, step: int = 1) -> None:
            self.value = start
            self.step = step

        def increase(self, by: int | None = None) -> int:
            self.value += self.step if by is None else by
            return self.value

        def read(self) -> int:
            return self.value

        def pid(self) -> int:
            return os.getpid()

        def fail(self) -> None:
            self.value += 100
            raise ValueError("as asked")

        def end(self) -> None:
            zray.actor.exit_actor()

        def wait(self, gate: Gate) -> None:
            gate.wait()

    return Counter


@pytest.fixture
def counter(counter_class: Any) -> Any:
    return zray.remote(counter_class)


def ended(pid: int) -> None:
    wait_for(lambda: not alive(pid), 10, f"actor process {pid} has ended")


def test_state_stays_between_calls(counter: Any) -> None:
    actor = counter.remote(5, step=2)
    assert [zray.get(actor.increase.remote()) for _ in range(3)] == [7, 9, 11]
    assert zray.get(actor.increase.remote(by=100)) == 111
    other = counter.remote()
    assert zray.get([other.read.remote(), actor.read.remote()]) == [0, 111]


def test_an_actor_is_a_process_of_its_own(counter: Any) -> None:
    actors = [counter.remote() for _ in range(3)]
    pids = zray.get([actor.pid.remote() for actor in actors])
    assert len({*pids, os.getpid()}) == 4
    assert zray.get([actor.pid.remote() for actor in actors]) == pids


def test_calls_of_one_caller_run_in_its_order() -> None:
    class Log:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def add(self, *item: Any) -> None:
            self.seen.append(item)

        def read(self) -> list[Any]:
            return self.seen

    log = zray.remote(Log).remote()
    for i in range(1000):
        log.add.remote("driver", i)  # the first ones before the actor lives

    @zray.remote
    def write(name: str, log: Any, count: int) -> None:
        refs = [log.add.remote(name, i) for i in range(count)]
        zray.get(refs)

    zray.get([write.remote(f"task{n}", log, 300) for n in range(3)])

    def from_thread(name: str) -> None:
        for i in range(200):
            log.add.remote(name, i)

    threads = [threading.Thread(target=from_thread, args=(f"thread{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = zray.get(log.read.remote())
    assert len(seen) == 1000 + 900 + 400
    for name in {row[0] for row in seen}:
        numbers = [row[1] for row in seen if row[0] == name]
        assert numbers == list(range(len(numbers))), name


def test_order_holds_when_an_argument_is_late(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def late() -> str:
        hold.wait()
        return "late"

    class Log:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def add(self, item: str) -> list[str]:
            self.seen.append(item)
            return list(self.seen)

    log = zray.remote(Log).remote()
    refs = [log.add.remote("first"), log.add.remote(late.remote()), log.add.remote("third")]
    assert zray.get(refs[0]) == ["first"]
    assert zray.wait(refs[2:], timeout=0.1)[0] == []
    hold.open()
    assert zray.get(refs[2]) == ["first", "late", "third"]


def test_arguments_by_reference_and_large_ones() -> None:
    class Sum:
        def __init__(self, start: Any) -> None:
            self.total = float(start.sum())

        def add(self, array: Any, nested: list[Any]) -> float:
            self.total += float(array.sum()) + float(zray.get(nested[0]).sum())
            return self.total

    ones = zray.put(np.ones(100_000))
    actor = zray.remote(Sum).remote(ones)
    assert zray.get(actor.add.remote(ones, [ones])) == 300_000
    assert zray.get(actor.add.remote(np.ones(500_000), [ones])) == 900_000


def test_methods_with_several_results_and_options() -> None:
    class Splitter:
        @zray.method(num_returns=2)
        def split(self, text: str) -> list[str]:
            return text.split("-")

        def none(self) -> None:
            return None

    actor = zray.remote(Splitter).remote()
    a, b = actor.split.remote("x-y")
    assert zray.get([a, b]) == ["x", "y"]
    one, two, three = actor.split.options(num_returns=3).remote("1-2-3")
    assert zray.get([one, two, three]) == ["1", "2", "3"]
    assert actor.none.options(num_returns=0).remote() is None
    with pytest.raises(ValueError):
        zray.method(no_such_option=1)


def test_special_methods_and_inheritance() -> None:
    class Base:
        def who(self) -> str:
            return type(self).__name__ + self.suffix()

        def suffix(self) -> str:
            return ""

    class Derived(Base):
        def suffix(self) -> str:
            return "!"

        def __call__(self, x: int) -> int:
            return x + 1

        def __len__(self) -> int:
            return 3

        @property
        def size(self) -> int:
            return 4

        @staticmethod
        def fixed() -> str:
            return "static"

        @classmethod
        def made(cls) -> str:
            return cls.__name__

    actor = zray.remote(Derived).remote()
    assert zray.get([actor.who.remote(), actor.__call__.remote(1), actor.__len__.remote()]) == ["Derived!", 2, 3]
    assert zray.get([actor.fixed.remote(), actor.made.remote()]) == ["static", "Derived"]


def test_an_error_leaves_the_actor_alive(counter: Any) -> None:
    actor = counter.remote()
    with pytest.raises(ValueError, match="as asked"):
        zray.get(actor.fail.remote())
    assert zray.get(actor.increase.remote()) == 101
    with pytest.raises(TypeError):
        zray.get(actor.increase.remote(1, 2, 3))
    assert zray.get(actor.read.remote()) == 101


def test_misuse_is_refused_with_the_mend(counter: Any, counter_class: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be instantiated directly.*Counter\.remote\(\)"):
        counter()
    actor = counter.remote()
    with pytest.raises(TypeError, match=r"increase\.remote\(\)"):
        actor.increase()
    with pytest.raises(AttributeError, match="no_such_method"):
        actor.no_such_method.remote()
    with pytest.raises(exceptions.ActorClassInheritanceException, match="plain class"):
        type("Derived", (counter,), {}) if False else exec("class D(counter): pass", {"counter": counter})
    with pytest.raises(TypeError, match="exit_actor"):
        zray.actor.exit_actor()
    assert isinstance(counter_class(1), counter_class)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_restarts": -2}, ValueError),
        ({"max_concurrency": 0}, ValueError),
        ({"lifetime": "eternal"}, ValueError),
        ({"name": ""}, ValueError),
        ({"name": 5}, (TypeError, ValueError)),
        ({"num_returns": 2}, (TypeError, ValueError)),
        ({"max_retries": 2}, (TypeError, ValueError)),
        ({"nothing": 2}, (TypeError, ValueError)),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], error: Any, counter: Any, counter_class: Any) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        counter.options(**options)
    with pytest.raises(error, match=name):
        zray.remote(**options)(counter_class)


# -- names --------------------------------------------------------------------------------------------------------------


def test_a_named_actor_is_found_by_its_name(counter: Any) -> None:
    actor = counter.options(name="named").remote(5)
    found = zray.get_actor("named")
    assert found == actor
    assert hash(found) == hash(actor)
    assert zray.get(found.increase.remote()) == 6
    assert zray.get(zray.remote(lambda: zray.get(zray.get_actor("named").increase.remote())).remote()) == 7
    assert zray.get(actor.read.remote()) == 7


def test_an_unknown_name_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"Failed to look up actor.*nobody"):
        zray.get_actor("nobody")
    with pytest.raises(ValueError, match="name"):
        zray.get_actor("")


def test_a_name_is_taken_until_its_actor_ends(counter: Any) -> None:
    actor = counter.options(name="only").remote(1)
    with pytest.raises(ValueError, match="only"):
        counter.options(name="only").remote(2)
    assert zray.get(zray.get_actor("only").read.remote()) == 1
    pid = zray.get(actor.pid.remote())
    zray.kill(actor)
    ended(pid)

    def free() -> bool:
        try:
            zray.get_actor("only")
        except ValueError:
            return True
        return False

    wait_for(free, what="the name is free")
    again = counter.options(name="only").remote(3)
    assert zray.get(zray.get_actor("only").read.remote()) == 3
    del again


def test_get_if_exists_makes_one_actor(counter: Any) -> None:
    shared = counter.options(name="shared", get_if_exists=True)

    @zray.remote(num_cpus=0.5)
    def join(_: int) -> Any:
        actor = shared.remote()
        return actor, zray.get(actor.increase.remote()), zray.get(actor.pid.remote())

    first = shared.remote()
    rows = zray.get([join.remote(i) for i in range(6)])
    assert all(row[0] == first for row in rows)
    assert sorted(row[1] for row in rows) == [1, 2, 3, 4, 5, 6]
    assert len({row[2] for row in rows}) == 1
    with pytest.raises(ValueError, match="name"):
        counter.options(get_if_exists=True).remote()


def test_namespaces_keep_names_apart(counter: Any) -> None:
    here = counter.options(name="twin").remote(1)
    there = counter.options(name="twin", namespace="elsewhere").remote(2)
    assert zray.get(zray.get_actor("twin").read.remote()) == 1
    assert zray.get(zray.get_actor("twin", namespace="elsewhere").read.remote()) == 2
    with pytest.raises(ValueError):
        zray.get_actor("twin", namespace="nowhere")
    del here, there


def test_a_detached_actor_needs_no_handle(counter: Any) -> None:
    actor = counter.options(name="detached", lifetime="detached").remote(1)
    pid = zray.get(actor.pid.remote())
    del actor
    gc.collect()
    zray.get([zray.remote(lambda x: x).remote(i) for i in range(100)])  # some rounds of the broker
    assert zray.get(zray.get_actor("detached").increase.remote()) == 2
    assert alive(pid)
    zray.kill(zray.get_actor("detached"))
    ended(pid)
    wait_for(lambda: not [name for _, name in query("named_actors") if name == "detached"], what="the name is free")


def test_a_named_actor_ends_with_its_last_handle(counter: Any) -> None:
    actor = counter.options(name="mortal").remote()
    pid = zray.get(actor.pid.remote())
    del actor
    gc.collect()
    ended(pid)
    with pytest.raises(ValueError):
        zray.get_actor("mortal")


# -- handles and ends ---------------------------------------------------------------------------------------------------


def test_handles_travel_everywhere(counter: Any) -> None:
    actor = counter.remote()

    @zray.remote
    def use(handle: Any, box: list[Any]) -> Any:
        zray.get([handle.increase.remote(), box[0].increase.remote()])
        return handle

    class Holder:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def use(self) -> int:
            return int(zray.get(self.handle.increase.remote()))

        def give(self) -> Any:
            return self.handle

    def increaser(handle: Any) -> Any:
        return zray.remote(lambda: zray.get(handle.increase.remote()))

    back = zray.get(use.remote(actor, [actor]))
    assert back == actor
    holder = zray.remote(Holder).remote(actor)
    assert zray.get(holder.use.remote()) == 3
    assert zray.get(zray.get(holder.give.remote()).increase.remote()) == 4
    assert zray.get(increaser(actor).remote()) == 5
    pid = zray.get(actor.pid.remote())
    del back, actor
    gc.collect()
    assert zray.get(holder.use.remote()) == 6
    del holder, use
    gc.collect()
    ended(pid)


def test_the_process_ends_with_the_last_handle(counter: Any) -> None:
    actor = counter.remote()
    same = actor
    pid = zray.get(actor.pid.remote())
    del actor
    gc.collect()
    assert zray.get(same.pid.remote()) == pid
    del same
    gc.collect()
    ended(pid)


def test_calls_already_made_run_although_the_handle_is_gone(counter: Any, tally: Tally) -> None:
    class Writer:
        def write(self, i: int) -> int:
            tally.add(i)
            return i

    refs = [zray.remote(Writer).remote().write.remote(1)]
    actor = zray.remote(Writer).remote()
    zray.get(actor.write.remote(0))
    refs += [actor.write.remote(i) for i in range(50)]
    del actor
    gc.collect()
    assert zray.get(refs) == [1, *range(50)]
    assert len(tally) == 52


def test_handles_dropped_before_the_broker_has_heard_of_the_actor(counter: Any) -> None:
    @zray.remote
    def burst() -> list[Any]:
        for i in range(50):
            counter.remote(i)
        return [counter.remote(5).increase.remote() for _ in range(5)]

    assert zray.get(zray.get(burst.remote())) == [6] * 5
    assert zray.get([counter.remote(i).increase.remote() for i in range(20)]) == list(range(1, 21))
    wait_for(lambda: len(worker_pids()) <= 5, what="no actor lives on")


def test_a_detached_actor_needs_no_handle_from_the_start(counter: Any) -> None:
    for i in range(10):
        counter.options(name=f"handleless-{i}", lifetime="detached").remote(i)
    for i in range(10):
        actor = zray.get_actor(f"handleless-{i}")
        assert zray.get(actor.increase.remote()) == i + 1
        zray.kill(actor)


@pytest.mark.slow
def test_short_lived_actors_leave_nothing_behind(counter: Any) -> None:
    for i in range(150):
        actor = counter.remote(i)
        assert zray.get(actor.increase.remote()) == i + 1
        del actor
    wait_for(lambda: len(worker_pids()) <= 5)
    session = zray.api.current_session()
    assert len(session.peers) <= 40, "connections to actors that are gone"
    assert len(query("objects")) <= 100, "addresses of actors that are gone"
    logs = os.path.join(session.config.directory, "logs")
    wait_for(lambda: len(os.listdir(logs)) <= 3 * 110, what="only the latest logs are kept")


def test_the_limit_of_pending_calls_holds_before_the_actor_lives(gate: Callable[[str], Gate]) -> None:
    born = gate("born")

    class Late:
        def __init__(self) -> None:
            born.wait()

        def work(self) -> int:
            return 1

    actor = zray.remote(Late).options(max_pending_calls=3).remote()
    refs = [actor.work.remote() for _ in range(3)]
    with pytest.raises(exceptions.PendingCallsLimitExceeded):
        actor.work.remote()
    born.open()
    assert zray.get(refs) == [1, 1, 1]
    assert zray.get(actor.work.remote()) == 1


def test_an_actor_class_that_names_itself(program: Callable[..., Program]) -> None:
    running = program(
        """
import asyncio
zray.init(num_cpus=1)
@zray.remote(num_cpus=0)
class Node:
    def __init__(self, depth=0):
        self.child = Node.remote(depth - 1) if depth else None
    def depth(self):
        return 1 + zray.get(self.child.depth.remote()) if self.child else 0
@zray.remote(num_cpus=0)
class Later:
    async def again(self):
        return Later.remote()
@zray.remote(num_cpus=0)
def down(n, step=1, *, least=0):
    return 1 + zray.get(down.remote(n - step)) if n > least else 0
print("depths", zray.get(Node.remote(3).depth.remote()), zray.get(down.remote(3)))
print("later", type(zray.get(zray.get(Later.remote().again.remote()).again.remote())).__name__)
"""
    )
    assert running.wait_line("depths ") == "3 3"
    assert running.wait_line("later ") == "ActorHandle"
    running.succeed()


def test_exit_actor_ends_it_on_purpose(counter: Any) -> None:
    actor = counter.options(max_restarts=-1).remote()
    pid = zray.get(actor.pid.remote())
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor") as raised:
        zray.get(actor.end.remote())
    assert str(raised.value.cause) == "EXIT_ACTOR"
    ended(pid)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(actor.read.remote())


def test_kill_ends_it_at_once(counter: Any, gate: Callable[[str], Gate]) -> None:
    actor = counter.remote()
    pid = zray.get(actor.pid.remote())
    running = actor.wait.remote(gate("never"))
    queued = actor.read.remote()
    zray.kill(actor)
    for ref in (running, queued, actor.read.remote()):
        with pytest.raises(exceptions.ActorDiedError, match=r"zray\.kill") as raised:
            zray.get(ref, timeout=20)
        assert str(raised.value.cause) == "KILLED"
    ended(pid)
    with pytest.raises(ValueError, match="handle"):
        zray.kill(running)


def test_kill_before_it_lives(counter: Any) -> None:
    actor = counter.remote()
    zray.kill(actor)
    with pytest.raises(exceptions.ActorDiedError, match=r"zray\.kill"):
        zray.get(actor.read.remote(), timeout=20)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_error_of_the_constructor(moment: str) -> None:
    class Broken:
        def __init__(self) -> None:
            raise LookupError("no parts")

        def work(self) -> None:
            return None

    actor = zray.remote(Broken).remote()
    if moment == "after":
        with pytest.raises(exceptions.ActorDiedError):
            zray.get(actor.__ray_ready__.remote())
    with pytest.raises(
        exceptions.ActorDiedError, match=r"(?s)an error raised in its creation task.*no parts"
    ) as raised:
        zray.get(actor.work.remote())
    assert raised.value.actor_init_failed
    assert "Broken" in str(raised.value)
    assert "test_actors" in str(raised.value)


def test_a_constructor_that_gets_an_error_as_argument(counter: Any) -> None:
    @zray.remote
    def fail() -> int:
        raise ZeroDivisionError("no start")

    actor = counter.remote(fail.remote())
    with pytest.raises(exceptions.ActorDiedError, match="no start"):
        zray.get(actor.read.remote())


def test_calls_wait_for_a_slow_constructor(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    class Slow:
        def __init__(self) -> None:
            hold.wait()
            self.value = 0

        def increase(self) -> int:
            self.value += 1
            return self.value

    actor = zray.remote(Slow).remote()
    refs = [actor.increase.remote() for _ in range(20)]
    assert zray.wait(refs, timeout=0.1)[0] == []
    hold.open()
    refs += [actor.increase.remote() for _ in range(20)]
    assert zray.get(refs) == list(range(1, 41))


def test_an_actor_made_by_a_task_lives_on_with_its_handle(counter: Any) -> None:
    @zray.remote
    def make() -> Any:
        actor = counter.remote(10)
        assert zray.get(actor.increase.remote()) == 11  # waited for: calls of different callers have no order
        return actor

    actor = zray.get(make.remote())
    assert zray.get(actor.increase.remote()) == 12


def test_actors_that_call_one_another(counter: Any) -> None:
    class Node:
        def __init__(self, following: Any = None) -> None:
            self.following = following

        def total(self, n: int) -> int:
            return n if self.following is None else int(zray.get(self.following.total.remote(n + 1)))

    node = zray.remote(num_cpus=0)(Node)
    last: Any = None
    for _ in range(8):
        last = node.remote(last)
    assert zray.get(last.total.remote(0)) == 7


def test_what_every_actor_understands(counter: Any) -> None:
    actor = counter.remote(3)
    assert zray.get(actor.__ray_ready__.remote())
    assert zray.get(actor.__ray_call__.remote(lambda self, x: self.value + x, 4)) == 7
    pid = zray.get(actor.pid.remote())
    actor.__ray_terminate__.remote()
    ended(pid)


def test_an_actor_knows_itself(counter: Any) -> None:
    class Curious:
        def look(self) -> Any:
            context = zray.get_runtime_context()
            return (
                context.get_actor_id(),
                context.get_actor_name(),
                context.was_current_actor_reconstructed,
                context.current_actor,
                context.get_task_id(),
            )

        def value(self) -> int:
            return 5

    actor = zray.remote(Curious).options(name="curious").remote()
    ref = actor.look.remote()
    identity, name, again, handle, task = zray.get(ref)
    assert identity == actor._actor_id.hex()
    assert name == "curious"
    assert again is False
    assert handle == actor
    assert zray.get(handle.value.remote()) == 5
    assert task == ref.task_id().hex()


def test_max_pending_calls(counter: Any, gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    actor = counter.options(max_pending_calls=3).remote()
    zray.get(actor.read.remote())
    refs = [actor.wait.remote(hold), actor.read.remote(), actor.read.remote()]
    with pytest.raises(exceptions.PendingCallsLimitExceeded, match="3"):
        actor.read.remote()
    hold.open()
    assert zray.get(refs) == [None, 0, 0]
    assert zray.get(actor.read.remote()) == 0


def test_twenty_actors_made_called_and_killed(counter: Any) -> None:
    made = counter.options(num_cpus=0)
    actors = [made.remote(i) for i in range(20)]
    assert zray.get([actor.increase.remote() for actor in actors]) == list(range(1, 21))
    pids = zray.get([actor.pid.remote() for actor in actors])
    assert len(set(pids)) == 20
    for actor in actors:
        zray.kill(actor)
    wait_for(lambda: not [pid for pid in pids if alive(pid)], what="all have ended")
    wait_for(lambda: not worker_pids() & set(pids))


def test_an_actor_that_no_node_can_hold_is_refused_within_a_second(counter: Any) -> None:
    start = time.monotonic()
    actor = counter.options(num_cpus=1000).remote()
    with pytest.raises(exceptions.ActorUnschedulableError, match="1000"):
        zray.get(actor.read.remote(), timeout=20)
    assert time.monotonic() - start < SLACK


def test_a_stopped_actor_goes_on_when_it_is_continued(counter: Any) -> None:
    actor = counter.remote()
    pid = zray.get(actor.pid.remote())
    stop(pid)
    refs = [actor.increase.remote() for _ in range(10)]
    assert zray.wait(refs, timeout=0.3)[0] == []
    assert state_of(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    assert zray.get(refs, timeout=30) == list(range(1, 11))


def test_a_class_by_name_with_arguments_for_each_incarnation(counter_class: Any) -> None:
    actor = zray.remote(num_cpus=0, max_restarts=2)(counter_class).remote(4)
    assert zray.get(actor.increase.remote()) == 5
    assert "Counter" in repr(actor)
    assert "increase" in dir(actor)


def test_ten_thousand_calls_in_flight(counter: Any) -> None:
    actor = counter.remote()
    assert zray.get([actor.increase.remote() for _ in range(10_000)]) == list(range(1, 10_001))


def test_many_callers_of_one_actor(counter: Any) -> None:
    actor = counter.remote()

    @zray.remote
    def call(actor: Any, times: int) -> list[int]:
        return [zray.get(actor.increase.remote()) for _ in range(times)]

    rows = zray.get([call.remote(actor, 100) for _ in range(4)])
    assert sorted(value for row in rows for value in row) == list(range(1, 401))
    assert all(row == sorted(row) for row in rows)


def test_killed_actors_leave_nothing_behind() -> None:
    @zray.remote(num_cpus=0)
    class Short:
        def value(self) -> int:
            return 1

    before = query("statistics")["entries"]
    for _ in range(15):
        actors = [Short.remote() for _ in range(10)]
        assert zray.get([actor.value.remote() for actor in actors]) == [1] * 10
        for actor in actors:
            zray.kill(actor)
        del actors, actor
    # This process looks for connections that are of no more use when it makes new ones: some are always left.
    wait_for(lambda: query("statistics")["entries"] < before + 75, what="the entries of killed actors have gone")


def test_a_handle_that_comes_back_goes_on_with_the_numbers_of_its_process() -> None:
    @zray.remote(num_cpus=0)
    class Slow:
        def __init__(self) -> None:
            self.calls = 0
            time.sleep(0.05)

        def count(self) -> int:
            self.calls += 1
            return self.calls

    # Connections of no more use are looked for when there are many, at a moment when the newest actor does not live yet.
    for index in range(40):
        actor = Slow.options(name=f"slow {index}").remote()
        first = actor.count.remote()
        del actor
        again = zray.get_actor(f"slow {index}")
        assert zray.get([first, again.count.remote()], timeout=30) == [1, 2]
        del first, again


def test_connections_of_actors_that_are_gone_are_closed() -> None:
    from zray import api

    @zray.remote(num_cpus=0)
    class Short:
        def value(self) -> int:
            return 1

    for _ in range(60):
        actor = Short.remote()
        assert [zray.get(actor.value.remote()) for _ in range(2)] == [1, 1]  # the second goes straight to the actor
        del actor
    assert len(api.current_session().peers) < 40


def test_get_if_exists_just_after_the_last_handle_went() -> None:
    @zray.remote(num_cpus=0)
    class Named:
        def value(self) -> int:
            return 1

    for _ in range(150):
        actor = Named.options(name="again", get_if_exists=True).remote()
        assert zray.get(actor.value.remote(), timeout=30) == 1
        del actor
