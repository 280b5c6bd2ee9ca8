"""Rare moments of simulated clusters, brought about on purpose: what is lost while something else is on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

from tests.simulation.cluster_machine import Doors, Machine
from tests.simulation.cluster_processes import Driver, Plan, Worker, value_of
from tests.simulation.cluster_scenario import Play, Scenario, shape
from tests.simulation.cluster_store import SimStore
from tests.simulation.world import Get
from zray import ids, wire
from zray._store import STATE_PENDING, STATE_SEALED, with_index
from zray.broker import peer_messages as pm
from zray.broker.actions import HostActor
from zray.ids import task_id
from zray.task import ACTOR_CREATION, ACTOR_METHOD, TASK, ActorSpec, TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.simulation.cluster_processes import Process
    from tests.simulation.world import Program

WHEEL: Final = shape("wheel", TASK, {"wheels": 1}, 1)
ACTOR: Final = shape("actor", ACTOR_CREATION, {"hubs": 1}, 0)
METHOD: Final = shape("method", ACTOR_METHOD, {}, 0)
SPOKE: Final = shape("spoke", TASK, {"spokes": 1}, 1)
RIM: Final = shape("rim", TASK, {"rims": 1, "spokes": 1}, 1)
BUSY: Final = Plan(seconds=0.5, shape=WHEEL.key)
LARGE: Final = Plan(salt=7, size=3000, shape=WHEEL.key)
"""Its value stays where it was made until somebody wants it."""
MADE: Final = Plan(salt=9, size=3000, shape=SPOKE.key)
USED: Final = Plan(salt=10, shape=RIM.key)
CALL: Final = Plan(salt=8, shape=METHOD.key)
SOON: Final = 5.0
"""Simulated seconds in which all that is to happen has happened."""


class Run:
    """Two nodes, and a driver on the first. Each runs one task at a time; actors live on the second only."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.site, self.world = scenario.site, scenario.world
        self.site.shapes = {one.key: one for one in (WHEEL, SPOKE, RIM, ACTOR, METHOD)}
        self.site.began = lambda worker, actor, incarnation: self.lives.append(worker)
        self.lives: list[Worker] = []
        """Processes that have become actors."""
        self.head = Machine(self.site, {"wheels": 1.0})
        self.head.start("")
        self.other = scenario.join({"wheels": 1.0, "hubs": 1.0})
        self.driver = Driver(self.head, task_id(bytes(16), 1))
        self.result = b""
        """What the driver waits for last."""
        self.value = b""

    def play(self, program: Callable[[Driver], Program]) -> None:
        """Have the driver admitted, and let it run a program."""

        def whole() -> Program:
            yield from Play(self.scenario, self.driver).hello()
            yield from program(self.driver)

        self.driver.run(whole())

    def get(self, result: bytes) -> Program:
        """Wait for a value."""
        self.result, self.value = result, b""
        yield Get([result])
        self.value = self.driver.store.entries[result].data

    def until(self, done: Callable[[], bool]) -> None:
        """Let the world go on until something has come about, which is to be soon."""
        end = self.world.now + SOON
        while not done():
            assert self.world.heap, "nothing happens any more"
            assert self.world.heap[0][0] <= end, self.scenario.checker.waiting()
            self.world.step()

    def is_on_its_way(self) -> bool:
        return self.head.transfer.pulling(self.result)


@pytest.fixture
def run() -> Iterator[Run]:
    scenario = Scenario(1)
    with Doors(scenario.site):
        yield Run(scenario)
    for machine in scenario.site.machines:
        machine.store.closed = True


def test_what_was_on_its_way_from_a_dead_node_is_made_again_here(run: Run) -> None:
    def program(driver: Driver) -> Program:
        plans = [BUSY, LARGE]
        results = driver.submit(driver.root, driver.next_child(len(plans)), plans, (), driver.root)
        yield from run.get(results[-1])

    run.play(program)
    run.until(run.is_on_its_way)
    run.other.die("it was killed")
    run.until(lambda: bool(run.value))
    assert run.value == value_of(LARGE, [])
    assert not run.is_on_its_way()


def test_calls_come_to_the_next_life_of_an_actor_whose_death_was_not_heard_of(run: Run) -> None:
    actor = task_id(run.driver.root, 1)
    once_more = False

    def program(driver: Driver) -> Program:
        creation = TaskSpec(actor, ACTOR.key, msgspec.msgpack.encode(Plan(shape=ACTOR.key)))
        spec = ActorSpec(creation, driver.job, max_restarts=1, max_task_retries=1)
        driver.held[actor] = driver.store.put_life(actor, b"")
        driver.store.expect(with_index(actor, 1), 0, [], None, "", 0, driver.handle)
        driver.define([ACTOR])
        driver.tell(wire.CreateActor(driver.handle, spec, b""))
        yield from run.get(driver.call_actor(actor, driver.root, 2, CALL, ()))
        while not once_more:
            yield 0.001
        yield from run.get(driver.call_actor(actor, driver.root, 3, CALL, ()))

    def process_ended(process: Process, status: int) -> None:
        """Its place in the store is given back long before its exit is reported."""
        run.other.store.living.discard(process.handle)
        run.other.store.sweep()
        run.world.at(0.1, run.other._tell_exit, process.pid, status)

    run.play(program)
    run.until(lambda: bool(run.value))
    run.other.process_ended = process_ended  # type: ignore[method-assign]
    run.lives[0].kill()
    run.value, once_more = b"", True
    run.until(lambda: bool(run.value))
    assert run.value == value_of(CALL, [])
    assert len(run.lives) == 2


def test_a_copy_that_was_given_up_while_it_was_lent_again_is_made_again(run: Run) -> None:
    """The head takes a node for the last that has a value, and says so to that node itself; which has the only place to make it again in, and that
    is held by the task that waits for it."""
    maker = run.scenario.join({"spokes": 1.0})
    step = 0

    def program(driver: Driver) -> Program:
        [made] = driver.submit(driver.root, driver.next_child(), [MADE], (), driver.root)
        while step < 1:
            yield 0.001
        for _ in range(2):
            [used] = driver.submit(driver.root, driver.next_child(), [USED], (made,), driver.root)
            yield from run.get(used)
            while step < 2:
                yield 0.001

    run.play(program)
    run.until(lambda: any(entry.state == STATE_SEALED for entry in maker.store.entries.values()))
    user = run.scenario.join({"spokes": 1.0, "rims": 1.0})
    step = 1
    run.until(lambda: bool(run.value))
    run.site.network.slow[user.id, run.head.id] = 0.5
    run.until(lambda: not user.store.entries)
    maker.die("it was killed")
    known = run.head.broker.cluster
    assert known is not None
    run.until(lambda: maker.id in known.neighbours.dead)
    run.value, step = b"", 2
    run.until(lambda: bool(run.value))
    assert run.value == value_of(USED, [value_of(MADE, [])])


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "every run of a task makes the same ids"])
def test_a_parent_that_runs_again_and_branches_differently(
    run: Run, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its repeat makes another child first (`with_children`), while the child of the first run is still running."""
    if planted:
        monkeypatch.setattr(ids, "origin_of", lambda task, attempt, fresh: task)
    parent = Plan("nested", 9, children=(BUSY,), shape=WHEEL.key)

    def program(driver: Driver) -> Program:
        [result] = driver.submit(driver.root, driver.next_child(1), [parent], (), driver.root)
        yield from run.get(result)

    def at_work() -> list[Worker]:
        return [
            process
            for machine in (run.head, run.other)
            for process in machine.workers.values()
            if isinstance(process, Worker) and process.current
        ]

    run.play(program)
    run.until(lambda: len(at_work()) == 2)
    first = task_id(run.driver.root, 1)
    [running] = [process for process in at_work() if process.current == first]
    running.kill()
    if planted:
        with pytest.raises(AssertionError, match="what another run made has its id"):
            run.until(lambda: bool(run.value))
    else:
        run.until(lambda: bool(run.value))
        assert run.value == value_of(parent, [value_of(BUSY, [])])


@pytest.mark.parametrize("planted", [False, True], ids=["as-it-is", "planted"])
def test_what_lay_behind_a_waiting_worker_and_was_sent_away_runs_once(
    run: Run, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker goes on while the other node still runs the task: its own copy comes late."""
    if planted:
        monkeypatch.setattr(SimStore, "send_away", lambda store, ref: ref.entry.state == STATE_PENDING)
    run.scenario.join({"spokes": 1.0})
    child = Plan(salt=1, seconds=0.1, shape=SPOKE.key)
    parent = Plan("nested", 2, children=(child,), shape=WHEEL.key)
    late = task_id(run.driver.root, 10)
    ran_on: list[Machine] = []
    monkeypatch.setattr(run.site, "executed", lambda machine, task, attempt: ran_on.extend([machine] * (task == late)))

    def program(driver: Driver) -> Program:
        for _ in range(8):  # a worker is given several of that kind at a time from now on
            quick = Plan(salt=3, seconds=0.0005, shape=WHEEL.key)
            [result] = driver.submit(driver.root, driver.next_child(1), [quick], (), driver.root)
            yield from run.get(result)
        results = driver.submit(driver.root, driver.next_child(2), [parent, BUSY], (), driver.root)
        for result in results:
            yield from run.get(result)

    run.play(program)
    run.until(lambda: run.result == with_index(late, 1) and bool(run.value))
    assert ran_on == ([run.other, run.head] if planted else [run.other])


def test_no_message_overtakes_what_tells_of_its_shapes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to one actor are packed, and wait for more, when another actor is sent to the same node together with such a call."""
    run.play(lambda driver: iter(()))
    run.until(lambda: bool(run.driver.job))
    run.driver.define([ACTOR, METHOD])
    run.until(lambda: METHOD.key in run.head.broker.shapes)
    broker = run.head.broker
    assert broker.cluster is not None
    assert broker.remote is not None
    assert broker.remote_actors is not None
    sent: list[Any] = []
    monkeypatch.setattr(broker.cluster.links, "send", lambda node, message, now: sent.append(message))
    one, other = (task_id(run.driver.root, number) for number in (1, 2))
    calls = [TaskSpec(task_id(run.driver.root, number), METHOD.key) for number in (3, 4)]
    broker.remote.call_at(run.other.id, run.driver.job, one, calls[:1])
    spec = ActorSpec(TaskSpec(other, ACTOR.key), run.driver.job)
    broker.remote_actors.host_at(HostActor(run.other.id, 7, spec, 0, calls[1:]))
    told: set[bytes] = set()
    for message in sent:
        told |= {one.key for one in message.shapes}
        assert told >= {
            call.shape for call in (message.calls if isinstance(message, pm.CallActorAway) else message.replay)
        }
    assert told == {ACTOR.key, METHOD.key}
    assert [type(message) for message in sent] == [pm.CallActorAway, pm.HostActor]


def test_shapes_that_come_with_tasks_of_a_job_that_is_over_are_learnt(run: Run) -> None:
    run.play(lambda driver: iter(()))
    run.until(lambda: bool(run.driver.job))
    head, remote = run.head.broker, run.other.broker.remote
    assert remote is not None
    job = head.job_specs[run.driver.job]
    remote.job_over(job.number, "it has ended")
    task = TaskSpec(task_id(run.driver.root, 1), SPOKE.key)
    remote.run(run.head.id, pm.RunTasks(job, run.head.id, 7, [SPOKE], [task], [], []))
    assert run.other.broker.shapes[SPOKE.key] == SPOKE
    assert not remote.guests
