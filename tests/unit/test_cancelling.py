"""zray.broker.cancelling: what a cancel does wherever the task is."""

from __future__ import annotations

from tests.unit.bench import ROOT, Bench, kinds, make_shape, result, warm
from zray import wire
from zray.broker import actions as a
from zray.broker import events as e

F = make_shape("f")


def node(cpus: int = 1) -> Bench:
    bench = Bench(None, None, 1, CPU=cpus)
    bench.define(F)
    bench.start_all()
    return bench


def cancel(bench: Bench, task: bytes, force: bool = False, recursive: bool = False, worker: int = 0) -> list[a.Action]:
    return bench.tell(e.TaskCancel(task, force, recursive, worker))


def test_a_queued_task_ends_at_once_and_is_never_handed_out() -> None:
    bench = node()
    specs = bench.submit(3, F)
    assert [type(x) for x in cancel(bench, specs[1].id)] == [a.InterruptTask, a.SealError]
    assert bench.errors() == {specs[1].id: "TaskCancelledError"}
    bench.finish(1)
    assert bench.handed[1] == [specs[2]]


def test_a_waiting_task_ends_at_once() -> None:
    bench = node()
    late = bench.specs(1, F)[0]
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, [late], [(b"x" * 16,)]))
    cancel(bench, late.id)
    bench.tell(e.ObjectsReady([b"x" * 16]))
    assert bench.errors() == {late.id: "TaskCancelledError"}
    assert bench.machine.is_idle()


def test_dependents_of_a_cancelled_task_go_on() -> None:
    bench = node()
    specs = bench.submit(2, F)
    late = bench.specs(1, F)[0]
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, [late], [(result(specs[1]),)]))
    cancel(bench, specs[1].id)
    bench.finish(1)
    assert bench.handed[1] == [late]


def test_a_running_task_is_interrupted_and_not_retried_when_it_dies() -> None:
    bench = node()
    spec = bench.submit(1, F)[0]
    found = cancel(bench, spec.id)
    assert [x.task for x in kinds(found, a.InterruptTask)] == [spec.id]
    assert not bench.errors()
    bench.die(1, claimed=[spec])
    assert bench.errors() == {spec.id: "TaskCancelledError"}
    assert not bench.machine.node.interrupted


def test_an_interrupted_task_may_end_all_the_same() -> None:
    bench = node()
    spec = bench.submit(1, F)[0]
    cancel(bench, spec.id)
    bench.finish(1)
    assert not bench.errors()
    assert not bench.machine.node.interrupted


def test_an_interrupted_task_is_not_tried_again() -> None:
    bench = node()
    spec = bench.submit(1, F)[0]
    cancel(bench, spec.id)
    bench.finish(1, status=wire.DONE_RETRY)
    assert bench.errors() == {spec.id: "TaskCancelledError"}


def test_a_task_behind_the_running_one_ends_at_once() -> None:
    bench = node()
    warm(bench, F)
    specs = bench.submit(4, F)
    found = cancel(bench, specs[2].id)
    assert kinds(found, a.InterruptTask), "reports may be under way: it may be running after all"
    assert bench.errors() == {specs[2].id: "TaskCancelledError"}
    bench.finish(1, 2)
    bench.finish(1, 1, status=wire.DONE_SKIPPED)
    bench.finish(1)
    assert bench.machine.is_idle()


def test_force_kills_the_worker_and_spares_its_other_tasks() -> None:
    bench = node()
    warm(bench, F)
    specs = bench.submit(4, F)
    found = cancel(bench, specs[0].id, force=True)
    assert [(x.worker, x.reason) for x in kinds(found, a.KillWorker)] == [(1, "CANCELLED")]
    assert bench.errors() == {specs[0].id: "TaskCancelledError"}
    bench.die(1, claimed=[])
    bench.start_all()
    assert bench.handed[2] == specs[1:]
    assert [spec.attempt for spec in specs] == [0, 0, 0, 0]


def test_children_are_cancelled_with_their_parent_only_when_asked() -> None:
    for recursive in (False, True):
        bench = node(cpus=2)
        parent = bench.submit(1, F)[0]
        worker = bench.where(parent)[0]
        children = bench.specs(3, F, parent.id)
        bench.tell(e.TasksSubmitted(1, 100 + worker, parent.id, children, None))
        grandchildren = bench.specs(2, F, children[0].id)
        busy = bench.where(children[0])[0]
        bench.tell(e.TasksSubmitted(1, 100 + busy, children[0].id, grandchildren, None))
        cancel(bench, parent.id, recursive=recursive)
        queued = {spec.id for spec in children[1:] + grandchildren}
        assert set(bench.errors()) == (queued if recursive else set())


def test_children_that_ended_are_not_remembered() -> None:
    bench = node(cpus=2)
    parent = bench.submit(1, F)[0]
    worker = bench.where(parent)[0]
    for _ in range(300):
        children = bench.specs(1, F, parent.id)
        bench.tell(e.TasksSubmitted(1, 100 + worker, parent.id, children, None))
        bench.finish(bench.where(children[0])[0])
    assert len(bench.machine.node.jobs.jobs[1].children[parent.id]) <= 65
    bench.finish(worker)
    assert not bench.machine.node.jobs.jobs[1].children


def test_a_direct_call_is_found_by_the_store_and_force_kills_its_worker() -> None:
    bench = node(cpus=2)
    bench.tell(e.LeaseRequested(1001, 1, F.key, b"r" * 16))
    worker = bench.of(a.GrantLease)[0].worker
    spec = bench.specs(1, F)[0]
    found = cancel(bench, spec.id, force=True, worker=worker)
    assert [x.worker for x in kinds(found, a.KillWorker)] == [worker]
    bench.die(worker, claimed=[spec], orphans=[spec])
    assert bench.errors() == {spec.id: "TaskCancelledError"}
    assert not bench.machine.node.interrupted


def test_a_task_nobody_knows_is_looked_for_in_the_store() -> None:
    bench = node()
    assert cancel(bench, b"t" * 16) == [a.InterruptTask(b"t" * 16)]
    assert cancel(bench, b"t" * 16, True, True, 99) == [a.InterruptTask(b"t" * 16)]


def test_many_cancelled_tasks_leave_nothing_in_the_queue() -> None:
    bench = node()
    specs = bench.submit(1000, F)
    for spec in specs[1:]:
        cancel(bench, spec.id)
    queue = bench.machine.node.jobs.jobs[1].queues[F.key]
    assert len(queue.specs) <= 64
    bench.finish(1)
    assert bench.machine.is_idle()
