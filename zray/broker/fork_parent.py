"""The fork parent: a clean, preloaded, single-threaded process whose children are the workers.

Covers forking on request and reporting exits. Does not cover what workers do (`zray.worker`) or when one is wanted (the scheduler).
It is forked from the broker's process before that makes any thread or ZeroMQ context, and talks to it over one SEQPACKET socket pair:
msgpack records, one per packet. When the broker ends, however it ends, the socket is at its end of file: the fork parent kills the workers with
all that they started, and goes. Should it be killed itself, its children die with it (parent death signal).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import threading
from typing import Final, NoReturn

import msgspec

from zray import _store
from zray.worker import WorkerConfig

_PACKET: Final = 1 << 18
_ALWAYS: Final = ("zray.api", "zray.actor", "zray.remote_function", "cloudpickle")
"""What nearly every worker needs."""
_THREAD_LIMITS: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Fork(msgspec.Struct, tag=True):
    """Broker -> fork parent: make a worker."""

    config: WorkerConfig
    environment: dict[str, str]
    """Set before any user code; a name with an empty value stays as the user set it."""
    log_file: str
    """Without suffix: standard output goes to `.out`, standard error to `.err`."""
    title: str


class Started(msgspec.Struct, tag=True):
    """Fork parent -> broker."""

    worker: int
    pid: int


class Failed(msgspec.Struct, tag=True):
    """Fork parent -> broker: no process could be made."""

    worker: int
    reason: str


class Exited(msgspec.Struct, tag=True):
    """Fork parent -> broker: confirmed exit. `status` as os.waitstatus_to_exitcode."""

    pid: int
    status: int
    peak_rss: int
    """Bytes."""


Report = Started | Failed | Exited
_encode = msgspec.msgpack.Encoder().encode
_decode_fork = msgspec.msgpack.Decoder(Fork).decode
_workers: set[int] = set()
"""Children that have not been reaped: their process ids, which are ids of their groups, too."""
decode_report = msgspec.msgpack.Decoder(Report).decode
encode_fork = msgspec.msgpack.Encoder().encode


def serve(channel: socket.socket, preload: list[str]) -> NoReturn:
    """Be the fork parent until the broker closes the channel. `preload`: modules imported once for all workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    pending_preload = [*_ALWAYS, *preload]
    if "numpy" in preload:
        pending_preload.append("numpy.random")  # loaded lazily by numpy, and dear: every worker reseeds it
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    try:
        while True:
            # Preloading waits until nobody waits for a worker; each module is followed by a look at the channel.
            ready = dict(poller.poll(0 if pending_preload else None))
            if channel.fileno() in ready:
                packet = channel.recv(_PACKET)
                if not packet:
                    _end()
                _fork(channel, _decode_fork(packet), (wake_read, wake_write))
            elif pending_preload and not ready:
                _preload(pending_preload.pop(0))
            if wake_read in ready:
                os.read(wake_read, 4096)
                _report_exits(channel)
    except ConnectionError:  # not an end of file when the broker dies with reports unread
        _end()


def _end() -> NoReturn:
    """The broker is gone: end every worker with its group, then this process."""
    for pid in _workers:
        for kill in (os.killpg, os.kill):
            try:
                kill(pid, signal.SIGKILL)
            except OSError:
                continue
    os._exit(0)


def _preload(module: str) -> None:
    """Import a module for all future workers. BLAS libraries are kept to one thread here, so that this process stays single-threaded."""
    added = [name for name in _THREAD_LIMITS if name not in os.environ]
    for name in added:
        os.environ[name] = "1"
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"[zray] cannot preload {module}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        for name in added:
            os.environ.pop(name, None)
    if threading.active_count() != 1 or len(os.listdir("/proc/self/task")) != 1:
        print(f"[zray] preloading {module} started threads; workers forked from now on may misbehave", file=sys.stderr)
    gc.collect()
    gc.freeze()


def _report_exits(channel: socket.socket) -> None:
    while True:
        try:
            exited = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if exited is None:
            return
        # What it has started goes with it, at once: the broker may not live to hear of this exit. Before it is reaped its id is nobody else's.
        with contextlib.suppress(OSError):
            os.killpg(exited.si_pid, signal.SIGKILL)
        pid, status, usage = os.wait4(exited.si_pid, 0)
        _workers.discard(pid)
        channel.send(_encode(Exited(pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)))


def _fork(channel: socket.socket, request: Fork, close: tuple[int, int]) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        channel.send(_encode(Failed(request.config.number, f"fork: {error.strerror}")))
        return
    if pid:
        _workers.add(pid)
        channel.send(_encode(Started(request.config.number, pid)))
        return
    try:
        _become_worker(channel, request, close)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)


def _become_worker(channel: socket.socket, request: Fork, close: tuple[int, int]) -> NoReturn:
    """In the child: leave everything of the fork parent behind and run the worker."""
    _store.die_with_parent()
    if os.getppid() == 1:
        os._exit(0)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.close()
    for fd in close:
        os.close(fd)
    for target, suffix in ((1, ".out"), (2, ".err")):
        log = os.open(request.log_file + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(log, target)
        os.close(log)
    for name, value in request.environment.items():
        if name in _THREAD_LIMITS and name in os.environ:
            continue
        os.environ[name] = value
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    from zray import worker

    worker.main(request.config)
    os._exit(0)
