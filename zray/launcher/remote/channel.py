"""The conversation on the host's side: requests come on standard input, answers leave on standard output.

Covers framing, payloads, and noticing that the other side has gone. Does not cover what requests mean (`main`). A request is a line of JSON,
followed by as many bytes as its "payload" says. An answer is a line that begins with the conversation's token, a random word: whatever else
the host's shell prints (greetings in .bashrc) is told apart by it.
"""

from __future__ import annotations

import json
import os
import select
from typing import Any


class Gone(Exception):
    """The launcher's side of the conversation has ended."""


class Channel:
    """Two descriptors. Requests and answers alternate; events may come before an answer."""

    def __init__(self, token: str, source: int = 0, sink: int = 1) -> None:
        self._token = token.encode()
        self._source = source
        self._sink = sink
        self._held = b""

    def send(self, **message: Any) -> None:
        """Send an answer or an event. Raises Gone."""
        # The newline before it ends a line that somebody else has begun.
        data = b"\n" + self._token + b" " + json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._sink, data) :]
        except OSError:
            raise Gone from None

    def receive(self) -> dict[str, Any]:
        """Wait for a request. Raises Gone."""
        while b"\n" not in self._held:
            self._held += self._read()
        line, _, self._held = self._held.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def receive_bytes(self, count: int) -> bytes:
        """Wait for a payload. Raises Gone."""
        parts = [self._held[:count]]
        self._held = self._held[count:]
        left = count - len(parts[0])
        while left:
            parts.append(self._read(min(left, 1 << 20)))
            left -= len(parts[-1])
        return b"".join(parts)

    def is_gone(self) -> bool:
        """Whether the other side has gone; does not wait."""
        while select.select([self._source], [], [], 0)[0]:
            try:
                self._held += self._read()
            except Gone:
                return True
        return False

    def fileno(self) -> int:
        """Readable when there is news: a request, or the end."""
        return self._source

    def _read(self, most: int = 65536) -> bytes:
        data = os.read(self._source, most)
        if not data:
            raise Gone
        return data
