"""One side of a comparison: a process that opens rows and measures blocks when told, over a pipe of JSON lines.

Covers how each system is started and given Ray's names (`start`), the process that serves (`python -m perf.sides
NAME`) and the object that drives it (`Side`). Does not cover what is measured (`rows.py`, `floors.py`) or in which
order (`compare.py`). Each side has a process and an environment of its own, so that no side's threads, imports or
shutdown touch another's, and both can be measured in turn in one run.

Lines to a side: {"do": "open" | "block" | "sample" | "close" | "end", "row": name, ...}; each is answered by one line,
{"error": traceback} if it failed. A side keeps its own standard output for the answers; whatever a library prints there
goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from . import timing
from .floors import FLOORS
from .remote_rows import REMOTE_FLOORS, REMOTE_ROWS
from .rows import ROWS, Row

CPUS = 2
"""Workers on every side."""

ROOT = Path(__file__).resolve().parent.parent

RAY_LIKE = frozenset(
    {"tasks", "objects", "large objects", "nested", "wait", "actors", "async actors", "concurrent actors", "kill"}
)

ABILITIES: dict[str, frozenset[str]] = {
    "zray": RAY_LIKE,
    "ray": RAY_LIKE,
    "zray cluster": RAY_LIKE,
    "ray cluster": RAY_LIKE,
    "distributed": frozenset({"tasks", "objects", "actors"}),
    "multiprocessing.Pool": frozenset({"tasks"}),
    "ProcessPoolExecutor": frozenset({"tasks"}),
    "loky": frozenset({"tasks"}),
    "floors": frozenset(),
}
"""What each side can do, in the words of `Row.needs`."""


class SideError(RuntimeError):
    """A side failed at what it was told, or died, or took too long; the message holds what it said last."""


# ---- starting each system


class Remote:
    """Something with a `.remote`, as the rows call it: the system's own function as an attribute, without detours."""

    __slots__ = ("remote",)

    def __init__(self, remote: Callable[..., object]) -> None:
        self.remote = remote


class FuturesApi:
    """Ray's names over a `concurrent.futures` executor (the standard library's process pool, loky)."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def remote(self, function: Callable[..., object]) -> Remote:
        return Remote(functools.partial(self._executor.submit, function))

    def get(self, futures: Any) -> object:
        return [future.result() for future in futures] if isinstance(futures, list) else futures.result()


class PoolApi:
    """Ray's names over `multiprocessing.Pool`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def remote(self, function: Callable[..., object]) -> Remote:
        apply_async = self._pool.apply_async
        return Remote(lambda *arguments: apply_async(function, arguments))

    def get(self, results: Any) -> object:
        return [result.get() for result in results] if isinstance(results, list) else results.get()


class DistributedActor:
    """A Dask actor whose methods are reached as `actor.method.remote()`."""

    def __init__(self, actor: Any) -> None:
        self.small_value = Remote(actor.small_value)
        self.small_value_of = Remote(actor.small_value_of)


class DistributedApi:
    """Ray's names over a `distributed.Client`; tasks are impure, as a remote function is: each call runs."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def remote(self, function: Any = None, **_options: object) -> Any:
        if function is None:
            return self.remote
        if isinstance(function, type):
            submit = self._client.submit
            return Remote(lambda: DistributedActor(submit(function, actor=True).result()))
        return Remote(functools.partial(self._client.submit, function, pure=False))

    def put(self, value: object) -> object:
        return self._client.scatter(value, hash=False)

    def get(self, futures: Any) -> object:
        if not isinstance(futures, list):
            return futures.result()
        if futures and hasattr(futures[0], "key"):
            return self._client.gather(futures)
        return [future.result() for future in futures]

    def kill(self, _actor: object) -> None:
        """Nothing to do: a Dask actor goes with its last reference."""


@contextlib.contextmanager
def _start_zray() -> Iterator[Any]:
    zray = import_module("zray")
    zray.init(num_cpus=CPUS)
    try:
        yield zray
    finally:
        zray.shutdown()


def ray_options() -> dict[str, Any]:
    """Return how Ray is started: its defaults without what only costs it time (dashboard, logs, usage reports)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return {"num_cpus": CPUS, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def _start_ray() -> Iterator[Any]:
    options = ray_options()
    ray = import_module("ray")
    ray.init(**options)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _start_cluster(api: Any, cluster_class: Any, **head: Any) -> Iterator[Any]:
    """Two nodes; the driver is on the first, and the second has what rows of `remote_rows` ask for."""
    cluster = cluster_class(initialize_head=True, head_node_args={"num_cpus": 0, **head})
    try:
        cluster.add_node(num_cpus=CPUS, resources={"there": 1000})
        options = {} if api.__name__ == "zray" else {"log_to_driver": False, "logging_level": logging.ERROR}
        api.init(address=cluster.address, **options)
        cluster.wait_for_nodes()
        try:
            yield api
        finally:
            api.shutdown()
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def _start_zray_cluster() -> Iterator[Any]:
    with _start_cluster(import_module("zray"), import_module("zray.cluster_utils").Cluster) as api:
        yield api


@contextlib.contextmanager
def _start_ray_cluster() -> Iterator[Any]:
    ray_options()  # its environment
    ray = import_module("ray")
    with _start_cluster(ray, import_module("ray.cluster_utils").Cluster, include_dashboard=False) as api:
        yield api


@contextlib.contextmanager
def _start_pool() -> Iterator[Any]:
    import multiprocessing

    with multiprocessing.Pool(CPUS) as pool:
        yield PoolApi(pool)


@contextlib.contextmanager
def _start_executor() -> Iterator[Any]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(CPUS) as executor:
        yield FuturesApi(executor)


@contextlib.contextmanager
def _start_loky() -> Iterator[Any]:
    executor = import_module("loky").get_reusable_executor(max_workers=CPUS, timeout=3600)
    try:
        yield FuturesApi(executor)
    finally:
        executor.shutdown(wait=True)


@contextlib.contextmanager
def _start_distributed() -> Iterator[Any]:
    distributed = import_module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=CPUS, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield DistributedApi(client)


@contextlib.contextmanager
def _start_floors() -> Iterator[Any]:
    yield None


STARTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "zray": _start_zray,
    "ray": _start_ray,
    "zray cluster": _start_zray_cluster,
    "ray cluster": _start_ray_cluster,
    "distributed": _start_distributed,
    "multiprocessing.Pool": _start_pool,
    "ProcessPoolExecutor": _start_executor,
    "loky": _start_loky,
    "floors": _start_floors,
}


def start(name: str) -> AbstractContextManager[Any]:
    """Start a system with two workers; the context's value has Ray's names. KeyError for a name that nobody knows."""
    return STARTS[name]()


def can_run(name: str, row: Row) -> bool:
    """Return whether the side called `name` has what the row needs."""
    return row.needs <= ABILITIES[name]


# ---- the process that serves

_SERVED: dict[str, Row] = {**ROWS, **FLOORS, **REMOTE_ROWS, **REMOTE_FLOORS}


class Served:
    """What a side has open: rows by name, each with its function and the way to close it."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._open: dict[str, tuple[Row, Callable[[], object], contextlib.ExitStack]] = {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do one order and return its answer. Any exception of the row passes through."""
        name = order.get("row", "")
        if order["do"] == "open":
            row = _SERVED[name]
            stack = contextlib.ExitStack()
            call = stack.enter_context(row.open(self._api))
            self._open[name] = (row, call, stack)
            timing.warm_up(call, order["seconds"], order.get("warm_calls", row.warm_calls))
            return {}
        row, call, stack = self._open[name]
        if order["do"] == "block":
            return asdict(timing.run_block(call, row.operations, order["seconds"]))
        if order["do"] == "sample":
            return {"nanoseconds": timing.sample(call, order["seconds"])}
        if order["do"] == "close":
            del self._open[name]
            stack.close()
            return {}
        raise ValueError(f"nobody knows how to do {order['do']!r}")


def serve(name: str, orders: IO[str], answers: IO[str]) -> None:
    """Start the system `name` and answer orders until "end" or the end of the pipe; then stop it."""

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    with start(name) as api:
        say({"ready": name, "versions": timing.installed_versions()})
        served = Served(api)
        for line in orders:
            order = json.loads(line)
            if order["do"] == "end":
                break
            try:
                say(served.answer(order))
            except Exception:
                say({"error": traceback.format_exc()})
    say({})


# ---- the object that drives it


def environment() -> dict[str, str]:
    """Return the environment of every measuring process: this tree is importable, also by workers started later."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Side:
    """Drive the process of one side. A context manager: the process group is ended at exit, whatever happened.

    `python` is the interpreter of the side's environment; `patience` the seconds after which an answer counts as lost.
    """

    def __init__(self, name: str, python: str = sys.executable, *, patience: float = 300.0) -> None:
        self.name = name
        self.patience = patience
        self.versions: dict[str, str] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end(), lives as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "perf.sides", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=environment(),
            text=True,
            start_new_session=True,
        )
        try:
            self.versions = self._receive(patience)["versions"]
        except BaseException:
            self.kill()
            self._errors.close()
            raise

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, do: str, row: str, **details: Any) -> dict[str, Any]:
        """Send one order and return its answer. SideError if it failed, or no answer came in `patience` seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "row": row, **details}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SideError(f"{self.name} is gone ({error}): {self._last_words()}") from error
        answer = self._receive(self.patience)
        if "error" in answer:
            raise SideError(f"{self.name}, {row}: {answer['error']}")
        return answer

    def block(self, row: str, seconds: float) -> timing.Block:
        """Measure one block of an open row."""
        return timing.Block(**self.ask("block", row, seconds=seconds))

    def sample(self, row: str, seconds: float) -> list[int]:
        """Time single calls of an open row; nanoseconds each."""
        nanoseconds: list[int] = self.ask("sample", row, seconds=seconds)["nanoseconds"]
        return nanoseconds

    def _receive(self, patience: float) -> dict[str, Any]:
        # Answers are single lines and only one is ever under way, so readiness of the pipe means a whole line is near.
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        if not ready:
            self.kill()
            raise SideError(f"{self.name} did not answer for {patience:.0f} s: {self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            self.kill()
            raise SideError(f"{self.name} ended ({self._process.returncode}): {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        if self._errors.closed:
            return "(nothing on standard error)"
        self._errors.seek(0)
        return self._errors.read()[-4000:].strip() or "(nothing on standard error)"

    def end(self) -> None:
        """Stop the system in good order, or kill what is left of it after half a minute."""
        process = self._process
        if process.poll() is None and process.stdin is not None:
            with contextlib.suppress(OSError, SideError):
                process.stdin.write('{"do": "end"}\n')
                process.stdin.flush()
                self._receive(30.0)
            deadline = time.monotonic() + 30.0
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        self.kill()
        self._errors.close()

    def kill(self) -> None:
        """End the side's process group at once."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def main() -> int:
    """Serve the side named on the command line over this process's standard input and output."""
    # Answers get a descriptor of their own that children do not inherit; descriptor 1 becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
