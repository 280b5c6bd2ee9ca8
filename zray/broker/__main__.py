"""`python -m zray.broker`: read the configuration, make the store, fork the fork parent, serve.

The configuration is one JSON object on standard input; one line on descriptor `ready_fd` tells the starter that the node serves (or why not).
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import sys

import msgspec

from zray import _store
from zray.broker.config import BrokerConfig


def make_segment(config: BrokerConfig) -> int:
    """Create the store's segment and return its descriptor, which every process of the node inherits or opens."""
    try:
        fd = os.memfd_create("zray-store", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        path = os.path.join(config.directory, "store")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    _store.Store.format(fd, config.store_capacity, config.max_objects)
    return fd


def main() -> None:
    """Run a node until its session ends."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=BrokerConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    try:
        fd = make_segment(config)
    except Exception as error:
        os.write(config.ready_fd, f"error {error}\n".encode())
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    from zray.broker import fork_parent

    gc.freeze()
    child = os.fork()
    if child == 0:
        ours.close()
        os.close(config.ready_fd)
        fork_parent.serve(theirs, config.preload)
    theirs.close()
    from zray.broker.membership import CannotJoin
    from zray.broker.server import Broker
    from zray.node import claim_session, hold_session

    # Kept open for as long as the process lives; the fork parent, made before, has no share in it.
    if config.first_directory:
        claim_session(config.directory)
        hold_session(config.first_directory)
    else:
        hold_session(config.directory)
    try:
        broker = Broker(config, _store.Store(fd), fd, ours, child)
        broker.begin_life()
    except (OSError, ValueError, CannotJoin) as error:
        if config.first_directory:
            from zray.broker import comeback

            comeback.did_not(config, str(error))
        os.write(config.ready_fd, f"error {error}\n".encode())
        shutil.rmtree(config.directory, ignore_errors=True)
        os._exit(1)
    address = "" if broker.cluster is None else broker.cluster.address
    if config.first_directory:
        from zray.broker import comeback

        comeback.came_back(config, fd, address)
    os.write(config.ready_fd, f"ready {fd} {address}\n".encode())
    os.close(config.ready_fd)
    # The machines make no cycles; collecting would walk every queued task again and again.
    gc.disable()
    broker.run()
    if broker.heirs:
        from zray.broker import comeback

        comeback.begin_again(config, address, broker.heirs)


if __name__ == "__main__":
    main()
