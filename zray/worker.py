"""The executing process: receives calls, runs them in order, tells the broker afterwards.

Covers the life of a worker from the fork to its end, and the loop over its inbox. Does not cover running one call (`zray.execution`) or what is
special about actors (`zray.actor_runtime`). `main` is called by the fork parent (`zray.broker.fork_parent`) in the new child.
"""

from __future__ import annotations

import atexit
import collections
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import _store, wire
from zray.actor_runtime import ActorHost
from zray.execution import Executor, Notices
from zray.session import Session, SessionConfig
from zray.submission import Submitter
from zray.task import JobSpec
from zray.transport import ipc_endpoint

if TYPE_CHECKING:
    from types import FrameType

    from zray.task import TaskSpec

_LATE_NOTICE_MS: Final = 20
"""Notices nobody waits for leave when the inbox was empty this long."""


_TIDY_MS: Final = 500
"""A worker that was idle so long looks for garbage."""


class WorkerConfig(msgspec.Struct, frozen=True):
    """What the fork parent tells a new worker."""

    number: int
    session: SessionConfig
    job: JobSpec
    store_fd: int
    fault_file: str


class Worker:
    """The process's state: session, executor, queue, and the actor it became, if any."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        store = _store.Store(config.store_fd)
        store.register(_store.PROC_WORKER)
        store.set_job(config.job.number)
        self.session = Session(config.session, store, config.number)
        self.submitter = Submitter(self.session)
        self.notices = Notices(self.session)
        self.executor = Executor(self.session, self.notices)
        self.inbox = self.session.context.inbox(ipc_endpoint(config.session.directory, f"w{config.number}"))
        self.queue: collections.deque[TaskSpec] = collections.deque()
        self.actor: ActorHost | None = None
        self.lease_epoch = 0
        self.malformed = 0
        self._blocked: set[int] = set()
        """Threads that wait for objects. Not a count: a cancellation may interrupt them before or after they say so, and the broker
        may hear either twice."""
        self.session.on_block = self._on_block
        self.session.on_unblock = self._on_unblock

    # -- blocking -----------------------------------------------------------------------------------------------------

    def _on_block(self) -> None:
        with self.session.lock:
            self._blocked.add(threading.get_ident())
            self.session.lent_at = time.monotonic()
            if len(self._blocked) == 1:
                self.notices.flush()
                self.session.tell(wire.Blocked(self.config.number))

    def _on_unblock(self) -> None:
        with self.session.lock:
            if self._blocked == {threading.get_ident()}:
                self.session.tell(wire.Unblocked(self.config.number))
            self._blocked.discard(threading.get_ident())

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to end. A KeyboardInterrupt (a cancellation that found its task just over) leaves it; call again."""
        while self.actor is None or self.actor.serial:
            self._run_queue()
            self._receive()
        self.actor.serve(self)

    def _run_queue(self) -> None:
        queue, executor, notices = self.queue, self.executor, self.notices
        instance: Any = None if self.actor is None else self.actor.instance
        while queue:
            executor.run(queue.popleft(), instance)
            if self._blocked:
                self._on_unblock()  # a cancellation interrupted the call when it was about to say so
            if notices.due():
                notices.flush()
        if executor.lanes is not None:
            executor.lanes.flush()

    def _receive(self) -> None:
        """Take in at least one frame; before sleeping let notices leave."""
        frame = self.inbox.next_frame_nowait()
        if frame is None:
            notices = self.notices
            if notices.waiting:
                if notices.direct and self._lease_holds():
                    frame = self.inbox.wait_frame(_LATE_NOTICE_MS)
                if frame is None:
                    notices.flush(idle=True)
                    notices.direct = False
            if frame is None:
                self.submitter.flush()
                frame = self.inbox.wait_frame(_TIDY_MS)
            if frame is None:
                # What the last calls left in cycles may hold references to large values. Young objects only: it takes no time.
                gc.collect(1)
                frame = self.inbox.wait_frame()
        if frame is not None:
            self.handle(frame)

    def _lease_holds(self) -> bool:
        return self.actor is not None or self.session.store.own_word(wire.WORD_LEASE) == self.lease_epoch

    def handle(self, frame: bytes) -> None:
        """Obey one message; what is no message is counted and dropped."""
        try:
            message = wire.decode(frame)
        except wire.FrameError as error:
            self.malformed += 1
            print(f"[zray] worker {self.config.number} dropped a frame: {error}", file=sys.stderr)
            return
        if isinstance(message, wire.RunDirect):
            self.lease_epoch = message.epoch
            self.notices.direct = True
            self.queue.extend(message.tasks)
        elif isinstance(message, wire.RunTasks):
            self.notices.direct = False
            self.queue.extend(message.tasks)
        elif isinstance(message, wire.CallActor):
            if self.actor is not None:
                self.notices.direct = message.process != 0  # on another node somebody waits for the notice
                if self.executor.lanes is not None:
                    for call in self.executor.lanes.came_otherwise(message, self.actor.order):
                        self.notices.add(call, wire.DONE_SKIPPED, 0)
                self.actor.take(message, self.queue)
        elif isinstance(message, wire.CallOverLane):
            if self.executor.lanes is not None:
                self.notices.direct = True
                if self.actor is None:
                    self.lease_epoch = message.incarnation
                self.executor.lanes.take(message, self.actor, self.queue)
        elif isinstance(message, wire.DefineShapes):
            self.executor.define(message.shapes)
        elif isinstance(message, wire.StartActor):
            self.actor = ActorHost(self, message)
            self.actor.construct(self.queue)
        elif isinstance(message, wire.ExitWhenIdle):
            if self.actor is not None:
                self.actor.exit_when_idle(self.queue)
        elif isinstance(message, wire.CancelTask):
            if self.actor is not None:
                self.actor.cancel(message.task)
        elif isinstance(message, wire.CallerGone):
            if self.actor is not None:
                self.queue.extend(self.actor.order.gone(message.process))
            if self.executor.lanes is not None and self.inbox.visitors is not None:
                self.executor.lanes.over(message.process)
                self.inbox.visitors.forget(message.process)
        elif isinstance(message, wire.GreetOverLane):
            if self.executor.lanes is not None:
                self.executor.lanes.greeted(message.lane)
        elif isinstance(message, wire.SkipOnLane):
            if self.executor.lanes is not None:
                self.executor.lanes.skip(message, self.queue)
                for index in range(len(message.numbers)):
                    self.notices.add(message.ids[16 * index : 16 * index + 16], wire.DONE_SKIPPED, 0)
        elif isinstance(message, wire.ExpectVisitor):
            self._expect_visitor(message)
        elif isinstance(message, wire.Shutdown):
            self._run_queue()
            self.leave(0)

    def _expect_visitor(self, message: wire.ExpectVisitor) -> None:
        """A process of another node will call directly. It tries until the socket is there."""
        if self.executor.lanes is None:
            from zray.lane_ends import LaneEnds

            try:
                visitors = self.inbox.open(message.path, self.session.store.wait_fd)
            except OSError as error:
                print(f"[zray] worker {self.config.number} cannot be called from other nodes: {error}", file=sys.stderr)
                return
            visitors.on_refused = lambda count: self.session.tell(wire.VisitorsRefused(count))
            self.executor.lanes = LaneEnds(self)
            if self.actor is not None:
                self.actor.lanes_opened(self.executor.lanes)
        assert self.inbox.visitors is not None
        self.inbox.visitors.expect(message.lane, message.secret)

    def leave(self, status: int) -> None:
        """End this process at once, cleanly."""
        self.executor.leave(status)


def _interrupt_task(worker: Worker) -> None:
    """Let SIGUSR2 interrupt the task named in the process record's cancel word, if the main thread still runs that one; a thread that
    wants the process to end sends it, too."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        if worker.executor.leaving is not None:
            worker.executor.leave(worker.executor.leaving)
        store = worker.session.store
        word = store.own_word(wire.WORD_CANCEL)
        if not word:
            return
        store.set_word(store.process, wire.WORD_CANCEL, 0)  # taken: the broker may name another
        if worker.executor.interrupts(word):
            raise KeyboardInterrupt

    signal.signal(signal.SIGUSR2, handler)


def _prepare(config: WorkerConfig) -> None:
    """Make the child of the fork parent a process of its own: its own random numbers, paths and fault log."""
    os.environ.update(config.job.environment)
    sys.path[:] = [*config.job.sys_path, *[path for path in sys.path if path not in config.job.sys_path]]
    try:
        os.chdir(config.job.cwd)
    except OSError:
        pass
    sys.argv = ["zray-worker"]
    atexit._clear()
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(open(config.fault_file, "w"), all_threads=False)  # noqa: SIM115 - lives as long as the process
    if "random" in sys.modules:
        sys.modules["random"].seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(int.from_bytes(os.urandom(4), "little"))


def main(config: WorkerConfig) -> None:
    """Run a worker in a child that was just forked; does not return normally."""
    from zray import api

    _prepare(config)
    gc.enable()
    worker = Worker(config)
    _interrupt_task(worker)
    api.attach(worker.session, worker.submitter)
    worker.session.tell(wire.WorkerReady(config.number, worker.session.store.process))
    while True:
        try:
            worker.run()
        except KeyboardInterrupt:
            continue
