"""fork and multiprocessing inside tasks, actors and the driver."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import alive, broker_pid, wait_for, wait_gone

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.helpers import Program

pytestmark = [
    pytest.mark.usefixtures("warm"),
    # Python 3.12 and later warn of any fork in a process with threads; what happens then is what is tested.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def finish(pid: int) -> int:
    """Wait for a child; return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_pool_in_a_task(method: str) -> None:
    @zray.remote(max_retries=0)
    def work() -> Any:
        import multiprocessing

        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(abs, range(-50, 0)), pool.apply(os.getpid) != os.getpid()

    assert zray.get(work.remote(), timeout=90) == (list(range(50, 0, -1)), True)


def test_a_multiprocessing_pool_in_an_actor() -> None:
    class Parallel:
        def __init__(self) -> None:
            import multiprocessing

            self.pool = multiprocessing.get_context("fork").Pool(2)

        def work(self, n: int) -> list[int]:
            return self.pool.map(abs, range(-n, 0))

        def close(self) -> None:
            self.pool.terminate()
            self.pool.join()

    actor = zray.remote(Parallel).remote()
    for n in (1, 10, 100):
        assert zray.get(actor.work.remote(n), timeout=60) == list(range(n, 0, -1))
    zray.get(actor.close.remote())


def test_a_process_pool_executor_in_a_task() -> None:
    @zray.remote(max_retries=0)
    def work() -> list[int]:
        import concurrent.futures
        import multiprocessing

        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            return list(pool.map(abs, [-1, -2, -3]))

    assert zray.get(work.remote(), timeout=60) == [1, 2, 3]


def test_subprocesses_in_a_task() -> None:
    @zray.remote
    def work() -> str:
        import subprocess

        return subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout

    assert zray.get(work.remote()) == "hello\n"


def test_a_forked_child_uses_zray_itself() -> None:
    @zray.remote(max_retries=0)
    def work(array: Any, box: list[Any]) -> Any:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                put = zray.get(zray.put(np.full(100_000, 2.0)))
                done = zray.get(zray.remote(lambda x: x + 1).remote(5), timeout=30)
                parts = float(array.sum()), float(zray.get(box[0]).sum()), float(put.sum()), done
                os.write(writer, repr(parts).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with open(reader, "rb") as pipe:
            text = pipe.read().decode()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        again = zray.get(zray.remote(lambda x: x * 2).remote(5), timeout=30)
        return status, text, again

    one = zray.put(np.ones(100_000))
    for _ in range(12):  # child and parent go on from the same place: their ids must not meet
        status, text, again = zray.get(work.remote(one, [one]), timeout=60)
        assert (status, text, again) == (0, "(100000.0, 100000.0, 200000.0, 6)", 10)


def test_a_child_keeps_what_it_inherited(tmp_path: Path) -> None:
    """The parent drops its view at once: the child's memory must stay."""

    @zray.remote(max_retries=0)
    def work(box: list[Any]) -> int:
        view = zray.get(box[0])
        ready, release = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                os.write(ready[1], b".")
                os.read(release[0], 1)
                status = 0 if bool((view == 7).all()) else 4
            finally:
                os._exit(status)
        os.read(ready[0], 1)
        del view
        box.clear()
        (tmp_path / "dropped").touch()
        for _ in range(20):
            zray.put(np.zeros(2_000_000, np.uint8))
        os.write(release[1], b".")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    ref = zray.put(np.full(2_000_000, 7, np.uint8))
    name = ref.hex()
    result = work.remote([ref])
    del ref
    assert zray.get(result, timeout=60) == 0
    del result
    wait_gone(name)


def test_children_of_the_driver(tmp_path: Path) -> None:
    ref = zray.put(np.arange(100_000))
    array = zray.get(ref)
    broker = broker_pid()
    for how in ("exit", "use", "shutdown"):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if how == "use":
                    assert int(array.sum()) == int(zray.get(ref).sum())
                    assert zray.get(zray.remote(lambda: 6).remote(), timeout=30) == 6
                elif how == "shutdown":
                    zray.shutdown()
                status = 0
            finally:
                os._exit(status)
        assert finish(pid) == 0, how
        # The session is the parent's: no child's end may end it.
        assert alive(broker)
        assert zray.get(zray.remote(lambda: 5).remote(), timeout=30) == 5
        assert int(array.sum()) == int(zray.get(ref).sum())


def test_a_child_whose_interpreter_ends(program: Callable[..., Program]) -> None:
    # In a program of its own: the end of an interpreter runs whatever this test run registered for its own end.
    driver = program(
        """
import warnings
import numpy as np

warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
ref = zray.put(np.arange(100_000))
array = zray.get(ref)
pid = os.fork()
if pid == 0:
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
# The session is the parent's: no child's end may end it.
assert zray.get(zray.remote(lambda: 5).remote(), timeout=30) == 5
assert int(array.sum()) == int(zray.get(ref).sum())
print("still there")
"""
    )
    assert driver.succeed().strip() == "still there"


def test_a_pool_of_the_drivers_own() -> None:
    import multiprocessing

    ref = zray.put(np.ones(1000))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
        pool.close()
        pool.join()
    assert zray.get(ref).sum() == 1000
    assert zray.get(zray.remote(lambda: 5).remote()) == 5


def test_threads_and_children_of_a_task_do_not_end_up_with_others(tmp_path: Path) -> None:
    @zray.remote(max_retries=0)
    def orphan() -> int:
        pid = os.fork()
        if pid == 0:
            import time

            time.sleep(1000)
            os._exit(0)
        return pid

    pid = zray.get(orphan.remote())
    assert alive(pid)
    assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(50)]) == list(range(50))
    zray.shutdown()
    wait_for(lambda: not alive(pid), what="what a task forked ends with the session")


def test_signals_of_a_forked_child_are_ordinary() -> None:
    @zray.remote(max_retries=0)
    def work() -> int:
        import signal

        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert zray.get(work.remote(), timeout=30) == -15


@zray.remote
def square(number: int) -> int:
    return number * number


@zray.remote(num_cpus=0)
class Count:
    def __init__(self) -> None:
        self.count = 0

    def increase(self) -> int:
        self.count += 1
        return self.count


def test_functions_and_handles_that_were_used_before_the_fork() -> None:
    counter = Count.remote()
    assert zray.get([square.remote(3), counter.increase.remote()]) == [9, 1]
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if zray.get([square.remote(4), *[counter.increase.remote() for _ in range(3)]], timeout=30) == [
                16,
                2,
                3,
                4,
            ]:
                status = 0
        finally:
            os._exit(status)
    assert finish(pid) == 0
    assert zray.get([square.remote(5), counter.increase.remote()], timeout=30) == [25, 5]


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 1), ("exit", 7)])
def test_a_child_that_leaves_the_tasks_function_ends(how: str, status: int) -> None:
    @zray.remote(max_retries=0)
    def work() -> int:
        pid = os.fork()
        if pid == 0:
            if how == "raise":
                raise ValueError("in the child")
            if how == "exit":
                raise SystemExit(7)
            return -1
        return finish(pid)

    class Worker:
        def work(self) -> int:
            pid = os.fork()
            if pid == 0:
                if how == "raise":
                    raise ValueError("in the child")
                if how == "exit":
                    raise SystemExit(7)
                return -1
            return finish(pid)

        def again(self) -> int:
            return 5

    actor = zray.remote(Worker).remote()
    assert zray.get([work.remote(), actor.work.remote(), actor.again.remote()], timeout=30) == [status, status, 5]


@pytest.mark.slow
def test_many_forks() -> None:
    @zray.remote(max_retries=0)
    def breed(array: Any) -> list[int]:
        statuses = []
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                os._exit(int(array[0]))
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return statuses

    ref = zray.put(np.full(100_000, 9))
    assert zray.get([breed.remote(ref) for _ in range(3)], timeout=60) == [[9] * 30] * 3
    name = ref.hex()
    del ref
    wait_gone(name)
