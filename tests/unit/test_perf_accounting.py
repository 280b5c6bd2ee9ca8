"""Accounting of processes and memory: all of a family is found, private bytes and memory files are counted once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time

import pytest

from perf import accounting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DAEMON = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
                         stdin=sys.stdin, start_new_session=True)
print(child.pid, flush=True)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(accounting.MARK, "")
    return accounting.mark_environment()


def test_children_and_those_that_left_the_family_are_found(mark: str) -> None:
    """The grandchild's parent ends at once, so that only the mark tells whose it is."""
    started = subprocess.Popen([sys.executable, "-c", DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdin is not None
    lines = {started.stdout.readline().strip() for _ in range(2)}
    started.wait(20)
    [daemon] = [int(line) for line in lines - {"up"}]
    try:
        assert accounting.processes_of(mark, os.getpid()) == [daemon]
        assert daemon in accounting.processes_of(mark, 1)
        assert accounting.processes_of("another mark", daemon) == []
        usage = accounting.usage_of(daemon)
        assert usage is not None
        assert 0 < usage.uss <= usage.pss
        assert 0 < usage.own <= usage.pss
        assert usage.cpu_seconds > 0
    finally:
        started.stdin.close()
        started.stdout.read()
        started.stdout.close()
    assert accounting.usages([started.pid]) == []


def test_commands_are_told_without_folders() -> None:
    usage = accounting.usage_of(os.getpid())
    assert usage is not None
    assert "python" in usage.command or "pytest" in usage.command
    assert accounting.FOLDERS.sub("", "/opt/a-b/bin/python -c path='/srv/x y/z' --log=/var/log/q") == (
        "python -c path='x y/z' --log=q"
    )


def test_private_memory_grows_by_what_is_touched() -> None:
    before = accounting.usage_of(os.getpid())
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * (32 << 20))
        after = accounting.usage_of(os.getpid())
    assert before is not None
    assert after is not None
    assert after.uss - before.uss > 31 << 20


def test_memory_files_count_what_they_hold_once() -> None:
    here = os.getpid()
    before = accounting.memory_files([here])
    first = os.memfd_create("zray-test")
    second = os.dup(first)
    try:
        os.ftruncate(first, 64 << 20)
        assert accounting.memory_files([here]) == before, "a hole costs nothing"
        os.posix_fallocate(first, 0, 8 << 20)
        assert accounting.memory_files([here, here]) == before + (8 << 20)
    finally:
        os.close(first)
        os.close(second)
    assert accounting.memory_files([here]) == before


SPIN = """
import time
end = time.monotonic() + 60
while time.monotonic() < end:
    pass
"""


def test_strangers_disturb_and_our_own_children_do_not(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        ours_seen = accounting.Disturbance(mark)
        stranger = accounting.Disturbance(mark)
        before = accounting.usage_of(ours.pid)
        assert before is not None
        while (now := accounting.usage_of(ours.pid)) is None or now.cpu_seconds < before.cpu_seconds + 0.2:
            time.sleep(0.01)
        quiet = ours_seen.share()
        monkeypatch.setattr(accounting, "processes_of", lambda _mark, _root: [])
        loud = stranger.share()
    finally:
        ours.kill()
        ours.wait()
    assert loud > quiet
    assert quiet >= 0.0


def test_of_several_tries_the_least_disturbed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.2, 0.9])

    class Scripted:
        def __init__(self, mark: str) -> None:
            assert mark == "mark"

        def share(self) -> float:
            return next(shares)

    monkeypatch.setattr(accounting, "Disturbance", Scripted)
    results = iter(["slow", "fast", "slowest"])
    assert accounting.undisturbed(lambda: next(results), "mark", limit=0.1, tries=3) == ("fast", 0.2)


def test_a_quiet_machine_needs_one_try() -> None:
    calls: list[int] = []
    found, share = accounting.undisturbed(lambda: calls.append(1), "mark", limit=float("inf"), tries=9)
    assert (found, calls) == (None, [1])
    assert share >= 0.0
