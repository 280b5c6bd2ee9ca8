"""What a host is like: versions, directory, running node, address, port, clock; and what it sees of other hosts.

Covers looking only: nothing here changes the host, but for a port that is listened on while others try it. Does not cover judging what was
found (`zray.launcher.plan`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import selectors
import shutil
import socket
import time
from typing import Any

from . import node_life, watched
from .place import BadPlace, Place

_VERSION = "import zray, zray._store; print(zray.__version__)"
_ANYWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses for documentation only (RFC 5737, RFC 3849): they stand for anywhere."""
_MAX_RUNTIME = 75
"""Bytes of a runtime directory's name that leave room for names of sockets (`zray.node`)."""


def facts(place: Place, request: dict[str, Any], limit: float) -> dict[str, Any]:
    """Look at this host.

    Args:
        place: where the cluster lives here.
        request: "address" and "port" that the node is to have, "installed": the file that tells what was installed.
        limit: seconds that looking may take.
    """
    node = node_life.running(place) if _may_look(place) else None
    address = request["address"] or _reached_address()
    zray, problem = _zray_version(place, limit)
    return {
        "hostname": socket.gethostname(),
        "directory": place.directory,
        "directory_problem": _directory_problem(place),
        "python": platform.python_version(),
        "executable": place.python,
        "zray": zray,
        "zray_problem": problem,
        "installed": _first_line(request["installed"]),
        "node": node,
        "settings": _first_line(place.settings_file),
        "processes": len(place.processes()),
        "address": address,
        "port_problem": "" if node is not None else _port_problem(address, request["port"]),
        "time": time.time(),
        "rsync": shutil.which("rsync") or "",
        "has_directory": os.path.lexists(place.directory),
    }


def _may_look(place: Place) -> bool:
    try:
        return place.check()
    except BadPlace:
        return False


def _directory_problem(place: Place) -> str:
    if len(os.fsencode(place.runtime)) > _MAX_RUNTIME:
        return f"{place.runtime} is too long for names of sockets ({_MAX_RUNTIME} bytes): set 'directory'"
    try:
        if place.check():
            return ""
    except BadPlace as error:
        return str(error)
    parent = os.path.dirname(place.directory)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    return "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written: set 'directory'"


def _zray_version(place: Place, limit: float) -> tuple[str, str]:
    """Return zray's version there and what is wrong with it: one of them is empty."""
    try:
        status, out, said = watched.run(None, [place.python, "-c", _VERSION], place.environment(), limit)
    except (watched.Late, OSError) as error:
        return "", str(error)
    if status == 0:
        return out.decode().strip().splitlines()[-1], ""
    return "", watched.last_lines(said, 1)


def _first_line(path: str) -> str:
    try:
        with open(os.path.expanduser(path)) as file:
            return file.readline().strip()
    except OSError:
        return ""


def _reached_address() -> str:
    """Return the address at which the launcher reached this host (behind a jump host: the inner one), else that of the way out."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) == 4 and "%" not in words[2]:
        return words[2]
    for family, anywhere in _ANYWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))  # nothing is sent
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _bind(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(64)
    except BaseException:
        made.close()
        raise
    return made


def _port_problem(address: str, port: int) -> str:
    """Return why a node could not listen there; empty: it can."""
    try:
        _bind(address, port).close()
    except OSError as error:
        return _bind_words(address, port, error)
    return ""


def _bind_words(address: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name {address} is not known on this host: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {address} is taken by another program: set 'port'"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of this host: set 'address'"
    return f"cannot listen on {address}:{port}: {error.strerror}"


class Listener:
    """Listens on the port that the node is to have, so that others can try it. What comes is not read."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def open(self, address: str, port: int) -> str:
        """Begin; return the problem, if there is one."""
        try:
            self._socket = _bind(address, port)
        except OSError as error:
            return _bind_words(address, port, error)
        return ""

    def close(self) -> None:
        """End."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def reach(addresses: list[tuple[str, int]], limit: float) -> dict[str, str]:
    """Try to connect to each address and port, all at once.

    Returns:
        host:port -> why it cannot be reached from here; empty: it can.
    """
    found: dict[str, str] = {}
    deadline = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        for host, port in addresses:
            name = f"{host}:{port}"
            try:
                family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            except OSError as error:
                found[name] = f"the name {host} is not known: {error.strerror}"
                continue
            probe = socket.socket(family, kind, protocol)
            probe.setblocking(False)
            code = probe.connect_ex(where)
            if code in (0, errno.EINPROGRESS):
                selector.register(probe, selectors.EVENT_WRITE, name)
            else:
                probe.close()
                found[name] = os.strerror(code)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                probe = key.fileobj  # type: ignore[assignment]
                code = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[key.data] = os.strerror(code) if code else ""
                selector.unregister(probe)
                probe.close()
        for key in list(selector.get_map().values()):
            found[key.data] = f"no answer within {limit:g} s (a firewall?)"
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
    return found
