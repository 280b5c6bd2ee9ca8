"""Values that are lost while they are on their way to the node that wants them, in small simulated clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.simulation.cluster_machine import Doors, Machine
from tests.simulation.cluster_processes import Driver, Plan, value_of
from tests.simulation.cluster_scenario import Play, Scenario, shape
from tests.simulation.world import Get
from zray.ids import task_id
from zray.task import TASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.simulation.world import Program

WHEEL: Final = shape("wheel", TASK, {"wheels": 1}, 1)
BUSY: Final = Plan(seconds=0.5, shape=WHEEL.key)
LARGE: Final = Plan(salt=7, size=3000, shape=WHEEL.key)
"""Its value stays where it was made until somebody wants it."""
SOON: Final = 5.0
"""Simulated seconds in which all that is to happen has happened."""


class Run:
    """Two nodes that run one task at a time, and a driver on the first."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.site, self.world = scenario.site, scenario.world
        self.site.shapes = {WHEEL.key: WHEEL}
        self.head = Machine(self.site, {"wheels": 1.0})
        self.head.start("")
        self.other = scenario.join({"wheels": 1.0})
        self.result = b""
        self.value = b""

    def play(self) -> None:
        """The driver wants the value of a task that is run by the other node, as its own is busy."""
        driver = Driver(self.head, task_id(bytes(16), 1))

        def program() -> Program:
            yield from Play(self.scenario, driver).hello()
            plans = [BUSY, LARGE]
            results = driver.submit(driver.root, driver.next_child(len(plans)), plans, (), driver.root)
            self.result = results[-1]
            yield Get([self.result])
            self.value = driver.store.entries[self.result].data

        driver.run(program())

    def until(self, done: Callable[[], bool]) -> None:
        end = self.world.now + SOON
        while not done():
            assert self.world.heap, "nothing happens any more"
            assert self.world.heap[0][0] <= end, self.scenario.checker.waiting()
            self.world.step()

    def is_on_its_way(self) -> bool:
        return self.head.transfer.pulling(self.result)


@pytest.fixture
def run() -> Iterator[Run]:
    scenario = Scenario(1)
    with Doors(scenario.site):
        yield Run(scenario)
    for machine in scenario.site.machines:
        machine.store.closed = True


def test_what_was_on_its_way_from_a_dead_node_is_made_again_here(run: Run) -> None:
    run.play()
    run.until(run.is_on_its_way)
    run.other.die("it was killed")
    run.until(lambda: bool(run.value))
    assert run.value == value_of(LARGE, [])
    assert not run.is_on_its_way()
