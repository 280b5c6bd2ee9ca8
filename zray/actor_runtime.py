"""What makes a worker an actor: one instance, calls in each caller's order, and three ways to run them.

Covers construction, ordering, serial / threaded / asynchronous execution and the end of an actor. Does not cover running one call
(`zray.execution`) or restarts (the broker's actor machine). `zray.call_order` decides what may be delivered.

- serial (max_concurrency=1): the worker's own loop runs call after call.
- threaded: the main thread receives; `max_concurrency` threads run calls, started in order.
- with checkpoints (serial, too): the loop of `zray.checkpointing`, which logs what was run.
- asynchronous (the class has coroutine methods): an event loop in the main thread; at most `max_concurrency` calls are under way.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from zray import api, eager_tasks, errors, failures, wire
from zray.call_order import CallOrder
from zray.checkpointing import Journal
from zray.execution import ActorExitRequested, Claimed, DependencyFailed
from zray.session import RUNNING, TaskContext

if TYPE_CHECKING:
    import collections
    from collections.abc import Callable

    from zray.lane_ends import LaneEnds
    from zray.task import TaskSpec
    from zray.worker import Worker

_NOTICE_INTERVAL_S: Final = 0.02


class ActorHost:
    """The actor in this process."""

    def __init__(self, worker: Worker, start: wire.StartActor) -> None:
        self.worker = worker
        self.executor = worker.executor
        self.spec = start.spec
        self.incarnation = start.incarnation
        self.replay = start.replay
        self.checkpoint = start.checkpoint
        self.journal = Journal(worker, start) if start.spec.checkpoint_every else None
        self.instance: Any = None
        self.order = CallOrder()
        self.serial = True
        self.exiting = False
        self._pool: queue.SimpleQueue[TaskSpec | None] = queue.SimpleQueue()
        self._under_way = 0
        """Calls that were given to threads and have not ended."""
        self._state_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readable: Callable[[], object] | None = None
        self._coroutines: dict[int, asyncio.Task[None]] = {}
        """Asynchronous calls under way, by the word that names them in a cancellation."""

    # -- birth --------------------------------------------------------------------------------------------------------

    def construct(self, calls: collections.deque[TaskSpec]) -> None:
        """Make the instance; tell the broker that the actor lives, or why it does not."""
        executor, session = self.executor, self.worker.session
        creation = self.spec.creation
        shape = executor.shapes[creation.shape]
        executor.actor_id = creation.id
        held = self.spec.running_resources
        context = TaskContext(creation.id, shape.name, self.incarnation, creation.id, held, shape.strategy)
        session.root = context
        api.set_actor(self.spec)
        token = RUNNING.set(context)
        try:
            executor.mark_log(shape.name)
            cls: Any = executor.function(shape)
            if self.journal is not None and self.checkpoint:
                self.instance = self.journal.load(self.checkpoint, lambda: self._make(cls), cls)
            else:
                self._make(cls)
            if self.journal is not None:
                self._begin_journal(self.journal)
        except ActorExitRequested:
            self.leave()
        except BaseException as error:
            if isinstance(error, SystemExit) and not isinstance(error, ActorExitRequested):
                executor.leave(error.code)
            if isinstance(error, DependencyFailed):
                record = failures.because_of_input(error.record, function_name=shape.name, task_id=creation.id)
            else:
                record = failures.capture(error, function_name=shape.name, task_id=creation.id, actor_id=creation.id)
            executor.publish_log()
            died = errors.ActorDiedError(
                actor_id=creation.id.hex(), class_name=shape.name, creation_error=failures.rebuild(record)
            )
            packed = failures.dump(failures.from_error(died))
            session.tell_last(wire.ActorFailed(self.worker.config.number, creation.id, packed))
            executor.leave(0)
        finally:
            RUNNING.reset(token)
        executor.publish_log()
        if self.spec.is_async or self.spec.max_concurrency > 1 or self.journal is not None:
            self.serial = False
        session.tell(wire.ActorReady(self.worker.config.number, session.store.process, creation.id))
        calls.extend(self.replay)

    def _make(self, cls: Any) -> Any:
        creation, executor = self.spec.creation, self.executor
        args, kwargs = executor.arguments(creation) if creation.args or creation.args_kind else ((), {})
        instance: Any = cls.__new__(cls)
        self.instance = instance
        instance.__init__(*args, **kwargs)
        return instance

    def _begin_journal(self, journal: Journal) -> None:
        """From now on calls are logged. A new actor's state is saved at once: what cannot be pickled is an error of the constructor."""
        self.executor.journal = journal
        if not self.checkpoint and not journal.save():
            assert journal.failure is not None
            raise journal.failure

    def take(self, message: wire.CallActor, calls: collections.deque[TaskSpec]) -> None:
        """Append the calls that may be delivered now."""
        if message.incarnation != self.incarnation:
            return
        for spec in message.calls:
            calls.extend(self.order.arrive(message.process, spec))

    # -- end ----------------------------------------------------------------------------------------------------------

    def exit_when_idle(self, calls: collections.deque[TaskSpec]) -> None:
        """No handle is left: end after the calls already here."""
        self.exiting = True
        if self.serial:
            while calls:
                self.executor.run(calls.popleft(), self.instance)
            self.leave()

    def leave(self) -> None:
        """End the process, announced."""
        self.worker.session.tell_last(wire.ActorExit(self.worker.config.number, self.spec.creation.id))
        self.executor.leave(0)

    # -- not serial ---------------------------------------------------------------------------------------------------

    def serve(self, worker: Worker) -> None:
        """Take over the process's main thread; does not return."""
        if self.journal is not None:
            self.journal.serve()
        elif self.spec.is_async:
            try:
                asyncio.run(self._serve_async(worker))
            except ActorExitRequested:  # from a task that a method left behind in the loop
                self.leave()
        else:
            self._serve_threads(worker)

    def _serve_threads(self, worker: Worker) -> None:
        for index in range(self.spec.max_concurrency):
            threading.Thread(target=self._thread, name=f"zray-call-{index}", daemon=True).start()
        calls = worker.queue
        notices = worker.notices
        while True:
            while calls:
                with self._state_lock:
                    self._under_way += 1
                self._pool.put(calls.popleft())
            frame = worker.inbox.next_frame_nowait()
            if frame is None:
                frame = worker.inbox.wait_frame(20 if notices.waiting or self.exiting else 1000)
            if frame is None:
                notices.flush(idle=self._under_way == 0)
                if self.exiting and self._under_way == 0:
                    self.leave()
                continue
            worker.handle(frame)
            if notices.due():
                notices.flush()

    def _thread(self) -> None:
        executor = self.executor
        while True:
            spec = self._pool.get()
            if spec is None:
                return
            while executor.ending:  # the process will be gone in a moment, and what it did not begin with it
                time.sleep(1.0)
            try:
                executor.run(spec, self.instance)
                # On another node somebody may wait for it, and the main thread sleeps.
                if spec.sequence == 0 or not self.worker.notices.direct:
                    self.worker.notices.flush()
            finally:
                with self._state_lock:
                    self._under_way -= 1

    async def _serve_async(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        limit = self.spec.max_concurrency
        waiting = worker.queue
        under_way: set[asyncio.Task[None]] = set()

        def start_some() -> None:
            while waiting and len(under_way) < limit:
                spec = waiting.popleft()
                call = self.executor.claim(spec)
                if call is not None:
                    task = eager_tasks.start(loop, self._run_async(call))
                    if task is not None:
                        under_way.add(task)
                        task.add_done_callback(finished)

        def finished(task: asyncio.Task[None]) -> None:
            under_way.discard(task)
            if waiting:
                start_some()

        def readable() -> None:
            # The descriptor is edge-triggered: drain.
            while (frame := worker.inbox.next_frame_nowait()) is not None:
                worker.handle(frame)
                start_some()

        loop.add_reader(worker.inbox.fileno(), readable)
        self._loop, self._readable = loop, readable
        if self.executor.lanes is not None:
            self.lanes_opened(self.executor.lanes)
        while True:
            readable()
            await asyncio.sleep(_NOTICE_INTERVAL_S if worker.notices.waiting or under_way or self.exiting else 0.2)
            worker.notices.flush(idle=not under_way)
            if self.exiting and not under_way and not waiting:
                self.leave()

    def lanes_opened(self, lanes: LaneEnds) -> None:
        """Where there is an event loop, have it wait for what comes over lanes."""
        visitors = self.worker.inbox.visitors
        if self._loop is not None and self._readable is not None and visitors is not None:
            lanes.later = self._loop.call_soon
            self._loop.add_reader(visitors.fileno(), self._readable)

    def cancel(self, call: bytes) -> None:
        """Cancel an asynchronous call, if it is under way."""
        word = word_of(call)
        self.executor.remember_cancelled(word)
        task = self._coroutines.get(word)
        if task is not None:
            task.cancel()

    async def _run_async(self, call: Claimed) -> None:
        executor = self.executor
        RUNNING.set(call.context)
        word = word_of(call.spec.id)
        task = asyncio.current_task()
        assert task is not None
        self._coroutines[word] = task
        try:
            # Before its first step a task that is cancelled would never run, nor seal anything.
            if word in executor.interrupted:
                raise asyncio.CancelledError
            shape, spec = call.shape, call.spec
            if spec.args or spec.args_kind:
                args, kwargs = executor.arguments(spec)
            else:
                args, kwargs = (), {}
            value = executor.method(self.instance, shape.method)(*args, **kwargs)
            if inspect.isawaitable(value):
                value = await value
        except BaseException as error:
            executor.fail(call, error)
        else:
            executor.succeed(call, value)
        finally:
            self._coroutines.pop(word, None)
            executor.interrupted.pop(word, None)


def word_of(call: bytes) -> int:
    """The word that names a call in a cancellation."""
    return int.from_bytes(call[:8], "little")


def is_asynchronous(cls: type) -> bool:
    """Whether a class has coroutine methods, which makes its actors asynchronous."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for _, member in inspect.getmembers(cls)
    )
