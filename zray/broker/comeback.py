"""A head that was replaced comes back as an ordinary node: in the same process, with nothing of what it was.

Covers what such a node is (`ordinary`, pure) and becoming it. Does not cover how a head learns that it was replaced (`succession`).

While it did not answer, the others have declared it dead: its tasks run elsewhere, its objects are lost or were made again, its detached actors
live on another node. So nothing of it may go on, least of all under the old id, which is dead for ever. What can go on is the place: the process
(whoever has started it waits for it), the address, the resources and labels. Everything else begins anew, by executing the program again. Programs
that were connected have been told; their segment, sockets and directory are gone, so that nothing they still say can reach the new node.

Of the first session's directory two files stay, which people and programs know by name: the cluster's key, and the log.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from zray import ids
from zray import node as nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zray.broker.config import BrokerConfig

_STAYS: Final = frozenset({"broker.log", "cluster.key", nodes.ALIVE})
_CONNECT_S: Final = 2.0
"""Seconds that one of the other nodes may take to answer."""


def ordinary(config: BrokerConfig, address: str, head: str, session: str, node: str) -> BrokerConfig:
    """Return what a node is told that was a head and comes back.

    Args:
        config: what the head was told.
        address: host:port where it listened.
        head: host:port of a node that knows the head.
        session: name of the new session.
        node: its id in hex.
    """
    place = config.cluster
    assert place is not None, "only a node of a cluster can be replaced"
    root, spill_root = os.path.dirname(config.directory), os.path.dirname(config.spill_directory)
    directory = os.path.join(root, session)
    inside = config.spill_directory.startswith(config.directory + os.sep)
    return msgspec.structs.replace(
        config,
        directory=directory,
        spill_directory=os.path.join(directory, "spill") if inside else os.path.join(spill_root, f"zray-{session}"),
        session=session,
        node=node,
        resources={name: amount for name, amount in config.resources.items() if name != nodes.HEAD_RESOURCE},
        first_directory=config.first_directory or config.directory,
        cluster=msgspec.structs.replace(
            place,
            port=int(address.rpartition(":")[2]),
            head=head,
            storage="memory",
            head_grace=0.0,
            replicas=1,
        ),
    )


def begin_again(config: BrokerConfig, address: str, others: Sequence[str]) -> NoReturn:
    """Become an ordinary node of the cluster. The broker has ended, and left its directory.

    Args:
        config: what it was told.
        address: host:port where it listened.
        others: host:port of nodes that know who is the head.
    """
    _leave(config)
    head = next((other for other in others if _listens(other)), "")
    if not head:
        _fail(f"none of the nodes that have replaced it can be reached ({', '.join(others)})", others)
    again = ordinary(config, address, head, secrets.token_hex(4), ids.random_id().hex())
    print(f"[zray] this process begins again as node {again.node[:8]} of the cluster", file=sys.stderr, flush=True)
    nodes.make_session(again.directory, again.spill_directory)
    null = os.open(os.devnull, os.O_WRONLY)
    os.set_inheritable(null, True)
    _become(msgspec.structs.replace(again, ready_fd=null))


def _leave(config: BrokerConfig) -> None:
    """Remove what is left of the session, but for what is known by name outside of it."""
    shutil.rmtree(config.spill_directory, ignore_errors=True)
    if config.first_directory:
        shutil.rmtree(config.directory, ignore_errors=True)
        return
    for entry in os.scandir(config.directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name not in _STAYS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError:
        return False
    return True


def _become(config: BrokerConfig) -> NoReturn:
    """Execute the broker's program with other settings: no thread, descriptor or memory of the old one stays."""
    reading, writing = os.pipe()
    text = msgspec.json.encode(config)
    assert len(text) < 1 << 15, "it is read after the program has begun: until then the pipe holds it"
    os.write(writing, text)
    os.close(writing)
    os.dup2(reading, 0)
    os.execv(sys.executable, [sys.executable, "-c", nodes.START])


def came_back(config: BrokerConfig, store_fd: int, address: str) -> None:
    """The node serves again: let processes of this machine find it, as whoever starts a node does."""
    assert config.cluster is not None
    nodes.write_record(
        nodes.NodeRecord(
            directory=config.directory,
            spill_directory=config.spill_directory,
            broker_pid=os.getpid(),
            store_fd=store_fd,
            session=config.session,
            node=config.node,
            address=address,
            head=config.cluster.head,
            key_file=config.cluster.key_file,
        )
    )


def did_not(config: BrokerConfig, why: str) -> NoReturn:
    """It could not become a node of the cluster again."""
    shutil.rmtree(config.spill_directory, ignore_errors=True)
    shutil.rmtree(config.directory, ignore_errors=True)
    _fail(why, () if config.cluster is None else (config.cluster.head,))


def _fail(why: str, others: Sequence[str]) -> NoReturn:
    where = others[0] if others else "HOST:PORT"
    text = f"this node was the head, was replaced, and cannot come back: {why}. Start it again: zray start --address {where} --key FILE"
    print(f"[zray] {text}", file=sys.stderr, flush=True)
    os._exit(1)
