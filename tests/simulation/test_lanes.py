"""Calls over lanes that break, in seeded simulations: each runs once and in order, and its result comes. Planted faults are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.simulation.lane_world import CALLS, World
from zray import lane_ends, lanes
from zray.call_order import CallOrder

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = 150
FAULT_SEEDS = 400


def run_seed(seed: int, **faults: Any) -> World:
    world = World(seed, **faults)
    world.live()
    try:
        world.check()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from None
    return world


def test_calls_run_once_and_in_order() -> None:
    ran = [run_seed(seed) for seed in range(SEEDS)]
    # Many calls go over lanes, and many of these have to be handed over: else all this would prove nothing.
    assert sum(world.over_lanes for world in ran) > 0.3 * SEEDS * CALLS
    assert sum(next(world.lanes) for world in ran) > 1.3 * SEEDS, "lanes are given up, and others begun"


@pytest.mark.soak
def test_many_seeds() -> None:
    for seed in range(SEEDS, 50_000):
        run_seed(seed)


def test_the_same_seed_gives_the_same_story() -> None:
    assert run_seed(3).now == run_seed(3).now != run_seed(4).now


def _no_hand_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lanes.Lane, "overdue", lambda _self, _now: [])


def _copies_run_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CallOrder, "is_new", lambda _self, _caller, _sequence: True)
    patch.setattr(CallOrder, "arrive", lambda _self, _caller, call: [call])


def _no_order(patch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[tuple[int, int]]] = {}

    def arrive(order: CallOrder, caller: int, call: Any) -> list[Any]:
        known = seen.setdefault(id(order), set())
        if call.sequence and (caller, call.sequence) in known:
            return []
        known.add((caller, call.sequence))
        return [call]

    patch.setattr(CallOrder, "arrive", arrive)


def _over_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    over = lane_ends.LaneEnds.over

    def forget(ends: lane_ends.LaneEnds, lane: int) -> None:
        over(ends, lane)
        ends._over.clear()

    patch.setattr(lane_ends.LaneEnds, "over", forget)


def _settled_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lanes.Lane, "take_settled", lambda lane: list(lane._sent))


@pytest.mark.parametrize(
    "plant",
    [_no_hand_over, _copies_run_again, _no_order, _over_is_forgotten, _settled_too_early],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_planted_faults_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(FAULT_SEEDS):
            run_seed(seed)


def test_a_lane_that_is_begun_too_early_is_found() -> None:
    with pytest.raises(AssertionError, match="they ran as"):
        for seed in range(FAULT_SEEDS):
            run_seed(seed, eager=True)
