"""Was every answer right? A checker of histories of keys that are put, swapped and read, with versions.

Covers linearizability of single keys (Herlihy and Wing, 1990) and that no acknowledged write is lost or carried out twice. Does
not cover how histories come about. General checkers search; here a row's version names its place in the one order that there
can be, so that checking is sorting:

    a read shows a value under the version that its one write was answered with
    of two writes, or a write and a read, whichever ended before the other began has the lower version (a read: not higher)
    a swap that succeeded against version v is the next write of its key after v
    a swap that found version v is a read of v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from zray.gcs import messages as m

PUT: Final = "put"
SWAP: Final = "swap"
READ: Final = "read"


@dataclass
class Operation:
    """One request, as its client saw it."""

    client: int
    kind: str
    key: bytes
    value: bytes
    """What was written (all different), or what was read."""
    expected: int
    """Version that a swap compares with."""
    began: float
    ended: float = float("inf")
    version: int = -1
    """Of the row that was written or found; 0: there was none."""
    succeeded: bool = False
    """A write has written."""

    def take(self, reply: m.Reply) -> None:
        """Note the answer of the store. AssertionError: it is none that such a request can have."""
        if isinstance(reply, m.Written):
            self.version, self.succeeded = reply.version, True
        elif isinstance(reply, m.Conflict):
            self.version = reply.version
        elif isinstance(reply, m.Found):
            self.version, self.value = reply.version, reply.value
        else:
            assert isinstance(reply, m.Missing), f"an answer that nobody expects: {reply}"
            self.version = 0

    def __str__(self) -> str:
        shown = self.value.decode(errors="replace")
        outcome = f"-> {self.version}" if self.succeeded or self.kind == READ else f"found {self.version}"
        return f"client {self.client} {self.kind} {self.key!r} {shown} {outcome} [{self.began:.4f}, {self.ended:.4f}]"


def check(operations: list[Operation]) -> None:
    """Raise AssertionError naming what contradicts what. Operations without an end may have happened or not."""
    for key in sorted({operation.key for operation in operations}):
        _check_key([operation for operation in operations if operation.key == key])


def _check_key(operations: list[Operation]) -> None:
    ended = [operation for operation in operations if operation.ended < float("inf")]
    writes: dict[int, Operation] = {}
    for operation in ended:
        if operation.succeeded:
            other = writes.setdefault(operation.version, operation)
            assert other is operation, f"one version for two writes: {other} and {operation}"
    open_values = {operation.value for operation in operations if operation.ended == float("inf")}
    open_versions: dict[bytes, int] = {}
    for operation in ended:
        if operation.kind == READ and operation.version > 0:
            _check_read(operation, writes, open_values, open_versions)
    _check_swaps(ended, writes)
    _check_order(ended)


def _check_read(
    read: Operation, writes: dict[int, Operation], open_values: set[bytes], open_versions: dict[bytes, int]
) -> None:
    write = writes.get(read.version)
    if write is not None:
        assert write.value == read.value, f"{read} does not show what {write} wrote"
        return
    # It may be a write whose answer has not come; all reads that show it must agree about it.
    assert read.value in open_values, f"no write was answered with the version of {read}: it was lost or made twice"
    version = open_versions.setdefault(read.value, read.version)
    assert version == read.version, f"a write was made twice: {read}, and version {version}"


def _check_swaps(ended: list[Operation], writes: dict[int, Operation]) -> None:
    versions = sorted(writes)
    places = {version: index for index, version in enumerate(versions)}
    for operation in ended:
        if operation.kind == SWAP and operation.succeeded:
            before = places[operation.version] - 1
            last = versions[before] if before >= 0 else 0
            assert last <= operation.expected, f"{operation} expected {operation.expected}, but {writes[last]}"


def _check_order(ended: list[Operation]) -> None:
    by_begin = sorted(ended, key=lambda operation: operation.began)
    by_end = sorted(ended, key=lambda operation: operation.ended)
    newest: Operation | None = None
    position = 0
    for operation in by_begin:
        while by_end[position].ended < operation.began:
            if newest is None or by_end[position].version > newest.version:
                newest = by_end[position]
            position += 1
        if newest is None:
            continue
        if operation.succeeded:
            assert operation.version > newest.version, f"{operation} went before {newest}, which had ended"
        else:
            assert operation.version >= newest.version, f"{operation} is older than {newest}, which had ended"
