"""Seeded chaos over real processes: a short form for every run of the tests, ten minutes in the soak."""

from __future__ import annotations

import os
import time

import pytest

from tests import chaos

SECONDS = 12.0
LONG_S = float(os.environ.get("ZRAY_CHAOS_SECONDS", "600"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_results_are_right_whatever_happens() -> None:
    workload = chaos.run(seed=7, seconds=SECONDS, calm=0.8)
    assert workload.right > 20


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_results_are_right_whatever_happens_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("ZRAY_CHAOS_SEED", str(int(time.time()))))
    with capsys.disabled():
        print(f"chaos with seed {seed}", flush=True)
    assert chaos.run(seed, LONG_S, calm=1.5).right > 1000
