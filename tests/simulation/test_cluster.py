"""Brokers, stores and links of whole clusters in seeded simulations. A failure names its seed: `--first-seed SEED --seeds 1` replays it."""

from __future__ import annotations

import pytest

from tests.simulation.cluster_machine import Doors, Machine
from tests.simulation.cluster_scenario import BEARABLE, Scenario, Trouble

CI_SEEDS = 45
REGRESSION = {
    5512: "silences that overlap",
    10139: "silences that overlap",
    16496: "silences that overlap",
    14549: "programs end long after all disturbances, a moment after a node that died long ago was declared dead",
    33363: "a copy of a task lies here while its value is on another node",
    35276: "calls are packed when an actor leaves for the same node",
    38661: "what was lost is made again, and its maker dies once too often: others wait for it as for what is lost",
    37544: "an actor of a job comes to a node that knows already that its driver's node is dead",
    37344: "a task that lies behind a waiting worker is sent to another node, and the worker goes on",
    35729: "calls of a job come to a node after the end of the job",
}
"""Seeds that failed, and what is rare in them."""
SOAK_SEEDS = 20_000
SOAK_BLOCK = 2_000


def run_seed(seed: int) -> Scenario:
    """Run a scenario to its end."""
    scenario = Scenario(seed)
    scenario.run()
    return scenario


@pytest.mark.slow
def test_random_clusters(pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("--seeds", default=None)
    first = int(pytestconfig.getoption("--first-seed", default=0))
    if wanted is not None:
        for seed in range(first, first + int(wanted)):
            run_seed(seed)
        return
    ran = [run_seed(seed) for seed in range(CI_SEEDS)]
    # Calls end well and badly, frames are lost, nodes die: else all this would prove nothing.
    assert sum(scenario.checker.results for scenario in ran) > 500
    assert sum(scenario.site.network.frames for scenario in ran) > 5000
    assert sum(scenario.site.network.lost for scenario in ran) > 100
    assert sum(bool(machine.verdict) for scenario in ran for machine in scenario.site.machines) > 5
    failures = {kind for scenario in ran for kind in scenario.checker.failures}
    assert failures >= {"user", "WorkerCrashedError", "TaskCancelledError", "ActorDiedError"}


@pytest.mark.parametrize("seed", REGRESSION)
def test_clusters_in_rare_trouble(seed: int) -> None:
    run_seed(seed)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("block", range(SOAK_SEEDS // SOAK_BLOCK))
def test_many_random_clusters(block: int) -> None:
    for seed in range(CI_SEEDS + block * SOAK_BLOCK, CI_SEEDS + (block + 1) * SOAK_BLOCK):
        run_seed(seed)


def test_the_same_seed_gives_the_same_story() -> None:
    stories = []
    for _ in range(2):
        scenario = run_seed(17)
        world = scenario.world
        stories.append((world.steps, world.now, scenario.site.network.frames, list(world.log)))
    assert stories[0] == stories[1]


@pytest.mark.parametrize("kinds", [("partition", "pause"), ("pause", "partition")])
@pytest.mark.parametrize("gentle", [True, False])
def test_silences_that_follow_upon_each_other_end_a_node_only_in_violent_scenarios(
    kinds: tuple[str, str], gentle: bool
) -> None:
    scenario = Scenario(1)
    scenario.gentle = gentle
    site, world = scenario.site, scenario.world
    with Doors(site):
        Machine(site, {"CPU": 1.0}).start("")
        machine = scenario.join()
        trouble = Trouble(scenario)
        bearable = BEARABLE * trouble.timeout
        for number, kind in enumerate(kinds):
            world.at(0.95 * number * bearable, getattr(trouble, kind), bearable)
        end = world.now + 3 * trouble.timeout
        while world.heap and world.heap[0][0] <= end:
            world.step()
    assert machine.alive == gentle, machine.verdict
    machine.store.closed = True
