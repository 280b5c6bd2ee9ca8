"""CRC-32C: known answers, both ways to compute it, sums of parts."""

from __future__ import annotations

import random

import pytest

from zray._store import crc32c


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
