"""Evolution strategies as a parallel program: simulators become actors, the policy is put once per generation.

The plain program would be a loop over seeds around `Simulator.do_simulation`. What makes it parallel is here:
`zray.remote` turns the class into actors, `zray.put` shares the policy once per generation, calls return references at
once, and `zray.wait` hands a simulator its next seed as soon as one of its episodes ends, so that long episodes never
hold up short ones.

Does not cover the method (`evolution`), the environment (`simulation`) nor what is shown and stored (`report`): it
reports each generation to the caller. Results are sorted by seed before they are used, so a run's numbers do not depend
on the number of simulators or on who finishes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import zray
from zray.demo import evolution
from zray.demo.evolution import Array, Settings
from zray.demo.simulation import Simulator

CALLS_AHEAD = 2
"""Calls that a simulator has at most: the one that runs and the one that follows at once."""

EVALUATION_EPISODES = 100
"""Fresh episodes whose mean decides: the count by which Gymnasium defines its thresholds."""

WORTH_EVALUATING = 0.9
"""Share of the threshold that a generation's mean must reach before an evaluation is spent on its policy. Perturbed
policies do worse than the one in their middle, so waiting for the whole threshold would go on after the task is solved.
"""


@dataclass(frozen=True)
class Generation:
    """What one generation did."""

    generation: int
    """Counted from 1."""
    mean: float
    """Mean return of the generation's episodes."""
    best: float
    """Best return of any episode so far."""
    episodes: int
    """Episodes since the start, evaluations included."""
    tasks: int
    """Actor calls since the start."""
    seconds: float
    """Time since the start."""
    evaluation: float | None
    """Mean return of the updated policy over fresh episodes, where it was evaluated."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    environment: str
    seed: int
    simulators: int
    threshold: float | None
    """Mean return at which the environment counts as solved; None where none is published."""
    evaluation: float
    """Mean return of the final policy over EVALUATION_EPISODES fresh episodes."""
    generations: int
    episodes: int
    tasks: int
    seconds: float
    policy: Array

    @property
    def solved(self) -> bool:
        """Whether the evaluation reached the threshold; False where there is none."""
        return self.threshold is not None and self.evaluation >= self.threshold


def train(
    environment: str,
    *,
    seed: int = 0,
    simulators: int | None = None,
    generations: int = 200,
    settings: Settings | None = None,
    report: Callable[[Generation], None] = lambda generation: None,
) -> Outcome:
    """Learn to act in a Gymnasium environment and evaluate the result on fresh episodes.

    Needs `zray.init()` to have been called. Stops at the first evaluation that reaches the environment's threshold.

    Args:
        environment: name of a registered Gymnasium environment.
        seed: decides every perturbation and every episode.
        simulators: actors to run episodes in; by default one per CPU of the cluster.
        generations: updates to make at most, at least 1.
        settings: constants of the method.
        report: called after each generation, in the calling thread.

    Raises:
        ValueError: `generations` or `simulators` is less than 1.
        gymnasium.error.Error: no environment has this name.
        TypeError: the environment does not suit a linear policy.
    """
    if simulators is None:
        simulators = max(1, int(zray.cluster_resources()["CPU"]))
    if generations < 1 or simulators < 1:
        raise ValueError("at least one generation and one simulator are needed")
    return _Run(environment, seed, simulators, settings or Settings()).go(generations, report)


class _Run:
    """State of one run: the actors, the learner and the counters."""

    def __init__(self, environment: str, seed: int, simulators: int, settings: Settings) -> None:
        self.environment = environment
        self.seed = seed
        self.settings = settings
        self.started = time.perf_counter()
        self.tasks = 0
        self.episodes = 0
        self.best = -np.inf
        self.evaluations = 0
        # One made here tells what the policy must fit, and a bad name or space raises before anything is started.
        spaces, self.threshold = Simulator(environment).describe()
        self.learner = evolution.initial_learner(spaces)
        actor_class = zray.remote(Simulator)
        self.simulators: list[Any] = [actor_class.remote(environment) for _ in range(simulators)]

    def go(self, generations: int, report: Callable[[Generation], None]) -> Outcome:
        for number in range(1, generations + 1):
            returns = self.advance()
            evaluation = None
            good = self.threshold is not None and returns.mean() >= _worthwhile(self.threshold)
            if good or number == generations:
                evaluation = self.evaluate()
            report(self._generation(float(returns.mean()), evaluation))
            if evaluation is not None and self.threshold is not None and evaluation >= self.threshold:
                break
        assert evaluation is not None  # the last generation is always evaluated
        return self._outcome(evaluation)

    def advance(self) -> Array:
        """Run one generation, update the policy, and return the returns: a row per seed, plus and minus."""
        seeds = evolution.generate_seeds(self.seed, evolution.TRAINING, self.learner.generation, self.settings.pairs)
        policy = zray.put(self.learner.policy)
        noise = self.settings.noise
        rewards = self._spread(seeds, lambda simulator, seed: simulator.do_simulation.remote(policy, seed, noise))
        self.episodes += 2 * len(seeds)
        returns = np.array(rewards)
        self.best = max(self.best, float(returns.max()))
        self.learner = evolution.compute_update(self.learner, returns, seeds, self.settings)
        return returns

    def evaluate(self) -> float:
        """Return the mean return of the unperturbed policy over episodes that nothing has seen before."""
        seeds = evolution.generate_seeds(self.seed, evolution.EVALUATION, self.evaluations, EVALUATION_EPISODES)
        policy = zray.put(self.learner.policy)
        returns = self._spread(seeds, lambda simulator, seed: simulator.run_episode.remote(policy, seed))
        self.evaluations += 1
        self.episodes += len(seeds)
        return float(np.mean(returns))

    def _spread(self, seeds: Sequence[int], call: Callable[[Any, int], Any]) -> list[Any]:
        """Make one call per seed, each on the first simulator that has room; return results in the seeds' order."""
        results: list[Any] = [None] * len(seeds)
        running: dict[Any, tuple[int, Any]] = {}
        room = [simulator for _ in range(CALLS_AHEAD) for simulator in self.simulators]
        for index, seed in enumerate(seeds):
            if not room:
                room.append(_collect_one(running, results))
            simulator = room.pop(0)
            running[call(simulator, seed)] = (index, simulator)
        while running:
            _collect_one(running, results)
        self.tasks += len(seeds)
        return results

    def _generation(self, mean: float, evaluation: float | None) -> Generation:
        return Generation(
            generation=self.learner.generation,
            mean=mean,
            best=self.best,
            episodes=self.episodes,
            tasks=self.tasks,
            seconds=time.perf_counter() - self.started,
            evaluation=evaluation,
        )

    def _outcome(self, evaluation: float) -> Outcome:
        return Outcome(
            environment=self.environment,
            seed=self.seed,
            simulators=len(self.simulators),
            threshold=self.threshold,
            evaluation=evaluation,
            generations=self.learner.generation,
            episodes=self.episodes,
            tasks=self.tasks,
            seconds=time.perf_counter() - self.started,
            policy=self.learner.policy,
        )


def _worthwhile(threshold: float) -> float:
    """Return the mean from which an evaluation is worth its episodes; the slack goes down below zero too."""
    return threshold - (1 - WORTH_EVALUATING) * abs(threshold)


def _collect_one(running: dict[Any, tuple[int, Any]], results: list[Any]) -> Any:
    """Wait for any one call, store its result, and return its simulator."""
    (finished,), _ = zray.wait(list(running), num_returns=1)
    index, simulator = running.pop(finished)
    results[index] = zray.get(finished)
    return simulator
