"""What hosts say: lines of a conversation told apart from a shell's chatter, and the record of what a host is like.

Pure: bytes in, messages out. Does not cover how the bytes come (`ssh`) or what follows from them (`plan`).
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

_MAX_CHATTER: Final = 4000
"""Bytes of what else was printed that are kept, for reports of failures."""
_MAX_LINE: Final = 64 << 20
"""Bytes after which a line without an end is chatter."""


class NodeFacts(msgspec.Struct, frozen=True):
    """A node that runs on a host in this cluster's directory."""

    node: str
    """Id in hex."""
    address: str
    head: str
    fingerprint: str
    """Of its cluster's key."""
    broker_pid: int = 0


class HostFacts(msgspec.Struct, frozen=True):
    """What a host is like; the launcher's program there looked (`zray.launcher.remote.looks`)."""

    hostname: str
    directory: str
    """The cluster's, with everything in its name replaced."""
    directory_problem: str
    python: str
    executable: str
    zray: str
    """Version; empty: it cannot be used, and `zray_problem` says why."""
    zray_problem: str
    installed: str
    """Digest of what the launcher has installed; empty: nothing."""
    node: NodeFacts | None
    settings: str
    """Digest of what the node was started with."""
    processes: int
    """How many processes of the cluster run there."""
    address: str
    """Where the node is to listen."""
    port_problem: str
    time: float
    """Its clock, in seconds since the epoch."""
    rsync: str
    has_directory: bool


class Chatter:
    """Splits what comes from a host into messages and chatter."""

    def __init__(self, token: str) -> None:
        """`token`: the random word that messages begin with."""
        self._token = token.encode() + b" "
        self._held = bytearray()
        self._searched = 0
        """So much of what is held is known to have no newline."""
        self.chatter = bytearray()
        """The end of what was no message."""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes as they came; return the messages that they completed.

        A message is a line that begins with the token, or has it after something that somebody printed without a newline.
        """
        self._held += data
        found: list[dict[str, Any]] = []
        while (end := self._held.find(b"\n", self._searched)) >= 0:
            line = bytes(self._held[:end])
            del self._held[: end + 1]
            self._searched = 0
            message = self._message(line)
            if message is None:
                self._keep(line + b"\n")
            else:
                found.append(message)
        self._searched = len(self._held)
        if self._searched > _MAX_LINE:
            self._keep(bytes(self._held[-_MAX_CHATTER:]))
            self._held.clear()
            self._searched = 0
        return found

    def _message(self, line: bytes) -> dict[str, Any] | None:
        before, mark, rest = line.partition(self._token)
        if not mark:
            return None
        try:
            found = json.loads(rest)
        except ValueError:
            return None
        if before.strip():
            self._keep(before + b"\n")
        return found if isinstance(found, dict) else None

    def _keep(self, line: bytes) -> None:
        if line.strip():
            self.chatter += line
            del self.chatter[:-_MAX_CHATTER]

    def rest(self) -> str:
        """Return the end of what was no message, as text."""
        return bytes(self.chatter + self._held[-_MAX_CHATTER:]).decode("utf-8", "replace").strip()


def minor(version: str) -> str:
    """Return major.minor of a version."""
    return ".".join(version.split(".")[:2])


def join_address(host: str, port: int) -> str:
    """Return host:port; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
