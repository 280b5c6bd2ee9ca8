"""zray.broker.task_table: where each task is, copies, queues, and how long tasks take."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest

from tests.unit.bench import make_shape
from zray.broker.jobs import Job, JobTable
from zray.broker.ledger import Ledger
from zray.broker.settings import SchedulerConfig
from zray.broker.task_table import ShapeState, Shared, TaskQueue, TaskTable
from zray.broker.worker_pool import Worker
from zray.task import JobSpec, TaskSpec

F = make_shape("f")


class Place:
    """A table with one job, one shape and two workers."""

    def __init__(self) -> None:
        jobs = JobTable()
        self.job = jobs.jobs[1] = Job(JobSpec(1, b"j" * 16, 1, "", [], ""), 1)
        self.table = TaskTable(jobs)
        ledger = Ledger({"CPU": 2})
        self.shape = self.table.shapes[F.key] = ShapeState(F, ledger.demand(F.resources))
        self.queue = self.table.queue_for(self.job, self.shape)
        self.one, self.two = Worker(1, self.job, (1, ())), Worker(2, self.job, (1, ()))
        self.made = 0

    def specs(self, count: int) -> list[TaskSpec]:
        found = []
        for _ in range(count):
            self.made += 1
            found.append(TaskSpec(self.made.to_bytes(12, "little") + bytes(4), bytes(F.key)))
        return found

    def submit(self, count: int) -> list[TaskSpec]:
        found = self.specs(count)
        assert self.table.submit(self.job, found, True) == []
        return found

    def take(self, count: int, worker: Worker) -> list[TaskSpec]:
        found = self.table.take(self.queue, count, worker)
        worker.handed.extend(found)
        return found

    def check(self) -> None:
        for worker in (self.one, self.two):
            worker.queue = None
        self.table.validate([self.job], [self.one, self.two], {})


def test_submit_take_end() -> None:
    place = Place()
    specs = place.submit(5)
    place.check()
    assert place.take(2, place.one) == specs[:2]
    place.check()
    place.one.handed.clear()
    assert [place.table.end(spec.id, place.one) for spec in specs[:2]] == [True, True]
    assert place.table.end(specs[0].id, place.one) is False
    place.check()
    assert place.table.queued == 3


def test_all_queued_specs_share_one_key() -> None:
    place = Place()
    specs = place.submit(3)
    assert all(spec.shape is place.shape.key for spec in specs)


def test_a_dropped_task_is_skipped_and_may_come_back() -> None:
    place = Place()
    specs = place.submit(4)
    place.table.end(specs[1].id, None)
    place.check()
    place.table.requeue(place.queue, specs[1])
    place.check()
    assert place.take(9, place.one) == [specs[1], specs[0], specs[2], specs[3]]
    place.check()


def test_a_queue_of_dropped_tasks_shrinks() -> None:
    place = Place()
    specs = place.submit(500)
    for spec in specs[:400]:
        place.table.end(spec.id, None)
    place.check()
    assert len(place.queue.specs) < 250
    assert place.take(1, place.one) == [specs[400]]


def test_offered_tasks_are_in_two_places_until_one_of_them_ends() -> None:
    place = Place()
    specs = place.submit(3)
    place.take(3, place.one)
    place.one.blocked = True
    place.table.offer(place.one, specs[1:])
    place.check()
    assert isinstance(place.table.home[specs[1].id], Shared)
    assert place.take(1, place.two) == [specs[1]]
    place.check()
    assert place.table.holders(specs[1].id) == [place.one, place.two]
    place.two.handed.clear()
    place.table.end(specs[1].id, place.two)
    assert place.one.ghosts == 1
    place.check()


def test_nothing_is_offered_of_which_somebody_who_goes_on_has_a_copy() -> None:
    place = Place()
    specs = place.submit(2)
    place.take(2, place.one)
    place.table.share(specs[1], place.two)
    place.two.handed.append(specs[1])
    place.one.blocked = True
    place.table.offer(place.one, specs[1:])
    assert place.table.queued == 0
    place.two.blocked = True
    place.table.offer(place.two, specs[1:])
    assert place.table.queued == 1
    place.check()


def test_a_worker_takes_back_its_own_copy_without_being_sent_it() -> None:
    place = Place()
    specs = place.submit(2)
    place.take(2, place.one)
    place.one.blocked = True
    place.table.offer(place.one, specs[1:])
    assert place.table.take(place.queue, 1, place.one) == []
    assert place.table.home[specs[1].id] is place.one
    place.check()


def test_the_last_copy_decides() -> None:
    place = Place()
    spec = place.submit(1)[0]
    place.take(1, place.one)
    place.table.share(spec, place.two)
    place.two.handed.append(spec)
    place.check()
    assert place.table.withdraw(place.one, spec.id) is True
    place.one.handed.clear()
    place.check()
    assert place.table.withdraw(place.two, spec.id) is False


def test_superseded_copies_are_ghosts() -> None:
    place = Place()
    spec = place.submit(1)[0]
    place.take(1, place.one)
    place.table.share(spec, place.two)
    place.two.handed.append(spec)
    place.table.end(spec.id, None)
    place.table.requeue(place.queue, spec)
    assert (place.one.ghosts, place.two.ghosts) == (1, 1)
    assert not place.table.counts(place.one, spec.id)
    place.check()


def test_what_no_node_can_run_is_refused_or_parked() -> None:
    place = Place()
    wide = make_shape("wide", CPU=99)
    ledger = Ledger({"CPU": 2})
    place.table.shapes[wide.key] = ShapeState(wide, ledger.demand(wide.resources))
    specs = [TaskSpec(bytes([i]) * 12 + bytes(4), wide.key) for i in range(3)]
    assert place.table.submit(place.job, specs, True) == specs
    assert place.table.submit(place.job, specs, False) == []
    assert place.table.queued == 0
    assert [queue.count for queue in place.table.newly_parked] == [3]
    place.check()


def test_unknown_shapes_are_handed_back() -> None:
    place = Place()
    known, unknown = place.specs(2), TaskSpec(b"u" * 16, b"unknown.........")
    assert place.table.submit(place.job, [known[0], unknown, known[1]], True) == [unknown]
    assert place.table.queued == 2
    place.check()


@pytest.mark.parametrize(
    ("micros", "seen", "depth"),
    [(0.0, 0, 1), (9.0, 1, 4), (9.0, 1000, 201), (1999.0, 100, 2), (5000.0, 100, 1), (0.0, 1000, 256)],
)
def test_depth_of_the_prefetch(micros: float, seen: int, depth: int) -> None:
    shape = Place().shape
    if seen:
        shape.observe(micros * seen, seen)
    assert shape.depth(SchedulerConfig()) == depth


def test_the_average_rises_fast_and_falls_slowly() -> None:
    shape = Place().shape
    shape.observe(100.0, 10)
    assert shape.average == 10.0
    shape.observe(1000.0, 1)
    assert shape.average == 505.0
    shape.observe(5.0, 1)
    assert 450 < shape.average < 505


def test_books_that_do_not_agree_are_found() -> None:
    place = Place()
    specs = place.submit(3)
    del place.table.home[specs[1].id]
    with pytest.raises(AssertionError, match="queued"):
        place.check()


def test_a_queued_task_costs_little() -> None:
    """Spec as decoded from a frame (id, key, 20 bytes of arguments), its entry in the table and its place in a queue:
    at most 350 bytes."""
    place = Place()
    count = 30_000
    bodies = [
        msgspec.msgpack.encode(
            [TaskSpec((block * 100 + i).to_bytes(16, "little"), F.key, b"x" * 20) for i in range(100)]
        )
        for block in range(count // 100)
    ]
    decode = msgspec.msgpack.Decoder(list[TaskSpec]).decode
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for body in bodies:
            place.table.submit(place.job, decode(body), True)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert place.table.queued == count
    assert used / count < 350


def test_queues_of_one_demand_take_turns() -> None:
    place = Place()
    g = make_shape("g")
    place.table.shapes[g.key] = ShapeState(g, place.shape.demand)
    place.submit(1)
    place.table.submit(place.job, [TaskSpec(b"g" * 16, g.key)], True)
    group = place.queue.group
    assert [queue.shape.name for queue in group.queues] == ["f", "g"]
    place.take(1, place.one)
    first = group.first()
    assert isinstance(first, TaskQueue)
    assert first.shape.name == "g"
    assert group.count == 1


def test_what_was_refused_stays_begun_until_a_holder_is_gone() -> None:
    place = Place()
    [spec] = place.submit(1)
    place.take(1, place.one)
    for _ in range(2):
        place.table.share(spec, place.two)
        place.two.handed.append(spec)
        assert place.table.withdraw(place.two, spec.id)
        place.two.handed.clear()
        place.table.refused(spec)
        place.check()
        home = place.table.home[spec.id]
        assert type(home) is Shared
        assert home.begun
        assert home.workers == [place.one]
    assert not place.table.withdraw(place.one, spec.id)
    place.one.handed.clear()
    place.table.requeue(place.queue, spec)
    assert place.table.home[spec.id] is place.queue
    place.check()
