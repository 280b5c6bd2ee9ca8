"""Rounds of the service over durable storage: what is answered when, and what becomes of a round that storage refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.storages import Died, Disk
from tests.unit.test_gcs_service import ROOT, Bench, job, specs
from zray.clock import ManualClock
from zray.gcs import messages as m
from zray.gcs.limits import GcsLimits
from zray.gcs.service import GcsService
from zray.gcs.storage import StorageBehind, StorageTaken
from zray.gcs.tables import ABANDONED, ABSENT, LIVE, JobRow, NodeRow, Table, encode_row, namespaced_key
from zray.ids import task_id

NODE = b"n" * 16


class Asked:
    """A service on a disk, and what it has answered."""

    def __init__(self, disk: Disk | None = None, **settings: object) -> None:
        self.disk = disk or Disk()
        self.bench = Bench(storage=self.disk, **settings)
        self.gcs = self.bench.gcs
        self.answers: list[m.Reply] = []

    def ask(self, request: m.Request, origin: tuple[bytes, int] | None = None) -> None:
        self.gcs.serve_request(m.encode(request), lambda reply: self.answers.append(m.decode_reply(reply)), origin)

    def put(self, key: str, value: bytes, expected: int = -1, origin: tuple[bytes, int] | None = None) -> None:
        self.ask(m.Put(Table.KV, namespaced_key(b"", key.encode()), value, expected), origin)

    def value(self, key: str) -> bytes | None:
        exact = namespaced_key(b"", key.encode())
        found = self.gcs.shard_for(Table.KV, exact).get(Table.KV, exact)
        return None if found is None else found.value

    def stored(self, key: str) -> bytes | None:
        exact = Table.KV, namespaced_key(b"", key.encode())
        return next((rows[exact].value for rows in self.disk.rows.values() if exact in rows), None)


def test_answers_and_notices_wait_for_the_round_to_be_stored() -> None:
    here = Asked()
    here.gcs.open_topic(Table.KV)
    for number in range(5):
        here.put(f"k{number}", b"v")
    here.ask(m.Get(Table.KV, namespaced_key(b"", b"k3")))
    assert here.answers == []
    assert not any(socket.sent for socket in here.bench.sockets)
    assert here.disk.writes == 0
    here.gcs.commit()
    assert here.disk.writes == 1, "one transaction for all"
    assert [type(answer) for answer in here.answers] == [m.Written] * 5 + [m.Found]
    assert sum(len(socket.sent) for socket in here.bench.sockets) == 5
    here.ask(m.Get(Table.KV, namespaced_key(b"", b"k3")))
    assert len(here.answers) == 7, "nothing waits: reads are answered at once"
    here.gcs.commit()
    assert here.disk.writes == 1
    here.gcs.validate()


def test_a_refused_round_never_happened() -> None:
    here = Asked(shards=1)
    here.put("old", b"1")
    here.gcs.commit()
    here.answers.clear()
    here.disk.full = True
    here.put("old", b"2")
    here.put("old", b"3")
    here.put("new", b"4")
    here.put("new", b"5", expected=ABSENT)  # would be a conflict with what is taken back
    here.ask(m.Delete(Table.KV, namespaced_key(b"", b"old")))
    here.ask(m.Get(Table.KV, namespaced_key(b"", b"new")))
    here.gcs.commit()
    *refused, read = here.answers
    assert {answer.code for answer in refused if isinstance(answer, m.Refused)} == {m.REFUSED_STORAGE}
    assert len(refused) == 5
    assert all("no space left" in answer.text for answer in refused if isinstance(answer, m.Refused))
    assert isinstance(read, m.Missing)
    assert (here.value("old"), here.value("new")) == (b"1", None)
    assert here.gcs.storage_failure == "no space left"
    here.gcs.validate()
    here.disk.full = False
    here.put("new", b"6")
    here.gcs.commit()
    assert isinstance(here.answers[-1], m.Written)
    assert here.gcs.storage_failure == ""
    again = Asked(here.disk, shards=1)
    assert (again.value("old"), again.value("new")) == (b"1", b"6")
    again.gcs.validate()


def test_what_the_broker_notes_stays_and_is_stored_later() -> None:
    here = Asked()
    here.disk.full = True
    here.gcs.put_row(job(1))
    here.put("k", b"v")
    here.gcs.commit()
    assert isinstance(here.answers[0], m.Refused)
    assert here.gcs.row(JobRow, job(1).id) == job(1)
    here.gcs.put_row(job(1, running=False))
    here.gcs.commit()
    here.bench.clock.advance(1.0)
    here.gcs.tick(here.bench.clock.now())
    here.disk.full = False
    here.bench.clock.advance(1.0)
    here.gcs.tick(here.bench.clock.now())
    assert Asked(here.disk).gcs.row(JobRow, job(1).id) == job(1, running=False)


def test_a_row_of_the_broker_survives_the_undoing_of_a_request_for_the_same_key() -> None:
    here = Asked()
    here.disk.full = True
    key = job(1).id
    here.ask(m.Put(Table.JOBS, key, encode_row(job(1))))
    here.gcs.put_row(job(1, running=False))
    here.ask(m.Delete(Table.JOBS, key))
    here.gcs.commit()
    assert here.gcs.row(JobRow, key) == job(1, running=False)


def test_a_direct_call_is_stored_before_it_returns() -> None:
    here = Asked()
    reply = m.decode_reply(here.gcs.handle_request(m.encode(m.Put(Table.KV, namespaced_key(b"", b"k"), b"v"))))
    assert isinstance(reply, m.Written)
    assert here.stored("k") == b"v"
    here.disk.full = True
    reply = m.decode_reply(here.gcs.handle_request(m.encode(m.Put(Table.KV, namespaced_key(b"", b"k"), b"w"))))
    assert isinstance(reply, m.Refused)
    assert here.value("k") == b"v"


def test_retention_and_closing_reach_the_storage() -> None:
    here = Asked(shards=1, limits=GcsLimits(ended_jobs=1))
    for number in range(4):
        here.gcs.put_row(job(number, running=False))
        here.gcs.commit()
    here.gcs.put_row(NodeRow(ROOT, "", "", 1, {}))
    here.gcs.close()
    again = Asked(here.disk, shards=1)
    assert [row.number for row in again.gcs.rows(JobRow)] == [3]
    assert again.gcs.row(NodeRow, ROOT) is not None


def test_storage_that_lost_rows_gets_all_of_them_again() -> None:
    here = Asked()
    for number in range(20):
        here.put(f"k{number}", b"v")
    here.gcs.commit()
    here.disk.rows.clear()
    here.disk.records.clear()
    here.disk.error = StorageBehind("it came back empty")
    here.put("new", b"1")
    here.gcs.commit()
    assert isinstance(here.answers[-1], m.Refused)
    here.bench.clock.advance(1.0)
    here.gcs.tick(here.bench.clock.now())
    assert [here.stored(f"k{number}") for number in range(20)] == [b"v"] * 20
    here.put("new", b"2")
    here.gcs.commit()
    assert here.stored("new") == b"2"


def test_a_head_whose_storage_was_taken_answers_nothing_and_ends() -> None:
    here = Asked()
    told: list[str] = []
    here.gcs.on_taken = told.append
    here.put("k", b"v")
    here.gcs.commit()
    here.disk.error = StorageTaken("another head has it")
    here.disk.has_lapsed = True
    here.ask(m.Get(Table.KV, namespaced_key(b"", b"k")))
    assert len(here.answers) == 1, "it was stopped: what it knows may be old"
    here.gcs.commit()
    assert isinstance(here.answers[-1], m.Refused)
    assert told == ["another head has it"]


def test_a_repeated_request_is_carried_out_once_over_lives_of_the_service() -> None:
    here = Asked()
    here.put("lock", b"1", ABSENT, (NODE, 7))
    here.gcs.commit()
    assert here.answers == [m.Written(here.answers[0].version, True)]  # type: ignore[attr-defined]
    again = Asked(here.disk)  # its answer was lost with the head
    again.put("lock", b"1", ABSENT, (NODE, 7))
    again.put("lock", b"1", ABSENT, (NODE, 8))
    again.gcs.commit()
    assert again.answers[0] == here.answers[0]
    assert isinstance(again.answers[1], m.Conflict)
    again.gcs.forget_answers(NODE, 8)
    again.gcs.commit()
    third = Asked(here.disk)
    third.put("lock", b"1", ABSENT, (NODE, 7))
    third.gcs.commit()
    assert isinstance(third.answers[0], m.Conflict), "it was told that the answer had been heard"
    assert not any(table == Table.ANSWERS for rows in here.disk.rows.values() for table, _ in rows)


def test_a_refused_write_of_a_node_may_be_tried_again() -> None:
    here = Asked()
    here.disk.full = True
    here.put("k", b"v", ABSENT, (NODE, 1))
    here.gcs.commit()
    assert isinstance(here.answers[0], m.Refused)
    here.disk.full = False
    here.put("k", b"v", ABSENT, (NODE, 1))
    here.gcs.commit()
    assert isinstance(here.answers[1], m.Written)


# -- task rows -----------------------------------------------------------------------------------------------------------


def flush(here: Asked) -> None:
    here.bench.clock.advance(1.0)
    here.gcs.tick(here.bench.clock.now())


def test_task_rows_come_back() -> None:
    here = Asked()
    made = specs(60)
    here.gcs.tasks_submitted(1, made[:40])
    here.gcs.tasks_finished(1, 3, [spec.id for spec in made[:10]], bytes(10), list(range(10)))
    flush(here)
    here.gcs.tasks_finished(1, 4, [spec.id for spec in made[10:20]], b"\1" * 10, [5] * 10)
    here.gcs.tasks_submitted(2, made[40:])
    here.gcs.tasks_finished(1, 9, [task_id(ROOT, 999)], b"\0", [1])  # its spec never passed here
    flush(here)
    before = {row.id: row for row in here.gcs.tasks()}
    again = Asked(here.disk).gcs
    assert {row.id: row for row in again.tasks()} == before
    assert len(before) == 61
    again.validate()
    again.job_ended(1)
    again.tick(1e9)
    third = Asked(here.disk).gcs
    assert {row.status for row in third.tasks(1)} == {0, 1, ABANDONED}
    assert {row.status for row in third.tasks(2)} == {LIVE}
    third.validate()


def test_tasks_that_are_quick_are_written_once() -> None:
    here = Asked(shards=1)
    flush(here)
    made = specs(100)
    here.gcs.tasks_submitted(1, made)
    here.gcs.tasks_finished(1, 3, [spec.id for spec in made], bytes(100), [1] * 100)
    flush(here)
    assert len(here.disk.records) == 1


def test_the_lineage_log_is_bounded_and_keeps_what_lives() -> None:
    here = Asked(shards=2)
    lineage = here.gcs.history.log
    assert lineage is not None
    lineage.log_bytes = 20_000
    old = specs(50)
    here.gcs.tasks_submitted(1, old)
    flush(here)
    for start in range(100, 5000, 50):
        made = specs(50, start)
        here.gcs.tasks_submitted(1, made)
        flush(here)
        here.gcs.tasks_finished(1, 1, [spec.id for spec in made], bytes(50), [1] * 50)
        flush(here)
        assert lineage.bytes == sum(map(len, here.disk.records))
        assert lineage.bytes < 60_000
    again = Asked(here.disk, shards=2).gcs
    assert {row.id for row in again.tasks(ended=False)} == {spec.id for spec in old}
    newest = [spec.id for spec in made]
    assert {row.id for row in again.tasks(live=False, limit=50)} == set(newest)
    again.validate()


def test_records_wait_while_storage_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Asked()
    here.disk.full = True
    here.gcs.tasks_submitted(1, specs(5))
    here.put("k", b"v")
    here.gcs.commit()
    flush(here)
    assert here.disk.records == []
    here.disk.full = False
    flush(here)
    flush(here)
    assert len(Asked(here.disk).gcs.tasks()) == 5


# -- at random, and with planted faults ------------------------------------------------------------------------------------


class AnswersTooEarly(GcsService):
    """Acknowledges before storing."""

    def serve_request(self, body: bytes, answer: Any, origin: Any = None) -> None:
        super().serve_request(body, answer, origin)
        for held in self._held:
            held.answer(m.encode(held.reply))
            held.answer = lambda reply: None


class KeepsWhatWasRefused(GcsService):
    """Does not take back a refused round."""

    def _refuse_round(self, error: OSError) -> None:
        self._undo.clear()
        super()._refuse_round(error)


class ForgetsWhatWasRefused(GcsService):
    """Takes back a refused round, but not in the storage's view of rows that it had before."""

    def _refuse_round(self, error: OSError) -> None:
        super()._refuse_round(error)
        self._unstored.clear()


class RepeatsRequests(GcsService):
    """Carries out a request again when it is repeated."""

    def serve_request(self, body: bytes, answer: Any, origin: Any = None) -> None:
        super().serve_request(body, answer, None)


def run_rounds(seed: int, kind: type[GcsService] = GcsService) -> None:
    """Writes, refusals, crashes and repetitions at random; AssertionError when an acknowledged write is lost, a refused one is
    there, a lock has two holders, or a row of the broker is not what it last was."""
    draw = random.Random(seed)
    disk = Disk()
    truth: dict[bytes, bytes | None] = {}
    """What is acknowledged."""
    unknown: dict[bytes, set[bytes | None]] = {}
    """Writes without an answer (the service died first): either may be."""
    jobs: dict[bytes, bool] = {}
    holders: dict[int, set[int]] = {}
    repeated: dict[int, tuple[bytes, bytes]] = {}
    """Requests of a node that wait for an answer: number -> (key, encoded request)."""
    number = 0

    def begin() -> GcsService:
        return kind(None, "", shards=2, storage=disk, clock=ManualClock())

    def ask(key: bytes, value: bytes | None) -> None:
        exact = namespaced_key(b"", key)
        request = m.Delete(Table.KV, exact) if value is None else m.Put(Table.KV, exact, value)
        unknown.setdefault(key, {truth.get(key)}).add(value)

        def answer(reply: bytes) -> None:
            found = m.decode_reply(reply)
            if not isinstance(found, m.Refused):
                truth[key] = value
                written.append(key)

        gcs.serve_request(m.encode(request), answer)

    def lock(origin: int, key: bytes, body: bytes) -> None:
        def answer(reply: bytes) -> None:
            found = m.decode_reply(reply)
            if isinstance(found, m.Refused):
                return
            repeated.pop(origin, None)
            if isinstance(found, m.Written):
                holders.setdefault(key[-1], set()).add(origin)

        gcs.serve_request(body, answer, (NODE, origin))

    gcs = begin()
    written: list[bytes] = []
    for step in range(300):
        chance = draw.random()
        key = b"k%d" % draw.randrange(5)
        if chance < 0.5:
            ask(key, draw.choice([None, b"%d" % step, b"%d" % step]))
        elif chance < 0.6:
            number += 1
            name = b"lock" + bytes([draw.randrange(60)])
            body = m.encode(m.Put(Table.KV, namespaced_key(b"", name), b"taken", ABSENT))
            repeated[number] = name, body
            lock(number, name, body)
        elif chance < 0.7:
            row = job(draw.randrange(4), running=draw.random() < 0.5)
            gcs.put_row(row)
            jobs[row.id] = row.running
        elif chance < 0.8:
            disk.full = not disk.full
        killed = chance >= 0.97
        if draw.random() < 0.4:
            disk.dies = not disk.full and draw.random() < 0.15
            try:
                gcs.commit()
            except Died:
                killed = True
            disk.dies = False
        elif not killed:
            continue
        if killed:  # what was not answered may be there or not
            gcs = begin()
            for seen, values in unknown.items():
                exact = Table.KV, namespaced_key(b"", seen)
                stored = next((rows[exact].value for rows in disk.rows.values() if exact in rows), None)
                assert stored in values, "neither the old value nor one that was asked for"
                truth[seen] = stored
            unknown.clear()
            jobs = {found.id: found.running for found in gcs.rows(JobRow)}
            for again, (name, body) in list(repeated.items()):
                lock(again, name, body)
        else:
            unknown.clear()
            for seen, value in truth.items():
                found = gcs.shard_for(Table.KV, namespaced_key(b"", seen)).get(Table.KV, namespaced_key(b"", seen))
                assert (None if found is None else found.value) == value, "a row differs from what was acknowledged"
                if not disk.full and not gcs._unstored:
                    exact = Table.KV, namespaced_key(b"", seen)
                    stored = next((rows[exact].value for rows in disk.rows.values() if exact in rows), None)
                    assert stored == value, "the storage differs from what was acknowledged"
            for row_id, running in jobs.items():
                noted = gcs.row(JobRow, row_id)
                assert noted is not None
                assert noted.running == running, "a row of the broker was taken back"
                if not disk.full and not gcs._unstored:
                    stored = next(
                        (rows[Table.JOBS, row_id].value for rows in disk.rows.values() if (Table.JOBS, row_id) in rows),
                        b"",
                    )
                    assert stored == encode_row(noted), "a row of the broker was never stored"
        gcs.validate()
    disk.full = False
    gcs.commit()
    assert all(len(found) == 1 for found in holders.values()), "a lock has two holders"
    asked = {name[-1] for name, _ in repeated.values()}
    for place in range(60):
        exact = namespaced_key(b"", b"lock" + bytes([place]))
        if gcs.shard_for(Table.KV, exact).get(Table.KV, exact) is not None:
            assert place in holders or place in asked, "a lock that nobody was told to have"
    for again in repeated:
        assert again not in {origin for found in holders.values() for origin in found}


@pytest.mark.parametrize("seed", range(40))
def test_whatever_storage_does_acknowledged_writes_are_there(seed: int) -> None:
    run_rounds(seed)


@pytest.mark.parametrize("kind", [AnswersTooEarly, KeepsWhatWasRefused, ForgetsWhatWasRefused, RepeatsRequests])
def test_planted_faults_in_rounds_are_found(kind: type[GcsService]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(60):
            run_rounds(seed, kind)


def test_what_relies_on_a_note_waits_until_it_is_stored() -> None:
    here = Asked()
    told: list[int] = []
    here.gcs.when_stored(lambda: told.append(1))
    assert told == [1], "nothing waits"
    here.gcs.put_row(job(1))
    here.gcs.when_stored(lambda: told.append(2))
    assert told == [1]
    here.gcs.commit()
    assert told == [1, 2]
    here.disk.full = True
    here.gcs.put_row(job(2))
    here.gcs.when_stored(lambda: told.append(3))
    here.gcs.commit()
    assert told == [1, 2, 3], "the broker goes on with what is"


def test_what_is_written_by_whoever_is_told_is_stored_in_the_same_round() -> None:
    here = Asked()
    told: list[int] = []
    here.gcs.put_row(NodeRow(NODE, "a:1", "here", 1, {}))

    def then() -> None:
        here.gcs.put_row(job(1))
        here.gcs.when_stored(lambda: told.append(2))
        told.append(1)

    here.gcs.when_stored(then)
    here.gcs.commit()
    assert told == [1, 2]
    assert here.disk.writes == 2
