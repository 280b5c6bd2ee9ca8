"""Every message survives the wire; nothing that is no message gets through, or raises anything but FrameError."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zray import wire
from zray.placing import GroupSpec
from zray.task import ActorSpec, CallShape, JobSpec, TaskSpec

ID = bytes(range(16))
SPEC = TaskSpec(ID, ID, b"args", 0, (ID,), (), 2, 7)
SHAPE = CallShape(ID, 0, ID, "f", "", 1, b"\x01", 3)
JOB = JobSpec(1, ID, 42, "space", ["/somewhere"], "/", [], {"A": "b"})
ACTOR = ActorSpec(SPEC, 1, "name", "space", methods={"f": 1})

EXAMPLES: list[wire.Message] = [
    wire.Hello(1, JOB, ID, "0", "3.11"),
    wire.Goodbye(1, 1),
    wire.WorkerReady(1, 2),
    wire.DefineShapes([SHAPE]),
    wire.SubmitTasks(1, 1, ID, [SPEC, SPEC]),
    wire.TasksDone(1, ID + ID, b"\x00\x01", [5, 6], True),
    wire.Blocked(1),
    wire.Unblocked(1),
    wire.Sealed(ID),
    wire.Wanted(ID),
    wire.LeaseRequest(1, 1, ID, ID),
    wire.LeaseReturn(1, 2, 3),
    wire.CreateActor(1, ACTOR, ID),
    wire.SubmitActorCalls(1, 1, ID, 0, [SPEC]),
    wire.ActorReady(1, 2, ID),
    wire.ActorFailed(1, ID, b"error"),
    wire.ActorExit(1, ID),
    wire.LogCalls(1, ID, 7, [], [SPEC]),
    wire.SaveCheckpoint(1, ID, 7, ID),
    wire.CancelTask(ID, True, False),
    wire.KillActor(ID, True),
    wire.LookupActor("name", "space", ID),
    wire.GcsRequest(b"body", ID),
    wire.Query("nodes", ID),
    wire.CreateGroup(1, GroupSpec(ID, 1, "SPREAD", ({"CPU": 10_000},)), ID),
    wire.RemoveGroup(ID, ID),
    wire.AwaitGroup(ID, ID, 1, b"handle"),
    wire.BindJob(JOB),
    wire.RunTasks([SPEC]),
    wire.RunDirect(1, 2, [SPEC]),
    wire.StartActor(ACTOR, 1, [SPEC]),
    wire.StartActor(ACTOR, 1, [], ID, 7, [SPEC]),
    wire.CallActor(1, 0, [SPEC]),
    wire.CallsLogged(),
    wire.OpenLane(3, ID, ID),
    wire.CloseLane(3, ID, 1 << 40),
    wire.ExpectVisitor("/run/x40", 1 << 40, bytes(32)),
    wire.VisitorsRefused(1),
    wire.CallOverLane(1 << 40, 2, [1, 2], [SPEC]),
    wire.GreetOverLane(1 << 40),
    wire.LaneDone(1 << 40, [1, 2], b"\0\1", [b"value", b""], [10, 20]),
    wire.LaneKept(1 << 40, 3, True),
    wire.SkipOnLane(1 << 40, [3], ID),
    wire.SubmitLaneTasks(1, ID, 1 << 40, [SPEC]),
    wire.LaneTasksDone(1, ID, b"\0", [10]),
    wire.ExitWhenIdle("no handles"),
    wire.Shutdown("bye"),
    wire.CallerGone(7),
]


def test_the_examples_cover_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(wire.KINDS.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_frame_cut_short_is_refused(message: wire.Message) -> None:
    frame = wire.encode(message)
    for length in range(len(frame)):
        with pytest.raises(wire.FrameError):
            wire.decode(frame[:length])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_flipped_bits_give_a_message_or_a_frame_error(message: wire.Message) -> None:
    frame = wire.encode(message)
    rng = random.Random(type(message).__name__)
    for _ in range(300):
        damaged = bytearray(frame)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            found = wire.decode(bytes(damaged))
        except wire.FrameError:
            continue
        assert isinstance(found, wire.Message)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    try:
        found = wire.decode(noise)
    except wire.FrameError:
        return
    assert type(found) in wire.KINDS.values()


@given(st.sampled_from(sorted(wire.KINDS)), st.binary(max_size=100))
def test_noise_behind_a_good_head_is_refused(kind: int, noise: bytes) -> None:
    try:
        wire.decode(bytes((wire.VERSION, kind)) + noise)
    except wire.FrameError:
        return


def test_another_version_is_refused() -> None:
    frame = wire.encode(wire.Blocked(1))
    with pytest.raises(wire.FrameError, match="version"):
        wire.decode(bytes((wire.VERSION + 1,)) + frame[1:])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(wire.FrameError, match="unknown kind"):
        wire.decode(bytes((wire.VERSION, 200)) + msgspec.msgpack.encode([1]))


@pytest.mark.parametrize(
    "message",
    [
        wire.SubmitTasks(1, 1, ID, [TaskSpec(b"short", ID)]),
        wire.RunTasks([TaskSpec(ID, b"short")]),
        wire.CallActor(1, 0, [TaskSpec(b"short", ID)]),
        wire.TasksDone(1, ID, b"\x00\x01", [5], True),
        wire.TasksDone(1, ID, b"\x00", [5, 6], True),
        wire.Sealed(ID + b"x"),
        wire.DefineShapes([CallShape(b"short", 0, ID, "f")]),
        wire.CreateActor(1, ActorSpec(TaskSpec(b"short", ID), 1), ID),
        wire.Query("nodes", b"short"),
        wire.CreateGroup(1, GroupSpec(b"short", 1, "SPREAD", ({"CPU": 10_000},)), ID),
        wire.RemoveGroup(b"short", ID),
        wire.AwaitGroup(ID, b"short", 1, b"handle"),
        wire.KillActor(b"", True),
    ],
)
def test_ids_and_columns_of_wrong_length_are_refused(message: wire.Message) -> None:
    with pytest.raises(wire.FrameError):
        wire.decode(wire.encode(message))
