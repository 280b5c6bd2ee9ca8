"""Second copies of large values: a node that dies takes no more with it than can be made again in a bounded time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, Tally, query, wait_for
from zray import errors
from zray import node as nodes
from zray.cluster_utils import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 40_000
"""Numbers in a large value: 320 kB, more than travels with the news of an end, and cheap to copy also on a busy machine."""
LINK_S = 0.03
BOUND_S = 0.2
LINKS = 40
MOST = 2 * (int(BOUND_S / LINK_S) + 1)
"""Links from one copy to the next, and once more, as the newest copy may not be there yet. Slow links are fewer."""


@pytest.fixture
def bound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that making a value again may take."""
    monkeypatch.setenv("ZRAY_REBUILD_S", str(request.param))
    return float(request.param)


@pytest.fixture
def cluster(bound: float) -> Iterator[Cluster]:
    """A head with CPUs, to which this process is connected, and two nodes that have a resource in common."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 2}) as found:
        for _ in range(2):
            found.add_node(num_cpus=2, resources={"far": 100})
        found.connect()
        found.wait_for_nodes()
        yield found
        wait_for(lambda: not left(), 5, f"nothing is left: {left()}")


def left() -> dict[str, int]:
    found = query("statistics")
    names = ("objects_elsewhere", "objects_kept_elsewhere", "lineage_tasks", "second_copies_held")
    counts = {name: found[name] for name in names if found[name]}
    return counts | ({"used": found["used"]} if found["used"] > 4 * SIZE else {})


@zray.remote(num_cpus=1)
def link(value: Any, step: int, tally: Tally, gate: Gate | None, seconds: float = LINK_S) -> Any:
    """The next value of a chain; notes where it runs."""
    tally.add(f"{step} {zray.get_runtime_context().get_node_id()}")
    time.sleep(seconds)
    if gate is not None:
        gate.wait()
    return np.arange(SIZE, dtype=np.int64) if value is None else value + 1


def begin_chain(tally: Tally, gate: Gate) -> Any:
    """Submit a chain of which nothing but the last value is referenced, and whose last link waits."""
    ref = link.options(resources={"far": 1}).remote(None, 0, tally, None)
    for step in range(1, LINKS):
        ref = link.remote(ref, step, tally, gate if step == LINKS - 1 else None)
    return ref


def kill_where(cluster: Cluster, node: str) -> None:
    found = next(one for one in cluster.worker_nodes if one.node_id == node)
    cluster.remove_node(found, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [BOUND_S], indirect=True)
def test_a_long_chain_is_not_run_again_from_its_beginning(
    cluster: Cluster, tally: Tally, gate: Callable[[str], Gate]
) -> None:
    hold = gate("hold")
    ref = begin_chain(tally, hold)
    wait_for(lambda: len(tally) == LINKS, 60, "the last link runs")
    places = {line.split()[1] for line in tally.lines}
    assert len(places) == 1, "copies draw no link away, though the head has CPUs to spare"
    wait_for(lambda: query("statistics")["second_copies_held"] > 0, 10, "a copy is held")
    kill_where(cluster, places.pop())
    hold.open()
    assert (zray.get(ref, timeout=60) == np.arange(SIZE) + LINKS - 1).all()
    assert LINKS < len(tally) <= LINKS + MOST + 1
    del ref


@pytest.mark.slow
@pytest.mark.parametrize("bound", [BOUND_S], indirect=True)
def test_tasks_run_where_the_original_is(cluster: Cluster, tally: Tally) -> None:
    """Not at the head, which is idle and has the copy."""
    ref = link.options(resources={"far": 1}).remote(None, 0, tally, None, 2 * BOUND_S)
    wait_for(lambda: query("statistics")["used"] > 8 * SIZE, 30, "a copy has come")
    for step in range(1, 4):
        zray.wait([link.remote(ref, step, tally, None)], timeout=30, fetch_local=False)
    assert len({line.split()[1] for line in tally.lines}) == 1
    del ref


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0], indirect=True)
def test_without_a_bound_all_of_it_is(cluster: Cluster, tally: Tally, gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    ref = begin_chain(tally, hold)
    wait_for(lambda: len(tally) == LINKS, 60, "the last link runs")
    assert query("statistics")["second_copies"] == 0
    kill_where(cluster, tally.lines[0].split()[1])
    hold.open()
    assert (zray.get(ref, timeout=60) == np.arange(SIZE) + LINKS - 1).all()
    assert len(tally) == 2 * LINKS
    del ref


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_a_bound_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRAY_REBUILD_S", text)
    with pytest.raises(errors.ZrayUsageError, match="ZRAY_REBUILD_S"):
        nodes.start(nodes.NodeSettings(), 0)
