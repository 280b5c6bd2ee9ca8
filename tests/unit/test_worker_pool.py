"""zray.broker.worker_pool: moves, books, choosing workers, environments, pauses."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.bench import make_shape
from zray import resources
from zray.broker.jobs import Job
from zray.broker.ledger import Demand, Ledger
from zray.broker.settings import SchedulerConfig
from zray.broker.worker_pool import (
    BUSY,
    DEAD,
    DYING,
    IDLE,
    MOVES,
    STARTING,
    STATE_NAMES,
    STOPPING,
    IllegalMove,
    Worker,
    WorkerPool,
)
from zray.task import JobSpec

PLAIN = (1, ())


def pool(**settings: object) -> WorkerPool:
    return WorkerPool(SchedulerConfig(**settings), ())  # type: ignore[arg-type]


def job(number: int = 1, **environment: str) -> Job:
    return Job(JobSpec(number, b"j" * 16, 1, "", [], "", environment=environment), 1)


def idle(where: WorkerPool, owner: Job, kind: tuple[int, tuple[int, ...]] = PLAIN, since: float = 0.0) -> Worker:
    worker = where.new_worker(owner, kind)
    worker.idle_since = since
    where.move(worker, IDLE)
    return worker


def demand(ledger: Ledger, **amounts: float) -> Demand:
    return ledger.demand(resources.pack(resources.parse(amounts)))


@pytest.mark.parametrize(("old", "new"), list(itertools.product(range(len(STATE_NAMES)), repeat=2)))
def test_only_moves_of_the_table_are_made(old: int, new: int) -> None:
    where = pool()
    worker = where.new_worker(job(), PLAIN)
    if old != STARTING:
        where.move(worker, IDLE)
        if old != IDLE:
            where.move(worker, BUSY)
            where.busy.pop(worker.number)
            worker.state = old
            if old == BUSY:
                where.busy[worker.number] = worker
    if (old, new) in MOVES:
        where.move(worker, new)
        assert worker.state == new
        assert (worker.number in where.workers) == (new != DEAD)
    else:
        with pytest.raises(IllegalMove, match=STATE_NAMES[new]):
            where.move(worker, new)


def test_a_dead_worker_is_dead() -> None:
    assert not [move for move in MOVES if move[0] == DEAD]
    assert {new for old, new in MOVES if old == DYING} == {DEAD}
    assert {new for old, new in MOVES if old == STOPPING} == {DYING, DEAD}


def test_the_worker_that_worked_last_is_taken_first() -> None:
    where, ledger, owner = pool(), Ledger({"CPU": 4}), job()
    first, second = idle(where, owner), idle(where, owner)
    assert where.idle_for(owner, demand(ledger, CPU=1), ledger) is second
    where.move(first, BUSY)
    where.move(first, IDLE)
    assert where.idle_for(owner, demand(ledger, CPU=1), ledger) is first


def test_workers_belong_to_jobs_and_kinds() -> None:
    where, ledger, one, other = pool(), Ledger({"CPU": 4, "GPU": 2}), job(1), job(2)
    plain = idle(where, one)
    wide = idle(where, one, (3, ()))
    gpu = idle(where, one, (1, (1,)))
    assert where.idle_for(other, demand(ledger, CPU=1), ledger) is None
    assert where.idle_for(one, demand(ledger, CPU=1), ledger) is plain
    assert where.idle_for(one, demand(ledger, CPU=3.5), ledger) is wide
    assert where.idle_for(one, demand(ledger, CPU=1, GPU=1), ledger) is gpu
    assert where.idle_for(one, demand(ledger, CPU=1, GPU=2), ledger) is None
    ledger.take(demand(ledger, GPU=0.5), (1,))
    assert where.idle_for(one, demand(ledger, CPU=1, GPU=1), ledger) is None
    assert where.idle_for(one, demand(ledger, CPU=1, GPU=0.5), ledger) is gpu


def test_only_a_worker_without_a_past_becomes_an_actor() -> None:
    where, ledger, owner = pool(), Ledger({"CPU": 4}), job()
    used, fresh = idle(where, owner), idle(where, owner)
    used.fresh = False
    assert where.fresh_for(owner, demand(ledger, CPU=1), ledger) is fresh
    fresh.fresh = False
    assert where.fresh_for(owner, demand(ledger, CPU=1), ledger) is None


def test_surplus_is_what_was_idle_longest() -> None:
    where, owner = pool(), job()
    workers = [idle(where, owner, since=float(since)) for since in (5, 3, 9, 1)]
    assert where.surplus(1, 6.0) == [workers[3], workers[1], workers[0]]
    assert where.surplus(3, 6.0) == [workers[3]]
    assert where.surplus(4, 100.0) == []


def test_starts_are_bounded_in_every_way() -> None:
    where, owner = pool(max_workers=3, start_backoff=0.1, start_backoff_max=1.0), job()
    assert where.may_start(2, 0.0)
    where.new_worker(owner, PLAIN)
    where.new_worker(owner, PLAIN)
    assert not where.may_start(2, 0.0), "two at a time"
    assert where.may_start(3, 0.0)
    where.new_worker(owner, PLAIN)
    assert not where.may_start(9, 0.0), "three in all"
    pauses = []
    for _ in range(6):
        where.start_failed(10.0)
        pauses.append(where.hold_starts_until - 10.0)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    where.start_succeeded()
    assert where.hold_starts_until == 0.0


def test_variables_that_the_user_set_are_left_alone() -> None:
    where = pool(keep_environment=frozenset({"MKL_NUM_THREADS"}))
    found = where.environment(job(1, OMP_NUM_THREADS="9"), (2, ()))
    assert "OMP_NUM_THREADS" not in found
    assert "MKL_NUM_THREADS" not in found
    assert found["OPENBLAS_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in found


def test_processes_see_their_gpus_by_name() -> None:
    where = WorkerPool(SchedulerConfig(), ("GPU-a", "GPU-b", "GPU-c"))
    assert where.environment(job(), (1, (0, 2)))["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-c"
    assert where.environment(job(), (1, ()))["CUDA_VISIBLE_DEVICES"] == ""


def test_room_is_made_by_the_worker_that_was_idle_longest() -> None:
    where, owner = pool(), job()
    young, old = idle(where, owner, (3, ()), 5.0), idle(where, owner, (3, ()), 2.0)
    idle(where, owner, PLAIN, 0.0)
    assert where.longest_idle(owner, PLAIN) is old
    assert where.longest_idle(job(2), PLAIN) is not young


def test_books_that_do_not_agree_are_found() -> None:
    where, owner = pool(), job()
    worker = idle(where, owner)
    where.validate()
    worker.state = STOPPING
    with pytest.raises(AssertionError, match="one book only"):
        where.validate()


def test_shapes_of_the_bench_need_what_they_say() -> None:
    assert resources.unpack(make_shape("x", CPU=2, licence=1).resources) == {"CPU": 20_000, "licence": 10_000}
