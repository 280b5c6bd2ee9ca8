"""Messages between brokers: every kind survives its frame; whatever bytes come, only PeerFrameError goes out."""

from __future__ import annotations

import random

import pytest

from zray.broker import peer_messages as pm
from zray.broker.membership import Change, NodeInfo, NodeLoad, State
from zray.broker.placement_groups import Held
from zray.placing import IN, GroupSpec, Requirement
from zray.task import ActorSpec, CallShape, JobSpec, TaskSpec

NODE = bytes(range(16))
INFO = NodeInfo(NODE, "10.0.0.1:7000", "here", 7, {"CPU": 2.0}, {"zone": "east"}, "0.1.0", "3.11", "s", "/run/s")
JOB = JobSpec(1, NODE, 1, "", [], "/")
ACTOR = ActorSpec(TaskSpec(NODE, NODE), 1, "name", "space", True)
PLACE = pm.Located(NODE, 1 << 40, 3, [NODE, NODE])
GROUP = GroupSpec(
    NODE, 1, "PACK", ({"CPU": 10_000}, {"CPU": 1}), ((Requirement("zone", IN, ("east",)),), ()), "name", "space"
)
EXAMPLES: list[pm.PeerMessage] = [
    pm.Join(INFO),
    pm.Rejoin(INFO, "c1", 3, [INFO]),
    pm.Joined("c1", INFO, [INFO, INFO], 3, 60.0, "sqlite"),
    pm.Rejected("no"),
    pm.Beat(NodeLoad({"CPU": 1.5}, 3, 2, 1000)),
    pm.Loads({NODE: NodeLoad({})}),
    pm.NotMe(NODE),
    pm.Seen(1 << 40),
    pm.Replicate(b"message"),
    pm.NodeUp(INFO),
    pm.NodeChanged(Change(NODE, State.DEAD, "gone")),
    pm.Leave("enough"),
    pm.Gone(NODE, "its port refuses"),
    pm.StoreRequest(8, b"request", 7),
    pm.StoreReply(1, b"reply"),
    pm.Value(NODE, 1, 2, 3, b"abc", [NODE]),
    pm.Value(NODE, 1, 2, 1 << 40, None, []),
    pm.Ask(NODE, 7, 1 << 20, [0, 3], [NODE]),
    pm.Piece(NODE, 7, 3),
    pm.NotYet(NODE, 7),
    pm.NotHere(NODE, 7, "gone"),
    pm.Elsewhere(NODE, 7, NODE, "127.0.0.1:1"),
    pm.Took(NODE, 7, True),
    pm.Fetch(NODE, 1 << 60),
    pm.Chunk(NODE, 1 << 60, 1 << 40, b"abc"),
    pm.NotFetched(NODE, 1 << 60, "it has it no more"),
    pm.Unfetch(NODE, 1 << 60),
    pm.AskStream(),
    pm.StreamIs(7, bytes(32)),
    pm.RunTasks(JOB, NODE, 7, [CallShape(NODE, 0, NODE, "f")], [TaskSpec(NODE, NODE, b"args")], [NODE], [PLACE]),
    pm.TasksEnded([NODE], [7], b"\0", [12], [pm.Value(NODE, 0, 0, 1, b"v", [])], [PLACE], NodeLoad({})),
    pm.CancelAway(NODE, True),
    pm.CallActorAway(JOB, NODE, NODE, [], [TaskSpec(NODE, NODE, b"args")], [NODE]),
    pm.KillActorAway(NODE, True),
    pm.HostActor(JOB, NODE, 7, [CallShape(NODE, 0, NODE, "C")], ACTOR, 2, [TaskSpec(NODE, NODE)], [NODE]),
    pm.HostActor(JOB, NODE, 7, [], ACTOR, 2, [], [NODE], NODE, 9, [TaskSpec(NODE, NODE)], [NODE]),
    pm.CallsLoggedAway(NODE, 7, 12, [], [TaskSpec(NODE, NODE, b"args")], [NODE]),
    pm.CheckpointAway(NODE, 7, 12, NODE),
    pm.LogConfirmed(NODE, 12, 10, 0),
    pm.ActorUp(NODE, 7, 2, 4711, 3),
    pm.ActorGone(NODE, 7, "ActorDiedError", "SIGKILL", b"failure"),
    pm.EndActorAway(NODE),
    pm.Steps([pm.Step(1.5, "00", "tasks", NODE, "placed", "there")]),
    pm.Output(7, "3.out", b"\x1ef\x1f12\nhello\n"),
    pm.AdoptActor(3, JOB, NODE, [], ACTOR, [NODE]),
    pm.Adopted(3, NODE, NODE),
    pm.AskActor(4, NODE),
    pm.AskLane(5, NODE, NODE),
    pm.LaneIs(5),
    pm.LaneIs(5, 40, bytes(32), 1 << 40, 2),
    pm.LanesOver([1 << 40]),
    pm.AskLease(5, JOB, NODE, [CallShape(NODE, 0, NODE, "f")], NODE, [NODE]),
    pm.RunOnLane(JOB, NODE, 1 << 40, [], [TaskSpec(NODE, NODE, b"args")], [NODE]),
    pm.ActorIs(4, ACTOR, [NODE]),
    pm.ActorIs(4, None, []),
    pm.JobOver(7, "the driver has ended"),
    pm.WantGroup(1, NODE, GROUP),
    pm.DropGroup(2, NODE),
    pm.GroupAnswer(2, "the name is taken"),
    pm.HoldBundles(NODE, 3, {0: {"CPU": 10_000}, 2: {"GPU": 5_000}}),
    pm.BundlesHeld(NODE, 3, True, NodeLoad({"CPU": 1.0})),
    pm.ReleaseBundles(NODE, 3),
    pm.GroupIs(GROUP, (NODE, b"")),
    pm.GroupGone(NODE, "it was removed"),
    pm.AskGroup(NODE),
    pm.BundlesKept([Held(NODE, 1, 1 << 33, True)], [NODE], [7], NodeLoad({})),
    pm.Want([NODE]),
    PLACE,
    pm.GetValues([NODE]),
    pm.NoCopy(NODE, "damaged"),
    pm.CopyAt(NODE, NODE, 1 << 40, 3, True),
    pm.Lost(NODE, "gone"),
    pm.GiveBack([NODE, NODE]),
    pm.Joined("c1", INFO, [INFO], 3, 60.0, "replicas", 30.0, pm.Serving(3, [(NODE, "h:1")], [(NODE, "h:1")], 3)),
    pm.Serving(3, [(NODE, "127.0.0.1:1")], [(NODE, "127.0.0.1:1")], 3),
    pm.BeReplica([(NODE, "127.0.0.1:1")], 3),
    pm.HeadIs(4, INFO),
]


def test_there_is_an_example_of_each_kind() -> None:
    assert {type(example) for example in EXAMPLES} == set(pm.KINDS.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_survives_its_frame(message: pm.PeerMessage) -> None:
    body = pm.encode(message)
    assert pm.decode(body) == message
    assert pm.decode(memoryview(body)) == message
    for way in (pm.PLAIN, pm.NUMBERED):
        assert pm.open_envelope(pm.envelope(way, NODE, body)) == (way, NODE[:8], body)
    assert pm.open_envelope(pm.envelope(pm.PLAIN, b"", body))[1] == pm.ANYBODY


def test_what_must_arrive_is_numbered() -> None:
    plain = {type(message) for message in EXAMPLES if not pm.is_numbered(message)}
    assert plain == {pm.Join, pm.Rejoin, pm.Joined, pm.Rejected, pm.Beat, pm.Loads, pm.NotMe, pm.Seen} | {
        pm.Ask,
        pm.Piece,
        pm.NotYet,
        pm.NotHere,
        pm.Elsewhere,
        pm.Took,
        pm.Replicate,
        pm.BeReplica,
        pm.HeadIs,
    }


@pytest.mark.parametrize("seed", range(20))
def test_whatever_bytes_come(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(500):
        body = bytearray(pm.encode(draw.choice(EXAMPLES)))
        for _ in range(draw.randrange(1, 4)):
            kind = draw.randrange(4)
            if kind == 0 and body:
                body[draw.randrange(len(body))] = draw.randrange(256)
            elif kind == 1:
                del body[draw.randrange(len(body) + 1) :]
            elif kind == 2:
                body += draw.randbytes(draw.randrange(20))
            else:
                body = bytearray(draw.randbytes(draw.randrange(60)))
        try:
            pm.decode(bytes(body))
        except pm.PeerFrameError:
            pass
        try:
            pm.open_envelope(bytes(body))
        except pm.PeerFrameError:
            pass


@pytest.mark.parametrize("frame", [b"", bytes(10), b"\x02\x00" + bytes(20), b"\x01\x07" + bytes(20)])
def test_what_is_no_envelope(frame: bytes) -> None:
    with pytest.raises(pm.PeerFrameError, match="not a frame of version 1"):
        pm.open_envelope(frame)
