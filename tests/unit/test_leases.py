"""Leases of workers: when they are granted, taken back, and when the worker is free again."""

from __future__ import annotations

import pytest

from tests.unit.bench import ACTOR, ROOT, Bench, kinds, make_shape
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.scheduler import SchedulerConfig

F = make_shape("f")
REPLY = b"r" * 16


def node(cpus: int = 2, jobs: int = 1, **settings: float) -> Bench:
    bench = Bench(SchedulerConfig(debug=True, **settings), None, jobs, CPU=cpus)  # type: ignore[arg-type]
    bench.define(F, ACTOR)
    bench.start_all()
    return bench


def ask(bench: Bench, process: int = 1001, reply: bytes = REPLY, shape: bytes = F.key, job: int = 1) -> list[a.Action]:
    return bench.tell(e.LeaseRequested(process, job, shape, reply))


def test_an_idle_worker_is_lent_and_holds_what_the_shape_needs() -> None:
    bench = node()
    grants = kinds(ask(bench), a.GrantLease)
    assert [(x.reply, x.shape, x.epoch) for x in grants] == [(REPLY, F.key, 1)]
    assert bench.machine.available() == {"CPU": 1.0}


def test_nothing_is_lent_while_tasks_wait() -> None:
    bench = node(cpus=1)
    bench.submit(2, F)
    assert not ask(bench)
    bench.finish(1)
    assert not bench.of(a.GrantLease)
    bench.finish(1)
    assert [x.worker for x in bench.of(a.GrantLease)] == [1]


def test_a_worker_is_started_for_a_lease() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0), CPU=1)
    bench.define(F)
    assert kinds(ask(bench), a.StartWorker)
    bench.start_all()
    assert bench.of(a.GrantLease)


def test_leases_are_taken_back_for_tasks_and_not_granted_again_at_once() -> None:
    bench = node(cpus=1)
    ask(bench)
    found_at = bench.now
    bench.submit(1, F)
    assert [x.epoch for x in bench.of(a.RevokeLease)] == [2]
    assert bench.machine.wake_at == pytest.approx(found_at + 0.001)
    bench.tick(0.001, busy=(1,))
    assert not bench.of(a.RunOn), "its last direct call is not over"
    assert bench.machine.wake_at > bench.now
    bench.tick(0.001)
    assert bench.of(a.RunOn)
    ask(bench, reply=b"s" * 16)
    bench.finish(1)
    assert len(bench.of(a.GrantLease)) == 1
    assert bench.machine.wake_at == pytest.approx(found_at + 0.02, abs=1e-3)
    bench.tick(0.02)
    assert [x.epoch for x in bench.of(a.GrantLease)] == [1, 3]


def test_the_longer_a_direct_call_goes_on_the_more_rarely_it_is_looked_for() -> None:
    bench = node(cpus=1)
    ask(bench)
    bench.submit(1, F)
    pauses = []
    for _ in range(20):
        bench.tick(bench.machine.wake_at - bench.now, busy=(1,))
        pauses.append(bench.machine.wake_at - bench.now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(0.1)


def test_no_more_leases_are_taken_back_than_are_needed() -> None:
    bench = node(cpus=4)
    for process in range(4):
        ask(bench, 2000 + process, bytes([process]) * 16)
    bench.start_all()
    assert len(bench.of(a.GrantLease)) == 4
    bench.submit(1, F)
    assert len(bench.of(a.RevokeLease)) == 1


def test_an_actor_takes_a_lease_back_too() -> None:
    bench = node(cpus=1)
    ask(bench)
    bench.create_actor(ACTOR)
    assert bench.of(a.RevokeLease)
    bench.tick(0.001)
    bench.start_all()
    assert bench.of(a.BeginActor)


def test_an_idle_lease_ends() -> None:
    bench = node()
    ask(bench)
    worker = bench.of(a.GrantLease)[0].worker
    bench.tick(0.9, busy=(worker,))
    bench.tick(0.9)
    assert not bench.of(a.RevokeLease)
    bench.tick(0.2)
    assert bench.of(a.RevokeLease)
    bench.tick(0.01)
    assert bench.machine.available() == {"CPU": 2.0}
    assert bench.machine.is_idle()


def test_reports_of_direct_calls_keep_a_lease() -> None:
    bench = node()
    ask(bench)
    worker = bench.of(a.GrantLease)[0].worker
    for _ in range(4):
        bench.tell(e.TasksFinished(worker, [b"d" * 16], b"\0", [10], True), 0.5)
        bench.tick(0.1)
    assert not bench.of(a.RevokeLease)


def test_the_death_of_the_lessee_ends_its_leases_and_requests() -> None:
    bench = node(cpus=1)
    ask(bench, 2001)
    ask(bench, 2002, b"s" * 16)
    ask(bench, 2003, b"t" * 16)
    bench.tell(e.ProcessGone(2002))
    bench.tell(e.ProcessGone(2001))
    bench.tick(0.01)
    assert [x.reply for x in bench.of(a.GrantLease)] == [REPLY, b"t" * 16]


def test_a_returned_lease_is_free_and_an_old_epoch_returns_nothing() -> None:
    bench = node(cpus=1)
    ask(bench)
    bench.tell(e.LeaseReturned(1, 7))
    assert not bench.of(a.RevokeLease)
    bench.tell(e.LeaseReturned(1, 1))
    bench.tick(0.001)
    assert bench.machine.available() == {"CPU": 1.0}


def test_a_newer_request_takes_the_place_of_an_older() -> None:
    bench = node(cpus=1)
    bench.submit(1, F)
    ask(bench, reply=b"1" * 16)
    ask(bench, reply=b"2" * 16)
    bench.finish(1)
    assert [x.reply for x in bench.of(a.GrantLease)] == [b"2" * 16]


def test_the_end_of_a_job_ends_its_leases() -> None:
    bench = node(cpus=1)
    ask(bench)
    found = bench.tell(e.JobEnded(1, "bye"))
    assert kinds(found, a.RevokeLease)
    assert [x.worker for x in kinds(found, a.KillWorker)] == [1]


def test_calls_that_a_dead_leased_worker_leaves_go_through_the_queue() -> None:
    bench = node(cpus=1)
    ask(bench)
    ran, waited = bench.specs(2, F)
    found = bench.die(1, claimed=[ran], orphans=[ran, waited], without_spec=[b"o" * 16])
    assert [x.task for x in kinds(found, a.Reopen)] == [ran, waited]
    assert [x.ids for x in kinds(found, a.SealEntries)] == [[b"o" * 16]]
    assert not kinds(found, a.RevokeLease), "nobody is left to be told"
    bench.start_all()
    assert bench.handed[2]


def test_a_direct_call_without_retries_fails_with_its_worker() -> None:
    bench = node(cpus=1)
    never = make_shape("never", max_retries=0)
    bench.define(never)
    ask(bench, shape=never.key)
    spec = bench.specs(1, never)[0]
    bench.die(1, claimed=[spec], orphans=[spec])
    assert bench.errors() == {spec.id: "WorkerCrashedError"}


def test_a_leased_worker_that_waits_lends_its_cpu() -> None:
    bench = node(cpus=1)
    ask(bench)
    bench.tell(e.WorkerBlocked(1))
    bench.submit(1, F)
    bench.start_all()
    assert bench.handed[2]
    assert not bench.of(a.RevokeLease), "its CPU is there already"
    bench.tell(e.WorkerUnblocked(1))
    assert bench.machine.node.ledger.available["CPU"] == -10_000


def test_a_lease_that_can_never_be_granted_is_not_kept() -> None:
    bench = node(cpus=1)
    wide = make_shape("wide", CPU=5)
    bench.define(wide)
    ask(bench, shape=wide.key)
    ask(bench, shape=b"unknown to all..")
    assert not bench.machine.node.leases.pending


def test_children_of_a_direct_call_are_cancelled_with_it() -> None:
    bench = node(cpus=2)
    ask(bench)
    worker = bench.of(a.GrantLease)[0].worker
    parent = bench.specs(1, F)[0]
    children = bench.specs(5, F, parent.id)
    bench.tell(e.TasksSubmitted(1, 100 + worker, parent.id, children, None))
    bench.tell(e.TaskCancel(parent.id, False, True, worker))
    assert bench.of(a.InterruptTask)[0].task == parent.id
    assert len(bench.errors()) >= 4
    bench.tell(e.TasksFinished(worker, [parent.id], b"\3", [10], True))
    assert not bench.machine.node.jobs.jobs[1].children
    assert ROOT not in bench.machine.node.interrupted
    assert not bench.machine.node.interrupted - {spec.id for spec in children}


def test_what_is_lent_is_free_for_others_who_ask() -> None:
    bench = node()
    ask(bench)
    assert bench.machine.available() == {"CPU": 1.0}
    assert bench.machine.spare() == {"CPU": 2.0}
    bench.submit(1, F)
    assert bench.machine.spare() == {"CPU": 1.0}
