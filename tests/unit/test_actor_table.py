"""Actors: placing, incarnations, restarts, names, calls that wait, and what callers are told."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.unit.bench import ACTOR, Bench, kinds, make_shape
from zray import resources
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.actor_table import MOVES, STATE_NAMES, ActorRecord, ActorTable
from zray.broker.jobs import Job
from zray.broker.ledger import Ledger
from zray.broker.scheduler import SchedulerConfig
from zray.broker.task_table import ShapeState
from zray.broker.worker_pool import IllegalMove
from zray.task import ACTOR_METHOD, LANE_BIT, ActorSpec, JobSpec, LaneTag, TaskSpec

F = make_shape("f")
METHOD = make_shape("method", ACTOR_METHOD, nothing=0)
CALLER = 1001


def node(jobs: int = 1, **total: float) -> Bench:
    bench = Bench(None, None, jobs, **(total or {"CPU": 2}))
    bench.define(F, ACTOR)
    bench.start_all()
    return bench


def living(bench: Bench, **options: Any) -> tuple[ActorSpec, int]:
    """An actor that is constructed, and its worker."""
    spec = bench.create_actor(ACTOR, **options)
    bench.start_all()
    worker = bench.of(a.BeginActor)[-1].worker
    bench.tell(e.ActorConstructed(worker, 100 + worker, spec.creation.id))
    return spec, worker


def calls(bench: Bench, count: int, sequence: int = 1) -> list[TaskSpec]:
    found = bench.specs(count, METHOD)
    for index, spec in enumerate(found):
        spec.sequence = sequence + index
    return found


def send(bench: Bench, spec: ActorSpec, found: list[TaskSpec], incarnation: int = 0) -> list[a.Action]:
    """Calls that come through the broker."""
    return bench.tell(e.ActorCallsQueued(CALLER, 1, spec.creation.id, incarnation, found))


# -- making ------------------------------------------------------------------------------------------------------------


def test_an_actor_gets_a_process_without_a_past() -> None:
    bench = node()
    bench.submit(1, F)
    used = next(worker for worker, specs in bench.handed.items() if specs)
    bench.finish(used)
    bench.create_actor(ACTOR)
    assert [x.worker for x in bench.of(a.BeginActor)] == [3 - used]
    bench.create_actor(ACTOR)
    bench.start_all()
    assert [x.worker for x in bench.of(a.BeginActor)] == [3 - used, 3]


def test_construction_and_life_occupy_different_things() -> None:
    bench = node(CPU=1, licence=1)
    running = resources.pack(resources.parse({"licence": 1}))
    spec = bench.create_actor(ACTOR, running_resources=running)
    assert bench.machine.available() == {"CPU": 0.0, "licence": 1.0}
    bench.tell(e.ActorConstructed(1, 101, spec.creation.id))
    assert bench.machine.available() == {"CPU": 1.0, "licence": 0.0}
    bench.tell(e.ActorKill(spec.creation.id, True))
    assert bench.machine.available()["licence"] == 0.0, "its process is not known to be gone"
    bench.die(1, claimed=[])
    assert bench.machine.available() == {"CPU": 1.0, "licence": 1.0}


def test_actors_wait_for_arguments_and_then_for_resources_in_order() -> None:
    bench = node(CPU=1)
    task = bench.submit(1, F)[0]
    late = bench.create_actor(ACTOR, missing=(b"x" * 16,))
    early = bench.create_actor(ACTOR)
    bench.tell(e.ObjectsReady([b"x" * 16]))
    assert not bench.of(a.BeginActor)
    bench.finish(bench.where(task)[0])
    bench.start_all()
    assert [x.spec for x in bench.of(a.BeginActor)] == [early]
    worker = bench.of(a.BeginActor)[0].worker
    bench.tell(e.ActorConstructed(worker, 1, early.creation.id))
    bench.start_all()
    assert [x.spec for x in bench.of(a.BeginActor)] == [early, late]


def test_an_actor_that_no_node_can_hold_is_dead_at_once() -> None:
    bench = node()
    wide = make_shape("Wide", 1, CPU=64)
    bench.define(wide)
    spec = bench.create_actor(wide)
    down = bench.of(a.ActorDown)[0]
    assert (down.actor, down.next, down.kind) == (spec.creation.id, False, "ActorUnschedulableError")
    assert "CPU: 64 asked for, 2 here" in str(down.fields["message"])
    found = send(bench, spec, calls(bench, 1))
    assert [x.kind for x in kinds(found, a.SealError)] == ["ActorUnschedulableError"]


def test_in_a_cluster_that_may_grow_it_waits() -> None:
    bench = Bench(SchedulerConfig(debug=True, cluster_may_grow=True), CPU=1)
    wide = make_shape("Wide", 1, CPU=64)
    bench.define(wide)
    bench.create_actor(wide)
    assert bench.of(a.Warn)
    assert not bench.of(a.ActorDown)


def test_a_constructor_that_raises_is_not_repeated() -> None:
    bench = node()
    spec = bench.create_actor(ACTOR, max_restarts=-1)
    waiting = calls(bench, 2)
    send(bench, spec, waiting)
    found = bench.tell(e.ActorConstructionFailed(bench.of(a.BeginActor)[0].worker, spec.creation.id, b"packed"))
    down = kinds(found, a.ActorDown)[0]
    assert (down.kind, down.next, down.fields["error"], down.fields["cause"]) == (
        "ActorDiedError",
        False,
        b"packed",
        "INIT_FAILED",
    )
    assert [x.task for x in kinds(found, a.SealError)] == [call.id for call in waiting]
    assert kinds(found, a.KillWorker)
    bench.die(bench.of(a.BeginActor)[0].worker, claimed=[])
    assert bench.machine.available() == {"CPU": 2.0}


def test_starts_that_fail_are_repeated_and_then_given_up() -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0), CPU=1)
    bench.define(ACTOR)
    spec = bench.create_actor(ACTOR)
    for _ in range(5):
        bench.tell(e.WorkerStartFailed(bench.of(a.StartWorker)[-1].worker, "no memory"))
        bench.tick(6.0)
    down = bench.of(a.ActorDown)
    assert [(x.actor, x.next, x.fields["never_started"]) for x in down] == [(spec.creation.id, False, True)]
    assert len(bench.of(a.StartWorker)) == 5


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_are_unique_within_a_namespace() -> None:
    bench = node()
    first = bench.create_actor(ACTOR, name="n", namespace="a", reply=b"1" * 16)
    second = bench.create_actor(ACTOR, name="n", namespace="a", reply=b"2" * 16)
    third = bench.create_actor(ACTOR, name="n", namespace="b", reply=b"3" * 16)
    fourth = bench.create_actor(ACTOR, name="n", namespace="a", reply=b"4" * 16, get_if_exists=True)
    answers = {x.reply[:1]: (x.value, x.error and x.error[0]) for x in bench.of(a.SealReply)}
    assert answers == {
        b"1": (first.creation.id, None),
        b"2": (None, "ValueError"),
        b"3": (third.creation.id, None),
        b"4": (first.creation.id, None),
    }
    assert {x.actor for x in bench.of(a.ActorDown)} == {second.creation.id, fourth.creation.id}
    found = send(bench, second, calls(bench, 1))
    assert "is taken" in str(kinds(found, a.SealError)[0].fields["message"])


def test_a_name_is_free_when_its_bearer_dies() -> None:
    bench = node()
    first, worker = living(bench, name="n")
    bench.tell(e.ActorLookup("n", "", b"l" * 16))
    assert bench.of(a.SealReply)[-1].value == first
    bench.tell(e.ActorKill(first.creation.id, True))
    bench.tell(e.ActorLookup("n", "", b"m" * 16))
    assert bench.of(a.SealReply)[-1].error is not None
    second = bench.create_actor(ACTOR, name="n", reply=b"2" * 16)
    assert bench.of(a.SealReply)[-1].value == second.creation.id
    bench.die(worker, claimed=[])
    bench.tell(e.ActorLookup("n", "", b"o" * 16))
    assert bench.of(a.SealReply)[-1].value == second


def test_a_restarting_actor_keeps_its_name() -> None:
    bench = node()
    spec, worker = living(bench, name="n", max_restarts=1)
    bench.die(worker, claimed=[])
    bench.tell(e.ActorLookup("n", "", b"l" * 16))
    assert bench.of(a.SealReply)[-1].value == spec


# -- calls -------------------------------------------------------------------------------------------------------------


def test_calls_wait_until_it_lives_and_go_ahead_of_those_that_can_be_made_then() -> None:
    bench = node()
    spec = bench.create_actor(ACTOR)
    first, second = calls(bench, 2), calls(bench, 1, 3)
    send(bench, spec, first)
    send(bench, spec, second)
    found = bench.tell(e.ActorConstructed(bench.of(a.BeginActor)[0].worker, 102, spec.creation.id))
    order = [x for x in found if isinstance(x, (a.ActorAlive, a.ForwardCalls))]
    assert [type(x) for x in order] == [a.ForwardCalls, a.ForwardCalls, a.ActorAlive]
    assert [x.calls for x in kinds(found, a.ForwardCalls)] == [first, second]
    assert kinds(send(bench, spec, calls(bench, 1, 4)), a.ForwardCalls), "a straggler"


def test_a_death_with_restarts_left() -> None:
    bench = node()
    _, worker = living(bench, max_restarts=1, max_task_retries=1)
    ran, waited, used = calls(bench, 3)
    used.attempt = 1
    found = bench.die(worker, claimed=[ran], orphans=[ran, waited, used])
    down = kinds(found, a.ActorDown)[0]
    assert (down.incarnation, down.next, down.kind, down.fields["cause"]) == (
        0,
        True,
        "ActorUnavailableError",
        "SIGKILL",
    )
    assert [x.task for x in kinds(found, a.Reopen)] == [ran], "the other never ran"
    assert [(x.task, x.kind) for x in kinds(found, a.SealError)] == [(used.id, "ActorUnavailableError")]
    bench.start_all()
    begun = bench.of(a.BeginActor)[-1]
    assert (begun.incarnation, begun.replay) == (1, [ran, waited])
    found = bench.die(begun.worker, claimed=[waited], orphans=[waited, ran])
    assert kinds(found, a.ActorDown)[0].next is False
    assert {x.task for x in kinds(found, a.SealError)} == {ran.id, waited.id}
    assert {x.kind for x in kinds(found, a.SealError)} == {"ActorDiedError"}


def test_calls_without_retries_fail_but_the_actor_comes_back() -> None:
    bench = node()
    spec, worker = living(bench, max_restarts=-1)
    lost = calls(bench, 2)
    found = bench.die(worker, claimed=[lost[0]], orphans=lost)
    assert {x.kind for x in kinds(found, a.SealError)} == {"ActorUnavailableError"}
    later = calls(bench, 1)
    send(bench, spec, later, incarnation=1)
    bench.start_all()
    again = bench.of(a.BeginActor)[-1].worker
    found = bench.tell(e.ActorConstructed(again, 100 + again, spec.creation.id))
    assert [(x.incarnation, x.calls) for x in kinds(found, a.ForwardCalls)] == [(1, later)]


def test_calls_kept_for_an_incarnation_that_never_lived_go_first_to_the_next() -> None:
    bench = node()
    spec = bench.create_actor(ACTOR, max_restarts=1)
    kept = calls(bench, 2)
    send(bench, spec, kept)
    bench.die(bench.of(a.BeginActor)[0].worker, -11, claimed=[])
    newer = calls(bench, 1)
    send(bench, spec, newer, incarnation=1)
    bench.start_all()
    begun = bench.of(a.BeginActor)[-1]
    assert begun.replay == kept
    found = bench.tell(e.ActorConstructed(begun.worker, 1, spec.creation.id))
    assert [x.calls for x in kinds(found, a.ForwardCalls)] == [newer]


def test_replayed_calls_that_never_ran_stay_ahead_when_the_next_incarnation_dies_too() -> None:
    bench = node()
    spec = bench.create_actor(ACTOR, max_restarts=5, max_task_retries=1)
    kept = calls(bench, 3, sequence=7)
    send(bench, spec, kept)
    bench.die(bench.of(a.BeginActor)[0].worker, claimed=[])
    bench.start_all()
    worker = bench.of(a.BeginActor)[-1].worker
    bench.tell(e.ActorConstructed(worker, 1, spec.creation.id))
    direct = calls(bench, 2)
    bench.die(worker, claimed=[kept[0]], orphans=[*direct, *kept])
    bench.start_all()
    assert bench.of(a.BeginActor)[-1].replay == [*kept, *direct]


def test_a_call_for_an_incarnation_long_gone_is_delivered_outside_of_the_numbering() -> None:
    bench = node()
    spec, worker = living(bench, max_restarts=2)
    bench.die(worker, claimed=[])
    bench.start_all()
    again = bench.of(a.BeginActor)[-1].worker
    bench.tell(e.ActorConstructed(again, 1, spec.creation.id))
    late = calls(bench, 1, sequence=9)
    found = kinds(send(bench, spec, late, incarnation=0), a.ForwardCalls)
    assert [(x.incarnation, x.calls[0].sequence) for x in found] == [(1, 0)]


def test_a_call_ahead_of_the_news_waits() -> None:
    bench = node()
    spec, worker = living(bench, max_restarts=1)
    early = calls(bench, 1)
    assert not send(bench, spec, early, incarnation=1)
    bench.die(worker, claimed=[])
    bench.start_all()
    again = bench.of(a.BeginActor)[-1].worker
    found = bench.tell(e.ActorConstructed(again, 1, spec.creation.id))
    assert [x.calls for x in kinds(found, a.ForwardCalls)] == [early]


def test_callers_of_the_dead_and_of_the_unknown_are_answered() -> None:
    bench = node()
    spec, worker = living(bench)
    bench.die(worker, 3, claimed=[])
    found = send(bench, spec, calls(bench, 1))
    assert [(x.kind, x.fields["cause"]) for x in kinds(found, a.SealError)] == [("ActorDiedError", "EXIT(3)")]
    found = bench.tell(e.ActorCallsQueued(CALLER, 1, b"nobody" + bytes(10), 0, calls(bench, 1)))
    assert [x.kind for x in kinds(found, a.SealError)] == ["ActorDiedError"]


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_restart", [True, False])
def test_killed(no_restart: bool) -> None:
    bench = node()
    spec, worker = living(bench, max_restarts=1)
    found = bench.tell(e.ActorKill(spec.creation.id, no_restart))
    assert [x.worker for x in kinds(found, a.KillWorker)] == [worker]
    down = kinds(bench.die(worker, claimed=[]), a.ActorDown)[0]
    assert (down.next, down.fields["cause"]) == (not no_restart, "KILLED")
    bench.start_all()
    assert len(bench.of(a.BeginActor)) == (1 if no_restart else 2)


@pytest.mark.parametrize("state", ["waiting", "queued", "starting", "constructing"])
def test_killed_before_it_lives(state: str) -> None:
    bench = Bench(SchedulerConfig(debug=True, prestart=0), CPU=1)
    bench.define(F, ACTOR)
    if state == "queued":
        bench.submit(1, F)
        bench.start_all()
    spec = bench.create_actor(ACTOR, (b"x" * 16,) if state == "waiting" else (), max_restarts=3)
    if state == "constructing":
        bench.start_all()
    found = bench.tell(e.ActorKill(spec.creation.id, True))
    for action in kinds(found, a.KillWorker):
        bench.die(action.worker, claimed=[])
    assert [(x.actor, x.next) for x in bench.of(a.ActorDown)] == [(spec.creation.id, False)]
    bench.tell(e.ObjectsReady([b"x" * 16]))
    bench.start_all()
    assert not bench.machine.node.actors.actors


def test_without_handles_it_ends_when_it_is_done() -> None:
    bench = node()
    spec, worker = living(bench, max_restarts=3)
    found = bench.tell(e.ActorUnreferenced(spec.creation.id))
    assert [x.worker for x in kinds(found, a.EndActor)] == [worker]
    assert not kinds(bench.tick(5.5, busy=(worker,)), a.KillWorker), "it has calls to answer"
    bench.tell(e.ActorLeft(worker, spec.creation.id))
    found = bench.die(worker, 0, claimed=[])
    assert [(x.next, x.fields["cause"]) for x in kinds(found, a.ActorDown)] == [(False, "HANDLES_GONE")]


def test_one_that_does_not_go_is_killed() -> None:
    bench = node()
    spec, worker = living(bench)
    bench.tell(e.ActorUnreferenced(spec.creation.id))
    assert [x.worker for x in kinds(bench.tick(5.1), a.KillWorker)] == [worker]


def test_one_that_said_good_bye_and_stays_is_killed() -> None:
    bench = node()
    spec, worker = living(bench)
    bench.tell(e.ActorLeft(worker, spec.creation.id))
    assert [x.worker for x in kinds(bench.tick(5.1, busy=(worker,)), a.KillWorker)] == [worker]
    found = bench.die(worker, claimed=[])
    assert [x.fields["cause"] for x in kinds(found, a.ActorDown)] == ["EXIT_ACTOR"]


def test_handles_that_go_before_it_lives() -> None:
    bench = node(CPU=1)
    bench.submit(1, F)
    unused, used = bench.create_actor(ACTOR), bench.create_actor(ACTOR)
    send(bench, used, calls(bench, 1))
    for spec in (unused, used):
        bench.tell(e.ActorUnreferenced(spec.creation.id))
    bench.tick(0.2)
    assert [x.actor for x in bench.of(a.ActorDown)] == [unused.creation.id]
    bench.finish(1)
    bench.start_all()
    worker = bench.of(a.BeginActor)[0].worker
    found = bench.tell(e.ActorConstructed(worker, 1, used.creation.id))
    assert [type(x) for x in found if isinstance(x, (a.ForwardCalls, a.EndActor))] == [a.ForwardCalls, a.EndActor]


def test_detached_actors_outlive_handles_and_jobs() -> None:
    bench = node()
    spec, worker = living(bench, detached=True, name="d", max_restarts=1)
    other, other_worker = living(bench)
    bench.tell(e.ActorUnreferenced(spec.creation.id))
    found = bench.tell(e.JobEnded(1, "bye"))
    killed = {x.worker for x in kinds(found, a.KillWorker)}
    assert other_worker in killed
    assert worker not in killed
    for number in killed:
        bench.die(number, claimed=[])
    assert [x.actor for x in bench.of(a.ActorDown)] == [other.creation.id]
    assert not bench.of(a.ForgetShapes), "it may have to be made again"
    bench.die(worker, claimed=[])
    bench.start_all()
    again = bench.of(a.BeginActor)[-1]
    assert (again.spec, again.incarnation) == (spec, 1)
    bench.tell(e.ActorKill(spec.creation.id, True))
    bench.die(again.worker, claimed=[])
    assert bench.of(a.ForgetShapes)
    assert not bench.machine.node.jobs.jobs


def test_a_waiting_actor_lends_its_cpu() -> None:
    bench = node(CPU=1)
    one_cpu = resources.pack(resources.parse({"CPU": 1}))
    _, worker = living(bench, running_resources=one_cpu)
    bench.submit(1, F)
    bench.start_all()
    assert not bench.of(a.RunOn)
    bench.tell(e.WorkerBlocked(worker))
    bench.start_all()
    assert bench.of(a.RunOn)


# -- the table of moves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), list(itertools.product(range(len(STATE_NAMES)), repeat=2)))
def test_only_moves_of_the_table_are_made(old: int, new: int) -> None:
    job = Job(JobSpec(1, b"j" * 16, 1, "", [], ""), 1)
    ledger = Ledger({"CPU": 1})
    actor = ActorRecord(
        ActorSpec(TaskSpec(b"a" * 16, ACTOR.key), 1), job, ShapeState(ACTOR, ledger.demand(b"")), ledger.demand(b"")
    )
    table = ActorTable()
    table.actors[actor.id] = actor
    actor.state = old
    if STATE_NAMES[old] == "QUEUED":
        table.queued[actor.id] = actor
    if (old, new) in MOVES:
        table.move(actor, new)
        assert actor.state == new
        assert (actor.id in table.queued) == (STATE_NAMES[new] == "QUEUED")
    else:
        with pytest.raises(IllegalMove, match=STATE_NAMES[new]):
            table.move(actor, new)


# -- called over lanes -------------------------------------------------------------------------------------------------

LANE = LANE_BIT | 5


def send_of_lane(bench: Bench, spec: ActorSpec, found: list[TaskSpec], incarnation: int, sent: bool) -> list[a.Action]:
    """Calls of a caller on another node, who numbers them in a lane, that come through the brokers."""
    tag = LaneTag(LANE, incarnation, sent)
    return bench.tell(e.ActorCallsQueued(0, 1, spec.creation.id, 0, found, tag))


@pytest.mark.parametrize("sent", [False, True])
def test_calls_of_a_lane_keep_their_numbers(sent: bool) -> None:
    bench = node()
    spec, worker = living(bench)
    found = calls(bench, 2, sequence=7)
    [forwarded] = kinds(send_of_lane(bench, spec, found, 0, sent), a.ForwardCalls)
    assert (forwarded.worker, forwarded.process, forwarded.incarnation) == (worker, LANE, 0)
    assert [call.sequence for call in forwarded.calls] == [7, 8]


def _restarted(bench: Bench, **options: Any) -> ActorSpec:
    spec, worker = living(bench, max_restarts=-1, **options)
    bench.die(worker, claimed=[])
    bench.start_all()
    again = bench.of(a.BeginActor)[-1].worker
    bench.tell(e.ActorConstructed(again, 1, spec.creation.id))
    return spec


def test_calls_of_a_lane_to_an_incarnation_that_is_gone_are_outside_of_the_numbering() -> None:
    bench = node()
    spec = _restarted(bench)
    found = calls(bench, 2, sequence=7)
    [forwarded] = kinds(send_of_lane(bench, spec, found, 0, False), a.ForwardCalls)
    assert (forwarded.process, forwarded.incarnation) == (0, 1)
    assert [call.sequence for call in forwarded.calls] == [0, 0]


def test_what_it_may_have_run_is_not_run_again_without_retries() -> None:
    bench = node()
    spec = _restarted(bench)
    found = calls(bench, 2, sequence=7)
    actions = send_of_lane(bench, spec, found, 0, True)
    assert not kinds(actions, a.ForwardCalls)
    assert [(x.task, x.kind) for x in kinds(actions, a.SealError)] == [
        (call.id, "ActorUnavailableError") for call in found
    ]


def test_what_it_may_have_run_costs_a_retry() -> None:
    bench = node()
    spec = _restarted(bench, max_task_retries=1)
    found = calls(bench, 2, sequence=7)
    found[1].attempt = 1
    actions = send_of_lane(bench, spec, found, 0, True)
    assert [x.task for x in kinds(actions, a.SealError)] == [found[1].id]
    assert [x.task for x in kinds(actions, a.Reopen)] == [found[0]]
    assert [x.calls for x in kinds(actions, a.ForwardCalls)] == [[found[0]]]


def test_calls_of_a_lane_to_the_dead_learn_why() -> None:
    bench = node()
    spec, worker = living(bench)
    bench.die(worker, claimed=[])
    found = calls(bench, 1, sequence=7)
    errors = kinds(send_of_lane(bench, spec, found, 0, True), a.SealError)
    assert [(x.task, x.kind) for x in errors] == [(found[0].id, "ActorDiedError")]
