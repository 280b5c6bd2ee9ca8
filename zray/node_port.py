"""The one TCP port of a node: who connects to it reaches the broker, or a process that other nodes may call.

Covers the listening sockets, the thread that serves the door, and the numbers of what is behind it. Does not cover carrying bytes and handing
connections over (`_door_core.h`), nor who is let in: each socket behind the port sees to that itself (`zray.peer_transport`, `zray.sealed_stream`).

Two sockets listen on the port. One is for ZeroMQ's connections between brokers alone, so that nothing is between them; the other is the door, through
which all is reached, the broker too. The kernel chooses by the parity of the caller's source port, which is odd for brokers (`source_endpoint`): a hint,
not more. A broker that comes to the door, through a tunnel or an address translator perhaps, is taken to the broker; a stream that comes to the socket
for brokers is refused, and dialled again.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from typing import Final

from zray._door import Door, steer

BROKER: Final = "p"
"""Name of the socket that the broker binds for other nodes, in the runtime directory."""
VALUES: Final = 0
"""Number of the one that gives values to other nodes."""
NUMBERS: Final = range(1, 1 << 16)
"""Of processes that other nodes may call: a stream names the one that it wants."""
_BEHIND: Final = "x"
_BACKLOG: Final = 256


def socket_behind_door(number: int) -> str:
    """Return the name of the socket to which the door hands connections that ask for a number, in the runtime directory."""
    return f"{_BEHIND}{number}"


def source_endpoint(address: str) -> str:
    """Return what stands before `address` (host:port) where a broker's ZeroMQ connects to it: from a port of any number, for which the kernel draws an odd
    one. Nothing for names: which sort of address they have is not known."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return ""
    return "[::]:0;" if version == 6 else "0.0.0.0:0;"


class NodePort:
    """A port, and the door behind it, which is served by a thread of its own."""

    def __init__(self, host: str, port: int, directory: str) -> None:
        """Listen on host:port (0: any free port), and let people in to sockets of a runtime directory. OSError: the address cannot be had."""
        self._brokers, self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        self.door = Door(self._listener.fileno(), os.path.join(directory, _BEHIND), os.path.join(directory, BROKER))
        self._thread = threading.Thread(target=self.door.serve, name="zray-door", daemon=True)
        self._thread.start()

    def take_listener(self) -> int:
        """Return the descriptor of a socket that listens for brokers alone, once; it is the caller's from now on. -1: there is none, all come through
        the door."""
        return -1 if self._brokers is None else self._brokers.detach()

    def close(self) -> None:
        """End all connections, and listen no more."""
        self.door.stop()
        self._thread.join()
        self.door.close()
        self._listener.close()
        if self._brokers is not None:
            self._brokers.close()


def _listen(host: str, port: int) -> tuple[socket.socket | None, socket.socket]:
    """Return the sockets for brokers and for the door."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Two that share a port would not notice a third: see whether it is free with one that does.
        with _bound(family, kind, protocol, address, shared=False) as alone:
            address = alone.getsockname()
        brokers = _bound(family, kind, protocol, address, shared=True)
        try:
            door = _bound(family, kind, protocol, address, shared=True)
        except BaseException:
            brokers.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    brokers.listen(_BACKLOG)
    door.listen(_BACKLOG)
    try:
        steer(brokers.fileno(), family)
    except OSError:
        brokers.close()
        return None, door
    return brokers, door


def _bound(family: int, kind: int, protocol: int, address: object, *, shared: bool) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setblocking(False)
        made.bind(address)  # type: ignore[arg-type]
    except BaseException:
        made.close()
        raise
    return made
