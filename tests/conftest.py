"""Fixtures for all tests: sessions, driver programs, and the check that a test leaves nothing behind.

Covers what surrounds a test. Does not cover how footprints are taken or programs watched (`tests/helpers.py`).

- `zray_session(num_cpus=...)` starts a session for one test; it is shut down afterwards.
- `warm` is a session that the tests of one module share (`WARM` in the module: arguments of `zray.init`).
- `program(source)` starts a driver program in a process and directories of its own.

Every test runs inside a check: at its end the node verifies its own books, and after the session's end this process must
have no thread, descriptor, child, mapping or runtime file that it did not have before. Sessions of one run live in a
runtime directory of its own, so runs do not see one another.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy  # noqa: F401 - imported before the first footprint: its BLAS starts threads
import pytest

import zray
from tests import reach
from tests.helpers import RUNTIME, Footprint, Gate, Program, Tally, check_leaks, cpus_are_free, query, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

LARGE = 100_000
"""Bytes from which an object that nobody refers to any more counts as a leak."""
_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Give this run a runtime directory of its own; names of sockets need a short one."""
    os.environ[RUNTIME] = tempfile.mkdtemp(prefix="zray-test-", dir="/tmp")
    os.environ.pop("ZRAY_SPILL_DIR", None)
    # A shell without job control lets what runs in its background ignore Ctrl-C; programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What collecting made stays till the end: the collections of garbage after each test need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's runtime directory."""
    shutil.rmtree(os.environ[RUNTIME], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Remember whether the test failed: its traceback keeps its variables, so nothing is said about leaks then."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


class Warm:
    """The session that tests of the current module share, while there is one."""

    def __init__(self) -> None:
        self.before: Footprint | None = None

    def ensure(self, settings: dict[str, Any]) -> None:
        """Start it unless it runs (a test may have ended it)."""
        if self.before is not None and zray.is_initialized():
            return
        self.before = Footprint.take()
        zray.init(**settings)

    def end(self, failed: bool = False) -> None:
        """Shut it down; it must leave nothing."""
        before, self.before = self.before, None
        if before is not None:
            zray.shutdown()
            if not failed:
                check_leaks(before)


_warm = Warm()


def _check_books() -> None:
    """The node's own invariants hold, and nothing is left that only a lost reference could keep."""
    errors = query("check")
    assert not errors, errors


def _check_quiet() -> None:
    """A test of a shared session left no task, no actor and no large object."""
    gc.collect()
    wait_for(cpus_are_free, 10.0, f"all CPUs are free: {zray.available_resources()}")
    wait_for(
        lambda: not [row for row in query("objects") if row["size"] >= LARGE],
        5.0,
        "no large object is left",
    )


# Examples have no deadline and take the time they take: the machine may stand still for a moment.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind."""
    shared = "warm" in request.fixturenames
    if not shared:
        _warm.end()
    before = None if shared else Footprint.take()
    yield
    failed = request.node.stash.get(_failed, False)
    try:
        if zray.is_initialized() and not failed:
            _check_books()
            if shared:
                _check_quiet()
    finally:
        if failed:
            # What a failed test left would disturb others of the module.
            _warm.end(failed=True)
            zray.shutdown()
        elif before is not None:
            zray.shutdown()
            check_leaks(before)


@pytest.fixture(autouse=True, scope="module")
def ends_the_shared_session() -> Iterator[None]:
    """No session outlives its module."""
    yield
    _warm.end()


@pytest.fixture
def warm(request: pytest.FixtureRequest) -> None:
    """A running session, shared by the module's tests."""
    _warm.ensure(getattr(request.module, "WARM", {"num_cpus": 4}))


@pytest.fixture
def zray_session() -> Iterator[Callable[..., Any]]:
    """A function that starts this test's own session: arguments as `zray.init`, two CPUs unless said otherwise."""

    def start(**settings: Any) -> Any:
        return zray.init(**{"num_cpus": 2, **settings})

    yield start
    if zray.is_initialized():
        errors = query("check")
        zray.shutdown()
        assert not errors, errors


@pytest.fixture(params=reach.WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """How the driver reaches the cluster (`tests/reach.py`): tests whose cluster takes it run once for each."""
    return str(request.param)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """A function that starts a driver program; whatever of it still runs at the end of the test is killed."""
    started: list[Program] = []

    def start(source: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        place = tmp_path / f"program{len(started)}"
        place.mkdir()
        runtime = os.path.join(os.environ[RUNTIME], f"p{len(started)}")
        made = Program(source, place, runtime, *arguments, env=env)
        started.append(made)
        return made

    yield start
    for made in started:
        made.destroy()
        shutil.rmtree(made.runtime, ignore_errors=True)


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Gate]:
    """A function that makes gates by name."""
    return lambda name: Gate(tmp_path / f"gate-{name}")


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    """A count of events over all processes."""
    return Tally(tmp_path / "tally")
