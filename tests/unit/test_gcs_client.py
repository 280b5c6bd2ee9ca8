"""Callers: user keys, typed rows, pages, and subscriptions over links that lose things and over real sockets."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from zray.clock import ManualClock
from zray.gcs import messages as m
from zray.gcs.client import GcsClient, Subscription
from zray.gcs.limits import GcsLimits
from zray.gcs.service import GcsService
from zray.gcs.tables import ABSENT, ActorNameRow, JobRow, Table, decode_row
from zray.gcs.task_batches import TaskEnds
from zray.ids import task_id
from zray.task import TaskSpec
from zray.transport import Context

ROOT = bytes(16)


def job(number: int, reason: str = "") -> JobRow:
    return JobRow(task_id(ROOT, number), number, ROOT, 7, "default", reason=reason)


def connected(**settings: object) -> tuple[GcsService, GcsClient]:
    gcs = GcsService(None, "", clock=ManualClock(), **settings)  # type: ignore[arg-type]
    return gcs, GcsClient(gcs.handle_request)


def test_user_keys() -> None:
    _, client = connected()
    assert client.kv_put("k", b"1")
    assert not client.kv_put("k", b"2")  # stored, but not new
    assert client.kv_get("k") == b"2"
    assert not client.kv_put("k", b"3", overwrite=False)
    assert client.kv_get(b"k") == b"2"  # text stands for its UTF-8 bytes
    assert client.kv_put("l", b"", overwrite=False)
    assert client.kv_get("l") == b""
    assert client.kv_exists("l")
    assert not client.kv_exists("")
    assert not client.kv_exists("lo")
    assert client.kv_get("none") is None
    assert client.kv_delete("k")
    assert not client.kv_delete("k")
    assert client.kv_keys() == [b"l"]


def test_namespaces_keep_user_keys_apart() -> None:
    _, client = connected()
    for namespace in (None, "", "a", "ab", b"\xff"):
        assert client.kv_put("x1", str(namespace).encode(), namespace=namespace)
        client.kv_put("x2", b"", namespace=namespace)
        client.kv_put("y", b"", namespace=namespace)
    for namespace in (None, "", "a", "ab", b"\xff"):
        assert client.kv_get("x1", namespace=namespace) == str(namespace).encode()
        assert client.kv_keys("x", namespace=namespace) == [b"x1", b"x2"]
    assert client.kv_delete_prefix("x", namespace="a") == 2
    assert client.kv_keys(namespace="a") == [b"y"]
    assert client.kv_keys(namespace="ab") == client.kv_keys() == [b"x1", b"x2", b"y"]


def test_wrong_types_are_told_at_once() -> None:
    _, client = connected()
    with pytest.raises(TypeError, match="a value is bytes, got str"):
        client.kv_put("k", "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a key is bytes or str, got int"):
        client.kv_get(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a namespace is bytes or str, got int"):
        client.kv_get("k", namespace=1)  # type: ignore[arg-type]
    assert client.kv_put("k", memoryview(b"view"))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    _, client = connected(limits=GcsLimits(value_bytes=10, kv_bytes=40), shards=1)
    with pytest.raises(m.RequestRefused, match="at most 10 bytes, this one 11") as caught:
        client.kv_put("k", bytes(11))
    assert caught.value.code == m.REFUSED_FULL
    for key in ("a", "b", "c"):
        client.kv_put(key, bytes(10))
    with pytest.raises(m.RequestRefused, match="40 bytes"):
        client.kv_put("d", bytes(10))
    assert client.kv_keys() == [b"a", b"b", b"c"]


def test_typed_rows_and_compare_and_swap() -> None:
    _, client = connected()
    version = client.write(job(1), expected=ABSENT)
    assert client.versioned(JobRow, job(1).id) == (job(1), version)
    newer = client.write(job(1, "changed"), expected=version)
    with pytest.raises(m.VersionConflict) as caught:
        client.write(job(1, "lost"), expected=version)
    assert caught.value.version == newer
    assert client.row(JobRow, job(1).id) == job(1, "changed")
    with pytest.raises(m.VersionConflict):
        client.delete(JobRow, job(1).id, expected=version)
    assert client.delete(JobRow, job(1).id, expected=newer)
    assert not client.delete(JobRow, job(1).id)
    assert client.row(JobRow, job(1).id) is None


def test_long_lists_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs, client = connected(shards=3)
    names = [f"n{i:03}" for i in range(50)]
    for name in names:
        gcs.put_row(ActorNameRow("default", name, ROOT))
    calls: list[m.Request] = []
    monkeypatch.setattr(m, "MAX_PAGE", 7)
    inner = gcs.handle_request

    def counted(body: bytes) -> bytes:
        calls.append(m.decode_request(body))
        return inner(body)

    assert [row.name for row in GcsClient(counted).rows(ActorNameRow)] == names
    assert len(calls) == 8
    monkeypatch.undo()
    for index in range(3):
        client.kv_put(f"large{index}", bytes(5 << 20))
    calls.clear()
    assert len(list(GcsClient(counted).entries(Table.KV))) == 3
    assert len(calls) == 2  # a page ends when it is large, too


def test_tasks_are_readable() -> None:
    gcs, client = connected()
    spec = TaskSpec(task_id(ROOT, 1), ROOT, b"args")
    gcs.tasks_submitted(3, [spec])
    row = client.task(spec.id)
    assert row is not None
    assert (row.job, row.spec) == (3, spec)
    assert client.task(ROOT) is None
    assert client.tasks(3) == client.tasks() == [row]
    assert client.tasks(4) == []
    assert client.statistics().tasks_live == 1


def test_refusals_become_exceptions() -> None:
    _, client = connected()
    with pytest.raises(m.RequestRefused, match="16 bytes") as caught:
        client.task(b"short")
    assert caught.value.code == m.REFUSED_ROW
    with pytest.raises(m.ProtocolError):
        GcsClient(lambda body: b"nonsense").kv_get("k")
    with pytest.raises(m.RequestRefused, match="unexpected answer"):
        GcsClient(lambda body: m.encode(m.Done())).rows(JobRow)


def rows_of(subscription: Subscription) -> dict[bytes, JobRow]:
    return {key: decode_row(JobRow, value) for key, value in subscription.rows.items()}


def test_without_a_socket_a_subscription_reads() -> None:
    gcs, client = connected()
    gcs.put_row(job(1))
    subscription = client.subscribe(Table.JOBS)
    assert [change.key for change in subscription.poll()] == [job(1).id]
    assert subscription.poll() == []
    gcs.put_row(job(1, "new"))
    gcs.put_row(job(2))
    gcs.delete_row(JobRow, job(2).id)
    assert {change.key for change in subscription.poll()} == {job(1).id, job(2).id}
    assert rows_of(subscription) == {job(1).id: job(1, "new")}
    subscription.close()


class DeafSocket:
    """A SUB socket on which nonsense arrives and nothing else."""

    def __init__(self) -> None:
        self.left = [(b"jobs.", b"nonsense"), (m.BEAT, b"\x01\xc1")]

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        return self.left.pop() if self.left else None

    def close(self) -> None:
        self.left.clear()


def test_nonsense_on_a_socket_is_counted_and_dropped() -> None:
    gcs = GcsService(lambda endpoint: Sink(), "/run/s", shards=1, clock=ManualClock())
    subscription = GcsClient(gcs.handle_request).subscribe(Table.JOBS, lambda endpoint, topics: DeafSocket())
    assert subscription.poll() == []
    assert subscription.malformed == 2


class Sink:
    """A PUB socket without subscribers."""

    def send(self, topic: bytes, body: bytes) -> None:
        pass

    def close(self) -> None:
        pass


def test_real_sockets_deliver_rows_and_task_batches(tmp_path: Path) -> None:
    context = Context()
    gcs = GcsService(context.publisher, str(tmp_path), shards=2)
    client = GcsClient(gcs.handle_request)
    try:
        jobs = client.subscribe(Table.JOBS, context.subscriber)
        tasks = client.subscribe(Table.TASKS, context.subscriber)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["g0", "g1"]
        tasks.poll()
        expected = {}
        for number in range(50):
            gcs.put_row(job(number))
            expected[job(number).id] = job(number)
        names = [task_id(ROOT, i) for i in range(64)]
        gcs.tasks_submitted(1, [TaskSpec(name, ROOT) for name in names])
        gcs.tasks_finished(1, 4, names, bytes(64), [5] * 64)
        heard: set[bytes] = set()
        deadline = time.monotonic() + 30
        while rows_of(jobs) != expected or heard != set(names):
            assert time.monotonic() < deadline
            gcs.tick(time.monotonic())
            jobs.poll(5)
            for change in tasks.poll(5):
                assert change.value is not None
                heard.update(row.id for row in msgspec.msgpack.decode(change.value, type=TaskEnds).rows())
        # Both views are synced now; what changes next arrives as notices.
        gaps, published = jobs.gaps, gcs.published
        gcs.delete_row(JobRow, job(7).id)
        assert gcs.published == published + 1
        while job(7).id in jobs.rows:
            assert time.monotonic() < deadline
            gcs.tick(time.monotonic())
            jobs.poll(5)
        assert jobs.gaps >= gaps
        jobs.close()
        tasks.close()
    finally:
        gcs.close()
        context.close()
