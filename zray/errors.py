"""Every exception, grouped by whose fault it is, and the words for how a process died.

Covers the classes programs catch (`zray.exceptions` shows them), their texts, and `DeathCause` / `Death`, the record of
an ended process that the broker fills and several errors carry. Does not cover how an exception travels from a worker
to its caller: `zray.failures` captures and rebuilds it.

Four families under `ZrayError`: yours (wrong use), theirs (user code or a process of the cluster failed), the data's
(an object is gone or has no room), ours (please report). All can be pickled: each is `cls(message)` plus attributes.
"""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# -- how a process died ----------------------------------------------------------------------------------------------


class DeathCause:
    """Why a worker, actor or node ended: one of the named constants, or `DeathCause.EXIT(n)`.

    Equal causes are the same object, also after pickling, so `error.cause is DeathCause.SIGKILL` and
    `error.cause == DeathCause.EXIT(3)` both work. `str(cause)` is the name (`"EXIT(3)"`), `parse` reads it back.
    """

    __slots__ = ("code", "name", "signal", "text")

    name: str
    """"SIGKILL", "EXIT(3)", "OOM" ..."""
    code: int | None
    """Exit status for EXIT, else None."""
    signal: int | None
    """Signal number for SIG..., else None."""
    text: str
    """What to tell people, as the end of "it ended because ..."."""

    _known: ClassVar[dict[str, DeathCause]] = {}

    SIGKILL: ClassVar[DeathCause]
    SIGSEGV: ClassVar[DeathCause]
    SIGABRT: ClassVar[DeathCause]
    SIGBUS: ClassVar[DeathCause]
    SIGFPE: ClassVar[DeathCause]
    SIGILL: ClassVar[DeathCause]
    SIGTERM: ClassVar[DeathCause]
    SIGINT: ClassVar[DeathCause]
    OOM: ClassVar[DeathCause]
    KILLED: ClassVar[DeathCause]
    CANCELLED: ClassVar[DeathCause]
    EXIT_ACTOR: ClassVar[DeathCause]
    INIT_FAILED: ClassVar[DeathCause]
    HANDLES_GONE: ClassVar[DeathCause]
    NODE_DIED: ClassVar[DeathCause]
    OWNER_DIED: ClassVar[DeathCause]
    JOB_ENDED: ClassVar[DeathCause]
    NOT_STARTED: ClassVar[DeathCause]
    IDLE: ClassVar[DeathCause]
    MAX_CALLS: ClassVar[DeathCause]
    PLACEMENT_GROUP_REMOVED: ClassVar[DeathCause]
    PREEMPTED: ClassVar[DeathCause]
    UNKNOWN: ClassVar[DeathCause]

    def __new__(cls, name: str) -> DeathCause:
        """Return the cause of that name: the same as `parse`."""
        return cls.parse(name)

    @classmethod
    def _make(cls, name: str, text: str, code: int | None = None, signum: int | None = None) -> DeathCause:
        cause = object.__new__(cls)
        for field, value in (("name", name), ("text", text), ("code", code), ("signal", signum)):
            object.__setattr__(cause, field, value)
        return cls._known.setdefault(name, cause)

    @classmethod
    def EXIT(cls, code: int) -> DeathCause:
        """The process ended by itself with this exit status."""
        name = f"EXIT({code})"
        return cls._known.get(name) or cls._make(name, f"it exited with exit code {code}", code=code)

    @classmethod
    def of_signal(cls, signum: int) -> DeathCause:
        """The process was ended by this signal."""
        try:
            name = signal.Signals(signum).name
        except ValueError:
            name = f"SIG{signum}"  # real-time signals between the named ones
        return cls._known.get(name) or cls._make(name, f"it was ended by signal {signum} ({name})", signum=signum)

    @classmethod
    def of_wait_status(cls, status: int) -> DeathCause:
        """The cause that a status from `os.waitpid` tells."""
        code = os.waitstatus_to_exitcode(status)
        return cls.EXIT(code) if code >= 0 else cls.of_signal(-code)

    @classmethod
    def parse(cls, name: str) -> DeathCause:
        """Return the cause with that name; ValueError for an unknown one."""
        found = cls._known.get(name)
        if found is not None:
            return found
        match = re.fullmatch(r"EXIT\((-?\d+)\)", name)
        if match:
            return cls.EXIT(int(match[1]))
        match = re.fullmatch(r"SIG(\d+)", name)
        if match:
            return cls.of_signal(int(match[1]))
        raise ValueError(f"no such cause of death: {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a cause of death does not change")

    def __reduce__(self) -> tuple[Callable[[str], DeathCause], tuple[str]]:
        return DeathCause.parse, (self.name,)

    def __repr__(self) -> str:
        return f"DeathCause.{self.name}"

    def __str__(self) -> str:
        return self.name


for _name, _text in {
    "OOM": "it was killed because memory ran out",
    "KILLED": "it was killed by `zray.kill`",
    "CANCELLED": "it was ended by `zray.cancel(..., force=True)`",
    "EXIT_ACTOR": "it called `exit_actor`",
    "INIT_FAILED": "its constructor raised",
    "HANDLES_GONE": "all handles to it were dropped",
    "NODE_DIED": "its node has died",
    "OWNER_DIED": "its owner has died",
    "JOB_ENDED": "the program that started it has ended",
    "NOT_STARTED": "its process could not be started",
    "IDLE": "it was idle",
    "MAX_CALLS": "it had run the number of tasks that max_calls allows",
    "PLACEMENT_GROUP_REMOVED": "its placement group was removed",
    "PREEMPTED": "its node was preempted",
    "UNKNOWN": "the cause is not known",
}.items():
    setattr(DeathCause, _name, DeathCause._make(_name, _text))
for _signal in signal.Signals:
    setattr(DeathCause, _signal.name, DeathCause.of_signal(_signal))
del _name, _text, _signal

_FAULTS = (DeathCause.SIGSEGV, DeathCause.SIGBUS, DeathCause.SIGILL, DeathCause.SIGFPE, DeathCause.SIGABRT)


class Death:
    """What is known of the end of one process; made by whoever saw it, carried by the errors that follow from it."""

    __slots__ = ("cause", "detail", "fault_stack", "log_lines", "log_path", "node", "peak_rss", "pid")

    def __init__(
        self,
        cause: DeathCause = DeathCause.UNKNOWN,
        *,
        pid: int = 0,
        node: str = "",
        detail: str = "",
        peak_rss: int = 0,
        fault_stack: str = "",
        log_lines: tuple[str, ...] = (),
        log_path: str = "",
    ) -> None:
        """Record a death.

        Args:
            cause: why.
            pid: process id, 0 when there was no process.
            node: for people: which node.
            detail: one more sentence, e.g. the limit that was exceeded.
            peak_rss: most resident bytes it ever had, 0 if unknown.
            fault_stack: what faulthandler wrote.
            log_lines: its last lines of output, oldest first.
            log_path: where the rest of them is.
        """
        self.cause = cause
        self.pid = pid
        self.node = node
        self.detail = detail
        self.peak_rss = peak_rss
        self.fault_stack = fault_stack
        self.log_lines = log_lines
        self.log_path = log_path

    def __reduce__(self) -> tuple[Any, ...]:
        return _death, (self.cause, {name: getattr(self, name) for name in self.__slots__ if name != "cause"})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Death):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Death({self.cause}, pid={self.pid})"

    def lines(self) -> list[str]:
        """Return the facts as lines of text: cause and numbers first, then the fault stack, then the last output."""
        facts = [f"cause: {self.cause} ({self.cause.text})"]
        if self.detail:
            facts.append(self.detail)
        numbers = []
        if self.pid:
            numbers.append(f"pid {self.pid}")
        if self.node:
            numbers.append(f"node {self.node}")
        if self.peak_rss:
            numbers.append(f"peak memory {self.peak_rss / 2**20:.1f} MiB")
        if numbers:
            facts.append(", ".join(numbers))
        if self.cause is DeathCause.SIGKILL:
            facts.append("Somebody sent SIGKILL: a person, another program, or the kernel when memory ran out.")
        if self.fault_stack:
            facts += ["stack at the fault:", *("    " + line for line in self.fault_stack.splitlines())]
        elif self.cause in _FAULTS:
            facts.append("No stack was written at the fault.")
        if self.log_lines:
            where = f" (all of it: {self.log_path})" if self.log_path else ""
            facts += [f"its last {len(self.log_lines)} lines of output{where}:"]
            facts += ["    " + line.rstrip("\n") for line in self.log_lines]
        elif self.log_path:
            facts.append(f"its output: {self.log_path} (empty)")
        return facts


def _death(cause: DeathCause, fields: dict[str, Any]) -> Death:
    return Death(cause, **fields)


# -- roots -----------------------------------------------------------------------------------------------------------


class ZrayError(Exception):
    """Base of all exceptions of zray."""


class _HasDeath(ZrayError):
    """An error that follows from the end of a process: carries `death` and shows it."""

    death: Death | None = None

    @property
    def cause(self) -> DeathCause:
        """Why the process ended."""
        return DeathCause.UNKNOWN if self.death is None else self.death.cause

    @property
    def exit_code(self) -> int | None:
        """Exit status, if the process ended by itself."""
        return self.cause.code

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that ended it, if one did."""
        return None if self.cause.signal is None else self.cause.name

    @property
    def log_lines(self) -> tuple[str, ...]:
        """Its last lines of output, oldest first."""
        return () if self.death is None else self.death.log_lines

    @property
    def fault_stack(self) -> str:
        """The stack that faulthandler wrote when it crashed; empty if it did not."""
        return "" if self.death is None else self.death.fault_stack


def _compose(first: str, death: Death | None, indent: str = "  ") -> str:
    """Return a message: the first line, then what is known of the death."""
    if death is None:
        return first
    return "\n".join([first, *(indent + line for line in death.lines())])


# -- yours: the program uses zray in a way it cannot be used ---------------------------------------------------------


class ZrayUsageError(ZrayError, RuntimeError):
    """Wrong use, found before anything was done; the text says what to write instead."""


class SerializationError(ZrayUsageError, TypeError):
    """A value cannot travel between processes. The text names the attribute path of what cannot be pickled."""

    path: str = ""
    """For example "args[1].model.lock"."""


class ActorClassInheritanceException(TypeError):
    """A class derives from an actor class, which is a handle factory and no class any more."""


class DeadlockError(ZrayUsageError):
    """Tasks or actors wait for one another in a circle, which the text names."""


class PendingCallsLimitExceeded(ZrayUsageError):
    """An actor has more calls waiting than its option max_pending_calls allows."""


class TaskUnschedulableError(ZrayUsageError):
    """No node can ever run this task: its demand exceeds every node's total."""

    def __init__(
        self, message: str = "No node can ever run this task.", *, task_id: str = "", function_name: str = ""
    ) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.function_name = function_name


class ActorUnschedulableError(ZrayUsageError):
    """No node can ever hold this actor."""

    def __init__(
        self,
        message: str = "No node can ever hold this actor.",
        *,
        actor_id: str = "",
        class_name: str = "",
        name: str = "",
        namespace: str = "",
    ) -> None:
        super().__init__(message)
        self.actor_id = actor_id or None
        self.class_name = class_name
        self.name = name
        self.namespace = namespace


# -- theirs: user code raised, or a process or node of the cluster ended ---------------------------------------------


class TaskError(ZrayError):
    """A task or an actor's method raised. The object raised is an instance of the user's exception class, too.

    `cause` is the user's exception. The text joins the remote tracebacks of every hop and shows where each call was
    made. Attributes of the user's exception can be read on this one; after them `failure` (a `zray.failures.Failure`)
    and its attributes: `function_name`, `traceback_str`, `pid`, `node`, `task_id`, `actor_id`, `call_site`.
    """

    # Under names that no user exception has: the attributes of the user's exception are copied beside them.
    _zray_failure: Any = None
    _zray_cause: BaseException | None = None

    def __init__(self, message: str = "", cause: BaseException | None = None) -> None:
        super().__init__(message)
        self._zray_cause = cause

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Stand before the user's class: one that forbids or counts subclasses does not see the joint class."""

    @property
    def cause(self) -> BaseException | None:
        """The exception that the user's code raised."""
        return self._zray_cause

    def as_instanceof_cause(self) -> TaskError:
        """Return this error as an instance of its cause's class: it is one already."""
        return self

    def __str__(self) -> str:
        return super().__str__() if self._zray_failure is None else str(self._zray_failure.text())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._zray_cause!r})"

    def __getattr__(self, name: str) -> Any:
        # Called only for what neither the instance nor the user's class has.
        if not name.startswith("__"):
            if name == "failure":
                return self._zray_failure
            for source in (self._zray_failure, self._zray_cause):
                try:
                    return getattr(source, name)
                except AttributeError:
                    pass
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> Any:
        if self._zray_failure is None:
            return TaskError, (*self.args, self._zray_cause)
        return self._zray_failure.rebuilder()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


class TaskCancelledError(ZrayError):
    """The task was cancelled with `zray.cancel`."""

    def __init__(self, message: str | None = None, *, task_id: str = "", function_name: str = "") -> None:
        """Without a message, one is made of the task's id (hexadecimal) and name."""
        if message is None:
            which = " ".join(part for part in (function_name, task_id) if part)
            message = f"Task {which} was cancelled." if which else "This task or one of its inputs was cancelled."
        super().__init__(message)
        self.task_id = task_id


class GetTimeoutError(ZrayError, TimeoutError):
    """The time given to `get` is over and not every value was there."""


class WorkerCrashedError(_HasDeath):
    """The process that ran the task ended before the task did, more often than max_retries allows."""

    def __init__(
        self, message: str | None = None, *, death: Death | None = None, function_name: str = "", task_id: str = ""
    ) -> None:
        """Without a message, one is made of the task's name and of what is known of the death."""
        if message is None:
            which = f" ({function_name})" if function_name else ""
            message = _compose(f"The worker died unexpectedly while executing this task{which}.", death)
        super().__init__(message)
        self.death = death
        self.task_id = task_id


class OutOfMemoryError(_HasDeath, MemoryError):
    """A process was ended because its node ran out of memory; the text says how much it and others had."""

    def __init__(
        self, message: str | None = None, *, death: Death | None = None, function_name: str = "", task_id: str = ""
    ) -> None:
        """Without a message, one is made of the task's name and of what is known of the death."""
        if message is None:
            which = f" ({function_name})" if function_name else ""
            message = _compose(
                f"The worker was killed because memory ran out while it executed this task{which}.", death
            )
            message += "\n  Let fewer tasks run at a time (num_cpus, memory=...), or give each less to hold."
        super().__init__(message)
        self.death = death
        self.task_id = task_id


class NodeDiedError(_HasDeath):
    """The node that ran the task has died."""

    def __init__(
        self,
        message: str | None = None,
        *,
        death: Death | None = None,
        node: str = "",
        function_name: str = "",
        task_id: str = "",
    ) -> None:
        """Without a message, one is made of the names of node and task and of what is known of the death."""
        if message is None:
            where, which = f" {node}" if node else "", f" ({function_name})" if function_name else ""
            message = _compose(f"The node{where} has died while executing this task{which}.", death)
        super().__init__(message)
        self.death = death
        self.node = node
        self.task_id = task_id


class ActorError(_HasDeath):
    """An actor could not finish a call: it is dead (`ActorDiedError`) or away for now (`ActorUnavailableError`)."""

    actor_init_failed: bool = False
    """Whether its constructor raised."""

    def __init__(
        self,
        message: str = "The actor experienced an error before finishing this task.",
        *,
        actor_id: str = "",
        death: Death | None = None,
    ) -> None:
        super().__init__(message)
        self.actor_id = actor_id or None
        self.death = death

    @property
    def error_msg(self) -> str:
        """The message."""
        return str(self)

    @property
    def preempted(self) -> bool:
        """Whether the actor went because its node was preempted."""
        return self.cause is DeathCause.PREEMPTED


# The line that says it, for causes that are not simply the end of the worker process. Programs match on these.
_ACTOR_DEATHS: Final = {
    DeathCause.KILLED: "The actor is dead because it was killed by `zray.kill`.",
    DeathCause.EXIT_ACTOR: "The actor is dead because it ended itself: exit_actor() was called.",
    DeathCause.OWNER_DIED: "The actor is dead because its owner has died.",
    DeathCause.NODE_DIED: "The actor died because its node has died.",
    DeathCause.PREEMPTED: "The actor died because its node has died: the actor's node was preempted.",
    DeathCause.HANDLES_GONE: "The actor is dead because all references to it were removed.",
    DeathCause.JOB_ENDED: "The actor is dead because the program that created it has ended.",
    DeathCause.NOT_STARTED: "The actor is dead because its worker process could not be started.",
    DeathCause.PLACEMENT_GROUP_REMOVED: "The actor is dead because its placement group was removed.",
    DeathCause.OOM: "The actor is dead because its worker process has died: memory ran out.",
}


class ActorDiedError(ActorError):
    """The actor is dead: it ended during the call, or before it."""

    def __init__(
        self,
        message: str | None = None,
        *,
        actor_id: str = "",
        class_name: str = "",
        name: str = "",
        namespace: str = "",
        death: Death | None = None,
        creation_error: BaseException | str | None = None,
        never_started: bool = False,
    ) -> None:
        """Without a message, one is made of the rest.

        Args:
            message: the whole text.
            actor_id: hexadecimal.
            class_name: name of the actor's class.
            name: the actor's own name, if it has one.
            namespace: where that name is valid.
            death: what is known of the end of its process.
            creation_error: what its constructor raised (or the text of it).
            never_started: it was ended before its process existed.
        """
        if creation_error is not None and death is None:
            death = Death(DeathCause.INIT_FAILED)
        if message is None:
            if creation_error is not None:
                message = f"The actor died because of an error raised in its creation task, {creation_error}"
            else:
                message = _actor_death_text(actor_id, class_name, name, namespace, death, never_started)
        super().__init__(message, actor_id=actor_id, death=death)
        self.actor_init_failed = creation_error is not None
        self.creation_error = creation_error if isinstance(creation_error, BaseException) else None


def _actor_death_text(
    actor_id: str, class_name: str, name: str, namespace: str, death: Death | None, never_started: bool
) -> str:
    lines = ["The actor died unexpectedly before finishing this task."]
    facts = (("class", class_name), ("actor_id", actor_id), ("name", name), ("namespace", namespace))
    lines += [f"  {label}: {value}" for label, value in facts if value]
    if death is not None:
        lines.append(_ACTOR_DEATHS.get(death.cause) or "The actor is dead because its worker process has died.")
        lines += ["  " + line for line in death.lines()]
    if never_started:
        lines.append("The actor never ran: it was ended before it started.")
    return "\n".join(lines)


class ActorUnavailableError(ActorError):
    """The actor does not answer now but may come back; the call may or may not have been executed."""

    def __init__(
        self,
        message: str | None = None,
        *,
        actor_id: str = "",
        class_name: str = "",
        name: str = "",
        namespace: str = "",
        detail: str = "it is restarting",
        death: Death | None = None,
    ) -> None:
        """Without a message, one is made of the rest; see `ActorDiedError`."""
        if message is None:
            which = " ".join(
                part for part in (class_name, name and f"{namespace}/{name}".lstrip("/"), actor_id) if part
            )
            text = f"The actor{' ' + which if which else ''} is unavailable: {detail}. "
            message = _compose(text + "The call may or may not have been executed on it.", death)
        super().__init__(message, actor_id=actor_id, death=death)


class CheckpointError(ActorError):
    """An actor with checkpoints cannot save its state (the text says why): it did not run the call, whose effect could not have been kept."""


class AsyncioActorExit(ZrayError):
    """Raised inside an async actor to end it (`exit_actor`); user code that catches it should raise it again."""


class RuntimeEnvSetupError(ZrayError):
    """The environment that runtime_env describes could not be built."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or "Failed to set up the runtime environment.")


class TaskPlacementGroupRemoved(ZrayError):
    """The placement group that the task was to run in was removed."""

    def __init__(self, message: str = "The placement group of this task has been removed.") -> None:
        super().__init__(message)


class ActorPlacementGroupRemoved(ZrayError):
    """The placement group that the actor lived in was removed."""

    def __init__(self, message: str = "The placement group of this actor has been removed.") -> None:
        super().__init__(message)


# -- the data's: an object is gone, or there is no room --------------------------------------------------------------


class ObjectStoreFullError(ZrayError):
    """The object store has no room and nothing in it can leave it."""


class OutOfDiskError(ZrayError):
    """The object store is full and the disk that it spills to is, too."""


class ObjectLostError(ZrayError):
    """The value is gone: all copies were on nodes that are gone, and it could not be made again."""

    reason: ClassVar[str] = "all copies of it are lost, and it cannot be made again"

    def __init__(self, message: str | None = None, *, object_id: str = "", call_site: str = "") -> None:
        """Without a message, one is made of the object's id (hexadecimal) and of where its reference was made."""
        if message is None:
            message = f"Object {object_id}: {self.reason}."
            if call_site:
                message += f" Its reference was made at {call_site}."
        super().__init__(message)
        self.object_id = object_id

    @classmethod
    def for_id(cls, object_id: bytes, detail: str = "", call_site: str = "") -> ObjectLostError:
        """Return the error for a 16-byte id, with one more reason if given."""
        text = object_id.hex()
        if not detail:
            return cls(object_id=text, call_site=call_site)
        made = f" Its reference was made at {call_site}." if call_site else ""
        return cls(f"Object {text}: {cls.reason} ({detail}).{made}", object_id=text)


class ObjectFetchTimedOutError(ObjectLostError):
    """No copy arrived in time although some node should have one."""

    reason = "no copy of it arrived in time"


class ObjectFreedError(ObjectLostError):
    """The value was dropped on request while somebody still had a reference."""

    reason = "it was freed on request; keep it, or do not free it, while it is used"


class OwnerDiedError(ObjectLostError):
    """The process that knew how to make the value again has died."""

    reason = "its owner, the process that made the reference, has died"


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The value was deleted although a reference exists. A fault of zray: please report it."""

    reason = "it was deleted although references to it exist; please report this as a fault of zray"


class ObjectReconstructionFailedError(ObjectLostError):
    """The value is lost and the task that makes it cannot run again."""

    reason = "all copies of it are lost, and the task that made it cannot run again"


class ObjectReconstructionFailedMaxAttemptsExceededError(ObjectReconstructionFailedError):
    """The value is lost and its task has used up max_retries."""

    reason = "all copies of it are lost, and the task that made it has used up max_retries"


class ObjectReconstructionFailedLineageEvictedError(ObjectReconstructionFailedError):
    """The value is lost and so is the record of how it was made."""

    reason = "all copies of it are lost, and the record of how to make it was dropped to save memory"


# -- ours ------------------------------------------------------------------------------------------------------------


class ZraySystemError(ZrayError):
    """zray itself cannot go on: the broker ended, the segment is not readable, a file of the session is missing."""


class ZrayInternalError(ZraySystemError):
    """A fault of zray, not of the program: please report it."""

    def __init__(self, message: str = "") -> None:
        """The text gets the request to report it."""
        note = "This is a fault of zray: please report it with this text."
        super().__init__(message if message.endswith(note) else f"{message}\n{note}".lstrip("\n"))


# Names under which programs written for Ray's exceptions look for these.
ZrayTaskError = TaskError
ZrayActorError = ActorError
