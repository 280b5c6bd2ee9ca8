"""Rows and floors: their names never change, and each does on any API exactly the operations it says it does."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from perf import floors, rows, sides

NAMES = [
    "get small",
    "put small",
    "multi-client put small",
    "put 800 MB",
    "multi-client put 80 MB",
    "get 80 MB",
    "get 1 MB",
    "get 10k references",
    "wait 1k references",
    "1000 tasks and get",
    "tasks sync",
    "tasks async",
    "tasks async with argument",
    "multi-client tasks async",
    "1:1 actor sync",
    "1:1 actor async",
    "1:1 actor concurrent",
    "1:n actor async",
    "n:n actor async",
    "n:n actor async with argument",
    "1:1 async-actor sync",
    "1:1 async-actor async",
    "1:1 async-actor with argument",
    "n:n async-actor async",
    "20 actors created",
    "50k tasks drained",
]


class Ref:
    """A value that is there already."""

    def __init__(self, value: object) -> None:
        self.value = value


class Method:
    def __init__(self, api: CountingApi, kind: str, function: Callable[..., object]) -> None:
        self._api = api
        self._kind = kind
        self._function = function

    def remote(self, *arguments: object) -> Ref:
        self._api.counts[self._kind] = self._api.counts.get(self._kind, 0) + 1
        values = [argument.value if isinstance(argument, Ref) else argument for argument in arguments]
        result = self._function(*values)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        return Ref(result)


class Actor:
    def __init__(self, api: CountingApi, instance: object) -> None:
        self._api = api
        self._instance = instance

    def __getattr__(self, name: str) -> Method:
        return Method(self._api, f"call {name}", getattr(self._instance, name))


class CountingApi:
    """Ray's names in one process: everything is done at once, and counted."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def remote(self, target: Any = None, **_options: object) -> Any:
        if target is None:
            return self.remote
        if isinstance(target, type):

            def create(*arguments: object) -> Actor:
                self.count("actor")
                return Actor(self, target(*arguments))

            class Creator:
                remote = staticmethod(create)

            return Creator
        return Method(self, f"task {target.__name__}", target)

    def put(self, value: object) -> Ref:
        self.count("put")
        return Ref(value)

    def get(self, found: Any) -> object:
        self.count("get")
        return [ref.value for ref in found] if isinstance(found, list) else found.value

    def wait(self, found: list[Ref]) -> tuple[list[Ref], list[Ref]]:
        self.count("wait")
        return found[:1], found[1:]

    def kill(self, _actor: object) -> None:
        self.count("kill")


EXPECTED: dict[str, dict[str, float]] = {
    "get small": {"get": 1},
    "put small": {"put": 1},
    "multi-client put small": {"task put_many": 2, "put": 1000},
    "put 800 MB": {"put": 1},
    "multi-client put 80 MB": {"task put_many": 2, "put": 10},
    "get 80 MB": {"get": 1},
    "get 1 MB": {"get": 1},
    "get 10k references": {"get": 1},
    "wait 1k references": {"task small_value": 1000, "wait": 1000},
    "1000 tasks and get": {"task small_value": 1000, "get": 1},
    "tasks sync": {"task small_value": 1, "get": 1},
    "tasks async": {"task small_value": 1000, "get": 1},
    "tasks async with argument": {"task small_value_of": 1000, "get": 1},
    "multi-client tasks async": {"call tasks": 2, "task small_value": 2000},
    "1:1 actor sync": {"call small_value": 1, "get": 1},
    "1:1 actor async": {"call small_value": 1000, "get": 1},
    "1:1 actor concurrent": {"call small_value": 1000, "get": 1},
    "1:n actor async": {"call calls": 1, "call small_value": 2000},
    "n:n actor async": {"task work": 2, "call small_value": 2000},
    "n:n actor async with argument": {"call calls_with_argument": 2, "call small_value_of": 2000, "put": 2},
    "1:1 async-actor sync": {"call small_value": 1, "get": 1},
    "1:1 async-actor async": {"call small_value": 1000, "get": 1},
    "1:1 async-actor with argument": {"call small_value_of": 1000, "get": 1},
    "n:n async-actor async": {"task work": 2, "call small_value": 2000},
    "20 actors created": {"actor": 20, "call small_value": 20, "kill": 20},
    "50k tasks drained": {"task small_value": 50_000, "get": 1},
}


def test_names_never_change() -> None:
    assert list(rows.ROWS) == NAMES
    assert list(floors.FLOORS) == [
        "zmq echo",
        "zmq stream",
        "pipe echo",
        "futex ping-pong",
        "memcpy",
        "memcpy shared",
        "pickle small",
        "pickle call",
        "fork",
        "interpreter",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_one_call_does_what_the_row_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGE", 8_000)
    monkeypatch.setattr(rows, "MEDIUM", 800)
    # Running ten thousand event loops would be slow and is not what is looked at.
    if "async-actor" in name:
        monkeypatch.setattr(rows, "AsyncServer", rows.Server)
    api = CountingApi()
    row = rows.ROWS[name]
    with row.open(api) as call:
        api.counts.clear()
        call()
        counts = dict(api.counts)
        assert {what: counts.get(what, 0) for what in EXPECTED[name]} == EXPECTED[name]
        call()
        assert all(api.counts[what] == 2 * number for what, number in EXPECTED[name].items()), (
            "every call does the same"
        )
        api.counts.clear()
    made = sum(1 for what in ("actor",) if what in EXPECTED[name])
    if "actor" in name and not made:
        assert api.counts.get("kill", 0) >= 1, "closing ends the row's actors"


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_that_the_counts_show(name: str) -> None:
    row = rows.ROWS[name]
    if row.unit == "GB/s":
        assert row.operations == pytest.approx(0.8)
    elif row.latency:
        assert row.operations == 1
    elif name in ("get 10k references", "wait 1k references", "1000 tasks and get"):
        assert row.operations == 1, "these count rounds, as the published rows do"
    elif name == "20 actors created":
        assert row.operations == EXPECTED[name]["actor"]
    else:
        inner = [
            number for what, number in EXPECTED[name].items() if what.startswith(("task small", "call small", "put"))
        ]
        assert row.operations == max(inner)


def test_async_servers_are_coroutines_and_answer() -> None:
    server = rows.AsyncServer()
    assert asyncio.run(server.small_value()) == b"ok"
    assert asyncio.run(server.small_value_of(3)) == b"ok"


def test_every_floor_of_a_row_exists() -> None:
    for row in rows.ROWS.values():
        assert set(row.floors) <= floors.FLOORS.keys()
        assert row.floors, "no figure without a floor beside it"


def test_select_takes_names_and_parts_in_the_order_of_the_table() -> None:
    assert [row.name for row in rows.select(None)] == NAMES
    assert [row.name for row in rows.select(["tasks sync", "get small"])] == ["get small", "tasks sync"]
    assert [row.name for row in rows.select(["tasks async"])] == ["tasks async"], "a whole name means itself alone"
    assert [row.name for row in rows.select(["n:n"])] == [name for name in NAMES if "n:n" in name]
    with pytest.raises(ValueError, match="no row is called or contains 'teleport'"):
        rows.select(["tasks sync", "teleport"])


def test_every_side_can_start_and_has_only_known_abilities() -> None:
    assert sides.STARTS.keys() == sides.ABILITIES.keys()
    needed = frozenset().union(*(row.needs for row in rows.ROWS.values()))
    for abilities in sides.ABILITIES.values():
        assert abilities <= needed
    assert all(sides.can_run("zray", row) for row in rows.ROWS.values())
    assert [row.name for row in rows.ROWS.values() if sides.can_run("loky", row)] == [
        "1000 tasks and get",
        "tasks sync",
        "tasks async",
        "tasks async with argument",
        "50k tasks drained",
    ]


@pytest.mark.parametrize("name", [name for name in floors.FLOORS if not name.startswith("memcpy")])
def test_floors_answer_again_and_again(name: str) -> None:
    with floors.FLOORS[name].open(None) as call:
        for _ in range(3):
            call()


@pytest.mark.parametrize("name", ["memcpy", "memcpy shared"])
def test_copying_floors_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "LARGE", 80_000)
    with floors.FLOORS[name].open(None) as call:
        assert call() is None


def test_two_forked_floors_do_not_keep_each_other_alive() -> None:
    pipe = floors.FLOORS["pipe echo"].open(None)
    futex = floors.FLOORS["futex ping-pong"].open(None)
    with pipe as call_pipe:
        with futex as call_futex:
            call_pipe()
            call_futex()
        call_pipe()
    first = floors.FLOORS["pipe echo"].open(None)
    call = first.__enter__()
    with floors.FLOORS["futex ping-pong"].open(None) as later:
        call()
        assert first.__exit__(None, None, None) is not True
        later()
