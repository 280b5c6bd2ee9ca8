"""Rows between two nodes: what a driver pays for work on the other node, and the raw cost of the same hops.

Covers the workloads and the floor. Does not cover how the sides' clusters are started (`sides.py`), nor who is compared and what is asked
(`cluster.py`). Both sides have two nodes on this machine; the first, where the driver is, has no CPUs, the second two, and a resource `there`.

The floor of a task is six hops of 128 bytes through four processes that do nothing else, over the same kinds of sockets: driver to broker (ipc),
broker to broker (TCP with CURVE), broker to worker (ipc), worker to broker (ipc), broker to broker (TCP with CURVE), and a pipe to wake the driver. A
second floor is what no design over these sockets can pass: a process and another, connected with one another, one message there and one back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from .remotely import Server, small_value
from .rows import BATCH, Api, Call, Row

THERE = {"there": 1}
"""What actors ask for, so that they live on the second node."""

FETCHED = 100_000_000
"""Bytes of the array that is fetched from the other node."""

SPEC_BYTES = 128
"""Size of the floor's messages: about what a small call takes on the wire."""


def _task(api: Api) -> Any:
    run = api.remote(small_value)
    api.get([run.remote() for _ in range(10)])
    return run


def tasks_sync(api: Api) -> Iterator[Call]:
    """One task on the other node after another."""
    run = _task(api)

    def call() -> None:
        api.get(run.remote())

    yield call


def tasks_async(api: Api) -> Iterator[Call]:
    """Many tasks on the other node at once."""
    run = _task(api)

    def call() -> None:
        api.get([run.remote() for _ in range(BATCH)])

    yield call


def _actor(api: Api) -> Any:
    actor = api.remote(num_cpus=0, resources=THERE)(Server).remote()
    api.get(actor.small_value.remote())
    return actor


def actor_sync(api: Api) -> Iterator[Call]:
    """One call of an actor on the other node after another."""
    actor = _actor(api)

    def call() -> None:
        api.get(actor.small_value.remote())

    yield call
    api.kill(actor)


def actor_async(api: Api) -> Iterator[Call]:
    """Many calls of an actor on the other node at once."""
    actor = _actor(api)

    def call() -> None:
        api.get([actor.small_value.remote() for _ in range(BATCH)])

    yield call
    api.kill(actor)


def fetch(api: Api) -> Iterator[Call]:
    """Make a large array on the other node and get it here."""

    def make() -> Any:
        import numpy

        return numpy.ones(FETCHED // 8)

    make_there = api.remote(make)

    def call() -> None:
        found = api.get(make_there.remote())
        assert found.nbytes == FETCHED

    yield call


RELAY = """
import sys, zmq
# ROLE IN OUT: receive a message, pass it on; "curve:" addresses are TCP with CURVE, "fd:" the writing end of a pipe.
public, secret = sys.argv[1].encode(), sys.argv[2].encode()
context = zmq.Context()
def secured(socket, server):
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    if server:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, public)
ways = []
for index in range(3, len(sys.argv), 2):
    into, out = sys.argv[index], sys.argv[index + 1]
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    if into.startswith("curve:"):
        secured(router, True)
        into = into[6:]
    router.bind(into)
    pipe = int(out[3:]) if out.startswith("fd:") else None
    dealer = None
    if pipe is None:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 200)
        if out.startswith("curve:"):
            secured(dealer, False)
            out = out[6:]
        dealer.connect(out)
    ways.append((router, dealer, pipe))
poller = zmq.Poller()
for router, _, _ in ways:
    poller.register(router, zmq.POLLIN)
import os
going = True
while going:
    poller.poll()
    for router, dealer, pipe in ways:
        try:
            _, message = router.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            continue
        if pipe is None:
            dealer.send(message)
        else:
            os.write(pipe, b"x")
        going = going and message != b"end"
for router, dealer, _ in ways:
    router.close()
    if dealer is not None:
        dealer.close(200)
context.term()
"""
"""A process that passes messages on."""


def _free_ports(count: int) -> list[int]:
    import socket

    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in made:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in made]


@contextlib.contextmanager
def _relays(routes: list[tuple[str, ...]], keys: tuple[str, str], pipe: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that pass messages on, one for each route; whatever still runs at the end is killed."""
    peers = [
        subprocess.Popen([sys.executable, "-c", RELAY, *keys, *route], pass_fds=[pipe] if pipe >= 0 else [])
        for route in routes
    ]
    try:
        yield peers
    finally:
        for peer in peers:
            if peer.poll() is None:
                peer.kill()
                peer.wait()


def six_hops(_api: object) -> Iterator[Call]:
    """A message through the hops of a task on another node and back."""
    import zmq

    public, secret = (part.decode() for part in zmq.curve_keypair())
    there, back = (f"curve:tcp://127.0.0.1:{port}" for port in _free_ports(2))
    woken, wakes = os.pipe()
    with tempfile.TemporaryDirectory(prefix="zray-floor-") as place:
        here, worker, done = (f"ipc://{place}/{name}" for name in ("here", "worker", "done"))
        routes = [
            (here, there, back, f"fd:{wakes}"),  # the broker of the driver's node
            (there, worker, done, back),  # the broker of the other node
            (worker, done),  # the worker
        ]
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(here)
        message = bytes(SPEC_BYTES)

        def call() -> None:
            dealer.send(message)
            os.read(woken, 1)

        with _relays(routes, (public, secret), wakes) as peers:
            try:
                yield call
                dealer.send(b"end")
                for peer in peers:
                    peer.wait(20)
            finally:
                dealer.close()
                context.term()
                os.close(woken)
                os.close(wakes)


def two_hops(_api: object) -> Iterator[Call]:
    """A message to a process on another node and back, if both were connected with one another."""
    import zmq

    public, secret = zmq.curve_keypair()
    there, back = (f"tcp://127.0.0.1:{port}" for port in _free_ports(2))
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (router, dealer):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.bind(back)
    dealer.setsockopt(zmq.CURVE_SERVERKEY, public)
    dealer.connect(there)
    message = bytes(SPEC_BYTES)

    def call() -> None:
        dealer.send(message)
        router.recv_multipart()

    with _relays([(f"curve:{there}", f"curve:{back}")], (public.decode(), secret.decode()), -1) as peers:
        try:
            yield call
            dealer.send(b"end")
            peers[0].wait(20)
        finally:
            dealer.close()
            router.close()
            context.term()


FLOOR = Row("six hops between two nodes", six_hops, latency=True)
DIRECT = Row("two hops between two processes", two_hops, latency=True)
REMOTE_FLOORS: dict[str, Row] = {row.name: row for row in (FLOOR, DIRECT)}

REMOTE_ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("remote tasks sync", tasks_sync, floors=(FLOOR.name, DIRECT.name), latency=True),
        Row("remote tasks async", tasks_async, operations=BATCH),
        Row("remote actor calls sync", actor_sync, floors=(FLOOR.name, DIRECT.name), latency=True),
        Row("remote actor calls async", actor_async, operations=BATCH),
        Row("100 MB fetched", fetch, latency=True, warm_calls=20),  # both stores have been used in earnest by then
    )
}
