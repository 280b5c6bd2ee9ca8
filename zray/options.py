"""Options of functions, actor classes and methods in one table: name, type, values, default, and who takes them.

Covers checking what users write in `@zray.remote(...)`, `.options(...)` and `@zray.method(...)`, and what the options
say about resources. Does not cover what any option does: whoever reads it does that. Neighbour: `zray.resources`.

Meanings and defaults follow Ray Core 2.x. An option may be valid although its work is done elsewhere and may come
later; `num_returns="streaming"` and "dynamic", for instance, are refused only when a call is made with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from zray import resources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FUNCTION: Final = "function"
ACTOR: Final = "actor"
METHOD: Final = "method"

_KINDS: Final = {FUNCTION: "functions", ACTOR: "actor classes", METHOD: "actor methods"}
_NONE: Final = type(None)

_scheduling_strategies: list[type] = []


class Option:
    """One row of the table."""

    __slots__ = ("check", "defaults", "types")

    def __init__(
        self, types: type | tuple[type, ...], check: Callable[[str, Any], str | None] | None, defaults: dict[str, Any]
    ) -> None:
        """Describe an option.

        Args:
            types: what `isinstance` must accept.
            check: gets name and value, returns what is wrong with the value, or None.
            defaults: for each kind that takes the option, its value when not given (or given as None).
        """
        self.types = types
        self.check = check
        self.defaults = defaults

    def validate(self, name: str, value: Any) -> None:
        """Raise TypeError or ValueError unless the value is good."""
        types = self.types
        wrong = not isinstance(value, types)
        if not wrong and value.__class__ is bool:
            wrong = bool not in (types if isinstance(types, tuple) else (types,))  # True is no number of CPUs
        if wrong and name == "scheduling_strategy" and isinstance(value, tuple(_scheduling_strategies)):
            wrong = False
        if wrong:
            raise TypeError(f"The type of keyword '{name}' must be {types}, but received type {type(value)}")
        if value is not None and self.check is not None:
            problem = self.check(name, value)
            if problem:
                raise ValueError(problem)


# -- what values must be ---------------------------------------------------------------------------------------------
# The sentences are those that programs written for Ray match on.


def _count(name: str, value: int) -> str | None:
    return None if value >= 0 else f"The keyword '{name}' only accepts None, 0 or a positive integer."


def _count_or_endless(name: str, value: int) -> str | None:
    if value >= -1:
        return None
    return f"The keyword '{name}' only accepts None, 0, -1 or a positive integer, where -1 represents infinity."


def _positive(name: str, value: int) -> str | None:
    return None if value >= 1 else f"The keyword '{name}' only accepts None or a positive integer."


def _quantity(name: str, value: float) -> str | None:
    try:
        resources.fixed(value, name)
    except ValueError as error:
        return str(error)
    return None


def _resources(name: str, value: dict[str, float]) -> str | None:
    for key, own in (
        ("CPU", "num_cpus"),
        ("GPU", "num_gpus"),
        ("memory", "memory"),
        ("object_store_memory", "object_store_memory of zray.init"),
    ):
        if key in value:
            return f"Use the '{own}' keyword instead of {key!r} in the '{name}' keyword"
    for key, amount in value.items():
        resources.check_name(key)
        resources.fixed(amount, key)
    return None


def _returns(name: str, value: int | str) -> str | None:
    if value in ("streaming", "dynamic") or (isinstance(value, int) and value >= 0):
        return None
    return (
        f"The keyword '{name}' only accepts None, a non-negative integer, 'streaming' (for generators), or 'dynamic', "
        f"got {value!r}"
    )


def _exceptions(name: str, value: bool | list[Any] | tuple[Any, ...]) -> str | None:
    if isinstance(value, bool) or all(isinstance(one, type) and issubclass(one, Exception) for one in value):
        return None
    return f"{name} must be either a boolean or a list of exceptions, got {value!r}"


def _backpressure(name: str, value: int) -> str | None:
    if value == -1 or value > 0:
        return None
    return (
        f"{name}={value} is not allowed. Use a value > 0 (1: one object whenever `next` is called) or -1 for no limit."
    )


def _lifetime(name: str, value: str) -> str | None:
    if value in ("detached", "non_detached"):
        return None
    return f"actor `{name}` argument must be one of 'detached', 'non_detached' and 'None', got {value!r}"


def _strategy(name: str, value: Any) -> str | None:
    if not isinstance(value, str) or value in ("DEFAULT", "SPREAD"):
        return None
    return (
        f"The keyword '{name}' only accepts None, 'DEFAULT', 'SPREAD' or an object of a strategy class, got {value!r}"
    )


def _strings(name: str, value: dict[Any, Any]) -> str | None:
    for pair in value.items():
        if not all(isinstance(part, str) for part in pair):
            return f"The keyword '{name}' must map strings to strings, got {pair[0]!r}: {pair[1]!r}"
    return None


def _groups(name: str, value: dict[Any, Any] | list[Any]) -> str | None:
    if isinstance(value, list):
        good = all(isinstance(one, (str, dict)) for one in value)
    else:
        good = all(isinstance(key, str) and type(size) is int and size > 0 for key, size in value.items())
    return (
        None if good else f"The keyword '{name}' must map names to positive integers, e.g. {{'io': 2}}, got {value!r}"
    )


def _name(name: str, value: str) -> str | None:
    if value:
        return None
    if name == "namespace":
        return "A namespace cannot be an empty string. Leave it out for the session's own."
    return "Actor name cannot be an empty string. Leave it out for an actor without a name."


# -- the table -------------------------------------------------------------------------------------------------------

_INT: Final = (int, _NONE)
_STR: Final = (str, _NONE)
_DICT: Final = (dict, _NONE)
_NUMBER: Final = (float, int, _NONE)


def _everywhere(value: Any = None) -> dict[str, Any]:
    return {FUNCTION: value, ACTOR: value}


TABLE: Final[dict[str, Option]] = {
    # resources
    "num_cpus": Option(_NUMBER, _quantity, {FUNCTION: 1, ACTOR: None}),
    "num_gpus": Option(_NUMBER, _quantity, _everywhere()),
    "memory": Option(_NUMBER, _quantity, _everywhere()),
    "resources": Option(_DICT, _resources, _everywhere()),
    "accelerator_type": Option(_STR, None, _everywhere()),
    # results and retries
    "num_returns": Option((int, str, _NONE), _returns, {FUNCTION: 1, METHOD: 1}),
    "max_retries": Option(_INT, _count_or_endless, {FUNCTION: 3}),
    "retry_exceptions": Option((bool, list, tuple, _NONE), _exceptions, {FUNCTION: False, METHOD: False}),
    "max_calls": Option(_INT, _count, {FUNCTION: 0}),
    "_generator_backpressure_num_objects": Option(_INT, _backpressure, {FUNCTION: -1, METHOD: -1}),
    # actors
    "max_restarts": Option(_INT, _count_or_endless, {ACTOR: 0}),
    "max_task_retries": Option(_INT, _count_or_endless, {ACTOR: 0, METHOD: 0}),
    "checkpoint_every": Option(_INT, _positive, {ACTOR: None}),
    "max_concurrency": Option(_INT, _positive, {ACTOR: None}),
    "max_pending_calls": Option(_INT, _count_or_endless, {ACTOR: -1}),
    "concurrency_groups": Option((list, dict, _NONE), _groups, {ACTOR: None}),
    "concurrency_group": Option(_STR, None, {METHOD: None}),
    "lifetime": Option(_STR, _lifetime, {ACTOR: None}),
    "namespace": Option(_STR, _name, {ACTOR: None}),
    "get_if_exists": Option(bool, None, {ACTOR: False}),
    # placement, environment, bookkeeping
    "name": Option(_STR, None, {FUNCTION: None, ACTOR: None, METHOD: None}),
    "scheduling_strategy": Option(_STR, _strategy, _everywhere()),
    "label_selector": Option(_DICT, _strings, _everywhere()),
    "runtime_env": Option(_DICT, None, _everywhere()),
    "enable_task_events": Option(bool, None, {FUNCTION: True, ACTOR: True, METHOD: True}),
    "_metadata": Option(_DICT, None, _everywhere()),
}

_OF_KIND: Final = {kind: [name for name, option in TABLE.items() if kind in option.defaults] for kind in _KINDS}
_DEFAULTS: Final = {
    kind: {name: TABLE[name].defaults[kind] for name in names} for kind, names in _OF_KIND.items() if kind != METHOD
}
_ONLY_AT_DECLARATION: Final = {(FUNCTION, "max_calls"), (ACTOR, "concurrency_groups")}

# What to write instead, for options that belong to something else.
_INSTEAD: Final = {
    (FUNCTION, "max_restarts"): "use max_retries",
    (FUNCTION, "max_task_retries"): "use max_retries",
    (FUNCTION, "max_concurrency"): "limit it with num_cpus or a custom resource",
    (ACTOR, "max_retries"): "use max_restarts for the actor and max_task_retries for its calls",
    (ACTOR, "retry_exceptions"): "use @zray.method(retry_exceptions=...) with max_task_retries",
    (ACTOR, "num_returns"): "use @zray.method(num_returns=...) on the method",
    (ACTOR, "max_calls"): "an actor runs until its last handle goes",
    (METHOD, "max_retries"): "use max_task_retries",
    (METHOD, "num_cpus"): "an actor's resources are options of its class",
    (METHOD, "num_gpus"): "an actor's resources are options of its class",
    (METHOD, "resources"): "an actor's resources are options of its class",
}


def register_scheduling_strategy(cls: type) -> type:
    """Allow instances of `cls` as the option scheduling_strategy. Usable as a decorator."""
    _scheduling_strategies.append(cls)
    return cls


def resolve(kind: str, given: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check options and return all that hold.

    Args:
        kind: FUNCTION, ACTOR or METHOD.
        given: what the user wrote; None means the default.
        base: resolved options that these change (`.options(...)`); None where the thing is declared.

    Returns:
        Every option of the kind with its value. For METHOD only those that were given: the rest is up to the actor.

    Raises:
        ValueError: unknown option (the text names the nearest), a bad value, or options that exclude each other.
        TypeError: a value of the wrong type.
    """
    found = dict(_DEFAULTS.get(kind, ()) if base is None else base)
    for name in given.keys():  # noqa: SIM118 - mappings that have only keys() and [] are welcome
        value = given[name]
        option = TABLE.get(name)
        if option is None or kind not in option.defaults:
            raise ValueError(_unknown(kind, name))
        option.validate(name, value)
        if base is not None and (kind, name) in _ONLY_AT_DECLARATION:
            raise ValueError(f"Setting '{name}' is not supported in '.options()'.")
        if value is None:
            value = option.defaults[kind]
        elif name == "_metadata" and found.get(name):
            value = _merged(found[name], value)
        found[name] = value
    if kind == ACTOR:
        _check_actor(found)
    return found


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Change metadata namespace by namespace."""
    both = dict(old)
    for space, values in new.items():
        both[space] = {**both.get(space, {}), **values}
    return both


def _check_actor(found: dict[str, Any]) -> None:
    if found["checkpoint_every"]:
        if not found["max_restarts"]:
            raise ValueError(
                "checkpoint_every has no use without restarts: set max_restarts, too (-1 for any number of them)."
            )
        if (found["max_concurrency"] or 1) > 1 or found["concurrency_groups"]:
            raise ValueError(
                "checkpoint_every needs calls that run one after another: leave out max_concurrency and concurrency_groups."
            )
    name = found["name"]
    if name is None:
        if found["get_if_exists"]:
            raise ValueError("The actor name must be specified to use `get_if_exists`.")
    else:
        problem = _name("name", name)
        if problem:
            raise ValueError(problem)


def _unknown(kind: str, name: str) -> str:
    text = f"Invalid option keyword '{name}' for {_KINDS[kind]}"
    instead = _INSTEAD.get((kind, name))
    if instead:
        return f"{text}: {instead}."
    others = [_KINDS[other] for other in _KINDS if other in TABLE[name].defaults] if name in TABLE else []
    if others:
        return f"{text}: it is an option of {' and '.join(others)}. Valid ones are {_OF_KIND[kind]}."
    import difflib

    near = difflib.get_close_matches(name, _OF_KIND[kind], 1)
    if near:
        return f"{text}. Did you mean '{near[0]}'?"
    return f"{text}. Valid ones are {_OF_KIND[kind]}."


def resources_of(chosen: Mapping[str, Any], *, actor: bool = False, running: bool = False) -> dict[str, int]:
    """Return the demand (`zray.resources`) that resolved options make.

    A task takes 1 CPU unless num_cpus says otherwise. An actor that asks for nothing but memory takes 1 CPU while it is
    placed and constructed and none while it lives; one that asks for anything else takes that (and 1 CPU unless
    num_cpus says otherwise) for its whole life.

    Args:
        chosen: what `resolve` returned.
        actor: of an actor class rather than of a function.
        running: of the living actor rather than of its construction.
    """
    amounts: dict[str, float] = dict(chosen.get("resources") or {})
    kind = chosen.get("accelerator_type")
    if kind:
        amounts[f"accelerator_type:{kind}"] = 0.001
    gpus = chosen.get("num_gpus")
    if gpus is not None:
        amounts["GPU"] = gpus
    cpus = chosen.get("num_cpus")
    if cpus is None:
        cpus = 0 if actor and running and not amounts else 1
    amounts["CPU"] = cpus
    memory = chosen.get("memory")
    if memory:
        amounts["memory"] = memory
    return resources.parse(amounts)
