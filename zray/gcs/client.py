"""Callers of the control store: typed rows, user keys and values, tasks, and subscriptions that miss nothing for good.

Covers the translation of calls into requests and of replies into rows or exceptions, and the duty of a subscriber:
open, read, take notices, read again after a gap. Does not cover how a request travels: `request` is a callable from
bytes to bytes (through the broker, or straight into a service in the same process), and `open_subscriber` makes a SUB
socket (`zray.transport.Context.subscriber`).

Exceptions: `RequestRefused` and `VersionConflict` (`messages`), and whatever `request` raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from zray.gcs import messages as m
from zray.gcs.tables import (
    ABSENT,
    ANY,
    ROW_TABLES,
    Change,
    GcsRow,
    RowT,
    Table,
    TaskRow,
    decode_row,
    encode_row,
    key_of,
    namespaced_key,
    split_key,
)
from zray.gcs.topics import TopicView

Text = bytes | str
"""Keys and namespaces: text stands for its UTF-8 bytes."""

MAX_BATCH: Final = 10_000
"""Messages a subscription takes from one socket before it looks at the others."""


class SubscriberLike(Protocol):
    """What is needed of a SUB socket (`zray.transport.Subscriber`)."""

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Return the next (topic, body), or None after `timeout_ms`."""
        ...

    def close(self) -> None:
        """Close the socket."""
        ...


class GcsClient:
    """Typed calls to a control store."""

    __slots__ = ("_request",)

    def __init__(self, request: Callable[[bytes], bytes]) -> None:
        """`request` takes an encoded request to the service and returns its encoded reply."""
        self._request = request

    def call(self, request: m.Request) -> m.AnyReply:
        """Send a request; raise RequestRefused when it was refused, ProtocolError when the reply cannot be read."""
        reply = m.decode_reply(self._request(m.encode(request)))
        if isinstance(reply, m.Refused):
            raise m.refused(reply)
        return reply

    # -- rows ----------------------------------------------------------------------------------------------------------

    def row(self, row_type: type[RowT], key: bytes) -> RowT | None:
        """Return the row with that key, or None."""
        found = self.versioned(row_type, key)
        return None if found is None else found[0]

    def versioned(self, row_type: type[RowT], key: bytes) -> tuple[RowT, int] | None:
        """Return (row, version) for a later compare-and-swap, or None."""
        reply = self.call(m.Get(ROW_TABLES[row_type], key))
        if isinstance(reply, m.Found):
            return decode_row(row_type, reply.value), reply.version
        if isinstance(reply, m.Missing):
            return None
        raise m.refused(reply)

    def rows(self, row_type: type[RowT], prefix: bytes = b"") -> list[RowT]:
        """Return all rows whose keys begin with `prefix`, in key order."""
        return [decode_row(row_type, value) for _, value, _ in self.entries(ROW_TABLES[row_type], prefix)]

    def write(self, row: GcsRow, *, expected: int = ANY) -> int:
        """Write a row.

        Return its version. VersionConflict when its version is not `expected` (ABSENT: it must be new).
        """
        return m.expect_written(self.call(m.Put(ROW_TABLES[type(row)], key_of(row), encode_row(row), expected)))

    def delete(self, row_type: type[GcsRow], key: bytes, *, expected: int = ANY) -> bool:
        """Delete a row; return whether there was one. VersionConflict when its version is not `expected`."""
        reply = self.call(m.Delete(ROW_TABLES[row_type], key, expected))
        if isinstance(reply, m.Missing):
            return False
        return m.expect_written(reply) > 0

    def entries(
        self, table: Table, prefix: bytes = b"", *, keys_only: bool = False
    ) -> Iterator[tuple[bytes, bytes, int]]:
        """Iterate over (key, value, version) in key order, page by page.

        Rows that come or go meanwhile may be seen or not; all others are seen once.
        """
        after: bytes | None = None
        while True:
            reply = self.call(m.List(table, prefix, after, keys_only=keys_only))
            if not isinstance(reply, m.Page):
                raise m.refused(reply)
            yield from reply.rows
            if not reply.more:
                return
            after = reply.rows[-1][0]

    # -- keys and values of users --------------------------------------------------------------------------------------

    def kv_put(self, key: Text, value: bytes, *, overwrite: bool = True, namespace: Text | None = None) -> bool:
        """Store bytes under a key; return whether the key is new.

        An existing key keeps its value unless `overwrite`.

        Namespaces keep keys apart; None is one of its own.

        Raises:
            TypeError: key, value or namespace is not of its type.
            RequestRefused: the value is too large, or the store is full (code "full").
        """
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"a value is bytes, got {type(value).__name__}: encode it first")
        reply = self.call(m.Put(Table.KV, _key(key, namespace), bytes(value), ANY if overwrite else ABSENT))
        if isinstance(reply, m.Conflict):
            return False
        m.expect_written(reply)
        return isinstance(reply, m.Written) and reply.created

    def kv_get(self, key: Text, *, namespace: Text | None = None) -> bytes | None:
        """Return the value of a key, or None when it has none."""
        reply = self.call(m.Get(Table.KV, _key(key, namespace)))
        return reply.value if isinstance(reply, m.Found) else None

    def kv_exists(self, key: Text, *, namespace: Text | None = None) -> bool:
        """Return whether a key has a value, without fetching it."""
        exact = _key(key, namespace)
        reply = self.call(m.List(Table.KV, exact, limit=1, keys_only=True))
        return isinstance(reply, m.Page) and bool(reply.rows) and reply.rows[0][0] == exact

    def kv_delete(self, key: Text, *, namespace: Text | None = None) -> bool:
        """Delete a key; return whether it was there."""
        return isinstance(self.call(m.Delete(Table.KV, _key(key, namespace))), m.Written)

    def kv_delete_prefix(self, prefix: Text, *, namespace: Text | None = None) -> int:
        """Delete all keys that begin with `prefix`; return how many there were."""
        reply = self.call(m.DeletePrefix(Table.KV, _key(prefix, namespace)))
        if isinstance(reply, m.Deleted):
            return reply.count
        raise m.refused(reply)

    def kv_keys(self, prefix: Text = b"", *, namespace: Text | None = None) -> list[bytes]:
        """Return the keys that begin with `prefix`, in order."""
        found = self.entries(Table.KV, _key(prefix, namespace), keys_only=True)
        return [split_key(key)[1] for key, _, _ in found]

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def task(self, task: bytes) -> TaskRow | None:
        """Return a task, or None when it is not known (any more)."""
        reply = self.call(m.GetTask(task))
        if isinstance(reply, m.FoundTask):
            return reply.row
        if isinstance(reply, m.Missing):
            return None
        raise m.refused(reply)

    def tasks(self, job: int = 0, *, limit: int = 1000, live: bool = True, ended: bool = True) -> list[TaskRow]:
        """Return up to `limit` (at most 10,000) tasks of a job (0.

        Of all): live ones, then ended ones, newest end first.
        """
        reply = self.call(m.ListTasks(job, limit, live, ended))
        if isinstance(reply, m.Tasks):
            return reply.rows
        raise m.refused(reply)

    def statistics(self) -> m.Statistics:
        """Return how full the store is and what it has done."""
        reply = self.call(m.Describe())
        if isinstance(reply, m.Statistics):
            return reply
        raise m.refused(reply)

    # -- notices -------------------------------------------------------------------------------------------------------

    def subscribe(
        self, table: Table, open_subscriber: Callable[[str, list[bytes]], SubscriberLike] | None = None
    ) -> Subscription:
        """Return a view of a table that follows its changes.

        Without `open_subscriber` it reads at every poll instead.
        """
        reply = self.call(m.Open(table))
        if not isinstance(reply, m.Opened):
            raise m.refused(reply)
        sockets: list[SubscriberLike] = []
        if open_subscriber is not None:
            topics = [m.topic_name(table), m.BEAT]
            sockets = [open_subscriber(endpoint, topics) for endpoint in reply.endpoints]
        shards = len(reply.endpoints) or self.statistics().shards
        return Subscription(self, table, [TopicView(table) for _ in range(shards)], sockets)


class Subscription:
    """One table, followed. `poll` is to be called again and again; `rows` is the table as of the last poll."""

    __slots__ = ("_client", "_sockets", "malformed", "table", "views")

    def __init__(self, client: GcsClient, table: Table, views: list[TopicView], sockets: list[SubscriberLike]) -> None:
        self.table = table
        self.views = views
        """One for each shard."""
        self.malformed = 0
        """Messages dropped because they could not be read."""
        self._client = client
        self._sockets = sockets

    @property
    def rows(self) -> dict[bytes, bytes]:
        """The table as it was last seen: key -> encoded row. Empty for tasks, whose changes carry batches instead."""
        return {key: value for view in self.views for key, (value, _) in view.rows.items()}

    @property
    def gaps(self) -> int:
        """How often a loss was noticed (and mended by reading)."""
        return sum(view.gaps for view in self.views)

    def poll(self, timeout_ms: int = 0) -> list[Change]:
        """Return what has changed since the last poll, in order for each shard.

        Waits up to `timeout_ms` for a first message when nothing is known to have changed. Several changes of one row
        may appear as one, the last, after a gap.
        """
        changes: list[Change] = []
        if not self._sockets:
            for view in self.views:
                view.synced = False
        for shard, socket in enumerate(self._sockets):
            wait = timeout_ms if not changes and all(view.synced for view in self.views) else 0
            changes += self._drain(shard, socket, wait // len(self._sockets))
        for shard, view in enumerate(self.views):
            if not view.synced:
                changes += self._read(shard, view)
        return changes

    def _drain(self, shard: int, socket: SubscriberLike, timeout_ms: int) -> list[Change]:
        view = self.views[shard]
        changes: list[Change] = []
        for _ in range(MAX_BATCH):
            message = socket.receive(timeout_ms)
            if message is None:
                break
            timeout_ms = 0
            try:
                notice = m.decode_notice(*message)
            except m.ProtocolError:
                self.malformed += 1
                continue
            if isinstance(notice, m.Beat):
                view.handle_beat(notice.epoch, notice.newest.get(self.table, 0))
            elif notice.change.table == self.table:
                changes += view.handle_notice(notice.epoch, notice.change)
        return changes

    def _read(self, shard: int, view: TopicView) -> list[Change]:
        reply = self._client.call(m.Read(self.table, shard, view.epoch, view.sequence))
        if isinstance(reply, m.Log):
            return view.handle_log(reply.epoch, reply.changes)
        if isinstance(reply, m.Snapshot):
            return view.handle_snapshot(reply.epoch, reply.sequence, reply.rows)
        raise m.refused(reply)

    def close(self) -> None:
        """Close the sockets."""
        for socket in self._sockets:
            socket.close()
        self._sockets = []


def _key(key: Text, namespace: Text | None) -> bytes:
    # None and "" are two namespaces: the first is empty inside, all others begin with a full stop.
    inner = b"" if namespace is None else b"." + _bytes(namespace, "a namespace")
    return namespaced_key(inner, _bytes(key, "a key"))


def _bytes(text: Text, what: str) -> bytes:
    if isinstance(text, str):
        return text.encode()
    if isinstance(text, bytes):
        return text
    raise TypeError(f"{what} is bytes or str, got {type(text).__name__}")
