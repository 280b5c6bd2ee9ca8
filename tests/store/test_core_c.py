"""Every call of the store, by the C programs `core.c` and `kills.c`, under AddressSanitizer and UndefinedBehaviorSanitizer where that says more.

Covers compiling and running them. What they check is written there. `kills.c --kills 10000` is the soak.
"""

from __future__ import annotations

import os
import re

import pytest

from tests.store import build

NAMES = sorted(re.findall(r'TEST\((\w+)\)[,;]|\{"(\w+)", test_', (build.HERE / "core.c").read_text()))
TESTS = sorted({a or b for a, b in NAMES})


def test_the_list_of_tests_is_complete() -> None:
    status, output = build.run(build.core_tests(True), "--list")
    assert status == 0
    assert sorted(output.split()) == TESTS


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_call(name: str) -> None:
    status, output = build.run(build.core_tests(True), name, timeout=110)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("sanitized", [False, True], ids=["plain", "sanitized"])
def test_kills(sanitized: bool) -> None:
    kills = os.environ.get("ZRAY_KILLS", "300" if sanitized else "1000")
    status, output = build.run(build.kill_tests(sanitized), "--kills", kills, "--seed", str(os.getpid()), timeout=110)
    assert status == 0, output


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_kills(seed: int) -> None:
    status, output = build.run(
        build.kill_tests(False), "--kills", "10000", "--seed", str(os.getpid() + seed), timeout=3600
    )
    assert status == 0, output
