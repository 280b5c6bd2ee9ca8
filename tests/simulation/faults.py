"""Faults to plant in the scheduler machine, one at a time: mistakes that such machines are prone to.

Each replaces one method of one machine. `test_faults` demands that the simulation finds each of them. Does not cover
the store and the processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zray import wire
from zray.broker import actions
from zray.broker.actor_events import ActorEvents
from zray.broker.actor_table import DEAD, QUEUED, ActorRecord, ActorTable
from zray.broker.cancelling import Canceller
from zray.broker.dependencies import Dependencies, Waiting
from zray.broker.dispatch import Dispatcher
from zray.broker.ledger import Demand, Ledger
from zray.broker.node import Node
from zray.broker.scheduler import Scheduler
from zray.broker.task_events import TaskEvents
from zray.broker.task_table import ShapeState, Shared, TaskQueue, TaskTable
from zray.broker.worker_pool import IDLE, Worker, WorkerPool

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Plant] = {}


def fault(plant: Plant) -> Plant:
    """Enter a fault under its name."""
    FAULTS[plant.__name__] = plant
    return plant


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method by what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def without(kind: type[actions.Action]) -> Callable[[Any], Any]:
    """Of a method of Node or with a node: the same, but actions of this kind are lost."""

    def make(original: Any) -> Any:
        def method(self: Any, *args: Any) -> Any:
            node = self if isinstance(self, Node) else self.node
            before = len(node.out)
            answer = original(self, *args)
            node.out[before:] = [action for action in node.out[before:] if type(action) is not kind]
            return answer

        return method

    return make


# -- resources ---------------------------------------------------------------------------------------------------------


@fault
def resources_are_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "give_back", lambda self, demand, gpus=(): None)


@fault
def lent_cpu_is_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "take_back", lambda self, demand: None)


@fault
def cpu_of_waiting_workers_is_not_lent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Node, "lend", lambda self, worker: None)


@fault
def the_gpu_part_of_what_waiting_workers_hold_is_lent_too(patch: pytest.MonkeyPatch) -> None:
    def lend(self: Ledger, demand: Demand) -> None:
        for name, amount in demand.items:
            self.available[name] += amount

    patch.setattr(Ledger, "lend", lend)


@fault
def a_new_process_is_bound_to_gpus_without_looking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "choose_gpus", lambda self, demand: tuple(range(demand.gpu_count())))
    patch.setattr(Ledger, "suits", lambda self, demand, gpus: len(gpus) == demand.gpu_count())


# -- tasks -------------------------------------------------------------------------------------------------------------


@fault
def a_retry_is_queued_under_the_old_attempt(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, TaskEvents, "_retry", without(actions.Reopen))


@fault
def retries_have_no_limit(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def init(self: Any, shape: Any, demand: Any) -> None:
            original(self, shape, demand)
            self.max_retries = -1

        return init

    wrap(patch, ShapeState, "__init__", make)


@fault
def a_death_costs_every_task_of_the_worker_a_retry(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def recover(self: Any, worker: Worker, claimed: Any, kind: str, fields: Any) -> None:
            original(self, worker, [spec.id for spec in worker.handed], kind, fields)

        return recover

    wrap(patch, TaskEvents, "recover_handed", make)


@fault
def tasks_behind_the_one_that_died_are_lost(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def recover(self: Any, worker: Worker, claimed: Any, kind: str, fields: Any) -> None:
            while len(worker.handed) > 1:
                worker.handed.pop()
            original(self, worker, claimed, kind, fields)

        return recover

    wrap(patch, TaskEvents, "recover_handed", make)


@fault
def tasks_behind_a_waiting_one_stay_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskTable, "offer", lambda self, worker, specs: 0)
    patch.setattr(Dispatcher, "_share_out", lambda self, now: None)


@fault
def copies_of_an_ended_task_are_not_counted_as_ghosts(patch: pytest.MonkeyPatch) -> None:
    def abandon(self: TaskTable, task: bytes, home: Any, by: Any) -> None:
        if type(home) is Shared and home.queue is not None:
            home.queue.shared -= 1
            self.drop(home.queue, task)
        elif type(home) is TaskQueue:
            self.drop(home, task)

    patch.setattr(TaskTable, "_abandon", abandon)


@fault
def a_skipped_copy_ends_the_task(patch: pytest.MonkeyPatch) -> None:
    def withdraw(self: TaskTable, worker: Worker, task: bytes) -> bool:
        return False

    patch.setattr(TaskTable, "withdraw", withdraw)


@fault
def an_ended_task_stays_in_its_queue(patch: pytest.MonkeyPatch) -> None:
    def drop(self: TaskTable, queue: TaskQueue, task: bytes) -> None:
        self._shrink(queue, 1)

    patch.setattr(TaskTable, "drop", drop)


@fault
def the_report_of_a_dead_worker_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskEvents, "_late_report", lambda self, event: None)

    def not_ended(self: Any, worker: Worker, spec: Any, status: int) -> None:
        if status == wire.DONE_SKIPPED and not self.node.tasks.withdraw(worker, spec.id):
            self.node.tasks.home.pop(spec.id, None)
            self.node.tasks.requeue(worker.job.queues[spec.shape], spec)

    patch.setattr(TaskEvents, "_not_ended", not_ended)


@fault
def a_task_runs_when_the_first_of_its_arguments_is_there(patch: pytest.MonkeyPatch) -> None:
    def ready(self: Dependencies, object_id: bytes) -> list[Waiting]:
        free = []
        for waiting in self.waiters.pop(object_id, ()):
            if waiting.left > 0:
                waiting.left = 0
                free.append(waiting)
        return free

    patch.setattr(Dependencies, "ready", ready)


@fault
def a_notice_that_died_with_its_sender_is_not_missed(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Scheduler, "_tick", without(actions.WatchObjects))


@fault
def a_cancelled_task_is_only_forgotten(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Canceller, "_end_cancelled", without(actions.SealError))


@fault
def nobody_interrupts_a_cancelled_task(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Canceller, "_cancel_handed", without(actions.InterruptTask))


@fault
def a_cancelled_task_stays_in_the_table(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Canceller, "_end_cancelled", lambda self, task, shape: self.node.seal(task, shape, "TaskCancelledError", {})
    )


# -- workers and leases ------------------------------------------------------------------------------------------------


@fault
def a_lease_is_taken_back_without_raising_its_epoch(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Node, "end_lease", without(actions.RevokeLease))


@fault
def a_worker_is_free_before_its_last_direct_call_ends(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def tick(self: Any, busy: frozenset[int], now: float) -> None:
            original(self, frozenset(), now)

        return tick

    wrap(patch, Scheduler, "_tick_leases", make)


@fault
def direct_calls_of_a_dead_worker_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskEvents, "recover_orphans", lambda self, worker, event, kind, fields: None)


@fault
def a_dead_worker_keeps_what_it_held(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def bury(self: Any, worker: Worker, now: float) -> None:
            worker.held = None
            original(self, worker, now)

        return bury

    wrap(patch, Scheduler, "_bury", make)


@fault
def workers_of_an_ended_job_live_on(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def kill(self: Node, worker: Worker, doom: str) -> None:
            if doom != "JOB_ENDED" or worker.state != IDLE:
                original(self, worker, doom)

        return kill

    wrap(patch, Node, "kill_worker", make)


@fault
def a_worker_of_another_job_is_used(patch: pytest.MonkeyPatch) -> None:
    def idle_for(self: Any, job: Any, demand: Demand, ledger: Ledger) -> Worker | None:
        for group in self.idle.values():
            for worker in group.values():
                return worker  # type: ignore[no-any-return]
        return None

    patch.setattr(WorkerPool, "idle_for", idle_for)


# -- actors ------------------------------------------------------------------------------------------------------------


@fault
def a_restarted_actor_keeps_its_incarnation(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def lost(self: Any, actor: ActorRecord, *args: Any) -> None:
            before = actor.incarnation
            original(self, actor, *args)
            actor.incarnation = before

        return lost

    wrap(patch, ActorTable, "process_lost", make)


@fault
def restarts_have_no_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ActorTable, "may_restart", lambda self, actor: not actor.verdict and not actor.job.ended)


@fault
def calls_that_were_under_way_are_run_again_without_leave(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def lost(self: Any, actor: ActorRecord, cause: str, status: int, orphans: Any, claimed: Any, out: Any) -> None:
            if self.may_restart(actor):
                out.extend(actions.Reopen(spec, -1) for spec in orphans)
                actor.replay.extend(orphans)
                orphans = []
            original(self, actor, cause, status, orphans, claimed, out)

        return lost

    wrap(patch, ActorTable, "process_lost", make)


@fault
def calls_are_replayed_in_reverse(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def begin(self: Any, actor: ActorRecord, worker: Worker, out: Any) -> None:
            actor.replay.reverse()
            original(self, actor, worker, out)

        return begin

    wrap(patch, ActorTable, "begin", make)


@fault
def calls_kept_for_an_incarnation_that_failed_are_dropped(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def begin(self: Any, actor: ActorRecord, worker: Worker, out: Any) -> None:
            for incarnation in list(actor.held):
                if incarnation < actor.incarnation:
                    del actor.held[incarnation]
            original(self, actor, worker, out)

        return begin

    wrap(patch, ActorTable, "begin", make)


@fault
def an_actor_is_replaced_before_its_process_is_gone(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def kill(self: Any, event: Any, now: float) -> None:
            actor = self.node.actors.actors.get(event.actor)
            original(self, event, now)
            if (
                actor is not None
                and actor.worker is not None
                and not actor.verdict
                and self.node.actors.may_restart(actor)
            ):
                actor.worker.actor = None
                actor.worker = None
                actor.incarnation += 1
                actor.restarts += 1
                self.node.actors.move(actor, QUEUED)

        return kill

    wrap(patch, ActorEvents, "kill", make)


@fault
def the_name_of_a_dead_actor_stays_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ActorTable, "_free_name", lambda self, actor: None)


@fault
def callers_of_a_dead_actor_get_no_answer(patch: pytest.MonkeyPatch) -> None:
    def calls(self: ActorTable, actor_id: bytes, process: int, incarnation: int, calls: Any, out: Any) -> None:
        if actor_id in self.actors:
            original(self, actor_id, process, incarnation, calls, out)

    original = ActorTable.calls
    patch.setattr(ActorTable, "calls", calls)


@fault
def an_actor_whose_process_could_not_be_started_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ActorTable, "start_lost", lambda self, actor, *args: self.move(actor, DEAD))
