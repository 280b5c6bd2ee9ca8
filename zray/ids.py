"""Ids: how they look, and how the id of everything follows from where it came from.

Covers: the 16-byte layout shared by tasks, objects, actors, jobs, functions and nodes, and the derivation of child ids.
Does not cover who hands out counters (the session) or what an id means (the tables). Neighbours: `_store_core.c` has
the same derivation in C (`zs_derive_id`); both give the same bytes on every machine, so the mix is written down here.

Layout: 12 unique bytes, then a 4-byte little-endian *index*. On hot paths an id is a plain `bytes` object of length 16.

    index 0                    a task (also an actor, job, function or node)
    index 1 .. 0x7fffffff      the task's return values: return i (0-based) has index i + 1
    index 0x80000000 | n       the n-th value the task has put

A run of a task numbers its children from 1 (`task_id`) and its puts from 1. All of them derive from the run's *origin*
(`origin_of`), and its puts from the 2**31st on from `task_id(origin, FURTHER_PUTS | n >> 31)`.

The mix. `task_id(parent, counter)` is the first 12 bytes of MurmurHash3_x64_128 with seed 0 (Austin Appleby's
public-domain function) over the 24 bytes `parent (16) + counter (8, little-endian)`, followed by four zero bytes.
Spelled out, with all arithmetic modulo 2**64, `rotl` a 64-bit left rotation, p0 and p1 the parent's two little-endian
64-bit words and c the counter:

    C1 = 0x87c37b91114253d5, C2 = 0x4cf5ad432745937f
    h1 = rotl(rotl(p0 * C1, 31) * C2, 27) * 5 + 0x52dce729          # h2 is still 0 here
    h2 = (rotl(rotl(p1 * C2, 33) * C1, 31) + h1) * 5 + 0x38495ab5
    h1 = h1 ^ (rotl(c * C1, 31) * C2) ^ 24                          # the 8-byte tail, then the length
    h2 = h2 ^ 24
    h1 = h1 + h2;  h2 = h2 + h1
    h1 = fmix(h1); h2 = fmix(h2)
    h1 = h1 + h2;  h2 = h2 + h1
    id = h1 (8 bytes, little-endian) + low 4 bytes of h2 (little-endian) + 00 00 00 00

    fmix(k):  k ^= k >> 33;  k *= 0xff51afd7ed558ccd;  k ^= k >> 33;  k *= 0xc4ceb9fe1a85ec53;  k ^= k >> 33

96 bits: a cluster that makes 10**12 tasks meets a collision with probability about 10**-5.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ID_SIZE: Final = 16
UNIQUE_SIZE: Final = 12
NIL: Final = bytes(ID_SIZE)
PUT_BIT: Final = 0x8000_0000
MAX_RETURNS: Final = PUT_BIT - 1
MAX_PUTS: Final = PUT_BIT
FURTHER_PUTS: Final = 1 << 62

_TASK_SUFFIX = bytes(4)
_RETURN_SUFFIXES = tuple(i.to_bytes(4, "little") for i in range(1, 65))
_M = 0xFFFF_FFFF_FFFF_FFFF
_M32 = 0xFFFF_FFFF
_C1 = 0x87C3_7B91_1142_53D5
_C2 = 0x4CF5_AD43_2745_937F
_F1 = 0xFF51_AFD7_ED55_8CCD
_F2 = 0xC4CE_B9FE_1A85_EC53

# State of the hash after the parent's bytes, for the parent asked last: one process mostly derives from one parent.
# A tuple is replaced as a whole, so threads that race at worst compute it again.
_last_parent: tuple[bytes, int, int] = (b"no parent yet", 0, 0)


def random_id() -> bytes:
    """Return a fresh id with index 0, from the operating system's random source (safe after fork)."""
    return os.urandom(12) + _TASK_SUFFIX


def _absorb_parent(parent: bytes) -> tuple[bytes, int, int]:
    """Return (parent, h1, h2) after the parent's 16 bytes, h2 with the length already mixed in."""
    global _last_parent
    if len(parent) != ID_SIZE:
        raise ValueError(f"an id has {ID_SIZE} bytes, got {len(parent)}")
    word = int.from_bytes(parent, "little")
    k = (word & _M) * _C1 & _M
    k = (k << 31 | k >> 33) * _C2 & _M
    h1 = ((k << 27 | k >> 37) * 5 + 0x52DC_E729) & _M
    k = (word >> 64) * _C2 & _M
    k = (k << 33 | k >> 31) * _C1 & _M
    h2 = (((k << 31 | k >> 33) + h1) * 5 + 0x3849_5AB5) & _M
    _last_parent = state = (parent, h1 ^ 24, h2 ^ 24)
    return state


def task_id(parent: bytes, counter: int) -> bytes:
    """Return the id of the `counter`-th child of the task `parent`: equal on every machine and every run.

    Args:
        parent: 16-byte id of the submitting task (or driver, or actor).
        counter: place among the parent's children, 0 <= counter < 2**64.

    Raises:
        ValueError: `parent` is not 16 bytes long.
    """
    state = _last_parent
    if state[0] != parent:
        state = _absorb_parent(parent)
    _, h1, h2 = state
    k = counter * _C1 & _M
    h1 ^= (k << 31 | k >> 33) * _C2 & _M
    h1 = (h1 + h2) & _M
    h2 = (h2 + h1) & _M
    h1 = (h1 ^ h1 >> 33) * _F1 & _M
    h1 = (h1 ^ h1 >> 33) * _F2 & _M
    h1 ^= h1 >> 33
    h2 = (h2 ^ h2 >> 33) * _F1 & _M
    h2 = (h2 ^ h2 >> 33) * _F2 & _M
    h2 ^= h2 >> 33
    h1 = (h1 + h2) & _M
    return (((h1 + h2) & _M32) << 64 | h1).to_bytes(16, "little")


def origin_of(task: bytes, attempt: int, fresh: Callable[[], bytes] = random_id) -> bytes:
    """Return what the ids of all that one run of a task makes are derived from.

    The first run makes ids that follow from the task's own. Any later one is a repeat that may branch differently (it looked at the clock,
    at `wait`, at luck): then its k-th child is another call, while others may still hold, or run, what an earlier run has made in that place.
    So each has an origin of its own. It does not follow from the attempt's number: nodes that know nothing of one another count for
    themselves, and after the death of one the next may give the same number to another run.

    Args:
        task: its id.
        attempt: the run's number, 0 for the first: only one run in the cluster has that.
        fresh: makes an id that nobody else has.
    """
    return task if attempt == 0 else fresh()


def return_id(task: bytes, i: int) -> bytes:
    """Return the object id of return value `i` (0-based) of `task`."""
    if i < 64:
        return task[:12] + _RETURN_SUFFIXES[i]
    if i >= MAX_RETURNS:
        raise OverflowError(f"a task has at most {MAX_RETURNS} return values")
    return task[:12] + (i + 1).to_bytes(4, "little")


def put_id(task: bytes, n: int) -> bytes:
    """Return the object id of the `n`-th value put by `task`, 0 <= n < 2**31.

    Raises:
        OverflowError: the range is used up; the putter goes on under a fresh task id.
    """
    if n >= MAX_PUTS:
        raise OverflowError(f"a task id names at most {MAX_PUTS} puts: derive a fresh one")
    return task[:12] + (PUT_BIT | n).to_bytes(4, "little")


def task_of(object_id: bytes) -> bytes:
    """Return the id of the task that returned or put the object."""
    return object_id[:12] + _TASK_SUFFIX


def index_of(any_id: bytes) -> int:
    """Return the 32-bit index: 0 for a task, i + 1 for return i, 0x80000000 | n for put n."""
    return int.from_bytes(any_id[12:], "little")


def is_put(object_id: bytes) -> bool:
    """Tell whether the id names a value that was put (not returned)."""
    return object_id[15] > 127


def from_hex(text: str) -> bytes:
    """Return the id written as 32 hexadecimal digits; ValueError for anything else."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != ID_SIZE:
        raise ValueError(f"not an id: {text!r} (expected {2 * ID_SIZE} hexadecimal digits)")
    return found


class PublicId:
    """An id as programs written for Ray use it; its kinds differ, and ids of two kinds are never equal."""

    __slots__ = ("_bytes",)

    name = "ID"
    """What its text calls it."""

    def __init__(self, data: bytes) -> None:
        self._bytes = data

    def binary(self) -> bytes:
        """Return its bytes."""
        return self._bytes

    def hex(self) -> str:
        """Return its bytes as text."""
        return self._bytes.hex()

    def is_nil(self) -> bool:
        """Whether it names nothing."""
        return not any(self._bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicId) and type(other) is type(self) and other._bytes == self._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return f"{self.name}({self.hex()})"


class ActorId(PublicId):
    """An actor's id."""

    __slots__ = ()
    name = "ActorID"


class PlacementGroupId(PublicId):
    """A placement group's id."""

    __slots__ = ()
    name = "PlacementGroupID"
