"""Accounting of processes and memory: all of a family is found, private bytes and memory files are counted once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from perf import idle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DAEMON = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
                         stdin=sys.stdin, start_new_session=True)
print(child.pid, flush=True)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(idle.MARK, "")
    return idle.mark_environment()


def test_children_and_those_that_left_the_family_are_found(mark: str) -> None:
    """The grandchild's parent ends at once, so that only the mark tells whose it is."""
    started = subprocess.Popen([sys.executable, "-c", DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdin is not None
    lines = {started.stdout.readline().strip() for _ in range(2)}
    started.wait(20)
    [daemon] = [int(line) for line in lines - {"up"}]
    try:
        assert idle.processes_of(mark, os.getpid()) == [daemon]
        assert daemon in idle.processes_of(mark, 1)
        assert idle.processes_of("another mark", daemon) == []
        usage = idle.usage_of(daemon)
        assert usage is not None
        assert 0 < usage.uss <= usage.pss
        assert usage.cpu_seconds > 0
    finally:
        started.stdin.close()
        started.stdout.read()
        started.stdout.close()
    assert idle.usages([started.pid]) == []


def test_private_memory_grows_by_what_is_touched() -> None:
    before = idle.usage_of(os.getpid())
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * (32 << 20))
        after = idle.usage_of(os.getpid())
    assert before is not None
    assert after is not None
    assert after.uss - before.uss > 31 << 20


def test_memory_files_count_what_they_hold_once() -> None:
    here = os.getpid()
    before = idle.memory_files([here])
    first = os.memfd_create("zray-test")
    second = os.dup(first)
    try:
        os.ftruncate(first, 64 << 20)
        assert idle.memory_files([here]) == before, "a hole costs nothing"
        os.posix_fallocate(first, 0, 8 << 20)
        assert idle.memory_files([here, here]) == before + (8 << 20)
    finally:
        os.close(first)
        os.close(second)
    assert idle.memory_files([here]) == before
