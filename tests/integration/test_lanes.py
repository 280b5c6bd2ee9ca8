"""Calls that go straight to processes on other nodes: they are used, they are right, and nobody notices when they break."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

import zray
from tests.helpers import Gate, Tally, alive, query, wait_for
from zray import api, exceptions, wire
from zray.cluster_utils import Cluster, ClusterNode
from zray.lanes import LaneReader
from zray.sealed_stream import SealedStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THERE = {"wheels": 1}
"""What only the second node has."""
LONG = 60.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, where this process is, and a node with two CPUs and wheels."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 1}) as found:
        found.add_node(num_cpus=2, resources={"wheels": 100})
        found.connect()
        found.wait_for_nodes()
        yield found


@zray.remote(num_cpus=0, resources=THERE)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def increase(self, *_arguments: Any) -> int:
        self.count += 1
        return self.count

    def note(self, tally: Tally, number: int) -> int:
        tally.add(number)
        return number

    def pid(self) -> int:
        return os.getpid()

    def large(self) -> Any:
        self.count += 1
        return np.full(200_000, self.count)

    def nested(self) -> Any:
        self.count += 1
        return [zray.put(self.count)]

    def two(self) -> tuple[int, int]:
        self.count += 1
        return self.count, -self.count

    def fail(self) -> None:
        self.count += 1
        raise KeyError(self.count)

    def say(self) -> int:
        self.count += 1
        print("said", self.count)
        return self.count

    def wait_for(self, gate: Gate) -> int:
        gate.wait()
        self.count += 1
        return self.count


@zray.remote(num_cpus=1, resources=THERE)
def there(tally: Tally | None = None, number: int = 0) -> int:
    if tally is not None:
        tally.add(number)
    return os.getpid()


@zray.remote(num_cpus=1, resources=THERE)
def wait_there(gate: Gate, tally: Tally) -> int:
    tally.add(os.getpid())
    gate.wait()
    return os.getpid()


@zray.remote(num_cpus=1, resources=THERE)
def refused_there() -> int:
    return int(query("statistics")["refused_connections"])


def over_lanes() -> int:
    assert api._submitter is not None
    return api._submitter.lane_reader.calls


def handed_over() -> int:
    assert api._submitter is not None
    return api._submitter.lane_reader.handed_over


def until_over_lanes(call: Callable[[], Any], further: int = 20) -> None:
    """Call one after another until so many calls went over lanes."""
    begun = over_lanes()
    wait_for(lambda: call() is not None and over_lanes() >= begun + further, LONG, "calls go over a lane")


def counting(counter: Any) -> Callable[[], int]:
    """A function that increases a new counter, and checks what comes."""
    expected = itertools.count(1)

    def call() -> int:
        value = zray.get(counter.increase.remote(), timeout=LONG)
        assert value == next(expected)
        return value

    return call


def node_with_wheels(cluster: Cluster) -> ClusterNode:
    wanted = {row["NodeID"] for row in zray.nodes() if row["Alive"] and "wheels" in row["Resources"]}
    return next(node for node in cluster.worker_nodes if node.node_id in wanted)


# -- actors ------------------------------------------------------------------------------------------------------------


def test_calls_of_every_sort_keep_their_order_and_their_results(cluster: Cluster) -> None:
    counter = Counter.remote()
    until_over_lanes(counting(counter))
    value = zray.get(counter.increase.remote())
    array = zray.put(np.arange(1000))
    large = np.ones(100_000)
    for _ in range(5):
        # Some go over the lane, some cannot: all are made before any is waited for.
        refs = [
            counter.increase.remote(),
            counter.increase.remote(array),
            counter.increase.remote(),
            counter.increase.remote(large),
            counter.large.remote(),
            counter.increase.remote([array]),
            counter.nested.remote(),
            counter.increase.remote(),
        ]
        two = counter.two.options(num_returns=2).remote()
        last = counter.increase.remote()
        found = zray.get(refs, timeout=LONG)
        assert [found[index] for index in (0, 1, 2, 3, 5, 7)] == [value + n for n in (1, 2, 3, 4, 6, 8)]
        assert (found[4] == value + 5).all()
        assert zray.get(found[6][0]) == value + 7
        assert zray.get(two) == [value + 9, -value - 9]
        value += 10
        assert zray.get(last) == value
        with pytest.raises(KeyError, match=str(value + 1)):
            zray.get(counter.fail.remote(), timeout=LONG)
        value += 1
        del refs, two, last, found
    assert zray.get([counter.increase.remote() for _ in range(3000)]) == list(range(value + 1, value + 3001))
    del array


def test_what_a_call_prints_is_there_before_its_result(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    counter = Counter.remote()
    until_over_lanes(counting(counter))
    for _ in range(5):
        count = zray.get(counter.say.remote(), timeout=LONG)
        assert f"said {count}" in capfd.readouterr().out


def test_an_asynchronous_actor_runs_calls_beside_one_another(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    @zray.remote(num_cpus=0, resources=THERE)
    class Both:
        def __init__(self) -> None:
            import asyncio

            self.met = asyncio.Event()

        async def hello(self) -> int:
            return 1

        async def wait(self) -> int:
            await self.met.wait()
            return 2

        async def meet(self) -> int:
            self.met.set()
            return 3

    both = Both.remote()
    until_over_lanes(lambda: zray.get(both.hello.remote(), timeout=LONG))
    waiting = both.wait.remote()
    assert zray.get([both.hello.remote() for _ in range(200)], timeout=LONG) == [1] * 200
    assert zray.wait([waiting], timeout=0)[0] == []
    assert zray.get([both.meet.remote(), waiting], timeout=LONG) == [3, 2]
    del waiting


@pytest.mark.parametrize("options", [{"max_concurrency": 3}, {"checkpoint_every": 10, "max_restarts": 1}])
def test_actors_that_cannot_have_lanes_are_called_through_the_brokers(
    cluster: Cluster, options: dict[str, Any]
) -> None:
    counter = Counter.options(**options).remote()
    call = counting(counter)
    for _ in range(60):
        call()
    assert over_lanes() == 0


def test_a_call_that_takes_long_is_known_to_the_brokers(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    counter, opened = Counter.remote(), gate("opened")
    until_over_lanes(counting(counter))
    before, begun = handed_over(), over_lanes()
    slow = counter.wait_for.remote(opened)
    behind = [counter.increase.remote() for _ in range(3)]
    went = over_lanes() - begun  # once the first is handed over, the brokers get what follows at once
    assert went >= 1
    wait_for(lambda: handed_over() >= before + went, LONG, "they are handed over")
    opened.open()
    first = zray.get(slow, timeout=LONG)
    assert zray.get(behind, timeout=LONG) == [first + 1, first + 2, first + 3]
    until_over_lanes(lambda: zray.get(counter.increase.remote(), timeout=LONG))
    del slow, behind


def test_a_call_that_is_cancelled(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    counter, never = Counter.remote(), gate("never")
    until_over_lanes(counting(counter))
    waiting = counter.wait_for.remote(never)
    zray.cancel(waiting)
    with pytest.raises(exceptions.TaskCancelledError):
        zray.get(waiting, timeout=LONG)
    value = zray.get(counter.increase.remote(), timeout=LONG)
    assert zray.get(counter.increase.remote(), timeout=LONG) == value + 1
    del waiting


def test_a_call_that_is_cancelled_before_it_has_come_is_never_begun(
    cluster: Cluster, gate: Callable[[str], Gate]
) -> None:
    counter, never = Counter.remote(), gate("never")
    pid = zray.get(counter.pid.remote())
    call = counting(counter)
    until_over_lanes(call)
    os.kill(pid, signal.SIGSTOP)
    try:
        waiting = counter.wait_for.remote(never)
        zray.cancel(waiting)
        with pytest.raises(exceptions.TaskCancelledError):
            zray.get(waiting, timeout=LONG)
        del waiting
    finally:
        os.kill(pid, signal.SIGCONT)
    for _ in range(5):
        call()


def test_an_actor_that_stands_still_and_goes_on(cluster: Cluster) -> None:
    counter = Counter.remote()
    pid = zray.get(counter.pid.remote())
    call = counting(counter)
    until_over_lanes(call)
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        ref = counter.increase.remote()
        assert zray.wait([ref], timeout=0.1)[0] == []
        os.kill(pid, signal.SIGCONT)
        value = zray.get(ref, timeout=LONG)
        for _ in range(20):
            value += 1
            assert zray.get(counter.increase.remote(), timeout=LONG) == value
        del ref


@pytest.mark.parametrize("retries", [0, -1])
def test_an_actor_that_is_killed_runs_acknowledged_calls_once(cluster: Cluster, tally: Tally, retries: int) -> None:
    counter = Counter.options(max_restarts=-1, max_task_retries=retries).remote()
    acknowledged = []
    number = 0
    for _ in range(5):
        pid = zray.get(counter.pid.remote(), timeout=LONG) if retries else _pid_of(counter)

        def call() -> bool:
            nonlocal number
            number += 1
            try:
                acknowledged.append(zray.get(counter.note.remote(tally, number), timeout=LONG))
            except exceptions.ActorUnavailableError:
                assert retries == 0
            return True

        until_over_lanes(call, 5)
        # Killed with a call under way over the lane.
        os.kill(pid, signal.SIGSTOP)
        number += 1
        ref = counter.note.remote(tally, number)
        os.kill(pid, signal.SIGKILL)
        try:
            acknowledged.append(zray.get(ref, timeout=LONG))
        except exceptions.ActorUnavailableError:
            assert retries == 0
        del ref
    ran = [int(line) for line in tally.lines]
    assert set(acknowledged) <= set(ran)
    assert acknowledged == sorted(acknowledged)
    assert [n for n in ran if ran.count(n) > 1] == []
    if retries:
        assert acknowledged == list(range(1, number + 1))


def _pid_of(counter: Any) -> int:
    """Ask until it is alive again."""
    found: list[int] = []

    def ask() -> bool:
        try:
            found.append(zray.get(counter.pid.remote(), timeout=LONG))
        except exceptions.ActorUnavailableError:
            return False
        return True

    wait_for(ask, LONG, "it is alive")
    return found[0]


def test_an_actor_whose_node_is_killed(cluster: Cluster) -> None:
    counter = Counter.options(max_restarts=1, max_task_retries=-1).remote()
    until_over_lanes(counting(counter))
    node, pid = node_with_wheels(cluster), zray.get(counter.pid.remote())
    cluster.add_node(num_cpus=1, resources={"wheels": 100})
    cluster.wait_for_nodes()
    ref = counter.increase.remote()
    cluster.remove_node(node, allow_graceful=False)
    assert zray.get(ref, timeout=LONG) >= 1
    # The worker ends a moment after its broker, and answers until then.
    wait_for(lambda: zray.get(counter.pid.remote(), timeout=LONG) != pid, LONG)
    value = zray.get(counter.increase.remote(), timeout=LONG)
    call_again = itertools.count(value + 1)
    for _ in range(30):
        assert zray.get(counter.increase.remote(), timeout=LONG) == next(call_again)
    until_over_lanes(lambda: zray.get(counter.increase.remote(), timeout=LONG))
    del ref


def test_an_actor_without_restarts_dies_with_its_node(cluster: Cluster) -> None:
    counter = Counter.remote()
    until_over_lanes(counting(counter))
    cluster.remove_node(node_with_wheels(cluster), allow_graceful=False)
    with pytest.raises(exceptions.ActorDiedError):
        for _ in range(1000):
            zray.get(counter.increase.remote(), timeout=LONG)


def test_a_caller_that_dies_leaves_no_lane(cluster: Cluster, gate: Callable[[str], Gate], tally: Tally) -> None:
    counter, opened = Counter.remote(), gate("opened")

    @zray.remote(num_cpus=1, max_retries=0)
    def caller(counter: Any) -> None:
        until_over_lanes(lambda: zray.get(counter.increase.remote(), timeout=LONG))
        tally.add(os.getpid())
        zray.get(counter.wait_for.remote(opened))

    calling = caller.remote(counter)
    wait_for(lambda: len(tally) == 1, LONG, "it calls")
    assert len(query("books")["lanes"]) == 1
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    with pytest.raises(exceptions.WorkerCrashedError):
        zray.get(calling, timeout=LONG)
    wait_for(lambda: query("books")["lanes"] == [], LONG, "its lane is given up")
    opened.open()
    value = zray.get(counter.increase.remote(), timeout=LONG)
    assert zray.get(counter.increase.remote(), timeout=LONG) == value + 1
    del calling


def test_an_actor_that_nobody_has_any_more_ends(cluster: Cluster) -> None:
    counter = Counter.remote()
    pid = zray.get(counter.pid.remote())
    until_over_lanes(counting(counter))
    del counter
    wait_for(lambda: not alive(pid), LONG, "it has ended")


def test_killing_an_actor_comes_behind_its_calls(cluster: Cluster) -> None:
    counter = Counter.remote()
    until_over_lanes(counting(counter))
    zray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(counter.increase.remote(), timeout=LONG)


class Eavesdropper:
    """Stands between this process and a node: writes down what is said over each lane, and passes it on when it may."""

    def __init__(self, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node = node
        self.passing = threading.Event()
        self.passing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._heard: list[bytearray] = []
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        add = LaneReader.add

        def add_by_way_of_this(reader: LaneReader, lane: Any, route: Any, address: wire.LaneAddress) -> None:
            port = self._listener.getsockname()[1]
            add(reader, lane, route, msgspec.structs.replace(address, address=f"127.0.0.1:{port}"))

        monkeypatch.setattr(LaneReader, "add", add_by_way_of_this)

    @property
    def heard(self) -> list[bytes]:
        """All that was said, for each connection over which something was."""
        return [bytes(heard) for heard in self._heard if heard]

    def come(self) -> socket.socket:
        """Connect to the node as those do who have a lane."""
        host, _, port = self.node.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=LONG)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                far = self.come()
                self._ends.append(far)
                self._heard.append(bytearray())
                for arguments in ((near, far, self._heard[-1]), (far, near, None)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=arguments))
                    self._threads[-1].start()

    def _pass_on(self, source: socket.socket, target: socket.socket, heard: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            source.settimeout(None)
            while data := source.recv(1 << 16):
                if heard is not None:
                    heard += data
                    self.passing.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End all connections."""
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.passing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()


@pytest.fixture
def ear(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Eavesdropper]:
    """One who hears all that this process says over lanes to the node with wheels."""
    address = next(row["address"] for row in zray.nodes() if "wheels" in row["Resources"])
    found = Eavesdropper(address, monkeypatch)
    yield found
    found.close()


def answer_to(connection: socket.socket) -> bytes:
    """All that is said to somebody until his connection is ended."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def sealed(secret: bytes, message: wire.Message) -> bytes:
    """What who knows a secret says first."""
    here, there = socket.socketpair()
    with there:
        stream = SealedStream(here, secret, calling=True)
        stream.send(wire.encode(message))
        stream.close()
        return there.recv(1 << 16)


def test_a_stranger_gets_no_answer_from_an_actor(cluster: Cluster, ear: Eavesdropper) -> None:
    before = zray.get(refused_there.remote(), timeout=LONG)
    counter = Counter.remote()
    call = counting(counter)
    ear.passing.clear()
    wait_for(lambda: call() and ear.heard, LONG, "a lane is dialled")
    preface = ear.heard[0][:18]
    magic, door, ticket = struct.unpack("<6sH2xQ", preface)
    assert magic == b"zray/1"
    greeting = sealed(os.urandom(32), wire.GreetOverLane(ticket))
    strangers = [
        preface + greeting,
        preface + os.urandom(500),
        preface[:8] + os.urandom(500),
        struct.pack("<6sH2xQ", magic, door, ticket + 1) + greeting,
    ]
    for used in (False, True):  # that ticket
        for said in strangers:
            with ear.come() as stranger:
                stranger.sendall(said)
                assert answer_to(stranger) == b""
        call()
        ear.passing.set()
        until_over_lanes(call)
        expected = before + len(strangers) * (1 + used)
        wait_for(lambda least=expected: zray.get(refused_there.remote()) >= least, LONG, "they are counted")


def test_what_was_said_over_a_lane_leads_nowhere_when_it_is_said_again(
    cluster: Cluster, ear: Eavesdropper, tally: Tally
) -> None:
    before = zray.get(refused_there.remote(), timeout=LONG)
    counter = Counter.remote()
    numbers = itertools.count()

    def call() -> bool:
        number = next(numbers)
        return zray.get(counter.note.remote(tally, number), timeout=LONG) == number

    until_over_lanes(call)
    played = 0
    for _ in range(2):
        recordings = ear.heard
        assert recordings
        for recording in recordings:
            for said in (recording, recording[: max(18, len(recording) // 2)]):
                with ear.come() as stranger:
                    stranger.sendall(said)
                    assert answer_to(stranger) == b""
                    played += 1
        call()
        ear.cut()  # the second time the callers have gone
        call()
    until_over_lanes(call)
    wait_for(lambda: zray.get(refused_there.remote()) >= before + played, LONG, "they are counted")
    assert [int(line) for line in tally.lines] == list(range(next(numbers)))


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_tasks_that_follow_one_another_go_to_one_worker(cluster: Cluster) -> None:
    until_over_lanes(lambda: zray.get(there.remote(), timeout=LONG))

    def all_by_one() -> bool:
        """No answer took so long that the brokers were asked, and another worker may have been lent."""
        begun = over_lanes()
        pids = {zray.get(there.remote(), timeout=LONG) for _ in range(50)}
        return over_lanes() == begun + 50 and len(pids) == 1

    wait_for(all_by_one, LONG, "one worker runs them all")
    assert len(set(zray.get([there.remote() for _ in range(100)], timeout=LONG))) >= 1


def test_a_worker_that_is_lent_is_taken_back_when_others_want_it(cluster: Cluster, gate: Callable[[str], Gate]) -> None:
    until_over_lanes(lambda: zray.get(there.remote(), timeout=LONG))

    @zray.remote(num_cpus=2, resources=THERE)
    def wide() -> str:
        return "ran"

    others = [wide.remote()]

    def call() -> Any:
        zray.get(there.remote(), timeout=LONG)
        return zray.wait(others, timeout=0)[0]

    wait_for(call, LONG, "the other has its turn")
    assert zray.get(others) == ["ran"]
    until_over_lanes(lambda: zray.get(there.remote(), timeout=LONG))


def test_a_task_that_takes_long_is_known_to_the_brokers(
    cluster: Cluster, gate: Callable[[str], Gate], tally: Tally
) -> None:
    opened = gate("opened")
    opened.open()
    until_over_lanes(lambda: zray.get(wait_there.remote(opened, tally), timeout=LONG))
    closed = gate("closed")
    before = handed_over()
    ref = wait_there.remote(closed, tally)
    wait_for(lambda: handed_over() > before, LONG, "it is handed over")
    closed.open()
    assert zray.get(ref, timeout=LONG) == int(tally.lines[-1])
    del ref


@pytest.mark.parametrize("retries", [0, 2])
def test_a_worker_that_is_killed(cluster: Cluster, gate: Callable[[str], Gate], tally: Tally, retries: int) -> None:
    opened = gate("opened")
    opened.open()
    task = wait_there.options(max_retries=retries)
    until_over_lanes(lambda: zray.get(task.remote(opened, tally), timeout=LONG))
    closed = gate("closed")
    ran = len(tally)
    ref = task.remote(closed, tally)
    wait_for(lambda: len(tally) == ran + 1, LONG, "it runs")
    os.kill(int(tally.lines[-1]), signal.SIGKILL)
    if retries:
        wait_for(lambda: len(tally) == ran + 2, LONG, "it runs again")
        closed.open()
        assert zray.get(ref, timeout=LONG) == int(tally.lines[-1])
    else:
        with pytest.raises(exceptions.WorkerCrashedError):
            zray.get(ref, timeout=LONG)
        assert len(tally) == ran + 1
    until_over_lanes(lambda: zray.get(task.remote(opened, tally), timeout=LONG))
    del ref


@pytest.mark.parametrize("retries", [0, 2])
def test_a_node_that_is_killed(cluster: Cluster, gate: Callable[[str], Gate], tally: Tally, retries: int) -> None:
    opened = gate("opened")
    opened.open()
    task = wait_there.options(max_retries=retries)
    until_over_lanes(lambda: zray.get(task.remote(opened, tally), timeout=LONG))
    node = node_with_wheels(cluster)
    cluster.add_node(num_cpus=1, resources={"wheels": 100})
    cluster.wait_for_nodes()
    closed = gate("closed")
    ran = len(tally)
    ref = task.remote(closed, tally)
    wait_for(lambda: len(tally) == ran + 1, LONG, "it runs")
    cluster.remove_node(node, allow_graceful=False)
    if retries:
        wait_for(lambda: len(tally) == ran + 2, LONG, "it runs on the other node")
        closed.open()
        assert zray.get(ref, timeout=LONG) == int(tally.lines[-1])
    else:
        with pytest.raises(exceptions.NodeDiedError):
            zray.get(ref, timeout=LONG)
    until_over_lanes(lambda: zray.get(task.remote(opened, tally), timeout=LONG))
    del ref


def test_a_task_that_is_cancelled(cluster: Cluster, gate: Callable[[str], Gate], tally: Tally) -> None:
    opened = gate("opened")
    opened.open()
    until_over_lanes(lambda: zray.get(wait_there.remote(opened, tally), timeout=LONG))
    ref = wait_there.remote(gate("never"), tally)
    zray.cancel(ref)
    with pytest.raises(exceptions.TaskCancelledError):
        zray.get(ref, timeout=LONG)
    until_over_lanes(lambda: zray.get(wait_there.remote(opened, tally), timeout=LONG))
    del ref


def test_tasks_inside_tasks(cluster: Cluster) -> None:
    @zray.remote(num_cpus=1)
    def many() -> int:
        until_over_lanes(lambda: zray.get(there.remote(), timeout=LONG))
        return over_lanes()

    assert zray.get(many.remote(), timeout=LONG) >= 20


def test_results_that_do_not_fit_a_lane(cluster: Cluster) -> None:
    @zray.remote(num_cpus=1, resources=THERE)
    def make(kind: str) -> Any:
        if kind == "fail":
            raise KeyError(kind)
        return {"small": 1, "large": np.ones(200_000), "nested": None}[kind] if kind != "nested" else [zray.put(7)]

    until_over_lanes(lambda: zray.get(make.remote("small"), timeout=LONG))
    for _ in range(3):
        assert zray.get(make.remote("large"), timeout=LONG).sum() == 200_000
        assert zray.get(zray.get(make.remote("nested"), timeout=LONG)[0]) == 7
        assert zray.get(make.remote("small"), timeout=LONG) == 1
        with pytest.raises(KeyError):
            zray.get(make.remote("fail"), timeout=LONG)


def test_tasks_whose_results_do_not_fit_a_lane_run_once(cluster: Cluster, tally: Tally) -> None:
    @zray.remote(num_cpus=0, resources=THERE)
    def speak(number: int) -> int:
        tally.add(number)
        if number % 4:  # what prints does not fit
            print("said", number)
        return number

    for number in range(150):
        assert zray.get(speak.remote(number), timeout=LONG) == number
    assert over_lanes() > 0
    assert [int(line) for line in tally.lines] == list(range(150))
