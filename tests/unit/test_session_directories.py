"""Directories of sessions: whose owner lives stays, whose owner is gone is removed, whatever is just being made or removed beside it."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

from zray import node

if TYPE_CHECKING:
    from pathlib import Path


def made(root: Path, name: str) -> Path:
    directory = root / name
    (directory / "logs").mkdir(parents=True)
    return directory


def test_only_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    living, left, held = made(tmp_path, "living"), made(tmp_path, "left"), made(tmp_path, "held")
    new, old = made(tmp_path, "new"), made(tmp_path, "old")
    os.utime(old, (1, 1))
    owners = [node.claim_session(str(directory)) for directory in (living, left, held)]
    broker = node.hold_session(str(held))
    for gone in owners[1:]:
        os.close(gone)
    node.remove_stale_sessions(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["held", "living", "new"]
    assert all((directory / "logs").exists() for directory in (living, held, new))
    os.close(broker)
    os.close(owners[0])
    node.remove_stale_sessions(str(tmp_path))
    assert os.listdir(tmp_path) == ["new"]


def test_sessions_that_are_made_and_removed_while_another_looks(tmp_path: Path) -> None:
    ends = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not ends.is_set():
                node.remove_stale_sessions(str(tmp_path))
        except BaseException as error:
            failures.append(error)

    others = [threading.Thread(target=look) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for index in range(1000):
            directory = made(tmp_path, str(index))
            alive = node.claim_session(str(directory))
            assert (directory / "logs").exists()
            shutil.rmtree(directory)
            os.close(alive)
    finally:
        ends.set()
        for other in others:
            other.join()
    assert not failures
