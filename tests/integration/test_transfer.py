"""Values on their way between nodes, with real sockets and stores: damage, deaths, several sources, passing on, room; and whole clusters."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Gate, query, wait_for
from zray import _store
from zray.broker import peer_messages as pm
from zray.broker.bulk import Bulk, Got, NotGot, WantsStream
from zray.broker.giver import Giver
from zray.broker.pull import piece_size
from zray.broker.transfer import Transfer
from zray.cluster_utils import Cluster
from zray.node_port import VALUES, NodePort, socket_behind_door
from zray.object_store import ObjectRef, ObjectStore
from zray.sealed_stream import cipher_for_caller, preface

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zray.object_store import Place

HERE, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
X = bytes([101]) * 16
MIB = 1 << 20
VALUE = random.Random(1).randbytes(12 * MIB + 12345)
KIND = 0


class Source:
    """A node that has VALUE as version 7 of X and gives it; what is done to the bytes on their way out is up to the test."""

    def __init__(self, own: bytes, directory: Path) -> None:
        self.own = own
        self._directory = str(directory)
        directory.mkdir()
        self.number = 0
        self.took: list[pm.Took] = []
        self.asks: list[pm.Ask] = []
        self.sent = 0
        self.most = 1 << 30
        """Pieces that it sends before it falls silent."""
        self.relay: Relay | None = None
        self.held: list[tuple[bytes, pm.Ask]] | None = None
        """Requests that are answered later, when this is a list."""
        self.open()

    def open(self) -> None:
        self.node_port = NodePort("127.0.0.1", self.number, self._directory)
        self.number = self.node_port.port
        self.giver = Giver(os.path.join(self._directory, socket_behind_door(VALUES)))

    @property
    def port(self) -> int:
        return self.number if self.relay is None else self.relay.port

    def look(self) -> None:
        for node, frame in self.giver.came():
            message = pm.decode(frame)
            if isinstance(message, pm.Ask):
                self.asks.append(message)
                if self.held is None:
                    self.answer(node, message)
                else:
                    self.held.append((node, message))
            elif isinstance(message, pm.Took):
                self.took.append(message)

    def answer(self, node: bytes, ask: pm.Ask) -> None:
        for index in ask.pieces:
            self.send(node, ask, index)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for node, ask in held:
            self.answer(node, ask)

    def send(self, node: bytes, ask: pm.Ask, index: int) -> None:
        if ask.version != 7:
            self.giver.send(node, pm.encode(pm.NotHere(ask.id, ask.version, "another version")))
        elif self.sent < self.most:
            self.sent += 1
            data = VALUE[index * ask.piece_bytes : (index + 1) * ask.piece_bytes]
            self.giver.send(node, pm.encode(pm.Piece(ask.id, ask.version, index)), memoryview(data))

    def close(self) -> None:
        self.giver.close()
        self.node_port.close()


class Relay:
    """Carries bytes to a port and back, one connection at a time, and flips a bit in each of the first connections."""

    def __init__(self, port: int, flips: list[int]) -> None:
        """flips: how many bytes from there each of the first connections lets through before it flips a bit."""
        self._to = port
        self._flips = flips
        self.flipped = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if not self._ends and self._to == 0:
                near.close()
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            left = self._flips[0] if self._flips else None
            self._ends = [near, far]
            while self._ends:
                ready, _, _ = select.select(self._ends, [], [])
                for end in ready:
                    other = far if end is near else near
                    try:
                        data = bytearray(end.recv(1 << 16))
                    except OSError:
                        data = bytearray()
                    if end is far and left is not None:
                        if left < len(data):
                            data[left] ^= 4
                            self.flipped += 1
                            self._flips.pop(0)
                            left = None
                        else:
                            left -= len(data)
                    try:
                        other.sendall(data)
                    except OSError:
                        data.clear()
                    if not data:
                        near.close()
                        far.close()
                        self._ends = []
                        break

    def close(self) -> None:
        """End, once the connections have."""
        self._to = 0
        with socket.create_connection(("127.0.0.1", self.port)):
            self._thread.join()
        self._listener.close()


class Rig:
    """A store, the thread that gets values into it, and sources."""

    def __init__(self, directory: Path, short: str, capacity: int = 64 * MIB) -> None:
        self._fd = os.memfd_create("zray-test")
        _store.Store.format(self._fd, capacity, 1000)
        self.store = _store.Store(self._fd)
        self.store.register(_store.PROC_BROKER)
        self.objects = ObjectStore(self.store, str(directory))
        self.sources = {node: Source(node, Path(short) / str(number)) for number, node in enumerate((B, C))}
        self.bulk = Bulk(HERE, self.objects, self.address_of)
        self.outcomes: list[Any] = []

    def address_of(self, node: bytes) -> str | None:
        return f"127.0.0.1:{self.sources[node].port}" if node in self.sources else None

    def expect(self, name: bytes = X) -> ObjectRef:
        ref = self.store.expect(name, 0, None, None, "")
        self.store.elsewhere(ref, True)
        return ref

    def pull(self, ref: ObjectRef, *sources: bytes, version: int = 7, size: int = len(VALUE)) -> None:
        self.bulk.pull(ref, version, size, 0, sources)

    def look(self) -> list[Any]:
        for source in self.sources.values():
            source.look()
        for outcome in self.bulk.outcomes():
            if isinstance(outcome, WantsStream):
                self.bulk.stream(outcome.node, *self.sources[outcome.node].giver.expect(HERE))
            else:
                self.outcomes.append(outcome)
        return self.outcomes

    def until(self, condition: Callable[[], Any]) -> None:
        def look() -> Any:
            self.look()
            return condition()

        wait_for(look, 30)

    def outcome(self) -> Any:
        self.until(lambda: self.outcomes)
        return self.outcomes.pop()

    def seal(self, ref: ObjectRef) -> bytes:
        """The value that has come."""
        got = self.outcome()
        assert isinstance(got, Got), got
        assert got.place.seal(KIND, 0, [])
        assert got.ref is ref
        self.bulk.sealed(got.object, got.place)
        return bytes(self.objects.raw(ref))

    def end(self) -> None:
        self.outcomes.clear()
        self.bulk.close()
        for source in self.sources.values():
            source.close()
        gc.collect()
        self.store.check()
        assert self.store.statistics()["open"] == 0
        self.store.close()
        os.close(self._fd)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="zt", dir="/tmp") as short:
        found = Rig(tmp_path, short)
        yield found
        found.end()


def test_a_value_comes_into_the_store(rig: Rig) -> None:
    ref = rig.expect()
    rig.pull(ref, B)
    assert rig.seal(ref) == VALUE
    assert rig.bulk.received_bytes == len(VALUE)
    rig.until(lambda: rig.sources[B].took == [pm.Took(X, 7, True)])


def test_a_flipped_bit_is_found_and_what_was_under_way_comes_again(rig: Rig) -> None:
    source = rig.sources[B]
    relay = source.relay = Relay(source.number, [3 * MIB, 2 * MIB + 5, 17])
    ref = rig.expect()
    rig.pull(ref, B)
    assert rig.seal(ref) == VALUE
    assert relay.flipped == 3
    assert source.sent > -(-len(VALUE) // piece_size(len(VALUE)))
    rig.bulk.node_gone(B, "the test is over")
    relay.close()


def test_two_sources_share_a_value(rig: Rig) -> None:
    both = rig.sources.values()
    for source in both:
        source.held = []
    ref = rig.expect()
    rig.pull(ref, B, C)
    rig.until(lambda: all(source.held for source in both))
    for source in both:
        source.release()
    assert rig.seal(ref) == VALUE
    assert rig.sources[B].sent
    assert rig.sources[C].sent


def test_one_source_dies_and_the_other_goes_on(rig: Rig) -> None:
    rig.sources[B].most = 3
    ref = rig.expect()
    rig.pull(ref, B)
    rig.until(lambda: rig.bulk.received_bytes > 2 * MIB)
    rig.pull(ref, C)
    rig.bulk.node_gone(B, "killed")
    assert rig.seal(ref) == VALUE
    assert rig.sources[B].sent == 3


def test_all_sources_dead(rig: Rig) -> None:
    rig.sources[B].most = 3
    ref = rig.expect()
    rig.pull(ref, B)
    rig.until(lambda: rig.bulk.received_bytes > 2 * MIB)
    rig.bulk.node_gone(B, "killed")
    failed = rig.outcome()
    assert failed == NotGot(X, failed.reason, False, ref)
    assert "killed" in failed.reason
    assert not rig.store.done(ref)
    # The object is pending as before, and can be got anew.
    rig.pull(ref, C)
    assert rig.seal(ref) == VALUE


def test_a_value_that_was_forgotten_as_it_came_and_asked_for_again(rig: Rig) -> None:
    """It has come before it is known that it was forgotten: that is not the end of what was begun since."""
    first = rig.expect()
    rig.pull(first, B)
    rig.until(lambda: rig.outcomes)
    rig.bulk.forget(X)
    assert rig.store.retry(first, 0)
    second = rig.expect()
    rig.pull(second, C)
    old = rig.outcomes.pop(0)
    assert old.ref is first
    rig.until(lambda: rig.bulk.half(X) is not None and rig.bulk.half(X).place is not old.place)
    assert not old.place.seal(KIND, 0, []), "it is not this one's any more"
    rig.bulk.sealed(X, old.place)
    assert rig.bulk.half(X) is not None
    assert rig.seal(second) == VALUE
    assert rig.bulk.half(X) is None


def test_a_connection_that_breaks_is_made_again(rig: Rig) -> None:
    source = rig.sources[B]
    source.most = 4
    ref = rig.expect()
    rig.pull(ref, B)
    rig.until(lambda: rig.bulk.received_bytes > 2 * MIB)
    source.close()
    source.most = 1 << 30
    source.open()
    assert rig.seal(ref) == VALUE


def test_versions_do_not_mix(rig: Rig) -> None:
    ref = rig.expect()
    rig.pull(ref, B, version=8)
    failed = rig.outcome()
    assert isinstance(failed, NotGot)
    assert "another version" in failed.reason
    assert rig.bulk.received_bytes == 0


def test_interest_ends_in_the_middle(rig: Rig) -> None:
    source = rig.sources[B]
    source.most = 3
    ref = rig.expect()
    before = rig.store.statistics()["used"]
    rig.pull(ref, B)
    rig.until(lambda: rig.bulk.received_bytes > 2 * MIB)
    assert rig.store.statistics()["used"] > before + len(VALUE) // 2
    rig.bulk.forget(X)
    rig.until(lambda: source.took == [pm.Took(X, 7, False)])
    rig.until(lambda: rig.store.statistics()["used"] == before)
    assert rig.outcomes == []


def test_what_does_not_fit_the_store_comes_into_a_file(rig: Rig, tmp_path: Path) -> None:
    filler = rig.store.put(bytes(16), bytes(60 * MIB), [], 0, 60 * MIB, [])
    pinned = rig.store.read(filler)
    ref = rig.expect()
    rig.pull(ref, B)
    assert rig.seal(ref) == VALUE
    assert [path.name for path in tmp_path.iterdir()] == [f"{X.hex()}.value"]
    del pinned


def test_values_that_nobody_reads_make_room(rig: Rig, tmp_path: Path) -> None:
    filler = rig.store.put(bytes(16), bytes(60 * MIB), [], 0, 60 * MIB, [])
    ref = rig.expect()
    rig.pull(ref, B)
    assert rig.seal(ref) == VALUE
    assert rig.store.describe(filler)[0] == _store.STATE_SPILLED
    assert rig.store.describe(ref)[3] & _store.FLAG_FILE == 0


def test_strangers_get_no_answer_and_are_counted(rig: Rig) -> None:
    """Who was told nothing, who knows a ticket but not its secret, and who plays a recording again."""
    giver = rig.sources[B].giver
    ticket, secret = giver.expect(HERE)
    sealed = cipher_for_caller(secret).encrypt(bytes(12), b"\0" + pm.encode(pm.Took(X, 7, True)), None)
    genuine = preface(VALUES, ticket) + len(sealed).to_bytes(4, "little") + sealed

    def visit(data: bytes) -> socket.socket:
        visitor = socket.create_connection(("127.0.0.1", rig.sources[B].number))
        visitor.sendall(data)
        return visitor

    def refused(data: bytes) -> None:
        before = giver.refused
        with visit(data) as visitor, contextlib.suppress(ConnectionResetError):
            assert visitor.recv(100) == b"", "an answer"
        rig.until(lambda: giver.refused == before + 1)

    refused(preface(VALUES, ticket + 1) + genuine[18:])
    refused(genuine[:-1] + bytes([genuine[-1] ^ 1]))
    with visit(genuine) as member:
        assert member.recv(100), "the secret was not used up by those who did not know it"
        rig.until(lambda: rig.sources[B].took == [pm.Took(X, 7, True)])
        refused(genuine)
    refused(genuine)
    assert rig.sources[B].took == [pm.Took(X, 7, True)]


# -- the giving side -----------------------------------------------------------------------------------------------------


class _Links:
    """The part of a broker's links that giving needs."""

    def address_of(self, node: bytes) -> str | None:
        return f"10.0.0.{node[0]}:1"

    def is_client(self, node: bytes) -> bool:
        return False

    def can_dial(self, node: bytes) -> bool:
        return True


class _Giver:
    """Keeps what is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, pm.PeerMessage, bytes | None]] = []
        self.kept: list[Any] = []

    def send(self, node: bytes, frame: bytes, data: memoryview | None, token: object) -> bool:
        self.sent.append((node, pm.decode(frame), None if data is None else bytes(data)))
        self.kept.append((data, token))
        return True

    def close(self) -> None:
        self.kept.clear()


def _giving(rig: Rig) -> tuple[Transfer, _Giver]:
    links: Any = _Links()
    transfer = Transfer(HERE, links, rig.objects, _Nobody(), lambda _: None, "")
    giver: Any = _Giver()
    transfer.giver = giver
    return transfer, giver


class _Nobody:
    def arrived(self, object_: bytes, place: Place) -> None:
        raise AssertionError

    def not_arrived(self, object_: bytes, reason: str, full: bool) -> None:
        raise AssertionError


def test_what_is_sent_stays_in_place_until_it_has_left(rig: Rig) -> None:
    transfer, giver = _giving(rig)
    ref = rig.store.put(X, VALUE, [], KIND, len(VALUE), [])
    version = transfer.version_of(X)
    assert transfer.version_of(X) == version
    size = piece_size(len(VALUE))
    transfer.asked(B, pm.Ask(X, version, size, [0, 1, 99, -1], []))
    [(node, piece, data), (_, second, _)] = giver.sent
    assert (node, piece, data) == (B, pm.Piece(X, version, 0), VALUE[:size])
    assert isinstance(second, pm.Piece)
    assert second.index == 1
    transfer.forget(X)
    del ref
    gc.collect()
    assert rig.store.statistics()["used"] >= len(VALUE), "a piece of it has not left yet"
    giver.kept.clear()
    gc.collect()
    assert rig.store.statistics()["used"] < MIB
    transfer.asked(B, pm.Ask(X, version, size, [0], []))
    assert isinstance(giver.sent[-1][1], pm.NotHere)
    transfer.close()


def test_the_second_who_asks_is_sent_to_the_first(rig: Rig) -> None:
    transfer, giver = _giving(rig)
    ref = rig.store.put(X, VALUE, [], KIND, len(VALUE), [])
    ask = pm.Ask(X, transfer.version_of(X), piece_size(len(VALUE)), [0], [])
    transfer.asked(B, ask)
    transfer.asked(C, ask)
    assert isinstance(giver.sent[0][1], pm.Piece)
    assert giver.sent[1][:2] == (C, pm.Elsewhere(X, ask.version, B, "10.0.0.2:1"))
    transfer.asked(C, pm.Ask(X, ask.version, ask.piece_bytes, [0], [B]))
    assert isinstance(giver.sent[2][1], pm.Piece), "B was no help"
    transfer.close()
    del ref


# -- clusters ------------------------------------------------------------------------------------------------------------


@zray.remote
def digest(array: Any) -> tuple[str, int, int]:
    return zray.get_runtime_context().get_node_id(), int(array[::4096].sum()), len(array)


def test_a_value_that_all_want_spreads_through_those_that_want_it(gate: Callable[[str], Gate]) -> None:
    """Eight nodes get 16 MiB; its owner sends it to less than half of them (about two, while nothing else holds them up)."""
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 0}) as cluster:
        for number in range(8):
            cluster.add_node(num_cpus=1, resources={f"n{number}": 1})
        cluster.connect()
        cluster.wait_for_nodes()
        on = [digest.options(resources={f"n{number}": 1}) for number in range(8)]
        zray.get([f.remote(np.ones(1, np.uint8)) for f in on], timeout=60)  # workers have started
        array = np.random.default_rng(1).integers(0, 255, 16 * MIB, dtype=np.uint8)
        ref = zray.put(array)
        found = zray.get([f.remote(ref) for f in on], timeout=60)
        assert len({node for node, _, _ in found}) == 8
        assert {(total, size) for _, total, size in found} == {(int(array[::4096].sum()), 16 * MIB)}
        sent = query("statistics")["bytes_sent"]
        assert 16 * MIB <= sent < 4 * 16 * MIB, f"{sent / (16 * MIB):.1f} times"
        del ref


def test_larger_than_the_store_there_and_spilled_here() -> None:
    settings: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 96 * MIB}
    with Cluster(initialize_head=True, head_node_args=settings) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=32 * MIB)
        cluster.connect()
        cluster.wait_for_nodes()
        arrays = [np.full(48 * MIB, n, np.uint8) for n in (1, 2, 3)]
        refs = [zray.put(array) for array in arrays]  # the first ones go to disk
        for n, ref in enumerate(refs, 1):
            assert zray.get(digest.remote(ref), timeout=60)[1:] == (n * 48 * MIB // 4096, 48 * MIB)
        del refs
