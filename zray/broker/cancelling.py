"""Cancelling tasks.

Covers what a cancel means wherever the task is, forced and recursive cancels. Does not cover interrupting the function
itself: the worker does that.

A task that waits or is queued ends at once, and so does one that nobody has begun. One that a worker runs is
interrupted, and remembered so that it is not run again if it dies of it; with `force` its results are sealed and the
process is killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zray.broker import actions, events
from zray.broker.dependencies import Waiting
from zray.broker.task_table import ShapeState, TaskQueue
from zray.broker.worker_pool import DRAINING, DYING, LEASED, STOPPING, Worker

if TYPE_CHECKING:
    from zray.broker.node import Node
    from zray.broker.task_events import TaskEvents


class Canceller:
    """Handler of `TaskCancel`."""

    __slots__ = ("_tasks", "node")

    def __init__(self, node: Node, tasks: TaskEvents) -> None:
        self.node = node
        self._tasks = tasks

    def cancel(self, event: events.TaskCancel, now: float) -> None:
        pending = [event.task]
        seen = {event.task}
        while pending:
            task = pending.pop()
            if event.recursive:
                for job in self.node.jobs.jobs.values():
                    for child in job.children.get(task, ()):
                        if child not in seen:
                            seen.add(child)
                            pending.append(child)
            direct = task == event.task
            self._cancel_one(task, event.force, event.worker if direct else 0, event.begun or not direct)

    def _cancel_one(self, task: bytes, force: bool, direct: int, begun: bool) -> None:
        node = self.node
        home = node.tasks.home.get(task)
        if home is None:
            self._cancel_direct(task, force, direct, begun)
        elif type(home) is TaskQueue:
            # A worker that it was taken back from may have begun it.
            node.out.append(actions.InterruptTask(task, home.shape.name))
            self._end_cancelled(task, home.shape)
        elif type(home) is Waiting:
            node.dependencies.forget(home)
            if home.queue is not None:
                self._end_cancelled(task, home.queue.shape)
        else:
            self._cancel_handed(task, [home] if type(home) is Worker else list(home.workers), force)  # type: ignore[union-attr]

    def _end_cancelled(self, task: bytes, shape: ShapeState) -> None:
        self.node.tasks.end(task, None)
        self.node.interrupted.discard(task)
        self.node.seal(task, shape, "TaskCancelledError", {})

    def _cancel_handed(self, task: bytes, workers: list[Worker], force: bool) -> None:
        """Workers have it. One for which it is the first that has not ended may be running it; the others have not come
        to it, unless reports are under way."""
        node = self.node
        queue = self._tasks.queue_of(task)
        if queue is None:
            return
        running = [worker for worker in workers if worker.peer is None and self._first(worker) == task]
        for worker in workers:
            if worker.peer is not None:
                node.out.append(actions.CancelAt(worker.peer.id, task, force))
        node.out.append(actions.InterruptTask(task, queue.shape.name))
        if force or not running:
            self._end_cancelled(task, queue.shape)
            if force:
                for worker in running:
                    node.kill_worker(worker, "CANCELLED")
        else:
            self.node.interrupted.add(task)

    def _first(self, worker: Worker) -> bytes | None:
        for spec in worker.handed:
            if self.node.tasks.counts(worker, spec.id):
                return spec.id
        return None

    def _cancel_direct(self, task: bytes, force: bool, number: int, begun: bool) -> None:
        """A call that went straight to a leased worker or an actor, or waits for an actor: only the store knows where it
        is."""
        node = self.node
        node.out.append(actions.InterruptTask(task))
        worker = node.pool.workers.get(number)
        if not begun or worker is None or worker.state in (DYING, STOPPING):
            return
        if worker.actor is None:
            self.node.interrupted.add(task)
            if force and worker.state in (LEASED, DRAINING):
                node.kill_worker(worker, "CANCELLED")
