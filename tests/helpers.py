"""What integration tests share: waiting for conditions, looking at processes, driver programs of their own, footprints.

Covers observation of real processes from outside (/proc) and from inside (the node's own queries). Does not cover
fixtures (`tests/conftest.py`). Imported by tasks, too, so nothing heavy is imported here.

A node is known by its runtime directory: every process of it has the same ZRAY_RUNTIME_DIR in its environment, also
those whose parent is gone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

PROJECT = Path(__file__).parents[1]
RUNTIME = "ZRAY_RUNTIME_DIR"
SLACK = float(os.environ.get("ZRAY_TEST_SLACK", "1"))
"""Multiplies every deadline: for machines that are much slower, or busy with something else."""
_POLL_S = 0.01


def wait_for(condition: Callable[[], T], timeout: float = 15.0, what: str = "") -> T:
    """Return the first true value of `condition`; AssertionError when there is none within `timeout` seconds."""
    deadline = time.monotonic() + timeout * SLACK
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout * SLACK:g} s: {what or condition} (last value: {value!r})")
        time.sleep(_POLL_S)


# -- processes -------------------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_under(directory: str) -> dict[int, str]:
    """Return the living processes, other than this, whose ZRAY_RUNTIME_DIR is `directory`: pid to command line."""
    mark = f"{RUNTIME}={directory}".encode()
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in _read(f"/proc/{name}/environ").split(b"\0") and alive(int(name)):
                found[int(name)] = _read(f"/proc/{name}/cmdline").replace(b"\0", b" ").decode("utf-8", "replace")[:200]
    return found


def children(pid: int) -> set[int]:
    """Return the ids of a process's children, zombies among them."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found.update(map(int, _read(f"/proc/{pid}/task/{task}/children").split()))
    return found


def all_processes_of(pid: int) -> list[int]:
    """Return the ids of a process and of all that it, or they, have started."""
    found, look = [], [pid]
    while look:
        found.append(look.pop())
        look += children(found[-1])
    return found


def private_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process: what it alone costs (shared segments do not count)."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no RssAnon for {pid}")


def state_of(pid: int) -> str:
    """Return the state letter of a process (R, S, T ...)."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0].decode()


def stop(pid: int) -> None:
    """SIGSTOP a process and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state_of(pid) == "T", what=f"process {pid} stops")


# -- the running node, as it sees itself -------------------------------------------------------------------------------


def query(what: str, argument: str = "") -> Any:
    """Ask the node of the current session about itself."""
    from zray import api

    return api.query(what, argument)


def wait_for_replicas(but: str = "") -> list[str]:
    """Wait until three nodes keep the tables, and decide; return their ids, the head first. but: id of a node that must not be one."""

    def whole() -> bool:
        place = query("cluster")
        return (
            len(place["replicas"]) == 3
            and sorted(place["council"]) == sorted(place["replicas"])
            and but not in place["replicas"]
        )

    wait_for(whole, what="the tables are on three nodes")
    return list(query("cluster")["replicas"])


def broker_pid() -> int:
    """Process id of the current session's broker."""
    import zray

    return int(zray.nodes()[0]["broker_pid"])


def worker_pids() -> set[int]:
    """Process ids of the current session's workers and actors."""
    return {row["pid"] for row in query("workers") if row["pid"]}


def object_state(object_id: str) -> str:
    """Return the state of the object with this hexadecimal id in the node's store, "" when there is none."""
    return next((row["state"] for row in query("objects") if row["object_id"] == object_id), "")


def wait_gone(*object_ids: str, timeout: float = 5.0) -> None:
    """Wait until the store has none of these objects (hexadecimal ids)."""
    wait_for(
        lambda: not {row["object_id"] for row in query("objects")} & set(object_ids), timeout, f"{object_ids} are gone"
    )


def cpus_are_free() -> bool:
    """Whether no task and no actor occupies a CPU."""
    import zray

    return bool(zray.available_resources().get("CPU", 0.0) == zray.cluster_resources().get("CPU", 0.0))


# -- gates: tasks that wait until a test lets them go ------------------------------------------------------------------


class Gate:
    """A file that tasks wait for; made by a test. Works in every process, also ones that are to be killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        self.path.touch()

    @property
    def is_open(self) -> bool:
        return self.path.exists()

    def wait(self, timeout: float = 60.0) -> None:
        wait_for(lambda: self.is_open, timeout, f"gate {self.path.name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, (self.path,)


class Tally:
    """Counts events over all processes: a file that grows by a line for each, written before the event can be lost."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, text: object = "") -> int:
        """Note an event; return how many there are now."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, f"{text}\n".encode())
        finally:
            os.close(fd)
        return len(self)

    @property
    def lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines()
        except FileNotFoundError:
            return []

    def __len__(self) -> int:
        return len(self.lines)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return Tally, (self.path,)


class Keeper:
    """An actor class: keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, *things: Any) -> None:
        self.kept.append(things)

    def keep_value(self, value: Any) -> None:
        self.kept.append(value)

    def read(self) -> Any:
        import zray

        return zray.get(self.kept[-1][0][0])

    def forget(self) -> None:
        self.kept.clear()

    def pid(self) -> int:
        return os.getpid()


# -- driver programs of their own ----------------------------------------------------------------------------------------

_PRELUDE = """\
import os, signal, sys, time
import zray
from tests.helpers import *
"""


class Program:
    """A driver program in a process, runtime directory and temporary directory of its own; warnings are errors."""

    def __init__(
        self, source: str, place: Path, runtime: str, *arguments: str, env: dict[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            source: the program's text, after an import of os, signal, sys, time, zray and these helpers.
            place: an existing directory for its files.
            runtime: its runtime directory (a short name).
            arguments: its sys.argv[1:].
            env: variables on top of this process's.
        """
        self.runtime = runtime
        self.temporary = place / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.file = place / "program.py"
        self.file.write_text(_PRELUDE + source)
        environment = {**os.environ, RUNTIME: runtime, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environment.get("PYTHONPATH", "")]))
        environment.update(env or {})
        self._out, self._err = place / "out", place / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", str(self.file), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=place,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def wait_line(self, start: str, timeout: float = 30.0) -> str:
        """Wait until it prints a whole line that begins with `start`; return the rest of that line."""

        def find() -> str | None:
            lines = self.out.split("\n")[:-1]
            found = [line for line in lines if line.startswith(start)]
            if not found and self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before {start!r}:\n{self.out}\n{self.err}")
            return found[0] + "\n" if found else None

        return wait_for(find, timeout, f"line {start!r} of {self.file}:\n{self.err}")[len(start) :].strip()

    def finish(self, timeout: float = 60.0) -> int:
        """Wait for its end; return its exit status (negative: signal)."""
        return self.process.wait(timeout * SLACK)

    def succeed(self, timeout: float = 60.0) -> str:
        """Wait for its end, which must be a good one; return what it printed."""
        status = self.finish(timeout)
        assert status == 0, f"status {status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        return self.out

    def processes(self) -> dict[int, str]:
        """Its processes that live: the program, its node, and everything they started."""
        return processes_under(self.runtime)

    def sessions(self) -> list[str]:
        """Names of its session directories."""
        try:
            return sorted(os.listdir(self.runtime))
        except FileNotFoundError:
            return []

    def leftovers(self) -> list[object]:
        """Everything of it that exists: processes, runtime files, temporary files."""
        return [*self.processes().items(), *self.sessions(), *sorted(map(str, self.temporary.iterdir()))]

    def wait_nothing_left(self, timeout: float = 2.0) -> None:
        """Wait until nothing of it is left."""
        wait_for(lambda: not self.leftovers(), timeout, f"nothing is left of {self.file}: {self.leftovers()}")

    def destroy(self) -> None:
        """End whatever still runs, for the next test's sake."""
        for pid in (*self.processes(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


# -- footprints ------------------------------------------------------------------------------------------------------------


class Footprint(NamedTuple):
    """What this process has that could leak."""

    threads: frozenset[str]
    descriptors: frozenset[str]
    children: frozenset[int]
    segments: int
    node: frozenset[str]
    """Processes and files under the runtime directory."""

    @classmethod
    def take(cls) -> Footprint:
        runtime = os.environ[RUNTIME]
        files = [os.path.join(at, name) for at, _, names in os.walk(runtime) for name in names]
        running = [f"{pid} {line}" for pid, line in processes_under(runtime).items()]
        return cls(
            frozenset(_threads()),
            frozenset(_descriptors()),
            frozenset(children(os.getpid())),
            sum(b"zray-store" in line for line in _read("/proc/self/maps").splitlines()),
            frozenset([*files, *running, *(name for name in os.listdir("/dev/shm") if "zray" in name)]),
        )

    def leaks_since(self, before: Footprint) -> list[str]:
        """What is here and was not before."""
        found = [
            *(f"thread {thread}" for thread in sorted(self.threads - before.threads)),
            *(f"descriptor {descriptor}" for descriptor in sorted(self.descriptors - before.descriptors)),
            *(f"child process {pid}" for pid in sorted(self.children - before.children)),
            *(f"of the node: {thing}" for thing in sorted(self.node - before.node)),
        ]
        if self.segments > before.segments:
            found.append(f"{self.segments - before.segments} mappings of a store")
        return found


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if not thread.name.startswith("pytest_timeout"):
            yield f"{thread.name} {thread.ident}"
    # Threads that C libraries start have no Python object; ZeroMQ's are ours, those of BLAS and the like are not.
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            name = _read(f"/proc/self/task/{task}/comm").decode().strip()
            if name.startswith(("ZMQ", "zray")):
                yield f"{name} {task}"


def _descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                yield f"{name} -> {target}"


def check_leaks(before: Footprint, timeout: float = 3.0) -> None:
    """AssertionError when this process keeps something that it did not have in `before`."""
    gc.collect()
    leaks = Footprint.take().leaks_since(before)
    deadline = time.monotonic() + timeout * SLACK
    while leaks and time.monotonic() < deadline:
        time.sleep(0.02)
        gc.collect()
        leaks = Footprint.take().leaks_since(before)
    assert not leaks, "left behind:\n  " + "\n  ".join(leaks)


_AGAIN_S = 0.05
"""An interrupt that came in a destructor is lost; the next comes so much later."""


def until_interrupted(seconds: float, step: Callable[[], object]) -> None:
    """Repeat a step until KeyboardInterrupt is raised in it after some time, as by the handler of a signal."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def drop(_: object) -> None:
        """Python allows nothing else with what is raised in a destructor; kept (by pytest), it would keep the step's variables."""

    before = signal.signal(signal.SIGALRM, interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, drop
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
        while True:
            step()
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
