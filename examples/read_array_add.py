"""Two tasks read arrays from files, a third adds what they return: a graph of three tasks, written as three calls.

Run it with `python examples/read_array_add.py`. Calls return references at once; a reference given to another call
makes that call wait for the value, and the array itself goes through shared memory, not through this process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import zray


@zray.remote
def read_array(file: str) -> NDArray[np.float64]:
    """Return the array stored in a .npy file."""
    array: NDArray[np.float64] = np.load(file)
    return array


@zray.remote
def add(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of two arrays."""
    return a + b


def write_arrays(directory: Path, size: int) -> tuple[Path, Path]:
    """Write 0, 1, 2 ... and its reverse to two files, so that every element of their sum is `size - 1`."""
    file1, file2 = directory / "file1.npy", directory / "file2.npy"
    np.save(file1, np.arange(size, dtype=np.float64))
    np.save(file2, np.arange(size, dtype=np.float64)[::-1])
    return file1, file2


def main() -> None:
    """Add two files of a million numbers each."""
    size = 1_000_000
    with tempfile.TemporaryDirectory() as directory, zray.init():
        file1, file2 = write_arrays(Path(directory), size)
        a = read_array.remote(str(file1))
        b = read_array.remote(str(file2))
        total = zray.get(add.remote(a, b))
        if total.shape != (size,) or not (total == size - 1).all():
            raise SystemExit(f"wrong sum: {total}")
        print(f"sum of {size} pairs: every element is {total[0]:.0f}, as it should be")


if __name__ == "__main__":
    main()
