"""A simulator: one Gymnasium environment and the episodes run in it.

An ordinary class that knows nothing of zray: `training` turns it into an actor, a test calls it directly. The
environment is made once and reset for each episode, because making one is far dearer than running one. Does not cover
the policy's arithmetic (`evolution`).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from zray.demo.evolution import Array, Spaces, choose_action, perturbation


class Simulator:
    """Runs episodes of one environment."""

    def __init__(self, environment: str) -> None:
        """Make the environment named `environment`; raises TypeError when its spaces do not suit a linear policy."""
        self._environment = gymnasium.make(environment, disable_env_checker=True)
        self._spaces = _spaces_of(self._environment)

    def describe(self) -> tuple[Spaces, float | None]:
        """Return the environment's spaces and the mean return at which it counts as solved, where one is published."""
        spec = self._environment.spec
        return self._spaces, None if spec is None else spec.reward_threshold

    def do_simulation(self, policy: Array, seed: int, noise: float) -> tuple[float, float]:
        """Return the returns of two episodes: with the perturbation that `seed` names added, and with it subtracted.

        Both episodes begin in the same state, so that their difference tells of the perturbation and not of the start.
        """
        change = noise * perturbation(policy, seed)
        return self.run_episode(policy + change, seed), self.run_episode(policy - change, seed)

    def run_episode(self, policy: Array, seed: int) -> float:
        """Return the sum of rewards of one episode whose start `seed` decides."""
        observation, _ = self._environment.reset(seed=seed)
        total = 0.0
        ended = False
        while not ended:
            action = choose_action(self._spaces, policy, np.ravel(observation))
            observation, reward, terminated, truncated, _ = self._environment.step(action)
            total += float(reward)
            ended = terminated or truncated
        return total


def _spaces_of(environment: gymnasium.Env[Any, Any]) -> Spaces:
    seen, acts = environment.observation_space, environment.action_space
    if not isinstance(seen, gymnasium.spaces.Box):
        raise TypeError(f"a linear policy reads arrays, but observations are {seen}")
    inputs = int(np.prod(seen.shape))
    if isinstance(acts, gymnasium.spaces.Discrete) and acts.start == 0:
        return Spaces(inputs, int(acts.n))
    if isinstance(acts, gymnasium.spaces.Box) and acts.is_bounded() and len(acts.shape) == 1:
        low, high = tuple(map(float, acts.low)), tuple(map(float, acts.high))
        return Spaces(inputs, len(low), low, high)
    raise TypeError(f"a linear policy gives a choice or a bounded vector, but actions are {acts}")
