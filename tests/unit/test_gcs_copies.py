"""A service that leads copies of itself: what is answered when, and what the next one to lead does with repeated requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zray.broker.replicated_tables import pieces
from zray.gcs import messages as m
from zray.gcs.service import GcsService
from zray.gcs.tables import ABSENT, Change, Table, namespaced_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NODE = b"n" * 16
KEY = namespaced_key(b"", b"k")
GET = m.Get(Table.KV, KEY)


class Follower:
    """One copy, which gets what is carried when it is told to."""

    def __init__(self, directory: Path) -> None:
        self.service = GcsService(None, str(directory))
        self.is_leased = True
        self.way: list[tuple[list[tuple[int, Change]], Callable[[], None]]] = []

    def carry(self, changes: list[tuple[int, Change]], then: Callable[[], None]) -> None:
        self.way.append((changes, then))

    @property
    def settled(self) -> bool:
        return self.is_leased and not self.way

    def take(self) -> None:
        """Apply all that is on its way, and say so."""
        way, self.way = self.way, []
        for changes, then in way:
            for shard, change in changes:
                self.service.apply_change(shard, change)
            then()


class Asked:
    """A leading service and what it has answered."""

    def __init__(self, directory: Path) -> None:
        self.copy = Follower(directory)
        self.service = GcsService(None, str(directory))
        self.service.lead(self.copy)
        self.answers: list[m.Reply] = []

    def ask(self, request: m.Request, origin: tuple[bytes, int] | None = None, *, commit: bool = True) -> None:
        self.service.serve_request(m.encode(request), lambda reply: self.answers.append(m.decode_reply(reply)), origin)
        if commit:
            self.service.commit()


def put(value: bytes, expected: int = -1) -> m.Put:
    return m.Put(Table.KV, KEY, value, expected)


def test_writes_and_what_has_seen_them_are_answered_when_all_have_them(tmp_path: Path) -> None:
    here = Asked(tmp_path)
    here.ask(GET)
    assert here.answers == [m.Missing()], "nothing is under way: a read need not wait"
    here.ask(put(b"v"), commit=False)
    here.ask(GET, commit=False)
    here.service.commit()
    stored: list[str] = []
    here.service.when_stored(lambda: stored.append("it is"))
    here.ask(GET)
    assert len(here.answers) == 1
    assert not stored
    assert not here.service.is_stored
    assert len(here.copy.way) == 2, "rounds are carried whole, and in order"
    here.copy.take()
    assert [type(answer) for answer in here.answers[1:]] == [m.Written, m.Found, m.Found]
    assert stored == ["it is"]
    assert here.service.is_stored
    assert here.copy.service.image() == here.service.image()


def test_without_the_lease_nothing_is_said(tmp_path: Path) -> None:
    here = Asked(tmp_path)
    here.copy.is_leased = False
    here.ask(GET)
    assert here.answers == []
    here.copy.take()
    assert here.answers == [m.Missing()]


def test_the_next_to_lead_does_nothing_twice(tmp_path: Path) -> None:
    here = Asked(tmp_path)
    here.ask(put(b"v", ABSENT), (NODE, 7))
    here.copy.take()
    [first] = here.answers
    then = Asked(tmp_path)
    then.service = here.copy.service
    then.copy.service.load_image(then.service.image())
    then.service.lead(then.copy)
    then.ask(put(b"v", ABSENT), (NODE, 7))
    then.copy.take()
    assert then.answers == [first], "the answer of the first time, not a conflict"
    then.service.forget_answers(NODE, 8)
    then.ask(put(b"w", ABSENT), (NODE, 8))
    then.copy.take()
    assert isinstance(then.answers[-1], m.Conflict)
    row = then.service.statistics().rows
    assert row[Table.ANSWERS.name] == 0, "a refused write needs no answer that is kept: it is refused again"


def test_large_rounds_are_cut_but_not_between_a_change_and_its_answer() -> None:
    large, small = bytes(1 << 20), bytes(10)
    tables = [(Table.KV, large), (Table.ANSWERS, small), (Table.KV, small), (Table.ANSWERS, small), (Table.KV, large)]
    tables += [(Table.KV, small), (Table.ANSWERS, small)]
    changes = [(0, Change(table, b"k", value, n, n)) for n, (table, value) in enumerate(tables, 1)]
    found = list(pieces(changes))
    assert [len(piece) for piece in found] == [2, 3, 2]
    assert [pair for piece in found for pair in piece] == changes
    assert list(pieces([])) == []
