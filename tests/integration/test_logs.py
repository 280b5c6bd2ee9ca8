"""What tasks print is on the driver's terminal, prefixed, before `get` returns; files are capped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.helpers import Program

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow


def test_output_comes_before_get_returns(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=2)
@zray.remote
def speak(i):
    print(f"hello {i}")
    print(f"worry {i}", file=sys.stderr)
    return os.getpid()
for i in range(20):
    print("pid", i, zray.get(speak.remote(i)))
    print("after", i, file=sys.stderr)
"""
    )
    lines = running.succeed().splitlines()
    assert len(lines) == 40
    for i in range(20):
        said, pid = lines[2 * i : 2 * i + 2]
        number = pid.split()[2]
        assert said == f"(speak pid={number}) hello {i}"
    errors = running.err.splitlines()
    assert len(errors) == 40
    for i in range(20):
        assert re.fullmatch(rf"\(speak pid=\d+\) worry {i}", errors[2 * i])
        assert errors[2 * i + 1] == f"after {i}"


def test_every_way_of_printing(program: Callable[..., Program]) -> None:
    running = program(
        """
import subprocess
zray.init(num_cpus=1)
@zray.remote
def speak():
    sys.stdout.write("no newline")
    sys.stdout.flush()
    os.write(1, b" and raw\\n")
    subprocess.run(["echo", "from a child"])
    print("ünïcödé", end="\\n\\n")
    print("several\\nlines")
    print("\\tindented")
@zray.remote
class Speaker:
    def __init__(self):
        print("constructed")
    def speak(self):
        print("method")
zray.get(speak.remote())
speaker = Speaker.remote()
zray.get(speaker.speak.remote())
print("end")
"""
    )
    lines = running.succeed().splitlines()
    texts = [re.sub(r"^\((speak|Speaker|Speaker\.speak|Speaker\.__init__) pid=\d+\) ", "", line) for line in lines]
    assert texts == [
        "no newline and raw",
        "from a child",
        "ünïcödé",
        "",
        "several",
        "lines",
        "\tindented",
        "constructed",
        "method",
        "end",
    ]
    assert all(line.startswith("(") for line in lines[:-1])


def test_output_of_failing_and_dying_tasks(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
@zray.remote
def fail():
    print("before the error")
    raise ValueError
@zray.remote(max_retries=0)
def die():
    print("before the end", flush=True)
    os.kill(os.getpid(), 9)
for work in (fail, die):
    try:
        zray.get(work.remote())
    except Exception as error:
        print("caught", type(error).__name__)
"""
    )
    lines = running.succeed().splitlines()
    assert [line.partition(") ")[2] or line for line in lines[:2]] == ["before the error", "caught ValueError"] or (
        lines[1].startswith("caught")
    )
    assert "before the end" in lines[2]
    assert lines[3] == "caught WorkerCrashedError"


def test_nothing_of_much_output_is_lost(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=2)
@zray.remote
def chatter(n):
    for i in range(5000):
        print(f"line {n} {i}", "x" * 50)
zray.get([chatter.remote(n) for n in range(4)])
print("end")
"""
    )
    lines = running.succeed().splitlines()
    assert lines[-1] == "end"
    seen: dict[str, list[int]] = {}
    for line in lines[:-1]:
        found = re.fullmatch(r"\(chatter pid=\d+\) line (\d) (\d+) x+", line)
        assert found, line
        seen.setdefault(found[1], []).append(int(found[2]))
    assert seen == {str(n): list(range(5000)) for n in range(4)}


def test_output_of_a_running_task_appears_meanwhile(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
@zray.remote
def linger():
    print("I am at it", flush=True)
    time.sleep(1000)
ref = linger.remote()
time.sleep(1000)
"""
    )
    assert running.wait_line("(linger pid=").endswith("I am at it")


def test_output_that_nobody_gets_appears_before_the_end(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
@zray.remote
def speak(i):
    print("heard", i)
refs = [speak.remote(i) for i in range(10)]
zray.wait(refs, num_returns=10)
"""
    )
    assert [line.partition(") ")[2] for line in running.succeed().splitlines()] == [f"heard {i}" for i in range(10)]


def test_output_of_nested_tasks_reaches_the_driver(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
@zray.remote
def child():
    print("deep")
@zray.remote
def parent():
    zray.get(child.remote())
    print("shallow")
zray.get(parent.remote())
print("end")
"""
    )
    lines = running.succeed().splitlines()
    assert lines[-1] == "end"
    assert sorted(re.sub(r" pid=\d+", "", line) for line in lines[:-1]) == ["(child) deep", "(parent) shallow"]


def test_log_to_driver_can_be_turned_off(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1, log_to_driver=False)
@zray.remote
def speak():
    print("unheard")
zray.get(speak.remote())
print("end")
"""
    )
    assert running.succeed() == "end\n"
    assert running.err == ""


def test_log_files_are_capped(program: Callable[..., Program]) -> None:
    running = program(
        """
context = zray.init(num_cpus=1, log_to_driver=False)
@zray.remote
def flood():
    for _ in range(100):
        print("x" * 99_999)
for _ in range(8):
    zray.get(flood.remote())
logs = os.path.join(context["session_dir"], "logs")
print(max(os.stat(os.path.join(logs, name)).st_blocks * 512 for name in os.listdir(logs)))
"""
    )
    assert int(running.succeed()) < 40 << 20


def test_warnings_of_zray_are_marked_as_its_own(program: Callable[..., Program]) -> None:
    running = program(
        """
zray.init(num_cpus=1)
print(zray.get(zray.remote(lambda: 1).remote()))
"""
    )
    assert running.succeed() == "1\n"
    assert running.err == "", "a program that does nothing wrong hears nothing"


def test_threads_that_submit_while_their_worker_ends_are_quiet(program: Callable[..., Program]) -> None:
    running = program(
        """
import threading
@zray.remote
def same(value):
    return value
def busy():
    while True:
        zray.get(same.remote(1))
        zray.put(b"1" * 1000)
@zray.remote(num_cpus=0)
class Starter:
    def start(self):
        for _ in range(3):
            threading.Thread(target=busy, daemon=True).start()
    def leave(self):
        zray.exit_actor()
@zray.remote(max_retries=0)
def start_and_end():
    for _ in range(3):
        threading.Thread(target=busy, daemon=True).start()
    raise SystemExit(0)
zray.init(num_cpus=2)
for _ in range(10):
    actor = Starter.remote()
    zray.get(actor.start.remote())
    actor.leave.remote()
    try:
        zray.get(start_and_end.remote(), timeout=30)
    except zray.exceptions.ZrayError:
        pass
zray.shutdown()
"""
    )
    running.succeed()
    assert running.err == ""
