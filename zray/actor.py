"""`@zray.remote` on a class: creating actors, handles, method calls.

Covers `ActorClass`, `ActorHandle`, `ActorMethod` and the options of methods. Does not cover the connection to an actor (`zray.submission.ActorLink`)
or its life (the broker's actor machine).

A handle holds a reference to the actor's *life object*, wherever it is copied; when the last one goes, the actor ends.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn

from zray import _store, api, errors, options, resources, signatures, wire
from zray.actor_runtime import is_asynchronous
from zray.call_signature import Signature, signature_of
from zray.execution import ActorExitRequested
from zray.ids import ActorId
from zray.remote_function import Code, call_site, captured_shape, make_shape
from zray.submission import pack_call
from zray.task import ACTOR_CREATION, ACTOR_METHOD, ActorSpec, CallShape, TaskSpec

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from zray.object_store import ObjectRef
    from zray.session import Session

    T_co = TypeVar("T_co", covariant=True, default=Any)
else:
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)

_METHOD_OPTIONS = "__zray_method_options__"
_ALWAYS = {
    "__ray_ready__": 1,
    "__ray_call__": 1,
    "__ray_terminate__": 1,
    "__zray_ready__": 1,
    "__zray_call__": 1,
    "__zray_terminate__": 1,
}


@signatures.method_decorator
def method(*functions: Any, **chosen: Any) -> Any:
    """Mark a method of an actor class: `@zray.method` for its types alone, `@zray.method(num_returns=2, ...)` with options for all its calls.

    Raises:
        TypeError: positional arguments other than the method.
        ValueError: unknown options, or parentheses without any.
    """
    if len(functions) == 1 and not chosen and callable(functions[0]):
        return functions[0]
    if functions:
        raise TypeError("@zray.method takes options by name only, such as @zray.method(num_returns=2)")
    if not chosen:
        raise ValueError(
            "@zray.method needs no parentheses, or at least one option, such as @zray.method(num_returns=2)"
        )
    options.resolve("method", chosen)

    def decorate(function: Any) -> Any:
        setattr(function, _METHOD_OPTIONS, dict(chosen))
        return function

    return decorate


def exit_actor() -> NoReturn:
    """Called inside a method: end this actor on purpose after the call; it is not restarted. Raises TypeError outside of an actor."""
    if not api.current_session().current().actor:
        raise TypeError("exit_actor() can be called only inside a method of an actor")
    raise ActorExitRequested


def _method_table(cls: type) -> dict[str, int]:
    """Public methods of a class and their num_returns."""
    found: dict[str, int] = {}
    for name, member in inspect.getmembers(cls, callable):
        if name.startswith("__") and name not in ("__call__", "__len__", "__getitem__", "__next__", "__iter__"):
            continue
        chosen = getattr(member, _METHOD_OPTIONS, {})
        count = chosen.get("num_returns", 1)
        found[name] = count if isinstance(count, int) else 1
    return found


class Actor(signatures.ActorBase):
    """Base of actor classes whose handles type checkers see through; it changes nothing at run time.

    In `@zray.remote class Counter(zray.Actor)` the constructor's arguments are checked at `Counter.remote(...)`, a handle has the type `Counter`,
    and methods marked with `@zray.method` have a typed `.remote(...)`. Without this base a handle is an `ActorHandle[Counter]` whose methods
    take and return anything: no checker can derive one class's attributes from another's, and mypy ignores what decorators make of classes.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        __ray_ready__: ActorMethod
        __ray_call__: ActorMethod
        __ray_terminate__: ActorMethod
        __zray_ready__: ActorMethod
        __zray_call__: ActorMethod
        __zray_terminate__: ActorMethod


class _Prepared(NamedTuple):
    """What a session must know of an actor class, and what a process knows of it."""

    session: Session
    shape: CallShape
    code: ObjectRef | None
    signature: Signature
    methods: dict[str, int]
    """Public methods and their num_returns."""
    is_async: bool
    captured: dict[bytes, CallShape]
    """Shapes of actors that are made in the placement group of their maker, by strategy."""


class ActorClass(Generic[T_co]):
    """A class whose instances are actors: `C.remote(...)` makes one and returns its handle at once."""

    def __init__(self, cls: type[T_co], chosen: dict[str, Any], code: Code | None = None) -> None:
        if not inspect.isclass(cls):
            raise TypeError(f"an actor class must be a class, not {type(cls).__name__}")
        self._cls = cls
        self._options = chosen
        self._name = cls.__name__
        self._code = Code(cls, cls.__name__, "actor class") if code is None else code
        self._prepared: _Prepared | None = None
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__
        self.__doc__ = cls.__doc__

    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError("zray.actor.ActorClass is not to be derived from")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> NoReturn:
        raise errors.ActorClassInheritanceException(
            f"Inheriting from actor classes is not supported: decorate the subclass with @zray.remote, and derive it from the plain class {self._name}"
        )

    if not TYPE_CHECKING:  # so that checkers refuse direct calls, too

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise TypeError(
                f"Actors cannot be instantiated directly. Instead of '{self._name}()', use '{self._name}.remote()'."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"cls": self._cls, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["cls"], state["options"])  # type: ignore[misc]

    def options(self, **changes: Any) -> ActorClass[T_co]:
        """Return the same class with other options; see `zray.remote`. Raises ValueError or TypeError for bad ones."""
        return ActorClass(self._cls, options.resolve("actor", changes, self._options), self._code)

    def _remote(self, args: Any = (), kwargs: Any = None, **changes: Any) -> Any:
        """`.options(**changes).remote(*args, **kwargs)`, under the name that programs written for Ray use."""
        target: Any = self.options(**changes) if changes else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy graphs are not part of this version."""
        raise NotImplementedError("lazy graphs (bind) are not available yet; call .remote()")

    def _prepare(self) -> _Prepared:
        # Not when it is made: while a class that names itself is being unpickled, it has no methods yet.
        session, cls = api.current_session(), self._cls
        function, code = self._code.exported_in(session)
        return _Prepared(
            session,
            make_shape(ACTOR_CREATION, function, self._name, self._options),
            code,
            signature_of(cls.__init__, skip_first=True),
            _method_table(cls),
            is_asynchronous(cls),
            {},
        )

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle[T_co]:
        """Make an actor. Errors of the constructor appear when its methods are called.

        Raises:
            ValueError: the name is taken in the namespace.
            SerializationError: an argument cannot be pickled.
        """
        prepared = self._prepared
        if prepared is None or prepared.session.closed:
            prepared = self._prepared = self._prepare()
        session, shape, code, methods = prepared.session, prepared.shape, prepared.code, prepared.methods
        if prepared.is_async and self._options.get("checkpoint_every"):
            raise ValueError(
                f"checkpoint_every needs calls that run one after another, but {self._name} has coroutine methods: "
                "make them ordinary methods, or leave the option out"
            )
        if session.capturing:
            shape = captured_shape(session, shape, self._options, prepared.captured)
        prepared.signature.check(args, kwargs, self._name)
        chosen = self._options
        submitter = api.submitter_of(session)
        call = pack_call(session, args, kwargs, self._name)
        if code is not None:
            call = call.holding(code)
        actor = session.current().next_child_id()
        name = chosen.get("name") or ""
        namespace = chosen.get("namespace") or session.config.namespace
        concurrency = chosen.get("max_concurrency")
        spec = ActorSpec(
            creation=TaskSpec(actor, shape.key, call.stream, call.kind, call.dep_ids, call.borrowed),
            job=session.job,
            name=name,
            namespace=namespace,
            detached=chosen.get("lifetime") == "detached",
            max_restarts=chosen.get("max_restarts") or 0,
            max_task_retries=chosen.get("max_task_retries") or 0,
            max_concurrency=concurrency if concurrency is not None else (1000 if prepared.is_async else 1),
            max_pending_calls=chosen.get("max_pending_calls") or -1,
            running_resources=resources.pack(options.resources_of(chosen, actor=True, running=True)),
            is_async=prepared.is_async,
            get_if_exists=bool(chosen.get("get_if_exists")),
            class_name=self._name,
            methods=methods,
            checkpoint_every=chosen.get("checkpoint_every") or 0,
        )
        reply = session.expect_reply() if name else None
        message = wire.encode(wire.CreateActor(session.store.process, spec, reply.binary() if reply else b""))
        life = session.store.put_life(actor, b"")
        sent = False
        with submitter.lock:
            try:
                # The address object holds the constructor's arguments until the actor lives; the broker holds them for restarts.
                submitter.expect(_store.with_index(actor, 1), 0, call.refs, None, "")
                submitter.flush()
                submitter.define_at_broker(shape)
                sent = True
                session.broker.send(message)
            except BaseException:
                # Interrupted: once more where it may have been sent (nobody has the handle, so it will not live long).
                if sent:
                    session.broker.send(message)
                else:
                    submitter.take_back(actor, shape)
                raise
        if reply is not None:
            bearer = session.reply_of(reply)
            found = wire_bytes(bearer)
            if found != actor:
                other = session.store.reference(found)
                if other is None:  # its last handle went meanwhile: the name is free, or will be in a moment
                    return self.remote(*args, **kwargs)
                return ActorHandle(found, other, self._name, methods, spec.max_pending_calls)
        return ActorHandle(actor, life, self._name, methods, spec.max_pending_calls)


def wire_bytes(data: bytes) -> bytes:
    """Decode a reply that is one id."""
    import msgspec

    return msgspec.msgpack.decode(data, type=bytes)


class ActorMethod:
    """A method of an actor, ready to be called with `.remote()`."""

    __slots__ = ("_handle", "_method", "_options")

    def __init__(self, handle: ActorHandle[Any], name: str, chosen: dict[str, Any] | None = None) -> None:
        self._handle = handle
        self._method = name
        self._options = chosen

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; returns a reference at once (a list with num_returns > 1, None with 0)."""
        return self._handle._call(self._method, self._options, args, kwargs, call_site(1))

    def options(self, **changes: Any) -> ActorMethod:
        """Return the same method with other options (num_returns, name ...)."""
        return ActorMethod(self._handle, self._method, options.resolve("method", changes, self._options))

    def _remote(self, args: Any = (), kwargs: Any = None, **changes: Any) -> Any:
        """`.options(**changes).remote(*args, **kwargs)`, under the name that programs written for Ray use."""
        target: Any = self.options(**changes) if changes else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy graphs are not part of this version."""
        raise NotImplementedError("lazy graphs (bind) are not available yet; call .remote()")

    if not TYPE_CHECKING:  # so that checkers refuse direct calls, too

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise TypeError(
                f"Actor methods cannot be called directly. Instead of 'actor.{self._method}()', use 'actor.{self._method}.remote()'."
            )


class ActorHandle(Generic[T_co]):
    """A handle of an actor: its methods are attributes with `.remote(...)`. Handles can be passed anywhere."""

    def __init__(
        self, actor: bytes, life: ObjectRef, class_name: str, methods: dict[str, int], max_pending: int = -1
    ) -> None:
        self._zray_actor_id = actor
        self._zray_life = life
        self._zray_class = class_name
        self._zray_methods = methods
        self._zray_max_pending = max_pending
        self._zray_link: tuple[Session, Any, dict[str, CallShape]] | None = None

    @property
    def _actor_id(self) -> ActorId:
        return ActorId(self._zray_actor_id)

    @property
    def _ray_actor_id(self) -> ActorId:
        return ActorId(self._zray_actor_id)

    def __getattr__(self, name: str) -> ActorMethod:
        if name in self.__dict__.get("_zray_methods", ()) or name in _ALWAYS:
            return ActorMethod(self, name)
        raise AttributeError(f"the actor class {self.__dict__.get('_zray_class', '?')} has no method {name!r}")

    def __dir__(self) -> list[str]:
        return [*self._zray_methods, *_ALWAYS]

    def __repr__(self) -> str:
        return f"Actor({self._zray_class}, {self._zray_actor_id.hex()})"

    def __hash__(self) -> int:
        return hash(self._zray_actor_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._zray_actor_id == self._zray_actor_id

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHandle, (
            self._zray_actor_id,
            self._zray_life,
            self._zray_class,
            self._zray_methods,
            self._zray_max_pending,
        )

    def _call(
        self, name: str, chosen: dict[str, Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any], site: str
    ) -> Any:
        link = self._zray_link
        if link is None or link[0].closed:
            session = api.current_session()
            link = self._zray_link = session, api.submitter_of(session).link(self._zray_actor_id), {}
        shape = link[2].get(name) if chosen is None else None
        if shape is None:
            given = {"num_returns": self._zray_methods.get(name, 1)} if chosen is None else {**chosen}
            given.setdefault("num_returns", self._zray_methods.get(name, 1))
            title = str(given.get("name") or "") or f"{self._zray_class}.{name}"
            shape = make_shape(ACTOR_METHOD, b"", title, given, name)
            if chosen is None:
                link[2][name] = shape
        refs = link[1].call(shape, args, kwargs, site, self._zray_life, self._zray_max_pending)
        if shape.num_returns == 1:
            return refs[0]
        return refs if shape.num_returns else None
