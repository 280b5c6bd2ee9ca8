"""Tasks whose arguments are on other nodes, or lost: what they wait for, and where."""

from __future__ import annotations

from tests.unit.bench import Bench, make_shape, peer_id
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.locations import Locations
from zray.broker.scheduler import SchedulerConfig
from zray.task import JobSpec, TaskSpec

SMALL = 1000
"""Bytes of inputs that say nothing about where a task should run."""
X, Y, Z = (name * 16 for name in (b"x", b"y", b"z"))
F = make_shape("f")


class World:
    """A machine of two CPUs and the book that it reads."""

    def __init__(self, peers: int = 0) -> None:
        self.book = Locations(peer_id(0))
        self.bench = Bench(SchedulerConfig(debug=True, cluster_may_grow=True), locations=self.book)
        self.bench.start_all()
        self.bench.define(F)
        for number in range(1, peers + 1):
            self.bench.see_peer(number, CPU=2)

    def submit(self, *deps: bytes, missing: tuple[bytes, ...] = (), job: int = 1) -> TaskSpec:
        [spec] = self.bench.specs(1, F, deps=deps)
        self.bench.tell(e.TasksSubmitted(job, 1001, b"p" * 16, [spec], [missing]))
        return spec

    def arrive(self, name: bytes) -> None:
        """A copy is here."""
        if name in self.book:
            self.book.made_at(name, peer_id(0), self.book.size(name), self.book.attempt(name))
        self.book.found(name)
        self.bench.tell(e.ObjectsReady([name]))

    def begun(self) -> list[TaskSpec]:
        return [spec for action in self.bench.all if isinstance(action, (a.RunOn, a.RunAt)) for spec in action.tasks]

    def fetched(self) -> list[bytes]:
        return [name for action in self.bench.of(a.FetchObjects) for name in action.ids]


def test_arguments_are_fetched_when_a_task_is_placed_here() -> None:
    world = World()
    world.book.made_at(X, peer_id(1), SMALL)
    world.book.made_at(Y, peer_id(1), SMALL)
    spec = world.submit(X, Y, Z)
    assert world.fetched() == [X, Y]
    assert world.begun() == []
    world.arrive(X)
    assert world.begun() == []
    world.arrive(Y)
    assert world.begun() == [spec]
    assert world.fetched() == [X, Y]


def test_a_task_that_is_placed_elsewhere_has_nothing_fetched_here() -> None:
    world = World(peers=1)
    busy = [world.submit(), world.submit()]
    world.book.made_at(X, peer_id(1), SMALL)
    spec = world.submit(X)
    assert world.begun() == [*busy, spec]
    assert world.fetched() == []


def test_so_many_fetch_as_keep_the_cpus_busy() -> None:
    world = World()
    names = [bytes([number]) * 16 for number in range(20)]
    for name in names:
        world.book.made_at(name, peer_id(1), SMALL)
    specs = [world.submit(name) for name in names]
    assert world.fetched() == names[:4]
    for index, name in enumerate(names):
        world.arrive(name)
        for worker in [worker for worker, handed in world.bench.handed.items() if handed]:
            world.bench.finish(worker)
        assert len(world.fetched()) == min(20, index + 5)
    assert sorted(spec.id for spec in world.begun()) == sorted(spec.id for spec in specs)


def test_a_task_waits_until_its_argument_exists_somewhere() -> None:
    world = World(peers=1)
    for _ in range(2):
        world.submit()
    spec = world.submit(X, missing=(X,))
    assert spec not in world.begun()
    world.book.made_at(X, peer_id(1), SMALL)
    world.bench.tell(e.ObjectsMade([X]))
    assert spec in world.begun(), "it runs where there is room, without a copy here"


def test_what_another_node_sent_waits_until_its_argument_is_here() -> None:
    world = World()
    world.bench.tell(e.JobStarted(JobSpec(1 << 31, b"j" * 16, 1, "", [], "/"), 0, guest=True))
    world.bench.start_all()
    world.book.made_at(X, peer_id(1), SMALL)
    spec = world.submit(X, missing=(X,), job=1 << 31)
    world.bench.tell(e.ObjectsMade([X]))
    assert spec not in world.begun()
    world.arrive(X)
    world.bench.start_all()
    assert spec in world.begun()


def test_who_needs_a_lost_argument_waits_wherever_it_would_run() -> None:
    world = World(peers=1)
    for _ in range(2):
        world.submit()
    world.book.made_at(X, peer_id(2), SMALL)
    world.book.lose(X)
    spec = world.submit(X)
    assert spec not in world.begun(), "it would only fill a place on the other node"
    world.book.made_at(X, peer_id(1), SMALL, attempt=1)
    world.bench.tell(e.ObjectsMade([X]))
    assert spec in world.begun()


def test_who_waits_elsewhere_for_a_lost_argument_gives_its_place_to_the_task_that_makes_it_again() -> None:
    world = World()
    bench = world.bench
    bench.see_peer(1, lane=1)
    lane = make_shape("lane", lane=1)
    bench.define(lane)
    world.book.made_at(X, peer_id(2), SMALL)
    [waits, makes] = [*bench.specs(1, lane, deps=(X,)), *bench.specs(1, lane)]
    bench.tell(e.TasksSubmitted(1, 1001, b"p" * 16, [waits], None))
    assert world.begun() == [waits]
    world.book.lose(X)
    bench.tell(e.TasksSubmitted(1, 1001, b"p" * 16, [makes], None))
    assert world.begun() == [waits], "the only place is taken"
    bench.tell(e.ObjectsLost([X]))
    assert world.begun() == [waits, makes]
    first, second = bench.of(a.RunAt)
    bench.finish(second.slot)
    bench.finish(first.slot)
    assert bench.machine.node.peers[peer_id(1)].available == bench.machine.node.peers[peer_id(1)].total


def test_an_argument_that_was_lost_may_turn_out_to_be_an_error() -> None:
    world = World()
    world.book.made_at(X, peer_id(2), SMALL)
    world.book.lose(X)
    spec = world.submit(X)
    assert spec not in world.begun()
    world.arrive(X)
    assert spec in world.begun()


def test_a_task_that_fetches_can_be_cancelled() -> None:
    world = World()
    world.book.made_at(X, peer_id(1), SMALL)
    spec = world.submit(X)
    world.bench.tell(e.TaskCancel(spec.id, False, True, 0, False))
    assert world.bench.errors() == {spec.id: "TaskCancelledError"}
    world.arrive(X)
    assert spec not in world.begun()
    assert world.bench.machine.node.dependencies.fetching == 0
