"""Which shard keeps a key: the same answer on every machine, in every process, for ever.

Covers the hash and the cut into shards. Does not cover what a shard does with the key (`shard`) or where a shard lives
(`service`).

A key has one of 256 *slots*; shard i of n keeps the slots s with s * n // 256 == i, a run of neighbours, so that a
later change of n moves few of them. Python's own hash() is salted per process and therefore no choice.

- 16-byte ids (tables of `KEYED_BY_ID`): the slot is the first byte. Ids are random or mixed already (`zray.ids`), and
  the objects of a task share its first 12 bytes, so a task and its results are neighbours.
- Other keys: CRC-32 (the polynomial of zlib), then a multiplication by 2**32 / golden ratio (Knuth, The Art of Computer
  Programming, vol. 3, section 6.4), of which the highest byte is the slot.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from zray.gcs.tables import KEYED_BY_ID

SLOTS: Final = 256
MAX_SHARDS: Final = SLOTS

_GOLDEN = 0x9E37_79B1
_M32 = 0xFFFF_FFFF


def slot_of(table: int, key: bytes) -> int:
    """Return the slot of a key, 0 .. 255. An empty key of an id table is in slot 0."""
    if table in KEYED_BY_ID:
        return key[0] if key else 0
    return (crc32(key) * _GOLDEN & _M32) >> 24


def shard_of(table: int, key: bytes, shards: int) -> int:
    """Return the index of the shard that keeps the key, 0 .. shards - 1."""
    return slot_of(table, key) * shards // SLOTS


def slot_table(shards: int) -> tuple[int, ...]:
    """Return the shard of each slot, for loops that cannot afford `shard_of`.

    Raises:
        ValueError: `shards` is not in 1 .. 256.
    """
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"there are 1 to {MAX_SHARDS} shards, got {shards}")
    return tuple([slot * shards // SLOTS for slot in range(SLOTS)])
