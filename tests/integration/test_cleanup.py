"""However a driver ends, nothing of its session is left within two seconds."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.helpers import Gate, Program, alive, children, stop, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

WITHIN = 2.0
"""Seconds: what is promised after a driver was killed."""

BUSY = """
import subprocess
import numpy as np
context = zray.init(num_cpus=2, object_store_memory=64 << 20)
@zray.remote
class Actor:
    def pid(self):
        return os.getpid()
    def linger(self):
        time.sleep(1000)
@zray.remote
def linger(_=None):
    child = subprocess.Popen(["sleep", "1000"])
    print("started", child.pid, flush=True)
    time.sleep(1000)
actors = [Actor.remote(), Actor.options(name="stays", lifetime="detached", num_cpus=0).remote()]
pids = zray.get([actor.pid.remote() for actor in actors])
kept = [zray.put(np.ones(8 << 20, np.uint8)) for _ in range(12)]  # some of them spilled
kept += [actor.linger.remote() for actor in actors] + [linger.options(num_cpus=0).remote() for _ in range(2)]
kept += [linger.remote(i) for i in range(2000)]
seen = lambda: all(os.path.exists(f"/proc/{pid}") for pid in pids)
assert seen()
print("session", context["session_dir"], flush=True)
print("broker", zray.nodes()[0]["broker_pid"], flush=True)
wait_for(lambda: len(processes_under(os.environ["ZRAY_RUNTIME_DIR"])) >= 9, 20)
print("ready", flush=True)
"""


def start(program: Callable[..., Program], ending: str) -> Program:
    """Start a driver with everything a session can have, which then runs `ending`."""
    running = program(BUSY + ending)
    running.wait_line("ready")
    return running


def segments_of(running: Program) -> list[int]:
    """Processes that map a store, among the program's."""
    found = []
    for pid in running.processes():
        try:
            with open(f"/proc/{pid}/maps") as maps:
                if "zray-store" in maps.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def test_kill_9_of_the_driver(program: Callable[..., Program]) -> None:
    running = start(program, "time.sleep(1000)")
    assert len(running.processes()) >= 9
    assert len(running.sessions()) == 1
    assert len(segments_of(running)) >= 5
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    running.wait_nothing_left(WITHIN)


def test_kill_9_of_the_driver_while_workers_are_stopped(program: Callable[..., Program]) -> None:
    running = start(program, "time.sleep(1000)")
    broker = int(running.wait_line("broker "))
    (fork_parent,) = children(broker)
    for pid in children(fork_parent):
        stop(pid)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    running.wait_nothing_left(WITHIN)


def test_kill_9_of_driver_and_broker(program: Callable[..., Program]) -> None:
    running = start(program, "time.sleep(1000)")
    os.kill(int(running.wait_line("broker ")), signal.SIGKILL)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    wait_for(lambda: not running.processes(), WITHIN, "no process is left")
    # Nobody was left to remove the directory: the next session of this user does.
    (stale,) = running.sessions()
    environment = {**os.environ, "ZRAY_RUNTIME_DIR": running.runtime}
    source = f"""
import os, zray
zray.init(num_cpus=1)
assert {stale!r} not in os.listdir({running.runtime!r})
zray.shutdown()
"""
    from tests.helpers import PROJECT

    done = subprocess.run(
        ["/usr/bin/env", f"PYTHONPATH={PROJECT}", os.sys.executable, "-c", source],  # type: ignore[attr-defined]
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    running.wait_nothing_left(WITHIN)


def test_kill_9_of_a_broker_that_has_not_heard_of_an_exit(program: Callable[..., Program]) -> None:
    running = start(program, "print('actor', pids[0], flush=True); time.sleep(1000)")
    actor = int(running.wait_line("actor "))
    broker = int(running.wait_line("broker "))
    os.kill(broker, signal.SIGSTOP)
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{actor}"), 20, "the exit is reported")
    os.kill(broker, signal.SIGKILL)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    wait_for(lambda: not running.processes(), WITHIN, "no process is left")


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("zray.shutdown()", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('unhandled')", 1),
        ("os._exit(5)", 5),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(1000)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGSEGV); time.sleep(1000)", -signal.SIGSEGV),
        ("import threading; threading.Thread(target=zray.get, args=(kept[-1],), daemon=True).start()", 0),
    ],
    ids=["falls off the end", "shutdown", "sys.exit", "exception", "os._exit", "SIGTERM", "SIGSEGV", "thread in get"],
)
def test_ends_of_the_driver(program: Callable[..., Program], ending: str, status: int) -> None:
    running = start(program, ending)
    assert running.finish(20) == status, running.err
    running.wait_nothing_left(WITHIN)
    if status == 1:
        assert running.err.rstrip().endswith("RuntimeError: unhandled")
    elif status >= 0:
        assert running.err == ""


@pytest.mark.parametrize("where", ["zray.get(kept)", "zray.wait(kept, num_returns=len(kept))", "time.sleep(1000)"])
def test_ctrl_c_ends_the_driver_within_a_second(program: Callable[..., Program], where: str) -> None:
    running = start(program, f"print('here', flush=True)\n{where}")
    running.wait_line("here")
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: everybody in the foreground gets it
    status = running.finish(1.0)
    assert status in (1, 130, -signal.SIGINT)
    assert "KeyboardInterrupt" in running.err
    assert running.err.count("Traceback") == 1, running.err
    running.wait_nothing_left(WITHIN)


def test_ctrl_c_that_is_caught_leaves_the_session_usable(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
try:
    print("waiting", flush=True)
    zray.get(zray.remote(time.sleep).options(num_cpus=0).remote(1000))
except KeyboardInterrupt:
    print("caught")
print("value", zray.get(zray.remote(lambda: 7).remote()))
"""
    )
    running.wait_line("waiting")
    # The handler is Python's own: the interrupt arrives in `get`, or just before it.
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait_line("value ") == "7"
    assert "caught" in running.succeed()
    running.wait_nothing_left(WITHIN)


def test_two_sessions_of_one_user_at_once(program: Callable[..., Program]) -> None:
    source = """
zray.init(num_cpus=1)
me = sys.argv[1]
@zray.remote
class Actor:
    def name(self):
        return me
actor = Actor.options(name="same", namespace="shared").remote() if sys.argv[1] == "first" else None
if actor is None:
    try:
        zray.get_actor("same", namespace="shared")
    except ValueError:
        print("alone")
    actor = Actor.options(name="same", namespace="shared").remote()
else:
    zray.get(actor.name.remote())
print("up", flush=True)
gate = Gate(__import__("pathlib").Path(sys.argv[2]))
gate.wait()
print("still", zray.get(zray.remote(lambda: 5).remote()), sys.argv[1])
"""
    from pathlib import Path

    runtime = os.path.join(os.environ["ZRAY_RUNTIME_DIR"], "both")
    first_gate, second_gate = f"{runtime}-gate1", f"{runtime}-gate2"
    first = program(source, "first", first_gate, env={"ZRAY_RUNTIME_DIR": runtime})
    first.wait_line("up")
    second = program(source, "second", second_gate, env={"ZRAY_RUNTIME_DIR": runtime})
    second.wait_line("up")
    assert "alone" in second.out
    assert len(os.listdir(runtime)) == 2
    Gate(Path(first_gate)).open()
    assert "still 5 first" in first.succeed()
    wait_for(lambda: len(os.listdir(runtime)) == 1, WITHIN)
    Gate(Path(second_gate)).open()
    assert "still 5 second" in second.succeed()
    wait_for(lambda: not os.listdir(runtime), WITHIN)
    os.rmdir(runtime)
    os.unlink(first_gate)
    os.unlink(second_gate)


def test_a_driver_that_is_stopped_keeps_its_session(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
ref = zray.remote(lambda: time.sleep(0.2) or 5).remote()
print("waiting", flush=True)
print("value", zray.get(ref))
"""
    )
    running.wait_line("waiting")
    stop(running.pid)
    # More than a second: long enough for every sweep and tick of the node.
    from time import sleep

    sleep(1.5)
    assert len(running.processes()) >= 3
    os.kill(running.pid, signal.SIGCONT)
    assert running.wait_line("value ") == "5"
    running.succeed()
    running.wait_nothing_left(WITHIN)


def test_a_process_that_a_task_left_in_its_own_session_is_not_ours_but_all_others_are(
    program: Callable[..., Program],
) -> None:
    running = start(program, "time.sleep(1000)")
    grandchildren = wait_for(lambda: [line for line in running.processes().values() if line.startswith("sleep")])
    assert grandchildren
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    running.wait_nothing_left(WITHIN)


def test_drivers_killed_while_they_start(program: Callable[..., Program]) -> None:
    import random

    chance = random.Random(5)
    for _ in range(8):
        running = program("print('go', flush=True)\nzray.init(num_cpus=1)\nprint('in', flush=True)\ntime.sleep(1000)")
        running.wait_line("go")
        moment = chance.random() * 0.25
        try:
            running.process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(running.pid, signal.SIGKILL)
        running.finish()
        wait_for(
            lambda of=running: not of.processes(), WITHIN + 1, f"killed after {moment:.3f} s: {running.processes()}"
        )
        # A directory that nobody could remove goes with the next start (a young one is left to its maker for a minute).
        assert len(running.sessions()) <= 1
        assert not alive(running.pid)


def test_starts_that_are_interrupted_and_survived_leave_nothing(program: Callable[..., Program]) -> None:
    running = program(
        """
import random
class Alarm(BaseException): pass
def alarm(*_): raise Alarm
zray.init(num_cpus=1)  # what is imported at first use is
zray.shutdown()
signal.signal(signal.SIGALRM, alarm)
draw, interrupted = random.Random(1), 0
for _ in range(30):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + draw.random() * 0.15)
            zray.init(num_cpus=1)
            time.sleep(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        interrupted += 1
    zray.shutdown()
wait_for(lambda: not children(os.getpid()) and not os.listdir(os.environ["ZRAY_RUNTIME_DIR"]))
print(interrupted)
"""
    )
    assert running.succeed() == "30\n"
    running.wait_nothing_left(WITHIN)
