"""Requests to the control store, its replies and its notices: fields, reason; encode and decode; version byte.

Covers every byte that goes in and out of `service`. Requests travel inside `zray.wire.GcsRequest` (or a call in the
same process), replies in the reply object, notices on the PUB socket of a shard. Does not cover what is answered
(`service`) or when a notice counts (`topics`).

A request or reply is a version byte and a msgpack array whose first item is the kind. A notice has two frames: the
topic (`topic_name`) and a version byte with a `Notice` or, on the topic BEAT, a `Beat`. Decoding raises `ProtocolError`
for whatever does not fit, and nothing else.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.errors import ZraySystemError
from zray.gcs.tables import ANY, Change, Table, TaskRow
from zray.task import TaskSpec

VERSION: Final = 1
MAX_PAGE: Final = 10_000
"""Rows in one reply; longer lists are read page by page."""


class ProtocolError(ValueError):
    """Bytes that are no request, reply or notice of this version."""


# -- requests ----------------------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Base of all requests. The reply is the one named, or `Refused`."""


class Get(Request, frozen=True, array_like=True, tag=1):
    """Read one row -> Found or Missing."""

    table: Table
    key: bytes


class Put(Request, frozen=True, array_like=True, tag=2):
    """Write one row if its version is `expected` (ANY, ABSENT or a version) -> Written or Conflict."""

    table: Table
    key: bytes
    value: bytes
    expected: int = ANY


class Delete(Request, frozen=True, array_like=True, tag=3):
    """Delete one row if its version is `expected` -> Written, Missing or Conflict."""

    table: Table
    key: bytes
    expected: int = ANY


class List(Request, frozen=True, array_like=True, tag=4):
    """Read rows whose keys begin with `prefix` and come after `after`, in key order over all shards -> Page."""

    table: Table
    prefix: bytes = b""
    after: bytes | None = None
    limit: int = MAX_PAGE
    keys_only: bool = False


class DeletePrefix(Request, frozen=True, array_like=True, tag=5):
    """Delete all rows whose keys begin with `prefix` -> Deleted."""

    table: Table
    prefix: bytes


class Open(Request, frozen=True, array_like=True, tag=6):
    """Begin to publish a table -> Opened. To be asked before the first read, so that nothing falls between."""

    table: Table


class Read(Request, frozen=True, array_like=True, tag=7):
    """What a subscriber missed in one table of one shard -> Log when it is all still there, else Snapshot."""

    table: Table
    shard: int
    epoch: int = 0
    sequence: int = 0
    """Of the last notice that was taken; `epoch` 0: none ever."""


class SubmitTasks(Request, frozen=True, array_like=True, tag=8):
    """Note tasks that will run (lineage) -> Done."""

    job: int
    tasks: list[TaskSpec]


class FinishTasks(Request, frozen=True, array_like=True, tag=9):
    """Note ends of tasks, columns as in `zray.wire.TasksDone` -> Done."""

    job: int
    worker: int
    ids: bytes
    statuses: bytes
    micros: list[int]


class GetTask(Request, frozen=True, array_like=True, tag=10):
    """Read one task -> FoundTask or Missing."""

    task: bytes


class ListTasks(Request, frozen=True, array_like=True, tag=11):
    """Read live tasks and then ended ones, newest end first -> Tasks. `job` 0: of all jobs."""

    job: int = 0
    limit: int = 1000
    live: bool = True
    ended: bool = True


class Describe(Request, frozen=True, array_like=True, tag=12):
    """How full is it? -> Statistics."""


AnyRequest = (
    Get | Put | Delete | List | DeletePrefix | Open | Read | SubmitTasks | FinishTasks | GetTask | ListTasks | Describe
)

# -- replies -----------------------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """Base of all replies."""


class Refused(Reply, frozen=True, array_like=True, tag=1):
    """The request was not carried out."""

    code: str
    """One of the REFUSED_* constants."""
    text: str
    """For people."""


REFUSED_MALFORMED: Final = "malformed"
"""It could not be read."""
REFUSED_ROW: Final = "row"
"""Key or value break the rules of the table."""
REFUSED_FULL: Final = "full"
"""A bound on what users store is reached."""
REFUSED_STORAGE: Final = "storage"
"""Where acknowledged writes are kept took none (full disk, lost server): the write did not happen."""
REFUSED_INTERNAL: Final = "internal"
"""The service failed; the write did not happen."""


class Found(Reply, frozen=True, array_like=True, tag=2):
    """A row."""

    value: bytes
    version: int


class Missing(Reply, frozen=True, array_like=True, tag=3):
    """There is no such row."""


class Written(Reply, frozen=True, array_like=True, tag=4):
    """Done, and not lost any more. `version`: of the row (of the deletion)."""

    version: int
    created: bool = False
    """There was no such row before."""


class Conflict(Reply, frozen=True, array_like=True, tag=5):
    """The row has another version than expected (0: it is absent)."""

    version: int


class Page(Reply, frozen=True, array_like=True, tag=6):
    """Rows in key order as (key, value, version); `more`: there are further ones after the last."""

    rows: list[tuple[bytes, bytes, int]]
    more: bool


class Deleted(Reply, frozen=True, array_like=True, tag=7):
    """How many rows went."""

    count: int


class Opened(Reply, frozen=True, array_like=True, tag=8):
    """Where the table is published: the endpoint of each shard, in the order of the shards."""

    epoch: int
    endpoints: list[str]


class Snapshot(Reply, frozen=True, array_like=True, tag=9):
    """All rows of a table in a shard after change number `sequence` of epoch `epoch`."""

    epoch: int
    sequence: int
    rows: list[tuple[bytes, bytes, int]]


class Log(Reply, frozen=True, array_like=True, tag=10):
    """All changes after the one that was named, oldest first."""

    epoch: int
    changes: list[Change]


class Done(Reply, frozen=True, array_like=True, tag=11):
    """Noted."""


class FoundTask(Reply, frozen=True, array_like=True, tag=12):
    """A task."""

    row: TaskRow


class Tasks(Reply, frozen=True, array_like=True, tag=13):
    """Tasks."""

    rows: list[TaskRow]


class Statistics(Reply, frozen=True, array_like=True, tag=14):
    """How full the store is and what it has done since it began."""

    shards: int
    rows: dict[str, int]
    """By table; TASKS counts live and ended ones."""
    bytes: dict[str, int]
    """Keys and values (of tasks: columns, specs and held specs of ended ones)."""
    tasks_live: int
    tasks_ended: int
    """Readable ones."""
    tasks_held: int
    tasks_flushed: int
    lineage_lost: int
    task_totals: dict[int, int]
    """Ends ever seen, by status."""
    changes: int
    """Of rows other than tasks."""
    published: int
    malformed: int
    """Requests that could not be read."""
    failures: int
    """Requests refused because the service itself failed."""


AnyReply = (
    Refused
    | Found
    | Missing
    | Written
    | Conflict
    | Page
    | Deleted
    | Opened
    | Snapshot
    | Log
    | Done
    | FoundTask
    | Tasks
    | Statistics
)

# -- notices -----------------------------------------------------------------------------------------------------------


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """One published change. For tasks `change.key` is empty and `change.value` an encoded `task_batches.TaskEnds`."""

    epoch: int
    """Of the service: another one after each start."""
    change: Change


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """The newest number of each published topic of the shard: how the loss of the last notice is seen."""

    epoch: int
    newest: dict[int, int]


BEAT: Final = b"beat."
"""Topic of beats; every subscriber of a shard listens to it."""


def topic_name(table: int) -> bytes:
    """Return the PUB topic of a table; the full stop keeps one from being the prefix of another."""
    return Table(table).name.lower().encode() + b"."


# -- bytes -------------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_PREFIX: Final = bytes((VERSION,))
_requests: Final[msgspec.msgpack.Decoder[AnyRequest]] = msgspec.msgpack.Decoder(AnyRequest)
_replies: Final[msgspec.msgpack.Decoder[AnyReply]] = msgspec.msgpack.Decoder(AnyReply)
_notices: Final = msgspec.msgpack.Decoder(Notice)
_beats: Final = msgspec.msgpack.Decoder(Beat)


def encode(message: Request | Reply | Notice | Beat) -> bytes:
    """Return the bytes of a request, reply, notice or beat."""
    return _PREFIX + _encoder.encode(message)


def _body(data: bytes) -> memoryview:
    if len(data) < 2 or data[0] != VERSION:
        raise ProtocolError(f"not of version {VERSION}: {bytes(data[:8])!r}")
    return memoryview(data)[1:]


def decode_request(data: bytes) -> AnyRequest:
    """Return the request; ProtocolError when it is none."""
    try:
        return _requests.decode(_body(data))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed request: {error}") from None


def decode_reply(data: bytes) -> AnyReply:
    """Return the reply; ProtocolError when it is none."""
    try:
        return _replies.decode(_body(data))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed reply: {error}") from None


def decode_notice(topic: bytes, data: bytes) -> Notice | Beat:
    """Return what was published under a topic; ProtocolError when it is neither notice nor beat."""
    try:
        body = _body(data)
        return _beats.decode(body) if topic == BEAT else _notices.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed notice: {error}") from None


# -- refusals as exceptions --------------------------------------------------------------------------------------------


class RequestRefused(ZraySystemError):
    """The control store did not carry out a request; `code` is one of the REFUSED_* constants."""

    def __init__(self, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.code = code


class VersionConflict(ZraySystemError):
    """A compare-and-swap found another version than expected; `version` is the one it found (0: the row is absent)."""

    def __init__(self, message: str = "", version: int = 0) -> None:
        super().__init__(message)
        self.version = version


def expect_written(reply: Reply) -> int:
    """Return the version of a row that was written; raise what the reply says otherwise."""
    if isinstance(reply, Written):
        return reply.version
    if isinstance(reply, Conflict):
        raise VersionConflict(f"the row has version {reply.version}, not the expected one", reply.version)
    raise refused(reply)


def refused(reply: Reply) -> RequestRefused:
    """Return the exception for a reply that is not the one hoped for."""
    if isinstance(reply, Refused):
        return RequestRefused(f"the control store refused: {reply.text}", reply.code)
    return RequestRefused(f"unexpected answer of the control store: {type(reply).__name__}")
