"""Which requests of whom were carried out: a request that is sent again is answered, and not carried out again.

Covers the table of answers, which is part of the replicated state: every replica has the same one after the same entry. Does
not cover who may be answered when (`chain`).

A client numbers its requests 1, 2, 3 ... and says with each up to where it has all answers (`floor`); answers below that are
forgotten. Equations, checked by `validate()`:

    all numbers of a session >= its floor          len(sessions) <= MAX_SESSIONS, least recently heard of go first
"""

from __future__ import annotations

from typing import Final

import msgspec

MAX_SESSIONS: Final = 10_000
"""Clients (nodes, as a rule) that are remembered. One that asks again after so many others have is a new one."""


class Session(msgspec.Struct, array_like=True):
    """One client."""

    floor: int
    answers: dict[int, tuple[int, bytes]]
    """Number of the request -> (entry that carried it out, answer)."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[tuple[bytes, Session]]).decode


class Sessions:
    """All clients, the most recent last."""

    __slots__ = ("_sessions",)

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}

    def find(self, client: bytes, request: int) -> tuple[int, bytes] | None:
        """Return (entry, answer) of a request that was carried out; (0, b"") when its answer is known to have arrived."""
        session = self._sessions.get(client)
        if session is None:
            return None
        return (0, b"") if request < session.floor else session.answers.get(request)

    def note(self, client: bytes, request: int, floor: int, entry: int, answer: bytes) -> None:
        """A request was carried out."""
        session = self._sessions.pop(client, None) or Session(0, {})
        self._sessions[client] = session
        if floor > session.floor:
            session.floor = floor
            for old in [number for number in session.answers if number < floor]:
                del session.answers[old]
        session.answers[request] = (entry, answer)
        if len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    def recent(self, most: int) -> list[bytes]:
        """Return the clients heard of last."""
        return list(self._sessions)[-most:]

    def encode(self) -> bytes:
        """Return all of it, for `restore`."""
        return _encode(list(self._sessions.items()))

    def restore(self, data: bytes) -> None:
        """Be what was encoded. ValueError: it is nothing of the kind."""
        self._sessions = dict(_decode(data))

    def clear(self) -> None:
        """Forget everybody."""
        self._sessions = {}

    def validate(self, last: int) -> None:
        """Raise AssertionError when an answer is there that cannot be; `last`: newest entry."""
        assert len(self._sessions) <= MAX_SESSIONS, "more clients than are remembered"
        for client, session in self._sessions.items():
            for number, (entry, _) in session.answers.items():
                assert number >= session.floor, f"client {client.hex()[:8]}: an answer below its floor is kept"
                assert 1 <= entry <= last, f"client {client.hex()[:8]}: an answer of an entry that is not there"
