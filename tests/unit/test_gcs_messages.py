"""Requests, replies and notices: they survive encoding, and whatever else comes is refused and harms nothing."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zray.clock import ManualClock
from zray.gcs import messages as m
from zray.gcs.service import GcsService
from zray.gcs.tables import Change, JobRow, Table, TaskRow, encode_row
from zray.task import TaskSpec

ID = bytes(range(16))
CHANGE = Change(Table.JOBS, ID, None, 4, 2)
REQUESTS: list[m.Request] = [
    m.Get(Table.JOBS, ID),
    m.Put(Table.JOBS, ID, encode_row(JobRow(ID, 1, ID, 7, "default")), 0),
    m.Delete(Table.JOBS, ID),
    m.List(Table.KV, b"p", b"a", 5, True),
    m.DeletePrefix(Table.KV, b"p"),
    m.Open(Table.ACTORS),
    m.Read(Table.JOBS, 1, 9, 4),
    m.SubmitTasks(1, [TaskSpec(ID, ID, b"args", 0, (ID,))]),
    m.FinishTasks(1, 2, ID + ID, bytes(2), [3, 4]),
    m.GetTask(ID),
    m.ListTasks(1, 5),
    m.Describe(),
]
REPLIES: list[m.Reply] = [
    m.Refused("row", "why"),
    m.Found(b"v", 3),
    m.Missing(),
    m.Written(3, True),
    m.Conflict(0),
    m.Page([(b"k", b"v", 1)], True),
    m.Deleted(2),
    m.Opened(5, ["ipc:///g0"]),
    m.Snapshot(5, 2, [(b"k", b"v", 1)]),
    m.Log(5, [CHANGE]),
    m.Done(),
    m.FoundTask(TaskRow(ID, 1, 0, spec=TaskSpec(ID, ID))),
    m.Tasks([TaskRow(ID, 1, -1)]),
    m.Statistics(1, {"JOBS": 1}, {"JOBS": 9}, 0, 1, 2, 3, 4, {0: 5}, 6, 7, 8, 9),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda item: type(item).__name__)
def test_requests_survive_encoding(request_: m.Request) -> None:
    assert m.decode_request(m.encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda item: type(item).__name__)
def test_replies_survive_encoding(reply: m.Reply) -> None:
    assert m.decode_reply(m.encode(reply)) == reply


def test_the_lists_above_are_complete() -> None:
    assert {type(item) for item in REQUESTS} == set(m.Request.__subclasses__())
    assert {type(item) for item in REPLIES} == set(m.Reply.__subclasses__())


def test_notices_survive_encoding() -> None:
    notice, beat = m.Notice(9, CHANGE), m.Beat(9, {Table.JOBS: 4})
    assert m.decode_notice(m.topic_name(Table.JOBS), m.encode(notice)) == notice
    assert m.decode_notice(m.BEAT, m.encode(beat)) == beat


def test_no_topic_is_the_prefix_of_another() -> None:
    names = [m.topic_name(table) for table in Table] + [m.BEAT]
    assert not [(a, b) for a in names for b in names if a is not b and b.startswith(a)]


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\x02\x92\x01\x01", b"\x01\xc1", b"\x01\x91\x63", b"\x01" + b"\x91" * 9999]
)
def test_what_is_none_is_refused(data: bytes) -> None:
    for decode in (m.decode_request, m.decode_reply, lambda body: m.decode_notice(m.BEAT, body)):
        with pytest.raises(m.ProtocolError):
            decode(data)


def other_versions(data: bytes) -> bytes:
    return bytes((m.VERSION + 1,)) + data[1:]


def test_another_version_is_refused() -> None:
    with pytest.raises(m.ProtocolError, match="version 1"):
        m.decode_request(other_versions(m.encode(REQUESTS[0])))


def service() -> GcsService:
    return GcsService(None, "", shards=2, clock=ManualClock(), epoch=1)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)
@given(st.binary(max_size=64))
def test_random_bytes_get_an_answer_and_change_nothing(data: bytes) -> None:
    gcs = service()
    reply = m.decode_reply(gcs.handle_request(data))
    if gcs.malformed:
        assert isinstance(reply, m.Refused)
        assert reply.code == m.REFUSED_MALFORMED
        assert gcs.statistics().changes == 0
    assert gcs.failures == 0


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.integers(0, 9), inner, max_size=3),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=80)
@given(st.integers(0, 13), st.lists(plain, max_size=6))
def test_any_fields_get_an_answer_and_leave_a_valid_store(kind: int, fields: list[object]) -> None:
    gcs = service()
    m.decode_reply(gcs.handle_request(bytes((m.VERSION,)) + msgspec.msgpack.encode([kind, *fields])))
    assert gcs.failures == 0, gcs.last_failure
    gcs.validate()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change, drop, repeat or insert a few bytes."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(body) + 1)
        kind = rng.randrange(4)
        if kind == 0 and place < len(body):
            body[place] = rng.randrange(256)
        elif kind == 1:
            del body[place : place + rng.randint(1, 5)]
        elif kind == 2:
            body[place:place] = body[place : place + rng.randint(1, 9)]
        else:
            body[place:place] = rng.randbytes(rng.randint(1, 3))
    return bytes(body)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_requests_get_an_answer_and_leave_a_valid_store(seed: int) -> None:
    rng = random.Random(seed)
    gcs = service()
    refused = 0
    for _ in range(600):
        data = mutated(rng, m.encode(rng.choice(REQUESTS)))
        reply = m.decode_reply(gcs.handle_request(data))
        refused += isinstance(reply, m.Refused)
    gcs.validate()
    assert gcs.failures == 0, gcs.last_failure
    assert 0 < gcs.malformed <= refused < 600
