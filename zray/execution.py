"""Running one call: claim it, fetch its arguments, call the function, seal what came of it.

Covers everything between a spec and its sealed results, for tasks and actor methods alike. Does not cover where specs come from and in which
order (`zray.worker`, `zray.actor_runtime`), or the form of errors (`zray.failures`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Final, NoReturn

from zray import _store, errors, failures, placing, serialization, wire
from zray.object_store import NOT_HERE, Failed, ObjectRef
from zray.session import HOLDS_REFERENCES, RUNNING, TaskContext
from zray.task import ACTOR_METHOD, ARGS_IN_OBJECT, CallShape, TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.checkpointing import Journal
    from zray.lane_ends import LaneEnds
    from zray.session import Session

_NOT_SEALED: Final = (errors.ObjectStoreFullError, errors.OutOfDiskError, errors.ZraySystemError, OSError)
"""What sealing may raise: this call fails, the process goes on."""
_NOTICES: Final = 64
_NOTICE_S: Final = 0.002
"""Ends of calls leave together, so many or so old."""
_LATE_NOTICES: Final = 512
_LATE_NOTICE_S: Final = 0.02
"""The same for calls that did not come from the broker: it does not wait for their ends, and each message wakes it."""
_STUCK_S: Final = 2.0
_WORDS_KEPT: Final = 1000
"""Cancellations remembered for calls that have not begun; most are for calls that had just ended."""
_LOG_CAP: Final = 16 << 20
"""Bytes of a worker's log file after which it starts anew."""
_NONE: Final = serialization.dumps(None).stream
_NO_ROOM: Final = serialization.Packed(serialization.KIND_ERROR, failures.NO_ROOM_DATA, [], [])


class Claimed:
    """A call this process has won the right to run."""

    __slots__ = ("context", "shape", "slots", "spec", "start")

    def __init__(self, spec: TaskSpec, shape: CallShape, slots: Any, context: TaskContext) -> None:
        self.spec = spec
        self.shape = shape
        self.slots = slots
        """Slot of the only result, or a tuple of the slots of all."""
        self.context = context
        self.start = time.perf_counter_ns()


class DependencyFailed(Exception):
    """An argument of the call is an error (never leaves zray): the call fails with the same."""

    def __init__(self, record: Any) -> None:
        super().__init__()
        self.record = record


class Executor:
    """Runs calls in this process."""

    def __init__(self, session: Session, notices: Notices) -> None:
        self.session = session
        self.store = session.store
        self.notices = notices
        self.shapes: dict[bytes, CallShape] = {}
        self.actor_id = b""
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self.interruptible = b""
        """Id of the call whose user code the main thread runs."""
        self.ending = False
        """The actor ends by its own will: no further call may begin."""
        self.leaving: object = None
        """Exit status as `leave` takes it, set when another thread wants the process to end."""
        self.interrupted: dict[int, None] = {}
        """Words of cancelled calls, the newest last: they were interrupted, or lie in the inbox, or had just ended."""
        self.journal: Journal | None = None
        """Of an actor with checkpoints: results go through it."""
        self.lanes: LaneEnds | None = None
        """Of an actor that is called from other nodes directly: it wants to know of results."""
        self._wrote = False
        """The call that ended last had written output."""
        self._log_position = 0
        self._last_name = ""

    def define(self, shapes: list[CallShape]) -> None:
        """Remember shapes that specs will name."""
        for shape in shapes:
            self.shapes[shape.key] = shape
            if shape.strategy and placing.unpack(shape.strategy).capture:
                self.session.capturing = True

    # -- one call -----------------------------------------------------------------------------------------------------

    def claim(self, spec: TaskSpec) -> Claimed | None:
        """Become the executor of a call, or report it skipped when somebody else is."""
        shape = self.shapes.get(spec.shape)
        if shape is None:
            self._refuse(spec)
            return None
        slots = self.store.claim(spec.id, shape.num_returns, spec.attempt)
        if slots is None:
            if self.lanes is not None:
                self.lanes.ended(spec.id, None)
            self.notices.add(spec.id, wire.DONE_SKIPPED, 0)
            return None
        strategy = shape.strategy or self.session.root.strategy
        context = TaskContext(spec.id, shape.name, spec.attempt, self.actor_id, shape.resources, strategy)
        return Claimed(spec, shape, slots, context)

    def _refuse(self, spec: TaskSpec) -> None:
        """Fail a call whose shape this process was never told of (which the protocol rules out)."""
        slot = self.store.claim(spec.id, 1, spec.attempt)
        if slot is not None:
            call = Claimed(spec, CallShape(spec.shape, 0, b"", "(unknown)"), slot, TaskContext(spec.id))
            self.fail(call, errors.ZrayInternalError(f"call {spec.id.hex()} names an unknown shape {spec.shape.hex()}"))

    def run(self, spec: TaskSpec, instance: object = None) -> None:
        """Claim and run a call in the calling thread; its outcome is sealed and noted. Exceptions of user code end here."""
        call = self.claim(spec)
        if call is None:
            self._cancelled(spec.id)
            return
        token = RUNNING.set(call.context)
        try:
            shape = call.shape
            if shape.name != self._last_name:
                self.mark_log(shape.name)
            function = self.method(instance, shape.method) if shape.kind == ACTOR_METHOD else self.function(shape)
            # An interrupt is raised only between these two, and once: never while the outcome is sealed and noted.
            try:
                self.interruptible = spec.id
                if self.interrupted and self._was_interrupted(spec.id):
                    raise KeyboardInterrupt
                if spec.args or spec.args_kind:
                    args, kwargs = self.arguments(spec)
                    value = function(*args, **kwargs)
                else:
                    value = function()
            finally:
                self.interruptible = b""
        except BaseException as error:
            self.fail(call, error)
        else:
            self.succeed(call, value)
        finally:
            RUNNING.reset(token)

    def run_again(self, spec: TaskSpec, instance: object) -> None:
        """Run a logged call of an actor once more: for its effect, and for its result only when nobody has seen that."""
        assert self.journal is not None
        shape = self.shapes[spec.shape]
        slots = self.store.claim(spec.id, shape.num_returns, spec.attempt)
        strategy = shape.strategy or self.session.root.strategy
        # Ids of its own: what the first run has made may exist still.
        context = TaskContext(spec.id, shape.name, spec.attempt, self.actor_id, shape.resources, strategy).apart()
        call = None if slots is None else Claimed(spec, shape, slots, context)
        token = RUNNING.set(context)
        try:
            self.mark_log(shape.name)
            # Nothing interrupts it: it had run to its end, and calls after it have built on that.
            args, kwargs = self.arguments(spec) if spec.args or spec.args_kind else ((), {})
            value = self.method(instance, shape.method)(*args, **kwargs)
        except BaseException as error:
            if call is not None:
                self.fail(call, error)
            else:
                traceback.clear_frames(error.__traceback__)
        else:
            if call is not None:
                self.succeed(call, value)
        finally:
            RUNNING.reset(token)
        if call is None:
            self.journal.ran_again()
            self.publish_log()

    def function(self, shape: CallShape) -> Callable[..., Any]:
        """The function or class of a shape, unpickled once."""
        function = self._functions.get(shape.function)
        if function is None:
            ref = self.store.reference(shape.function)
            if ref is None:
                raise errors.ObjectLostError.for_id(shape.function, f"the code of {shape.name} is gone")
            try:
                function = self.session.get([ref], None)[0]  # it may be on its way from another node
            except errors.ObjectLostError:
                raise
            except Exception as error:
                raise errors.ZraySystemError(
                    f"{shape.name} cannot be loaded in a worker: {type(error).__name__}: {error}. "
                    "A module it needs must be importable there"
                ) from error
            if not shape.function.endswith(
                HOLDS_REFERENCES
            ):  # else the objects it names would live as long as this process
                self._functions[shape.function] = function
        return function

    @staticmethod
    def method(instance: object, name: str) -> Callable[..., Any]:
        """The method of an actor's instance, among them those every actor has."""
        if name in ("__ray_ready__", "__zray_ready__"):
            return _ready
        if name in ("__ray_call__", "__zray_call__"):
            return lambda function, *args, **kwargs: function(instance, *args, **kwargs)
        if name in ("__ray_terminate__", "__zray_terminate__"):
            return _terminate
        return getattr(instance, name)  # type: ignore[no-any-return]

    def arguments(self, spec: TaskSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fetch and rebuild the arguments. Raises DependencyFailed when one of them is an error."""
        if not spec.deps:
            return serialization.loads_args(spec.args_kind, spec.args, [])
        if not spec.args_kind & ARGS_IN_OBJECT:
            return serialization.loads_args(spec.args_kind, spec.args, [self._dependency(dep) for dep in spec.deps])
        values = [self._dependency(dep) for dep in spec.deps[:-1]]
        ref = self._reference(spec.deps[-1])
        if not self.store.done(ref):  # a call to an actor comes from another node ahead of its arguments
            self.session.wait([ref], 1, None)
        if self.store.describe(ref)[2] & _store.KIND_ERROR_FLAG:
            self._dependency(spec.deps[-1])
        packed = self.session.objects.raw(ref)
        return serialization.loads_args(spec.args_kind & ~ARGS_IN_OBJECT, packed, values)

    def _reference(self, object_id: bytes) -> ObjectRef:
        ref = self.store.reference(object_id)
        if ref is None:
            raise errors.ObjectLostError.for_id(object_id)
        return ref

    def _dependency(self, object_id: bytes) -> Any:
        ref = self._reference(object_id)
        value = self.session.objects.value(ref)
        if value is NOT_HERE:
            self.session.get([ref], None)
            value = self.session.objects.value(ref)
        if type(value) is Failed:
            raise DependencyFailed(value.record)
        return value

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def succeed(self, call: Claimed, value: Any) -> None:
        """Seal the results of a call that returned."""
        if self.session.closed:
            self._end_forked_child(None)
        try:
            if call.shape.num_returns == 1:
                packed = [serialization.dumps(value, what=f"the result of {call.shape.name}")]
            else:
                packed = self._split(call.shape, value)
        except BaseException as error:
            self.fail(call, error)
            return
        self.publish_log()
        if self.journal is not None:
            self.journal.ran(call, packed, wire.DONE_OK, (time.perf_counter_ns() - call.start) // 1000)
            return
        try:
            self._seal_all(call, packed, 0)
        except _NOT_SEALED as error:
            self.fail(call, error)
            return
        self.notices.add(call.spec.id, wire.DONE_OK, (time.perf_counter_ns() - call.start) // 1000)

    @staticmethod
    def _split(shape: CallShape, value: Any) -> list[serialization.Packed]:
        if shape.num_returns == 0:
            return [serialization.dumps(None)]
        try:
            values = list(value)
        except TypeError:
            raise ValueError(
                f"{shape.name} was called with num_returns={shape.num_returns} but returned one {type(value).__name__}"
            ) from None
        if len(values) != shape.num_returns:
            raise ValueError(
                f"{shape.name} was called with num_returns={shape.num_returns} but returned {len(values)} values"
            )
        return [serialization.dumps(item, what=f"result {i} of {shape.name}") for i, item in enumerate(values)]

    def _seal_all(self, call: Claimed, packed: list[serialization.Packed], flags: int) -> None:
        slots = call.slots if isinstance(call.slots, tuple) else (call.slots,)
        if len(packed) < len(slots):
            packed = packed * len(slots)
        for slot, one in zip(slots, packed, strict=True):
            code = self.session.objects.seal_result(slot, call.spec.attempt, one, flags)
            if code == _store.TELL_BROKER:
                index = 1 + (slots.index(slot) if len(slots) > 1 else 0)
                self.notices.sealed(_store.with_index(call.spec.id, index))
        if self.lanes is not None:
            micros = (time.perf_counter_ns() - call.start) // 1000
            self.lanes.ended(call.spec.id, None if self._wrote or code < 0 else packed[0], micros)

    def seal_outcome(
        self, call: Claimed, packed: list[serialization.Packed], status: int, micros: int, notices: Notices
    ) -> None:
        """Seal and note what a call came to a while ago."""
        try:
            self._seal_all(call, packed, 0)
        except _NOT_SEALED as error:
            status = wire.DONE_ERROR
            failed = serialization.dumps_exception(
                error, function_name=call.shape.name, task_id=call.spec.id, actor_id=self.actor_id
            )
            try:
                self._seal_all(call, [failed], 0)
            except _NOT_SEALED:
                self._seal_all(call, [_NO_ROOM], 0)
        notices.add(call.spec.id, status, micros)

    def fail(self, call: Claimed, error: BaseException) -> None:
        """Seal the failure of a call, or leave it to the broker when it shall run again."""
        if self.session.closed:
            self._end_forked_child(error)
        micros = (time.perf_counter_ns() - call.start) // 1000
        if isinstance(error, SystemExit) and not isinstance(error, ActorExitRequested):
            self.leave(error.code)
        if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)) and self._cancelled(call.spec.id):
            error = errors.TaskCancelledError(task_id=call.spec.id.hex(), function_name=call.shape.name)
            status = wire.DONE_CANCELLED
        elif self._shall_retry(call, error):
            self.publish_log()
            if self.lanes is not None:
                self.lanes.ended(call.spec.id, None)
            self.notices.add(call.spec.id, wire.DONE_RETRY, micros)
            self.notices.flush()
            return
        else:
            status = wire.DONE_ERROR
        leaving = isinstance(error, ActorExitRequested)
        if leaving:
            self.ending = True
            error = errors.ActorDiedError(
                actor_id=self.actor_id.hex(), death=errors.Death(errors.DeathCause.EXIT_ACTOR, pid=os.getpid())
            )
        if isinstance(error, DependencyFailed):
            record = failures.because_of_input(error.record, function_name=call.shape.name, task_id=call.spec.id)
            packed = serialization.Packed(serialization.KIND_ERROR, failures.dump(record), [], [])
        elif isinstance(error, (errors.TaskCancelledError, errors.ActorDiedError)) and (
            leaving or status == wire.DONE_CANCELLED
        ):
            packed = serialization.Packed(serialization.KIND_ERROR, failures.dump(failures.from_error(error)), [], [])
        else:
            packed = serialization.dumps_exception(
                error, function_name=call.shape.name, task_id=call.spec.id, actor_id=self.actor_id
            )
        self.publish_log()
        if self.journal is not None:
            if not leaving:
                traceback.clear_frames(error.__traceback__)
                self.journal.ran(call, [packed], status, micros)
                return
            self.journal.settle()
        try:
            self._seal_all(call, [packed], 0)
        except _NOT_SEALED:
            self._seal_all(call, [_NO_ROOM], 0)
        # An exception that is a variable of the frame that raised it would keep that frame, and what it held, until the next
        # collection of cycles, which an idle worker does not come to.
        traceback.clear_frames(error.__traceback__)
        self.notices.add(call.spec.id, status, micros)
        if leaving:
            self.session.tell_last(wire.ActorExit(self.session.worker, self.actor_id))
            self.leave(0)

    @staticmethod
    def _end_forked_child(error: BaseException | None) -> NoReturn:
        """A process that user code forked came to the end of the function: the call is its parent's, so here it ends."""
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            status = 0 if error is None else 1
            if error is not None:
                traceback.print_exception(error)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 0xFF)

    def interrupts(self, word: int) -> bool:
        """Whether the call that this word of a cancellation names is running here and to be interrupted now. One that does not
        run yet is interrupted when it begins."""
        self.remember_cancelled(word)
        if int.from_bytes(self.interruptible[:8], "little") != word:
            return False
        self.interruptible = b""
        return True

    def remember_cancelled(self, word: int) -> None:
        """The call with this word is cancelled, should it come to be run here."""
        self.interrupted[word] = None
        if len(self.interrupted) > _WORDS_KEPT:
            with contextlib.suppress(KeyError, RuntimeError):  # a thread that runs calls has just taken one
                del self.interrupted[next(iter(self.interrupted))]

    def _was_interrupted(self, task: bytes) -> bool:
        return int.from_bytes(task[:8], "little") in self.interrupted

    def _cancelled(self, task: bytes) -> bool:
        if not self._was_interrupted(task):
            return False
        self.interrupted.pop(int.from_bytes(task[:8], "little"), None)
        return True

    def _shall_retry(self, call: Claimed, error: BaseException) -> bool:
        shape = call.shape
        if not shape.retry_exceptions or isinstance(error, DependencyFailed) or not isinstance(error, Exception):
            return False
        if shape.max_retries >= 0 and call.spec.attempt >= shape.max_retries:
            return False
        if shape.retry_exceptions == b"*":
            return True
        classes = serialization.loads(serialization.KIND_PICKLE, shape.retry_exceptions)
        cause = getattr(error, "cause", None)
        return isinstance(error, classes) or isinstance(cause, classes)

    def leave(self, code: object) -> None:
        """End this process on purpose: exit handlers of user code run, and everything noted so far leaves first."""
        if threading.current_thread() is not threading.main_thread():
            # Sockets may be closed only by who uses them, and the main thread listens: it is asked by signal (`zray.worker`).
            self.leaving = 0 if code is None else code
            os.kill(os.getpid(), signal.SIGUSR2)
            while True:
                time.sleep(60.0)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # others may want to leave, too
        if self.journal is not None:
            self.journal.settle()
        try:
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        self.publish_log()
        # Never given back: other threads may submit until the very end, and a socket is used by one at a time. Who holds it for
        # long is stuck.
        if self.session.lock.acquire(timeout=_STUCK_S):
            self.notices.flush()
            self.session.flush()
            self.session.context.close()
        status = code if isinstance(code, int) else 0 if code is None else 1
        os._exit(status & 0xFF)

    # -- output -------------------------------------------------------------------------------------------------------

    def mark_log(self, name: str) -> None:
        """Write into the log whose output follows (drivers turn it into a prefix)."""
        self._last_name = name
        sys.stdout.flush()
        sys.stderr.flush()
        mark = f"\x1e{name}\x1f{os.getpid()}\n".encode()
        for fd in (1, 2):
            os.write(fd, mark)
        self._log_position = _output_position()

    def publish_log(self) -> None:
        """Let drivers know of output before the result is visible; keep the log file within bounds."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except ValueError:
            return
        position = _output_position()
        self._wrote = position != self._log_position
        if not self._wrote:
            return
        self._log_position = position
        self.store.add_global(wire.GLOBAL_LOG_EVENTS, 1)
        if position > _LOG_CAP:
            for fd in (1, 2):
                os.ftruncate(fd, 0)
            self.mark_log(self._last_name)


def _output_position() -> int:
    """Bytes this process and its children have written to both of its log files (opened for appending)."""
    return os.lseek(1, 0, os.SEEK_CUR) + os.lseek(2, 0, os.SEEK_CUR)


class ActorExitRequested(SystemExit):
    """Raised by `exit_actor()` inside a method: the actor ends after this call (user code that catches Exception does not catch it)."""


def _ready() -> bool:
    return True


def _terminate() -> None:
    raise ActorExitRequested


class Notices:
    """What the broker is told afterwards, in batches: ends of calls, and objects it waits for."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.direct = False
        """Calls came straight from a caller: nobody waits for the notice, it can be late."""
        self._ended: list[tuple[bytes, int, int]] = []
        """(call, status, microseconds) of each end that nobody was told of. Threads append while another sends what was there before."""
        self._since = 0.0
        self._told = 0
        """How often ends were told."""

    def add(self, task: bytes, status: int, micros: int) -> None:
        if not self._ended:
            self._since = time.monotonic()
        self._ended.append((task, status, micros))

    def sealed(self, object_id: bytes) -> None:
        """The broker asked to be told of this object."""
        self.session.tell(wire.Sealed(object_id))

    @property
    def waiting(self) -> bool:
        return bool(self._ended)

    def due(self) -> bool:
        """Whether what was noted should leave although more work is queued."""
        noted = len(self._ended)
        if self.direct:
            return noted >= _LATE_NOTICES or (noted > 0 and time.monotonic() - self._since > _LATE_NOTICE_S)
        return noted >= _NOTICES or (noted > 0 and time.monotonic() - self._since > _NOTICE_S)

    def flush(self, idle: bool = False) -> None:
        """Send what was noted."""
        if not self._ended and not idle:
            return
        with self.session.lock:
            ended, told = self._ended[:], self._told
            tasks, statuses, micros = zip(*ended, strict=True) if ended else ((), (), ())
            message = wire.TasksDone(self.session.worker, b"".join(tasks), bytes(statuses), [*micros], idle)
            self.session.broker.send(wire.encode(message))
            # Last and in one step: interrupted before it, the same is told twice, which does no harm. What a signal handler or a finalizer has told
            # meanwhile is gone from the list already.
            if self._told == told:
                del self._ended[: len(ended)]
                self._told += 1
