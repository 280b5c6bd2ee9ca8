"""What the control store remembers: tables, their rows, their keys, and when a row has ended.

Covers the row types, the rule that makes a row's key, encoding and checked decoding, and the record of one change. Does
not cover which shard keeps a key (`sharding`), bounds and versions (`shard`), or the compact form of task rows
(`task_rows`).

Keys. Nodes, jobs, functions, actors, objects and placement groups: their 16-byte id. Names of actors:
`namespaced_key(namespace, name)`. Events: 8-byte big-endian number, so that key order is order of birth. User keys:
`namespaced_key(namespace, key)`, the value is the user's bytes. The cluster's one row: CLUSTER_KEY.
Answers (of writes that other nodes asked for, until they have heard them): id of the node and number of the request,
8 bytes, big-endian; written by the service alone. Tasks: the 16-byte id; they are written in bulk and
kept in `task_rows`, so `TaskRow` is what a reader gets, not what is stored.

Rows are positional (`array_like`): a field may be added at the end, with a default; none is ever removed or moved.
"""

from __future__ import annotations

import enum
from typing import Final, TypeVar, cast

import msgspec

from zray.ids import ID_SIZE
from zray.placing import GroupSpec
from zray.task import ActorSpec, CallShape, JobSpec, TaskSpec

ANY: Final = -1
"""`expected` version of a write that does not compare."""
ABSENT: Final = 0
"""`expected` version of a write that must create the row; versions of rows start at 1."""

MAX_NAMESPACE: Final = 0xFFFF
"""Bytes in a namespace."""


class Table(enum.IntEnum):
    """The tables; the numbers travel in requests and notices."""

    NODES = 1
    JOBS = 2
    FUNCTIONS = 3
    ACTORS = 4
    ACTOR_NAMES = 5
    TASKS = 6
    OBJECTS = 7
    PLACEMENT_GROUPS = 8
    EVENTS = 9
    KV = 10
    CLUSTER = 11
    ANSWERS = 12
    CREATIONS = 13


KEYED_BY_ID: Final = frozenset(
    (
        Table.NODES,
        Table.JOBS,
        Table.FUNCTIONS,
        Table.ACTORS,
        Table.TASKS,
        Table.OBJECTS,
        Table.PLACEMENT_GROUPS,
        Table.CLUSTER,
        Table.CREATIONS,
    )
)
"""Tables whose keys are 16-byte ids."""


class RowError(ValueError):
    """Bytes that are no row of their table, or a key that breaks the table's rule."""


class GcsRow(msgspec.Struct, frozen=True, array_like=True):
    """Base of all row types; `ROW_TABLES` says where each belongs."""


class NodeRow(GcsRow, frozen=True, array_like=True):
    """A machine of the cluster."""

    id: bytes
    address: str
    """Where other brokers reach its broker; empty on a cluster of one."""
    hostname: str
    pid: int
    """Of its broker."""
    resources: dict[str, float]
    labels: dict[str, str] = {}
    alive: bool = True
    started: float = 0.0
    """Seconds since the epoch, like all times in rows."""
    ended: float = 0.0
    reason: str = ""
    """Why it is dead, for people."""
    index: int = 0
    """Among all that ever joined; the head's is 0."""
    version: str = ""
    python: str = ""
    session: str = ""
    directory: str = ""
    serves_one: bool = False
    """It is the scheduler of one driver's job."""


CLUSTER_KEY: Final = bytes(ID_SIZE)
"""Of the one row of its table."""


class ClusterRow(GcsRow, frozen=True, array_like=True):
    """The cluster itself: what a head must know of its last life."""

    id: bytes
    """Drawn when the cluster began: a head with other storage has begun another one."""
    head: bytes
    """Node id of the present head."""
    joined: int = 0
    """Nodes that ever joined."""
    lives: int = 1
    """Of the head."""
    clients: int = 0
    """Clients that ever joined."""


class JobRow(GcsRow, frozen=True, array_like=True):
    """One driver's program."""

    id: bytes
    number: int
    node: bytes
    driver_pid: int
    namespace: str
    entrypoint: str = ""
    running: bool = True
    started: float = 0.0
    ended: float = 0.0
    reason: str = ""


class FunctionRow(GcsRow, frozen=True, array_like=True):
    """A call shape: what a task id's spec needs beside it to be run again. The key is `shape.key`."""

    shape: CallShape
    job: int = 0


class ActorState(enum.IntEnum):
    """Where an actor is in its life."""

    PENDING = 0
    ALIVE = 1
    RESTARTING = 2
    DEAD = 3


class ActorRow(GcsRow, frozen=True, array_like=True):
    """An actor."""

    id: bytes
    job: int
    state: ActorState
    class_name: str = ""
    name: str = ""
    namespace: str = ""
    node: bytes = b""
    worker: int = 0
    pid: int = 0
    incarnation: int = 0
    detached: bool = False
    started: float = 0.0
    ended: float = 0.0
    reason: str = ""
    """Name of the cause of death (`zray.errors.DeathCause`)."""
    spec: ActorSpec | None = None
    """What makes it again; None once it cannot be."""
    owner: bytes = b""
    """Node that was asked for it, and without which it is dead."""


class StoredValue(msgspec.Struct, frozen=True, array_like=True):
    """An object, as it is packed in a store."""

    id: bytes
    kind: int
    flags: int
    data: bytes


class CreationRow(GcsRow, frozen=True, array_like=True):
    """All that makes a detached named actor again when nothing but rows is left."""

    id: bytes
    """Of the actor."""
    job: JobSpec
    spec: ActorSpec
    shape: CallShape
    values: list[StoredValue]
    """Its class and its arguments."""
    lacking: str = ""
    """Why it cannot be made again, for people; empty: it can."""


class ActorNameRow(GcsRow, frozen=True, array_like=True):
    """Who bears a name. Written with `expected=ABSENT`, so that of two claims one loses."""

    namespace: str
    name: str
    actor: bytes
    node: bytes = b""
    """The actor's owner: the node that was asked for it."""


class ObjectRow(GcsRow, frozen=True, array_like=True):
    """Where the copies of an object are. Objects that never left their node have no row: their store knows."""

    id: bytes
    size: int
    nodes: tuple[bytes, ...]
    owner: bytes = b""
    attempt: int = 0
    checksum: int = 0
    spilled: tuple[str, ...] = ()
    """Places on disk, one for each node that spilled it."""


class GroupState(enum.IntEnum):
    """Where a placement group is in its life."""

    PENDING = 0
    CREATED = 1
    REMOVED = 2
    RESCHEDULING = 3
    """Some of its bundles were lost with their nodes and have no others yet."""


class PlacementGroupRow(GcsRow, frozen=True, array_like=True):
    """Resources reserved together; `nodes[i]` holds `bundles[i]` (empty while nothing is placed)."""

    id: bytes
    job: int
    state: GroupState
    strategy: str
    bundles: tuple[dict[str, float], ...]
    nodes: tuple[bytes, ...] = ()
    name: str = ""
    namespace: str = ""
    detached: bool = False
    spec: GroupSpec | None = None
    """By what the next head goes on with it (bundles above are rounded, for people); None in rows of earlier versions."""
    home: bytes = b""
    """Node of its job's driver: the group ends with it, unless it is detached."""
    reason: str = ""
    """Why it was removed, for people."""


class EventRow(GcsRow, frozen=True, array_like=True):
    """Something that happened, for people and tools."""

    number: int
    time: float
    subject_table: str
    subject: bytes
    what: str
    detail: str = ""


LIVE: Final = -1
"""`TaskRow.status` of a task that has not ended; ended ones have `zray.wire.DONE_*` or one of the two below."""
FAILED: Final = 16
"""Ended by the system (worker or node lost, cannot be scheduled): its results hold a system error."""
ABANDONED: Final = 17
"""Its job ended before it did."""


class TaskRow(msgspec.Struct, frozen=True, array_like=True):
    """A task, as a reader sees it."""

    id: bytes
    job: int
    status: int
    """LIVE, a DONE_* constant, FAILED or ABANDONED."""
    worker: int = 0
    """Where it ended; 0 for none."""
    micros: int = 0
    """Run time in microseconds."""
    ended: float = 0.0
    """When its end became known."""
    spec: TaskSpec | None = None
    """What runs it again; None when it never passed the broker."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """A stored value and the version of the shard that wrote it: versions only grow and are never given twice."""

    value: bytes
    version: int
    ended: bool = False
    """Retention may take it."""


class Change(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change of one row, as it is stored, logged and published."""

    table: int
    key: bytes
    value: bytes | None
    """None: the row was deleted."""
    version: int
    """Of the shard: one more than the change before it, in whatever table. 0 in notices about tasks."""
    sequence: int
    """Of the topic (a table of a shard): one more than the change before it in this table."""
    ended: bool = False


RowT = TypeVar("RowT", bound=GcsRow)

ROW_TABLES: Final[dict[type[GcsRow], Table]] = {
    NodeRow: Table.NODES,
    JobRow: Table.JOBS,
    FunctionRow: Table.FUNCTIONS,
    ActorRow: Table.ACTORS,
    ActorNameRow: Table.ACTOR_NAMES,
    ObjectRow: Table.OBJECTS,
    PlacementGroupRow: Table.PLACEMENT_GROUPS,
    EventRow: Table.EVENTS,
    ClusterRow: Table.CLUSTER,
    CreationRow: Table.CREATIONS,
}
_DECODERS: Final[dict[type[GcsRow], msgspec.msgpack.Decoder[GcsRow]]] = {
    row_type: msgspec.msgpack.Decoder(row_type) for row_type in ROW_TABLES
}
_ROW_TYPES: Final = {table: row_type for row_type, table in ROW_TABLES.items()}
_encode = msgspec.msgpack.Encoder().encode


def namespaced_key(namespace: bytes, key: bytes) -> bytes:
    """Return the key of `key` in `namespace`; the namespace's length goes first, so that no two pairs share a key.

    Raises:
        RowError: the namespace is longer than MAX_NAMESPACE bytes.
    """
    if len(namespace) > MAX_NAMESPACE:
        raise RowError(f"a namespace has at most {MAX_NAMESPACE} bytes, got {len(namespace)}")
    return len(namespace).to_bytes(2, "big") + namespace + key


def split_key(key: bytes) -> tuple[bytes, bytes]:
    """Return (namespace, key) of a key made by `namespaced_key`; RowError for any other."""
    end = 2 + int.from_bytes(key[:2], "big")
    if len(key) < 2 or len(key) < end:
        raise RowError("not a namespaced key")
    return key[2:end], key[end:]


def event_key(number: int) -> bytes:
    """Return the key of the event with that number; RowError when it does not fit 8 bytes."""
    if not 0 <= number < 1 << 64:
        raise RowError(f"no number of an event: {number}")
    return number.to_bytes(8, "big")


def key_of(row: GcsRow) -> bytes:
    """Return the key of a row; RowError when its id has not 16 bytes."""
    if isinstance(row, ClusterRow):
        return CLUSTER_KEY
    if isinstance(row, FunctionRow):
        key = row.shape.key
    elif isinstance(row, ActorNameRow):
        return namespaced_key(row.namespace.encode(), row.name.encode())
    elif isinstance(row, EventRow):
        return event_key(row.number)
    elif isinstance(row, (NodeRow, JobRow, ActorRow, CreationRow, ObjectRow, PlacementGroupRow)):
        key = row.id
    else:
        raise RowError(f"{type(row).__name__} belongs to no table")
    if len(key) != ID_SIZE:
        raise RowError(f"the id of a {type(row).__name__} has {ID_SIZE} bytes, got {len(key)}")
    return key


def is_ended(row: GcsRow) -> bool:
    """Tell whether nothing more will happen to what the row describes, so that retention may take it."""
    if isinstance(row, NodeRow):
        return not row.alive
    if isinstance(row, JobRow):
        return not row.running
    if isinstance(row, ActorRow):
        return row.state == ActorState.DEAD
    if isinstance(row, PlacementGroupRow):
        return row.state == GroupState.REMOVED
    return isinstance(row, EventRow)


def encode_row(row: GcsRow) -> bytes:
    """Return the bytes that are stored for a row."""
    return _encode(row)


def decode_row(row_type: type[RowT], value: bytes) -> RowT:
    """Return the row that the bytes hold; RowError when they are none of that type."""
    try:
        return cast("RowT", _DECODERS[row_type].decode(value))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RowError(f"not a {row_type.__name__}: {error}") from None


def check_entry(table: int, key: bytes, value: bytes) -> bool:
    """Check that a value may stand under a key, and return whether the row has ended.

    Raises:
        RowError: the value is no row of the table, or belongs under another key.
    """
    if table == Table.KV:
        split_key(key)
        return False
    row_type = _ROW_TYPES.get(Table(table))
    if row_type is None:
        raise RowError(f"rows of {Table(table).name} are not written one by one")
    row = decode_row(row_type, value)
    if key_of(row) != key:
        raise RowError(f"the row belongs under {key_of(row)!r}, not {key!r}")
    return is_ended(row)
