"""A client's way to the replicated store: writes to the head, reads to the tail, wherever those are by now.

Covers numbering requests, finding out who serves, and sending again. Does not cover what requests mean
(`zray.gcs.messages`), or sockets: whoever runs it hands in what has come, and sends what `out` holds.

A write may be sent many times and is carried out once: its number tells (`sessions`). A read is asked again. So a request
ends only by its answer, or when its caller no longer wants to wait (`forget`).
"""

from __future__ import annotations

from typing import Final

from zray.gcs.replication.configuration import Configuration
from zray.gcs.replication.messages import Answer, AnyMessage, Decided, Outgoing, Read, WhoServes, Write
from zray.gcs.replication.timing import NEVER, Timing

_LOOK_S: Final = 0.003
"""Seconds between two questions for who serves, right after whoever did was lost; doubles up to the retry of requests."""

_STRANGE_S: Final = 0.01
"""Seconds after which a request is repeated for the first time while the tail is new."""


class Pending:
    """A request without an answer."""

    __slots__ = ("again_at", "body", "is_write", "pause", "to")

    def __init__(self, body: bytes, is_write: bool, pause: float) -> None:
        self.body = body
        self.is_write = is_write
        self.pause = pause
        self.again_at = NEVER
        self.to = b""


class Router:
    """One client."""

    def __init__(self, contacts: list[bytes], timing: Timing) -> None:
        """`contacts`: ids of processes that may know who serves."""
        self._contacts = contacts
        self._timing = timing
        self.configuration: Configuration | None = None
        self.pending: dict[int, Pending] = {}
        self.answers: list[tuple[int, bytes]] = []
        """What came: (number, answer); whoever runs the router takes them out."""
        self.out: list[Outgoing] = []
        self._next = 1
        self._look_at = NEVER
        self._look_pause = _LOOK_S
        self._strange_until = -NEVER
        """Until then the tail may not know this client."""
        self.resent = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def ask(self, body: bytes, now: float, *, write: bool) -> int:
        """Send a request; return its number, under which its answer will come."""
        number, self._next = self._next, self._next + 1
        pending = self.pending[number] = Pending(body, write, self._first_pause(now))
        if self.configuration is None:
            self._look(now)
        self._send(number, pending, now)
        return number

    def forget(self, number: int) -> None:
        """Nobody waits for an answer any more. A write may have been carried out, or not, or may still be."""
        self.pending.pop(number, None)

    def _floor(self) -> int:
        return min(self.pending, default=self._next)

    def _send(self, number: int, pending: Pending, now: float) -> None:
        pending.again_at = now + pending.pause
        if self.configuration is None:
            return
        place = self.configuration.head if pending.is_write else self.configuration.tail
        pending.to = place.id
        if pending.is_write:
            self.out.append((place.id, Write(number, self._floor(), pending.body)))
        else:
            self.out.append((place.id, Read(number, pending.body)))

    # -- what comes ----------------------------------------------------------------------------------------------------

    def handle(self, message: AnyMessage, now: float) -> None:
        """Take what a replica says."""
        if isinstance(message, Answer):
            if self.pending.pop(message.request, None) is not None:
                self.answers.append((message.request, message.body))
        elif isinstance(message, Decided):
            self._learn(message.configuration, now)

    def _learn(self, configuration: Configuration, now: float) -> None:
        known = self.configuration
        if known is not None and configuration.epoch <= known.epoch:
            return
        self.configuration = configuration
        self._look_at = NEVER
        self._look_pause = _LOOK_S
        other_tail = known is None or known.tail != configuration.tail
        if other_tail:
            self._strange_until = now + self._timing.retry
        for number, pending in self.pending.items():
            place = configuration.head if pending.is_write else configuration.tail
            if pending.to != place.id or (pending.is_write and other_tail):
                self.resent += 1
                pending.pause = self._first_pause(now)
                self._send(number, pending, now)

    def _first_pause(self, now: float) -> float:
        """How long to wait for the first answer. Writes are answered by the tail, and one that is new cannot reach a client that has not spoken to it yet:
        its answers are lost. The head, when it is asked once more, answers what was carried out before."""
        return _STRANGE_S if now < self._strange_until else self._timing.retry

    def lost(self, process: bytes, now: float) -> None:
        """A connection broke, or a port refuses: if requests went there, find out who serves now."""
        configuration = self.configuration
        if configuration is None or process not in (configuration.head.id, configuration.tail.id):
            return
        self._look_pause = _LOOK_S
        self._look(now)

    def _look(self, now: float) -> None:
        self._look_at = now + self._look_pause
        self._look_pause = min(2 * self._look_pause, self._timing.retry)
        configuration = self.configuration
        epoch = 0 if configuration is None else configuration.epoch
        known = [] if configuration is None else [place.id for place in configuration.everybody()]
        self.out += [(process, WhoServes(epoch)) for process in dict.fromkeys([*known, *self._contacts])]

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest."""
        look = self._look_at if self.pending else NEVER
        return min([NEVER, look, *(pending.again_at for pending in self.pending.values())])

    def tick(self, now: float) -> None:
        """Ask again what was not answered."""
        if now >= self._look_at and self.pending:
            self._look(now)
        late = [(number, pending) for number, pending in self.pending.items() if now >= pending.again_at]
        for number, pending in late:
            pending.pause = min(2 * pending.pause, self._timing.retry_most)
            self.resent += 1
            self._send(number, pending, now)
        if late and self._look_at == NEVER:
            self._look(now)

    def validate(self) -> None:
        """Raise AssertionError when a request would wait for ever."""
        for number, pending in self.pending.items():
            assert 0 < number < self._next, "a request with a number that was never given"
            assert pending.again_at < NEVER, "a request that is never sent again"
