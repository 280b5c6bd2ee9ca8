"""Each planted fault of the scheduler machine is found by the simulation."""

from __future__ import annotations

import pytest

from tests.simulation.faults import FAULTS
from tests.simulation.scenario import Scenario

SEEDS = 600
"""At most so many seeds may pass before a fault is found."""


def first_failure(seeds: int) -> int | None:
    """Return the first seed that fails, if one does."""
    for seed in range(seeds):
        try:
            Scenario(seed).run()
        except Exception:
            return seed
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert first_failure(SEEDS) is not None, f"{name}: {SEEDS} seeds did not find it"


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 30
