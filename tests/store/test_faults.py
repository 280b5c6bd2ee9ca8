"""Planted faults: each switch breaks one rule of the store, and the tests must notice.

Covers the proof that the C tests can fail. A fault that is not found means that a test is missing. The numbers are those of `FAULT(n)` in
`_store_core.c`; a test here keeps the two lists equal.
"""

from __future__ import annotations

import re

import pytest

from tests.store import build

FAULTS = {
    1: ("a seal does not wake its waiters", ["wake"]),
    2: ("releasing the last reference drops the pin: bytes are reclaimed under a reader", ["inline_value"]),
    3: ("sealing does not compare the attempt", ["task"]),
    4: ("sealing a result does not release the arguments", ["task"]),
    5: ("reaping forgets a hold of the dead", ["reap", "fork"]),
    6: ("a freed block is not joined with the free block before it", ["allocator", "contained"]),
    7: ("the segment grows without pages being allocated", ["no_memory"]),
    8: ("a waiter does not mark what it watches", ["wake"]),
    9: ("what an object contains is released twice", ["contained"]),
    10: ("a task can be claimed twice", ["task"]),
    11: ("sealing does not compare the claimant", ["task"]),
    12: ("a pinned object is spilled", ["spilling"]),
    13: ("a pinned object stays in the list of what may be spilled", ["block_value", "spilling"]),
    14: ("the block of a superseded writer is freed while it still writes", ["superseded_writer"]),
    15: ("entries change without the journal", ["every_crash_point"]),
    16: ("repair does not rebuild the hash chains", ["every_crash_point"]),
    17: ("sealing does not count down what is expected of the target", ["task"]),
    18: ("finding an object that somebody holds takes no reference", ["inline_value"]),
    19: ("a living process is reaped", ["reap"]),
    20: ("a retry keeps the attempt number", ["retry"]),
    21: ("freeing an object forgets what only it contained", ["contained"]),
    22: ("results may be expected of a process that was reaped", ["retry"]),
    23: ("the place of a process that died while it spun is lost", ["spin"]),
    24: ("a value from elsewhere takes over what is made anew here", ["copies"]),
    25: ("who drops what it filled gives back the block of its next attempt", ["copies"]),
    26: ("what two make alike is there twice", ["shared_objects"]),
    27: ("what was sent to another node is begun here, too", ["what_was_sent_is_not_begun_here"]),
}


def test_the_list_of_faults_is_complete() -> None:
    source = (build.PACKAGE / "_store_core.c").read_text()
    assert {int(n) for n in re.findall(r"\bFAULT\((\d+)\)", source)} == set(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda n: FAULTS[n][0].replace(" ", "-"))
def test_fault_is_found(fault: int) -> None:
    _, tests = FAULTS[fault]
    status, output = build.run(build.core_tests(False), "--fault", str(fault), *tests, timeout=60)
    assert status != 0, output


@pytest.mark.slow
def test_the_same_tests_pass_without_a_fault() -> None:
    names = sorted({name for _, tests in FAULTS.values() for name in tests})
    status, output = build.run(build.core_tests(False), *names, timeout=60)
    assert status == 0, output


FOUND_BY_KILLS = (2, 4, 5, 6, 9, 10, 12, 14, 15, 16, 17, 19, 21)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FOUND_BY_KILLS)
def test_fault_is_found_by_the_kill_test(fault: int) -> None:
    status, output = build.run(build.kill_tests(False), "--kills", "2000", "--fault", str(fault), timeout=60)
    assert status != 0, output
