"""Exceptions on their way from the process that raised them to the one that asked.

Covers the failure record: capturing an exception in a worker, adding a hop when a task fails because its input did,
and rebuilding something that can be raised on the caller. Does not cover the classes (`zray.errors`), how records are
stored (an object whose data is `dump(failure)`), or whether a task is tried again (the broker).

A record keeps the user's exception apart from the story around it: the story must always arrive, the exception if it
can. Exceptions are hard to move: classes whose `__init__` cannot be called with `args`, attributes that cannot be
pickled, modules that the caller lacks. So a captured exception is tried whole and checked by unpickling it; else it is
taken to parts (class, args, attributes) and put together without calling `__init__`; else a stand-in class of the
same name, derived from the nearest built-in exception, takes its place.
"""

from __future__ import annotations

import builtins
import os
import pickle
import sys
import traceback
from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zray.errors import ObjectFreedError, TaskError, ZrayError, ZraySystemError

if TYPE_CHECKING:
    from collections.abc import Callable


_TEXT_LIMIT: Final = 64 * 1024
"""Characters of one traceback that travel; the middle of a longer one is left out."""
_CHAIN_LIMIT: Final = 16
"""Exceptions of one `__cause__` / `__context__` chain that travel."""
_JOINT_CLASSES_LIMIT: Final = 1024

# How the exception itself travels.
_WHOLE: Final = 0
_PARTS: Final = 1
_NAME_ONLY: Final = 2


class Hop(NamedTuple):
    """One call on the way of a failure: the task that raised, or that passed on what another one raised."""

    function_name: str
    task_id: str = ""
    """Hexadecimal."""
    actor_id: str = ""
    actor_repr: str = ""
    pid: int = 0
    node: str = ""
    traceback: str = ""
    """Frames of user code (innermost last), and in the last hop the exception itself."""
    call_site: str = ""
    """Where `.remote()` was called: "file:line"."""

    def title(self) -> str:
        """Return the line that names the call and where it ran."""
        facts = [f"pid={self.pid}"] if self.pid else []
        if self.node:
            facts.append(f"node={self.node}")
        if self.actor_id:
            facts.append(f"actor_id={self.actor_id}")
        if self.actor_repr:
            facts.append(f"repr={self.actor_repr}")
        where = f" ({', '.join(facts)})" if facts else ""
        return f"zray::{self.function_name}(){where}"


class PackedException(NamedTuple):
    """An exception as it travels; `payload` is pickled apart, so that it can fail alone."""

    how: int
    payload: bytes
    module: str
    qualname: str
    base: str
    """Name of the nearest built-in exception class."""
    text: str
    """`str()` of the exception."""
    cause: PackedException | None = None
    context: PackedException | None = None
    suppress_context: bool = False


class Failure:
    """Everything that is known of a failed call, in picklable form. `hops` go from the failed call to its origin.

    Without hops it is an error of the system about the call (a dead worker, a lost object), and is raised as it is.
    """

    __slots__ = ("exception", "hops")

    def __init__(self, hops: tuple[Hop, ...], exception: PackedException) -> None:
        self.hops = hops
        self.exception = exception

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (self.hops, self.exception)

    def text(self) -> str:
        """Return the joined remote tracebacks, the origin last."""
        lines: list[str] = []
        prefix = ""
        for hop in self.hops:
            lines.append(prefix + hop.title())
            if hop.call_site:
                lines.append(f"  called at {hop.call_site}")
            if hop.traceback:
                lines.append(hop.traceback)
            prefix = f"zray.errors.TaskError({self.exception.qualname.rpartition('.')[2]}): "
        return "\n".join(lines)

    def rebuilder(self) -> tuple[Callable[..., BaseException], tuple[Failure]]:
        """Return what pickle needs to make the error again from this record."""
        return rebuild, (self,)

    @property
    def function_name(self) -> str:
        """Name of the function or method that failed."""
        return self.hops[0].function_name if self.hops else ""

    @property
    def task_id(self) -> str:
        """Id of the failed task, hexadecimal."""
        return self.hops[0].task_id if self.hops else ""

    @property
    def actor_id(self) -> str | None:
        """Id of the actor whose method failed, hexadecimal; None for a task."""
        return (self.hops[0].actor_id or None) if self.hops else None

    @property
    def pid(self) -> int:
        """Process that ran it."""
        return self.hops[0].pid if self.hops else 0

    @property
    def node(self) -> str:
        """Node that ran it."""
        return self.hops[0].node if self.hops else ""

    @property
    def call_site(self) -> str:
        """Where `.remote()` was called."""
        return self.hops[0].call_site if self.hops else ""

    @property
    def traceback_str(self) -> str:
        """The joined remote tracebacks."""
        return self.text()


# -- in the process that raised --------------------------------------------------------------------------------------


def capture(
    exception: BaseException,
    *,
    function_name: str,
    task_id: bytes = b"",
    actor_id: bytes = b"",
    actor_repr: str = "",
    pid: int = 0,
    node: str = "",
) -> Failure:
    """Return the record of an exception that user code raised. Never raises, whatever the exception does.

    Args:
        exception: as caught, with its traceback.
        function_name: what was called, for people.
        task_id: 16 bytes, or empty.
        actor_id: 16 bytes for a method.
        actor_repr: `repr` of the actor's instance.
        pid: of the executing process; 0 takes this one.
        node: name of the node, for people.
    """
    nested = exception._zray_failure if isinstance(exception, TaskError) else None
    hop = Hop(
        function_name=function_name,
        task_id=task_id.hex(),
        actor_id=actor_id.hex(),
        actor_repr=actor_repr,
        pid=pid or os.getpid(),
        node=node,
        traceback=_format(exception, frames_only=nested is not None),
    )
    if nested is not None:
        # A failed input that came out of `get` here: its record goes on as it is, with this hop before it.
        return Failure((hop, *nested.hops), nested.exception)
    return Failure((hop,), _pack(exception, set()))


def from_error(error: BaseException) -> Failure:
    """Return the record of an error that the system reports about a call: raised on the caller as it is."""
    if isinstance(error, TaskError) and error._zray_failure is not None:
        failure: Failure = error._zray_failure
        return failure
    return Failure((), _pack(error, set()))


def because_of_input(
    failure: Failure,
    *,
    function_name: str,
    task_id: bytes = b"",
    actor_id: bytes = b"",
    pid: int = 0,
    node: str = "",
) -> Failure:
    """Return the record of a task that could not run because an argument is the failed result `failure`."""
    story = "  At least one of the input arguments for this task could not be computed:"
    if not failure.hops:
        what = failure.exception
        story += f"\n{_full_name(what.module, what.qualname)}: {what.text}"
    hop = Hop(function_name, task_id.hex(), actor_id.hex(), "", pid, node, story)
    return Failure((hop, *failure.hops), failure.exception)


def dump(failure: Failure) -> bytes:
    """Return the bytes that are stored for a failure (`pickle.loads` gives it back)."""
    return pickle.dumps(failure, protocol=5)


def load(data: bytes | memoryview) -> Failure:
    """Return the failure that `dump` packed."""
    failure = pickle.loads(data)
    if type(failure) is not Failure:
        raise TypeError(f"not a failure record: {type(failure).__name__}")
    return failure


# When even a failure finds no room in the store: a record that needs few bytes, because its pickle is only its name.
NO_ROOM: Final = Failure(
    (),
    PackedException(
        _WHOLE,
        pickle.dumps(ZraySystemError("the call failed, and the object store had no room to say why"), protocol=5),
        "zray.errors",
        "ZraySystemError",
        "Exception",
        "the call failed, and the object store had no room to say why",
    ),
)
NO_ROOM_DATA: Final = b"czray.failures\nNO_ROOM\n."
"""What `load` turns into NO_ROOM; small enough to be kept in an object's entry."""


FREED: Final = Failure(
    (),
    PackedException(
        _WHOLE,
        pickle.dumps(ObjectFreedError("the object was freed on request while it was referenced"), protocol=5),
        "zray.errors",
        "ObjectFreedError",
        "Exception",
        "the object was freed on request while it was referenced",
    ),
)
FREED_DATA: Final = b"czray.failures\nFREED\n."
"""The same for a value that was dropped on request."""


def call_site() -> str:
    """Return "file:line" of the innermost frame outside zray: where the user's program called it."""
    frame = sys._getframe(1)
    while _is_ours(frame.f_code.co_filename):
        if frame.f_back is None:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# Files whose frames say nothing to users. Libraries on top (zray/util, zray/tune ...) stay in: users may look there.
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_INNER = tuple(part + os.sep for part in ("broker", "gcs", "cluster"))
_known_files: dict[str, bool] = {}


def _is_ours(filename: str) -> bool:
    known = _known_files.get(filename)
    if known is None:
        name = ""
        if filename.startswith(_PACKAGE):
            name = filename[len(_PACKAGE) :]
        elif filename.startswith("zray" + os.sep):  # compiled modules know their path relative to the source tree
            name = filename[len("zray" + os.sep) :]
        known = bool(name) and (os.sep not in name or name.startswith(_INNER))
        if len(_known_files) > 10_000:
            _known_files.clear()
        _known_files[filename] = known
    return known


def _format(exception: BaseException, frames_only: bool) -> str:
    """Return user frames and (unless frames_only) exception lines of a traceback, with its chain and groups."""
    try:
        found = traceback.TracebackException(type(exception), exception, exception.__traceback__, compact=True)
        _drop_our_frames(found)
        if frames_only:
            lines = found.stack.format()
        else:
            found.__notes__ = None  # type: ignore[attr-defined] # they travel with the exception and are shown there
            lines = list(found.format())
            title = "Traceback (most recent call last):\n"
            if not getattr(found, "exceptions", None) and title in lines:
                # The title of the last block is not needed under the line that names the call.
                del lines[len(lines) - 1 - lines[::-1].index(title)]
        text = "".join(lines).rstrip("\n")
    except Exception as problem:
        text = f"  (its traceback cannot be shown: {_safe_text(problem)})\n"
        text += f"{type(exception).__name__}: {_safe_text(exception)}"
    if len(text) > _TEXT_LIMIT:
        half = _TEXT_LIMIT // 2
        text = f"{text[:half]}\n  ... {len(text) - _TEXT_LIMIT} characters left out ...\n{text[-half:]}"
    return text


def _drop_our_frames(found: traceback.TracebackException) -> None:
    pending: list[Any] = [found]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not _is_ours(frame.filename)]
        pending += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]


def _safe_text(exception: BaseException) -> str:
    try:
        return str(exception)
    except Exception:
        return f"<str() of {type(exception).__name__} failed>"


def _full_name(module: str, qualname: str) -> str:
    return qualname if module in ("builtins", "__main__") else f"{module}.{qualname}"


# -- packing the exception -------------------------------------------------------------------------------------------


def _pickle(value: Any) -> bytes:
    """Pickle plainly, or with cloudpickle where that fails or would name something that only this process has."""
    try:
        data = pickle.dumps(value, protocol=5)
        if b"__main__" not in data:
            return data
    except Exception:
        pass
    import cloudpickle

    packed: bytes = cloudpickle.dumps(value, protocol=5)
    return packed


def _pack(exception: BaseException, seen: set[int]) -> PackedException:
    seen.add(id(exception))
    how, payload = _pack_payload(exception)
    cls = type(exception)
    follow = len(seen) < _CHAIN_LIMIT
    cause, context = exception.__cause__, exception.__context__
    return PackedException(
        how,
        payload,
        cls.__module__,
        cls.__qualname__,
        next(base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"),
        _safe_text(exception),
        _pack(cause, seen) if follow and cause is not None and id(cause) not in seen else None,
        _pack(context, seen) if follow and context is not None and id(context) not in seen else None,
        exception.__suppress_context__,
    )


def _pack_payload(exception: BaseException) -> tuple[int, bytes]:
    try:
        payload = _pickle(exception)
        if type(exception).__module__ == "builtins" or _comes_back(exception, payload):
            return _WHOLE, payload
    except Exception:
        pass
    try:
        own = {name: _pickle_or_repr(value) for name, value in exception.__dict__.items()}
        members = {name: _pickle_or_repr(getattr(exception, name, None)) for name in _members(type(exception))}
        args = [_pickle_or_repr(value) for value in exception.args]
        return _PARTS, pickle.dumps((_pickle(type(exception)), args, own, members), protocol=5)
    except Exception:
        return _NAME_ONLY, b""


def _comes_back(exception: BaseException, payload: bytes) -> bool:
    """Tell whether unpickling gives the same: `__init__` may refuse `args`, or change them again."""
    back = pickle.loads(payload)
    if type(back) is not type(exception):
        return False
    try:
        return bool(back.args == exception.args) and all(
            getattr(back, name, None) == getattr(exception, name, None) for name in _members(type(exception))
        )
    except Exception:
        return True  # arguments that cannot be compared, such as arrays


class Unserializable:
    """Stands for an argument or attribute of an exception that could not travel; its `repr` is the original's."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return Unserializable, (self.text,)

    def __repr__(self) -> str:
        return self.text


def _pickle_or_repr(value: Any) -> bytes:
    try:
        data = _pickle(value)
        pickle.loads(data)
        return data
    except Exception:
        try:
            text = repr(value)
        except Exception:
            text = f"<{type(value).__name__}, repr() failed>"
        return pickle.dumps(Unserializable(f"<not serializable: {text}>"), protocol=5)


def _members(cls: type) -> list[str]:
    """Return names of fields that live outside `__dict__`: those of C exceptions (OSError.errno) and slots."""
    return [
        name
        for base in cls.__mro__
        if base not in (BaseException, object)
        for name, value in base.__dict__.items()
        if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)) and not name.startswith("__")
    ]


# -- on the caller ---------------------------------------------------------------------------------------------------


def rebuild(failure: Failure, site: str = "") -> BaseException:
    """Return an exception to raise for a failed call.

    For an exception of user code it is an instance of `TaskError` and of the user's class, with the attributes of the
    original; `cause` is the original. For an error of the system it is that error.

    Args:
        failure: the record.
        site: "file:line" where the call was made, if the record does not say so itself.
    """
    cause, problem = _unpack(failure.exception)
    if not failure.hops:
        if site and isinstance(cause, ZrayError) and len(cause.args) == 1:
            cause.args = (f"{cause.args[0]}\n  called at {site}",)
        return cause
    first, *rest = failure.hops
    if site and not first.call_site:
        first = first._replace(call_site=site)
    if problem:
        last = rest[-1] if rest else first
        last = last._replace(traceback=f"{last.traceback}\n  ({problem})")
        first, rest = (first, [*rest[:-1], last]) if rest else (last, rest)
    return _join(cause, Failure((first, *rest), failure.exception))


def _unpack(packed: PackedException) -> tuple[BaseException, str]:
    """Return the exception, or a stand-in and why there is one."""
    problem = ""
    exception: BaseException | None = None
    try:
        if packed.how == _WHOLE:
            exception = pickle.loads(packed.payload)
        elif packed.how == _PARTS:
            exception = _from_parts(packed.payload)
        else:
            problem = f"{packed.qualname} isn't serializable: a stand-in is raised"
    except Exception as error:
        problem = (
            f"{_full_name(packed.module, packed.qualname)} cannot be rebuilt here, a stand-in is raised: {error!r}"
        )
    if not isinstance(exception, BaseException):
        exception = _stand_in(packed)
    if packed.cause is not None:
        exception.__cause__ = _unpack(packed.cause)[0]
    if packed.context is not None:
        exception.__context__ = _unpack(packed.context)[0]
    exception.__suppress_context__ = packed.suppress_context
    return exception, problem


def _new(cls: type, args: tuple[Any, ...]) -> BaseException:
    """Make an instance without calling any Python `__new__` or `__init__`."""
    for base in cls.__mro__:
        if base.__module__ == "builtins" and base is not object:
            for given in (args, ()):
                try:
                    found: BaseException = base.__new__(cls, *given)
                except TypeError:  # not the base that decides the layout, or it wants other arguments
                    continue
                found.args = args
                return found
    raise TypeError(f"cannot make an instance of {cls.__qualname__}")


def _fill(exception: BaseException, own: dict[str, Any], members: dict[str, Any]) -> None:
    exception.__dict__.update(own)
    for name, value in members.items():
        try:
            BaseException.__setattr__(exception, name, value)
        except (AttributeError, TypeError):
            pass  # read-only: it was set from args, or is computed


def _from_parts(payload: bytes) -> BaseException:
    cls, args, own, members = pickle.loads(payload)
    exception = _new(pickle.loads(cls), tuple(pickle.loads(arg) for arg in args))
    _fill(
        exception,
        {name: pickle.loads(value) for name, value in own.items()},
        {name: pickle.loads(value) for name, value in members.items()},
    )
    return exception


def _stand_in(packed: PackedException) -> BaseException:
    name = packed.qualname.rpartition(".")[2]
    names = {"__module__": packed.module, "__qualname__": packed.qualname, "__str__": _stand_in_text}
    try:
        return _new(type(name, (getattr(builtins, packed.base),), names), (packed.text,))
    except (AttributeError, TypeError):  # a class of a newer Python, or a group: it cannot be made of a text
        return _new(type(name, (Exception,), names), (packed.text,))


def _stand_in_text(exception: BaseException) -> str:
    return str(exception.args[0])


_joint_classes: dict[type, type[TaskError]] = {}


def _joint_class(cls: type[BaseException]) -> type[TaskError]:
    """Return the class that is both TaskError and `cls`; TaskError alone where there can be none."""
    found = _joint_classes.get(cls)
    if found is None:
        if issubclass(TaskError, cls) or not issubclass(cls, Exception):
            found = TaskError
        else:
            try:
                found = type(f"TaskError({cls.__name__})", (TaskError, cls), {"__module__": TaskError.__module__})
            except TypeError as error:
                import logging

                logging.getLogger("zray").warning(
                    "%s cannot be subclassed (%s): raised as TaskError only; `error.cause` is the exception itself.",
                    cls.__qualname__,
                    error,
                )
                found = TaskError
        if len(_joint_classes) >= _JOINT_CLASSES_LIMIT:
            _joint_classes.clear()
        _joint_classes[cls] = found
    return found


def _join(cause: BaseException, failure: Failure) -> TaskError:
    """Return the exception that is both: a TaskError with the record, and the user's with its attributes."""
    try:
        error = _new(_joint_class(type(cause)), cause.args)
    except TypeError:
        error = _new(TaskError, cause.args)
    assert isinstance(error, TaskError)
    _fill(error, cause.__dict__, {name: getattr(cause, name, None) for name in _members(type(cause))})
    error.__dict__["_zray_failure"] = failure
    error.__dict__["_zray_cause"] = cause
    error.__cause__ = cause.__cause__
    error.__suppress_context__ = cause.__suppress_context__
    return error
