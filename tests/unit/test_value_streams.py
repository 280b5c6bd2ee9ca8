"""Streams for values: frames and data come as they were sent, and a place is asked for only when all of its data is there."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from zray.broker.peer_messages import PIECE_BYTES
from zray.value_streams import ValueStream

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[ValueStream, ValueStream]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    secret = os.urandom(32)
    ends = ValueStream(near, secret, calling=True), ValueStream(far, secret, calling=False)
    yield ends
    for end in ends:
        end.close()


def test_frames_and_data_come_in_order(pair: Pair) -> None:
    giver, getter = pair
    sent = [(b"first", b""), (b"second", os.urandom(PIECE_BYTES)), (b"third", b"x"), (b"", b"")]
    for frame, data in sent:
        giver.send(frame, memoryview(data) if data else None)
    places: list[bytearray] = []

    def place_for(_frame: bytes, size: int) -> memoryview:
        places.append(bytearray(size))
        return memoryview(places[-1])

    found: list[tuple[bytes, bytes]] = []
    while len(found) < len(sent):
        giver.pump()
        for frame, brought in getter.receive(place_for):
            found.append((frame, bytes(places[-1]) if brought else b""))
    assert found == sent
    assert not giver.waits_to_write()


def test_a_place_is_asked_for_when_all_data_is_there(pair: Pair) -> None:
    """Until then another source may bring the same piece, or nobody want it any more."""
    giver, getter = pair
    data = os.urandom(PIECE_BYTES)
    giver.send(b"piece", memoryview(data))
    place = bytearray(PIECE_BYTES)
    asked: list[bool] = []

    def place_for(_frame: bytes, _size: int) -> memoryview:
        asked.append(giver.waits_to_write())
        return memoryview(place)

    found: list[tuple[bytes, bool]] = []
    while not found:
        giver.pump()
        found += getter.receive(place_for)
    assert asked == [False]
    assert found == [(b"piece", True)]
    assert place == data


def test_data_that_nobody_wants_is_left_out(pair: Pair) -> None:
    giver, getter = pair
    giver.send(b"unwanted", memoryview(bytes(1000)))
    giver.send(b"after it")
    giver.pump()
    assert list(getter.receive(lambda _frame, _size: None)) == [(b"after it", False)]
    assert not getter.ended
