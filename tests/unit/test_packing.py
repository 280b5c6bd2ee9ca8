"""zray.broker.packing: bundles on nodes, against brute force."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from zray.broker.packing import Room, Wanted, pack
from zray.placing import IN, PACK, SPREAD_OUT, STRICT_PACK, STRICT_SPREAD, Requirement

EAST = (Requirement("zone", IN, ("east",)),)


def rooms(*free: int, **labelled: int) -> list[Room]:
    found = [Room(bytes([number]), {"CPU": units}, {}) for number, units in enumerate(free)]
    return found + [Room(zone.encode(), {"CPU": units}, {"zone": zone}) for zone, units in labelled.items()]


def bundles(*units: int, at: tuple[Requirement, ...] = ()) -> list[Wanted]:
    return [Wanted(index, {"CPU": one}, at) for index, one in enumerate(units)]


def is_sound(wanted: list[Wanted], places: list[Room], found: dict[int, bytes]) -> bool:
    """Every bundle has a node that may have it, and no node has more than there is."""
    by_id = {room.id: Room(room.id, room.free, room.labels) for room in places}
    for bundle in wanted:
        room = by_id[found[bundle.index]]
        if not bundle.may_be_at(room):
            return False
        room.take(bundle.amounts)
    return set(found) == {bundle.index for bundle in wanted}


def brute_force(strategy: str, wanted: list[Wanted], places: list[Room]) -> list[int]:
    """For each way that is allowed, how many nodes it uses."""
    ways = []
    for choice in itertools.product(places, repeat=len(wanted)):
        found = {bundle.index: room.id for bundle, room in zip(wanted, choice, strict=True)}
        used = len(set(found.values()))
        if strategy == STRICT_PACK and used > 1:
            continue
        if strategy == STRICT_SPREAD and used < len(wanted):
            continue
        if is_sound(wanted, places, found):
            ways.append(used)
    return ways


def random_case(rng: Random) -> tuple[list[Wanted], list[Room]]:
    names = ["CPU", "GPU", "wheels"][: rng.randint(1, 3)]
    places = []
    for number in range(rng.randint(1, 4)):
        labels = {"zone": rng.choice(["east", "west"])}
        places.append(Room(bytes([number]), {name: rng.randint(0, 4) for name in names}, labels))
    wanted = []
    for index in range(rng.randint(1, 5)):
        amounts = {name: units for name in names if (units := rng.randint(0, 3))} or {"CPU": 1}
        wanted.append(Wanted(index, amounts, EAST if rng.random() < 0.2 else ()))
    return wanted, places


@pytest.mark.parametrize("strategy", [PACK, SPREAD_OUT, STRICT_PACK, STRICT_SPREAD])
def test_as_good_as_brute_force_on_small_cases(strategy: str) -> None:
    rng = Random(f"packing {strategy}")
    solvable = 0
    worse = 0
    for _ in range(400):
        wanted, places = random_case(rng)
        before = [dict(room.free) for room in places]
        found = pack(strategy, wanted, places)
        assert [room.free for room in places] == before, "what is free is only looked at"
        ways = brute_force(strategy, wanted, places)
        if not ways:
            assert found is None
            continue
        solvable += 1
        assert found is not None, f"{[w.amounts for w in wanted]} on {before}"
        assert is_sound(wanted, places, found)
        used = len(set(found.values()))
        if strategy == PACK:
            assert used == min(ways), f"{[w.amounts for w in wanted]} on {before}: {used} nodes"
        elif strategy == SPREAD_OUT:
            worse += used < max(ways)
        elif strategy == STRICT_PACK:
            assert used == 1
        else:
            assert used == len(wanted)
    assert solvable > 60
    assert worse <= solvable * 0.1, f"{worse} of {solvable} could be spread further"


def test_strict_pack_takes_the_node_with_least_left_over() -> None:
    assert pack(STRICT_PACK, bundles(1, 1), rooms(8, 2, 4)) == {0: b"\1", 1: b"\1"}


def test_strict_spread_finds_the_one_matching() -> None:
    """Taking the first node that fits for each bundle would fail here."""
    wanted = [Wanted(0, {"CPU": 1}), Wanted(1, {"CPU": 1}, EAST), Wanted(2, {"CPU": 3})]
    places = rooms(3, 1, east=3)
    assert pack(STRICT_SPREAD, wanted, places) == {0: b"\1", 1: b"east", 2: b"\0"}


def test_what_is_there_already_counts() -> None:
    assert pack(PACK, bundles(1), rooms(4, 2, 4), present=[b"\2"]) == {0: b"\2"}
    assert pack(STRICT_PACK, bundles(1), rooms(4, 0), present=[b"\1"]) is None
    assert pack(STRICT_SPREAD, bundles(1), rooms(4, 2), present=[b"\0"]) == {0: b"\1"}
    assert pack(SPREAD_OUT, bundles(1, 1), rooms(9, 2, 2), present=[b"\0"]) in (
        {0: b"\1", 1: b"\2"},
        {0: b"\2", 1: b"\1"},
    )


def test_large_cases_take_moments() -> None:
    """200 bundles on 100 nodes with room to spare; and on nodes where one bundle too many is asked for."""
    for strategy in (PACK, SPREAD_OUT):
        assert pack(strategy, bundles(*[3] * 200), rooms(*[7] * 100)) is not None
        assert pack(strategy, bundles(*[3] * 201), rooms(*[7] * 100)) is None
    assert pack(STRICT_SPREAD, bundles(*[1] * 100), rooms(*[1] * 100)) is not None
    assert pack(STRICT_SPREAD, bundles(*[1] * 101), rooms(*[1] * 100)) is None
