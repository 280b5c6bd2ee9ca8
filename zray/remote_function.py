"""`@zray.remote` on a function: check options, pack, submit, return references.

Covers `RemoteFunction` and what it prepares once (code, shape). Does not cover classes (`zray.actor`), the options themselves (`zray.options`),
or the way of a call out of the process (`zray.submission`).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, cast

import msgspec

from zray import api, options, placing, resources, serialization, signatures
from zray.call_signature import Signature, signature_of
from zray.task import ACTOR_CREATION, ACTOR_METHOD, TASK, CallShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType

    from zray.object_store import ObjectRef
    from zray.session import Session

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
_CODE_LIMIT: Final = 95 << 20
"""Pickled functions larger than this are refused: they hold data that belongs into the store."""
_SHAPE_EXTRAS: Final = ("runtime_env", "max_calls", "concurrency_group")

_sites: dict[tuple[CodeType, int], str] = {}


def call_site(depth: int) -> str:
    """Return "file:line" of the frame `depth` above the caller; cached by position, so that it costs little on hot paths."""
    frame = sys._getframe(depth + 1)
    key = (frame.f_code, frame.f_lasti)
    site = _sites.get(key)
    if site is None:
        if len(_sites) > 10_000:
            _sites.clear()
        site = _sites[key] = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return site


def make_shape(kind: int, function: bytes, name: str, chosen: dict[str, Any], method: str = "") -> CallShape:
    """Build the shape of calls with resolved options; its key is a digest of all that it says."""
    retry: bytes = b""
    wanted = chosen.get("retry_exceptions")
    if wanted is True:
        retry = b"*"
    elif wanted:
        retry = serialization.dumps(tuple(wanted)).stream
    extra = {key: chosen[key] for key in _SHAPE_EXTRAS if chosen.get(key)}
    num_returns = chosen.get("num_returns", 1)
    if not isinstance(num_returns, int):
        raise NotImplementedError(
            f'num_returns="{num_returns}" is not available yet: return a list, or put the items into an actor'
        )
    amounts = {} if kind == ACTOR_METHOD else options.resources_of(chosen, actor=kind == ACTOR_CREATION)
    draft = CallShape(
        b"",
        kind,
        function,
        name,
        method,
        num_returns,
        resources.pack(amounts),
        int(chosen.get("max_retries", 0) or 0),
        retry,
        serialization.dumps(extra).stream if extra else b"",
        b"" if kind == ACTOR_METHOD else _strategy_of(chosen, amounts, name),
    )
    return _with_key(draft)


def _strategy_of(chosen: dict[str, Any], amounts: dict[str, int], name: str) -> bytes:
    if chosen.get("scheduling_strategy") is None and not chosen.get("label_selector"):
        return b""
    from zray.util.scheduling_strategies import record_of

    return record_of(chosen, amounts, name)


def captured_shape(
    session: Session, shape: CallShape, chosen: dict[str, Any], known: dict[bytes, CallShape]
) -> CallShape:
    """Return the shape of a call made by something whose placement group captures its calls: in that group, unless its options
    say otherwise. `known`: those made before, by strategy."""
    strategy = session.captured()
    if not strategy or chosen.get("scheduling_strategy") is not None:
        return shape
    found = known.get(strategy)
    if found is None:
        labels = placing.unpack(shape.strategy).hard
        merged = placing.pack(msgspec.structs.replace(placing.unpack(strategy), hard=labels))
        found = known[strategy] = _with_key(msgspec.structs.replace(shape, strategy=merged, key=b""))
    return found


def _with_key(draft: CallShape) -> CallShape:
    key = hashlib.blake2b(msgspec.msgpack.encode(draft), digest_size=16).digest()
    return msgspec.structs.replace(draft, key=key)


class Code:
    """A function or class, pickled once in a session, at its first use: whatever options it is called with, it is the same code
    with the same captured state."""

    __slots__ = ("_exported", "_kind", "_name", "value")

    def __init__(self, value: Any, name: str, kind: str) -> None:
        self.value = value
        self._name = name
        self._kind = kind
        self._exported: tuple[Session, bytes, ObjectRef | None] | None = None

    def exported_in(self, session: Session) -> tuple[bytes, ObjectRef | None]:
        """Store it in a session; return as `Session.export`. Raises ValueError when it is too large."""
        found = self._exported
        if found is None or found[0] is not session:
            packed = serialization.dumps_code(self.value, what=f"the {self._kind} {self._name}")
            if packed.size > _CODE_LIMIT:
                title = "remote function" if self._kind == "function" else self._kind
                raise ValueError(
                    f"The {title} {self._name} is too large ({packed.size / 2**20:.0f} MiB > {_CODE_LIMIT >> 20} MiB). "
                    "Check that it does not capture a large array or other object; put such data with zray.put() and pass the reference"
                )
            found = self._exported = session, *session.export(packed)
        return found[1], found[2]


class RemoteFunction(Generic[P, R_co]):
    """A function whose calls run as tasks: `f.remote(...)` returns a reference at once."""

    def __init__(self, function: Callable[P, R_co], chosen: dict[str, Any], code: Code | None = None) -> None:
        self._function = function
        self._options = chosen
        self._name = str(chosen.get("name") or getattr(function, "__name__", type(function).__name__))
        self._code = Code(function, self._name, "function") if code is None else code
        self._prepared: tuple[Session, CallShape, ObjectRef | None, Signature] | None = None
        self._captured: dict[bytes, CallShape] = {}
        functools.update_wrapper(cast("Any", self), function, updated=())

    if not TYPE_CHECKING:  # so that checkers refuse direct calls, too

        def __call__(self, *args: Any, **kwargs: Any) -> R_co:
            raise TypeError(
                f"Remote functions cannot be called directly. Instead of running '{self._function.__name__}()', "
                f"try '{self._function.__name__}.remote()'."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self._function, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["function"], state["options"])  # type: ignore[misc]

    def _prepare(self) -> tuple[Session, CallShape, ObjectRef | None, Signature]:
        # Not when it is made: while a function that names itself is being unpickled, it has no defaults yet.
        session = api.current_session()
        function, code = self._code.exported_in(session)
        shape = make_shape(TASK, function, self._name, self._options)
        self._captured.clear()
        self._prepared = session, shape, code, signature_of(self._function)
        return self._prepared

    @signatures.task_call
    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit one call. Arguments that are references are replaced by their values where the task runs.

        Returns:
            The reference of the result; with num_returns > 1 a list of references; with num_returns=0 None.

        Raises:
            SerializationError: an argument cannot be pickled.
        """
        prepared = self._prepared
        if prepared is None or prepared[0].closed:
            prepared = self._prepare()
        session, shape, code, signature = prepared
        if session.capturing:
            shape = captured_shape(session, shape, self._options, self._captured)
        signature.check(args, kwargs, self._name)
        refs = api.submitter_of(session).submit(shape, args, kwargs, call_site(1), code)
        if shape.num_returns == 1:
            return refs[0]
        return refs if shape.num_returns else None

    @signatures.task_map
    def map(self, *iterables: Iterable[Any]) -> list[ObjectRef]:
        """Submit one call for each item (or each tuple of items of several iterables); return the references in order.

        Calls are packed many to a message; nothing is waited for.
        """
        prepared = self._prepared
        if prepared is None or prepared[0].closed:
            prepared = self._prepare()
        session, shape, code, _ = prepared
        if session.capturing:
            shape = captured_shape(session, shape, self._options, self._captured)
        if shape.num_returns != 1:
            raise ValueError("map needs num_returns=1")
        submit, site = api.submitter_of(session).submit, call_site(1)
        return [submit(shape, args, {}, site, code)[0] for args in zip(*iterables, strict=False)]

    @signatures.task_options
    def options(self, **changes: Any) -> RemoteFunction[P, R_co]:
        """Return the same function with other options; see `zray.remote`. Raises ValueError or TypeError for bad ones."""
        return RemoteFunction(self._function, options.resolve("function", changes, self._options), self._code)

    def _remote(self, args: Any = (), kwargs: Any = None, **changes: Any) -> Any:
        """`.options(**changes).remote(*args, **kwargs)`, under the name that programs written for Ray use."""
        target: Any = self.options(**changes) if changes else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy graphs are not part of this version."""
        raise NotImplementedError("lazy graphs (bind) are not available yet; call .remote()")


def remote_function(function: Callable[P, R_co], chosen: dict[str, Any]) -> RemoteFunction[P, R_co]:
    """Wrap a function. Raises TypeError for what cannot be one."""
    if not callable(function):
        raise TypeError(f"@zray.remote needs a function or a class, not {type(function).__name__}")
    return RemoteFunction(function, chosen)
