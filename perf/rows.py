"""Every row of the table of figures, defined once, against whatever offers Ray's names: `zray`, `ray`, or an adapter.

Covers what one call of a row does and how many operations that is. Does not cover time (`timing.py`), who runs it
(`sides.py`) or what is asked of it (`compare.py`). Row names never change: results of different years must stay
comparable; a workload that has to change gets a new name.

The shapes follow the microbenchmarks that Ray publishes for each release, at sizes for a machine of two cores: n is two
actors or clients. A workload is a generator: it prepares, yields the function to be timed, and tidies up when closed.
What runs remotely is a plain function or class of `remotely.py` where it needs no API (so that process pools can run the
very same row) and nested in its workload where it does (so that it travels by value with the API it was given).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from .remotely import AsyncServer, Server, small_value, small_value_of

Api = Any
"""Something with `remote`, `get` and, as far as a row needs them, `put`, `wait`, `kill`: a module or an adapter."""

Call = Callable[[], object]

CLIENTS = 2
"""n: how many actors, or tasks that are clients, the multi-party rows have."""

BATCH = 1000
"""How many calls are in flight in asynchronous rows; as in the published shapes."""

LARGE = 800_000_000
MEDIUM = 80_000_000
"""Sizes in bytes of the arrays (100 and 10 million 8-byte numbers)."""

QUEUED = 50_000
CREATED = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its name for ever, its workload, operations of one call in `unit`, what it needs, what bounds it.

    `floors` name rows of `floors.py`, the nearest one first; `latency` says that a call is one operation, so that
    single calls can be timed; `warm_calls` is the least number of calls before anything counts, 0 for a row that warms
    up as it prepares.
    """

    name: str
    workload: Callable[[Api], Iterator[Call]]
    operations: float = 1.0
    unit: str = "/s"
    needs: frozenset[str] = field(default_factory=frozenset)
    floors: tuple[str, ...] = ()
    latency: bool = False
    warm_calls: int = 1

    def open(self, api: Api) -> AbstractContextManager[Call]:
        """Prepare the row on `api`; the context's value is the function to be timed."""
        return contextmanager(self.workload)(api)


# ---- actors, and clients of them


def client_class(api: Api) -> type:
    """Return an actor class whose instances call servers through `api`."""

    class Client:
        def __init__(self, servers: list[Any]) -> None:
            self.servers = servers

        def ready(self) -> bool:
            return True

        def calls(self, count: int) -> int:
            api.get([server.small_value.remote() for server in self.servers for _ in range(count)])
            return count

        def calls_with_argument(self, count: int) -> int:
            argument = api.put(0)
            api.get([server.small_value_of.remote(argument) for server in self.servers for _ in range(count)])
            return count

        def tasks(self, count: int) -> int:
            run = api.remote(small_value)
            api.get([run.remote() for _ in range(count)])
            return count

    return Client


def _servers(api: Api, kind: type, count: int, **options: Any) -> list[Any]:
    """Create `count` actors that answer and wait until each has answered once."""
    server = api.remote(**options)(kind) if options else api.remote(kind)
    made = [server.remote() for _ in range(count)]
    api.get([actor.small_value.remote() for actor in made])
    return made


def _clients(api: Api, servers_of_each: list[list[Any]]) -> list[Any]:
    client = api.remote(num_cpus=0)(client_class(api))
    made = [client.remote(servers) for servers in servers_of_each]
    api.get([actor.ready.remote() for actor in made])
    return made


def _end(api: Api, actors: list[Any]) -> None:
    for actor in actors:
        api.kill(actor)


# ---- objects


def get_small(api: Api) -> Iterator[Call]:
    reference = api.put(0)
    yield lambda: api.get(reference)


def put_small(api: Api) -> Iterator[Call]:
    yield lambda: api.put(0)


def multi_client_put_small(api: Api) -> Iterator[Call]:
    def put_many(count: int) -> int:
        for _ in range(count):
            api.put(0)
        return count

    run = api.remote(put_many)
    share = BATCH // CLIENTS
    yield lambda: api.get([run.remote(share) for _ in range(CLIENTS)])


def put_large(api: Api) -> Iterator[Call]:
    import numpy

    array = numpy.arange(LARGE // 8, dtype=numpy.int64)  # touched: reading must cost what reading data costs
    yield lambda: api.put(array)


def multi_client_put_medium(api: Api) -> Iterator[Call]:
    def put_many(count: int) -> int:
        import numpy

        for _ in range(count):
            api.put(numpy.zeros(MEDIUM // 8, dtype=numpy.int64))
        return count

    run = api.remote(put_many)
    yield lambda: api.get([run.remote(5) for _ in range(CLIENTS)])


def _get_array(api: Api, size: int) -> Iterator[Call]:
    import numpy

    reference = api.put(numpy.arange(size // 8, dtype=numpy.int64))
    yield lambda: api.get(reference)


def get_medium(api: Api) -> Iterator[Call]:
    return _get_array(api, MEDIUM)


def get_one_megabyte(api: Api) -> Iterator[Call]:
    return _get_array(api, 1_000_000)


def get_references(api: Api) -> Iterator[Call]:
    def make(count: int) -> list[Any]:
        return [api.put(1) for _ in range(count)]

    reference = api.remote(make).remote(10_000)
    api.get(reference)
    yield lambda: api.get(reference)


def wait_many(api: Api) -> Iterator[Call]:
    run = api.remote(small_value)

    def call() -> None:
        waiting = [run.remote() for _ in range(BATCH)]
        while waiting:
            _, waiting = api.wait(waiting)

    yield call


# ---- tasks


def tasks_and_get(api: Api) -> Iterator[Call]:
    run = api.remote(small_value)
    yield lambda: api.get([run.remote() for _ in range(BATCH)])


def tasks_sync(api: Api) -> Iterator[Call]:
    run = api.remote(small_value)
    yield lambda: api.get(run.remote())


def tasks_async(api: Api) -> Iterator[Call]:
    return tasks_and_get(api)


def tasks_with_argument(api: Api) -> Iterator[Call]:
    run = api.remote(small_value_of)
    yield lambda: api.get([run.remote(i) for i in range(BATCH)])


def multi_client_tasks(api: Api) -> Iterator[Call]:
    clients = _clients(api, [[] for _ in range(CLIENTS)])
    yield lambda: api.get([client.tasks.remote(BATCH) for client in clients])
    _end(api, clients)


def tasks_drained(api: Api) -> Iterator[Call]:
    run = api.remote(small_value)
    api.get([run.remote() for _ in range(BATCH)])  # instead of a warm-up call, which would take half a minute elsewhere

    def call() -> None:
        references = [run.remote() for _ in range(QUEUED)]
        api.get(references)

    yield call


# ---- actors


def _one_to_one(api: Api, kind: type, in_flight: int, **options: Any) -> Iterator[Call]:
    [actor] = _servers(api, kind, 1, **options)
    if in_flight == 1:
        yield lambda: api.get(actor.small_value.remote())
    else:
        yield lambda: api.get([actor.small_value.remote() for _ in range(in_flight)])
    _end(api, [actor])


def actor_sync(api: Api) -> Iterator[Call]:
    return _one_to_one(api, Server, 1, num_cpus=0)


def actor_async(api: Api) -> Iterator[Call]:
    return _one_to_one(api, Server, BATCH, num_cpus=0)


def actor_concurrent(api: Api) -> Iterator[Call]:
    return _one_to_one(api, Server, BATCH, num_cpus=0, max_concurrency=16)


def one_to_n(api: Api) -> Iterator[Call]:
    servers = _servers(api, Server, CLIENTS, num_cpus=0)
    [client] = _clients(api, [servers])
    yield lambda: api.get(client.calls.remote(BATCH))
    _end(api, [client, *servers])


def _tasks_to_n(api: Api, kind: type) -> Iterator[Call]:
    servers = _servers(api, kind, CLIENTS, num_cpus=0)

    def work(actors: list[Any], count: int) -> int:
        api.get([actors[i % len(actors)].small_value.remote() for i in range(count)])
        return count

    run = api.remote(work)
    yield lambda: api.get([run.remote(servers, BATCH) for _ in range(CLIENTS)])
    _end(api, servers)


def n_to_n(api: Api) -> Iterator[Call]:
    return _tasks_to_n(api, Server)


def n_to_n_with_argument(api: Api) -> Iterator[Call]:
    servers = _servers(api, Server, CLIENTS, num_cpus=0)
    clients = _clients(api, [[server] for server in servers])
    yield lambda: api.get([client.calls_with_argument.remote(BATCH) for client in clients])
    _end(api, clients + servers)


def async_actor_sync(api: Api) -> Iterator[Call]:
    return _one_to_one(api, AsyncServer, 1, num_cpus=0)


def async_actor_async(api: Api) -> Iterator[Call]:
    return _one_to_one(api, AsyncServer, BATCH, num_cpus=0)


def async_actor_with_argument(api: Api) -> Iterator[Call]:
    [actor] = _servers(api, AsyncServer, 1, num_cpus=0)
    yield lambda: api.get([actor.small_value_of.remote(i) for i in range(BATCH)])
    _end(api, [actor])


def n_to_n_async_actor(api: Api) -> Iterator[Call]:
    return _tasks_to_n(api, AsyncServer)


def actors_created(api: Api) -> Iterator[Call]:
    server = api.remote(num_cpus=0)(Server)

    def call() -> None:
        actors = [server.remote() for _ in range(CREATED)]
        api.get([actor.small_value.remote() for actor in actors])
        _end(api, actors)

    yield call


# ---- the table

OBJECTS = frozenset({"objects"})
LARGE_OBJECTS = frozenset({"objects", "large objects"})
NESTED_OBJECTS = frozenset({"objects", "tasks", "nested"})
TASKS = frozenset({"tasks"})
ACTORS = frozenset({"actors"})
NESTED_ACTORS = frozenset({"actors", "nested"})
ASYNC_ACTORS = frozenset({"actors", "async actors"})

TWO_HOPS = ("zmq echo", "pipe echo", "futex ping-pong")
STREAM = ("zmq stream", "pickle call")

_TABLE = [
    Row("get small", get_small, needs=OBJECTS, floors=("pickle small",), latency=True),
    Row("put small", put_small, needs=OBJECTS, floors=("pickle small",), latency=True),
    Row("multi-client put small", multi_client_put_small, BATCH, needs=NESTED_OBJECTS, floors=("pickle small",)),
    Row("put 800 MB", put_large, LARGE / 1e9, "GB/s", LARGE_OBJECTS, ("memcpy", "memcpy shared"), warm_calls=4),
    Row(
        "multi-client put 80 MB",
        multi_client_put_medium,
        CLIENTS * 5 * MEDIUM / 1e9,
        "GB/s",
        NESTED_OBJECTS | LARGE_OBJECTS,
        ("memcpy", "memcpy shared"),
        warm_calls=2,
    ),
    Row("get 80 MB", get_medium, needs=LARGE_OBJECTS, floors=("pickle small",), latency=True),
    Row("get 1 MB", get_one_megabyte, needs=LARGE_OBJECTS, floors=("pickle small",), latency=True),
    Row("get 10k references", get_references, needs=NESTED_OBJECTS, floors=("pickle small",)),
    Row("wait 1k references", wait_many, needs=frozenset({"tasks", "wait"}), floors=STREAM),
    Row("1000 tasks and get", tasks_and_get, needs=TASKS, floors=STREAM),
    Row("tasks sync", tasks_sync, needs=TASKS, floors=TWO_HOPS, latency=True),
    Row("tasks async", tasks_async, BATCH, needs=TASKS, floors=STREAM),
    Row("tasks async with argument", tasks_with_argument, BATCH, needs=TASKS, floors=STREAM),
    Row(
        "multi-client tasks async",
        multi_client_tasks,
        CLIENTS * BATCH,
        needs=NESTED_ACTORS | TASKS,
        floors=STREAM,
    ),
    Row("1:1 actor sync", actor_sync, needs=ACTORS, floors=TWO_HOPS, latency=True),
    Row("1:1 actor async", actor_async, BATCH, needs=ACTORS, floors=STREAM),
    Row("1:1 actor concurrent", actor_concurrent, BATCH, needs=ACTORS | {"concurrent actors"}, floors=STREAM),
    Row("1:n actor async", one_to_n, CLIENTS * BATCH, needs=NESTED_ACTORS, floors=STREAM),
    Row("n:n actor async", n_to_n, CLIENTS * BATCH, needs=NESTED_ACTORS, floors=STREAM),
    Row("n:n actor async with argument", n_to_n_with_argument, CLIENTS * BATCH, needs=NESTED_ACTORS, floors=STREAM),
    Row("1:1 async-actor sync", async_actor_sync, needs=ASYNC_ACTORS, floors=TWO_HOPS, latency=True),
    Row("1:1 async-actor async", async_actor_async, BATCH, needs=ASYNC_ACTORS, floors=STREAM),
    Row("1:1 async-actor with argument", async_actor_with_argument, BATCH, needs=ASYNC_ACTORS, floors=STREAM),
    Row("n:n async-actor async", n_to_n_async_actor, CLIENTS * BATCH, needs=ASYNC_ACTORS | {"nested"}, floors=STREAM),
    Row("20 actors created", actors_created, CREATED, "actors/s", ACTORS | {"kill"}, ("fork",)),
    Row("50k tasks drained", tasks_drained, QUEUED, "tasks/s", TASKS, STREAM, warm_calls=0),
]

ROWS: dict[str, Row] = {row.name: row for row in _TABLE}
"""All rows by name, in the order of the table."""


def select(patterns: list[str] | None) -> list[Row]:
    """Return the rows whose name is, or contains, one of `patterns` (all for none). ValueError if one fits nothing."""
    if not patterns:
        return list(ROWS.values())
    chosen: dict[str, Row] = {}
    for pattern in patterns:
        fitting = [ROWS[pattern]] if pattern in ROWS else [row for row in _TABLE if pattern in row.name]
        if not fitting:
            raise ValueError(f"no row is called or contains {pattern!r}; there are: {', '.join(ROWS)}")
        chosen.update((row.name, row) for row in fitting)
    return [row for name, row in ROWS.items() if name in chosen]
