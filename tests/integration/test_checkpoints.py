"""Actors with checkpoints: kills at any moment, of processes and of nodes; what is run again, what is kept, and what is refused."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import query, wait_for
from zray import errors, exceptions
from zray.cluster_utils import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WARM: dict[str, Any] = {"num_cpus": 4}
FOREVER: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}


class Ledger:
    """Remembers what it was called with. `runs`: a file that gets a byte for each execution, whatever becomes of it."""

    def __init__(self, runs: str = "") -> None:
        self.rows: list[Any] = []
        self.runs = runs

    def write(self, *row: Any) -> int:
        if self.runs:
            with open(self.runs, "ab", buffering=0) as file:
                file.write(b".")
        self.rows.append(row)
        return len(self.rows)

    def read(self) -> list[Any]:
        return self.rows

    def pid(self) -> int:
        return os.getpid()


def state_of(handle: Any) -> dict[str, Any]:
    """What its owner, this node, says of an actor's log."""
    return query("checkpoints")[handle._actor_id.hex()]  # type: ignore[no-any-return]


def kill(handle: Any) -> bool:
    """Kill the actor's process, if there is one now."""
    for row in query("workers"):
        if row["actor"] == handle._actor_id.hex() and row["pid"]:
            try:
                os.kill(row["pid"], signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True
    return False


def call_much(box: list[Any], caller: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Call one after another or many at once; return (number, place in the ledger) of the calls that were acknowledged."""
    [ledger] = box
    rng = random.Random(seed)
    found, number = [], 0
    while number < count:
        size = min(rng.choice((1, 1, 2, 7, 40)), count - number)
        refs = [ledger.write.remote(caller, number + index) for index in range(size)]
        for index, ref in enumerate(refs):
            try:
                found.append((number + index, zray.get(ref, timeout=60)))
            except exceptions.ActorUnavailableError:
                pass
        number += size
    return found


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("every", "retries", "seed"), [(1, -1, 1), (7, -1, 2), (40, -1, 3), (7, 0, 4), (1000, 0, 5)])
def test_kills_at_any_moment(every: int, retries: int, seed: int) -> None:
    options = {**FOREVER, "max_task_retries": retries}
    ledger = zray.remote(Ledger).options(checkpoint_every=every, **options).remote()
    callers, count = 3, 600
    task = zray.remote(num_cpus=0.5)(call_much)
    refs = [task.remote([ledger], caller, count, seed * 10 + caller) for caller in range(callers)]
    rng = random.Random(seed)
    kills = 0
    while zray.wait(refs, num_returns=callers, timeout=rng.random() * 0.06)[1] and kills < 40:
        kills += kill(ledger)
    acknowledged = [zray.get(ref, timeout=90) for ref in refs]
    assert kills > 3
    rows = [tuple(row) for row in zray.get(ledger.read.remote(), timeout=30)]
    expected = {place: (caller, number) for caller, acks in enumerate(acknowledged) for number, place in acks}
    # Each acknowledged call is where its answer said, and there is nothing else.
    assert rows == [expected[place] for place in range(1, len(rows) + 1)]
    assert len(expected) == len(rows) == sum(len(acks) for acks in acknowledged)
    if retries:
        assert len(rows) == callers * count
        for caller in range(callers):
            assert [row[1] for row in rows if row[0] == caller] == list(range(count)), "each caller's order holds"
    state = state_of(ledger)
    assert state["longest_log"] <= every
    assert state["logged"] <= every


@pytest.mark.usefixtures("warm")
def test_of_ten_thousand_calls_five_hundred_are_run_again_at_most(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ledger = zray.remote(Ledger).options(checkpoint_every=500, **FOREVER).remote(str(runs))
    # Not all at once: however late the kill comes, some calls have been run since the last checkpoint.
    refs = [ledger.write.remote(number) for number in range(7_400)]
    wait_for(lambda: runs.exists() and runs.stat().st_size > 7_250)
    assert kill(ledger)
    refs += [ledger.write.remote(number) for number in range(7_400, 10_000)]
    assert zray.get(refs, timeout=60) == list(range(1, 10_001))
    assert zray.get(ledger.read.remote()) == [(number,) for number in range(10_000)]
    assert 0 < runs.stat().st_size - 10_000 <= 500
    state = state_of(ledger)
    assert 0 < state["replayed"] <= 500
    assert state["longest_log"] <= 500
    assert state["checkpoints"] == 1 + 20
    assert state["calls"] == 10_001


@pytest.mark.usefixtures("warm")
def test_a_result_does_not_wait_for_the_next_call(tmp_path: Path) -> None:
    class Slow(Ledger):
        def wait(self, path: str) -> bool:
            wait_for(lambda: os.path.exists(path), 30)
            return True

        def use(self, box: list[Any]) -> Any:
            return zray.get(box[0], timeout=30)

    slow = zray.remote(Slow).options(checkpoint_every=10, **FOREVER).remote()
    gate = tmp_path / "gate"
    first, second = slow.write.remote(1), slow.wait.remote(str(gate))
    assert zray.get(first, timeout=20) == 1
    gate.touch()
    assert zray.get(second, timeout=20)
    # Its own result of a moment ago, waited for inside the next call.
    assert zray.get(slow.use.remote([slow.write.remote(2)]), timeout=20) == 2


class Arrays:
    def __init__(self, size: int) -> None:
        self.array = np.zeros(size)
        self.kept: list[Any] = []

    def add(self, other: Any) -> Any:
        self.array += other
        return self.array

    def keep(self, box: list[Any]) -> None:
        self.kept += box

    def kept_values(self) -> list[Any]:
        return [zray.get(ref) for ref in self.kept]


@pytest.mark.usefixtures("warm")
def test_arrays_and_references() -> None:
    """Results that are the actor's own memory, states in shared memory, and arguments that only the log holds."""
    size = 50_000
    actor = zray.remote(Arrays).options(checkpoint_every=4, **FOREVER).remote(size)
    refs = [actor.add.remote(np.ones(size)) for _ in range(10)]
    assert [float(value[0]) for value in zray.get(refs)] == list(range(1, 11)), "each result is of its own moment"
    actor.keep.remote([zray.put("kept")])
    actor.add.remote(zray.put(np.ones(size)))
    wait_for(lambda: state_of(actor)["calls"] == 12)
    assert kill(actor)
    assert float(zray.get(actor.add.remote(1.0), timeout=30)[-1]) == 12
    actor.add.remote(zray.put(np.ones(size)))
    wait_for(lambda: state_of(actor)["calls"] == 14)
    assert state_of(actor)["logged"] == 2
    assert kill(actor)
    assert float(zray.get(actor.add.remote(1.0), timeout=30)[-1]) == 14
    assert zray.get(actor.kept_values.remote(), timeout=30) == ["kept"]


class Own:
    """Says itself what its state is; a lock cannot be pickled."""

    def __init__(self, start: int) -> None:
        import threading

        self.lock = threading.Lock()
        self.value = start

    def save_checkpoint(self) -> int:
        return self.value

    def load_checkpoint(self, state: int) -> None:
        self.value = state

    def add(self, amount: int) -> int:
        with self.lock:
            self.value += amount
            return self.value


@pytest.mark.usefixtures("warm")
def test_a_class_that_says_what_its_state_is() -> None:
    own = zray.remote(Own).options(checkpoint_every=3, **FOREVER).remote(10)
    assert zray.get([own.add.remote(1) for _ in range(5)]) == [11, 12, 13, 14, 15]
    assert kill(own)
    assert zray.get(own.add.remote(1), timeout=30) == 16


@pytest.mark.usefixtures("warm")
def test_what_cannot_be_saved() -> None:
    Plain: Any = type("Plain", (), {name: vars(Own)[name] for name in ("__init__", "add")})
    actor = zray.remote(Plain).options(checkpoint_every=3, **FOREVER).remote(1)
    with pytest.raises(exceptions.ActorDiedError, match="lock"):
        zray.get(actor.add.remote(1), timeout=30)

    class Turns(Ledger):
        def turn(self) -> None:
            self.rows.append(iter(i for i in ()))

    turns = zray.remote(Turns).options(checkpoint_every=3, **FOREVER).remote()
    zray.get([turns.write.remote(1), turns.write.remote(2), turns.turn.remote()])
    with pytest.raises(errors.CheckpointError, match=r"(?s)3 calls have changed.*generator"):
        zray.get(turns.write.remote(3), timeout=30)
    with pytest.raises(errors.CheckpointError):
        zray.get(turns.write.remote(4), timeout=30)
    assert state_of(turns)["calls"] == 3


@pytest.mark.usefixtures("warm")
def test_a_call_that_was_interrupted_half_way(tmp_path: Path) -> None:
    class Half(Ledger):
        def half(self, path: str) -> None:
            self.rows.append("half")
            open(path, "w").close()
            time.sleep(60)
            self.rows.append("whole")

    half = zray.remote(Half).options(checkpoint_every=100, **FOREVER).remote()
    zray.get(half.write.remote(1))
    mark = tmp_path / "mark"
    ref = half.half.remote(str(mark))
    wait_for(mark.exists)
    zray.cancel(ref)
    with pytest.raises(exceptions.TaskCancelledError):
        zray.get(ref, timeout=30)
    assert zray.get(half.write.remote(2), timeout=30) == 3
    assert kill(half)
    assert zray.get(half.read.remote(), timeout=30) == [(1,), "half", (2,)]


@pytest.mark.usefixtures("warm")
def test_errors_and_ends() -> None:
    class Fails(Ledger):
        def fail(self) -> None:
            self.rows.append("failed")
            raise KeyError("as it should")

        def leave(self) -> None:
            zray.actor.exit_actor()

    fails = zray.remote(Fails).options(checkpoint_every=100, **FOREVER).remote()
    with pytest.raises(KeyError):
        zray.get(fails.fail.remote())
    assert kill(fails)
    assert zray.get(fails.read.remote(), timeout=30) == ["failed"]
    last = fails.write.remote(1)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(fails.leave.remote(), timeout=30)
    assert zray.get(last) == 2
    handle = zray.remote(Ledger).options(checkpoint_every=5, **FOREVER).remote()
    last = handle.write.remote(1)
    actor = handle._actor_id.hex()
    del handle
    assert zray.get(last, timeout=30) == 1
    wait_for(lambda: actor not in query("checkpoints"))


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint_every": 5}, "set max_restarts"),
        ({"checkpoint_every": 0, "max_restarts": 1}, "positive integer"),
        ({"checkpoint_every": 5, "max_restarts": 1, "max_concurrency": 2}, "one after another"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        zray.remote(Ledger).options(**given)

    class Async:
        async def method(self) -> None: ...

    with pytest.raises(ValueError, match="coroutine"):
        zray.remote(Async).options(checkpoint_every=5, max_restarts=1).remote()


# -- on other nodes ---------------------------------------------------------------------------------------------------


def _start(cluster: Cluster) -> Callable[[], Any]:
    def add() -> Any:
        return cluster.add_node(num_cpus=2, resources={"wheels": 1})

    return add


def test_nodes_that_die_at_any_moment() -> None:
    """Process and node of an actor elsewhere are killed in turns, while several callers call it."""
    rng = random.Random(8)
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 4}) as cluster:
        add = _start(cluster)
        add()
        cluster.connect()
        cluster.wait_for_nodes()
        ledger = zray.remote(Ledger).options(checkpoint_every=25, resources={"wheels": 0.1}, **FOREVER).remote()
        callers, count = 2, 400
        strategy = zray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            cluster.head_node.node_id,  # type: ignore[union-attr]
            soft=False,
        )
        here = zray.remote(num_cpus=1, scheduling_strategy=strategy)(call_much)
        refs = [here.remote([ledger], caller, count, caller) for caller in range(callers)]
        for _ in range(3):
            zray.get(ledger.write.remote(9, 9), timeout=60)
            for _ in range(2):
                time.sleep(rng.random() * 0.05)
                try:
                    os.kill(zray.get(ledger.pid.remote(), timeout=60), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            [old] = cluster.worker_nodes
            add()
            cluster.wait_for_nodes()
            time.sleep(rng.random() * 0.1)
            cluster.remove_node(old, allow_graceful=False)
        acknowledged = [zray.get(ref, timeout=90) for ref in refs]
        rows = [tuple(row) for row in zray.get(ledger.read.remote(), timeout=60)]
        expected = {place: (caller, number) for caller, acks in enumerate(acknowledged) for number, place in acks}
        assert len(expected) == callers * count
        assert all(rows[place - 1] == row for place, row in expected.items())
        assert len(rows) == callers * count + 3
        state = state_of(ledger)
        assert state["longest_log"] <= 25
        assert query("check") == {}


def test_a_large_state_and_arguments_come_along() -> None:
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 2}) as cluster:
        add = _start(cluster)
        first = add()
        cluster.connect()
        cluster.wait_for_nodes()
        size = 300_000
        actor = zray.remote(Arrays).options(checkpoint_every=4, resources={"wheels": 0.1}, **FOREVER).remote(size)
        for _ in range(6):
            actor.add.remote(np.ones(size))
        assert float(zray.get(actor.add.remote(1.0), timeout=60)[-1]) == 7
        assert state_of(actor)["checkpoint_number"] == 4
        add()
        cluster.wait_for_nodes()
        cluster.remove_node(first, allow_graceful=False)
        assert float(zray.get(actor.add.remote(1.0), timeout=60)[-1]) == 8
        assert state_of(actor)["replayed"] == 3
