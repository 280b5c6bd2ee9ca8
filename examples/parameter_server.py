"""A parameter server: an actor that holds parameters, and four endless tasks that fetch and update them.

Run it with `python examples/parameter_server.py`. The workers fit y = curve * x^2 + slope * x + offset by stochastic
gradient descent, each on data of its own, without waiting for one another. They never return: there are four of them on
two CPUs, which works because a task lends its CPU while it waits in `zray.get`, and the driver ends them when the
parameters are right.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

import zray

Array = NDArray[np.float64]

KEYS = ["curve", "slope", "offset"]
TRUTH = np.array([0.5, -2.0, 3.0])
WORKERS = 4
STEP = 0.02
TOLERANCE = 1e-3
DEADLINE_S = 90.0


@zray.remote
class ParameterServer:
    """Parameters by name."""

    def __init__(self, keys: list[str], values: list[Array]) -> None:
        # Arguments are read-only views of shared memory and these values will change, so copy them.
        self.parameters = {key: value.copy() for key, value in zip(keys, values)}
        self.updates = [0] * WORKERS

    def get(self, keys: list[str]) -> list[Array]:
        """Return the current values of `keys`."""
        return [self.parameters[key] for key in keys]

    def update(self, worker: int, keys: list[str], values: list[Array]) -> None:
        """Add `values` to the parameters named `keys`."""
        for key, value in zip(keys, values):
            self.parameters[key] += value
        self.updates[worker] += 1

    def count_updates(self) -> list[int]:
        """Return how many updates each worker has made."""
        return self.updates


@zray.remote
def worker_task(parameter_server: object, worker: int) -> None:
    """Fetch parameters, compute a step on fresh data, send it, for ever."""
    luck = np.random.default_rng(worker)
    while True:
        values = np.concatenate(zray.get(parameter_server.get.remote(KEYS)))
        inputs = np.vander(luck.uniform(-2.0, 2.0, 256), 3)
        gradient = inputs.T @ (inputs @ values - inputs @ TRUTH) / len(inputs)
        updates = np.split(-STEP * gradient, len(KEYS))
        # Waiting for the update bounds the calls in flight, so that no worker runs ahead of the server.
        zray.get(parameter_server.update.remote(worker, KEYS, updates))


def wait_until_fitted(parameter_server: object) -> Array:
    """Return the parameters once they are right and every worker has had a share in them."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        values = np.concatenate(zray.get(parameter_server.get.remote(KEYS)))
        updates = zray.get(parameter_server.count_updates.remote())
        if np.abs(values - TRUTH).max() < TOLERANCE and min(updates) > 0:
            return values
        time.sleep(0.01)  # leave the CPUs to the workers
    raise SystemExit(f"not fitted in {DEADLINE_S:.0f} s: parameters {values}, updates of the workers {updates}")


def main() -> None:
    """Fit, end the workers, and check that they have ended."""
    with zray.init(num_cpus=2):
        parameter_server = ParameterServer.remote(KEYS, [np.zeros(1) for _ in KEYS])
        workers = [worker_task.remote(parameter_server, worker) for worker in range(WORKERS)]
        values = wait_until_fitted(parameter_server)
        for worker in workers:
            zray.cancel(worker, force=True)
        for worker in workers:
            try:
                zray.get(worker, timeout=30)
            except (zray.exceptions.TaskCancelledError, zray.exceptions.WorkerCrashedError):
                continue
            raise SystemExit("an endless task returned")
    fitted = ", ".join(f"{key} = {value:.2f}" for key, value in zip(KEYS, values))
    print(f"four endless workers on two CPUs fitted {fitted}, and were ended")


if __name__ == "__main__":
    main()
