"""Who belongs to the cluster."""

from __future__ import annotations

import random

import msgspec
import pytest

from zray.broker.membership import (
    BEAT_S,
    BEATS_A_SECOND,
    DEAD_S,
    LOADS_AT_ONCE,
    LOOK_S,
    LOOKS_AT_ONCE,
    SILENT_S,
    Change,
    LoadReports,
    Membership,
    Neighbours,
    NodeInfo,
    NodeLoad,
    Refusal,
    State,
    beat_seconds,
)


def info(number: int, **changes: object) -> NodeInfo:
    found = NodeInfo(
        bytes([number]) * 16, f"127.0.0.1:{7000 + number}", "here", number, {"CPU": 2.0}, {}, "0.1.0", "3.11"
    )
    return msgspec.structs.replace(found, **changes)


HEAD, A, B = info(1), info(2), info(3)


@pytest.fixture
def cluster() -> Membership:
    return Membership(HEAD)


def test_nodes_join_beat_and_leave(cluster: Membership) -> None:
    assert cluster.join(A, 0.0) == [Change(A.id, State.ALIVE)]
    assert cluster.join(A, 0.1) == [], "its answer was lost: it asks again"
    assert cluster.heard(A.id, NodeLoad({"CPU": 1.0}, queued=3), 1.0) == []
    assert cluster.members[A.id].load.queued == 3
    assert [member.info.id for member in cluster.present()] == [HEAD.id, A.id]
    assert cluster.end(A.id, "it has left") == [Change(A.id, State.DEAD, "it has left")]
    assert cluster.end(A.id, "its port refuses") == []
    assert [member.info.id for member in cluster.present()] == [HEAD.id]


def test_a_pause_of_twenty_seconds_is_survived(cluster: Membership) -> None:
    cluster.join(A, 0.0)
    assert cluster.tick(SILENT_S / 2) == []
    [silent] = cluster.tick(SILENT_S)
    assert (silent.node, silent.state) == (A.id, State.SILENT)
    assert cluster.tick(20.0) == []
    assert cluster.heard(A.id, None, 20.0) == [Change(A.id, State.ALIVE)]
    assert cluster.tick(20.0) == []


def test_who_is_silent_for_too_long_is_dead_for_ever(cluster: Membership) -> None:
    cluster.join(A, 0.0)
    changes = cluster.tick(DEAD_S)
    assert [change.state for change in changes] == [State.SILENT, State.DEAD]
    assert cluster.is_dead(A.id)
    assert cluster.heard(A.id, NodeLoad({}), DEAD_S + 1) == []
    assert cluster.is_dead(A.id)
    with pytest.raises(Refusal, match=r"declared dead .* start it again"):
        cluster.join(A, DEAD_S + 2)
    assert cluster.join(B, DEAD_S + 3), "its next life is another node"


def test_ports_of_silent_nodes_are_looked_at_again_and_again(cluster: Membership) -> None:
    """Whoever ended while nobody could reach it refuses when it can be reached again."""
    cluster.join(A, 0.0)
    cluster.join(info(9, address=""), 0.0)  # a client: nobody can connect to it
    assert cluster.to_look_at(SILENT_S / 2) == []
    cluster.tick(SILENT_S)
    assert cluster.to_look_at(SILENT_S) == [A.id]
    assert cluster.to_look_at(SILENT_S + LOOK_S / 2) == []
    assert cluster.to_look_at(SILENT_S + LOOK_S) == [A.id]
    cluster.heard(A.id, None, SILENT_S + LOOK_S)
    assert cluster.to_look_at(SILENT_S + 2 * LOOK_S) == []


def test_when_all_are_silent_their_ports_take_turns(cluster: Membership) -> None:
    nodes = [info(number) for number in range(2, 2 + LOOKS_AT_ONCE + 3)]
    for node in nodes:
        cluster.join(node, 0.0)
    cluster.tick(SILENT_S)
    first = cluster.to_look_at(SILENT_S)
    second = cluster.to_look_at(SILENT_S + BEAT_S)
    assert (len(first), len(second)) == (LOOKS_AT_ONCE, 3)
    assert {*first, *second} == {node.id for node in nodes}
    assert cluster.to_look_at(SILENT_S + LOOK_S) == first


def test_the_head_is_never_silent_to_itself(cluster: Membership) -> None:
    assert cluster.tick(1000.0) == []
    assert cluster.end(HEAD.id, "whatever") == []


def test_strangers_are_not_heard(cluster: Membership) -> None:
    assert cluster.heard(B.id, NodeLoad({}), 1.0) == []
    assert not cluster.is_dead(B.id)
    assert B.id not in cluster.members


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.2.0"}, r"the cluster runs zray 0\.1\.0, this node 0\.2\.0: install 0\.1\.0"),
        ({"python": "3.12"}, r"the cluster runs Python 3\.11, this node 3\.12"),
        ({"id": b"short"}, "16 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(cluster: Membership, changes: dict[str, object], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        cluster.join(info(2, **changes), 0.0)
    assert len(cluster.members) == 1


def test_patch_versions_never_matter(cluster: Membership) -> None:
    assert cluster.join(info(2, version="0.1.17"), 0.0)


def test_neighbours_follow_the_head() -> None:
    here = Neighbours(B.id)
    assert here.learn(HEAD, 0.0)
    assert here.learn(A, 0.0)
    assert not here.learn(A, 1.0)
    assert not here.learn(B, 1.0), "oneself is no neighbour"
    assert here.change(Change(A.id, State.SILENT, "silent"))
    assert here.members[A.id].state == State.SILENT
    assert not here.change(Change(A.id, State.SILENT))
    assert here.change(Change(A.id, State.DEAD, "gone"))
    assert not here.change(Change(A.id, State.DEAD, "gone again"))
    assert here.dead == {A.id: "gone"}
    assert not here.learn(A, 2.0), "the dead do not come back"
    here.load(A.id, NodeLoad({}), 3.0)
    assert list(here.members) == [HEAD.id]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_states_follow_the_rules(seed: int) -> None:
    """Silence leads to death in due time, death is for ever, and every change is told once."""
    draw = random.Random(seed)
    cluster = Membership(HEAD)
    nodes = [info(number) for number in range(2, 8)]
    last_heard: dict[bytes, float] = {}
    told: dict[bytes, State] = {}
    now = 0.0
    for _ in range(400):
        now += draw.random() * 4
        node = draw.choice(nodes)
        kind = draw.choice(["join", "beat", "beat", "beat", "tick", "tick", "end"])
        if kind == "join":
            try:
                changes = cluster.join(node, now)
                last_heard[node.id] = now
            except Refusal:
                assert told[node.id] == State.DEAD
                continue
        elif kind == "beat":
            changes = cluster.heard(node.id, None, now)
            if node.id in told and told[node.id] != State.DEAD:
                last_heard[node.id] = now
        elif kind == "tick":
            changes = cluster.tick(now)
            for known, heard in last_heard.items():
                state = cluster.members[known].state
                assert state == State.DEAD or now - heard < DEAD_S
                assert state != State.ALIVE or now - heard < SILENT_S
        else:
            changes = cluster.end(node.id, "left") if draw.random() < 0.05 else []
        for change in changes:
            assert told.get(change.node) not in (change.state, State.DEAD)
            told[change.node] = change.state
    assert all(cluster.members[node].state == state for node, state in told.items())


def ids(count: int) -> list[bytes]:
    return [index.to_bytes(16, "big") for index in range(count)]


def test_in_small_clusters_everybody_hears_of_all_loads() -> None:
    reports = LoadReports()
    for _ in range(3):
        assert reports.windows(ids(LOADS_AT_ONCE)) == [ids(LOADS_AT_ONCE)]


def hear(reports: LoadReports, nodes: list[bytes], rounds: int) -> list[set[bytes]]:
    """What each node has heard of after some rounds."""
    heard: list[set[bytes]] = [set() for _ in nodes]
    for _ in range(rounds):
        windows = reports.windows(nodes)
        assert all(len(window) <= LOADS_AT_ONCE for window in windows)
        for index, found in enumerate(heard):
            found.update(windows[index % len(windows)])
    return heard


def test_in_large_clusters_changed_loads_reach_everybody_soon() -> None:
    reports, nodes = LoadReports(), ids(1000)
    for node in nodes[100:400]:
        reports.changed(node)
    windows = -(-300 // (LOADS_AT_ONCE * 3 // 4))
    for heard in hear(reports, nodes, windows):
        assert heard >= set(nodes[100:400])


def test_loads_that_do_not_change_are_told_again_and_again() -> None:
    reports, nodes = LoadReports(), ids(1000)
    for _ in range(2):
        for heard in hear(reports, nodes, 1000 // LOADS_AT_ONCE + 1):
            assert heard == set(nodes)


def test_windows_follow_who_is_there() -> None:
    reports, nodes = LoadReports(), ids(200)
    reports.changed(nodes[5])
    hear(reports, nodes, 3)
    left = [*nodes[10:], b"n" * 16]
    reports.changed(nodes[5])
    for heard in hear(reports, left, 400 // (LOADS_AT_ONCE // 4)):
        assert heard == set(left)


def test_beats_are_rarer_in_large_clusters() -> None:
    assert beat_seconds(1) == beat_seconds(100) == BEAT_S
    assert 10_000 <= beat_seconds(10_000) * BEATS_A_SECOND < 10_000 + BEAT_S * BEATS_A_SECOND
    head = Membership(HEAD)
    for index in range(9000):
        head.join(info(2, id=index.to_bytes(16, "big")), 0.0)
    assert head.tick(3 * beat_seconds(9001)) == []
    assert len(head.tick(4 * beat_seconds(9001))) == 9000
