"""Why a value cannot be pickled: the path to the part that is to blame, in words for people.

Covers the walk from a value to its first part that cannot be pickled, the text of `SerializationError`, and
`inspect_serializability`. Runs only after pickling has failed (or when a user asks), so it may be slow. Neighbour:
`zray.serialization`, which does the pickling.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import types
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zray import serialization
from zray.errors import SerializationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPR_LIMIT: Final = 300
_DEPTH_LIMIT: Final = 30


class Culprit(NamedTuple):
    """A part that cannot be pickled although all its own parts can (or are not known)."""

    path: str
    """From the value, e.g. "args[1].model.lock"."""
    obj: Any
    parent: Any
    """What holds it; None for the value itself."""
    parent_path: str
    reason: str


class FailureTuple:
    """One part that cannot be pickled, as `inspect_serializability` returns it."""

    __slots__ = ("name", "obj", "parent")

    def __init__(self, obj: Any, name: str, parent: Any) -> None:
        self.obj = obj
        self.name = name
        self.parent = parent

    def __repr__(self) -> str:
        return f"FailureTuple({self.name} [obj={shown(self.obj)}, parent={shown(self.parent)}])"


def shown(value: Any) -> str:
    """Return a `repr` that neither fails nor fills the screen."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}: its repr() raises {type(error).__name__}>"
    return text if len(text) <= _REPR_LIMIT else text[: _REPR_LIMIT - 3] + "..."


# -- the walk --------------------------------------------------------------------------------------------------------


def find_culprit(value: Any, name: str = "") -> Culprit | None:
    """Return the part that cannot be pickled, or None when the value can be.

    Args:
        value: what failed.
        name: how the path begins.
    """
    problem = serialization.why_not(value)
    if problem is None:
        return None
    culprit = Culprit(name, value, None, "", _reason(problem))
    seen = {id(value)}
    for _ in range(_DEPTH_LIMIT):
        if isinstance(problem, RecursionError):
            break
        parts = [part for part in parts_of(culprit.obj) if id(part[1]) not in seen]
        found = _first_bad(parts)
        if found is None:
            break
        suffix, part, problem = found
        seen.add(id(part))
        culprit = Culprit(_join(culprit.path, suffix), part, culprit.obj, culprit.path, _reason(problem))
    return culprit


def _join(path: str, suffix: str) -> str:
    return path + suffix if path else suffix.lstrip(".")


def _reason(problem: Exception) -> str:
    text = str(problem)
    if isinstance(problem, RecursionError) or "recursion" in text:
        return "it is nested too deeply for pickle (or refers to itself through __reduce__)"
    return text or type(problem).__name__


def _first_bad(parts: list[tuple[str, Any]]) -> tuple[str, Any, Exception] | None:
    """Return the first part that cannot be pickled. Bisects, so that a long list costs few passes over it."""
    if not parts or serialization.why_not([part for _, part in parts]) is None:
        return None
    while len(parts) > 1:
        half = len(parts) // 2
        left = parts[:half]
        parts = left if serialization.why_not([part for _, part in left]) is not None else parts[half:]
    suffix, part = parts[0]
    problem = serialization.why_not(part)
    return None if problem is None else (suffix, part, problem)


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (suffix of the path, part) for everything that is pickled with the value."""
    if isinstance(value, dict):
        yield from ((f"[{shown(key)}]", part) for key, part in list(value.items()))
        yield from ((f"[key {shown(key)}]", key) for key in list(value))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{shown(part)}}}", part) for part in list(value))
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
        return
    elif isinstance(value, (staticmethod, classmethod)):
        yield ".__func__", value.__func__
    elif isinstance(value, property):
        yield from ((f".{name}", getattr(value, name)) for name in ("fget", "fset", "fdel"))
    elif isinstance(value, type):
        skipped = ("__dict__", "__weakref__", "__doc__", "__module__")
        yield from ((f".{name}", part) for name, part in list(vars(value).items()) if name not in skipped)
        yield from ((f".<base {base.__name__}>", base) for base in value.__bases__ if base is not object)
        return
    yield from _parts_of_state(value)


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield f".<closure>.{name}", cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in sorted(_global_names(code)):
        if name in function.__globals__:
            yield f".<global>.{name}", function.__globals__[name]
    yield from ((f".<default>[{i}]", part) for i, part in enumerate(function.__defaults__ or ()))
    yield from ((f".<default>.{name}", part) for name, part in (function.__kwdefaults__ or {}).items())
    yield from ((f".{name}", part) for name, part in list(vars(function).items()))


def _global_names(code: types.CodeType) -> set[str]:
    """Return names that a function and the functions inside it may read from its module."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _parts_of_state(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the value's own `__reduce_ex__` says it consists of."""
    if isinstance(value, (types.FunctionType, types.ModuleType)):
        return
    try:
        reduced = value.__reduce_ex__(5)
    except Exception:
        reduced = None
    if not isinstance(reduced, tuple) or len(reduced) < 2:
        if not isinstance(value, type):
            # It refuses as a whole, perhaps because of one attribute.
            yield from ((f".{name}", part) for name, part in list(getattr(value, "__dict__", {}).items()))
        return
    rebuild, arguments, *rest = reduced
    state = rest[0] if rest else None
    states = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for one in states:
        if isinstance(one, dict):
            yield from ((f".{name}", part) for name, part in one.items())
        elif one is not None:
            yield ".<__getstate__>", one
    if isinstance(arguments, tuple):
        for i, part in enumerate(arguments):
            is_class = i == 0 and part is type(value)
            yield (".__class__" if is_class else f".<__reduce__>[{i}]"), part
    yield ".<__reduce__>", rebuild


# -- words -----------------------------------------------------------------------------------------------------------

_LOCKS: Final = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
)


def mend_for(obj: Any) -> str:
    """Return a sentence that says what to do about a part that cannot be pickled."""
    if isinstance(obj, (*_LOCKS, threading.local)):
        advice = "Locks and the like belong to one process: create it inside the task or in the actor's __init__"
    elif isinstance(obj, threading.Thread):
        advice = "Threads belong to one process: start it inside the task or actor"
    elif isinstance(obj, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        advice = "Pass what it yields instead, for example list(...), or create it inside the task"
    elif isinstance(obj, io.IOBase):
        advice = "Open files belong to one process: pass the path and open it inside the task"
    elif type(obj).__name__ in ("socket", "Connection", "Cursor", "Session", "Client", "Context", "Socket"):
        advice = "Connections belong to one process: open it inside the task or in the actor's __init__"
    else:
        advice = "Create it inside the task or actor instead of passing it"
    return (
        f"{advice}, or leave it out of what is pickled (define __getstate__ or __reduce__ on the class that holds it)."
    )


def explain(value: Any, *, what: str, name: str, show: bool, error: Exception) -> SerializationError:
    """Return the error to raise for a value that could not be pickled.

    Args:
        value: what failed.
        what: what it is to the user, perhaps with {} where its repr goes (else, with `show`, it goes to the end).
        name: how the path begins.
        show: whether the first line shows the value.
        error: what pickling raised.
    """
    culprit = find_culprit(value, name) or Culprit(name, value, None, "", _reason(error))
    text = shown(value)
    if "{}" in what:
        what = what.replace("{}", text)
    elif show:
        what = f"{what} {text}"
    title = f"Checking Serializability of {text}"
    rule = "=" * min(len(title), 80)
    path = culprit.path or "the value itself"
    lines = [
        f"Could not serialize {what}:",
        rule,
        title,
        rule,
        f"{path}: {culprit.reason}",
        mend_for(culprit.obj),
        rule,
    ]
    found = SerializationError("\n".join(lines))
    found.path = culprit.path
    return found


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: Any = None
) -> tuple[bool, set[FailureTuple]]:
    """Find out and print why a value cannot be pickled.

    Args:
        base_obj: the value.
        name: how to call it in the text; its own name or repr by default.
        depth: at most so many parts are reported, each found after the one before was set aside.
        print_file: where to print, standard output by default.

    Returns:
        (whether it can be pickled, the parts that cannot).
    """
    out = sys.stdout if print_file is None else print_file
    name = name or getattr(base_obj, "__name__", None) or shown(base_obj)
    title = f"Checking Serializability of {shown(base_obj)}"
    rule = "=" * min(len(title), 80)
    print(rule, title, rule, sep="\n", file=out)
    found = set()
    for culprit in _culprits(base_obj, str(name), depth):
        found.add(FailureTuple(culprit.obj, culprit.path.rpartition(".")[2], culprit.parent))
        print(f"{culprit.path}: {culprit.reason}", mend_for(culprit.obj), sep="\n", file=out)
    if not found:
        print("It can be serialized.", file=out)
    print(rule, file=out)
    return not found, found


def _culprits(value: Any, name: str, limit: int) -> Iterator[Culprit]:
    """Yield the culprit of the value, then of the other parts of whatever holds it."""
    first = find_culprit(value, name)
    if first is None:
        return
    yield first
    if first.parent is None:
        return
    for suffix, part in list(parts_of(first.parent)):
        if limit <= 1:
            return
        if part is first.obj:
            continue
        other = find_culprit(part, _join(first.parent_path, suffix))
        if other is not None:
            limit -= 1
            yield other if other.parent is not None else other._replace(parent=first.parent)
