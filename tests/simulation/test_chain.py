"""The replicated store in worlds of kills, pauses, partitions and bad networks: right answers, nothing lost, rest at the end."""

from __future__ import annotations

import pytest

from perf.history import PUT, READ, SWAP, Operation, check
from tests.simulation.chain_world import World

SHORT = 24
LONG = 2400


@pytest.mark.parametrize("seed", range(SHORT))
def test_a_world_is_right_at_every_step(seed: int) -> None:
    World(seed).live()


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 1000 + LONG, 100))
def test_many_worlds_are_right_at_every_step(first: int) -> None:
    for seed in range(first, first + 100):
        World(seed).live()


def test_the_worlds_are_bad_enough_to_mean_something() -> None:
    worlds = [World(seed) for seed in range(8)]
    for world in worlds:
        world.live()
    assert sum(world.kills for world in worlds) > 40
    assert sum(world.partitions for world in worlds) > 20
    assert sum(world.pauses for world in worlds) > 5
    assert sum(max(world.configurations) for world in worlds) > 80
    assert sum(len(world.history) for world in worlds) > 500


def test_the_same_seed_gives_the_same_world() -> None:
    def story(seed: int) -> list[str]:
        world = World(seed)
        world.live(2.0)
        return [str(operation) for operation in world.operations]

    assert story(5) == story(5) != story(6)


# -- the checker of histories ------------------------------------------------------------------------------------------


def write(value: str, version: int, began: float, ended: float, *, expected: int = -1) -> Operation:
    kind = PUT if expected < 0 else SWAP
    return Operation(0, kind, b"k", value.encode(), expected, began, ended, version, True)


def read(value: str, version: int, began: float, ended: float) -> Operation:
    return Operation(1, READ, b"k", value.encode(), -1, began, ended, version)


def test_a_right_history_passes() -> None:
    check(
        [
            write("a", 1, 0, 1),
            read("a", 1, 0.5, 2),
            write("b", 3, 1.5, 3, expected=1),
            read("b", 3, 2, 3),
            Operation(2, SWAP, b"k", b"c", 1, 4, 5, 3),
            Operation(2, PUT, b"k", b"d", -1, 4),
            read("d", 9, 6, 7),
        ]
    )


@pytest.mark.parametrize(
    ("operations", "what"),
    [
        ([write("a", 1, 0, 1), read("", 0, 2, 3)], "is older than"),
        ([write("a", 1, 0, 1), write("b", 2, 2, 3), read("a", 1, 4, 5)], "is older than"),
        ([write("a", 2, 0, 1), write("b", 1, 2, 3)], "went before"),
        ([write("a", 1, 0, 1), write("b", 1, 0, 1)], "one version for two writes"),
        ([write("a", 1, 0, 1), read("x", 1, 0, 1)], "does not show what"),
        ([write("a", 1, 0, 3), read("a", 2, 1, 2)], "lost or made twice"),
        ([Operation(0, PUT, b"k", b"a", -1, 0), read("a", 1, 1, 2), read("a", 2, 3, 4)], "made twice"),
        ([write("a", 1, 0, 9), write("b", 2, 0, 9), write("c", 3, 0, 9, expected=1)], "expected 1, but"),
    ],
)
def test_wrong_histories_are_found(operations: list[Operation], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check(operations)
