"""Options of the simulation: how many seeds, and where to begin."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seeds 100000` is a soak; `--first-seed N --seeds 1` replays one."""
    parser.addoption("--seeds", type=int, default=None, help="simulate this many seeds")
    parser.addoption("--first-seed", type=int, default=0, help="first seed to simulate")
