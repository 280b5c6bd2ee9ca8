"""The door of a node under AddressSanitizer and UBSan, among people who come, talk, stop in the middle and go as they like."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.store import build

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 4000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_visitors_do_no_harm(seed: int) -> None:
    rng = random.Random(seed)
    place = f"/tmp/zdc{os.getpid()}.{seed}"
    os.mkdir(place)
    listeners = []
    try:
        for name in ("p", "x40"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(os.path.join(place, name))
            listener.listen(64)
            listener.setblocking(False)
            listeners.append(listener)
        door = subprocess.Popen(
            [str(build.door()), os.path.join(place, "x"), os.path.join(place, "p")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        )
        assert door.stdin is not None
        assert door.stdout is not None
        port = int(door.stdout.readline())
        _visit(rng, port, listeners)
        _, told = door.communicate(timeout=60)
        assert door.returncode == 0, told.decode(errors="replace")
    finally:
        for listener in listeners:
            listener.close()
        for name in os.listdir(place):
            os.unlink(os.path.join(place, name))
        os.rmdir(place)


def _visit(rng: random.Random, port: int, listeners: list[socket.socket]) -> None:
    ends: list[socket.socket] = []
    for _ in range(STEPS):
        for listener in select.select(listeners, [], [], 0)[0]:
            inner, _ = listener.accept()
            inner.setblocking(False)
            ends.append(inner)
        what = rng.random()
        if what < 0.15 or not ends:
            outer = socket.create_connection(("127.0.0.1", port), timeout=20)
            outer.setblocking(False)
            ends.append(outer)
            length = rng.choice([16, 17, 40, 40, 40, 41, 255, 1 << 40])
            greeting = b"\xff" + (length + 1).to_bytes(8, "big") + b"\x7f"
            said = rng.choice(
                [greeting, greeting + rng.randbytes(100), greeting[: rng.randrange(10)], rng.randbytes(30)]
            )
            if said:
                outer.send(said)
        elif what < 0.6:
            _try(lambda: rng.choice(ends).send(rng.randbytes(rng.choice([1, 100, 70_000, 600_000]))))
        elif what < 0.85:
            _try(lambda: rng.choice(ends).recv(rng.choice([1, 1000, 1 << 20])))
        elif what < 0.92:
            _try(lambda: rng.choice(ends).shutdown(rng.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])))
        else:
            ends.pop(rng.randrange(len(ends))).close()
    for end in ends:
        end.close()


def _try(step: Callable[[], object]) -> None:
    """Blocking and broken connections are what this is about."""
    try:
        step()
    except OSError:
        pass
