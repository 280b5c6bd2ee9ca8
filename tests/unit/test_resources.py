"""Resources: exact arithmetic in ten-thousandths, and a canonical form in bytes."""

from __future__ import annotations

import random

import pytest

from zray import resources
from zray.resources import UNIT, fits, fixed, give_back, pack, parse, take, unpack


@pytest.mark.parametrize(
    ("amount", "units"),
    [
        (0, 0),
        (1, 10_000),
        (0.1, 1000),
        (0.0001, 1),
        (0.0003, 3),
        (0.29, 2900),
        (1 / 3, 3333),
        (2.5, 25_000),
        (0.0, 0),
        (2**40, 2**40 * 10_000),
        (1.5e9, 15 * 10**12),
    ],
)
def test_fixed(amount: float, units: int) -> None:
    assert fixed(amount) == units


def test_every_step_of_a_tenth_of_a_thousandth_is_exact() -> None:
    assert all(fixed(n / UNIT) == n for n in range(30_000))


def test_parts_of_one_fit_into_one() -> None:
    for n in range(1, 200):
        assert n * fixed(1 / n) <= UNIT


@pytest.mark.parametrize(
    ("amount", "name", "error", "text"),
    [
        (-1, "num_cpus", ValueError, "quantity of resource num_cpus cannot be negative"),
        (-0.5, "x", ValueError, "cannot be negative"),
        (float("nan"), "x", ValueError, "finite"),
        (float("inf"), "x", ValueError, "finite"),
        (
            0.0000001,
            "num_gpus",
            ValueError,
            "The precision of the fractional quantity of resource num_gpus cannot go beyond 0.0001",
        ),
        (1.5, "num_gpus", ValueError, "whole number"),
        (2.0001, "GPU", ValueError, "whole number"),
        ("1", "x", TypeError, "must be a number"),
        (None, "x", TypeError, "must be a number"),
        (True, "x", TypeError, "must be a number"),
    ],
)
def test_bad_amounts(amount: float, name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fixed(amount, name)


def test_gpus_are_whole_or_a_fraction_of_one() -> None:
    assert fixed(0.25, "GPU") == 2500
    assert fixed(2.0, "GPU") == 20_000
    assert fixed(1.5, "CPU") == 15_000


def test_parse() -> None:
    assert parse({"b": 1, "CPU": 0.5, "a": 0}) == {"CPU": 5000, "b": 10_000}
    assert list(parse({"b": 1, "CPU": 1, "a": 1})) == ["CPU", "a", "b"]
    with pytest.raises(TypeError, match="name of a resource"):
        parse({3: 1})  # type: ignore[dict-item]
    for name in ("", "x" * 256):
        with pytest.raises(ValueError, match="1 to 255 bytes"):
            parse({name: 1})
    assert resources.as_floats({"CPU": 5000}) == {"CPU": 0.5}
    assert resources.shown({"b": 10_000, "CPU": 5000}) == "{CPU: 0.5, b: 1}"


def test_take_and_give_back() -> None:
    total = parse({"CPU": 2, "GPU": 1})
    available = dict(total)
    one = parse({"CPU": 1})
    assert fits(one, available)
    take(one, available)
    take(one, available)
    assert available["CPU"] == 0
    assert not fits(one, available)
    take(one, available)  # a blocked task goes on
    assert available["CPU"] == -UNIT
    for _ in range(3):
        give_back(one, available, total)
    assert available == total
    with pytest.raises(ValueError, match="more CPU given back"):
        give_back(parse({"CPU": 1, "GPU": 1}), available, total)
    assert available == total
    assert fits({}, {})
    assert not fits(parse({"custom": 1}), available)
    with pytest.raises(ValueError, match="custom"):
        give_back(parse({"custom": 1}), available, total)


def test_a_random_walk_ends_where_it_began() -> None:
    rng = random.Random(3)
    total = parse({"CPU": 4, "GPU": 2, "x": 1})
    available = dict(total)
    held = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            give_back(held.pop(rng.randrange(len(held))), available, total)
        else:
            held.append(
                parse({"CPU": rng.choice([0.1, 1 / 3, 1]), "GPU": rng.choice([0, 0.5, 2]), "x": rng.random() + 0.01})
            )
            take(held[-1], available)
        for name in total:
            assert available[name] + sum(one.get(name, 0) for one in held) == total[name]
    for one in held:
        give_back(one, available, total)
    assert available == total


def test_pack_is_canonical_and_short() -> None:
    assert pack({}) == b""
    assert pack({"CPU": 10_000}) == b"\x01\x90\x4e"
    assert pack({"b": 1, "a": 2}) == pack({"a": 2, "b": 1}) == b"\0\x01a\x02\0\x01b\x01"
    assert pack({"CPU": 10_000, "GPU": 0}) == pack({"CPU": 10_000})
    assert len(pack(parse({"CPU": 1, "GPU": 1, "memory": 2**34}))) <= 15
    with pytest.raises(ValueError, match="negative"):
        pack({"CPU": -1})


def test_pack_round_trip() -> None:
    rng = random.Random(5)
    for _ in range(500):
        names = rng.sample(["CPU", "GPU", "memory", "object_store_memory", "a", "naïve", "node:1.2.3.4", "x" * 255], 4)
        vector = {name: rng.choice([1, 127, 128, UNIT, 2**60, rng.getrandbits(40) + 1]) for name in names}
        assert unpack(pack(vector)) == vector


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x01\x80",
        b"\x09\x01",
        b"\0",
        b"\0\x05ab",
        b"\0\x01\xff\x01",
        b"\x02\x01\x01\x01",  # not in order
        b"\x01\x00",  # a zero
        b"\x01\x81\x00",  # longer than need be
        b"\0\x03CPU\x01",  # a well-known name spelled out
        b"\x01\x01\x01\x01",  # twice
        b"\0\0\x01",  # no name
    ],
)
def test_unpack_refuses_what_pack_never_makes(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(data)
