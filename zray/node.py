"""Starting and finding a node: the runtime directory, what the machine has, the broker's process.

Covers all that happens between `zray.init()` and a served socket. Does not cover what the driver then does (`zray.session`).
Directories: `$ZRAY_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/zray`, else `/tmp/zray-<uid>`, with mode 0700; in it one directory a session. Nothing else is
written anywhere, and no TCP port is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from typing import Final

import msgspec

from zray import errors, ids
from zray.broker.config import BrokerConfig

_READY_TIMEOUT_S: Final = 30.0
_MAX_DIRECTORY: Final = 75
"""Bytes of the sessions' parent directory that leave room for a socket's name."""
_PACKAGE_PARENT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_START: Final = "import sys; sys.path.insert(0, {parent!r}); from zray.broker.__main__ import main; main()"


def runtime_root() -> str:
    """Return (and make, with mode 0700) the directory of this user's sessions. Raises ZraySystemError when it belongs to somebody else."""
    chosen = os.environ.get("ZRAY_RUNTIME_DIR")
    if not chosen:
        base = os.environ.get("XDG_RUNTIME_DIR", "")
        chosen = (
            os.path.join(base, "zray") if base and os.access(base, os.W_OK) and len(base) < _MAX_DIRECTORY - 5 else ""
        )
    chosen = chosen or f"/tmp/zray-{os.getuid()}"
    if len(os.fsencode(chosen)) > _MAX_DIRECTORY:
        raise errors.ZraySystemError(
            f"the runtime directory's name is too long for sockets ({_MAX_DIRECTORY} bytes): {chosen}. Set ZRAY_RUNTIME_DIR"
        )
    os.makedirs(chosen, mode=0o700, exist_ok=True)
    found = os.lstat(chosen)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise errors.ZraySystemError(f"{chosen} is not a directory of yours; remove it or set ZRAY_RUNTIME_DIR")
    if found.st_mode & 0o077:
        os.chmod(chosen, 0o700)
    return chosen


def hold_session(directory: str) -> int:
    """Mark a session as alive for as long as the returned descriptor is open: a shared lock, which unlike a process id means the same in every
    PID namespace that sees the directory."""
    fd = os.open(os.path.join(directory, "alive"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def remove_stale_sessions(root: str) -> None:
    """Remove directories of sessions that nobody holds (their brokers were killed before they could)."""
    for entry in os.scandir(root):
        try:
            fd = os.open(os.path.join(entry.path, "alive"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < 60:
                continue  # just being made
            shutil.rmtree(entry.path, ignore_errors=True)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(entry.path, ignore_errors=True)
        finally:
            os.close(fd)


# -- what the machine has --------------------------------------------------------------------------------------------


def _first_number(*paths: str) -> float | None:
    for path in paths:
        try:
            with open(path) as file:
                return float(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return None


def cpu_count() -> int:
    """Return the CPUs this process may use: the smaller of its affinity and its control group's quota (v2, then v1), at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, float(quota) / float(period))
    except (OSError, ValueError):
        quota_v1 = _first_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period_v1 = _first_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
        if quota_v1 and period_v1 and quota_v1 > 0:
            count = min(count, quota_v1 / period_v1)
    return max(1, math.floor(count))


def memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or the control group's limit (v2, then v1) where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_number("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return int(min(total, limit)) if limit else total


def gpu_count() -> int:
    """Return the GPUs this process may use: those CUDA_VISIBLE_DEVICES names, else those the NVIDIA driver lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


class NodeSettings(msgspec.Struct, frozen=True):
    """What the user chose of a new node; None: what the machine has."""

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] = {}
    object_store_memory: int | None = None
    labels: dict[str, str] = {}
    preload: list[str] | None = None
    log_to_driver: bool = True
    max_objects: int = 16_000_000


class Node:
    """A node that this process started."""

    def __init__(self, directory: str, process: subprocess.Popen[bytes], store_fd: int, alive: int) -> None:
        self.directory = directory
        self.process = process
        self.store_fd = store_fd
        self.alive = alive
        """Descriptor that marks the session as alive."""
        self.stopped = False

    def open_store(self) -> int:
        """Return a descriptor of the store's segment."""
        return open_store(self.directory, self.process.pid, self.store_fd)

    def stop(self, timeout: float = 2.0) -> None:
        """End the node, if that was not done before, and wait for it; whatever is left of its directory is removed. timeout in seconds."""
        if self.stopped:
            return
        self.stopped = True
        if self.process.poll() is not None:
            log = _read_text(os.path.join(self.directory, "broker.log"))
            print(
                f"[zray] the broker had ended with status {self.process.returncode}{': ' + log if log else ''}",
                file=sys.stderr,
            )
        else:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self.alive)
        shutil.rmtree(self.directory, ignore_errors=True)


def open_store(directory: str, broker_pid: int, fd: int) -> int:
    """Open the segment of a running node: through /proc, or as the file it is where there is no memfd."""
    for path in (os.path.join(directory, "store"), f"/proc/{broker_pid}/fd/{fd}"):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    raise errors.ZraySystemError(f"the object store of the node cannot be opened (broker {broker_pid})")


def start(settings: NodeSettings, driver_pid: int) -> Node:
    """Start a node whose life ends with `driver_pid`. Raises ZraySystemError with the broker's words when it cannot."""
    root = runtime_root()
    remove_stale_sessions(root)
    session = secrets.token_hex(4)
    directory = os.path.join(root, session)
    spill = os.environ.get("ZRAY_SPILL_DIR")
    spill_directory = os.path.join(spill, f"zray-{session}") if spill else os.path.join(directory, "spill")
    memory = memory_bytes()
    store_capacity = settings.object_store_memory or int(memory * 0.3)
    with contextlib.ExitStack() as undo:  # whatever fails or interrupts it, nothing stays
        undo.callback(shutil.rmtree, spill_directory, ignore_errors=True)
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        os.mkdir(directory, 0o700)
        os.mkdir(os.path.join(directory, "logs"), 0o700)
        alive = hold_session(directory)
        undo.callback(os.close, alive)
        os.makedirs(spill_directory, 0o700)
        ready, ready_fd = os.pipe()
        with open(ready, "rb", buffering=0), open(ready_fd, "wb", buffering=0) as broker_end:
            config = BrokerConfig(
                directory=directory,
                spill_directory=spill_directory,
                session=session,
                node=ids.random_id().hex(),
                driver_pid=driver_pid,
                ready_fd=ready_fd,
                resources=_resources(settings, memory - store_capacity, store_capacity),
                labels=settings.labels,
                store_capacity=store_capacity,
                max_objects=settings.max_objects,
                preload=["numpy"] if settings.preload is None else settings.preload,
                log_to_driver=settings.log_to_driver,
                python=sys.version,
            )
            process = _spawn(config, directory, ready_fd)
            undo.callback(_end, process)
            broker_end.close()
            line = _read_line(ready, process)
        word, _, rest = line.partition(" ")
        if word != "ready":
            process.wait()
            log = _read_text(os.path.join(directory, "broker.log"))
            raise errors.ZraySystemError(f"the broker could not start: {rest or log or 'it ended without a word'}")
        undo.pop_all()
        return Node(directory, process, int(rest), alive)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _resources(settings: NodeSettings, memory: int, store_capacity: int) -> dict[str, float]:
    gpus = gpu_count() if settings.num_gpus is None else settings.num_gpus
    found = {
        "CPU": float(cpu_count() if settings.num_cpus is None else settings.num_cpus),
        "memory": float(settings.memory or memory),
        "object_store_memory": float(store_capacity),
        "node:127.0.0.1": 1.0,
        "node:__internal_head__": 1.0,
        **settings.resources,
    }
    if gpus:
        found["GPU"] = float(gpus)
    return found


def _spawn(config: BrokerConfig, directory: str, ready_fd: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    with open(os.path.join(directory, "broker.log"), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(parent=_PACKAGE_PARENT)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[ready_fd],
            start_new_session=True,
            env=environment,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process


def _read_line(fd: int, process: subprocess.Popen[bytes]) -> str:
    import select

    deadline = time.monotonic() + _READY_TIMEOUT_S
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            process.kill()
            return f"error it gave no sign of life for {_READY_TIMEOUT_S:g} s"
        if select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 4096)
            if not chunk:
                break
            data += chunk
    return data.decode().strip()


def _read_text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()[-4000:].strip()
    except OSError:
        return ""
