"""Starting, finding and ending sessions, and what importing and starting zray must not do."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import PROJECT, RUNTIME, Program, alive, broker_pid, processes_under, query, wait_for, worker_pids
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_import_is_light_and_changes_nothing() -> None:
    source = """
import os, signal, sys, threading
before = dict(os.environ)
handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
import zray
zray.init, zray.remote, zray.get, zray.ObjectRef, zray.exceptions.ZrayError
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers
heavy = {"numpy", "rich", "torch", "pandas", "matplotlib", "asyncio.unix_events"} & set(sys.modules)
assert not heavy - {"asyncio.unix_events"}, heavy
assert threading.active_count() == 1
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_session_needs_no_current_directory() -> None:
    """Where the driver's was deleted, tasks have none either."""
    source = """
import os, sys, tempfile
directory = tempfile.mkdtemp()
os.chdir(directory)
os.rmdir(directory)
sys.path.insert(0, "")
import zray
@zray.remote
def where():
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "nowhere"
with zray.init(num_cpus=1):
    assert zray.get(where.remote()) == "nowhere"
    print("good")
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_init_makes_a_session_and_shutdown_ends_it() -> None:
    assert not zray.is_initialized()
    environment, directory = dict(os.environ), os.getcwd()
    context = zray.init(num_cpus=3, resources={"apple": 1.5}, labels={"zone": "a"}, namespace="here")
    assert zray.is_initialized()
    assert dict(os.environ) == environment
    assert os.getcwd() == directory
    assert context.address_info["node_id"] == zray.get_runtime_context().get_node_id()
    assert os.path.isdir(context["session_dir"])
    assert zray.get(zray.put(1)) == 1
    resources = zray.cluster_resources()
    assert resources["CPU"] == 3
    assert resources["apple"] == 1.5
    assert resources["memory"] > 0
    assert resources["object_store_memory"] > 0
    (node,) = zray.nodes()
    assert node["Alive"]
    assert node["Resources"]["CPU"] == 3
    assert node["Labels"]["zone"] == "a"
    assert zray.get_runtime_context().namespace == "here"
    broker = broker_pid()
    zray.shutdown()
    assert not zray.is_initialized()
    assert not alive(broker)
    assert not os.path.exists(context["session_dir"])
    zray.shutdown()  # a second one is harmless


def test_init_as_a_context_manager() -> None:
    with zray.init(num_cpus=1) as context:
        assert zray.is_initialized()
        assert "session_dir" in context.address_info
        assert zray.get(zray.remote(lambda: 5).remote()) == 5
    assert not zray.is_initialized()
    with pytest.raises(ZeroDivisionError):
        with zray.init(num_cpus=1):
            _ = 1 / 0
    assert not zray.is_initialized()


def test_init_twice_is_refused_unless_ignored(zray_session: Callable[..., Any]) -> None:
    first = zray_session()
    with pytest.raises(exceptions.ZrayUsageError, match=r"shutdown\(\).*ignore_reinit_error"):
        zray.init()
    again = zray.init(ignore_reinit_error=True)
    assert again.address_info == first.address_info
    assert len(processes_under(os.environ[RUNTIME])) >= 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_cpus": "two"}, ValueError, "num_cpus"),
        ({"num_gpus": -0.5}, ValueError, "num_gpus"),
        ({"resources": {"CPU": 2}}, ValueError, "CPU"),
        ({"resources": {"apple": -2}}, ValueError, "apple"),
        ({"object_store_memory": 1000}, ValueError, "object_store_memory"),
        ({"no_such_setting": 1}, TypeError, "no_such_setting"),
        ({"address": "10.0.0.1:6379"}, exceptions.ZrayUsageError, "address"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        zray.init(**settings)
    assert not zray.is_initialized()


def test_settings_of_ray_are_taken(zray_session: Callable[..., Any]) -> None:
    zray_session(
        include_dashboard=False,
        logging_level="ERROR",
        _system_config={"task_retry_delay_ms": 1},
        configure_logging=True,
    )
    assert zray.get(zray.put("x")) == "x"


@pytest.mark.parametrize("first", ["put", "remote", "actor", "wait", "kv"])
def test_the_first_use_starts_a_session_by_itself(first: str) -> None:
    if first == "put":
        assert zray.get(zray.put(1)) == 1
    elif first == "remote":
        assert zray.get(zray.remote(lambda: 2).remote()) == 2
    elif first == "actor":
        with pytest.raises(ValueError, match="nobody"):
            zray.get_actor("nobody")
    elif first == "wait":
        assert zray.wait([zray.put(1)])[1] == []
    else:
        zray.kv.put("a", b"b")
        assert zray.kv.get("a") == b"b"
    assert zray.is_initialized()


def test_things_of_an_ended_session_say_so() -> None:
    class Counter:
        def one(self) -> int:
            return 1

    zray.init(num_cpus=1)
    ref = zray.put([1, 2])
    handle = zray.remote(Counter).remote()
    assert zray.get(handle.one.remote()) == 1
    zray.shutdown()
    zray.init(num_cpus=1)
    here = zray.put(7)
    for use in (
        lambda: zray.get(ref),
        lambda: zray.get([here, ref]),
        lambda: zray.wait([ref]),
        lambda: zray.remote(lambda x: x).remote(ref),
        lambda: zray.get(zray.put([ref])),
        lambda: ref.future().result(5),
        lambda: handle.one.remote(),
        lambda: zray.kill(handle),
    ):
        with pytest.raises(exceptions.ZrayUsageError, match=r"session that has ended"):
            use()
    assert zray.get(here) == 7
    zray.shutdown()
    # References that outlive every session are harmless.
    assert len(ref.hex()) == 32


def test_functions_and_classes_go_from_session_to_session() -> None:
    @zray.remote
    def double(x: int) -> int:
        return 2 * x

    @zray.remote
    class Holder:
        def __init__(self, value: int) -> None:
            self.value = value

        def read(self) -> int:
            return self.value

    for value in range(3):
        with zray.init(num_cpus=2):
            assert zray.get([double.remote(i) for i in range(5)]) == [0, 2, 4, 6, 8]
            assert zray.get(Holder.remote(value).read.remote()) == value


@pytest.mark.slow
def test_many_sessions_one_after_the_other_leave_nothing() -> None:
    for _ in range(6):
        with zray.init(num_cpus=1):
            assert zray.get(zray.remote(os.getpid).remote()) != os.getpid()
    assert processes_under(os.environ[RUNTIME]) == {}


def test_an_idle_node_is_small(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=2)
    assert zray.get([zray.remote(lambda: 1).remote() for _ in range(2)]) == [1, 1]
    # broker, fork parent, at most two workers
    assert len(processes_under(os.environ[RUNTIME])) <= 4


def test_files_of_a_session_are_its_users_alone(zray_session: Callable[..., Any]) -> None:
    context = zray_session()
    assert zray.get(zray.remote(lambda: 1).remote()) == 1
    places = [os.environ[RUNTIME], *(at for at, _, _ in os.walk(context["session_dir"]))]
    assert len(places) >= 3
    for place in places:
        assert stat.S_IMODE(os.stat(place).st_mode) == 0o700, place


def _network_inodes() -> set[str]:
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        try:
            with open(f"/proc/net/{table}") as file:
                found.update(line.split()[9] for line in file.readlines()[1:])
        except FileNotFoundError:
            continue
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def test_no_process_has_a_network_socket(zray_session: Callable[..., Any]) -> None:
    zray_session(num_cpus=2)

    @zray.remote
    class Actor:
        def pid(self) -> int:
            return os.getpid()

    actor = Actor.remote()
    zray.get([actor.pid.remote(), zray.remote(os.getpid).remote()])
    # The test can see such sockets at all:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert _socket_inodes(os.getpid()) & _network_inodes()
    processes = [os.getpid(), *processes_under(os.environ[RUNTIME])]
    assert len(processes) >= 5
    for pid in processes:
        assert not _socket_inodes(pid) & _network_inodes(), pid


def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that belongs to somebody else")
    foreign = f"/tmp/zray-foreign-{os.getpid()}"
    os.mkdir(foreign, 0o777)
    try:
        os.chown(foreign, 65534, 65534)
        monkeypatch.setenv(RUNTIME, foreign)
        with pytest.raises(exceptions.ZraySystemError, match=foreign):
            zray.init(num_cpus=1)
    finally:
        os.rmdir(foreign)


def test_a_runtime_directory_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIME, "/tmp/" + "x" * 90)
    with pytest.raises(exceptions.ZraySystemError, match=RUNTIME):
        zray.init(num_cpus=1)
    assert not os.path.exists("/tmp/" + "x" * 90)


@pytest.mark.slow
def test_without_settings_the_runtime_directory_is_private(program: Callable[..., Program], tmp_path: Path) -> None:
    own = f"/tmp/zray-xdg-{os.getpid()}"
    os.mkdir(own, 0o700)
    try:
        running = program(
            """
context = zray.init(num_cpus=1)
print("directory", context["session_dir"])
print("modes", *(oct(os.stat(d).st_mode & 0o777) for d in (os.path.dirname(context["session_dir"]), context["session_dir"])))
""",
            env={RUNTIME: "", "XDG_RUNTIME_DIR": own},
        )
        running.succeed()
        assert os.path.dirname(running.wait_line("directory ")) == own + "/zray"
        assert running.wait_line("modes ") == "0o700 0o700"
        assert os.listdir(own + "/zray") == []
    finally:
        subprocess.run(["rm", "-rf", own], check=True)


def test_runtime_context_of_the_driver_and_of_a_task(warm: None) -> None:
    here = zray.get_runtime_context()
    assert here.get_task_id() is None
    assert here.get_actor_id() is None

    @zray.remote(num_cpus=2, name="curious")
    def look() -> dict[str, Any]:
        context = zray.get_runtime_context()
        return {
            **context.get(),
            "name": context.get_task_name(),
            "worker_id": context.get_worker_id(),
            "resources": context.get_assigned_resources(),
        }

    ref = look.remote()
    there = zray.get(ref)
    assert there["job_id"] == here.get_job_id()
    assert there["node_id"] == here.get_node_id()
    assert there["namespace"] == here.namespace
    assert there["task_id"] == ref.task_id().hex()
    assert there["actor_id"] is None
    assert there["name"] == "curious"
    assert there["worker_id"] != here.get_worker_id()
    assert there["resources"]["CPU"] == 2


def test_timeline_tells_of_tasks(warm: None, tmp_path: Path) -> None:
    @zray.remote
    def step() -> None:
        return None

    ref = step.remote()
    zray.get(ref)

    def rows() -> list[dict[str, Any]]:
        return [row for row in zray.timeline() or [] if row["args"].get("task_id") == ref.task_id().hex()]

    found = wait_for(rows, what="the task is in the timeline")
    assert all(row["ts"] > 0 and row["ph"] for row in found)
    file = tmp_path / "trace.json"
    assert zray.timeline(str(file)) is None
    assert ref.task_id().hex() in file.read_text()


def test_malformed_frames_are_counted_and_dropped(zray_session: Callable[..., Any]) -> None:
    import zmq

    context = zray_session(num_cpus=1)
    assert zray.get(zray.remote(lambda: 1).remote()) == 1
    frames = [
        b"",
        b"\x01",
        b"\xff\xff\xff",
        b"\x01\x05\x93",
        b"\x01\xc8abc",
        b"\x01\x06" + b"\x95" * 50,
        os.urandom(500),
    ]
    inboxes = [
        name
        for name in os.listdir(context["session_dir"])
        if stat.S_ISSOCK(os.stat(f"{context['session_dir']}/{name}").st_mode)
    ]
    assert len(inboxes) >= 2, inboxes
    with zmq.Context() as zeromq:
        for name in inboxes:
            with zeromq.socket(zmq.DEALER) as out:
                out.connect(f"ipc://{context['session_dir']}/{name}")
                for frame in frames:
                    out.send(frame)
                out.send_multipart([b"two", b"frames"])
                out.setsockopt(zmq.LINGER, 5000)
    wait_for(lambda: query("statistics")["malformed_frames"] >= len(frames), what="the broker counted them")
    assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(10)]) == list(range(10))
    assert alive(broker_pid())
    assert len(worker_pids()) == 1


def test_a_thread_that_waits_learns_of_the_shutdown(program: Callable[..., Program]) -> None:
    running = program(
        """
import threading
zray.init(num_cpus=1)
ref = zray.remote(time.sleep).remote(1000)
ends = []
def wait(how):
    try:
        how()
        ends.append("returned")
    except zray.exceptions.ZrayError as error:
        ends.append(type(error).__name__)
ways = [lambda: zray.get(ref), lambda: zray.get([ref, ref]), lambda: zray.get(ref, timeout=1000), lambda: zray.wait([ref])]
threads = [threading.Thread(target=wait, args=(way,)) for way in ways]
for thread in threads:
    thread.start()
while not zray.available_resources().get("CPU", 0) == 0:
    pass
zray.shutdown()
for thread in threads:
    thread.join()
print("ends", *sorted(set(ends)))
"""
    )
    assert set(running.wait_line("ends ").split()) <= {"TaskCancelledError", "ZrayUsageError", "returned"}
    running.succeed()
    running.wait_nothing_left()


def test_calls_from_many_threads_of_the_driver(warm: None) -> None:
    @zray.remote
    def add(a: int, b: int) -> int:
        return a + b

    @zray.remote
    class Adder:
        def add(self, a: int, b: int) -> int:
            return a + b

    adder = Adder.remote()
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for i in range(30):
                refs = [add.remote(number, i), adder.add.remote(number, i), zray.put(number + i)]
                ready, _ = zray.wait(refs, num_returns=3)
                if len(ready) != 3 or zray.get(refs) != [number + i] * 3:
                    wrong.append((number, i))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_signals_of_the_driver_are_its_own(zray_session: Callable[..., Any]) -> None:
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR2)
    }
    zray_session()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_waiting_get_runs_signal_handlers(warm: None, gate: Callable[..., Any]) -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    hold = gate("hold")
    ref = zray.remote(hold.wait).remote()
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Alarm):
            zray.get(ref)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    hold.open()
    assert zray.get(ref) is None
