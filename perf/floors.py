"""What this machine can do at all: the raw costs under every figure, measured in the same run as the figures.

Covers round trips between two processes (ZeroMQ, pipe, futex), one-way streams, copies into touched memory, pickling
and forking. Does not cover one hop answered through shared memory: that is the engine's own path, and its figure is
the actor row. Each floor has the shape of a row of `rows.py` (prepare, yield the function to be timed, tidy up), so
that the same timer and the same interleaving serve both.

The echoing processes of the ZeroMQ floors are fresh interpreters (a context must not cross a fork); the others are
forked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import LARGE, Call, Row

STREAM_BATCH = 1000
SPEC_BYTES = 128
"""Size of the messages: about what a small call takes on the wire."""

FUTEX_CALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
"""Number of the futex system call (asm/unistd.h of each machine)."""

FUTEX_WAIT, FUTEX_WAKE = 0, 1
PR_SET_PDEATHSIG = 1


# ---- ZeroMQ

ECHO = """
import sys, zmq
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.setsockopt(zmq.LINGER, 0)
router.bind(sys.argv[1])
every = int(sys.argv[2])
seen = 0
while True:
    peer, message = router.recv_multipart()
    if message == b"end":
        break
    seen += 1
    if seen % every == 0:
        router.send_multipart([peer, message])
router.close()
context.term()
"""
"""The other side of the ZeroMQ floors: answers every n-th message."""


def _zmq_peer(every: int) -> Iterator[Any]:
    import zmq

    with tempfile.TemporaryDirectory(prefix="zray-floor-") as directory:
        address = f"ipc://{directory}/echo"
        peer = subprocess.Popen([sys.executable, "-c", ECHO, address, str(every)])
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        dealer.connect(address)
        try:
            yield dealer
            dealer.send(b"end")
            peer.wait(20)
        finally:
            if peer.poll() is None:
                peer.kill()
                peer.wait()
            dealer.close()
            context.term()


def zmq_echo(_api: object) -> Iterator[Call]:
    message = bytes(SPEC_BYTES)
    for dealer in _zmq_peer(1):

        def call(dealer: Any = dealer) -> None:
            dealer.send(message)
            dealer.recv()

        yield call


def zmq_stream(_api: object) -> Iterator[Call]:
    message = bytes(SPEC_BYTES)
    for dealer in _zmq_peer(STREAM_BATCH):

        def call(dealer: Any = dealer) -> None:
            send = dealer.send
            for _ in range(STREAM_BATCH):
                send(message)
            dealer.recv()

        yield call


# ---- pipe and futex


def _forked(body: Call) -> int:
    """Fork a child that runs `body` and ends without running anything of the parent's; return its process id.

    The child dies with its parent (prctl(2), PR_SET_PDEATHSIG), whatever the parent dies of.
    """
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        body()
    finally:
        os._exit(0)


def pipe_echo(_api: object) -> Iterator[Call]:
    """Two pipes and plain reads: less than `multiprocessing.Pipe` does, so a lower floor than it."""
    read_end, write_end = os.pipe()
    back_read, back_write = os.pipe()

    end = b"end"  # said, not left to the end of the pipe: a child forked later holds a copy of the writing end

    def echo() -> None:
        while (message := os.read(read_end, SPEC_BYTES)) != end:
            os.write(back_write, message)

    child = _forked(echo)
    message = bytes(SPEC_BYTES)

    def call() -> None:
        os.write(write_end, message)
        os.read(back_read, SPEC_BYTES)

    try:
        yield call
    finally:
        os.write(write_end, end)
        os.waitpid(child, 0)
        for descriptor in (write_end, read_end, back_read, back_write):
            os.close(descriptor)


def futex_ping_pong(_api: object) -> Iterator[Call]:
    """Wake a process that sleeps on a word of shared memory and sleep until it wakes us: futex(2), through ctypes."""
    number = FUTEX_CALL.get(platform.machine())
    if number is None:
        raise NotImplementedError(f"no futex call number known for {platform.machine()}")
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    ping = ctypes.c_uint32.from_buffer(memory, 0)
    pong = ctypes.c_uint32.from_buffer(memory, 64)
    ping_at, pong_at = (ctypes.c_void_p(ctypes.addressof(word)) for word in (ping, pong))
    ending = 0xFFFFFFFF

    def await_change(word: ctypes.c_uint32, at: ctypes.c_void_p, old: int) -> int:
        while (value := word.value) == old:
            system_call(number, at, FUTEX_WAIT, old, None, None, 0)
        return value

    def answer() -> None:
        seen = 0
        while (seen := await_change(ping, ping_at, seen)) != ending:
            pong.value = seen
            system_call(number, pong_at, FUTEX_WAKE, 1, None, None, 0)

    child = _forked(answer)
    turn = 0

    def call() -> None:
        nonlocal turn
        before = turn
        turn = (turn + 1) % ending
        ping.value = turn
        system_call(number, ping_at, FUTEX_WAKE, 1, None, None, 0)
        await_change(pong, pong_at, before)

    try:
        yield call
    finally:
        ping.value = ending
        system_call(number, ping_at, FUTEX_WAKE, 1, None, None, 0)
        os.waitpid(child, 0)


# ---- memory


def memcpy(_api: object) -> Iterator[Call]:
    """Copy an array into another one whose pages have all been touched: one thread, private memory."""
    import numpy

    source = numpy.arange(LARGE // 8, dtype=numpy.int64)
    target = source.copy()
    yield lambda: numpy.copyto(target, source)


def memcpy_shared(_api: object) -> Iterator[Call]:
    """The same into a shared mapping (4 KiB pages on most machines), which is what an object store copies into."""
    import numpy

    source = numpy.arange(LARGE // 8, dtype=numpy.int64)
    memory = mmap.mmap(-1, source.nbytes)
    target = numpy.frombuffer(memory, dtype=numpy.int64)
    numpy.copyto(target, source)
    yield lambda: numpy.copyto(target, source)


# ---- the interpreter


def pickle_small(_api: object) -> Iterator[Call]:
    """Pickle a small number and read it back: the least that a put and a get of it do between them."""
    dumps, loads = pickle.dumps, pickle.loads

    def call() -> None:
        for _ in range(STREAM_BATCH):
            loads(dumps(0, 5))

    yield call


def pickle_call(_api: object) -> Iterator[Call]:
    """Pickle and read back the arguments of a small call."""
    dumps, loads = pickle.dumps, pickle.loads
    arguments: tuple[tuple[int], dict[str, int]] = ((1,), {})

    def call() -> None:
        for _ in range(STREAM_BATCH):
            loads(dumps(arguments, 5))

    yield call


def fork(_api: object) -> Iterator[Call]:
    """Fork this interpreter and wait for the child's end."""

    def call() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    yield call


def interpreter(_api: object) -> Iterator[Call]:
    """Start a bare Python and wait for its end: under every figure of start-up."""
    yield lambda: subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)


_TABLE = [
    Row("zmq echo", zmq_echo, latency=True),
    Row("zmq stream", zmq_stream, STREAM_BATCH, "messages/s"),
    Row("pipe echo", pipe_echo, latency=True),
    Row("futex ping-pong", futex_ping_pong, latency=True),
    Row("memcpy", memcpy, LARGE / 1e9, "GB/s", warm_calls=2),
    Row("memcpy shared", memcpy_shared, LARGE / 1e9, "GB/s", warm_calls=2),
    Row("pickle small", pickle_small, STREAM_BATCH),
    Row("pickle call", pickle_call, STREAM_BATCH),
    Row("fork", fork, latency=True),
    Row("interpreter", interpreter, latency=True),
]

FLOORS: dict[str, Row] = {row.name: row for row in _TABLE}
"""All floors by name; like those of rows, the names never change."""


def main(arguments: list[str] | None = None) -> int:
    """Measure floors and print them: `python -m perf.floors [NAME ...]`."""
    from . import timing

    names = (sys.argv[1:] if arguments is None else arguments) or list(FLOORS)
    for name in names:
        row = FLOORS[name]
        with row.open(None) as call:
            blocks = timing.measure(call, row.operations, seconds=0.3, warm_calls=row.warm_calls)
            summary = timing.summarize(block.rate for block in blocks)
            line = f"{name:20s} {timing.format_rate(summary.median, row.unit):>16s}  spread {summary.spread:4.0%}"
            if row.latency:
                found = timing.latency(timing.sample(call, 0.5))
                line += f"  p50 {found.p50:8.1f} us  p99 {found.p99:8.1f} us"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    if not Path("/proc").exists():
        sys.exit("the floors need Linux")
    sys.exit(main())
