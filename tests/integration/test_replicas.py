"""Replica processes over encrypted sockets: killed in turn under load, paused, started again with their votes."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from perf.gcs_failover import PARTS, Load, ReplicaSet, kill_one, measure
from perf.history import check
from zray.gcs.replication.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def replicas() -> Iterator[ReplicaSet]:
    with ReplicaSet(Timing(silent=0.5, lease=0.4)) as started:
        started.begin(4)
        yield started


@pytest.fixture
def load(replicas: ReplicaSet) -> Iterator[Load]:
    with contextlib.closing(Load(replicas)) as made:
        made.run_until(made.is_whole, 30.0, "there are three replicas")
        yield made


def test_each_part_of_the_chain_is_killed_under_load_and_nothing_is_lost(replicas: ReplicaSet, load: Load) -> None:
    for part in PARTS:
        kill_one(replicas, load, part)
        spare = replicas.start()
        load.run_until(spare.poll, 30.0, "the next process is ready")
    load.finish()
    assert len(load.operations) > 300
    check(load.operations)


def test_a_paused_head_is_replaced_and_changes_nothing_when_it_wakes(replicas: ReplicaSet, load: Load) -> None:
    configuration = load.configuration
    assert configuration is not None
    old = replicas.replicas[configuration.head.id]
    os.kill(old.process.pid, signal.SIGSTOP)
    try:
        load.run_until(
            lambda: (
                load.is_whole()
                and load.configuration is not None
                and load.configuration.position(configuration.head) < 0
            ),
            30.0,
            "the spare process has taken a place, and the paused head has none",
        )
        asked = len(load.operations)
        load.run_until(lambda: len(load.operations) > asked + 100, 30.0, "the store goes on")
    finally:
        os.kill(old.process.pid, signal.SIGCONT)
    asked = len(load.operations)
    load.run_until(lambda: len(load.operations) > asked + 300, 30.0, "the store goes on beside the one that woke")
    load.finish()
    check(load.operations)


@pytest.mark.soak
def test_two_thousand_kills_lose_no_acknowledged_write() -> None:
    kills, load = measure(2000)
    assert len(kills) == 2000
    assert len(load.operations) > 200_000
