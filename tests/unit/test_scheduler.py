"""zray.broker.scheduler as a whole: handing out, prefetch, sharing, waiting, retries, jobs, limits."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from tests.unit.bench import ACTOR, ROOT, Bench, kinds, make_shape, result, warm
from zray import wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.ledger import Demand, Ledger
from zray.broker.placement import Inputs, LocalPolicy
from zray.broker.scheduler import SchedulerConfig, cause_of
from zray.task import TaskSpec

F = make_shape("f")


def node(jobs: int = 1, config: SchedulerConfig | None = None, **total: float) -> Bench:
    """A node whose first workers are up, with F defined."""
    bench = Bench(config, None, jobs, **total)
    bench.define(F, ACTOR)
    bench.start_all()
    return bench


# -- handing out -------------------------------------------------------------------------------------------------------


def test_the_first_job_finds_a_worker_per_cpu_started() -> None:
    bench = Bench(CPU=4)
    assert len(bench.of(a.StartWorker)) == 4
    assert {x.job for x in bench.of(a.StartWorker)} == {1}


def test_unknown_shapes_go_one_at_a_time_and_cpus_limit_them() -> None:
    bench = node(CPU=2)
    bench.submit(10, F)
    assert [len(bench.handed[w]) for w in (1, 2)] == [1, 1]
    assert bench.machine.statistics()["tasks_queued"] == 8


def test_tasks_are_handed_out_in_order() -> None:
    bench = node(CPU=1)
    specs = bench.submit(5, F)
    order: list[TaskSpec] = []
    while bench.handed[1]:
        order.extend(bench.handed[1])
        bench.finish(1, micros=50_000)
    assert order == specs


def test_prefetch_grows_with_evidence_to_the_target() -> None:
    bench = node(CPU=1)
    bench.submit(2000, F)
    sizes: list[int] = []
    while len(sizes) < 12:
        sizes.append(len(bench.handed[1]))
        bench.finish(1, micros=19)
    assert sizes[0] == 1
    assert sizes[1] == 4
    assert sizes[-1] == 101, "2 ms of work for tasks of 19 us (+1 for the way), and one to be running"


def test_long_tasks_are_not_prefetched() -> None:
    bench = node(CPU=1)
    warm(bench, F, micros=10_000)
    bench.submit(50, F)
    assert len(bench.handed[1]) == 1


def test_one_long_run_cuts_the_prefetch_at_once() -> None:
    bench = node(CPU=1)
    warm(bench, F, micros=10)
    bench.submit(400, F)
    assert len(bench.handed[1]) > 50
    bench.finish(1, 1, micros=200_000)
    bench.finish(1, micros=10)
    assert len(bench.handed[1]) < 10


def test_the_end_of_a_queue_is_spread_over_idle_workers() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    bench.submit(10, F)
    assert sorted(len(specs) for specs in bench.handed.values()) == [5, 5]


def test_a_busy_worker_is_supplied_before_it_runs_dry() -> None:
    bench = node(CPU=1)
    warm(bench, F, micros=100)
    bench.submit(200, F)
    have = len(bench.handed[1])
    assert have > 8
    found = bench.finish(1, have // 2, micros=100)
    assert kinds(found, a.RunOn), "half is done: the other half is joined by more"
    assert len(bench.handed[1]) > have // 2


def test_a_busy_worker_is_not_supplied_while_others_wait() -> None:
    bench = node(CPU=1)
    other = make_shape("other")
    bench.define(other)
    warm(bench, F, micros=100)
    bench.submit(200, F)
    late = bench.submit(1, other)
    assert not kinds(bench.finish(1, len(bench.handed[1]) - 1, micros=100), a.RunOn)
    bench.finish(1)
    bench.finish(1)
    assert bench.where(late[0]) == [1], "the other shape has its turn"


def test_a_bigger_policy_batch_is_respected() -> None:
    class OneByOne(LocalPolicy):
        def batch(self, queued: int, depth: int, takers: int) -> int:
            return 1

    bench = Bench(None, OneByOne(), CPU=1)
    bench.define(F)
    bench.start_all()
    warm(bench, F)
    bench.submit(50, F)
    assert len(bench.handed[1]) == 1


def test_a_task_submitted_twice_runs_once() -> None:
    bench = node(CPU=2)
    specs = bench.submit(1, F)
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, specs, None))
    assert sum(len(x.tasks) for x in bench.of(a.RunOn)) == 1


# -- fairness ----------------------------------------------------------------------------------------------------------


def test_two_jobs_share_the_cpus() -> None:
    bench = node(2, CPU=2)
    bench.submit(100, F, job=1)
    bench.submit(100, F, job=2)
    bench.start_all()
    count = {1: 0, 2: 0}
    workers = bench.machine.node.pool.workers
    for _ in range(60):
        for worker in [w for w, specs in bench.handed.items() if specs]:
            count[workers[worker].job.number] += 1
            bench.finish(worker, 1, micros=5000)
    assert abs(count[1] - count[2]) <= 4, count


def test_a_job_with_short_tasks_is_not_pushed_aside_by_one_with_long_ones() -> None:
    bench = node(2, CPU=1)
    long = make_shape("long")
    bench.define(long)
    bench.submit(50, long, job=1)
    bench.submit(500, F, job=2)
    bench.start_all()
    served = {1: 0, 2: 0}
    workers = bench.machine.node.pool.workers
    for _ in range(150):
        for worker in [w for w, specs in bench.handed.items() if specs]:
            job = workers[worker].job.number
            micros = 100_000 if job == 1 else 10_000
            served[job] += micros
            bench.finish(worker, 1, micros=micros)
    assert 0.7 < served[1] / served[2] < 1.4, served


def test_shapes_of_a_job_take_turns() -> None:
    bench = node(CPU=1)
    g = make_shape("g")
    bench.define(g)
    bench.submit(20, F)
    bench.submit(20, g)
    names = []
    for _ in range(10):
        names.append(bench.handed[1][0].shape[:1])
        bench.finish(1, micros=5000)
    assert names.count(b"g") in (4, 5), names


# -- sharing what lies still -------------------------------------------------------------------------------------------


def test_an_idle_worker_gets_copies_of_what_lies_behind_a_long_task() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(20, F)
    busy = bench.where(specs[0])[0]
    other = 3 - busy
    bench.finish(other)
    assert not kinds(bench.finish(busy, 1), a.RunOn)
    assert bench.machine.wake_at == pytest.approx(bench.now + 0.002)
    found = bench.tick(0.0021)
    copies = kinds(found, a.RunOn)
    assert [x.worker for x in copies] == [other]
    left = bench.handed[busy]
    assert copies[0].tasks == left[1:][len(left[1:]) // 2 :]


def test_of_two_copies_the_one_that_ends_counts_and_the_other_is_a_ghost() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(20, F)
    busy = bench.where(specs[0])[0]
    other = 3 - busy
    bench.finish(other)
    bench.tick(0.0021)
    assert bench.handed[other]
    bench.finish(other)
    assert bench.machine.node.pool.workers[busy].ghosts > 0
    bench.finish(busy, 5)
    while any(bench.handed.values()):
        for worker in (busy, other):
            if bench.handed[worker]:
                bench.finish(worker, status=wire.DONE_SKIPPED)
    assert bench.machine.is_idle()
    assert bench.machine.available() == {"CPU": 2.0}


def test_a_worker_with_ghosts_is_not_supplied_until_it_is_idle() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(40, F)
    busy = bench.where(specs[0])[0]
    other = 3 - busy
    bench.finish(other)
    bench.tick(0.0021)
    bench.finish(other)
    bench.submit(200, F)
    assert not [x for x in kinds(bench.finish(busy, 8), a.RunOn) if x.worker == busy]


def test_a_copy_that_was_refused_is_not_followed_by_others() -> None:
    """The worker had ended its first task and run the second for long before it said either."""
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(4, F)
    busy = bench.where(specs[0])[0]
    other = 3 - busy
    bench.finish(other, len(bench.handed[other]))
    first, second = bench.handed[busy]
    bench.tick(0.0021)
    assert sorted(bench.where(second)) == [1, 2]
    bench.finish(other, status=wire.DONE_SKIPPED)
    for _ in range(3):
        assert not kinds(bench.tick(0.0021), a.RunOn)
    assert bench.where(second) == [busy]
    bench.die(busy, claimed=[second])
    assert second.attempt == 1
    assert sorted(spec.id for spec in bench.handed[other]) == sorted([first.id, second.id])


def test_nothing_is_shared_before_its_time() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(20, F)
    busy = bench.where(specs[0])[0]
    assert not kinds(bench.finish(3 - busy, after=0.001), a.RunOn)


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_a_waiting_worker_lends_its_cpu_and_takes_it_back_by_force() -> None:
    bench = node(CPU=1)
    bench.submit(2, F)
    bench.tell(e.WorkerBlocked(1))
    bench.start_all()
    assert bench.handed[2], "another worker was started for the second task"
    bench.tell(e.WorkerUnblocked(1))
    assert bench.machine.node.ledger.available["CPU"] == -10_000
    assert bench.machine.available() == {"CPU": 0.0}
    bench.finish(2)
    bench.finish(1)
    assert bench.machine.available() == {"CPU": 1.0}


def test_only_the_cpu_is_lent() -> None:
    bench = node(CPU=1, GPU=1, licence=1)
    g = make_shape("g", CPU=1, GPU=1, licence=1)
    bench.define(g)
    bench.submit(2, g)
    bench.start_all()
    worker = next(w for w, specs in bench.handed.items() if specs)
    bench.tell(e.WorkerBlocked(worker))
    assert bench.machine.available() == {"CPU": 1.0, "GPU": 0.0, "licence": 0.0}
    bench.start_all()
    assert sum(len(specs) for specs in bench.handed.values()) == 1


def test_four_endless_workers_on_two_cpus_can_use_an_actor() -> None:
    bench = node(CPU=2)
    bench.submit(4, F)
    actor = bench.create_actor(ACTOR)
    for _ in range(4):
        for worker in [w for w, specs in bench.handed.items() if specs]:
            bench.tell(e.WorkerBlocked(worker))
        bench.start_all()
    assert sum(len(specs) for specs in bench.handed.values()) == 4, "all four run"
    begun = bench.of(a.BeginActor)
    assert [x.spec.creation.id for x in begun] == [actor.creation.id]


def test_tasks_behind_a_waiting_one_are_offered_elsewhere() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    specs = bench.submit(8, F)
    assert bench.handed[1] == specs
    bench.tell(e.WorkerBlocked(1))
    bench.start_all()
    assert bench.handed[2] == specs[1:]
    bench.finish(2)
    bench.tell(e.WorkerUnblocked(1))
    bench.finish(1, 1)
    bench.finish(1, status=wire.DONE_SKIPPED)
    assert bench.machine.is_idle()


def test_tasks_are_offered_again_when_the_next_worker_waits_too() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    specs = bench.submit(8, F)
    for worker in (1, 2, 3):
        bench.tell(e.WorkerBlocked(worker))
        bench.start_all()
        assert bench.handed[worker + 1] == specs[worker:]


def test_what_a_waiting_worker_gets_to_after_all_leaves_the_queue() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    bench.submit(8, F)
    bench.tell(e.WorkerBlocked(1))
    bench.tell(e.WorkerUnblocked(1))
    bench.finish(1)
    assert bench.machine.statistics()["tasks_queued"] == 0
    assert bench.machine.statistics()["tasks"] == 0


# -- deaths and retries ------------------------------------------------------------------------------------------------


def test_only_what_it_was_running_costs_a_retry() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    specs = bench.submit(5, F)
    found = bench.die(1, claimed=[specs[2]])
    assert [x.task for x in kinds(found, a.Reopen)] == [specs[2]]
    assert [spec.attempt for spec in specs] == [0, 0, 1, 0, 0]
    bench.start_all()
    assert sorted(spec.id for spec in bench.handed[2]) == sorted(spec.id for spec in specs)


def test_without_knowledge_of_claims_the_first_is_taken_to_have_run() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    specs = bench.submit(5, F)
    bench.finish(1, 2)
    bench.die(1, claimed=None)
    assert [spec.attempt for spec in specs] == [0, 0, 1, 0, 0]


def test_a_task_fails_when_its_retries_are_used_up() -> None:
    bench = node(CPU=1)
    once = make_shape("once", max_retries=1)
    bench.define(once)
    spec = bench.submit(1, once)[0]
    for status in (-9, -11):
        worker = bench.where(spec)[0]
        bench.die(worker, status, claimed=[spec])
        bench.start_all()
    failed = bench.of(a.SealError)
    assert [x.kind for x in failed] == ["WorkerCrashedError"]
    assert failed[0].fields["cause"] == "SIGSEGV"
    assert failed[0].fields["function_name"] == "once"
    assert failed[0].fields["worker"] == 2
    assert bench.machine.statistics()["tasks"] == 0


def test_endless_retries_and_none() -> None:
    bench = node(CPU=2)
    always, never = make_shape("always", max_retries=-1), make_shape("never", max_retries=0)
    bench.define(always, never)
    one, other = bench.submit(1, always)[0], bench.submit(1, never)[0]
    bench.die(bench.where(other)[0], claimed=[other])
    for _ in range(20):
        bench.die(bench.where(one)[0], claimed=[one])
        bench.start_all()
    assert one.attempt == 20
    assert bench.errors() == {other.id: "WorkerCrashedError"}


def test_memory_that_ran_out_is_an_error_of_its_own() -> None:
    bench = node(CPU=1)
    never = make_shape("never", max_retries=0)
    bench.define(never)
    spec = bench.submit(1, never)[0]
    bench.die(1, oom=True, claimed=[spec])
    assert bench.errors() == {spec.id: "OutOfMemoryError"}
    assert bench.of(a.SealError)[0].fields["cause"] == "OOM"


def test_an_exception_to_be_retried_costs_a_retry() -> None:
    bench = node(CPU=1)
    spec = bench.submit(1, F)[0]
    found = bench.finish(1, status=wire.DONE_RETRY)
    assert kinds(found, a.Reopen)
    assert spec.attempt == 1
    assert bench.where(spec) == [1]


def test_a_late_report_of_a_dead_worker_ends_its_task() -> None:
    bench = node(CPU=1)
    warm(bench, F)
    specs = bench.submit(3, F)
    bench.die(1, claimed=[])
    assert bench.machine.statistics()["tasks_queued"] == 3
    bench.tell(e.TasksFinished(1, [specs[0].id], b"\0", [10], True))
    assert bench.machine.statistics()["tasks"] == 2


def test_a_task_whose_copy_is_skipped_and_that_nobody_has_is_over() -> None:
    bench = node(CPU=1)
    spec = bench.submit(1, F)[0]
    bench.die(1, claimed=[])
    bench.start_all()
    assert bench.where(spec) == [2]
    bench.finish(2, status=wire.DONE_SKIPPED)
    assert bench.machine.is_idle()
    assert not bench.errors()


def test_copies_elsewhere_survive_a_death() -> None:
    bench = node(CPU=2)
    warm(bench, F)
    specs = bench.submit(20, F)
    busy = bench.where(specs[0])[0]
    other = 3 - busy
    bench.finish(other)
    bench.tick(0.0021)
    shared = list(bench.handed[other])
    bench.die(other, claimed=[shared[0]])
    assert shared[0].attempt == 1, "it was running that one"
    assert all(spec.attempt == 0 for spec in shared[1:])
    bench.finish(busy, len(bench.handed[busy]))
    bench.start_all()
    while any(bench.handed.values()):
        for worker in list(bench.handed):
            if bench.handed[worker]:
                bench.finish(worker)
    assert bench.machine.is_idle()


@pytest.mark.parametrize(
    ("status", "oom", "doom", "cause"),
    [
        (3, False, "", "EXIT(3)"),
        (-9, True, "", "OOM"),
        (-6, False, "", "SIGABRT"),
        (-9, False, "KILLED", "KILLED"),
        (-40, False, "", "SIG40"),
    ],
)
def test_causes_of_death(status: int, oom: bool, doom: str, cause: str) -> None:
    assert cause_of(status, oom, doom) == cause


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_tasks_wait_for_their_arguments() -> None:
    bench = node(CPU=2)
    first = bench.submit(1, F)[0]
    late = bench.specs(1, F, deps=(result(first), b"x" * 16))
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, late, [(result(first), b"x" * 16)]))
    assert bench.where(late[0]) == []
    bench.tell(e.ObjectsReady([b"x" * 16]))
    assert bench.where(late[0]) == []
    bench.tell(e.ObjectsReady([result(first)]))
    assert bench.where(late[0]) != []


def test_an_error_of_the_system_is_an_argument_too() -> None:
    bench = node(CPU=1)
    never = make_shape("never", max_retries=0, num_returns=2)
    bench.define(never)
    first = bench.submit(1, never)[0]
    second = first.id[:12] + (2).to_bytes(4, "little")
    late = bench.specs(1, F, deps=(second,))
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, late, [(second,)]))
    bench.die(1, claimed=[first])
    bench.start_all()
    assert bench.where(late[0]) == [2]


def test_objects_are_looked_at_again_after_a_death() -> None:
    bench = node(CPU=2)
    late = bench.specs(1, F, deps=(b"x" * 16,))
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, late, [(b"x" * 16,)]))
    bench.die(1, claimed=[])
    assert bench.machine.wake_at <= bench.now + 0.1
    found = bench.tick()
    assert [x.ids for x in kinds(found, a.WatchObjects)] == [[b"x" * 16]]
    assert not kinds(bench.tick(), a.WatchObjects), "once is enough"


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_what_this_node_can_never_give_fails_at_once_and_says_what_is_missing() -> None:
    bench = node(CPU=2)
    huge = make_shape("huge", CPU=3, unicorn=1)
    bench.define(huge)
    spec = bench.submit(1, huge)[0]
    assert bench.errors() == {spec.id: "TaskUnschedulableError"}
    text = str(bench.of(a.SealError)[0].fields["message"])
    assert "huge" in text
    assert "CPU: 3 asked for, 2 here" in text
    assert "unicorn: 1 asked for, 0 here" in text


def test_in_a_cluster_that_may_grow_it_waits_with_one_warning() -> None:
    bench = node(CPU=2, config=SchedulerConfig(debug=True, cluster_may_grow=True))
    huge = make_shape("huge", CPU=3)
    bench.define(huge)
    bench.submit(1, huge)
    bench.submit(5, huge)
    assert len(bench.of(a.Warn)) == 1
    assert bench.errors() == {}
    others = bench.submit(1, F)
    assert bench.where(others[0]), "it is in nobody's way"


def test_a_shape_that_nobody_defined_is_an_error() -> None:
    bench = Bench(CPU=1)
    spec = TaskSpec(b"t" * 12 + bytes(4), b"never heard of..")
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, [spec], None))
    assert bench.errors() == {spec.id: "ZraySystemError"}


def test_a_demand_that_is_none_defines_nothing() -> None:
    bench = Bench(CPU=1)
    bench.tell(e.ShapesDefined([make_shape("bad").__class__(b"b" * 16, 0, b"f" * 16, "bad", resources=b"\xff\xff")]))
    assert not bench.machine.node.tasks.shapes


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_the_end_of_a_job_ends_all_that_is_its_own() -> None:
    bench = node(2, CPU=2)
    mine = bench.submit(5, F, job=1)
    late = bench.specs(1, F)
    bench.tell(e.TasksSubmitted(1, 1001, ROOT, late, [(b"x" * 16,)]))
    theirs = bench.submit(3, F, job=2)
    bench.start_all()
    found = bench.tell(e.JobEnded(1, "the driver has died"))
    assert set(bench.errors()) == {spec.id for spec in mine + late}
    assert set(bench.errors().values()) == {"TaskCancelledError"}
    killed = {x.worker for x in kinds(found, a.KillWorker)}
    workers = bench.machine.node.pool.workers
    assert killed == {w.number for w in workers.values() if w.job.number == 1}
    for worker in killed:
        bench.die(worker, claimed=[])
    bench.start_all()
    assert any(bench.where(spec) for spec in theirs)
    assert list(bench.machine.node.jobs.jobs) == [2]


def test_what_comes_for_a_job_that_is_over_is_answered() -> None:
    bench = node(CPU=1)
    bench.tell(e.JobEnded(1, "bye"))
    spec = bench.submit(1, F)[0]
    assert bench.errors() == {spec.id: "TaskCancelledError"}


def test_shapes_are_forgotten_with_the_last_job_that_may_use_them() -> None:
    bench = node(2, CPU=1)
    bench.tell(e.JobEnded(1, "bye"))
    for worker in list(bench.machine.node.pool.workers.values()):
        if worker.job.number == 1:
            bench.die(worker.number, claimed=[])
    assert not bench.of(a.ForgetShapes), "job 2 was there when they were defined"
    bench.tell(e.JobEnded(2, "bye"))
    for number in list(bench.machine.node.pool.workers):
        bench.die(number, claimed=[])
    assert [sorted(x.shapes) for x in bench.of(a.ForgetShapes)] == [sorted([F.key, ACTOR.key])]
    assert not bench.machine.node.tasks.shapes


# -- processes ---------------------------------------------------------------------------------------------------------


def test_starts_are_bounded_and_follow_the_cpus_that_are_free() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0, max_starting=2), CPU=4)
    bench.define(F)
    bench.submit(10, F)
    assert len(bench.of(a.StartWorker)) == 2
    bench.ready(1)
    assert len(bench.of(a.StartWorker)) == 3
    bench.start_all()
    assert len(bench.of(a.StartWorker)) == 4, "one per CPU, no more"


def test_tasks_without_cpu_do_not_start_processes_without_limit() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0), CPU=1)
    free = make_shape("free", nothing=0)
    bench.define(free)
    bench.submit(500, free)
    bench.start_all()
    assert len(bench.of(a.StartWorker)) == 32


def test_failed_starts_are_repeated_ever_more_rarely_and_then_given_up() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0, max_starting=1), CPU=1)
    bench.define(F)
    spec = bench.submit(1, F)[0]
    pauses = []
    for _ in range(5):
        worker = bench.of(a.StartWorker)[-1].worker
        bench.tell(e.WorkerStartFailed(worker, "no memory"))
        if bench.errors():
            break
        pauses.append(bench.machine.wake_at - bench.now)
        assert not kinds(bench.tick(0.0), a.StartWorker)
        assert kinds(bench.tick(pauses[-1]), a.StartWorker)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert bench.errors() == {spec.id: "WorkerCrashedError"}
    assert "no memory" in str(bench.of(a.SealErrors)[0].fields["message"])


def test_surplus_idle_workers_are_stopped_and_killed_if_they_stay() -> None:
    bench = node(CPU=1)
    bench.submit(3, F)
    for worker in (1, 2):
        bench.tell(e.WorkerBlocked(worker))
        bench.start_all()
    for worker in (3, 2, 1):
        bench.finish(worker)
    found = bench.tick(1.9)
    assert not kinds(found, a.StopWorker)
    found = bench.tick(0.2)
    assert [x.worker for x in kinds(found, a.StopWorker)] == [3, 2], "those that were idle longest; one per CPU is kept"
    bench.die(3, 0, claimed=[])
    assert [x.worker for x in kinds(bench.tick(5.1), a.KillWorker)] == [2]


def test_a_full_house_makes_room_for_another_kind() -> None:
    bench = Bench(SchedulerConfig(debug=True, max_workers=2), CPU=2)
    wide = make_shape("wide", CPU=2)
    bench.define(wide)
    bench.start_all()
    spec = bench.submit(1, wide)[0]
    stopped = [x.worker for x in bench.of(a.StopWorker)]
    assert len(stopped) == 1
    bench.die(stopped[0], 0, claimed=[])
    bench.start_all()
    assert bench.where(spec)


def test_thread_limits_follow_the_demand_unless_the_user_has_set_them() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0, keep_environment=frozenset({"MKL_NUM_THREADS"})), CPU=4)
    bench.start_job(2, {"OMP_NUM_THREADS": "7"})
    wide = make_shape("wide", CPU=3.5)
    bench.define(wide, F)
    bench.submit(1, wide, job=1)
    assert bench.environments[1]["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in bench.environments[1]
    assert "CUDA_VISIBLE_DEVICES" not in bench.environments[1]
    bench.start_all()
    bench.finish(1)
    bench.submit(1, F, job=2)
    assert "OMP_NUM_THREADS" not in bench.environments[2]
    assert bench.environments[2]["OPENBLAS_NUM_THREADS"] == "1"


def test_gpus_are_bound_to_processes() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0, max_starting=8, gpu_names=("4", "6", "7")), CPU=8, GPU=3)
    one, half, plain = make_shape("one", CPU=1, GPU=1), make_shape("half", CPU=1, GPU=0.5), make_shape("plain")
    bench.define(one, half, plain)
    bench.submit(1, one)
    bench.submit(4, half)
    bench.submit(1, plain)
    bench.start_all()
    visible = [bench.environments[w]["CUDA_VISIBLE_DEVICES"] for w, specs in sorted(bench.handed.items()) if specs]
    assert sorted(visible) == ["", "4", "6", "6", "7", "7"]
    assert bench.machine.available()["GPU"] == 0


def test_all_gpus_at_once() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0), CPU=8, GPU=2)
    both = make_shape("both", CPU=1, GPU=2)
    bench.define(both)
    bench.submit(2, both)
    bench.start_all()
    assert sum(len(specs) for specs in bench.handed.values()) == 1
    assert bench.environments[1]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_policy_may_keep_tasks_waiting() -> None:
    class Never(LocalPolicy):
        def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random, inputs: Inputs | None = None) -> int:
            return -1

    bench = Bench(None, Never(), CPU=1)
    bench.define(F)
    bench.start_all()
    bench.submit(3, F)
    assert not bench.of(a.RunOn)


def test_the_same_events_give_the_same_actions() -> None:
    def story() -> list[str]:
        bench = node(CPU=2)
        warm(bench, F)
        bench.submit(30, F)
        bench.tell(e.WorkerBlocked(1))
        bench.die(2, claimed=[])
        bench.tick(0.01)
        return [repr(action) for action in bench.all]

    assert story() == story()


def test_the_story_of_a_task_is_kept() -> None:
    bench = node(CPU=1)
    spec = bench.submit(1, F)[0]
    story = bench.machine.story(spec.id)
    assert "submitted by process 1001" in story[0]
    assert "handed to worker 1 (attempt 0)" in story[1]


def test_a_gpu_task_has_its_turn_in_a_stream_of_others() -> None:
    bench = node(CPU=2, GPU=1)
    gpu = make_shape("gpu", CPU=1, GPU=1)
    bench.define(gpu)
    bench.submit(100, F)
    spec = bench.submit(1, gpu)[0]
    bench.start_all()
    for _ in range(4):
        for worker in [w for w, specs in bench.handed.items() if specs and specs[0].shape == F.key]:
            bench.finish(worker, 1, micros=5000, after=0.01)
        bench.start_all()
    assert bench.where(spec)


def test_workers_that_became_actors_are_replaced_when_nothing_waits() -> None:
    bench = node(CPU=2)
    bench.create_actor(ACTOR)
    before = len(bench.of(a.StartWorker))
    assert len(kinds(bench.tick(), a.StartWorker)) == 1
    bench.start_all()
    assert not kinds(bench.tick(), a.StartWorker)
    assert len(bench.of(a.StartWorker)) == before + 1
