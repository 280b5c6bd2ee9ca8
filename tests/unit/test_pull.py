"""Getting values piece by piece: the receiver's machine against simulated sources that lose, repeat, damage, die, name others and lie."""

from __future__ import annotations

import random
from typing import Any

import pytest

from zray.broker import pull as p
from zray.broker.peer_messages import PIECE_BYTES

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
X, Y = (bytes([n]) * 16 for n in (101, 102))
MIB = 1 << 20


def kinds(actions: list[p.Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def asked(actions: list[p.Action], node: bytes | None = None) -> list[int]:
    """Pieces that are asked for (of one node)."""
    found = [a for a in actions if isinstance(a, p.SendAsk) and node in (None, a.node)]
    return [piece for action in found for piece in action.pieces]


def begun(size: int, *sources: bytes, window: int = 4 * MIB) -> tuple[p.Pulls, list[p.Action]]:
    """A pull of X, version 7, with room and connections."""
    pulls = p.Pulls(window)
    assert kinds(pulls.want(X, 7, size, sources, 0.0)) == ["Dial"] * len(sources)
    actions = []
    for node in sources:
        actions += pulls.connected(node, 0.0)
    assert kinds(actions) == ["Open"]
    return pulls, pulls.opened(X, 0.0)


def give(pulls: p.Pulls, node: bytes, index: int, size: int = MIB, now: float = 0.0) -> list[p.Action]:
    """A piece of X comes; AssertionError when it is not wanted."""
    assert pulls.place_of(node, X, 7, index, size, now) == index * MIB
    actions = pulls.came(node, X, index, now)
    pulls.validate()
    return actions


@pytest.mark.parametrize("size", [1, 300_000, 3 * MIB, 16 * MIB - 1, 16 * MIB, 100 * MIB, 1 << 40])
def test_pieces_are_neither_large_nor_tiny(size: int) -> None:
    piece = p.piece_size(size)
    assert 128 << 10 <= piece <= PIECE_BYTES
    assert size < 2 << 20 or size / piece >= 8 or piece == PIECE_BYTES


def test_a_window_is_asked_for_and_when_half_has_come_as_much_again() -> None:
    pulls, actions = begun(20 * MIB, A)
    assert asked(actions) == [0, 1, 2, 3]
    assert asked(give(pulls, A, 0)) == []
    assert asked(give(pulls, A, 2)) == [4, 5]
    for index in (1, 3, *range(4, 19)):
        actions = give(pulls, A, index)
    assert asked(actions) == []
    assert give(pulls, A, 19) == [p.SendTook(A, X, 7, True), p.Whole(X)]
    assert len(pulls) == 0


def test_several_sources_share_a_value() -> None:
    _pulls, actions = begun(20 * MIB, A, B)
    assert sorted(asked(actions)) == list(range(8))
    assert len(asked(actions, A)) == len(asked(actions, B)) == 4


def test_values_share_a_window() -> None:
    pulls, _ = begun(20 * MIB, A)
    assert pulls.want(Y, 1, 20 * MIB, [A], 0.0) == [], "there is enough to come"
    for index in range(18):
        actions = give(pulls, A, index)
        if index < 11:
            assert kinds(actions) == ["SendAsk"] * (index % 2)
    assert pulls.opened(Y, 0.0) == [p.SendAsk(A, Y, 1, p.piece_size(20 * MIB), [0, 1], [])]


def test_requests_for_the_same_value_are_merged() -> None:
    pulls, _ = begun(20 * MIB, A)
    assert pulls.want(X, 7, 20 * MIB, [A], 0.0) == []
    assert kinds(pulls.want(X, 7, 20 * MIB, [B], 0.0)) == ["Dial"]
    assert pulls.want(X, 8, 20 * MIB, [C], 0.0) == [], "another version is another value"
    assert len(asked(pulls.connected(B, 0.0), B)) == 4


def test_pieces_of_another_version_are_dropped() -> None:
    pulls, _ = begun(20 * MIB, A)
    assert pulls.place_of(A, X, 8, 0, MIB, 0.0) is None
    assert pulls.place_of(A, Y, 7, 0, MIB, 0.0) is None
    assert pulls.place_of(A, X, 7, 20, MIB, 0.0) is None
    assert pulls.place_of(A, X, 7, 0, MIB - 1, 0.0) is None
    assert pulls.strays == 4
    pulls.validate()


def test_a_piece_that_comes_twice_is_taken_once() -> None:
    pulls, _ = begun(20 * MIB, A)
    give(pulls, A, 0)
    assert pulls.place_of(A, X, 7, 0, MIB, 0.0) is None
    assert pulls.repeated == 1


def test_what_was_under_way_when_a_connection_broke_is_asked_for_again() -> None:
    pulls, _ = begun(20 * MIB, A)
    give(pulls, A, 0)
    assert pulls.broken(A, 1.0) == []
    pulls.validate()
    assert asked(pulls.connected(A, 2.0)) == [1, 2, 3, 4]


def test_a_source_dies_and_another_goes_on() -> None:
    pulls, actions = begun(16 * MIB, A, B, window=8 * MIB)
    mine = asked(actions, A)
    for index in asked(actions, B):
        assert kinds(give(pulls, B, index)) in ([], ["SendAsk"])
    again = asked(pulls.node_gone(A, "killed", 1.0), B)
    assert sorted(again) == mine
    for index in again:
        actions = give(pulls, B, index)
    assert actions[-1] == p.Whole(X)


def test_all_sources_dead() -> None:
    pulls, _ = begun(16 * MIB, A, B, window=8 * MIB)
    pulls.node_gone(A, "killed", 1.0)
    [took, failed] = pulls.not_here(B, X, 7, "dropped", 1.0)
    assert took == p.SendTook(B, X, 7, False)
    assert isinstance(failed, p.Failed)
    assert not failed.full
    assert "killed" in failed.reason
    assert "dropped" in failed.reason
    assert len(pulls) == 0


def test_a_silent_source_is_left_and_dialled_anew() -> None:
    pulls, actions = begun(16 * MIB, A, B, window=8 * MIB)
    mine = asked(actions, A)
    pulls.not_yet(B, p.STALL_S - 1)
    assert pulls.wake_at <= p.STALL_S
    actions = pulls.tick(p.STALL_S)
    assert p.Dial(A) in actions
    assert not asked(actions, A)
    for index in asked(begun(16 * MIB, A, B, window=8 * MIB)[1], B):
        actions += give(pulls, B, index, now=p.STALL_S)
    assert set(mine) <= set(asked(actions, B))


def test_the_only_source_is_asked_again_for_as_long_as_it_lives() -> None:
    pulls, _ = begun(16 * MIB, A)
    now, dialled = 0.0, 0
    while now < 100:
        now = pulls.wake_at
        dialled += kinds(pulls.tick(now)).count("Dial")
        assert pulls.wake_at > now
        pulls.validate()
    assert 5 <= dialled <= 20
    assert asked(pulls.connected(A, now)) == [0, 1, 2, 3]


def test_interest_ends_in_the_middle() -> None:
    pulls, _ = begun(20 * MIB, A)
    give(pulls, A, 0)
    assert pulls.forget(X, 1.0) == [p.SendTook(A, X, 7, False)]
    pulls.validate()
    assert pulls.place_of(A, X, 7, 1, MIB, 1.0) is None
    assert pulls.wake_at == p.NEVER
    actions = pulls.want(Y, 1, 4 * MIB, [A], 2.0)
    assert kinds(actions) == ["Open"], "the window is free again"


def test_no_room() -> None:
    pulls = p.Pulls()
    pulls.want(X, 7, MIB, [A], 0.0)
    pulls.connected(A, 0.0)
    assert pulls.failed(X, "the disk is full", 0.0) == [p.Failed(X, "the disk is full", True)]


def test_a_source_names_another_and_is_asked_again_when_that_fails() -> None:
    pulls, _ = begun(20 * MIB, A)
    assert pulls.elsewhere(A, X, 7, B, 0.0) == [p.Dial(B)]
    assert asked(pulls.connected(B, 0.0), B) == [0, 1, 2, 3]
    give(pulls, B, 0)
    actions = pulls.node_gone(B, "killed", 1.0)
    assert [(a.node, a.pieces, a.avoid) for a in actions if isinstance(a, p.SendAsk)] == [(A, [1, 2, 3, 4], [B])]


def test_a_named_source_that_only_ever_waits_is_left() -> None:
    """Two nodes that were sent to each other would wait for ever."""
    pulls, _ = begun(20 * MIB, A)
    pulls.elsewhere(A, X, 7, B, 0.0)
    pulls.connected(B, 0.0)
    actions: list[p.Action] = []
    now = 0.0
    while now < 2 * p.PATIENCE_S and not asked(actions, A):
        now += 1.0
        pulls.not_yet(B, now)
        actions = pulls.tick(now)
        pulls.validate()
    assert now >= p.PATIENCE_S
    assert asked(actions, A) == [0, 1, 2, 3]


def test_a_named_source_is_kept_when_it_is_the_last() -> None:
    pulls, _ = begun(20 * MIB, A)
    pulls.elsewhere(A, X, 7, B, 0.0)
    pulls.node_gone(A, "killed", 0.0)
    pulls.tick(10.0)
    assert asked(pulls.connected(B, 11.0), B) == [0, 1, 2, 3]


def test_late_pieces_are_also_asked_of_who_is_idle() -> None:
    pulls, actions = begun(16 * MIB, A, B, window=8 * MIB)
    for index in asked(actions, B):
        give(pulls, B, index)
    late = set(range(16)) - set(asked(actions, B))
    assert pulls.wake_at == p.LATE_S
    actions = pulls.tick(p.LATE_S)
    assert set(asked(actions, B)) <= late
    assert pulls.wake_at > p.LATE_S


class World:
    """Sources that hold versions of a value, and links that misbehave by chance."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nodes = [bytes([n]) * 16 for n in range(1, 5)]
        self.version = 7
        self.size = self.rng.randrange(1, 40) * MIB // self.rng.randrange(1, 5)
        self.piece = p.piece_size(self.size)
        self.holds = {node: self.rng.choice([7, 7, 7, 8, None]) for node in self.nodes}
        self.alive = set(self.nodes)
        self.connected: set[bytes] = set()
        self.box: list[tuple[bytes, Any]] = []
        """What is under way to the receiver."""
        self.written: dict[int, int] = {}
        """Piece -> version of the bytes in its place."""
        self.outcome: p.Whole | p.Failed | None = None
        self.now = 0.0
        self.pulls = p.Pulls(2 * MIB)
        self.calm = False

    def perform(self, actions: list[p.Action]) -> None:
        for action in actions:
            if isinstance(action, p.Open):
                self.perform(self.pulls.opened(action.object, self.now))
            elif isinstance(action, p.Dial):
                self.connected.discard(action.node)
            elif isinstance(action, (p.Whole, p.Failed)):
                assert self.outcome is None
                self.outcome = action
            elif isinstance(action, p.SendAsk) and action.node in self.alive & self.connected:
                self.answer(action)
        self.pulls.validate()

    def answer(self, ask: p.SendAsk) -> None:
        holds = self.holds[ask.node]
        others = [n for n in self.nodes if n != ask.node and n not in ask.avoid]
        if others and not self.calm and self.rng.random() < 0.1:
            self.box.append((ask.node, ("elsewhere", self.rng.choice(others))))
        elif holds != ask.version:
            self.box.append((ask.node, ("not here", None)))
            if holds is not None:  # a liar: sends what it has all the same
                self.box += [(ask.node, ("piece", (holds, index))) for index in ask.pieces]
        else:
            for index in ask.pieces:
                chance = 1.0 if self.calm else self.rng.random()
                if chance < 0.05:
                    continue
                self.box.append((ask.node, ("piece", (holds, index))))
                if chance < 0.1:
                    self.box.append(self.box[-1])

    def step(self) -> None:
        rng = self.rng
        chance = rng.random()
        if chance < 0.02 and not self.calm and len(self.alive) > 1:
            victim = rng.choice(sorted(self.alive))
            self.alive.discard(victim)
            self.connected.discard(victim)
            self.box = [item for item in self.box if item[0] != victim]
            self.perform(self.pulls.node_gone(victim, "killed", self.now))
        elif chance < 0.06 and not self.calm:
            node = rng.choice(self.nodes)
            if node in self.connected:
                self.connected.discard(node)
                self.box = [item for item in self.box if item[0] != node]
                self.perform(self.pulls.broken(node, self.now))
        elif chance < 0.2 or not self.box:
            waiting = sorted(self.alive - self.connected)
            if waiting and rng.random() < 0.7:
                node = rng.choice(waiting)
                self.connected.add(node)
                self.perform(self.pulls.connected(node, self.now))
            else:
                self.now = min(max(self.now, self.pulls.wake_at), self.now + 30.0)
                self.perform(self.pulls.tick(self.now))
        else:
            self.deliver(*self.box.pop(rng.randrange(min(3, len(self.box)))))

    def deliver(self, node: bytes, message: tuple[str, Any]) -> None:
        what, detail = message
        if what == "elsewhere":
            self.perform(self.pulls.elsewhere(node, X, self.version, detail, self.now))
        elif what == "not here":
            self.perform(self.pulls.not_here(node, X, self.version, "not that version", self.now))
        else:
            version, index = detail
            size = min(self.piece, self.size - index * self.piece)
            place = self.pulls.place_of(node, X, version, index, size, self.now)
            if place is not None:
                assert self.written.get(index) != self.version, "a good piece is overwritten"
                self.written[index] = version
                self.perform(self.pulls.came(node, X, index, self.now))


@pytest.mark.parametrize("block", range(6))
def test_whatever_happens_it_ends_and_the_bytes_are_right(block: int) -> None:
    whole = 0
    for seed in range(60 * block, 60 * block + 60):
        world = World(seed)
        world.perform(world.pulls.want(X, world.version, world.size, world.nodes[:2], 0.0))
        for step in range(6000):
            world.calm = step > 1500
            if world.outcome is not None:
                break
            world.step()
        assert world.outcome is not None, f"seed {seed} does not end"
        assert len(world.pulls) == 0
        if isinstance(world.outcome, p.Whole):
            whole += 1
            count = -(-world.size // world.piece)
            assert world.written == dict.fromkeys(range(count), world.version), f"seed {seed}"
        else:
            good = [n for n in world.nodes[:2] if n in world.alive and world.holds[n] == world.version]
            assert not good, f"seed {seed} gave up although {good}"
    assert whole > 15


def _without(method: str, answer: Any = None) -> Any:
    """A machine in which one thing is not done."""
    return type("Faulty", (p.Pulls,), {method: lambda self, *args: answer})


def _mixes_versions() -> Any:
    class Faulty(p.Pulls):
        def place_of(self, node: bytes, object_: bytes, version: int, index: int, size: int, now: float) -> int | None:
            return super().place_of(node, object_, 7, index, size, now)

    return Faulty


@pytest.mark.parametrize(
    "faulty",
    [_without("_take_back"), _without("_missing_again"), _without("tick", []), _mixes_versions()],
    ids=["loses what was asked of the dead", "forgets what is missing again", "never ticks", "mixes versions"],
)
def test_planted_faults_are_found(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "Pulls", faulty)
    with pytest.raises((AssertionError, KeyError)):
        test_whatever_happens_it_ends_and_the_bytes_are_right(0)
