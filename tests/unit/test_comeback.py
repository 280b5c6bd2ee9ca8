"""What a head that was replaced is told when it comes back as an ordinary node, and what it leaves of its first session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from zray.broker import comeback
from zray.broker.config import BrokerConfig, ClusterConfig

if TYPE_CHECKING:
    from pathlib import Path


def head_in(root: str, spill: str = "") -> BrokerConfig:
    directory = f"{root}/aaaa"
    return BrokerConfig(
        directory=directory,
        spill_directory=spill or f"{directory}/spill",
        session="aaaa",
        node="01" * 16,
        driver_pid=7,
        ready_fd=3,
        resources={"CPU": 2.0, "node:__internal_head__": 1.0, "node:10.0.0.1": 1.0},
        labels={"zone": "east"},
        store_capacity=1 << 20,
        max_objects=100,
        preload=["numpy"],
        cluster=ClusterConfig("10.0.0.1", 0, "", f"{directory}/cluster.key", "0.1.0", 4.0, "memory", 60.0, 3),
    )


def test_it_keeps_its_place_and_nothing_else() -> None:
    head = head_in("/run")
    again = comeback.ordinary(head, "10.0.0.1:7000", "10.0.0.2:7000", "bbbb", "02" * 16)
    assert again.node == "02" * 16
    assert (again.directory, again.spill_directory, again.session) == ("/run/bbbb", "/run/bbbb/spill", "bbbb")
    assert again.first_directory == "/run/aaaa"
    assert again.resources == {"CPU": 2.0, "node:10.0.0.1": 1.0}
    assert (again.labels, again.driver_pid, again.store_capacity) == (head.labels, 7, head.store_capacity)
    place = again.cluster
    assert place is not None
    assert (place.host, place.port, place.head) == ("10.0.0.1", 7000, "10.0.0.2:7000")
    assert place.key_file == "/run/aaaa/cluster.key"
    assert (place.replicas, place.storage, place.head_grace, place.node_timeout) == (1, "memory", 0.0, 4.0)


def test_a_second_time_its_first_directory_is_still_the_first() -> None:
    once = comeback.ordinary(head_in("/run", "/big/zray-aaaa"), "10.0.0.1:7000", "h:1", "bbbb", "02" * 16)
    twice = comeback.ordinary(once, "10.0.0.1:7000", "h:1", "cccc", "03" * 16)
    assert once.spill_directory == "/big/zray-bbbb"
    assert twice.spill_directory == "/big/zray-cccc"
    assert (twice.directory, twice.first_directory) == ("/run/cccc", "/run/aaaa")


def test_only_the_key_and_the_log_are_left(tmp_path: Path) -> None:
    head = head_in(str(tmp_path))
    for name in ("logs", "spill"):
        os.makedirs(os.path.join(head.directory, name))
    for name in ("alive", "b", "broker.log", "cluster.key", "node.json", "logs/w1.out", "spill/1"):
        with open(os.path.join(head.directory, name), "w"):
            pass
    comeback._leave(head)
    assert sorted(os.listdir(head.directory)) == ["alive", "broker.log", "cluster.key"]
    again = msgspec.structs.replace(head, directory=str(tmp_path / "bbbb"), first_directory=head.directory)
    os.makedirs(again.directory)
    comeback._leave(again)
    assert os.listdir(tmp_path) == ["aaaa"]


def test_when_nobody_is_there_it_ends_and_says_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    head = head_in(str(tmp_path))
    os.makedirs(head.directory)
    child = os.fork()
    if child == 0:
        comeback.begin_again(head, "127.0.0.1:1", ["127.0.0.1:1"])
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    said = capfd.readouterr().err
    assert "none of the nodes that have replaced it can be reached (127.0.0.1:1)" in said
    assert "Start it again: zray start --address 127.0.0.1:1 --key FILE" in said
