"""The far end of lanes: calls that processes on other nodes send straight to this one, an actor or a leased worker.

Covers taking such calls in and answering them. Does not cover their order (`zray.call_order`), running them (`zray.execution`), the caller's end
(`zray.lanes`), or who gets a lane (`zray.broker.lanes`).

A call that comes over a lane gets its pending result in this node's store here, as a caller of this node would have made it before sending: then it
is run, cancelled, and made good for when this process dies, like one of those. The result stays in the store until the caller has it (what he has
settled, he says with his next call), or the same call has come through the brokers as well: then it is theirs to bring.

Not every result can go over the lane: large ones, those with references inside, and those of calls that have written output, which is to be on the
driver's terminal before the result is there. The caller is told, and has them brought by the brokers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from zray import _store, wire
from zray.call_order import CallOrder
from zray.object_store import StoreFull
from zray.task import LANE_BIT, TaskSpec

if TYPE_CHECKING:
    import collections
    from collections.abc import Callable

    from zray.actor_runtime import ActorHost
    from zray.object_store import ObjectRef
    from zray.sealed_stream import SealedStream
    from zray.serialization import Packed
    from zray.worker import Worker

MOST_BYTES: Final = 16 << 10
"""Largest result that is sent over a lane."""
_OVER_KEPT: Final = 1000
"""Lanes that are over are remembered one by one, up to so many."""
_FRAME_RESULTS: Final = 64
"""Results in a frame at most."""
_encode = msgspec.msgpack.Encoder().encode


class _LaneEnd:
    """One lane: where answers go, and the results that are kept for it."""

    __slots__ = ("kept", "kinds", "micros", "numbers", "sender", "values")

    def __init__(self) -> None:
        self.sender: SealedStream | None = None
        self.kept: dict[int, ObjectRef] = {}
        """By number of the call."""
        self.numbers: list[int] = []
        self.kinds = bytearray()
        self.values: list[bytes] = []
        self.micros: list[int] = []
        """Results that leave together."""


class LaneEnds:
    """All lanes that end in this process."""

    def __init__(self, worker: Worker) -> None:
        self._inbox = worker.inbox
        self._store = worker.session.store
        self._tasks = CallOrder()
        """Of lanes to a leased worker. (An actor has its own, for all its callers.)"""
        self._over: set[int] = set()
        """Lanes that are over: what was on its way is not taken, or it would run twice."""
        self._over_below = 0
        """All lanes with smaller numbers are over, too: numbers are given in order."""
        self._ends: dict[int, _LaneEnd] = {}
        self._unanswered: dict[bytes, tuple[int, int]] = {}
        """Calls that came over a lane and have not ended: lane and number."""
        self._packed: dict[int, _LaneEnd] = {}
        """Lanes with results that wait for others."""
        self.later: Callable[[Callable[[], None]], object] | None = None
        """Has a function called soon, where nobody else calls `flush` when there is nothing left to run."""

    def greeted(self, lane: int) -> None:
        """Somebody looks whether the lane is open."""
        self._answer(self._inbox.sender, wire.LaneDone(lane, [], b"", [], []))

    def take(self, message: wire.CallOverLane, actor: ActorHost | None, calls: collections.deque[TaskSpec]) -> None:
        """Append the calls that may be delivered now."""
        lane, sender = message.lane, self._inbox.sender
        if not self._takes(message, actor):
            for spec in message.calls:
                self._answer(sender, wire.LaneKept(lane, spec.sequence, False))
            return
        order = self._tasks if actor is None else actor.order
        end = self._ends.setdefault(lane, _LaneEnd())
        end.sender = sender
        for number in message.settled:
            end.kept.pop(number, None)
        for spec in message.calls:
            number = spec.sequence
            if not order.is_new(lane, number):
                # It came through the brokers before. Nobody would answer over the lane, and its caller take that for silence.
                if actor is not None:
                    self._answer(sender, wire.LaneKept(lane, number, True))
                continue
            ref = self._expect(spec)
            if ref is None:
                self._answer(sender, wire.LaneKept(lane, number, False))
            else:
                end.kept[number] = ref
                self._unanswered[spec.id] = lane, number
                calls.extend(ready for ready in order.arrive(lane, spec) if ready.id)

    def _takes(self, message: wire.CallOverLane, actor: ActorHost | None) -> bool:
        """Whether calls are meant for what this process is now."""
        if message.lane in self._over or message.lane < self._over_below:
            return False
        if actor is not None:
            return actor.incarnation == message.incarnation and not actor.exiting
        return self._store.own_word(wire.WORD_LEASE) == message.incarnation

    def skip(self, message: wire.SkipOnLane, calls: collections.deque[TaskSpec]) -> None:
        """The broker sees to some tasks of a lane: those that have not come are not taken any more, and those behind them need not wait."""
        self._release(message.lane, message.numbers)
        for number in message.numbers:
            if self._tasks.is_new(message.lane, number):
                nothing = TaskSpec(b"", b"", sequence=number)
                calls.extend(ready for ready in self._tasks.arrive(message.lane, nothing) if ready.id)

    def _expect(self, spec: TaskSpec) -> ObjectRef | None:
        """Make the pending result of a call; None when it is the brokers' already, or there is no room."""
        store = self._store
        try:
            ref = store.expect(_store.with_index(spec.id, 1), store.process, None, _encode(spec), "")
        except StoreFull:
            return None
        return None if store.marks(ref) & _store.MARK_REMOTE else ref

    def came_otherwise(self, message: wire.CallActor, order: CallOrder) -> list[bytes]:
        """Calls have come through the brokers. If they are of a lane, their results are kept there from now on. Returns those that have come before, of
        which the broker is to hear that they have come twice."""
        lane = message.process
        if not lane & LANE_BIT:
            return []
        self._release(lane, [spec.sequence for spec in message.calls])
        return [spec.id for spec in message.calls if spec.sequence and not order.is_new(lane, spec.sequence)]

    def _release(self, lane: int, numbers: list[int]) -> None:
        end = self._ends.get(lane)
        if end is not None:
            for number in numbers:
                end.kept.pop(number, None)

    def over(self, lane: int) -> None:
        """Nothing more comes over a lane."""
        self._ends.pop(lane, None)
        self._packed.pop(lane, None)
        self._tasks.gone(lane)
        self._over.add(lane)
        if len(self._over) > _OVER_KEPT:
            self._over_below = min(self._ends, default=max(self._over) + 1)
            self._over = {lane for lane in self._over if lane > self._over_below}

    def ended(self, task: bytes, packed: Packed | None, micros: int = 0) -> None:
        """A call has ended, with this result; None: with one that does not go over a lane. Most calls came over none."""
        lane, number = self._unanswered.pop(task, (0, 0))
        end = self._ends.get(lane)
        if end is None:
            return
        if packed is None or packed.size > MOST_BYTES or packed.buffers or packed.refs:
            self._answer(end.sender, wire.LaneKept(lane, number, True))
            return
        end.numbers.append(number)
        end.kinds.append(packed.kind)
        end.values.append(packed.stream)
        end.micros.append(micros)
        if not self._packed and self.later is not None:
            self.later(self.flush)
        self._packed[lane] = end
        if len(end.numbers) >= _FRAME_RESULTS:
            self.flush()

    def flush(self) -> None:
        """Let results leave. Those that wait behind a long call are had brought by the brokers."""
        while self._packed:
            lane, end = self._packed.popitem()
            message = wire.LaneDone(lane, end.numbers, bytes(end.kinds), end.values, end.micros)
            end.numbers, end.kinds, end.values, end.micros = [], bytearray(), [], []
            self._answer(end.sender, message)

    def _answer(self, sender: SealedStream | None, message: wire.Message) -> None:
        if sender is not None:
            self._inbox.answer(sender, wire.encode(message))
