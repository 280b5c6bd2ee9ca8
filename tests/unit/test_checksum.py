"""CRC-32C: known answers, both ways to compute it, sums of parts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from zray._store import PROC_BROKER, Store, crc32c

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("data", "sum_"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_answers(data: bytes, sum_: int) -> None:
    """From RFC 3720, appendix B.4."""
    assert crc32c(data) == crc32c(data, by_tables=True) == sum_


def test_both_ways_agree_at_all_sizes() -> None:
    rng = random.Random(1)
    data = rng.randbytes(100_000)
    for _ in range(300):
        start, size = rng.randrange(64), rng.choice([rng.randrange(100), rng.randrange(99_000), 12_288, 24_576])
        piece = memoryview(data)[start : start + size]
        assert crc32c(piece) == crc32c(piece, by_tables=True), (start, size)


def test_a_sum_goes_on() -> None:
    data = random.Random(2).randbytes(50_000)
    for at in (0, 1, 7, 4096, 12_288, 49_999):
        assert crc32c(data[at:], crc32c(data[:at])) == crc32c(data)


def test_any_flipped_bit_changes_it() -> None:
    data = bytearray(random.Random(3).randbytes(30_000))
    good = crc32c(data)
    for bit in random.Random(4).sample(range(8 * len(data)), 200):
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != good
        data[bit // 8] ^= 1 << bit % 8


def test_copies_have_the_sum_of_what_was_copied(tmp_path: Path) -> None:
    """At all alignments, also across the blocks in which pieces are copied."""
    with open(tmp_path / "store", "w+b") as file:
        Store.format(file.fileno(), 4 << 20, 100)
        store = Store(file.fileno())
        store.register(PROC_BROKER)
        rng = random.Random(5)
        data = rng.randbytes(200_000)
        ref = store.expect(bytes(range(16)), 0, None, None, "")
        store.elsewhere(ref, True)
        filling = store.fill(ref, len(data), 0)
        assert filling is not None
        written = bytearray(len(data))
        for _ in range(200):
            start = rng.randrange(len(data))
            size = min(rng.choice([0, 1, 63, 64, 65, 12_288, 12_289, 100_000]), len(data) - start)
            piece = memoryview(data)[start : start + size]
            assert filling.write(start, piece) == crc32c(piece)
            written[start : start + size] = piece
            assert filling.view() == written
        with pytest.raises(ValueError, match="no piece"):
            filling.write(len(data) - 1, b"xy")
        filling.write(0, data)
        assert filling.seal(0, 0, [])
        assert bytes(store.read(ref)[2]) == data
        del filling
        store.check()
        del ref
        store.close()
