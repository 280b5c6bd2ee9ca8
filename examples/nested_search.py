"""A nested search: tasks that start tasks that call an actor.

Run it with `python examples/nested_search.py`. Each of four experiments is a task that looks for a minimum in its
quarter of the plane. It starts tasks that sample around the best point so far, and those report to one scoreboard, an
actor. The function is Himmelblau's (D. M. Himmelblau, Applied Nonlinear Programming, 1972), which has one minimum of
value zero in each quarter, so the answer can be checked.
"""

from __future__ import annotations

import numpy as np

import zray

MINIMA = {  # the four zeros, to six decimals
    (1, 1): (3.0, 2.0),
    (-1, 1): (-2.805118, 3.131313),
    (-1, -1): (-3.779310, -3.283186),
    (1, -1): (3.584428, -1.848127),
}
ROUNDS = 12
SAMPLERS = 4
SAMPLES = 200

Point = tuple[float, float]


def himmelblau(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the function's value at each point."""
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


@zray.remote
class Scoreboard:
    """The best point of each experiment, and how much was tried."""

    def __init__(self) -> None:
        self.best: dict[Point, tuple[float, Point]] = {}
        self.reports = 0

    def report(self, quarter: Point, value: float, point: Point) -> None:
        """Keep `point` if it is the best of its quarter."""
        self.reports += 1
        if quarter not in self.best or value < self.best[quarter][0]:
            self.best[quarter] = (value, point)

    def leader(self, quarter: Point) -> Point:
        """Return the best point of a quarter."""
        return self.best[quarter][1]

    def results(self) -> tuple[dict[Point, tuple[float, Point]], int]:
        """Return the best of every quarter and the number of reports."""
        return self.best, self.reports


@zray.remote
def sample(scoreboard: object, quarter: Point, centre: Point, radius: float, seed: list[int]) -> None:
    """Try random points around `centre` inside `quarter` and report the best of them."""
    luck = np.random.default_rng(seed)
    x, y = (np.clip(c + luck.uniform(-radius, radius, SAMPLES), *sorted((0, 5 * q))) for c, q in zip(centre, quarter))
    values = himmelblau(x, y)
    best = int(values.argmin())
    zray.get(scoreboard.report.remote(quarter, float(values[best]), (float(x[best]), float(y[best]))))


@zray.remote
def experiment(scoreboard: object, quarter: Point) -> Point:
    """Search one quarter in rounds of parallel samples, each round in half the radius of the one before."""
    centre, radius = (2.5 * quarter[0], 2.5 * quarter[1]), 2.5
    for number in range(ROUNDS):
        seeds = [[number, sampler] for sampler in range(SAMPLERS)]
        zray.get([sample.remote(scoreboard, quarter, centre, radius, seed) for seed in seeds])
        centre = zray.get(scoreboard.leader.remote(quarter))
        radius /= 2
    return centre


def main() -> None:
    """Run the four experiments and compare with the known minima."""
    with zray.init():
        scoreboard = Scoreboard.remote()
        quarters = list(MINIMA)
        found = zray.get([experiment.remote(scoreboard, quarter) for quarter in quarters])
        _, reports = zray.get(scoreboard.results.remote())
    for quarter, point in zip(quarters, found):
        if not np.allclose(point, MINIMA[quarter], atol=0.01):
            raise SystemExit(f"quarter {quarter}: found {point}, the minimum is at {MINIMA[quarter]}")
    if reports != len(quarters) * ROUNDS * SAMPLERS:
        raise SystemExit(f"{reports} reports reached the scoreboard")
    print(f"four experiments, {reports} nested tasks: all four minima found")


if __name__ == "__main__":
    main()
