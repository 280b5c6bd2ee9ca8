"""A small program for an installed wheel: a task, a nested task, an actor, an array and an error, then a clean end.

Run by `.ci/run` from a directory without the sources, in an environment with zray's required packages alone.
"""

from __future__ import annotations

import multiprocessing
import sys

import zray


@zray.remote
def square(x: int) -> int:
    """Return x * x."""
    return x * x


@zray.remote
def sum_of_squares(n: int) -> int:
    """Return 0 + 1 + 4 + ... by starting a task for each term."""
    return sum(zray.get([square.remote(i) for i in range(n)]))


@zray.remote
def fail() -> None:
    """Raise."""
    raise KeyError("expected")


@zray.remote
class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, by: int) -> int:
        """Add and return the count."""
        self.count += by
        return self.count


def main() -> None:
    """Check each result; any difference ends the program with an error."""
    for unwanted in ("numpy", "rich", "click"):
        if unwanted in sys.modules:
            raise SystemExit(f"`import zray` imported {unwanted}")
    with zray.init():
        assert zray.get(sum_of_squares.remote(10)) == 285
        counter = Counter.remote()
        assert zray.get([counter.add.remote(i) for i in range(1, 5)]) == [1, 3, 6, 10]
        import numpy as np

        array = np.arange(1_000_000)
        assert (zray.get(zray.put(array)) == array).all()
        try:
            zray.get(fail.remote())
        except KeyError:
            pass
        else:
            raise SystemExit("the task's exception did not arrive")
    assert not zray.is_initialized()
    assert not multiprocessing.active_children()
    print(f"zray from {zray.__file__}: the smoke program passed")


if __name__ == "__main__":
    main()
