"""A small process that is one replica of a control store and nothing else: for tests, measurements, and stores without nodes.

Covers its loop, how it is told what to be (a line of JSON on standard input) and its end: on SIGTERM, or when whoever started it
closes standard input. Does not cover what a replica does (`store_replica`, `zray.gcs.replication`), nor brokers that are replicas.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from typing import Final

import msgspec

from zray.broker.links import Heard, Impostor, Links, Prober, Refused
from zray.broker.peer_messages import Replicate
from zray.broker.store_replica import StoreReplica
from zray.gcs.replication.configuration import Place
from zray.gcs.replication.state import StoreState
from zray.gcs.replication.timing import Timing
from zray.gcs.replication.vote_file import VoteFile
from zray.gcs.service import GcsService
from zray.peer_transport import ClusterKey, PeerSockets
from zray.transport import Context, Poller, bracketed, ipc_endpoint

STEP: Final = 256
"""Events that are taken in before what they led to is sent."""


class ReplicaConfig(msgspec.Struct, frozen=True):
    """What such a process is told."""

    id: str
    """In hex. With `votes` it may be that of an earlier process."""
    directory: str
    """For its inner socket; made by the caller, mode 0700."""
    key_file: str
    host: str = "127.0.0.1"
    port: int = 0
    first: bool = False
    contacts: list[tuple[str, str]] = []
    """Other members: id in hex, host:port."""
    votes: str = ""
    """File in which its votes outlive it; empty: its id ends with it."""
    wanted: int = 3
    shards: int = 4
    timing: Timing = Timing()


class ReplicaProcess:
    """The process."""

    def __init__(self, config: ReplicaConfig) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be had, or a file cannot be read.
            ValueError: a file does not hold what it should.
        """
        own = bytes.fromhex(config.id)
        self._context = Context()
        self._inbox = self._context.inbox(ipc_endpoint(config.directory, f"r{os.getpid()}"))
        self.poller = Poller(self._inbox)
        sockets = PeerSockets(self._context, own, ClusterKey.read(config.key_file), self.poller)
        self.address = f"{bracketed(config.host)}:{sockets.listen(config.host, config.port)}"
        self.links = Links(sockets, Prober(self.poller), own)
        self.service = GcsService(None, config.directory, shards=config.shards)
        self.replica = StoreReplica(
            Place(own, time.time_ns(), self.address),
            StoreState(self.service),
            VoteFile(config.votes),
            self.links,
            config.timing,
            time.monotonic(),
            first=config.first,
            contacts=[Place(bytes.fromhex(name), 0, address) for name, address in config.contacts],
            wanted=config.wanted,
        )
        self.running = True
        self._starter = sys.stdin.fileno()
        self.poller.add(self._starter)

    def run(self) -> None:
        """Serve until told to end."""
        while self.running:
            now = time.monotonic()
            wait = max(0.0, min(self.replica.wake_at, self.links.wake_at) - now)
            _, descriptors, news = self.poller.wait(int(min(wait, 1.0) * 1000) + (wait > 0))
            self.step(descriptors, news)
        self.links.close()
        self._context.close()

    def step(self, descriptors: list[int], news: bool) -> None:
        """Take in what has come, let time pass, send."""
        now = time.monotonic()
        events = self.links.receive(now) if news else []
        if self._starter in descriptors and not os.read(self._starter, 4096):
            self.running = False
        events += self.links.probed(descriptors)
        if now >= self.links.wake_at:
            events += self.links.tick(now)
        for event in events:
            if isinstance(event, Heard):
                if isinstance(event.message, Replicate):
                    self.replica.handle(event.node, event.message, now)
            elif isinstance(event, (Refused, Impostor)):
                self.links.forget(event.node)  # nothing more for it; should it begin again, it will be heard
                self.replica.refused(event.node, now)
        if now >= self.replica.wake_at:
            self.replica.tick(now)
        self.replica.flush(now)

    def end(self) -> None:
        """End after this round."""
        self.running = False
        self.poller.interrupt()


def main() -> None:
    """Be a replica."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ReplicaConfig)
    try:
        process = ReplicaProcess(config)
    except (OSError, ValueError) as error:
        print(f"error {error}", flush=True)
        raise SystemExit(1) from None
    signal.signal(signal.SIGTERM, lambda *_: process.end())
    print(f"ready {process.address}", flush=True)
    gc.freeze()
    gc.disable()
    process.run()


if __name__ == "__main__":
    main()
