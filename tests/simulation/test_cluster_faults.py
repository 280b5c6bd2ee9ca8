"""Each planted fault of the protocols between nodes is found by the simulation of clusters."""

from __future__ import annotations

from typing import Final

import pytest

from tests.simulation.cluster_faults import FAULTS
from tests.simulation.cluster_scenario import Scenario

QUICK: Final = (
    "a_frame_that_came_before_is_handed_on_again",
    "frames_of_a_head_without_a_name_are_counted",
    "a_node_that_was_declared_dead_is_not_told",
    "nodes_of_other_versions_are_admitted",
    "a_silent_node_stays_silent",
    "nobody_is_told_of_newcomers",
    "what_is_lent_is_not_kept",
    "what_was_here_already_is_not_given_back",
    "borrowed_objects_are_kept_for_ever",
    "what_a_value_refers_to_is_not_lent",
    "tasks_that_a_dead_node_had_are_forgotten",
    "jobs_of_dead_nodes_go_on",
    "nobody_is_told_that_an_actor_is_gone",
    "addresses_of_actors_of_other_nodes_stay",
)
"""Found within so few seeds that every run of the tests can afford to look."""
QUICK_SEEDS: Final = 60
SEEDS: Final = 3000
"""At most so many seeds may pass before a fault is found."""


def is_found(seeds: int) -> bool:
    """Whether one of the first seeds fails."""
    for seed in range(seeds):
        try:
            Scenario(seed).run()
        except (AttributeError, NameError, TypeError):
            raise  # a fault that does not fit the program any more
        except Exception:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_planted_fault_is_found_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert is_found(QUICK_SEEDS), f"{name}: {QUICK_SEEDS} seeds did not find it"


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in QUICK])
def test_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert is_found(SEEDS), f"{name}: {SEEDS} seeds did not find it"


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 35
    assert set(QUICK) <= set(FAULTS)
