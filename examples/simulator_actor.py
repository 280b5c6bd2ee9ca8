"""A simulator as an actor: a Gymnasium environment whose state lives in a process of its own.

Run it with `python examples/simulator_actor.py`; it needs gymnasium (`pip install 'zray[demo]'`). Calls return
references at once and run in the order in which they were made, so four steps can be asked for before the first is
done.
"""

from __future__ import annotations

import gymnasium
import numpy as np

import zray

ENVIRONMENT = "CartPole-v1"
SEED = 7
ACTIONS = [0, 1, 1, 0]


class Simulator:
    """One environment, begun from SEED."""

    def __init__(self) -> None:
        self.env = gymnasium.make(ENVIRONMENT)
        self.env.reset(seed=SEED)

    def step(self, action: int) -> tuple[np.ndarray, float]:
        """Take one step; return the observation and the reward."""
        observation, reward, _, _, _ = self.env.step(action)
        return observation, float(reward)


def main() -> None:
    """Step an actor and an ordinary object alike, and compare what they see."""
    with zray.init():
        simulator = zray.remote(Simulator).remote()
        steps = [simulator.step.remote(action) for action in ACTIONS]
        remote = zray.get(steps)
    plain = Simulator()
    local = [plain.step(action) for action in ACTIONS]
    for (seen, reward), (expected, expected_reward) in zip(remote, local):
        if not np.array_equal(seen, expected) or reward != expected_reward:
            raise SystemExit(f"the actor saw {seen}, an ordinary object {expected}")
    print(f"{len(ACTIONS)} steps of {ENVIRONMENT} in an actor: the same observations as in this process")


if __name__ == "__main__":
    main()
