"""zray.broker.placement: the policy's answers."""

from __future__ import annotations

from random import Random

import pytest

from zray import resources
from zray.broker.jobs import Job
from zray.broker.ledger import Ledger
from zray.broker.placement import NEVER, WAIT, LocalPolicy
from zray.broker.worker_pool import Worker
from zray.task import JobSpec, TaskSpec


def test_here_if_it_fits_else_elsewhere_else_wait_else_never() -> None:
    policy, rng = LocalPolicy(), Random(0)
    here, there = Ledger({"CPU": 1}), Ledger({"CPU": 1})
    one = here.demand(resources.pack(resources.parse({"CPU": 1})))
    assert policy.place(one, (here, there), rng) == 0
    here.take(one)
    assert policy.place(one, (here, there), rng) == 1
    there.take(one)
    assert policy.place(one, (here, there), rng) == WAIT
    huge = here.demand(resources.pack(resources.parse({"CPU": 9})))
    assert policy.place(huge, (here, there), rng) == NEVER


@pytest.mark.parametrize(
    ("queued", "depth", "takers", "batch"),
    [(100, 10, 2, 10), (10, 100, 2, 5), (11, 100, 2, 6), (1, 100, 4, 1), (7, 1, 1, 1), (3, 9, 0, 3)],
)
def test_batches(queued: int, depth: int, takers: int, batch: int) -> None:
    assert LocalPolicy().batch(queued, depth, takers) == batch


def test_the_victim_is_who_has_most() -> None:
    job = Job(JobSpec(1, b"j" * 16, 1, "", [], ""), 1)
    workers = [Worker(number, job, (1, ())) for number in range(3)]
    for worker, count in zip(workers, (2, 5, 5), strict=True):
        worker.handed.extend(TaskSpec(b"t" * 16, b"s" * 16) for _ in range(count))
    assert LocalPolicy().victim(workers) is workers[1]
    assert LocalPolicy().victim([]) is None


def test_among_many_nodes_a_few_are_looked_at_and_all_where_those_are_full() -> None:
    policy, rng = LocalPolicy(), Random(0)
    nodes = [Ledger({"CPU": 1}) for _ in range(500)]
    one = nodes[0].demand(resources.pack(resources.parse({"CPU": 1})))
    nodes[0].take(one)
    chosen = {policy.place(one, nodes, rng) for _ in range(200)}
    assert 0 not in chosen
    assert len(chosen) > 100
    for node in nodes[1:499]:
        node.take(one)
    assert {policy.place(one, nodes, rng) for _ in range(20)} == {499}
    nodes[499].take(one)
    assert policy.place(one, nodes, rng) == WAIT
