"""A caller, an actor on another node, the brokers between them, and a lane that breaks: all in one seeded simulation.

Covers the real `Lane` (the caller's decisions), `LaneEnds` and `CallOrder` (the actor's), over channels that lose, hold and delay. The brokers and the
store are models of what `zray.broker.remote_tasks` and the store promise: their way is slow, in order, and loses nothing. Does not cover deaths of
processes and nodes (`tests/integration/test_lanes.py`).
"""

from __future__ import annotations

import collections
import heapq
import itertools
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from zray import _store, serialization, wire
from zray.call_order import CallOrder
from zray.lane_ends import LaneEnds
from zray.lanes import Lane, Sent
from zray.task import LANE_BIT, CallShape, LaneTag, TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 60
NODE = bytes(16)
SHAPE = CallShape(bytes(16), 2, b"", "method")


class Entry:
    """A result in the store of the actor's node."""

    def __init__(self) -> None:
        self.claimed = False
        self.value: bytes | None = None
        self.references = 0


class Reference:
    """Keeps an entry, like a reference of the store's."""

    def __init__(self, store: Store, name: bytes) -> None:
        self._store, self.name = store, name
        self.entry = store.entries.setdefault(name, Entry())
        self.entry.references += 1

    def __del__(self) -> None:
        self.entry.references -= 1
        if self.entry.references == 0:
            self._store.entries.pop(self.name, None)


class Store:
    """The store of the actor's node, as far as `LaneEnds` uses it."""

    process = 1

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}

    def expect(self, name: bytes, _target: int, _deps: Any, _spec: Any, _site: str) -> Reference:
        return Reference(self, name)

    def marks(self, _ref: Any) -> int:
        return 0


class Channel:
    """Delivers in order, each thing a while after it was sent and not before the one ahead of it. `broken`: what is under way is lost."""

    def __init__(self, world: World, delay: float, deliver: Callable[[Any], None]) -> None:
        self.world, self.delay, self.deliver = world, delay, deliver
        self.held_until = 0.0
        self.last = 0.0
        self.life = 0

    def send(self, what: Any) -> None:
        world = self.world
        at = max(world.now + world.rng.uniform(0.5, 1.5) * self.delay, self.last, self.held_until)
        self.last = at
        life = self.life
        world.at(at, lambda: self.deliver(what) if life == self.life else None)

    def hold(self, seconds: float) -> None:
        self.held_until = self.world.now + seconds

    def breaks(self) -> None:
        self.life += 1
        self.last = 0.0


class World:
    """All of it. `ran` and `results` are what a test looks at."""

    def __init__(self, seed: int, *, eager: bool = False) -> None:
        """eager: a planted fault: a lane is begun although calls are under way by the brokers."""
        self.rng = Random(seed)
        self.now = 0.0
        self.eager = eager
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        # the actor's node
        self.store = Store()
        self.order = CallOrder()
        self.queue: collections.deque[TaskSpec] = collections.deque()
        self.busy = False
        self.ran: list[int] = []
        self.guests: dict[bytes, Reference] = {}
        inbox = SimpleNamespace(sender=b"x", answer=lambda _sender, frame: self.back.send(wire.decode(frame)))
        worker: Any = SimpleNamespace(inbox=inbox, session=SimpleNamespace(store=self.store))
        self.ends = LaneEnds(worker)
        self.actor: Any = SimpleNamespace(order=self.order, incarnation=0, exiting=False)
        # the caller's
        self.lane: Lane | None = None
        self.begun = False
        self.dial_at = 0.0
        self.lanes = itertools.count(1)
        self.made = 0
        self.results: dict[int, bytes] = {}
        self.over_lanes = 0
        # between them
        self.there = Channel(self, 0.0005, self._over_lane)
        self.back = Channel(self, 0.0005, self._answer)
        self.to_broker = Channel(self, 0.003, self._at_broker)
        self.from_broker = Channel(self, 0.003, self._from_broker)

    # -- time --------------------------------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), what))

    def live(self, seconds: float = 60.0) -> None:
        """Run until all calls have their results, at most so long."""
        self._call()
        self._tick()
        self._trouble()
        while self._events and self.now < seconds and len(self.results) < CALLS:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def check(self) -> None:
        """Each call has run once, in order, and its result has come."""
        assert len(self.results) == CALLS, f"{CALLS - len(self.results)} calls have no result: {self.missing()}"
        assert self.ran == list(range(CALLS)), f"they ran as {self.ran}"
        assert all(value == _value(number) for number, value in self.results.items())

    def missing(self) -> list[int]:
        return [number for number in range(self.made) if number not in self.results]

    # -- the caller --------------------------------------------------------------------------------------------------

    def _call(self) -> None:
        if self.made == CALLS:
            return
        rng = self.rng
        for _ in range(min(rng.choice([1, 1, 1, 5]), CALLS - self.made)):
            self._submit(rng.random() < 0.8)
        waits = len(self.results) < self.made and rng.random() < 0.7
        if waits:
            self._when_done(self.made)
        else:
            self.at(self.now + rng.uniform(0.0, 0.002), self._call)

    def _when_done(self, made: int) -> None:
        if len(self.results) >= made:
            self._call()
        else:
            self.at(self.now + 0.0002, lambda: self._when_done(made))

    def _submit(self, fits: bool) -> None:
        number, self.made = self.made, self.made + 1
        lane = self._ready()
        spec = TaskSpec(_task(number), SHAPE.key, b"")
        if lane is None:
            self.to_broker.send((spec, None))
            return
        lane.last += 1
        spec.sequence = lane.last
        if fits and lane.may_send():
            ref: Any = SimpleNamespace(slot=number, task_id=lambda: spec.id)
            lane.sent(Sent(lane.last, SHAPE, _encode(spec), ref, self.now))
            self.over_lanes += 1
            message = wire.CallOverLane(lane.number, lane.incarnation, lane.take_settled(), [spec])
            self.there.send(message)
        else:
            self.to_broker.send((spec, lane.tag(False)))

    def _ready(self) -> Lane | None:
        """As `FarActor.ready`."""
        lane = self.lane
        if lane is not None and self.begun and (lane.may_send() or not lane.broken(self.now)):
            return lane
        if lane is None:
            if self.now >= self.dial_at:
                number = LANE_BIT | next(self.lanes)
                self.lane = Lane(NODE, number, 0, lambda number: number not in self.results, self.now)
                self.there.send(wire.GreetOverLane(number))
            return None
        if lane.broken(self.now):
            self._give_up(lane)
        elif lane.open and (self.eager or len(self.results) == self.made - 1):
            self.begun = True
            return lane
        return None

    def _give_up(self, lane: Lane) -> None:
        self._hand_over(lane, lane.all_unanswered())
        self.to_broker.send((None, lane.tag(False)))
        self.lane, self.begun = None, False
        self.dial_at = self.now + 0.1

    def _hand_over(self, lane: Lane, calls: list[Sent]) -> None:
        for call in calls:
            self.to_broker.send((_decode(call.body), lane.tag(True)))

    def _tick(self) -> None:
        if self.lane is not None:
            self._hand_over(self.lane, self.lane.overdue(self.now))
        self.at(self.now + 0.001, self._tick)

    def _answer(self, message: wire.Message) -> None:
        lane = self.lane
        if lane is None or message.lane != lane.number:  # type: ignore[attr-defined]
            return
        if isinstance(message, wire.LaneDone):
            lane.open = True
            for number, value in zip(message.numbers, message.values, strict=True):
                call = lane.answered(number, self.now)
                if call is not None:
                    self.results.setdefault(call.slot, value)
        elif isinstance(message, wire.LaneKept):
            kept = lane.kept(message.number, self.now)
            if kept is not None:
                self.to_broker.send((_decode(kept.body), lane.tag(message.taken)))

    def _from_broker(self, result: tuple[int, bytes]) -> None:
        number, value = result
        self.results.setdefault(number, value)

    # -- the actor's node ----------------------------------------------------------------------------------------------

    def _at_broker(self, sent: tuple[TaskSpec | None, LaneTag | None]) -> None:
        spec, lane = sent
        if spec is None:
            assert lane is not None
            self.queue.extend(self.order.gone(lane.number))
            self.ends.over(lane.number)
        else:
            self.guests[spec.id] = Reference(self.store, _result(spec.id))
            caller = 0 if lane is None else lane.number
            if lane is None:
                spec.sequence = 0
            self.ends.came_otherwise(wire.CallActor(caller, 0, [spec]), self.order)
            self.queue.extend(self.order.arrive(caller, spec))
            self._report(spec.id)
        self._run()

    def _over_lane(self, message: wire.Message) -> None:
        if isinstance(message, wire.GreetOverLane):
            self.ends.greeted(message.lane)
        elif isinstance(message, wire.CallOverLane):
            self.ends.take(message, self.actor, self.queue)
        self._run()

    def _run(self) -> None:
        while self.queue and not self.busy:
            spec = self.queue.popleft()
            entry = self.store.entries.get(_result(spec.id))
            if entry is None or entry.claimed:
                self.ends.ended(spec.id, None)
                continue
            entry.claimed = self.busy = True
            self.ran.append(_number(spec.id))
            took = self.rng.choice([0.0, 0.0001, 0.0001, 0.001, 0.02])
            self.at(self.now + took, lambda spec=spec, entry=entry: self._end(spec, entry))  # type: ignore[misc]
        if not self.busy:
            self.ends.flush()

    def _end(self, spec: TaskSpec, entry: Entry) -> None:
        self.busy = False
        entry.value = _value(_number(spec.id))
        packed = serialization.Packed(serialization.KIND_PICKLE, entry.value, [], [])
        self.ends.ended(spec.id, packed if self.rng.random() < 0.9 else None)
        self._report(spec.id)
        self._run()

    def _report(self, task: bytes) -> None:
        guest = self.guests.get(task)
        if guest is not None and guest.entry.value is not None:
            del self.guests[task]
            self.from_broker.send((_number(task), guest.entry.value))

    # -- bad luck ------------------------------------------------------------------------------------------------------

    def _trouble(self) -> None:
        rng = self.rng
        what = rng.random()
        channels = rng.choice([[self.there], [self.back], [self.there, self.back]])
        if what < 0.3:
            for channel in channels:
                channel.breaks()
        elif what < 0.6:
            for channel in channels:
                channel.hold(rng.choice([0.004, 0.02, 0.5, 2.0]))
        elif what < 0.7:
            self.to_broker.hold(rng.uniform(0.0, 0.05))
        self.at(self.now + rng.choice([0.003, 0.03, 0.3]), self._trouble)


def _task(number: int) -> bytes:
    return number.to_bytes(4, "little") + bytes(12)


def _result(task: bytes) -> bytes:
    return _store.with_index(task, 1)


def _number(task: bytes) -> int:
    return int.from_bytes(task[:4], "little")


def _value(number: int) -> bytes:
    return b"result %d" % number


def _encode(spec: TaskSpec) -> bytes:
    return wire.encode(wire.RunTasks([spec]))


def _decode(body: bytes) -> TaskSpec:
    message = wire.decode(body)
    assert isinstance(message, wire.RunTasks)
    return message.tasks[0]
