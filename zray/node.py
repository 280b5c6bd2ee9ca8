"""Starting and finding a node: the runtime directory, what the machine has, the broker's process.

Covers all that happens between `zray.init()` and a served socket. Does not cover what the driver then does (`zray.session`).
Directories: `$ZRAY_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/zray`, else `/tmp/zray-<uid>`, with mode 0700; in it one directory a session. Nothing else is
written anywhere. No TCP port is opened, except by a node that belongs to a cluster: one.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from typing import Final

import msgspec

from zray import errors, ids
from zray.broker.config import REBUILD_S, BrokerConfig, ClusterConfig

_READY_TIMEOUT_S: Final = 30.0
_MAX_DIRECTORY: Final = 75
"""Bytes of the sessions' parent directory that leave room for a socket's name."""
_PACKAGE_PARENT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_RECORD: Final = "node.json"
HEAD_GRACE_S: Final = 60.0
"""Seconds for which nodes outlive a head that has storage to come back with."""
_SPAWN_S: Final = 0.5
"""Seconds that an interrupted start waits for its process, to end it."""
ALIVE: Final = "alive"
"""File in a session's directory that is locked while the session lives."""
_UNCLAIMED_S: Final = 60
"""A session's directory without that file is being made, unless it has been so for longer."""
_ANYWHERE: Final = (("192.0.2.1", 9), ("2001:db8::1", 9))
"""Addresses reserved for documentation (RFC 5737, RFC 3849) stand for any place beyond the default route."""
START: Final = f"import sys; sys.path.insert(0, {_PACKAGE_PARENT!r}); from zray.broker.__main__ import main; main()"
"""The broker's program."""
HEAD_RESOURCE: Final = "node:__internal_head__"
"""Of the node that was started as the head, so that one can ask for it."""


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


def make_session(directory: str, spill_directory: str) -> None:
    """Make the directories of a new session."""
    os.mkdir(directory, 0o700)
    os.mkdir(os.path.join(directory, "logs"), 0o700)
    os.makedirs(spill_directory, 0o700)


def claim_session(directory: str) -> int:
    """Mark a session that is being made as alive for as long as the returned descriptor is open: a shared lock, which unlike a process id means
    the same in every PID namespace that sees the directory. The file has its name when it is locked, never before, so nobody finds it free."""
    path = os.path.join(directory, ALIVE)
    fd = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.rename(path + ".new", path)
    return fd


def hold_session(directory: str) -> int:
    """Mark a session that somebody else has claimed, and holds, as alive for as long as the returned descriptor is open."""
    fd = os.open(os.path.join(directory, ALIVE), os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def remove_stale_sessions(root: str) -> None:
    """Remove directories of sessions that nobody holds (their brokers were killed before they could)."""
    for entry in os.scandir(root):
        try:
            fd = os.open(os.path.join(entry.path, ALIVE), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            try:
                made = entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:  # its owner, or another new session, was faster
                continue
            if time.time() - made >= _UNCLAIMED_S:
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


class ClusterSettings(msgspec.Struct, frozen=True):
    """A new node's place in a cluster."""

    host: str
    """Address to listen on, and where other nodes find it. Empty: it is to connect this process to the cluster from outside."""
    port: int = 0
    """0: any free one."""
    head: str = ""
    """host:port of the head; empty: this node is the head."""
    key_file: str = ""
    """Head: made when it does not exist. Empty (head only): beside an SQLite file, else a new key in the session's directory."""
    node_timeout: float = 30.0
    """Seconds of silence after which a node counts as dead, or the head as lost."""
    storage: str = "memory"
    """Head: "memory", "sqlite:PATH" or "redis://..." (`zray.gcs.storage.open_storage`)."""
    head_grace: float | None = None
    """Head: seconds for which the other nodes outlive it. Default: HEAD_GRACE_S when it has storage to come back with, or replicas, else 0."""
    replicas: int = 1
    """Head: nodes that keep its tables, itself among them: with 3, one of the others becomes the head when it dies."""
    serves_one: bool = False
    """It is to schedule one driver's job, and nothing runs on it."""


class NodeRecord(msgspec.Struct, frozen=True):
    """What the file `node.json` in a session's directory says, for processes that connect to a running node."""

    directory: str
    spill_directory: str
    broker_pid: int
    store_fd: int
    """Number of the store's descriptor in the broker."""
    session: str
    node: str
    """Id in hex."""
    address: str
    """host:port of its broker; empty: it belongs to no cluster."""
    head: str
    """host:port of the cluster's head."""
    key_file: str
    serves_one: bool = False
    """It is the scheduler of one driver's job: not for others to connect to."""


class RunningNode:
    """A node that somebody else started and that goes on without this process."""

    def __init__(self, record: NodeRecord) -> None:
        self.record = record
        self.directory = record.directory
        self.spill_directory = record.spill_directory

    def open_store(self) -> int:
        """Return a descriptor of the store's segment."""
        return open_store(self.directory, self.record.broker_pid, self.record.store_fd)

    def stop(self) -> None:
        """Leave it alone."""


class Node:
    """A node that this process started."""

    def __init__(self, record: NodeRecord, process: subprocess.Popen[bytes], alive: int) -> None:
        self.record = record
        self.directory = record.directory
        self.spill_directory = record.spill_directory
        self.process = process
        self.store_fd = record.store_fd
        self.alive = alive
        """Descriptor that marks the session as alive."""
        self.stopped = False

    def open_store(self) -> int:
        """Return a descriptor of the store's segment."""
        return open_store(self.directory, self.process.pid, self.store_fd)

    def stop(self, timeout: float = 2.0, *, quiet: bool = False) -> None:
        """End the node, if that was not done before, and wait for it; whatever is left of its directory is removed.

        Args:
            timeout: seconds after which it is killed.
            quiet: do not say that it had ended before.
        """
        if self.stopped:
            return
        self.stopped = True
        if self.process.poll() is not None:
            if not quiet:
                log = _read_text(os.path.join(self.directory, "broker.log"))
                said = f": {log}" if log else ""
                print(f"[zray] the broker had ended with status {self.process.returncode}{said}", file=sys.stderr)
        else:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self.alive)
        shutil.rmtree(self.spill_directory, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def open_store(directory: str, broker_pid: int, fd: int) -> int:
    """Open the segment of a running node: through /proc, or as the file it is where there is no memfd."""
    for path in (os.path.join(directory, "store"), f"/proc/{broker_pid}/fd/{fd}"):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    raise errors.ZraySystemError(f"the object store of the node cannot be opened (broker {broker_pid})")


def start_gateway(settings: NodeSettings, driver_pid: int, head: str, key_file: str) -> Node:
    """Start a node that connects a driver to a cluster to which its machine does not belong: over one connection, which it makes. Nobody can
    connect to it, nothing runs on it, and it ends with the driver.

    Args:
        settings: the size of its store, and whether output is wanted; it has nothing else.
        driver_pid: the driver.
        head: host:port where the cluster's head is reached from here.
        key_file: a copy of the cluster's key.

    Raises:
        ZraySystemError: it cannot be started, or the cluster does not take it.
        OSError, ValueError: the key file cannot be read, or holds no key.
    """
    from zray.peer_transport import ClusterKey

    ClusterKey.read(key_file)
    return start(_bare(settings), driver_pid, ClusterSettings("", head=head, key_file=key_file))


def start_job_scheduler(settings: NodeSettings, driver_pid: int, beside: NodeRecord) -> Node:
    """Start a node that schedules one driver's job: it queues and places that driver's tasks on all nodes of the cluster, has none of its own,
    and ends with the driver.

    Args:
        settings: the size of its store, and whether output is wanted; it has nothing else.
        driver_pid: the driver.
        beside: a node of the cluster on this machine.

    Raises:
        ZraySystemError: it cannot be started, or the cluster does not take it.
    """
    host = beside.address.rpartition(":")[0].strip("[]")
    place = ClusterSettings(host, head=beside.head, key_file=beside.key_file, serves_one=True)
    return start(_bare(settings), driver_pid, place)


def _bare(settings: NodeSettings) -> NodeSettings:
    """What a node has on which nothing runs."""
    return NodeSettings(
        object_store_memory=settings.object_store_memory, preload=[], log_to_driver=settings.log_to_driver
    )


def running_nodes() -> list[RunningNode]:
    """Return this user's nodes on this machine that belong to a cluster, the newest first."""
    root = runtime_root()
    found: list[tuple[float, RunningNode]] = []
    for entry in os.scandir(root):
        path = os.path.join(entry.path, _RECORD)
        try:
            with open(path, "rb") as file:
                record = msgspec.json.decode(file.read(), type=NodeRecord)
                made = os.fstat(file.fileno()).st_mtime
            held = _is_held(entry.path)
        except (OSError, msgspec.MsgspecError):
            continue
        if held and record.address and not record.serves_one:
            found.append((made, RunningNode(record)))
    found.sort(key=lambda item: item[0], reverse=True)
    return [node for _, node in found]


def end(node: RunningNode, timeout: float = 5.0) -> bool:
    """End a node that runs on its own, whoever started it; False when it had to be killed. timeout in seconds."""
    pid = node.record.broker_pid
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # The descriptor names the process that has this id now; that it is the broker, the lock it holds tells.
        if not _is_held(node.directory):
            return True
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], timeout)[0]:
                shutil.rmtree(node.directory, ignore_errors=True)
                return number == signal.SIGTERM
        return False
    except (ProcessLookupError, FileNotFoundError):
        return True
    finally:
        os.close(pidfd)


def is_address(text: str) -> bool:
    """Whether a text is host:port. An IPv6 address stands in brackets: it has colons of its own."""
    host, _, port = text.rpartition(":")
    plain = host[1:-1] if host[:1] + host[-1:] == "[]" else host.replace(":", "/")
    return bool(plain) and not set(plain) & set("[]/") and port.isdigit() and 0 < int(port) < 1 << 16


def own_address(other: str = "") -> str:
    """Return the address of this machine that packets to `other` (host:port; default: to somewhere far) would come from.
    Nothing is sent. The loopback address when there is no way."""
    host, _, port = other.rpartition(":")
    for target in [(host.strip("[]"), int(port))] if host else _ANYWHERE:
        with contextlib.suppress(OSError):
            family, _, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return "127.0.0.1"


def _is_held(directory: str) -> bool:
    """Whether some process of a session lives."""
    fd = os.open(os.path.join(directory, "alive"), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def start(settings: NodeSettings, driver_pid: int, cluster: ClusterSettings | None = None) -> Node:
    """Start a node.

    Args:
        settings: what it has.
        driver_pid: its life ends with this process; 0: when it is told.
        cluster: its place in a cluster; None: it is alone.

    Raises:
        ZraySystemError: it cannot be started; with the broker's words.
    """
    root = runtime_root()
    remove_stale_sessions(root)
    session = secrets.token_hex(4)
    directory = os.path.join(root, session)
    rebuild_s = _rebuild_seconds()
    spill = os.environ.get("ZRAY_SPILL_DIR")
    spill_directory = os.path.join(spill, f"zray-{session}") if spill else os.path.join(directory, "spill")
    memory = memory_bytes()
    store_capacity = settings.object_store_memory or int(memory * 0.3)
    with contextlib.ExitStack() as undo:  # whatever fails or interrupts it, nothing stays
        undo.callback(shutil.rmtree, spill_directory, ignore_errors=True)
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        make_session(directory, spill_directory)
        alive = claim_session(directory)
        undo.callback(os.close, alive)
        place = None if cluster is None else _place(cluster, directory)
        ready, ready_fd = os.pipe()
        with open(ready, "rb", buffering=0), open(ready_fd, "wb", buffering=0) as broker_end:
            config = BrokerConfig(
                directory=directory,
                spill_directory=spill_directory,
                session=session,
                node=ids.random_id().hex(),
                driver_pid=driver_pid,
                ready_fd=ready_fd,
                resources=_resources(settings, memory - store_capacity, store_capacity, cluster),
                labels=settings.labels,
                store_capacity=store_capacity,
                max_objects=settings.max_objects,
                preload=[
                    *(["numpy"] if settings.preload is None else settings.preload),
                    *(
                        ["zray.sealed_stream"] if place is not None else []
                    ),  # what workers need to be called from other nodes
                ],
                log_to_driver=settings.log_to_driver,
                python=sys.version,
                cluster=place,
                trace=os.environ.get("ZRAY_TRACE", "0") not in ("", "0"),
                rebuild_s=rebuild_s,
            )
            process = _spawn(config, directory, ready_fd)
            undo.callback(_end, process)
            broker_end.close()
            line = _read_line(ready, process)
        word, _, rest = line.partition(" ")
        if word != "ready":
            process.wait()
            log = _read_text(os.path.join(directory, "broker.log"))
            failed = (
                "the node could not start"
                if cluster is None or cluster.host
                else f"no way into the cluster at {cluster.head}"
            )
            raise errors.ZraySystemError(f"{failed}: {rest or log or 'it ended without a word'}")
        store_fd, _, address = rest.partition(" ")
        record = NodeRecord(
            directory=directory,
            spill_directory=spill_directory,
            broker_pid=process.pid,
            store_fd=int(store_fd),
            session=session,
            node=config.node,
            address=address,
            head=address if place is None else place.head or address,
            key_file="" if place is None else place.key_file,
            serves_one=place is not None and place.serves_one,
        )
        write_record(record)
        undo.pop_all()
        return Node(record, process, alive)


def _rebuild_seconds() -> float:
    """ZRAY_REBUILD_S: how long making a lost value again may take."""
    text = os.environ.get("ZRAY_REBUILD_S", "")
    if not text:
        return REBUILD_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise errors.ZrayUsageError(
            f"ZRAY_REBUILD_S is {text!r}: it must be a number of seconds, 0 for no second copies"
        )
    return seconds


def _place(cluster: ClusterSettings, directory: str) -> ClusterConfig:
    """Give a new cluster its key."""
    from zray import __version__
    from zray.peer_transport import ClusterKey

    grace = cluster.head_grace
    if grace is None:
        grace = 0.0 if cluster.storage == "memory" and cluster.replicas == 1 else HEAD_GRACE_S
    check_replicas(cluster.replicas, cluster.storage, grace)
    key_file = cluster.key_file
    if not cluster.head:
        if not key_file:
            scheme, _, place = cluster.storage.partition(":")
            place = place.partition("?")[0]
            key_file = f"{place}.key" if scheme == "sqlite" and place else os.path.join(directory, "cluster.key")
        if not os.path.exists(key_file):
            ClusterKey.new().write(key_file)
    return ClusterConfig(
        cluster.host,
        cluster.port,
        cluster.head,
        os.path.abspath(key_file),
        __version__,
        cluster.node_timeout,
        cluster.storage,
        grace,
        cluster.replicas,
        cluster.serves_one,
    )


def check_replicas(replicas: int, storage: str, grace: float) -> None:
    """See whether a head can have so many replicas.

    Raises:
        ValueError: it cannot, or not together with the other settings.
    """
    if replicas not in (1, 3):
        raise ValueError(f"the control store has 1 or 3 replicas, not {replicas}: a majority of 3 outlives one of them")
    if replicas > 1 and storage != "memory":
        raise ValueError(f"replicas keep their tables in memory: either replicas or storage {storage!r}, not both")
    if replicas > 1 and grace <= 0:
        raise ValueError("with replicas nodes have to outlive their head: head_grace must be above 0")


def write_record(record: NodeRecord) -> None:
    """Let other processes find a node."""
    path = os.path.join(record.directory, _RECORD)
    with open(os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(record))
    os.replace(path + ".part", path)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _resources(
    settings: NodeSettings, memory: int, store_capacity: int, cluster: ClusterSettings | None
) -> dict[str, float]:
    if cluster is not None and (cluster.serves_one or not cluster.host):
        return {}  # nothing runs there
    gpus = gpu_count() if settings.num_gpus is None else settings.num_gpus
    found = {
        "CPU": float(cpu_count() if settings.num_cpus is None else settings.num_cpus),
        "memory": float(settings.memory or memory),
        "object_store_memory": float(store_capacity),
        f"node:{cluster.host if cluster is not None else '127.0.0.1'}": 1.0,
        **settings.resources,
    }
    if cluster is None or not cluster.head:
        found[HEAD_RESOURCE] = 1.0
    if gpus:
        found["GPU"] = float(gpus)
    return found


def _spawn(config: BrokerConfig, directory: str, ready_fd: int) -> subprocess.Popen[bytes]:
    """Start the broker's process. In a thread: interrupts come to the main thread only, and one between the fork and the note of the child's
    pid would leave a process that nobody knows."""
    made: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []

    def spawn() -> None:
        try:
            with open(os.path.join(directory, "broker.log"), "wb") as log:
                made.append(
                    subprocess.Popen(
                        [sys.executable, "-c", START],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        pass_fds=[ready_fd],
                        start_new_session=True,
                        env=dict(os.environ),
                    )
                )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=spawn, name="zray-start", daemon=True)
    try:
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        process = made[0]
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(config))
            process.stdin.close()
        except BrokenPipeError:
            pass
        return process
    except BaseException:
        deadline = time.monotonic() + _SPAWN_S
        while not made and not failed and time.monotonic() < deadline:  # it may have been interrupted before it began
            time.sleep(0.001)
        for process in made:
            _end(process)
        raise


def _read_line(fd: int, process: subprocess.Popen[bytes]) -> str:
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
