"""The walk of `add(a, b)` with its inputs on two nodes, step by step from the event table (Ray, OSDI 2018, Fig. 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import zray
from tests.helpers import query, wait_for
from zray.broker import walk
from zray.cluster_utils import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


class Step(NamedTuple):
    time: float
    node: str
    table: str
    subject: str
    what: str
    detail: str


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes with a CPU each that note what happens; this process is connected to the first."""
    monkeypatch.setenv("ZRAY_TRACE", "1")
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 1}) as found:
        found.add_node(num_cpus=1, resources={"second": 1})
        found.connect()
        found.wait_for_nodes()
        yield found


def steps_of(subjects: set[str]) -> list[Step]:
    """What was noted of some tasks and objects, by any node, in the order in which it happened."""
    found = []
    for _, table, subject, what, detail in query("events"):
        if subject in subjects:
            time, _, rest = detail.partition(" ")
            node, _, rest = rest.partition(" ")
            found.append(Step(float(time), node, table, subject, what, rest))
    return sorted(found)


def test_the_nine_steps_of_add(cluster: Cluster) -> None:
    first, second = cluster.head_node.node_id, cluster.worker_nodes[0].node_id  # type: ignore[union-attr]

    @zray.remote(num_cpus=0, resources={"second": 1})
    def make_b() -> Any:
        return np.full(2_500_000, 2.0)

    @zray.remote
    def add(a: Any, b: Any) -> float:
        return float(a[0] + b[0])

    a = zray.put(np.full(250_000, 1.0))
    b = make_b.remote()
    zray.wait([b], fetch_local=False)
    c = add.remote(a, b)
    assert zray.get(c, timeout=60) == 3.0

    task = c.task_id().hex()
    subjects = {task, a.hex(), b.hex()}
    wait_for(lambda: {walk.RAN, walk.COPIED, walk.RETURNED} <= {step.what for step in steps_of({task, a.hex()})})
    steps = steps_of(subjects)
    of_add = [step for step in steps if step.subject == task]
    # 1. The function is known where it will run: its code travels with the first task that needs it there.
    codes = [step for step in all_steps() if step.what == walk.CODE_SENT]
    assert any(step.node == first and step.detail == second for step in codes)
    # 2. to 9., in this order: the local scheduler gets it; has a, but not b; asks where b is; sends it to b's node; that node's scheduler
    # gets it; has not a; asks where a is; copies it; runs the function. Then the result is back.
    assert [(step.node, step.what, step.detail) for step in of_add if step.what != walk.RAN] == [
        (first, walk.SUBMITTED, ""),
        (first, walk.LACKS, b.hex()),
        (first, walk.PLACED, second),
        (second, walk.RECEIVED, first),
        (second, walk.LACKS, a.hex()),
        (first, walk.RETURNED, second),
    ]
    ran = next(step for step in of_add if step.what == walk.RAN)
    located_b = next(step for step in steps if step.subject == b.hex() and step.what == walk.LOCATED)
    located_a = next(step for step in steps if step.subject == a.hex() and step.what == walk.LOCATED)
    copied = next(step for step in steps if step.subject == a.hex() and step.what == walk.COPIED)
    assert (located_b.node, located_b.detail) == (first, second)
    assert (located_a.node, located_a.detail) == (second, first)
    assert (copied.node, copied.detail) == (second, first)
    assert ran.node == second
    by_what = {step.what: step for step in of_add}
    order = [by_what[walk.SUBMITTED], located_b, by_what[walk.PLACED], by_what[walk.RECEIVED], located_a, copied, ran]
    assert order == sorted(order, key=lambda step: step.time)
    assert not [step for step in steps if step.subject == b.hex() and step.what == walk.COPIED], "b stayed where it was"


def all_steps() -> list[Step]:
    return steps_of({subject for _, _, subject, _, detail in query("events") if detail[:1].isdigit()})


def test_nothing_is_noted_without_being_asked_for() -> None:
    zray.init(num_cpus=1)

    @zray.remote
    def work() -> int:
        return 1

    assert zray.get(work.remote()) == 1
    assert not [row for row in query("events") if row[3] == walk.SUBMITTED]
