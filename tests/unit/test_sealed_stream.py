"""Streams between processes of different nodes: what is said arrives as it was said, or not at all; who has no secret hears nothing."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import random
import resource
import select
import socket
import tempfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from zray import lane_ends, lanes, sealed_stream, wire
from zray.sealed_stream import DialledStream, SealedStream, Visitors
from zray.task import TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = bytes(range(32))
OTHER_SECRET = bytes(range(1, 33))
CALLER, CALLED = b"zray caller", b"zray called"
TAG = 16
MOST = sealed_stream._MOST_BYTES
HEARD = 10
"""Bytes of a preface that the door reads."""


def sealed(frames: list[bytes], direction: bytes = CALLER, secret: bytes = SECRET, first: int = 0) -> list[bytes]:
    """The records of frames, made as the module describes them."""
    cipher = AESGCM(hmac.digest(secret, direction, "sha256"))
    records = [cipher.encrypt(number.to_bytes(12, "little"), frame, None) for number, frame in enumerate(frames, first)]
    return [len(record).to_bytes(4, "little") + record for record in records]


def preface(door: int, ticket: int) -> bytes:
    return b"zray/1" + door.to_bytes(2, "little") + bytes(2) + ticket.to_bytes(8, "little")


@contextlib.contextmanager
def hearing(*, calling: bool = False, secret: bytes = SECRET) -> Iterator[tuple[SealedStream, socket.socket]]:
    """One end of a stream, and in place of the other the bare connection."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = SealedStream(ours, secret, calling=calling)
    with theirs, contextlib.closing(stream):
        yield stream, theirs


@contextlib.contextmanager
def joined() -> Iterator[tuple[SealedStream, SealedStream]]:
    """Both ends: the one that has called, and the other."""
    here, there = socket.socketpair()
    caller, called = SealedStream(here, SECRET, calling=True), SealedStream(there, SECRET, calling=False)
    with contextlib.closing(caller), contextlib.closing(called):
        yield caller, called


def rest(connection: socket.socket) -> bytes:
    """All that has come; the connection does not block."""
    found = bytearray()
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        while data := connection.recv(1 << 20):
            found += data
    return bytes(found)


def is_over(connection: socket.socket) -> bool:
    """Whether the other end has closed it, and has said nothing."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


def receive(stream: SealedStream) -> list[bytes]:
    """All frames that are there."""
    found = []
    while frames := stream.receive():
        found += frames
    return found


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[bytes, bytes], bytes]:
    """What was sealed, by key and nonce. Fails when anything else is sealed with the same."""
    found: dict[tuple[bytes, bytes], bytes] = {}

    class Noting:
        def __init__(self, key: bytes) -> None:
            self._key = key
            self._cipher = AESGCM(key)
            self.decrypt = self._cipher.decrypt

        def encrypt(self, nonce: bytes, data: bytes, associated: bytes | None) -> bytes:
            assert found.setdefault((self._key, bytes(nonce)), bytes(data)) == data, "two records, one nonce"
            return self._cipher.encrypt(nonce, data, associated)

    monkeypatch.setattr(sealed_stream, "AESGCM", Noting)
    return found


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calling", [True, False])
def test_what_is_on_the_wire_is_what_is_described(calling: bool) -> None:
    frames = [b"first", b"", b"third" * 1000]
    with hearing(calling=calling) as (stream, theirs):
        for frame in frames:
            stream.send(frame)
        assert rest(theirs) == b"".join(sealed(frames, CALLER if calling else CALLED))


@given(st.lists(st.binary(max_size=300), max_size=20), st.lists(st.integers(0, 7000), max_size=20), st.booleans())
def test_frames_arrive_in_order_however_the_bytes_are_cut(frames: list[bytes], cuts: list[int], calling: bool) -> None:
    whole = b"".join(sealed(frames, CALLED if calling else CALLER))
    ends = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    found = []
    with hearing(calling=calling) as (stream, theirs):
        for start, stop in itertools.pairwise(ends):
            theirs.send(whole[start:stop])
            found += stream.receive()
        assert found == frames
        assert stream.received == len(frames)
        assert not stream.ended


def test_a_frame_may_come_byte_by_byte() -> None:
    with hearing() as (stream, theirs):
        found = []
        for byte in b"".join(sealed([b"first", b"", b"third"])):
            theirs.send(bytes([byte]))
            found.append(stream.receive())
        assert [frames for frames in found if frames] == [[b"first"], [b""], [b"third"]]


def test_both_ends_speak_at_once(said: dict[Any, bytes]) -> None:
    rng = random.Random(1)
    spoken: dict[str, list[bytes]] = {"caller": [], "called": []}
    heard: dict[str, list[bytes]] = {"caller": [], "called": []}
    with joined() as (caller, called):
        for _ in range(300):
            name, speaker, listener = rng.choice([("caller", caller, called), ("called", called, caller)])
            frame = rng.randbytes(rng.choice([0, 1, 50, 3000]))
            spoken[name].append(frame)
            speaker.send(frame)
            if rng.random() < 0.3:
                heard[name] += receive(listener)
        for _ in range(1000):
            for name, speaker, listener in (("caller", caller, called), ("called", called, caller)):
                speaker.flush()
                heard[name] += receive(listener)
        assert heard == spoken
    assert len(said) == 300


def test_many_frames_at_once() -> None:
    frames = [b"%d" % number for number in range(5000)]
    with hearing() as (stream, theirs):
        theirs.sendall(b"".join(sealed(frames)))
        assert receive(stream) == frames


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 20, (64 << 10) - 19, 300_000, MOST - TAG])
def test_frames_of_any_size_up_to_the_greatest(size: int) -> None:
    frames = [random.Random(size).randbytes(size), b"behind it"]
    found: list[bytes] = []
    with joined() as (caller, called):
        for frame in frames:
            caller.send(frame)
        while len(found) < len(frames):
            assert not called.ended
            found += called.receive()
            caller.flush()
        assert found == frames
        assert not caller.waits_to_write()


def test_all_that_leaves_together_over_a_lane_is_one_frame() -> None:
    spec = TaskSpec(bytes(16), bytes(16), bytes(lanes._MOST_BYTES), sequence=1 << 40)
    settled = list(range(1 << 40, (1 << 40) + 10_000))
    results = range(1 << 40, (1 << 40) + lane_ends._FRAME_RESULTS)
    values = [bytes(lane_ends.MOST_BYTES)] * len(results)
    for message in (
        wire.CallOverLane(1 << 62, 1 << 40, settled, [spec] * lanes._FRAME_CALLS),
        wire.LaneDone(1 << 62, list(results), bytes(len(results)), values, list(results)),
    ):
        assert 1 << 20 < len(wire.encode(message)) <= MOST - TAG


def test_the_end_of_one_is_the_end_of_the_other() -> None:
    with joined() as (caller, called):
        caller.send(b"last words")
        caller.close()
        assert receive(called) == [b"last words"]
        assert called.ended
        assert not called.damaged
        called.send(b"to nobody")
        assert not called.waits_to_write()
        assert called.receive() == []


def test_who_speaks_to_one_who_has_gone_learns_that_it_has_ended() -> None:
    with joined() as (caller, called):
        called.close()
        caller.send(b"to nobody")
        assert caller.ended
        assert not caller.waits_to_write()


# -- damage ------------------------------------------------------------------------------------------------------------


def heard(data: bytes, *, calling: bool = False, secret: bytes = SECRET) -> tuple[list[bytes], bool]:
    """The frames that come of some bytes, and whether the stream ends before its connection does. It does with it, and nothing comes behind its end."""
    with hearing(calling=calling, secret=secret) as (stream, theirs):
        theirs.send(data)
        frames = receive(stream)
        early = stream.ended
        assert stream.damaged == early
        theirs.shutdown(socket.SHUT_WR)
        assert receive(stream) == []
        assert stream.ended
        assert stream.received == len(frames)
        return frames, early


FRAMES = [b"first", b"next", b"third"]
RECORDS = sealed(FRAMES)


def test_a_changed_bit_ends_the_stream() -> None:
    first, second, third = RECORDS
    for bit in range(8 * len(second)):
        changed = bytearray(second)
        changed[bit // 8] ^= 1 << bit % 8
        frames, early = heard(first + changed + third)
        assert frames == [b"first"], f"bit {bit}"
        # A length that has grown may wait for more: what then comes is no record.
        assert early or int.from_bytes(changed[:4], "little") > len(second + third) - 4, f"bit {bit}"


def test_a_stream_that_is_cut_gives_the_frames_that_are_whole() -> None:
    whole = b"".join(RECORDS)
    ends = list(itertools.accumulate(map(len, RECORDS)))
    for length in range(len(whole) + 1):
        frames, early = heard(whole[:length])
        assert frames == FRAMES[: sum(end <= length for end in ends)]
        assert not early


def test_a_record_that_has_lost_bytes_ends_the_stream() -> None:
    first, second, third = RECORDS
    for at in range(len(second)):
        frames, early = heard(first + second[:at] + second[at + 1 :] + third + bytes(MOST // 100))
        assert frames == [b"first"]
        assert early or at < 4


@pytest.mark.parametrize(
    ("order", "before"),
    [([0, 0, 1], 1), ([0, 1, 1, 2], 2), ([0, 2], 1), ([1, 2], 0), ([1, 0, 2], 0), ([0, 2, 1], 1), ([0, 1, 2, 0], 3)],
)
def test_records_that_are_repeated_left_out_or_moved_end_the_stream(order: list[int], before: int) -> None:
    assert heard(b"".join(RECORDS[index] for index in order)) == (FRAMES[:before], True)


def test_what_one_says_is_no_answer_to_it() -> None:
    with hearing(calling=True) as (stream, theirs):
        stream.send(b"first")
        theirs.send(theirs.recv(1000))
        assert receive(stream) == []
        assert stream.damaged


def test_a_record_of_another_stream_ends_it() -> None:
    others = sealed(FRAMES, secret=OTHER_SECRET)
    assert heard(others[0]) == ([], True)
    assert heard(RECORDS[0] + others[1] + RECORDS[2]) == ([b"first"], True)


def test_who_has_not_the_secret_says_nothing() -> None:
    assert heard(b"".join(RECORDS), secret=OTHER_SECRET) == ([], True)


@pytest.mark.parametrize("length", [0, 1, TAG - 1, MOST + 1, 1 << 31, (1 << 32) - 1])
def test_lengths_out_of_bounds_end_the_stream_at_once(length: int) -> None:
    assert heard(RECORDS[0] + length.to_bytes(4, "little")) == ([b"first"], True)


def test_nothing_comes_behind_damage() -> None:
    first, second, third = RECORDS
    with hearing() as (stream, theirs):
        theirs.send(first + second[:-1] + bytes([second[-1] ^ 1]))
        assert receive(stream) == [b"first"]
        theirs.send(second + third)
        assert receive(stream) == []
        stream.send(b"no answer")
        assert rest(theirs) == b""


# -- slow readers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_what_a_slow_reader_does_not_take_waits(seed: int, said: dict[Any, bytes]) -> None:
    rng = random.Random(seed)
    frames = [rng.randbytes(rng.choice([0, 10, 5000])) for _ in range(600)]
    with hearing(calling=True) as (stream, theirs):
        taken = bytearray()
        for frame in frames:
            stream.send(frame)
            if rng.random() < 0.2:
                with contextlib.suppress(BlockingIOError):
                    taken += theirs.recv(rng.choice([1, 100, 10_000]))
        assert stream.waits_to_write()
        while stream.waits_to_write():
            with contextlib.suppress(BlockingIOError):
                taken += theirs.recv(rng.choice([1, 1000, 100_000]))
            stream.flush()
        taken += rest(theirs)
        assert taken == b"".join(sealed(frames))
    assert list(said.values()) == frames


def test_what_waits_for_one_who_goes_is_lost() -> None:
    with hearing(calling=True) as (stream, theirs):
        while not stream.waits_to_write():
            stream.send(bytes(10_000))
        theirs.close()
        stream.flush()
        assert stream.ended
        assert not stream.waits_to_write()


# -- dialling ----------------------------------------------------------------------------------------------------------


class Port:
    """A TCP port; before it is opened who comes is refused."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(20)
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"

    def open(self) -> None:
        self.socket.listen()

    def accept(self) -> socket.socket:
        made, _ = self.socket.accept()
        made.settimeout(20)
        return made


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.socket.close()


@pytest.fixture
def dial(port: Port) -> Iterator[Callable[[], DialledStream]]:
    """A function that dials the port, for the process with number 40 and the stream with ticket 7."""
    made = []

    def begin() -> DialledStream:
        made.append(DialledStream(port.address, 40, 7, SECRET))
        return made[-1]

    yield begin
    for stream in made:
        stream.close()


BEGINNING = preface(40, 7)


def read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := connection.recv(size - len(found))):
        found += data
    return found


def until_ended(stream: SealedStream) -> None:
    while not stream.ended:
        assert select.select([stream], [], [], 20)[0]
        stream.receive()


def let_it_leave(stream: SealedStream) -> None:
    while stream.waits_to_write():
        assert select.select([], [stream], [], 20)[1]
        stream.flush()


def wait_frame(stream: SealedStream) -> bytes:
    assert select.select([stream], [], [], 20)[0]
    (frame,) = stream.receive()
    return frame


def test_a_call_and_its_answer(port: Port, dial: Callable[[], DialledStream]) -> None:
    port.open()
    stream = dial()
    stream.send(b"call")
    with port.accept() as inner:
        let_it_leave(stream)
        whole = BEGINNING + sealed([b"call"])[0]
        assert read(inner, len(whole)) == whole
        inner.sendall(sealed([b"answer"], CALLED)[0])
        assert wait_frame(stream) == b"answer"


def test_it_dials_again_and_says_the_same(
    port: Port, dial: Callable[[], DialledStream], said: dict[Any, bytes]
) -> None:
    stream = dial()
    stream.send(b"first")
    until_ended(stream)
    assert stream.may_dial_again()
    stream.send(b"said to nobody")  # but not lost
    port.open()
    assert stream.dial_again(0.0)
    let_it_leave(stream)
    whole = BEGINNING + b"".join(sealed([b"first", b"said to nobody"]))
    for number in range(1, 4):
        with port.accept() as inner:
            assert read(inner, len(whole)) == whole
        until_ended(stream)
        assert stream.may_dial_again()
        stream.send(b"later")
        whole += sealed([b"later"], first=number + 1)[0]
        assert stream.dial_again(float(number))
        let_it_leave(stream)
    with port.accept() as inner:
        assert read(inner, len(whole)) == whole
        inner.sendall(sealed([b"answer"], CALLED)[0])
        assert wait_frame(stream) == b"answer"
    assert list(said.values()) == [b"first", b"said to nobody", b"later", b"later", b"later"]


def test_it_does_not_dial_all_the_time(port: Port, dial: Callable[[], DialledStream]) -> None:
    stream = dial()
    times, now = [], 0.0
    for millisecond in range(3000):
        now = 100.0 + millisecond / 1000
        until_ended(stream)
        if stream.dial_again(now):
            times.append(now)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5, 0.5], abs=0.002)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_refused_on_the_way_all_arrives_once(
    port: Port, dial: Callable[[], DialledStream], said: dict[Any, bytes], seed: int
) -> None:
    rng = random.Random(seed)
    port.open()
    stream = dial()
    frames: list[bytes] = []
    longest = b""

    def speak() -> None:
        for _ in range(rng.randrange(4)):
            frames.append(rng.randbytes(rng.choice([0, 20, 200_000, 900_000])))
            stream.send(frames[-1])

    for number in range(8):
        speak()
        with port.accept() as inner:
            stream.flush()
            inner.setblocking(False)
            heard_now = b""
            for _ in range(rng.randrange(6)):
                with contextlib.suppress(BlockingIOError):
                    heard_now += inner.recv(rng.choice([3, 1000, 1 << 20]))
                stream.flush()
            shared = min(len(heard_now), len(longest))
            assert heard_now[:shared] == longest[:shared], "it has said something else than before"
            longest = max(longest, heard_now, key=len)
            speak()
            if rng.random() < 0.5:
                inner.send(sealed([b"half an answer"], CALLED)[0][: rng.randrange(20)])
        until_ended(stream)
        assert stream.may_dial_again()
        speak()
        assert stream.dial_again(float(number))
    with port.accept() as inner:
        found: list[bytes] = []
        inner.settimeout(20)
        stream.flush()
        assert read(inner, len(BEGINNING)) == BEGINNING
        far = SealedStream(inner, SECRET, calling=False)
        while len(found) < len(frames):
            stream.flush()
            found += far.receive()
            assert not far.ended
        assert found == frames
        far.send(b"answer")
        assert wait_frame(stream) == b"answer"
        far.close()
    assert len(said) == len(frames) + 1


def test_it_does_not_dial_again_once_something_genuine_has_come(port: Port, dial: Callable[[], DialledStream]) -> None:
    port.open()
    stream = dial()
    with port.accept() as inner:
        inner.sendall(sealed([b""], CALLED)[0])
        assert wait_frame(stream) == b""
    until_ended(stream)
    assert not stream.may_dial_again()


def test_it_does_not_dial_again_when_somebody_else_has_answered(port: Port, dial: Callable[[], DialledStream]) -> None:
    port.open()
    stream = dial()
    with port.accept() as inner:
        inner.sendall(sealed([b"answer"], CALLED, OTHER_SECRET)[0])
        until_ended(stream)
    assert stream.damaged
    assert not stream.may_dial_again()


def test_dialling_leaves_no_descriptors(port: Port, dial: Callable[[], DialledStream]) -> None:
    stream = dial()
    before = open_descriptors()
    for number in range(20):
        until_ended(stream)
        assert stream.dial_again(float(number))
        assert open_descriptors() == before


def test_there_is_no_such_host() -> None:
    before = open_descriptors()
    with pytest.raises(OSError):
        DialledStream("no.such.host.invalid:1", 40, 7, SECRET)
    assert open_descriptors() == before


# -- visitors ----------------------------------------------------------------------------------------------------------


class House:
    """A process that is called, and its door."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.besides = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.visitors = Visitors(path, self.besides)
        self.refused = 0
        self.visitors.on_refused = self._count
        self._outside: list[socket.socket] = []

    def _count(self, count: int) -> None:
        assert count > 0
        self.refused += count

    def come(self, said: bytes = b"") -> socket.socket:
        """Somebody comes, and has said this behind the part of the preface that the door reads."""
        outer, inner = socket.socketpair()
        with inner, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            outer.setblocking(False)
            outer.sendall(said)
            door.connect(self.path)
            socket.send_fds(door, [BEGINNING[:HEARD]], [inner.fileno()])
        self._outside.append(outer)
        return outer

    def call(self, ticket: int, secret: bytes) -> tuple[SealedStream, socket.socket]:
        """Somebody comes with a ticket; the connection is that of the stream."""
        connection = self.come(ticket.to_bytes(8, "little"))
        return SealedStream(connection, secret, calling=True), connection

    def take(self) -> list[tuple[bytes, SealedStream]]:
        """All frames that have come."""
        found, silent = [], 0
        while silent < 5:  # to be let in, and to be heard, are two
            frame = self.visitors.next_frame()
            silent = 0 if frame is not None else silent + 1
            if frame is not None:
                found.append(frame)
        return found

    def frames(self) -> list[bytes]:
        return [frame for frame, _ in self.take()]

    def is_quiet(self) -> bool:
        """Whether whoever waits here sleeps."""
        return not select.select([self.visitors.fileno()], [], [], 0)[0]

    def close(self) -> None:
        self.visitors.close()
        os.close(self.besides)
        for outer in self._outside:
            outer.close()


@pytest.fixture
def house() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="zs", dir="/tmp") as place:
        before = open_descriptors()
        made = House(os.path.join(place, "x40"))
        yield made
        assert made.is_quiet(), "it would never sleep again"
        made.close()
        assert open_descriptors() == before


def options(connection: socket.socket) -> tuple[bool, bool, bytes]:
    """Does nothing wait, is the peer looked after, and what paces the connection?"""
    nothing_waits = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    alive = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return bool(nothing_waits), bool(alive), connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_nothing_paces_what_stays_within_the_host(house: House, family: int, host: str) -> None:
    with socket.socket(family) as listening, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        listening.bind((host, 0))
        listening.listen()
        port = listening.getsockname()[1]
        with sealed_stream.connecting(f"[{host}]:{port}") as outer:
            inner, _ = listening.accept()
            with inner:
                door.connect(house.path)
                socket.send_fds(door, [BEGINNING[:HEARD]], [inner.fileno()])
                assert house.visitors.next_frame() is None
                for end in (outer, inner):  # the one that was handed over is the same connection as `inner`
                    nothing_waits, alive, pace = options(end)
                    assert nothing_waits
                    assert alive
                    assert pace.rstrip(b"\0") == b"reno"
    assert house.take() == []
    assert house.refused == 1  # it has gone


def ticket(number: int) -> bytes:
    return number.to_bytes(8, "little")


def test_who_is_expected_is_let_in_and_answered(house: House) -> None:
    house.visitors.expect(7, SECRET)
    caller, _ = house.call(7, SECRET)
    for number in range(3):
        caller.send(b"call %d" % number)
        ((frame, stream),) = house.take()
        assert frame == b"call %d" % number
        house.visitors.answer(stream, frame + b" and back")
        assert receive(caller) == [b"call %d and back" % number]
    assert house.refused == 0


def test_to_wait_ends_when_somebody_has_come_or_something_besides(house: House) -> None:
    house.visitors.expect(7, SECRET)
    house.visitors.wait(0.0)
    assert house.visitors.next_frame() is None
    os.eventfd_write(house.besides, 1)
    house.visitors.wait(-1.0)
    os.eventfd_read(house.besides)
    house.call(7, SECRET)[0].send(b"call")
    found = None
    while found is None:
        house.visitors.wait(-1.0)
        found = house.visitors.next_frame()
    assert found[0] == b"call"


@pytest.mark.parametrize(
    "said",
    [
        ticket(8) + RECORDS[0],
        ticket(0) + RECORDS[0],
        ticket(7)[::-1] + RECORDS[0],
        ticket(7) + sealed([b"first"], secret=OTHER_SECRET)[0],
        ticket(7) + sealed([b"first"], CALLED)[0],
        ticket(7) + sealed([b"first"], first=1)[0],
        ticket(7) + bytes(4),
        ticket(7) + b"\xff" * 4,
        bytes(1000),
    ],
    ids=[
        "unknown ticket",
        "no ticket",
        "backward ticket",
        "wrong secret",
        "reflected",
        "not the first record",
        "no length",
        "great length",
        "nothing",
    ],
)
def test_strangers_are_refused_without_a_word(house: House, said: bytes) -> None:
    house.visitors.expect(7, SECRET)
    for number in range(1, 4):
        stranger = house.come(said)
        assert house.frames() == []
        assert is_over(stranger)
        assert house.refused == number
    caller, _ = house.call(7, SECRET)  # the ticket was not used up by them
    caller.send(b"call")
    assert house.frames() == [b"call"]


def test_who_goes_before_he_has_shown_anything_is_counted(house: House) -> None:
    house.visitors.expect(7, SECRET)
    sayings = [b"", ticket(7)[:3], ticket(7), ticket(7) + RECORDS[0][:-1]]
    for number, said in enumerate(sayings, 1):
        house.come(said).close()
        assert house.frames() == []
        assert house.refused == number


def test_a_ticket_may_come_in_pieces(house: House) -> None:
    house.visitors.expect(0x0102030405060708, SECRET)
    outer = house.come()
    for byte in ticket(0x0102030405060708) + RECORDS[0][:-1]:
        assert house.frames() == []
        assert house.is_quiet()
        outer.send(bytes([byte]))
    assert house.frames() == []
    outer.send(RECORDS[0][-1:])
    assert house.frames() == [b"first"]
    assert house.refused == 0


def test_a_used_ticket_lets_nobody_in(house: House) -> None:
    house.visitors.expect(7, SECRET)
    caller, _ = house.call(7, SECRET)
    caller.send(b"call")
    ((_, stream),) = house.take()
    again, connection = house.call(7, SECRET)
    again.send(b"another")
    assert house.frames() == []
    assert is_over(connection)
    assert house.refused == 1
    house.visitors.answer(stream, b"answer")
    assert receive(caller) == [b"answer"]


def recording(house: House) -> bytes:
    """What a caller with ticket 7 has said behind the part that the door reads, all of which was taken in. He stays."""
    house.visitors.expect(7, SECRET)
    whole = ticket(7) + b"".join(RECORDS)
    house.come(whole)
    assert house.frames() == FRAMES
    return whole


def test_a_recording_leads_nowhere_while_the_first_is_there_and_afterwards(house: House) -> None:
    whole = recording(house)
    for number in range(1, 4):
        replay = house.come(whole)
        assert house.frames() == []
        assert is_over(replay)
        assert house.refused == number
    house._outside[0].close()
    assert house.frames() == []
    replay = house.come(whole)
    assert house.frames() == []
    assert is_over(replay)
    assert house.refused == 4


def test_the_same_played_twice_at_once_is_heard_once(house: House) -> None:
    house.visitors.expect(7, SECRET)
    both = [house.come(ticket(7)), house.come(ticket(7))]
    assert house.frames() == []
    for outer in both:
        outer.send(b"".join(RECORDS))
    ((_, stream), *others) = house.take()
    assert len(others) == len(FRAMES) - 1
    house.visitors.answer(stream, b"answer")
    answers = [rest(outer) for outer in both]
    assert sorted(answers) == [b"", sealed([b"answer"], CALLED)[0]]
    assert is_over(both[answers.index(b"")])
    assert house.refused == 1


def test_the_same_played_twice_and_the_first_has_said_it_all(house: House) -> None:
    house.visitors.expect(7, SECRET)
    first, second = house.come(ticket(7)), house.come(ticket(7))
    assert house.frames() == []
    first.send(RECORDS[0])
    assert house.frames() == [b"first"]
    second.send(RECORDS[0])
    assert house.frames() == []
    assert is_over(second)
    assert not is_over(first)
    assert house.refused == 1


@pytest.mark.parametrize(
    "shown",
    [b"", ticket(7)[:5], ticket(7), ticket(7) + RECORDS[0][:-1]],
    ids=["nothing", "half a ticket", "a ticket", "half a record"],
)
def test_who_says_too_little_makes_room_when_somebody_comes(
    house: House, monkeypatch: pytest.MonkeyPatch, shown: bytes
) -> None:
    clock: Any = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sealed_stream, "time", clock)
    house.visitors.expect(7, SECRET)
    house.visitors.expect(8, SECRET)
    silent = house.come(shown)
    assert house.frames() == []
    clock.now += 3.9
    other, _ = house.call(8, SECRET)
    other.send(b"call")
    assert house.frames() == [b"call"]
    assert not is_over(silent)
    clock.now += 0.2
    caller, _ = house.call(7, SECRET)
    caller.send(b"call")
    assert house.frames() == [b"call"]
    assert is_over(silent)
    assert house.refused == 1
    clock.now += 1000.0
    house.come()
    assert house.frames() == []
    for stream in (caller, other):  # who has shown that he knows the secret may be silent
        stream.send(b"another")
        assert house.frames() == [b"another"]


@pytest.mark.parametrize("shown", [b"", ticket(7)[:5], ticket(7)], ids=["nothing", "half a ticket", "a ticket"])
def test_of_too_many_who_wait_the_oldest_makes_room(
    house: House, monkeypatch: pytest.MonkeyPatch, shown: bytes
) -> None:
    monkeypatch.setattr(sealed_stream, "_MOST_WAITING", 4)
    house.visitors.expect(7, SECRET)
    people = [house.come(shown) for _ in range(9)]  # all at once
    house.frames()
    for _ in range(11):
        people.append(house.come(shown))
        house.frames()
    over = [is_over(outer) for outer in people]
    assert house.refused == sum(over) >= 15
    assert over == sorted(over, reverse=True), "the oldest have gone"
    people[-1].send(ticket(7)[len(shown) :] + RECORDS[0])
    assert house.frames() == [b"first"]


def test_to_forget_a_ticket_closes_its_stream(house: House) -> None:
    for number in (6, 7, 8):
        house.visitors.expect(number, SECRET)
    callers = [house.call(number, SECRET) for number in (6, 7)]
    for caller, _ in callers:
        caller.send(b"call")
    found = house.take()
    assert [frame for frame, _ in found] == [b"call", b"call"]
    for number in (7, 8, 9):
        house.visitors.forget(number)
    assert is_over(callers[1][1])
    assert not is_over(callers[0][1])
    for _, stream in found:
        house.visitors.answer(stream, b"answer")
    assert receive(callers[0][0]) == [b"answer"]
    for number in (7, 8):
        caller, connection = house.call(number, SECRET)
        caller.send(b"call")
        assert house.frames() == []
        assert is_over(connection)
    assert house.refused == 2


def test_whoever_was_let_in_goes(house: House) -> None:
    house.visitors.expect(7, SECRET)
    caller, connection = house.call(7, SECRET)
    caller.send(b"call")
    caller.send(b"last words")
    connection.shutdown(socket.SHUT_WR)
    found = house.take()
    assert [frame for frame, _ in found] == [b"call", b"last words"]
    for _, stream in found:
        house.visitors.answer(stream, b"too late")
    assert receive(caller) == []
    assert house.refused == 0


def test_damage_behind_genuine_frames_is_counted(house: House) -> None:
    house.visitors.expect(7, SECRET)
    outer = house.come(ticket(7) + RECORDS[0] + RECORDS[2])
    assert house.frames() == [b"first"]
    assert is_over(outer)
    assert house.refused == 1


@pytest.mark.parametrize("seed", range(3))
def test_frames_of_each_stream_are_in_order(house: House, seed: int) -> None:
    rng = random.Random(seed)
    people = range(1, 6)
    for number in people:
        house.visitors.expect(number, bytes([number]) * 32)
    callers = {number: house.call(number, bytes([number]) * 32)[0] for number in people}
    count = dict.fromkeys(people, 0)
    found: list[bytes] = []
    for _ in range(500):
        number = rng.choice(people)
        callers[number].send(b"%d:%d" % (number, count[number]))
        count[number] += 1
        if rng.random() < 0.2 and (frame := house.visitors.next_frame()) is not None:
            found.append(frame[0])
    found += house.frames()
    for number in people:
        of_this = [frame for frame in found if frame.startswith(b"%d:" % number)]
        assert of_this == [b"%d:%d" % (number, index) for index in range(count[number])]


@pytest.mark.parametrize("seed", range(5))
def test_strangers_do_not_disturb_callers(
    house: House, monkeypatch: pytest.MonkeyPatch, said: dict[Any, bytes], seed: int
) -> None:
    """They come, say something in pieces, play again what was said, and go as they like."""
    rng = random.Random(seed)
    clock: Any = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sealed_stream, "time", clock)
    monkeypatch.setattr(sealed_stream, "_MOST_WAITING", 8)
    callers: dict[int, SealedStream] = {}
    recordings: list[bytes] = []
    strangers: list[socket.socket] = []
    count = 0
    for step in range(600):
        what = rng.random()
        clock.now += rng.choice([0.0, 0.1, 2.0])
        if what < 0.1:
            new = 1000 + step
            house.visitors.expect(new, SECRET)  # told in clear: they know it, too
            strangers.append(house.come(ticket(new) + rng.choice([b"", RECORDS[0][:9], bytes(20)])))
            secret = step.to_bytes(32, "little")
            house.visitors.expect(new + 1000, secret)
            callers[new + 1000], _ = house.call(new + 1000, secret)
            recordings.append(ticket(new + 1000) + sealed([b"call"], secret=secret)[0])
            callers[new + 1000].send(b"call")
            assert house.frames() == [b"call"]
            count += 1
        elif what < 0.3:
            sayings = [b"", rng.randbytes(rng.randrange(60)), *recordings[-3:]]
            strangers.append(house.come(rng.choice(sayings)[: rng.choice([3, 12, 100])]))
        elif what < 0.5 and strangers:
            with contextlib.suppress(OSError):
                rng.choice(strangers).send(rng.choice([rng.randbytes(5), *recordings[-2:]]))
        elif what < 0.6 and strangers:
            strangers.pop(rng.randrange(len(strangers))).close()
        elif what < 0.65 and callers:
            gone = rng.choice(list(callers))
            callers.pop(gone)
            house.visitors.forget(gone)
        elif callers:
            caller = rng.choice(list(callers.values()))
            caller.send(b"%d" % step)
            ((frame, stream),) = house.take()
            assert frame == b"%d" % step
            house.visitors.answer(stream, frame)
            assert receive(caller) == [frame]
        assert house.frames() == []
        assert house.is_quiet()
        assert not any(rest(stranger) for stranger in strangers)
    assert count > 30
    assert house.refused > 100
    assert len(house.visitors._doorway._waiting) <= 8
    for caller in callers.values():
        caller.send(b"still here")
        assert house.frames() == [b"still here"]


def test_a_visitor_who_is_slow_to_hear_gets_all_answers(house: House) -> None:
    rng = random.Random(1)
    house.visitors.expect(7, SECRET)
    caller, _ = house.call(7, SECRET)
    caller.send(b"call")
    ((_, stream),) = house.take()
    answers = [rng.randbytes(rng.choice([10, 20_000])) for _ in range(200)]
    for answer in answers:
        house.visitors.answer(stream, answer)
    assert stream.waits_to_write()
    assert house.is_quiet()
    found: list[bytes] = []
    while len(found) < len(answers):
        found += caller.receive()
        assert house.visitors.next_frame() is None
    assert found == answers
    assert not stream.waits_to_write()


def test_a_visitor_who_never_hears_and_goes(house: House) -> None:
    house.visitors.expect(7, SECRET)
    caller, _ = house.call(7, SECRET)
    caller.send(b"call")
    ((_, stream),) = house.take()
    while not stream.waits_to_write():
        house.visitors.answer(stream, bytes(10_000))
    caller.close()
    assert house.frames() == []
    assert stream.ended
    house.visitors.answer(stream, b"too late")


def test_a_child_that_was_forked_does_not_keep_it_awake(house: House) -> None:
    """It has all descriptors, too: what epoll waits for does not go when they are closed here."""
    for number in (6, 7):
        house.visitors.expect(number, SECRET)
    kept = []
    for number, shown in ((6, RECORDS[0]), (7, RECORDS[0]), (7, b"")):
        house.come(ticket(number)[:5])
        outer = house._outside[-1]
        assert house.frames() == []
        kept += [os.dup(descriptor) for descriptor in house.visitors._doorway._waiting]
        outer.send(ticket(number)[5:] + shown)
        assert house.frames() == ([b"first"] if shown else [])
    house.visitors.forget(6)
    house._outside[1].send(RECORDS[0])  # damage
    assert house.frames() == []
    assert house.refused == 2
    for outer in house._outside:
        with contextlib.suppress(BrokenPipeError):
            outer.send(b"still there?")
        outer.close()
    assert house.is_quiet()
    for descriptor in kept:
        os.close(descriptor)


def test_no_descriptors_for_those_who_come(house: House) -> None:
    """What cannot be handed over for want of a descriptor is closed, and may be dialled again."""
    house.visitors.expect(7, SECRET)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outer = house.come(ticket(7) + RECORDS[0])
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(0))
        assert house.visitors.next_frame() is None
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert house.frames() == []
    assert is_over(outer)
    house.come(ticket(7) + RECORDS[0])
    assert house.frames() == [b"first"]


def test_the_socket_of_one_who_died_is_no_hindrance() -> None:
    with tempfile.TemporaryDirectory(prefix="zs", dir="/tmp") as place:
        path = os.path.join(place, "x40")
        House(path).close()
        assert os.path.exists(path)
        made = House(path)
        made.visitors.expect(7, SECRET)
        made.come(ticket(7) + RECORDS[0])
        assert made.frames() == [b"first"]
        made.close()
        before = open_descriptors()
        with pytest.raises(OSError, match="No such file"):
            Visitors(os.path.join(place, "nowhere", "x40"), 0)
        assert open_descriptors() == before
