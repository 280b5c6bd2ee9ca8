"""What is replicated: the rows of a control store, behind the few verbs that a replica of any state needs.

Covers the interface (`StateMachine`), requests to the control store as changes that travel (`StoreState`), and which requests
change something. Does not cover order or copies (`chain`), or what a request means (`zray.gcs.service`).

Only the head plans: `execute` runs a request against its rows and returns what that changed. Everybody else applies those
changes in the same order, so that all replicas have the same rows, versions and numbers after the same entry. Task rows are
no part of it: they are written in bulk, and come again from the nodes that have the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from zray.gcs import messages as m
from zray.gcs.tables import Change

if TYPE_CHECKING:
    from zray.gcs.service import GcsService

PART_ROWS: Final = 512
"""Rows in one part of a snapshot, at most."""
PART_BYTES: Final = 256 << 10
"""Bytes of values after which a part is full."""


class SnapshotSource(Protocol):
    """All of a state as it was at one moment, to be read while it changes."""

    @property
    def count(self) -> int:
        """How many parts there are; at least one."""
        ...

    def part(self, index: int) -> bytes:
        """Return a part."""
        ...


class StateMachine(Protocol):
    """What a replica needs of the state that it keeps. The same calls in the same order give the same state everywhere."""

    def execute(self, body: bytes) -> tuple[bytes, bytes]:
        """Carry out a request; return (changes, answer). Never raises: what cannot be done has an answer, too."""
        ...

    def apply(self, changes: bytes) -> None:
        """Make changes happen that `execute` returned elsewhere, after the same ones before."""
        ...

    def read(self, body: bytes) -> bytes:
        """Return the answer to a request that changes nothing."""
        ...

    def snapshot(self) -> SnapshotSource:
        """Return all there is now. Takes no longer than a list of references to the rows."""
        ...

    def restore(self, parts: Sequence[bytes]) -> None:
        """Become what a snapshot says; no parts: empty."""
        ...


class ShardImage(msgspec.Struct, frozen=True, array_like=True):
    """Rows of a shard, or a part of them."""

    shard: int
    revision: int
    """Version of the newest change of the shard."""
    numbers: dict[int, int]
    """Newest number of each of its topics."""
    rows: list[tuple[int, bytes, bytes, int, bool]]
    """(table, key, value, version, ended), in an order that restores which ended first."""


_encode = msgspec.msgpack.Encoder().encode
_changes: Final = msgspec.msgpack.Decoder(list[tuple[int, Change]])
_part: Final = msgspec.msgpack.Decoder(list[ShardImage])
_NOTHING: Final = _encode([])


def is_write(body: bytes) -> bool:
    """Whether an encoded request changes rows, and so goes in at the head."""
    try:
        request = m.decode_request(body)
    except m.ProtocolError:
        return False
    return isinstance(request, (m.Put, m.Delete, m.DeletePrefix))


def concerns_tasks(body: bytes) -> bool:
    """Whether an encoded request is about task rows, which are not replicated."""
    try:
        request = m.decode_request(body)
    except m.ProtocolError:
        return False
    return isinstance(request, (m.SubmitTasks, m.FinishTasks, m.GetTask, m.ListTasks))


class StoreState:
    """The rows of a `GcsService` as a replicated state."""

    def __init__(self, service: GcsService) -> None:
        self.service = service

    def execute(self, body: bytes) -> tuple[bytes, bytes]:
        """Carry out a request; return (changes, answer)."""
        with self.service.recording() as changes:
            answer = self.service.handle_request(body)
        return (_encode(changes) if changes else _NOTHING), answer

    def apply(self, changes: bytes) -> None:
        """Make changes happen that the head has planned. ValueError: they do not follow what is here."""
        for shard, change in _changes.decode(changes):
            self.service.apply_change(shard, change)

    def read(self, body: bytes) -> bytes:
        """Return the answer to a request that changes nothing."""
        return self.service.handle_request(body)

    def snapshot(self) -> StoreSnapshot:
        """Return all rows as they are now."""
        return StoreSnapshot(self.service.image())

    def restore(self, parts: Sequence[bytes]) -> None:
        """Become what a snapshot says."""
        whole: dict[int, ShardImage] = {}
        for part in parts:
            for image in _part.decode(part):
                known = whole.setdefault(image.shard, image)
                if known is not image:
                    known.rows.extend(image.rows)
        self.service.load_image(list(whole.values()))


class StoreSnapshot:
    """Rows of all shards, cut into parts when these are asked for: a row never changes, another takes its place."""

    def __init__(self, images: Sequence[ShardImage]) -> None:
        self._parts: list[list[ShardImage]] = []
        for image in images:
            self._cut(image)

    def _cut(self, image: ShardImage) -> None:
        begin = size = 0
        for index, row in enumerate(image.rows):
            if index > begin and (index - begin == PART_ROWS or size + len(row[2]) > PART_BYTES):
                self._add(image, begin, index)
                begin, size = index, 0
            size += len(row[2])
        self._add(image, begin, len(image.rows))

    def _add(self, image: ShardImage, begin: int, end: int) -> None:
        self._parts.append([msgspec.structs.replace(image, rows=image.rows[begin:end])])

    @property
    def count(self) -> int:
        """How many parts there are."""
        return len(self._parts)

    def part(self, index: int) -> bytes:
        """Return a part."""
        return _encode(self._parts[index])
