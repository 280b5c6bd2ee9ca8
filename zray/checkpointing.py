"""An actor with checkpoints, in its process: calls are logged before their results can be seen, and the state is saved now and then.

Covers numbering and logging calls, holding results back until they are safe, making and loading checkpoints, running logged calls again, and the
loop of such an actor. Does not cover what the broker keeps (`zray.broker.actor_log`) nor running one call (`zray.execution`).

A call is run, then sent to the log, then (when the log of the actor's owner has it) its result is sealed. While one message with calls is
under way to the log the next calls run; they leave together in the next message. Results are sealed between calls, and while a call takes long by a
thread that looks every two milliseconds: somebody may wait for them, perhaps that very call.

A checkpoint is made after every `every` calls, or when those since the last one have taken many bytes; the next call begins when it
is safe. So never more than `every` calls are run again. All results are sealed, and their ends noted, before a checkpoint is offered: who forgets the
log behind it knows of every call whose effect it holds that it has been answered.

A call that was cancelled half-way is not logged, as it would not come out the same again. Its result says that it was cancelled, which promises
nothing of its effect, and a checkpoint is made before the next call: what it has done is either kept for ever, or gone before anybody could see it.
"""

from __future__ import annotations

import collections
import gc
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from zray import errors, failures, ids, serialization, wire
from zray.execution import Notices
from zray.session import TaskContext

if TYPE_CHECKING:
    from zray.execution import Claimed
    from zray.task import TaskSpec
    from zray.worker import Worker

_LOG_BYTES: Final = 16 << 20
"""Bytes of arguments in the log after which a checkpoint is made, however few the calls were."""
_HELD_RESULTS: Final = 512
"""Results that may wait for the log; then the actor waits, too."""
_LOOK_S: Final = 0.002
_WAIT_MS: Final = 20
_TIDY_MS: Final = 500


class Outcome:
    """What a call has come to, not sealed yet."""

    __slots__ = ("call", "micros", "number", "packed", "status")

    def __init__(
        self, number: int, call: Claimed, packed: list[serialization.Packed], status: int, micros: int
    ) -> None:
        self.number = number
        self.call = call
        self.packed = packed
        self.status = status
        self.micros = micros


class Journal:
    """Calls and states of the actor in this process, on their way to safety."""

    def __init__(self, worker: Worker, start: wire.StartActor) -> None:
        self.worker = worker
        self.session = worker.session
        self.executor = worker.executor
        self.actor = start.spec.creation.id
        self.every = start.spec.checkpoint_every
        self.again: collections.deque[TaskSpec] = collections.deque(start.logged)
        """Logged calls to be run before all others."""
        self.number = start.number
        """Calls whose effect is in the instance."""
        self.base = start.number
        """Of those, calls whose effect is in the newest checkpoint."""
        self.failure: BaseException | None = None
        """Why no checkpoint could be made."""
        self._sent = start.number + len(start.logged)
        """The last call that was sent to the log."""
        self._unsent: list[TaskSpec] = []
        self._unsealed: collections.deque[Outcome] = collections.deque()
        self._bytes = sum(len(spec.args) for spec in start.logged)
        self._forced = False
        """The instance was changed by a call that is not in the log."""
        self._saving = -1
        """Number of the checkpoint that is not known to be safe yet; -1 none."""
        self._state: object = None
        """Keeps it until then."""
        self._shapes_told: set[bytes] = set()
        self._ids = TaskContext(ids.random_id())
        self._lock = threading.RLock()
        """Guards what is on its way; the session's lock may be taken inside, never the other way round."""
        self._notices = Notices(self.session)
        self._watching = False
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._watcher = threading.Thread(target=self._watch, name="zray-log", daemon=True)
        self._watcher.start()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def ran(self, call: Claimed, packed: list[serialization.Packed], status: int, micros: int) -> None:
        """A call has ended: have it logged, and its result sealed afterwards."""
        with self._lock:
            self.number += 1
            if status == wire.DONE_CANCELLED:
                self._forced = True
                self.executor.seal_outcome(call, packed, status, micros, self._notices)
                self._notices.flush()
                return
            if self.number > self._sent + len(self._unsent):
                self._unsent.append(call.spec)
                self._bytes += len(call.spec.args)
            self._unsealed.append(Outcome(self.number, call, packed, status, micros))
            self._pump()
            if self._unsealed and not self._watching:
                self._watching = True
                self._asleep.release()
        # What is in buffers may be the actor's own memory, which its next call may change.
        if len(self._unsealed) >= _HELD_RESULTS or any(one.buffers for one in packed):
            self.settle()

    def ran_again(self) -> None:
        """A call whose result had been sealed was run again for its effect."""
        self.number += 1

    def pump(self) -> None:
        """Seal what is safe; send what is not in the log yet."""
        with self._lock:
            self._pump()

    def _pump(self) -> None:
        store = self.session.store
        logged = store.own_word(wire.WORD_LOGGED)
        unsealed = self._unsealed
        urgent = False
        while unsealed and unsealed[0].number <= logged:
            outcome = unsealed[0]
            urgent = urgent or outcome.call.spec.sequence == 0  # on another node somebody waits for the notice
            self.executor.seal_outcome(outcome.call, outcome.packed, outcome.status, outcome.micros, self._notices)
            unsealed.popleft()  # only now: `settle` waits for it without the lock
        if self._unsent and self._sent <= logged:
            self._send()
        self._notices.direct = not urgent
        if urgent or self._notices.due():
            self._notices.flush()

    def _send(self) -> None:
        if not self._unsent:
            return
        shapes = []
        for spec in self._unsent:
            if spec.shape not in self._shapes_told:
                self._shapes_told.add(spec.shape)
                shapes.append(self.executor.shapes[spec.shape])
        message = wire.LogCalls(self.worker.config.number, self.actor, self._sent + 1, shapes, self._unsent)
        self.session.tell(message)
        self._sent += len(self._unsent)
        self._unsent = []

    def _watch(self) -> None:
        """Seal results while the main thread runs a call."""
        while True:
            self._asleep.acquire()
            while True:
                time.sleep(_LOOK_S)
                with self._lock:
                    if self.session.closed:
                        return
                    self._pump()
                    if not self._unsealed:
                        self._watching = False
                        break

    def settle(self) -> None:
        """Wait until the results of all calls are sealed."""
        while self._unsealed:
            self._take_in(_WAIT_MS)
            self.pump()

    def _take_in(self, timeout_ms: int) -> bool:
        frame = self.worker.inbox.wait_frame(timeout_ms)
        if frame is not None:
            self.worker.handle(frame)
        return frame is not None

    # -- states --------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be made before the next call."""
        return self.number - self.base >= self.every or self._bytes > _LOG_BYTES or self._forced

    def save(self) -> bool:
        """Make a checkpoint of the instance and offer it; False (and `failure`) when it cannot be made."""
        session, instance = self.session, self._instance()
        self.settle()
        try:
            state = instance.save_checkpoint() if has_own_checkpoints(type(instance)) else instance
            packed = serialization.dumps(state, what=f"the state of the actor {type(instance).__name__}")
            ref = session.objects.put(self._ids.next_put_id(), packed)
        except Exception as error:
            self._failed(error)
            return False
        with self._lock:
            self._notices.flush()
            session.store.set_word(session.store.process, wire.WORD_REFUSED, 0)
            self._saving, self._state = self.number, ref
            self._sent = self.number  # also where the last call was not logged
            session.tell(wire.SaveCheckpoint(self.worker.config.number, self.actor, self.number, ref.binary()))
        return True

    def _instance(self) -> Any:
        assert self.worker.actor is not None
        return self.worker.actor.instance

    def _failed(self, error: BaseException) -> None:
        if self.failure is None:
            text = f"[zray] no checkpoint of this actor can be made: {type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)
        self.failure = error

    def ready(self) -> bool:
        """Before a call: wait until the checkpoint that is due is safe. False (and `failure`) when none can be made."""
        if self.due and self._saving < self.number and not self.save():
            return False
        store = self.session.store
        while self._saving >= 0:
            if store.own_word(wire.WORD_SAVED) > self._saving:
                self.base, self.failure = self._saving, None
                self._saving, self._state, self._bytes, self._forced = -1, None, 0, False
                self.pump()
            elif store.own_word(wire.WORD_REFUSED) == self._saving + 1:
                self._saving, self._state = -1, None
                self._failed(errors.ObjectStoreFullError("the node that owns the actor has no room for its state"))
                return False
            else:
                self._take_in(_WAIT_MS)
                self.pump()
        return True

    def load(self, checkpoint: bytes, make: Any, cls: type) -> Any:
        """Return the instance as it was. `make` runs the constructor, which only a class with `load_checkpoint` needs."""
        ref = self.session.store.reference(checkpoint)
        if ref is None:
            raise errors.ObjectLostError.for_id(checkpoint, "the checkpoint of the actor is gone")
        state = self.session.get_writable(ref, None)
        if not has_own_checkpoints(cls):
            return state
        instance = make()
        instance.load_checkpoint(state)
        return instance

    def refuse(self, spec: TaskSpec) -> None:
        """Answer a call that may not be run: its effect could not be kept."""
        call = self.executor.claim(spec)
        if call is not None:
            why = f"{type(self.failure).__name__}: {self.failure}"
            text = (
                f"the call was not run: {self.number - self.base} calls have changed the actor since its last checkpoint, and none can "
                f"be made now ({why}). Keep what cannot be pickled out of the actor's attributes, or define save_checkpoint and load_checkpoint"
            )
            error = errors.CheckpointError(text, actor_id=self.actor.hex())
            packed = serialization.Packed(serialization.KIND_ERROR, failures.dump(failures.from_error(error)), [], [])
            with self._lock:
                self.executor.seal_outcome(call, [packed], wire.DONE_ERROR, 0, self._notices)
                self._notices.flush()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run what comes; a KeyboardInterrupt (a cancellation that found its call just over) leaves it: call again."""
        worker, executor, notices = self.worker, self.executor, self.worker.notices
        queue, instance = worker.queue, self._instance()
        while True:
            while (frame := worker.inbox.next_frame_nowait()) is not None:
                worker.handle(frame)
            self.pump()
            if self.again:
                executor.run_again(self.again.popleft(), instance)
            elif queue:
                if self.ready():
                    executor.run(queue.popleft(), instance)
                else:
                    self.refuse(queue.popleft())
            else:
                self._rest()
                continue
            if worker._blocked:
                worker._on_unblock()
            if notices.due():
                notices.flush()

    def _rest(self) -> None:
        """Nothing is to be run: wait for the next message."""
        worker, actor = self.worker, self.worker.actor
        assert actor is not None
        if self.due and self._saving < self.number and self.failure is None:
            self.save()
        if actor.exiting and not self._unsealed:
            actor.leave()
        waiting = (
            self._unsealed or self._notices.waiting or worker.notices.waiting or self._saving >= 0 or actor.exiting
        )
        if not self._take_in(_WAIT_MS if waiting else _TIDY_MS):
            with self._lock:
                self._notices.flush()
            worker.notices.flush()
            worker.submitter.flush()
            if not waiting:
                gc.collect(1)  # as in `Worker._receive`
                self._take_in(-1)
        if self._saving >= 0:
            self._look_at_saving()

    def _look_at_saving(self) -> None:
        words = self.session.store.own_word
        if words(wire.WORD_SAVED) > self._saving or words(wire.WORD_REFUSED) == self._saving + 1:
            self.ready()


def has_own_checkpoints(cls: type) -> bool:
    """Whether a class says itself what its state is."""
    return hasattr(cls, "save_checkpoint") and hasattr(cls, "load_checkpoint")
