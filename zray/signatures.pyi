"""The types behind `.remote()`, `.options()`, `.map()`, `@zray.remote` and `@zray.method`.

A call takes for each parameter either a value of its type or a reference to one. Python's type system cannot say "the same parameters,
each of them T or ObjectRef[T]" about parameters it knows only as a whole (PEP 612), so `Call` says it position by position: overload k
spells out the first k parameters and leaves the rest, with names, defaults and keywords, to the ParamSpec. What this cannot say: a
reference given by keyword or in a position after the eighth; for mypy also a reference to a generic function, for pyright one among the
*args of a function that takes **kwargs, too. `typing.cast(T, ref)` tells the checker what the call will make of such a reference.

For that the function is kept as a covariant parameter, `Call[..., ..., Callable[P, R]]`: a function with named parameters *is* a
`Callable[[T0, T1], R]`, so that both mypy and pyright find T0 and T1 by matching the type of `self`. Calls without references are
checked against P itself, which also serves generic functions.
"""

# Overloads here go from the special to the general with other results each time, on purpose.
# mypy: disable-error-code="overload-overlap"
# pyright: reportOverlappingOverload=false

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypedDict, TypeVar, overload

from typing_extensions import Unpack

from zray._store import ObjectRef
from zray.actor import Actor, ActorClass, ActorHandle
from zray.remote_function import RemoteFunction

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
T0 = TypeVar("T0")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")
T7 = TypeVar("T7")
Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)
A = TypeVar("A", bound=Actor)
C = TypeVar("C", bound=type[Any])
C_co = TypeVar("C_co", bound=Callable[..., Any], covariant=True)
F = TypeVar("F", bound=Callable[..., Any])
F_co = TypeVar("F_co", bound=Callable[..., Any], covariant=True)

# -- calls -------------------------------------------------------------------------------------------------------------

class Call(Generic[P, R_co, F_co]):
    """`.remote` of something that is called like F_co: each positional argument may be a reference."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, Q], R]],
        a0: T0 | ObjectRef[T0],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, T3, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, T3, T4, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, T3, T4, T5, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, T3, T4, T5, T6, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...
    @overload
    def __call__(
        self: Call[..., Any, Callable[Concatenate[T0, T1, T2, T3, T4, T5, T6, T7, Q], R]],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        a7: T7 | ObjectRef[T7],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> R: ...

class MapCall(Generic[F_co]):
    """`.map` of a function: one iterable for each parameter that varies."""

    @overload
    def __call__(self: MapCall[Callable[[T0], R]], xs: Iterable[T0 | ObjectRef[T0]], /) -> list[ObjectRef[R]]: ...
    @overload
    def __call__(
        self: MapCall[Callable[[T0, T1], R]],
        xs: Iterable[T0 | ObjectRef[T0]],
        ys: Iterable[T1 | ObjectRef[T1]],
        /,
    ) -> list[ObjectRef[R]]: ...
    @overload
    def __call__(
        self: MapCall[Callable[[T0, T1, T2], R]],
        xs: Iterable[T0 | ObjectRef[T0]],
        ys: Iterable[T1 | ObjectRef[T1]],
        zs: Iterable[T2 | ObjectRef[T2]],
        /,
    ) -> list[ObjectRef[R]]: ...
    @overload
    def __call__(
        self: MapCall[Callable[[T0, T1, T2, T3], R]],
        xs: Iterable[T0 | ObjectRef[T0]],
        ys: Iterable[T1 | ObjectRef[T1]],
        zs: Iterable[T2 | ObjectRef[T2]],
        ws: Iterable[T3 | ObjectRef[T3]],
        /,
    ) -> list[ObjectRef[R]]: ...

# -- options: the table of `zray.options`, by who takes them ------------------------------------------------------------

class _Shared(TypedDict, total=False):
    """Options of functions and actor classes."""

    num_cpus: float | None
    num_gpus: float | None
    memory: float | None
    resources: dict[str, float] | None
    accelerator_type: str | None
    name: str | None
    scheduling_strategy: Any
    label_selector: dict[str, str] | None
    runtime_env: dict[str, Any] | None
    enable_task_events: bool
    _metadata: dict[str, Any] | None

class _OfFunctions(TypedDict, total=False):
    max_retries: int | None
    retry_exceptions: bool | list[type[Exception]] | tuple[type[Exception], ...] | None
    max_calls: int | None
    _generator_backpressure_num_objects: int | None

class _OfActors(TypedDict, total=False):
    checkpoint_every: int | None
    max_restarts: int | None
    max_task_retries: int | None
    max_concurrency: int | None
    max_pending_calls: int | None
    concurrency_groups: dict[str, int] | list[Any] | None
    lifetime: Literal["detached", "non_detached"] | None
    namespace: str | None
    get_if_exists: bool

class FunctionOptions(_Shared, _OfFunctions): ...
class ActorOptions(_Shared, _OfActors): ...
class RemoteOptions(_Shared, _OfFunctions, _OfActors): ...

class MethodOptions(TypedDict, total=False):
    name: str | None
    max_task_retries: int | None
    retry_exceptions: bool | list[type[Exception]] | tuple[type[Exception], ...] | None
    concurrency_group: str | None
    enable_task_events: bool
    _generator_backpressure_num_objects: int | None

# -- functions -----------------------------------------------------------------------------------------------------------

class OtherReturns(Generic[P, R_co, Out_co]):
    """A remote function with num_returns other than 1: `.remote()` gives a list of references, or None with 0."""

    @property
    def remote(self) -> Call[P, Out_co, Callable[P, Out_co]]: ...
    @property
    def options(self) -> OptionsOfFunction[P, R_co, OtherReturns[P, R_co, Out_co]]: ...

class OptionsOfFunction(Generic[P, R_co, Out_co]):
    @overload
    def __call__(self, **options: Unpack[FunctionOptions]) -> Out_co: ...
    @overload
    def __call__(
        self, *, num_returns: Literal[1] | None, **options: Unpack[FunctionOptions]
    ) -> RemoteFunction[P, R_co]: ...
    @overload
    def __call__(
        self, *, num_returns: Literal[0], **options: Unpack[FunctionOptions]
    ) -> OtherReturns[P, R_co, None]: ...
    @overload
    def __call__(
        self, *, num_returns: int, **options: Unpack[FunctionOptions]
    ) -> OtherReturns[P, R_co, list[ObjectRef[Any]]]: ...

class TaskCall:
    def __get__(
        self, instance: RemoteFunction[P, R], owner: Any
    ) -> Call[P, ObjectRef[R], Callable[P, ObjectRef[R]]]: ...

class TaskMap:
    def __get__(self, instance: RemoteFunction[P, R], owner: Any) -> MapCall[Callable[P, R]]: ...

class TaskOptions:
    def __get__(self, instance: RemoteFunction[P, R], owner: Any) -> OptionsOfFunction[P, R, RemoteFunction[P, R]]: ...

def task_call(target: Callable[..., Any]) -> TaskCall: ...
def task_map(target: Callable[..., Any]) -> TaskMap: ...
def task_options(target: Callable[..., Any]) -> TaskOptions: ...

# -- classes -------------------------------------------------------------------------------------------------------------

class CheckedActorClass(ActorClass[Any], Generic[C_co]):
    """`zray.remote(SomeClass)`: `.remote()` is checked against `__init__`; C_co is the class object's own type."""

    remote: CreationOfHandle  # pyright: ignore[reportIncompatibleMethodOverride]
    options: OptionsOfActorClass  # type: ignore[assignment]

class CreationOfHandle:
    def __get__(
        self, instance: CheckedActorClass[Callable[P, T]], owner: Any
    ) -> Call[P, ActorHandle[T], Callable[P, ActorHandle[T]]]: ...

class OptionsOfActorClass:
    def __get__(self, instance: CheckedActorClass[F], owner: Any) -> OptionsCall[CheckedActorClass[F]]: ...

class OptionsCall(Generic[Out_co]):
    def __call__(self, **options: Unpack[ActorOptions]) -> Out_co: ...

class TypedActorClass(Generic[P, R_co]):
    """`SomeActor.options(...)` of a class derived from `zray.Actor`."""

    @property
    def remote(self) -> Call[P, R_co, Callable[P, R_co]]: ...
    @property
    def options(self) -> OptionsCall[TypedActorClass[P, R_co]]: ...

class ActorBase:
    """What `zray.Actor` gives to classes derived from it: the handle has the type of the class itself.

    `remote` repeats the overloads of `Call`: mypy tells a class method, but not a descriptor, how its class is constructed.
    """

    @classmethod
    def options(cls: Callable[P, T], **options: Unpack[ActorOptions]) -> TypedActorClass[P, T]: ...
    @overload
    @classmethod
    def remote(cls: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, P], T], a0: T0 | ObjectRef[T0], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, T3, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, T3, T4, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, T3, T4, T5, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, T3, T4, T5, T6, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    @classmethod
    def remote(
        cls: Callable[Concatenate[T0, T1, T2, T3, T4, T5, T6, T7, P], T],
        a0: T0 | ObjectRef[T0],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        a7: T7 | ObjectRef[T7],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...

# -- methods -------------------------------------------------------------------------------------------------------------

class TypedMethod(Generic[P, R_co, Out_co]):
    """A method marked with `@zray.method`: `.remote()` through a handle, a plain call inside the class."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @property
    def remote(self) -> Call[P, Out_co, Callable[P, Out_co]]: ...
    @overload
    def options(self, **options: Unpack[MethodOptions]) -> TypedMethod[P, R_co, Out_co]: ...
    @overload
    def options(self, *, num_returns: Literal[0], **options: Unpack[MethodOptions]) -> TypedMethod[P, R_co, None]: ...
    @overload
    def options(
        self, *, num_returns: int, **options: Unpack[MethodOptions]
    ) -> TypedMethod[P, R_co, list[ObjectRef[Any]]]: ...

class Method(Generic[F_co]):
    """A marked method in its class; F_co is called like the method without its `self`, so that it can be overridden."""

    @overload
    def __get__(self: Method[Callable[P, R]], instance: None, owner: Any) -> Callable[Concatenate[Any, P], R]: ...
    @overload
    def __get__(
        self: Method[Callable[P, Coroutine[Any, Any, R]]], instance: object, owner: Any
    ) -> TypedMethod[P, Coroutine[Any, Any, R], ObjectRef[R]]: ...
    @overload
    def __get__(self: Method[Callable[P, R]], instance: object, owner: Any) -> TypedMethod[P, R, ObjectRef[R]]: ...

class MethodWithKeywords(Generic[F_co]):
    """A marked method that takes `**kwargs`, which mypy cannot part from its `self`: F_co has it still."""

    @overload
    def __get__(self, instance: None, owner: Any) -> F_co: ...
    @overload
    def __get__(
        self: MethodWithKeywords[Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]], instance: object, owner: Any
    ) -> TypedMethod[P, Coroutine[Any, Any, R], ObjectRef[R]]: ...
    @overload
    def __get__(
        self: MethodWithKeywords[Callable[Concatenate[Any, P], R]], instance: object, owner: Any
    ) -> TypedMethod[P, R, ObjectRef[R]]: ...

class MethodOfOtherReturns(Generic[F_co, Out_co]):
    @overload
    def __get__(
        self: MethodOfOtherReturns[Callable[P, R], Out], instance: None, owner: Any
    ) -> Callable[Concatenate[Any, P], R]: ...
    @overload
    def __get__(
        self: MethodOfOtherReturns[Callable[P, R], Out], instance: object, owner: Any
    ) -> TypedMethod[P, R, Out]: ...

class MarkMethod:
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Method[Callable[P, R]]: ...
    @overload
    def __call__(self, function: F, /) -> MethodWithKeywords[F]: ...

class MarkMethodOfOtherReturns(Generic[Out_co]):
    def __call__(
        self, function: Callable[Concatenate[Any, P], R], /
    ) -> MethodOfOtherReturns[Callable[P, R], Out_co]: ...

class MethodDecorator:
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Method[Callable[P, R]]: ...
    @overload
    def __call__(self, function: F, /) -> MethodWithKeywords[F]: ...
    @overload
    def __call__(self, *, num_returns: Literal[1] | None = 1, **options: Unpack[MethodOptions]) -> MarkMethod: ...
    @overload
    def __call__(
        self, *, num_returns: Literal[0], **options: Unpack[MethodOptions]
    ) -> MarkMethodOfOtherReturns[None]: ...
    @overload
    def __call__(
        self, *, num_returns: int, **options: Unpack[MethodOptions]
    ) -> MarkMethodOfOtherReturns[list[ObjectRef[Any]]]: ...

def method_decorator(target: Callable[..., Any]) -> MethodDecorator: ...

# -- zray.remote ---------------------------------------------------------------------------------------------------------

class Decorate:
    """`zray.remote` with options, waiting for its target."""

    @overload
    def __call__(self, target: type[A], /) -> type[A]: ...
    @overload
    def __call__(self, target: C, /) -> CheckedActorClass[C]: ...
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, R]: ...

class DecorateOtherReturns(Generic[Out_co]):
    def __call__(self, target: Callable[P, R], /) -> OtherReturns[P, R, Out_co]: ...

class RemoteDecorator:
    @overload
    def __call__(self, target: type[A], /) -> type[A]: ...
    @overload
    def __call__(self, target: C, /) -> CheckedActorClass[C]: ...
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, R]: ...
    @overload
    def __call__(self, *, num_returns: Literal[1] | None = 1, **options: Unpack[RemoteOptions]) -> Decorate: ...
    @overload
    def __call__(self, *, num_returns: Literal[0], **options: Unpack[RemoteOptions]) -> DecorateOtherReturns[None]: ...
    @overload
    def __call__(
        self, *, num_returns: int, **options: Unpack[RemoteOptions]
    ) -> DecorateOtherReturns[list[ObjectRef[Any]]]: ...

def remote_decorator(target: Callable[..., Any]) -> RemoteDecorator: ...

# -- handles -------------------------------------------------------------------------------------------------------------

class NamedHandle(ActorHandle[Any], Any):  # type: ignore[misc]
    """What `zray.get_actor` returns: a handle whose class nobody knows here; it may be assigned to a variable with the right type."""
