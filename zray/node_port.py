"""The one TCP port of a node: who connects to it reaches the broker, or a process that the broker has opened.

Covers the listening socket, the thread that serves it, and the numbers of what is behind it. Does not cover carrying bytes (`_door_core.h`), nor who
is let in: each socket behind the port asks for a key itself (`zray.peer_transport`, `zray.transport`).
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Final

from zray._door import FIRST, LAST, Door

BROKER: Final = "p"
"""Name of the socket that the broker binds for other nodes, in the runtime directory."""
NUMBERS: Final = range(FIRST, LAST + 1)
"""Of sockets that can be asked for: whoever connects with a routing id so long is taken there."""
_OPENED: Final = "x"
_BACKLOG: Final = 256


def opened_socket(number: int) -> str:
    """Return the name of the socket with a number, in the runtime directory."""
    return f"{_OPENED}{number}"


class NodePort:
    """A port that is served by a thread of its own."""

    def __init__(self, host: str, port: int, directory: str) -> None:
        """Listen on host:port (0: any free port), and let people in to sockets of a runtime directory. OSError: the address cannot be had."""
        self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        self.door = Door(self._listener.fileno(), os.path.join(directory, _OPENED), os.path.join(directory, BROKER))
        self._thread = threading.Thread(target=self.door.serve, name="zray-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections, and listen no more."""
        self.door.stop()
        self._thread.join()
        self.door.close()
        self._listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _refused(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from None
    return listener


def _refused(host: str, port: int, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}")
