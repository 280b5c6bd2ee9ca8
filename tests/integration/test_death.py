"""Processes that die: the error says exactly why, and everything else goes on."""

from __future__ import annotations

import os
import signal
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import (
    RUNTIME,
    Program,
    alive,
    broker_pid,
    children,
    cpus_are_free,
    processes_under,
    query,
    stop,
    wait_for,
    worker_pids,
)
from zray import exceptions
from zray.exceptions import ActorDiedError, DeathCause, WorkerCrashedError, ZraySystemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally


def kill_self(how: str) -> None:
    """End the calling process; runs in workers."""
    print("last words of the dying", flush=True)
    print("on the other stream, too", file=sys.stderr, flush=True)
    if how == "SIGSEGV":
        import ctypes

        ctypes.string_at(0)
    elif how == "os._exit":
        os._exit(3)
    elif how == "sys.exit":
        sys.exit(4)
    elif how == "SIGABRT":
        os.abort()
    else:
        os.kill(os.getpid(), getattr(signal, how))


def local_copy(function: Any) -> Any:
    """Return a function of the same code that goes to workers by value: they need not import this module."""
    made = types.FunctionType(function.__code__, {"os": os, "signal": signal, "sys": sys}, function.__name__)
    made.__module__ = "__main__"
    return made


CASES = [
    ("SIGKILL", DeathCause.SIGKILL),
    ("SIGTERM", DeathCause.SIGTERM),
    ("SIGSEGV", DeathCause.SIGSEGV),
    ("SIGABRT", DeathCause.SIGABRT),
    ("os._exit", DeathCause.EXIT(3)),
    ("sys.exit", DeathCause.EXIT(4)),
]


def check_death(error: Any, how: str, cause: DeathCause) -> None:
    text = str(error)
    assert error.cause is cause, text
    assert str(cause) in text
    assert error.death.pid > 0
    assert f"pid {error.death.pid}" in text
    assert error.death.peak_rss > 1 << 20
    assert "last words of the dying" in text
    assert "on the other stream, too" in text
    assert "last words of the dying" in error.log_lines
    if cause.signal is not None:
        assert error.signal_name == cause.name
    else:
        assert error.exit_code == cause.code
    if how in ("SIGSEGV", "SIGABRT"):
        assert "kill_self" in error.fault_stack
        assert "kill_self" in text
    assert not alive(error.death.pid)


@pytest.mark.parametrize(("how", "cause"), CASES, ids=[how for how, _ in CASES])
def test_a_dead_worker_says_exactly_why(warm: None, how: str, cause: DeathCause) -> None:
    die = local_copy(kill_self)

    @zray.remote(max_retries=0)
    def doomed() -> None:
        die(how)

    with pytest.raises(WorkerCrashedError) as raised:
        zray.get(doomed.remote(), timeout=30)
    check_death(raised.value, how, cause)
    assert "doomed" in str(raised.value)
    assert zray.get(zray.remote(lambda: 1).remote(), timeout=30) == 1


@pytest.mark.parametrize(("how", "cause"), CASES, ids=[how for how, _ in CASES])
def test_a_dead_actor_says_exactly_why(warm: None, how: str, cause: DeathCause) -> None:
    die = local_copy(kill_self)

    class Doomed:
        def work(self) -> int:
            return 1

        def die(self) -> None:
            die(how)

    actor = zray.remote(Doomed).remote()
    assert zray.get(actor.work.remote()) == 1
    running, queued = actor.die.remote(), actor.work.remote()
    with pytest.raises(ActorDiedError) as raised:
        zray.get(running, timeout=30)
    check_death(raised.value, how, cause)
    assert "The actor is dead because its worker process has died" in str(raised.value)
    assert "Doomed" in str(raised.value)
    assert actor._actor_id.hex() in str(raised.value)
    for ref in (queued, actor.work.remote()):
        with pytest.raises(ActorDiedError) as raised:
            zray.get(ref, timeout=30)
        assert raised.value.cause is cause


def test_a_constructor_that_dies(warm: None) -> None:
    die = local_copy(kill_self)

    class Doomed:
        def __init__(self) -> None:
            die("os._exit")

        def work(self) -> int:
            return 1

    actor = zray.remote(Doomed).remote()
    for _ in range(2):
        with pytest.raises(ActorDiedError) as raised:
            zray.get(actor.work.remote(), timeout=30)
        assert raised.value.cause is DeathCause.EXIT(3)
    assert "last words of the dying" in str(raised.value)


def test_killed_from_outside_in_the_middle_of_a_task(warm: None, tmp_path: Any) -> None:
    @zray.remote(max_retries=0)
    def linger() -> None:
        import time

        (tmp_path / "pid").write_text(f"{os.getpid()} ")
        time.sleep(600)

    ref = linger.remote()
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError) as raised:
        zray.get(ref, timeout=30)
    assert raised.value.cause is DeathCause.SIGKILL
    assert raised.value.death.pid == pid


def test_idle_workers_that_are_killed_are_replaced(warm: None) -> None:
    identify = zray.remote(os.getpid)
    zray.get([identify.remote() for _ in range(20)])
    for _ in range(3):
        victims = worker_pids()
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(20)], timeout=60) == list(range(20))
        wait_for(lambda victims=victims: not worker_pids() & victims)  # type: ignore[misc]


def test_a_worker_killed_between_two_calls_of_a_synchronous_loop(warm: None) -> None:
    identify = zray.remote(lambda i: (i, os.getpid()))
    for i in range(120):
        number, pid = zray.get(identify.remote(i), timeout=60)
        assert number == i
        if i % 20 == 19:
            os.kill(pid, signal.SIGKILL)


def test_children_of_a_task_that_dies_end_with_its_worker(warm: None, tmp_path: Any) -> None:
    @zray.remote(max_retries=0)
    def breed() -> None:
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "child").write_text(f"{child.pid}")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerCrashedError):
        zray.get(breed.remote(), timeout=30)
    pid = int((tmp_path / "child").read_text())
    wait_for(lambda: not alive(pid))


def test_a_stopped_worker_goes_on_when_it_is_continued(warm: None, gate: Callable[[str], Gate], tmp_path: Any) -> None:
    hold = gate("hold")

    @zray.remote
    def work() -> int:
        (tmp_path / "pid").write_text(f"{os.getpid()} ")
        hold.wait()
        return os.getpid()

    ref = work.remote()
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    stop(pid)
    hold.open()
    assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(20)], timeout=30) == list(range(20))
    assert zray.wait([ref], timeout=0.2)[0] == []
    os.kill(pid, signal.SIGCONT)
    assert zray.get(ref, timeout=30) == pid


def test_a_stopped_broker_delays_but_loses_nothing(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=2)
    echo = zray.remote(lambda x: x)

    class Actor:
        def add(self, x: int) -> int:
            return x + 1

    actor = zray.remote(Actor).remote()
    assert zray.get([echo.remote(1), actor.add.remote(1)]) == [1, 2]
    pid = broker_pid()
    stop(pid)
    try:
        # Values and living actors need no broker.
        assert zray.get(zray.put("local")) == "local"
        assert zray.get([actor.add.remote(i) for i in range(10)], timeout=30) == list(range(1, 11))
        refs = [echo.remote(i) for i in range(200)]
        zray.wait(refs, num_returns=200, timeout=0.3)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert zray.get(refs, timeout=60) == list(range(200))


@pytest.mark.slow
@pytest.mark.parametrize("waiting", ["get", "wait", "future", "task"])
def test_waiters_of_a_broker_that_is_killed_get_an_error(program: Callable[..., Program], waiting: str) -> None:
    running = program(
        """
from zray.exceptions import ZraySystemError
zray.init(num_cpus=2)
@zray.remote
def linger():
    time.sleep(600)
@zray.remote
class Actor:
    def linger(self):
        time.sleep(600)
refs = [linger.remote(), Actor.remote().linger.remote(), zray.remote(lambda x: x).remote(linger.remote())]
print("broker", zray.nodes()[0]["broker_pid"])
how = sys.argv[1]
try:
    if how == "get":
        zray.get(refs)
    elif how == "wait":
        zray.wait(refs)
    elif how == "future":
        refs[0].future().result()
    else:
        zray.get(zray.remote(lambda r: zray.get(r)).options(num_cpus=0).remote(refs))
except ZraySystemError as error:
    print("system error", str(error).replace("\\n", " "))
try:
    zray.get(linger.remote())
except ZraySystemError:
    print("refused")
zray.shutdown()
assert not zray.is_initialized()
zray.init(num_cpus=1)
print("again", zray.get(zray.remote(lambda: 5).remote()))
""",
        waiting,
    )
    broker = int(running.wait_line("broker "))
    others = set(running.processes()) - {running.pid, broker}
    os.kill(broker, signal.SIGKILL)
    assert "broker" in running.wait_line("system error", 20)
    wait_for(lambda: not others & set(running.processes()), what="workers and fork parent have gone")
    running.wait_line("refused", 20)
    assert running.wait_line("again ", 20) == "5"
    running.succeed()
    running.wait_nothing_left()


def test_a_node_without_its_fork_parent_ends(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=1)
    assert zray.get(zray.remote(lambda: 1).remote()) == 1
    ref = zray.remote(signal.pause).remote()
    broker = broker_pid()
    (fork_parent,) = children(broker)
    os.kill(fork_parent, signal.SIGKILL)
    with pytest.raises(ZraySystemError):
        zray.get(ref, timeout=30)
    zray.shutdown()
    wait_for(lambda: not processes_under(os.environ[RUNTIME]))


@pytest.mark.slow
def test_workers_killed_at_random_lose_no_task(zray_session: Callable[..., Any], tally: Tally) -> None:
    zray_session(num_cpus=3)

    @zray.remote(max_retries=-1)
    def work(x: int, blob: bytes) -> tuple[int, int]:
        import time

        time.sleep(0.005)
        return x, len(blob)

    @zray.remote(max_retries=-1)
    def combine(a: tuple[int, int], b: tuple[int, int]) -> int:
        return a[0] + b[0]

    blob = zray.put(b"x" * 100_000)
    refs = [work.remote(i, blob) for i in range(400)]
    sums = [combine.remote(refs[i], refs[i + 1]) for i in range(0, 400, 2)]
    kills = 0
    while zray.wait(sums, num_returns=len(sums), timeout=0.05)[1]:
        pids = worker_pids()
        if pids and kills < 25:
            try:
                os.kill(sorted(pids)[kills % len(pids)], signal.SIGKILL)
            except ProcessLookupError:
                continue
            kills += 1
    assert kills >= 3
    assert zray.get(sums) == [4 * i + 1 for i in range(200)]
    assert zray.get(refs) == [(i, 100_000) for i in range(400)]
    wait_for(cpus_are_free)
    assert query("check") == {}


def test_death_errors_reach_those_who_wait_for_the_value(warm: None) -> None:
    die = local_copy(kill_self)

    @zray.remote(max_retries=0)
    def doomed() -> None:
        die("os._exit")

    ref = zray.remote(lambda x: x).remote(doomed.remote())
    with pytest.raises(WorkerCrashedError) as raised:
        zray.get(ref, timeout=30)
    assert isinstance(raised.value, exceptions.TaskError)
    assert isinstance(raised.value.cause, WorkerCrashedError)
    assert raised.value.cause.cause is DeathCause.EXIT(3)
