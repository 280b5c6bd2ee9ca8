"""What events about tasks mean for the books of the node.

Covers submission, missing arguments, reported ends, retries, and what becomes of the tasks of a dead worker or an ended
job. Does not cover where tasks are (`task_table`), what runs next (`dispatch`) nor cancelling (`cancelling`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from zray import wire
from zray.broker import actions, events
from zray.broker.dependencies import Waiting
from zray.broker.refusals import refusal_text
from zray.broker.task_table import ShapeState, Shared, TaskQueue
from zray.broker.worker_pool import BUSY, Worker
from zray.ids import return_id

if TYPE_CHECKING:
    from zray.broker.actor_events import ActorEvents
    from zray.broker.dispatch import Dispatcher
    from zray.broker.jobs import Job
    from zray.broker.node import Node
    from zray.task import TaskSpec


class TaskEvents:
    """Handlers of the events that concern tasks."""

    __slots__ = ("_actors", "_dispatcher", "node")

    def __init__(self, node: Node, dispatcher: Dispatcher, actors: ActorEvents) -> None:
        self.node = node
        self._dispatcher = dispatcher
        self._actors = actors

    # -- submission ----------------------------------------------------------------------------------------------------

    def submitted(self, event: events.TasksSubmitted, now: float) -> None:
        node = self.node
        tasks = event.tasks
        job = node.jobs.jobs.get(event.job)
        if job is None or job.ended:
            for spec in tasks:
                self._refuse(spec, "TaskCancelledError", {"message": "The job of this task is over."})
            return
        if event.process != job.process:
            self._remember_children(job, event.process, event.parent, tasks)
        if event.missing is not None:
            tasks = self._set_waiting(job, tasks, event.missing)
        for spec in node.tasks.submit(job, tasks, not node.config.cluster_may_grow):
            self._refuse_submitted(spec)
        if node.tasks.newly_parked:
            self._warn_of_parked()
        if node.story is not None:
            for spec in event.tasks:
                node.story.tell(spec.id, f"{now:.6f} submitted by process {event.process}")

    def _set_waiting(self, job: Job, tasks: list[TaskSpec], missing: list[tuple[bytes, ...]]) -> list[TaskSpec]:
        """Put aside those that lack arguments; return the others."""
        node = self.node
        ready = []
        for index in range(len(tasks)):
            spec = tasks[index]
            shape = node.tasks.shapes.get(spec.shape)
            if not missing[index] or shape is None or not self._may_ever_run(shape):
                ready.append(spec)
            elif spec.id not in node.tasks.home:
                spec.shape = shape.key
                waiting = Waiting(spec, node.tasks.queue_for(job, shape), None, job.guest)
                node.tasks.home[spec.id] = waiting
                node.dependencies.add(waiting, missing[index])
        return ready

    def _may_ever_run(self, shape: ShapeState) -> bool:
        demand = shape.demand
        return demand.feasible or demand.patient or self.node.config.cluster_may_grow

    def _warn_of_parked(self) -> None:
        """Tell once for each kind of task that waits for the cluster to grow."""
        node = self.node
        if node.config.cluster_may_grow:
            for queue in node.tasks.newly_parked:
                if queue.shape.demand.patient:
                    continue
                text = self._why_never(queue.shape) + " It waits for a node that can."
                node.out.append(actions.Warn(queue.job.number, "infeasible " + queue.shape.key.hex(), text))
        node.tasks.newly_parked.clear()

    def _refuse_submitted(self, spec: TaskSpec) -> None:
        """A task that was not queued: its shape is unknown, or no node is large enough."""
        node = self.node
        shape = node.tasks.shapes.get(spec.shape)
        if shape is None:
            self._refuse(
                spec,
                "ZraySystemError",
                {"message": f"A task names shape {spec.shape.hex()}, which nobody has defined."},
            )
        else:
            node.seal(spec.id, shape, "TaskUnschedulableError", {"message": self._why_never(shape)})

    def _why_never(self, shape: ShapeState) -> str:
        return f"{shape.name} {self.node.ledger.why_never(shape.demand)}"

    def _refuse(self, spec: TaskSpec, kind: str, fields: dict[str, Any]) -> None:
        shape = self.node.tasks.shapes.get(spec.shape)
        if shape is not None:
            self.node.seal(spec.id, shape, kind, fields)
        else:
            self.node.out.append(
                actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, {"task_id": spec.id.hex(), **fields})
            )

    def _remember_children(self, job: Job, process: int, parent: bytes, tasks: list[TaskSpec]) -> None:
        """Keep which unfinished task submitted these, so that they can be cancelled with it. Calls of actors are no
        tasks of the table: not kept."""
        worker = self.node.by_process.get(process)
        if worker is None or worker.actor is not None:
            return
        children = job.children.get(parent)
        if children is None:
            children = job.children[parent] = []
            job.children_limit[parent] = 64
        children.extend(spec.id for spec in tasks)
        if len(children) > job.children_limit[parent]:
            home = self.node.tasks.home
            new = {spec.id for spec in tasks}
            children[:] = [task for task in children if task in home or task in new]
            job.children_limit[parent] = max(64, 2 * len(children))

    def objects_ready(self, event: events.ObjectsReady, now: float) -> None:
        self._wake(event.ids)

    def objects_made(self, event: events.ObjectsMade, now: float) -> None:
        for object_id in event.ids:
            for waiting in self.node.dependencies.made(object_id):
                if waiting.queue is not None:
                    self.node.tasks.enqueue(waiting.queue, waiting.spec)

    def objects_lost(self, event: events.ObjectsLost, now: float) -> None:
        """Slots of other nodes whose tasks wait for what is lost give back what they hold: the task that makes it again may need that very place.
        They get nothing more."""
        lost = set(event.ids)
        for slot in list(self.node.pool.slots()):
            if slot.held is not None and any(dep in lost for spec in slot.handed for dep in spec.deps):
                self.node.vacate(slot)
                slot.blocked = True

    def _wake(self, objects: list[bytes]) -> None:
        node = self.node
        for object_id in objects:
            for waiting in node.dependencies.ready(object_id):
                if waiting.actor is not None:
                    self._actors.arguments_ready(waiting.actor)
                elif waiting.queue is not None and waiting.fetching:
                    node.tasks.requeue(waiting.queue, waiting.spec)
                elif waiting.queue is not None:
                    node.tasks.enqueue(waiting.queue, waiting.spec)

    def wake_after_errors(self, out: list[actions.Action]) -> None:
        """Errors that are sealed in answer to this event are results too: who waits for them may go (and find out)."""
        waiters = self.node.dependencies.waiters
        ready: list[bytes] = []
        for action in out:
            if type(action) is actions.SealError:
                ready.extend(_results(action.task, action.num_returns, waiters))
            elif type(action) is actions.SealErrors:
                for task in action.tasks:
                    ready.extend(_results(task, action.num_returns, waiters))
            elif type(action) is actions.SealEntries:
                ready.extend(action.ids)
        if ready:
            self._wake(ready)

    # -- demands that can never be met ---------------------------------------------------------------------------------

    def refuse_one(self, spec: TaskSpec, shape: ShapeState) -> None:
        """A task whose demand was refused ends."""
        kind, text = _refusal(shape)
        self.node.interrupted.discard(spec.id)
        self.node.seal(spec.id, shape, kind, {"message": text})

    def refuse_stranded(self) -> None:
        """All that is queued with a refused demand ends."""
        node = self.node
        tasks = node.tasks
        while tasks.stranded:
            queue = tasks.stranded.pop()
            ended = [spec.id for spec in queue.specs if tasks.home.get(spec.id) is queue]
            for task in ended:
                tasks.end(task, None)
                node.interrupted.discard(task)
            if ended:
                kind, text = _refusal(queue.shape)
                fields: dict[str, object] = {"function_name": queue.shape.name, "message": text}
                node.out.append(actions.SealErrors(ended, queue.shape.num_returns, kind, fields))

    # -- ends ----------------------------------------------------------------------------------------------------------

    def finished(self, event: events.TasksFinished, now: float) -> None:
        node = self.node
        worker = node.pool.workers.get(event.worker)
        if worker is None:
            self._late_report(event)
            return
        home = node.tasks.home
        handed = worker.handed
        ids = event.ids
        statuses = event.statuses
        children = worker.job.children
        total = 0.0
        count = 0
        for index in range(len(ids)):
            task = ids[index]
            status = statuses[index]
            spec: TaskSpec | None = None
            if handed:
                spec = handed[0]
                if spec.id == task:
                    handed.popleft()
                else:
                    spec = _pick(handed, task)
            if children and task in children:
                self._forget_children(worker.job, task)
            if status != wire.DONE_SKIPPED and status != wire.DONE_RETRY:
                total += event.micros[index]
                count += 1
                if spec is not None and home.get(task) is worker:
                    del home[task]
                else:
                    self._ended_with_copies(worker, task, spec)
            elif spec is not None:
                self._not_ended(worker, spec, status)
            if self.node.interrupted:
                self._settle_interrupt(task)
        worker.since = worker.last_used = now
        if count:
            place = worker.peer or node.ledger
            place.full_since = -1.0
            if worker.peer is None:
                place.task_seconds += (total * 1e-6 / count - place.task_seconds) * (count / (count + 16.0))
            worker.job.served += total
            if worker.queue is not None:
                worker.queue.shape.observe(total, count)
        if worker.state == BUSY:
            if not handed:
                node.release(worker, now)
            else:
                self._dispatcher.top_up(worker, now)

    def _settle_interrupt(self, task: bytes) -> None:
        if task not in self.node.tasks.home:
            self.node.interrupted.discard(task)

    def _late_report(self, event: events.TasksFinished) -> None:
        """The report of a worker whose exit is known: what it says has ended has ended, whatever was decided at its
        death."""
        for index in range(len(event.ids)):
            if event.statuses[index] != wire.DONE_SKIPPED and event.statuses[index] != wire.DONE_RETRY:
                self.node.tasks.end(event.ids[index], None)
                self._settle_interrupt(event.ids[index])

    def _forget_children(self, job: Job, task: bytes) -> None:
        job.children.pop(task, None)
        job.children_limit.pop(task, None)

    def _ended_with_copies(self, worker: Worker, task: bytes, spec: TaskSpec | None) -> None:
        """An end of which the table may not know that this worker could bring it about: a shared task, a ghost, or a
        call it got directly."""
        tasks = self.node.tasks
        if spec is not None and not tasks.counts(worker, task):
            worker.ghosts -= 1
            tasks.end(task, None)  # superseded here, but the store accepted it: then it is the end
        else:
            tasks.end(task, worker if spec is not None else None)

    def _not_ended(self, worker: Worker, spec: TaskSpec, status: int) -> None:
        """A copy that was not run to an end: skipped, or to be tried again."""
        tasks = self.node.tasks
        if not tasks.counts(worker, spec.id):
            worker.ghosts -= 1
        elif status == wire.DONE_SKIPPED:
            if tasks.withdraw(worker, spec.id):
                tasks.refused(spec)
            else:
                # No other copy is left, yet somebody had claimed it: that worker sealed it and died before it could say
                # so.
                tasks.home.pop(spec.id, None)
        else:
            self._retry(spec, worker, "ZraySystemError", {"message": "retry_exceptions: no retry was left"})

    def _retry(self, spec: TaskSpec, by: Worker, kind: str, fields: dict[str, Any]) -> None:
        """An execution failed and costs a retry: run it again, or seal the error."""
        node = self.node
        home = node.tasks.home.get(spec.id)
        if home is by or home is None:
            node.tasks.home.pop(spec.id, None)
        else:
            node.tasks.end(spec.id, by)
        queue = by.job.queues.get(spec.shape)
        if queue is None or by.job.ended:
            self.node.interrupted.discard(spec.id)
            self._refuse(spec, kind, fields)
            return
        shape = queue.shape
        if spec.id in self.node.interrupted:
            self.node.interrupted.discard(spec.id)
            node.seal(spec.id, shape, "TaskCancelledError", {})
        elif shape.demand.refusal is not None:
            self.refuse_one(spec, shape)
        elif shape.max_retries < 0 or spec.attempt < shape.max_retries:
            node.out.append(actions.Reopen(spec, shape.num_returns))
            node.tasks.requeue(queue, spec)
        else:
            node.seal(spec.id, shape, kind, fields)

    def recover_handed(self, worker: Worker, claimed: list[bytes] | None, kind: str, fields: dict[str, Any]) -> None:
        """What a dead worker had been handed: what it was running costs a retry, the rest is queued again as it was."""
        tasks = self.node.tasks
        handed = list(worker.handed)
        worker.handed.clear()
        if claimed is None:
            first = next((spec.id for spec in handed if tasks.counts(worker, spec.id)), None)
            ran = set() if first is None else {first}
        else:
            ran = set(claimed)
        worker.ghosts = 0
        untouched = []
        for spec in handed:
            counts = tasks.counts(worker, spec.id)
            if spec.id in ran and (counts or claimed is not None):
                self._retry(spec, worker, kind, fields)
            elif counts:
                if not tasks.withdraw(worker, spec.id):
                    untouched.append(spec)
                else:
                    for other in tasks.holders(spec.id)[:1]:
                        tasks.offer(other, [spec])
        for spec in reversed(untouched):
            queue = worker.job.queues.get(spec.shape)
            if queue is not None and not worker.job.ended:
                tasks.home.pop(spec.id, None)
                tasks.requeue(queue, spec)

    def recover_orphans(self, worker: Worker, event: events.WorkerExited, kind: str, fields: dict[str, Any]) -> None:
        """Calls that went straight to a leased worker go through the queue from now on."""
        node = self.node
        job = worker.job
        for spec in event.orphans:
            ran = event.claimed is None or spec.id in event.claimed
            shape = node.tasks.shapes.get(spec.shape)
            if shape is None or job.ended or spec.id in node.tasks.home:
                if spec.id not in node.tasks.home:
                    self._refuse(spec, kind, fields)
                continue
            spec.shape = shape.key
            cancelled = spec.id in self.node.interrupted
            self.node.interrupted.discard(spec.id)
            if cancelled or worker.doom == "CANCELLED":
                node.seal(spec.id, shape, "TaskCancelledError", {})
            elif shape.demand.refusal is not None:
                self.refuse_one(spec, shape)
            elif not ran or shape.max_retries < 0 or spec.attempt < shape.max_retries:
                node.out.append(actions.Reopen(spec, shape.num_returns))
                node.tasks.requeue(node.tasks.queue_for(job, shape), spec)
            else:
                node.seal(spec.id, shape, kind, fields)

    def end_all(self, job: Job, kind: str, fields: dict[str, Any]) -> None:
        """End every unfinished task of a job."""
        node = self.node
        ended: dict[bytes, list[bytes]] = {}
        for task, home in list(node.tasks.home.items()):
            if type(home) is TaskQueue:
                queue: TaskQueue | None = home
            elif type(home) is Waiting:
                queue = home.queue
            else:
                queue = self.queue_of(task)
            if queue is not None and queue.job is job:
                if type(home) is Waiting:
                    node.dependencies.forget(home)
                node.tasks.end(task, None)
                self.node.interrupted.discard(task)
                ended.setdefault(queue.shape.key, []).append(task)
        for key, tasks in ended.items():
            shape = node.tasks.shapes[key]
            node.out.append(actions.SealErrors(tasks, shape.num_returns, kind, {"function_name": shape.name, **fields}))
        job.children.clear()
        job.children_limit.clear()

    def queue_of(self, task: bytes) -> TaskQueue | None:
        """The queue from which a task came that workers have (None: its job is over)."""
        home = self.node.tasks.home.get(task)
        if type(home) is Shared:
            return home.workers[0].job.queues.get(home.spec.shape)
        if type(home) is Worker:
            for spec in home.handed:
                if spec.id == task:
                    return home.job.queues.get(spec.shape)
        return None

    def end_queued(self, job: Job, fields: dict[str, Any]) -> None:
        node = self.node
        for queue in job.queues.values():
            tasks = [spec.id for spec in queue.specs if node.tasks.home.get(spec.id) is queue]
            for task in tasks:
                node.tasks.end(task, None)
            if tasks:
                found = {"function_name": queue.shape.name, **fields}
                node.out.append(actions.SealErrors(tasks, queue.shape.num_returns, "WorkerCrashedError", found))


def _refusal(shape: ShapeState) -> tuple[str, str]:
    """Kind and text of the error of a task whose demand was refused."""
    assert shape.demand.refusal is not None
    gone = shape.demand.refusal[0] == "GROUP"
    return "TaskPlacementGroupRemoved" if gone else "TaskUnschedulableError", refusal_text(shape.name, shape.demand)


def _pick(handed: deque[TaskSpec], task: bytes) -> TaskSpec | None:
    """Take a task out of the middle of what a worker has (reports come in order, so this is rare); None when it is not
    there."""
    for index, spec in enumerate(handed):
        if spec.id == task:
            del handed[index]
            return spec
    return None


def _results(task: bytes, num_returns: int, waiters: dict[bytes, list[Waiting]]) -> list[bytes]:
    """The results of a task that somebody waits for; when it is not known how many there are, those from the first
    on."""
    found = []
    index = 0
    while index < num_returns or num_returns < 0:
        result = return_id(task, index)
        if result in waiters:
            found.append(result)
        elif num_returns < 0:
            break
        index += 1
    return found
