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
    behind: list[socket.socket] = []
    try:
        for name, kind in (("p", socket.SOCK_STREAM), ("x40", socket.SOCK_DGRAM), ("x10280", socket.SOCK_DGRAM)):
            made = socket.socket(socket.AF_UNIX, kind)
            made.bind(os.path.join(place, name))
            made.setblocking(False)
            behind.append(made)
        behind[0].listen(64)
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
        come, taken = _visit(rng, port, behind)
        counts, told = door.communicate(timeout=60)
        assert door.returncode == 0, told.decode(errors="replace")
        accepted, handed_over, turned_away, still_open = map(int, counts.split())
        assert accepted <= come
        assert handed_over >= taken > 0
        assert turned_away > 0
        assert still_open == 0
    finally:
        for made in behind:
            made.close()
        for name in os.listdir(place):
            os.unlink(os.path.join(place, name))
        os.rmdir(place)


def _visit(rng: random.Random, port: int, behind: list[socket.socket]) -> tuple[int, int]:
    """Come and go for a while; return how many have come, and how many of these were handed over and taken."""
    ends: list[socket.socket] = []
    come = taken = 0
    for _ in range(STEPS):
        for listener in select.select(behind, [], [], 0)[0]:
            if listener is behind[0]:
                inner, _ = listener.accept()
            elif rng.random() < 0.1:  # the others are in no hurry: now and then there is no room
                said, descriptors, _, _ = socket.recv_fds(listener, 100, 1)
                assert said[:6] == b"zray/1"
                inner = socket.socket(fileno=descriptors[0])
                taken += 1
            else:
                continue
            inner.setblocking(False)
            ends.append(inner)
        what = rng.random()
        if what < 0.15 or not ends:
            outer = socket.create_connection(("127.0.0.1", port), timeout=20)
            outer.setblocking(False)
            ends.append(outer)
            come += 1
            preface = b"zray/1" + rng.choice([0, 40, 40, 40, 41, 10280, 0xFFFF]).to_bytes(2, "little") + b"\0\0"
            said = rng.choice(
                [preface, preface + rng.randbytes(100), preface[: rng.randrange(10)], rng.randbytes(30), bytes(10)]
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
    return come, taken


def _try(step: Callable[[], object]) -> None:
    """Blocking and broken connections are what this is about."""
    try:
        step()
    except OSError:
        pass
