"""What programs on hosts print, as it is shown here: whole lines with the host's name before them when there are several hosts. Pure."""

from __future__ import annotations

import base64
from typing import Any, Final

_MAX_LINE: Final = 1 << 16
"""Bytes after which a line without an end is shown all the same."""


class Lines:
    """One stream of one host."""

    def __init__(self, prefix: str) -> None:
        """prefix: empty: bytes pass as they come."""
        self._prefix = prefix.encode()
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return what can be shown now."""
        if not self._prefix:
            return data
        *whole, self._held = (self._held + data).split(b"\n")
        if len(self._held) > _MAX_LINE:
            whole.append(self._held)
            self._held = b""
        return b"".join(self._prefix + line + b"\n" for line in whole)

    def rest(self) -> bytes:
        """Return what has no end of line."""
        held, self._held = self._held, b""
        return self._prefix + held + b"\n" if held else b""


class Output:
    """All streams of all hosts: events in, bytes for standard output and standard error out."""

    def __init__(self, hosts: list[str]) -> None:
        self._width = max(map(len, hosts), default=0) if len(hosts) > 1 else 0
        self._streams: dict[tuple[str, str, str], Lines] = {}

    def feed(self, host: str, event: dict[str, Any]) -> tuple[str, bytes]:
        """Take an event of a host ("stream", "data", perhaps "file"); return the stream and what can be shown now."""
        stream, file = event["stream"], event.get("file", "")
        key = (host, stream, file)
        if key not in self._streams:
            words = [host.ljust(self._width)] if self._width else []
            words += [file] if file else []
            self._streams[key] = Lines(" ".join(words) + " | " if words else "")
        return stream, self._streams[key].feed(base64.b64decode(event["data"]))

    def rest(self) -> list[tuple[str, bytes]]:
        """Return what has no end of line, by stream."""
        found = [(stream, lines.rest()) for (_, stream, _), lines in self._streams.items()]
        return [(stream, data) for stream, data in found if data]
