"""Tasks that start tasks: waits deeper than CPUs, endless workers, actors inside, and no deadlock."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import wait_for, worker_pids

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally

WARM = {"num_cpus": 2}
pytestmark = pytest.mark.usefixtures("warm")


def test_waiting_deeper_than_there_are_cpus() -> None:
    @zray.remote
    def descend(depth: int) -> int:
        return 0 if depth == 0 else 1 + int(zray.get(descend.remote(depth - 1)))

    assert zray.get(descend.remote(12), timeout=60) == 12


def test_a_tree_of_tasks() -> None:
    @zray.remote
    def count(depth: int) -> int:
        if depth == 0:
            return 1
        return 1 + sum(zray.get([count.remote(depth - 1) for _ in range(2)]))

    assert zray.get(count.remote(5), timeout=90) == 63


def test_fibonacci() -> None:
    @zray.remote
    def fibonacci(n: int) -> int:
        if n < 2:
            return n
        return sum(zray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert zray.get(fibonacci.remote(9), timeout=90) == 34


def test_wait_inside_tasks_lends_the_cpu() -> None:
    @zray.remote
    def parent() -> int:
        children = [child.remote(i) for i in range(4)]
        total = 0
        while children:
            (ready,), children = zray.wait(children)
            total += zray.get(ready)
        return total

    @zray.remote
    def child(i: int) -> int:
        return i + zray.get(zray.remote(lambda: 100).remote())

    assert zray.get([parent.remote() for _ in range(4)], timeout=60) == [406] * 4


def test_many_children_of_many_parents() -> None:
    @zray.remote
    def parent(n: int) -> int:
        child = zray.remote(lambda x: x + n)
        return sum(zray.get([child.remote(i) for i in range(50)]))

    assert zray.get([parent.remote(n) for n in range(20)], timeout=60) == [1225 + 50 * n for n in range(20)]


def test_four_endless_workers_and_a_parameter_server_on_two_cpus(gate: Callable[[str], Gate]) -> None:
    class ParameterServer:
        def __init__(self, size: int) -> None:
            self.weights = np.zeros(size)
            self.updates: dict[int, int] = {}

        def get_weights(self) -> Any:
            return self.weights

        def update(self, worker: int, gradient: Any) -> None:
            self.weights = self.weights - 0.1 * gradient
            self.updates[worker] = self.updates.get(worker, 0) + 1

        def progress(self) -> dict[int, int]:
            return self.updates

    over = gate("over")

    @zray.remote
    def worker(number: int, server: Any, target: Any) -> int:
        rounds = 0
        while not over.is_open:
            weights = zray.get(server.get_weights.remote())
            zray.get(server.update.remote(number, weights - target))
            rounds += 1
        return rounds

    server = zray.remote(ParameterServer).remote(1000)
    target = np.arange(1000.0)
    workers = [worker.remote(n, server, target) for n in range(4)]

    def everybody_worked() -> bool:
        updates = zray.get(server.progress.remote(), timeout=60)
        return len(updates) == 4 and min(updates.values()) >= 30

    wait_for(everybody_worked, 60, "all four make progress")
    # Another task gets a turn, too, although four run that never end.
    assert zray.get(zray.remote(lambda: "turn").remote(), timeout=60) == "turn"
    over.open()
    assert min(zray.get(workers, timeout=60)) >= 30
    assert np.allclose(zray.get(server.get_weights.remote()), target, atol=1e-2)


def test_tasks_that_wait_for_one_another_through_an_actor() -> None:
    class Board:
        def __init__(self) -> None:
            self.notes: dict[str, Any] = {}

        def write(self, key: str, value: Any) -> None:
            self.notes[key] = value

        def read(self, key: str) -> Any:
            return self.notes.get(key)

    board = zray.remote(num_cpus=0)(Board).remote()

    @zray.remote
    def partner(mine: str, other: str) -> str:
        zray.get(board.write.remote(mine, f"from {mine}"))
        while (found := zray.get(board.read.remote(other))) is None:
            pass
        return str(found)

    names = ["a", "b", "c", "d"]
    refs = [partner.remote(name, names[(i + 1) % 4]) for i, name in enumerate(names)]
    assert zray.get(refs, timeout=60) == ["from b", "from c", "from d", "from a"]


def test_actors_made_in_tasks_and_tasks_made_in_actors() -> None:
    class Maker:
        def __init__(self) -> None:
            self.child = zray.remote(lambda x: x * 2)

        def spread(self, n: int) -> int:
            return sum(zray.get([self.child.remote(i) for i in range(n)]))

        def pid(self) -> int:
            return os.getpid()

    maker = zray.remote(Maker)

    @zray.remote
    def use(n: int) -> tuple[int, int]:
        actor = maker.remote()
        return zray.get(actor.spread.remote(n)), zray.get(actor.pid.remote())

    rows = zray.get([use.remote(n) for n in range(6)], timeout=60)
    assert [row[0] for row in rows] == [n * (n - 1) for n in range(6)]
    pids = {row[1] for row in rows}
    assert len(pids) == 6
    wait_for(lambda: not worker_pids() & pids, what="their actors end with them")


def test_blocked_workers_are_no_more_than_needed_afterwards() -> None:
    @zray.remote
    def descend(depth: int) -> int:
        return 0 if depth == 0 else 1 + int(zray.get(descend.remote(depth - 1)))

    zray.get(descend.remote(10), timeout=60)
    assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(100)]) == list(range(100))
    wait_for(lambda: zray.available_resources()["CPU"] == 2)


def test_references_handed_down_and_up(tally: Tally) -> None:
    @zray.remote
    def leaf(x: Any) -> Any:
        tally.add()
        return np.asarray(x) + 1

    @zray.remote
    def branch(box: list[Any], depth: int) -> Any:
        if depth == 0:
            return [leaf.remote(box[0])]
        return [branch.remote([leaf.remote(box[0])], depth - 1)]

    value: Any = branch.remote([zray.put(np.zeros(50_000))], 5)
    while True:
        value = zray.get(value)
        if isinstance(value, np.ndarray):
            break
        value = value[0]
    assert value.sum() == 50_000 * 6
    assert len(tally) == 6


def test_submitting_many_from_within_does_not_block_the_worker() -> None:
    @zray.remote
    def parent() -> int:
        child = zray.remote(lambda x: x)
        refs = [child.remote(i) for i in range(20_000)]
        return sum(zray.get(refs))

    assert zray.get(parent.remote(), timeout=90) == sum(range(20_000))


def test_threads_of_tasks_and_drivers_never_share_ids(warm: None) -> None:
    """A thread that user code started counts to its process, and each process makes ids of its own."""

    @zray.remote
    def same(x: Any) -> Any:
        return x

    @zray.remote
    def threads(which: str) -> list[Any]:
        found: list[Any] = []

        def work() -> None:
            put = [zray.put((which, i)) for i in range(5)]
            made = [same.remote((which, "made", i)) for i in range(5)]
            found.extend(zray.get([*put, *made]))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found

    own = [zray.put(("driver", i)) for i in range(5)]
    own += [same.remote(("driver", "made", i)) for i in range(5)]
    for which, found in zip("abcd", zray.get([threads.remote(which) for which in "abcd"]), strict=True):
        assert found == [(which, i) for i in range(5)] + [(which, "made", i) for i in range(5)]
    assert zray.get(own) == [("driver", i) for i in range(5)] + [("driver", "made", i) for i in range(5)]
