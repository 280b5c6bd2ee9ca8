"""The scheduler machine in seeded simulations of whole nodes. A failure names its seed: `--first-seed SEED --seeds 1`
replays it."""

from __future__ import annotations

import pytest

from tests.simulation.scenario import Scenario

CI_SEEDS = 300
BLOCK = 25
SOAK_SEEDS = 100_000
SOAK_BLOCK = 10_000


def run_seeds(first: int, count: int) -> None:
    """Run these seeds; the first that fails is reported."""
    for seed in range(first, first + count):
        Scenario(seed).run()


@pytest.mark.slow
@pytest.mark.parametrize("block", range(CI_SEEDS // BLOCK))
def test_random_nodes(block: int, pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("--seeds", default=None)
    first = int(pytestconfig.getoption("--first-seed", default=0))
    if wanted is None:
        run_seeds(first + block * BLOCK, BLOCK)
    elif block == 0:
        run_seeds(first, int(wanted))
    else:
        pytest.skip("all seeds asked for run in the first block")


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("block", range(SOAK_SEEDS // SOAK_BLOCK))
def test_many_random_nodes(block: int) -> None:
    run_seeds(CI_SEEDS + block * SOAK_BLOCK, SOAK_BLOCK)


def test_the_same_seed_gives_the_same_story() -> None:
    stories = []
    for _ in range(2):
        scenario = Scenario(17)
        scenario.run()
        stories.append((scenario.world.steps, scenario.world.now, list(scenario.world.log)))
    assert stories[0] == stories[1]
