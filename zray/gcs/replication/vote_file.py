"""Votes in a file, so that a member of the council may be started again under its id. A door: it opens files.

Covers writing as a whole and checking what is read. Does not cover what votes mean (`council`).
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from zray.gcs.replication.council import Votes

_encode = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Votes).decode


class VoteFile:
    """One member's votes. Each save replaces the file, which is on disk before `save` returns."""

    def __init__(self, path: str) -> None:
        """`path` empty: nothing is kept; the id must end with its process then."""
        self._path = path

    def load(self) -> Votes | None:
        """Return what was saved last.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no votes: whoever votes without them may vote twice.
        """
        if not self._path:
            return None
        try:
            with open(self._path, "rb") as file:
                return _decode(file.read())
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError) as error:
            raise ValueError(
                f"{self._path} holds no votes ({error}): remove it and start this member with a new id"
            ) from None

    def save(self, votes: Votes) -> None:
        """Keep votes. OSError: they are not kept."""
        if not self._path:
            return
        part = f"{self._path}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, _encode(votes))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, self._path)
        directory = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
