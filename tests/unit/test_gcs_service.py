"""The service: order of a write, storage that refuses, late sockets, beats, retention, archive, direct calls."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.unit.storages import Disk
from zray.clock import ManualClock
from zray.gcs import messages as m
from zray.gcs.limits import GcsLimits
from zray.gcs.service import GcsService
from zray.gcs.sharding import shard_of
from zray.gcs.storage import TaskArchive, read_archive
from zray.gcs.tables import (
    ABANDONED,
    ABSENT,
    LIVE,
    ActorNameRow,
    ActorRow,
    ActorState,
    EventRow,
    JobRow,
    NodeRow,
    RowError,
    Table,
    encode_row,
    key_of,
)
from zray.gcs.task_batches import TaskEnds
from zray.gcs.task_rows import GATHERED
from zray.ids import task_id
from zray.task import TaskSpec

ROOT = bytes(16)


class Socket:
    """A PUB socket that remembers."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.sent: list[tuple[bytes, bytes]] = []
        self.closed = False

    def send(self, topic: bytes, body: bytes) -> None:
        self.sent.append((topic, body))

    def close(self) -> None:
        self.closed = True

    def notices(self) -> list[m.Notice | m.Beat]:
        return [m.decode_notice(*message) for message in self.sent]


class Bench:
    """A service with all that surrounds it."""

    def __init__(self, **settings: object) -> None:
        self.clock = ManualClock(start=100.0)
        self.sockets: list[Socket] = []
        self.gcs = GcsService(self.open, "/run/s", clock=self.clock, epoch=5, **{"shards": 2, **settings})  # type: ignore[arg-type]

    def open(self, endpoint: str) -> Socket:
        self.sockets.append(Socket(endpoint))
        return self.sockets[-1]


def job(number: int, running: bool = True) -> JobRow:
    return JobRow(task_id(ROOT, number), number, ROOT, 7, "default", running=running)


def specs(count: int, start: int = 0) -> list[TaskSpec]:
    return [TaskSpec(task_id(ROOT, i), ROOT, b"args") for i in range(start, start + count)]


def test_rows_are_written_read_listed_and_deleted() -> None:
    gcs = Bench().gcs
    rows = [job(number) for number in range(20)]
    for row in rows:
        gcs.put_row(row)
    assert gcs.row(JobRow, rows[3].id) == rows[3]
    assert gcs.rows(JobRow) == sorted(rows, key=lambda row: row.id)
    assert gcs.delete_row(JobRow, rows[3].id)
    assert not gcs.delete_row(JobRow, rows[3].id)
    assert gcs.row(JobRow, rows[3].id) is None
    assert gcs.rows(NodeRow) == []
    gcs.validate()


def test_of_two_claims_to_a_name_one_loses() -> None:
    gcs = Bench().gcs
    gcs.put_row(ActorNameRow("default", "counter", task_id(ROOT, 1)), expected=ABSENT)
    with pytest.raises(m.VersionConflict) as caught:
        gcs.put_row(ActorNameRow("default", "counter", task_id(ROOT, 2)), expected=ABSENT)
    assert caught.value.version == 1
    gcs.put_row(ActorNameRow("other", "counter", task_id(ROOT, 2)), expected=ABSENT)
    assert [row.namespace for row in gcs.rows(ActorNameRow)] == ["other", "default"]  # shorter namespaces come first


def test_rows_survive_the_service_when_storage_keeps_them() -> None:
    disk = Disk()
    first = Bench(storage=disk).gcs
    versions = {number: first.put_row(job(number)) for number in range(9)}
    first.delete_row(JobRow, job(8).id)
    for _ in range(3):
        first.record_event("jobs", ROOT, "began")
    first.close()
    assert disk.closed
    second = Bench(storage=disk).gcs
    assert len(second.rows(JobRow)) == 8
    second.put_row(job(8))
    found = second.shard_for(Table.JOBS, job(8).id).get(Table.JOBS, job(8).id)
    assert found is not None
    assert found.version > versions[8] + 1  # the deletion had a version too, and none is given twice
    second.record_event("jobs", ROOT, "went on")
    assert [row.number for row in second.rows(EventRow)] == [1, 2, 3, 4]
    second.validate()


def test_no_socket_is_bound_before_somebody_asks() -> None:
    bench = Bench()
    bench.gcs.put_row(job(1))
    assert bench.gcs.tick(bench.clock.now()) == float("inf")
    assert bench.sockets == []
    endpoints = bench.gcs.open_topic(Table.JOBS)
    assert endpoints == ["ipc:///run/s/g0", "ipc:///run/s/g1"] == [socket.endpoint for socket in bench.sockets]
    assert bench.gcs.open_topic(Table.KV) == endpoints
    assert len(bench.sockets) == 2


def test_changes_of_opened_tables_are_published_by_their_shard() -> None:
    bench = Bench()
    bench.gcs.open_topic(Table.JOBS)
    rows = [job(number) for number in range(8)]
    for row in rows:
        bench.gcs.put_row(row)
    bench.gcs.delete_row(JobRow, rows[0].id)
    bench.gcs.put_row(NodeRow(ROOT, "", "", 1, {}))
    for index, socket in enumerate(bench.sockets):
        assert {topic for topic, _ in socket.sent} <= {b"jobs."}
        changes = [notice.change for notice in socket.notices() if isinstance(notice, m.Notice)]
        expected = [row.id for row in rows if shard_of(Table.JOBS, row.id, 2) == index]
        if shard_of(Table.JOBS, rows[0].id, 2) == index:
            expected.append(rows[0].id)
            assert changes[-1].value is None
        assert [change.key for change in changes] == expected
        assert [change.sequence for change in changes] == list(range(1, len(changes) + 1))


def test_beats_name_the_newest_numbers() -> None:
    bench = Bench(shards=1)
    gcs, clock = bench.gcs, bench.clock
    gcs.open_topic(Table.JOBS)
    gcs.open_topic(Table.TASKS)
    gcs.put_row(job(1))
    gcs.tasks_finished(1, 0, [task_id(ROOT, 5)], b"\0", [1])
    (socket,) = bench.sockets
    due = gcs.tick(clock.now())
    assert due == pytest.approx(100.1)
    assert not [notice for notice in socket.notices() if isinstance(notice, m.Beat)]
    clock.advance(0.2)
    assert gcs.tick(clock.now()) == pytest.approx(101.2)
    assert socket.notices()[-1] == m.Beat(5, {Table.JOBS: 1, Table.TASKS: 1})
    assert gcs.tick(clock.now()) == pytest.approx(101.2)
    clock.advance(5.0)
    gcs.tick(clock.now())
    assert len([notice for notice in socket.notices() if isinstance(notice, m.Beat)]) == 2


def test_ends_of_tasks_are_published_in_batches() -> None:
    bench = Bench(shards=1)
    bench.gcs.open_topic(Table.TASKS)
    names = [spec.id for spec in specs(3)]
    bench.gcs.tasks_submitted(1, specs(3))
    bench.gcs.tasks_finished(1, 4, names[:2], b"\0\1", [10, 20])
    bench.gcs.tasks_finished(1, 5, names[2:], b"\0", [30])
    assert bench.sockets[0].sent == []
    bench.gcs.tick(bench.clock.now())
    (notice,) = bench.sockets[0].notices()
    assert isinstance(notice, m.Notice)
    assert notice.change.value is not None
    now = bench.clock.wall()
    ends = msgspec.msgpack.decode(notice.change.value, type=TaskEnds)
    assert ends == TaskEnds(1, b"".join(names), b"\0\1\0", [10, 20, 30], [4, 4, 5], [now] * 3, b"")
    assert [row.spec for row in ends.rows()] == [None] * 3


def test_ended_rows_and_events_are_bounded() -> None:
    gcs = Bench(shards=1, limits=GcsLimits(events=5, ended_actors=3, ended_jobs=2)).gcs
    for number in range(12):
        gcs.record_event("actors", ROOT, "restarted", str(number))
        gcs.put_row(ActorRow(task_id(ROOT, number), 1, ActorState.ALIVE))
        gcs.put_row(ActorRow(task_id(ROOT, number), 1, ActorState.DEAD if number % 2 else ActorState.RESTARTING))
        gcs.put_row(job(number, running=number == 0))
    assert [row.detail for row in gcs.rows(EventRow)] == ["7", "8", "9", "10", "11"]
    actors = {row.id: row.state for row in gcs.rows(ActorRow)}
    alive = {task_id(ROOT, number) for number in range(0, 12, 2)}
    assert actors.keys() == alive | {task_id(ROOT, number) for number in (7, 9, 11)}
    assert {row.number for row in gcs.rows(JobRow)} == {0, 10, 11}
    gcs.validate()


def test_tasks_through_all_shards() -> None:
    bench = Bench(shards=3)
    gcs = bench.gcs
    made = specs(30)
    gcs.tasks_submitted(1, made)
    gcs.tasks_submitted(2, specs(5, 100))
    names = [spec.id for spec in made]
    for worker in range(3):
        bench.clock.advance(1.0)
        gcs.tasks_finished(1, worker, names[worker * 8 : worker * 8 + 8], bytes(8), list(range(8)))
    row = gcs.task(names[9])
    assert row is not None
    assert (row.status, row.worker, row.micros, row.spec) == (0, 1, 1, made[9])
    live = gcs.tasks(1, ended=False)
    assert {found.id for found in live} == set(names[24:])
    ended = gcs.tasks(1, live=False, limit=12)
    assert [found.worker for found in ended] == [2] * 8 + [1] * 4
    assert len(gcs.tasks(limit=33)) == 33
    bench.clock.advance(1.0)
    gcs.job_ended(1)
    assert {found.status for found in gcs.tasks(1, limit=6)} == {ABANDONED}
    assert {found.status for found in gcs.tasks(2)} == {LIVE}
    statistics = gcs.statistics()
    assert (statistics.tasks_live, statistics.tasks_ended) == (5, 30)
    assert statistics.task_totals == {0: 24, ABANDONED: 6}
    with pytest.raises(RowError):
        gcs.task(b"short")
    gcs.validate()


def test_memory_stays_bounded_whatever_the_number_of_tasks() -> None:
    gcs = Bench(shards=2, limits=GcsLimits(ended_tasks=500)).gcs
    for start in range(0, 20 * GATHERED, 256):
        batch = specs(256, start)
        gcs.tasks_submitted(1, batch)
        gcs.tasks_finished(1, 1, [spec.id for spec in batch], bytes(256), [9] * 256)
        assert sum(len(part._ended) for part in gcs.history.table.shards) <= 500
    gcs.validate()
    statistics = gcs.statistics()
    assert statistics.tasks_flushed + statistics.tasks_ended == 20 * GATHERED == statistics.task_totals[0]


def test_specs_of_referenced_tasks_outlive_their_rows() -> None:
    wanted = {spec.id for spec in specs(3)}
    gcs = Bench(shards=2, limits=GcsLimits(ended_tasks=4), referenced=lambda names: wanted.intersection(names)).gcs
    for spec in specs(40):
        gcs.tasks_submitted(1, [spec])
        gcs.tasks_finished(1, 1, [spec.id], b"\0", [1])
        gcs.settle_tasks()
    assert [gcs.task(spec.id) is not None for spec in specs(6)] == [True] * 3 + [False] * 3
    assert gcs.statistics().tasks_held == 3
    wanted.clear()
    gcs.tick(0.0)
    assert gcs.statistics().tasks_held == 0
    gcs.validate()


def test_flushed_tasks_go_to_the_archive(tmp_path: Path) -> None:
    path = str(tmp_path / "tasks")
    gcs = Bench(shards=1, limits=GcsLimits(ended_tasks=4), archive=TaskArchive(path)).gcs
    made = specs(20)
    for start in range(0, 20, 2):
        gcs.tasks_submitted(1, made[start : start + 2])
        gcs.tasks_finished(1, 1, [spec.id for spec in made[start : start + 2]], b"\0\0", [1, 2])
        gcs.settle_tasks()
    gcs.close()
    found = [row for ends in read_archive(path) for row in ends.rows()]
    assert [row.spec for row in found] == made[:16]
    assert [row.micros for row in found] == [1, 2] * 8


def test_an_archive_is_read_up_to_what_is_torn_and_begins_anew_when_full(tmp_path: Path) -> None:
    path = tmp_path / "tasks"
    archive = TaskArchive(str(path), max_bytes=400)
    batches = [TaskEnds(number, ROOT, b"\0", [1], [2], [3.0], b"\x91\xc0") for number in range(20)]
    for batch in batches:
        archive.append(batch)
    archive.close()
    old, new = list(read_archive(f"{path}.1")), list(read_archive(str(path)))
    assert old + new == batches[-len(old + new) :]
    assert old
    assert new
    assert path.stat().st_size <= 400
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_archive(str(path))) == new[: len(list(read_archive(str(path))))]
    path.write_bytes(whole[:20] + bytes((whole[20] ^ 1,)) + whole[21:])
    assert list(read_archive(str(path))) == []
    again = TaskArchive(str(path), max_bytes=400)
    again.close()
    again.append(batches[0])
    assert again.failures == 1


def test_reads_refuse_what_is_not_there() -> None:
    gcs = Bench().gcs

    def ask(request: m.Request) -> m.Reply:
        return m.decode_reply(gcs.handle_request(m.encode(request)))

    for request in (
        m.Get(Table.TASKS, ROOT),
        m.Put(Table.TASKS, ROOT, b""),
        m.Delete(Table.TASKS, ROOT),
        m.List(Table.TASKS),
        m.DeletePrefix(Table.TASKS, b""),
        m.Read(Table.JOBS, 2),
        m.Read(Table.JOBS, -1),
        m.GetTask(b"short"),
        m.SubmitTasks(1, [TaskSpec(b"short", ROOT)]),
        m.FinishTasks(1, 1, b"short", b"\0", [1]),
        m.Put(Table.JOBS, b"other key", encode_row(job(1))),
        m.Put(Table.JOBS, key_of(job(1)), b"no row"),
    ):
        reply = ask(request)
        assert isinstance(reply, m.Refused), request
        assert reply.code == m.REFUSED_ROW
    assert gcs.failures == gcs.malformed == 0
    assert ask(m.Get(Table.JOBS, ROOT)) == ask(m.GetTask(ROOT)) == m.Missing()


def test_a_number_of_shards_out_of_range_is_refused() -> None:
    for shards in (0, 257):
        with pytest.raises(ValueError, match="1 to 256"):
            GcsService(None, "", shards=shards)


def test_a_key_in_the_wrong_shard_is_found() -> None:
    gcs = Bench(shards=2).gcs
    gcs.put_row(job(1))
    gcs.shards.reverse()
    for index, shard in enumerate(gcs.shards):
        shard.index = index
    with pytest.raises(AssertionError, match="another shard"):
        gcs.validate()


def test_closing_closes_the_sockets() -> None:
    bench = Bench()
    bench.gcs.open_topic(Table.JOBS)
    bench.gcs.close()
    assert all(socket.closed for socket in bench.sockets)
