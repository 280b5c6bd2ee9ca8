"""The caller's end of lanes: calls to actors and leased workers on other nodes that go straight to their processes, when they come one after another.

Covers when a lane to an actor is asked for and given up (`FarActor`), which calls of a function go to a worker that another node has lent
(`FarWorker`), what was sent over a lane (`Lane`), and taking in answers, in the thread that waits for
one or in one of its own (`LaneReader`). Does not cover the far end (`zray.lane_ends`),
who gets a lane (`zray.broker.lanes`), or calls within this node (`zray.submission`).

By way of the brokers a call to another node is six hops there and back; over a lane it is two. The brokers' way stays the truth: they keep books of what
is under way, and see to what becomes of it when a process or a node dies. So a lane only overtakes them:

- All calls of a process to an actor for which it has a lane are numbered in it, whichever way they take. The actor runs each number once, in order.
  (Tasks have no order: only those are numbered that go over the lane, one at a time. A worker that was taken back refuses them; then they are
  submitted as any other.)
- Calls without an answer are handed over when none has come for `PATIENCE_S`: they are sent through the brokers as well, as some that their actor may
  have already. Whichever answer comes first becomes the result; the other says the same.
- While an answer that was waited for in vain has not come, further calls take the brokers' way alone. If it never comes, the lane is given up, and another
  asked for when calls are made one after another again.

Only small calls without references go over a lane. A lane is begun when nothing is under way by the brokers any more, so that nothing overtakes.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import errors, failures, serialization, wire
from zray._store import FLAG_SYSTEM_ERROR, KIND_ERROR_FLAG, TELL_BROKER
from zray.ids import return_id
from zray.object_store import NOT_HERE
from zray.task import LaneTag, TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.object_store import ObjectRef
    from zray.sealed_stream import DialledStream
    from zray.session import Session
    from zray.submission import Submitter
    from zray.task import CallShape

PATIENCE_S: Final = 0.005
"""Seconds after which a call that has no answer is sent through the brokers, too."""
_DIALLING_S: Final = 0.05
"""The same while the lane is dialled."""
_GRACE_S: Final = 0.25
"""Seconds that an answer over the lane may come later than the one through the brokers."""
_GREETING_S: Final = 2.0
"""Seconds within which a new lane must answer."""
_ANSWER_S: Final = 5.0
"""Seconds within which the brokers say whether there is a lane."""
_CALM_CALLS: Final = 2
"""Consecutive calls whose predecessor had finished, after which a lane is asked for."""
_AGAIN_S: Final = (0.1, 10.0)
"""After a lane that could not be had, or broke: seconds until the next is asked for, doubling up to the second."""
_MISFITS: Final = 3
"""Results in succession that did not fit a lane, after which calls of that function take the ordinary way."""
_MOST_BYTES: Final = 8 << 10
"""Largest arguments that are sent over a lane."""
_REPORT_ENDS: Final = 512
"""Ends of tasks that are reported together; fewer when calls pause."""
_decode_spec = msgspec.msgpack.Decoder(TaskSpec).decode
_FRAME_CALLS: Final = 128
"""Calls in a frame at most."""
_QUIET_MS: Final = 50
"""Milliseconds without calls after which the reader sleeps until it is woken."""


class Sent:
    """A call that went over a lane, and has not ended."""

    __slots__ = ("body", "handed_over", "number", "parent", "ref", "sent_at", "shape", "slot", "task")

    def __init__(
        self, number: int, shape: CallShape, body: bytes, ref: ObjectRef, now: float, parent: bytes = b""
    ) -> None:
        self.number = number
        self.task = ref.task_id()
        self.slot = ref.slot
        self.parent = parent
        """The task that has made this one."""
        self.shape = shape
        self.body = body
        self.ref: ObjectRef | None = ref
        """Keeps the result, and what that holds, until the brokers do."""
        self.sent_at = now
        self.handed_over = False


class Lane:
    """What was sent over one lane, and what became of it. Decides, and does nothing: time is an argument."""

    def __init__(self, node: bytes, number: int, incarnation: int, pending: Callable[[int], bool], now: float) -> None:
        """
        Args:
            node: where it leads.
            number: that node has given it.
            incarnation: of the actor, or epoch of the lease.
            pending: whether the result in this slot is not there. (It may have gone, and the slot be another's.)
            now: when it was dialled.
        """
        self.node = node
        self.number = number
        self.incarnation = incarnation
        self.last = 0
        """Number of the last call, whichever way it took."""
        self.open = False
        """The far end has answered."""
        self.cut = False
        """It was open, and leads nowhere any more."""
        self._pending = pending
        self._dialled_at = now
        self._heard_at = now
        """When the last answer came."""
        self._settled: list[int] = []
        """Calls whose answers have come since the far end was last told which."""
        self._sent: dict[int, Sent] = {}
        """Calls whose results are not there, in order."""
        self._silent: dict[int, float] = {}
        """Calls without an answer that were handed over, and since when all was done otherwise (0: it is not)."""

    @property
    def under_way(self) -> int:
        """Calls that went over it and have not been answered, as far as is known."""
        return len(self._sent)

    def take_settled(self) -> list[int]:
        """Return the calls whose answers have come, once."""
        found, self._settled = self._settled, []
        return found

    def all_done(self) -> bool:
        """Whether all results are there, whichever way they came."""
        for number in [number for number, sent in self._sent.items() if not self._pending(sent.slot)]:
            del self._sent[number]
        return not self._sent

    def tag(self, sent: bool) -> LaneTag:
        """What calls that take the brokers' way say of themselves."""
        return LaneTag(self.number, self.incarnation, sent)

    def may_send(self) -> bool:
        """Whether the next call may go over it."""
        return self.open and not self.cut and not self.is_silent()

    def is_silent(self) -> bool:
        """Whether an answer was waited for in vain, and has not come since."""
        return bool(self._silent)

    def sent(self, call: Sent) -> None:
        """A call goes over the lane."""
        self._sent[call.number] = call

    def answered(self, number: int, now: float) -> Sent | None:
        """An answer has come: the call that it is for, None when that has ended otherwise."""
        self._heard_at = now
        self._silent.pop(number, None)
        self._settled.append(number)
        return self._sent.pop(number, None)

    def kept(self, number: int, now: float) -> Sent | None:
        """The answer is that the brokers must bring the result, or that the call was not taken: the call, None when it was handed over before."""
        self._heard_at = now
        self._silent.pop(number, None)
        call = self._sent.pop(number, None)
        return None if call is None or call.handed_over else call

    def overdue(self, now: float) -> list[Sent]:
        """The calls that are to be handed over now: all, when one was sent a while ago and no answer has come since."""
        for sent in self._sent.values():
            if not sent.handed_over:
                patience = PATIENCE_S if self.open else _DIALLING_S
                if max(sent.sent_at, self._heard_at) + patience <= now:
                    return self._hand_over(list(self._sent.values()))
                break
        return []

    def all_unanswered(self) -> list[Sent]:
        """All calls that are not with the brokers: to be handed over."""
        return self._hand_over(list(self._sent.values()))

    def _hand_over(self, calls: list[Sent]) -> list[Sent]:
        found = [call for call in calls if not call.handed_over and self._pending(call.slot)]
        for call in found:
            call.handed_over = True
            call.ref = None
            self._silent[call.number] = 0.0
        return found

    def waits(self) -> bool:
        """Whether some call may become overdue."""
        return any(not sent.handed_over for sent in self._sent.values())

    def broken(self, now: float) -> bool:
        """Whether it never answered, or does not any more: answers came through the brokers, and a while later not over the lane."""
        if not self.open:
            return now - self._dialled_at > _GREETING_S
        if self.cut:
            return self.all_done()
        if not self._silent or not self.all_done():
            return False
        number, since = next(iter(self._silent.items()))
        if not since:
            self._silent[number] = now
        return bool(since) and now - since > _GRACE_S


class FarActor:
    """One process's way to an actor on another node: through the brokers, or over a lane. Methods are called with the submitter's lock held."""

    __slots__ = ("_actor", "_begun", "_calm", "_last_slot", "_not_before", "_pause", "_reply", "_submitter", "lane")

    def __init__(self, submitter: Submitter, actor: bytes) -> None:
        self._submitter = submitter
        self._actor = actor
        self.lane: Lane | None = None
        self._begun = False
        """Calls are numbered in the lane."""
        self._reply: ObjectRef | None = None
        self._last_slot = 0
        """First result of the last call, whichever way it took."""
        self._calm = 0
        self._not_before = 0.0
        self._pause = _AGAIN_S[0]

    def called(self, slot: int) -> None:
        """A call was made; its first result is in this slot."""
        self._last_slot = slot

    def ready(self) -> Lane | None:
        """The lane in which the next call is to be numbered; asks for one when calls come one after another."""
        lane = self.lane
        if lane is not None:
            if self._begun and (lane.may_send() or not lane.broken(time.monotonic())):
                return lane
            return self._begin(lane)
        if not self._last_slot:
            return None
        if self._reply is not None:
            self._take_reply(self._reply)
            if self._reply is not None and time.monotonic() > self._not_before:
                self._reply = None  # whoever was to answer is dead
        elif self._submitter.session.store.slot_pending(self._last_slot):
            self._calm = 0
        else:
            self._calm += 1
            if self._calm >= _CALM_CALLS and time.monotonic() >= self._not_before:
                self._ask()
        return None

    def _begin(self, lane: Lane) -> Lane | None:
        """Use a new lane when all that went through the brokers has ended; give it up when nobody answers."""
        if lane.broken(time.monotonic()):
            self.give_up()
        elif lane.open and not self._submitter.session.store.slot_pending(self._last_slot):
            self._begun = True
            self._pause = _AGAIN_S[0]
            return lane
        return None

    def _ask(self) -> None:
        session = self._submitter.session
        reply = session.expect_reply()
        session.tell(wire.OpenLane(session.store.process, self._actor, reply.binary()))
        self._reply = reply
        self._not_before = time.monotonic() + _ANSWER_S

    def _take_reply(self, reply: ObjectRef) -> None:
        session = self._submitter.session
        if not session.store.done(reply):
            return
        self._reply = None
        self._calm = 0
        self._not_before = 0.0
        found = session.store.read(reply)
        if found is NOT_HERE or not len(found[2]):
            self._wait_a_while()
            return
        address = msgspec.msgpack.decode(bytes(found[2]), type=wire.LaneAddress)
        self.lane = Lane(address.node, address.lane, address.incarnation, session.store.slot_pending, time.monotonic())
        self._begun = False
        self._submitter.lane_reader.add(self.lane, self, address)

    def hand_over(self, calls: list[Sent], lane: Lane) -> None:
        """Send calls through the brokers that went over the lane."""
        self._submitter.through_brokers(self._actor, calls, lane.tag(True))

    def refused(self, call: Sent, lane: Lane) -> None:
        """Send a call through the brokers that the actor has not taken."""
        self._submitter.through_brokers(self._actor, [call], lane.tag(False))

    def _wait_a_while(self) -> None:
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _AGAIN_S[1])

    def give_up(self) -> None:
        """Use the lane no more: what is under way takes the brokers' way, and so does what follows."""
        lane, self.lane = self.lane, None
        self._reply = None
        self._calm = 0
        if lane is not None:
            self._wait_a_while()
            self._submitter.lane_reader.remove(lane)


class FarWorker:
    """A worker that another node has lent for calls of one function. Methods are called with the submitter's lock held."""

    __slots__ = ("_submitter", "lane", "misfits", "taken_back")

    def __init__(self, submitter: Submitter, address: wire.LaneAddress) -> None:
        self._submitter = submitter
        self.taken_back = False
        """It refused a call: it is somebody else's now."""
        self.misfits = 0
        """How many results in succession did not fit the lane."""
        pending = submitter.session.store.slot_pending
        self.lane = Lane(address.node, address.lane, address.incarnation, pending, time.monotonic())
        submitter.lane_reader.add(self.lane, self, address)

    def may_send(self) -> bool:
        """Whether a call may go there now: it has none to run. The first goes while the lane is dialled: tasks that took the ordinary way meanwhile
        would take the worker back."""
        return not self.lane.is_silent() and self.lane.all_done()

    def is_over(self) -> bool:
        """Whether it is to be given up."""
        if self.taken_back or self.misfits >= _MISFITS:
            return True
        return not self.lane.may_send() and self.lane.broken(time.monotonic())

    def was_of_use(self) -> bool:
        """Whether there was a way to it, and results came by it."""
        return self.lane.open and self.misfits < _MISFITS

    def give_up(self) -> None:
        """Use it no more."""
        self._submitter.lane_reader.remove(self.lane)

    def hand_over(self, calls: list[Sent], lane: Lane) -> None:
        """Have the brokers see to tasks that went over the lane."""
        session = self._submitter.session
        tasks: Any = [msgspec.Raw(call.body) for call in calls]
        message = wire.SubmitLaneTasks(session.job, lane.node, lane.number, tasks)
        session.tell(message)

    def refused(self, call: Sent, lane: Lane) -> None:
        """Submit a task that was not taken, as any other."""
        self.taken_back = True
        session = self._submitter.session
        spec = _decode_spec(call.body)
        spec.sequence = 0
        session.tell(wire.SubmitTasks(session.store.process, session.job, call.parent, [spec]))


class _Connection:
    """A lane with its stream."""

    __slots__ = ("armed", "lane", "last_slot", "packed", "route", "shapes", "stream", "taker")

    def __init__(self, lane: Lane, route: FarActor | FarWorker, stream: DialledStream) -> None:
        self.lane = lane
        self.route = route
        self.stream = stream
        self.shapes: set[bytes] = set()
        """Those that were told of over it."""
        self.packed: list[msgspec.Raw] = []
        """Calls that leave together."""
        self.last_slot = 0
        """Result of the last call that went over it."""
        self.taker = False
        """A thread that waits for an answer takes in what comes."""
        self.armed = False
        """Else the thread for that does: it waits for the descriptor."""


class LaneReader:
    """All lanes of this process: sends over them, and takes in what comes.

    Whoever waits for the answer to the last call of a lane reads its stream himself, for as long as patience lasts: to be woken by another thread would
    cost more than all else. For everything else there is a thread, which is started with the first lane.
    """

    def __init__(self, submitter: Submitter) -> None:
        self._submitter = submitter
        self._session: Session = submitter.session
        self._lock = submitter.lock
        self._connections: dict[Lane, _Connection] = {}
        self._by_descriptor: dict[int, _Connection] = {}
        self._last: _Connection | None = None
        """Over which the last call went."""
        self._epoll: select.epoll | None = None
        self._woken = -1
        self._asleep = False
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.calls = 0
        """Calls that went over lanes."""
        self.handed_over = 0
        """Calls of these that the brokers were told of as well."""
        self._ids = bytearray()
        self._statuses = bytearray()
        self._micros: list[int] = []
        """Ends of tasks that are to be reported."""

    # -- from any thread, with the lock held -----------------------------------------------------------------------------

    def add(self, lane: Lane, route: FarActor | FarWorker, address: wire.LaneAddress) -> None:
        """Dial the far end; the lane is open when it has answered. One that cannot be had (no descriptors) stays closed."""
        from zray.sealed_stream import DialledStream

        try:
            stream = DialledStream(address.address, address.door, address.lane, address.secret)
        except OSError:
            return
        connection = _Connection(lane, route, stream)
        if self._epoll is None:
            self._epoll = select.epoll()
            self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._woken, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name="zray-lanes", daemon=True)
            self._thread.start()
            self._session.take_in_until = self.take_in_until
        self._connections[lane] = connection
        stream.send(wire.encode(wire.GreetOverLane(lane.number)))
        self._arm(connection)
        self._wake()

    def send(self, call: Sent, lane: Lane) -> bool:
        """Send a call over its lane; or pack it, while the actor is busy with others: False, `flush` must follow."""
        connection = self._connections[lane]
        if call.shape.key not in connection.shapes:
            self._flush(connection)
            connection.stream.send(wire.encode(wire.DefineShapes([call.shape])))
            connection.shapes.add(call.shape.key)
        lane.sent(call)
        self.calls += 1
        raw = msgspec.Raw(call.body)
        connection.packed.append(raw)
        connection.last_slot = call.slot
        self._last = connection
        if lane.under_way == len(connection.packed) or len(connection.packed) >= _FRAME_CALLS:
            self._flush(connection)
            return True
        return False

    def flush(self, lane: Lane) -> None:
        """Let packed calls leave."""
        connection = self._connections.get(lane)
        if connection is not None:
            self._flush(connection)

    def has_packed(self, lane: Lane) -> bool:
        """Whether calls wait for `flush`."""
        connection = self._connections.get(lane)
        return connection is not None and bool(connection.packed)

    def _flush(self, connection: _Connection) -> None:
        if not connection.packed:
            return
        lane, stream, packed = connection.lane, connection.stream, connection.packed
        count = len(packed)
        message = wire.CallOverLane(lane.number, lane.incarnation, lane.take_settled(), packed)  # type: ignore[arg-type]
        stream.send(wire.encode(message))
        if connection.packed is packed:  # as in `zray.submission`: calls within calls
            connection.packed = packed[count:]
        if self._asleep or stream.waits_to_write():
            self._arm(connection)
            self._wake()

    def _arm(self, connection: _Connection) -> None:
        """Have the thread wait for what a stream can do next, unless somebody else does."""
        assert self._epoll is not None
        stream = connection.stream
        descriptor = stream.fileno()
        if stream.ended or connection.lane not in self._connections:
            self._disarm(connection)
            return
        events = 0 if connection.taker else select.EPOLLIN
        if stream.waits_to_write():
            events |= select.EPOLLOUT
        if self._by_descriptor.get(descriptor) is connection:
            self._epoll.modify(descriptor, events)
        else:
            self._by_descriptor[descriptor] = connection
            self._epoll.register(descriptor, events)
        connection.armed = not connection.taker

    def _disarm(self, connection: _Connection) -> None:
        """Wait for a stream no more: it has ended."""
        connection.armed = False
        descriptor = connection.stream.fileno()
        if self._epoll is not None and self._by_descriptor.get(descriptor) is connection:
            del self._by_descriptor[descriptor]
            self._epoll.unregister(descriptor)

    def fits(self, shape: CallShape, stream: bytes) -> bool:
        """Whether a call without references may go over a lane."""
        return len(stream) <= _MOST_BYTES and shape.num_returns == 1

    def hand_over_all(self) -> None:
        """Have the brokers know of all calls."""
        for connection in self._connections.values():
            self._hand_over(connection, connection.lane.all_unanswered())

    def remove(self, lane: Lane) -> None:
        """Give up a lane."""
        connection = self._connections.pop(lane, None)
        if connection is None:
            return
        self._hand_over(connection, lane.all_unanswered())
        self._disarm(connection)
        if self._last is connection:
            self._last = None
        connection.stream.close()
        self._session.tell(wire.CloseLane(self._session.store.process, lane.node, lane.number))

    def _hand_over(self, connection: _Connection, calls: list[Sent]) -> None:
        if calls:
            self.handed_over += len(calls)
            connection.route.hand_over(calls, connection.lane)

    def _wake(self) -> None:
        os.eventfd_write(self._woken, 1)

    # -- from any thread, without the lock -------------------------------------------------------------------------------

    def take_in_until(self, ref: ObjectRef, seconds: float) -> bool:
        """Wait for a result, at most so long, if it is that of the last call over a lane; whether it is there. It need not be when it is not: patience is
        over sooner, or another thread waits here already."""
        connection = self._last
        if connection is None or connection.last_slot != ref.slot or connection.taker:
            return False
        store, stream = self._session.store, connection.stream
        until = time.monotonic() + min(seconds, PATIENCE_S)
        with self._lock:
            if connection.taker or stream.ended or not connection.lane.open:
                return False
            connection.taker = True
        try:
            with self._lock:
                self._arm(connection)
                descriptor = stream.fileno()
            while not store.done(ref):
                left = until - time.monotonic()
                if left <= 0:
                    return False
                try:
                    readable = store.wait_fd(descriptor, left)
                except OSError:  # another thread has given up the lane just now: its calls are with the brokers
                    return False
                if readable:
                    with self._lock:
                        if connection.lane not in self._connections or stream.ended:
                            return False
                        self._take_in(connection, time.monotonic())
            return True
        finally:
            with self._lock:
                connection.taker = False
                if self._epoll is not None:
                    self._arm(connection)

    def stop(self) -> None:
        """End the thread, and the streams."""
        self._stopping = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
        with self._lock:
            for connection in self._connections.values():
                connection.stream.close()
            self._connections.clear()
            self._by_descriptor.clear()
            if self._epoll is not None:
                self._epoll.close()
                os.close(self._woken)
                self._epoll = None

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        quiet = 0
        while True:
            ready = epoll.poll(PATIENCE_S if not self._asleep else -1)
            with self._lock:
                if self._stopping:
                    return
                now = time.monotonic()
                busy = False
                for descriptor, events in ready:
                    if descriptor == self._woken:
                        os.eventfd_read(self._woken)
                        continue
                    connection = self._by_descriptor.get(descriptor)
                    if connection is None:
                        continue
                    if events & select.EPOLLOUT:
                        connection.stream.flush()
                        self._arm(connection)
                    if events & ~select.EPOLLOUT and not connection.taker:
                        self._take_in(connection, now)
                for connection in list(self._connections.values()):
                    busy = self._look_after(connection, now) or busy
                quiet = 0 if busy or ready else quiet + 1
                if quiet:
                    self._report()
                self._asleep = quiet * PATIENCE_S * 1000 > _QUIET_MS

    def _look_after(self, connection: _Connection, now: float) -> bool:
        """See to calls without an answer, and to a stream that could not be made; whether to look again soon."""
        lane, stream = connection.lane, connection.stream
        self._hand_over(connection, lane.overdue(now))
        dialling = not lane.open and stream.may_dial_again() and not lane.broken(now)
        if dialling:
            self._disarm(connection)  # while it has its descriptor: the next one may have the number of an earlier one
            if stream.dial_again(now):
                self._arm(connection)
        elif not connection.armed and not connection.taker and not stream.ended:
            self._arm(connection)  # whoever took in what came was interrupted
        return dialling or lane.waits()

    def _take_in(self, connection: _Connection, now: float) -> None:
        lane, stream = connection.lane, connection.stream
        for frame in stream.receive():
            try:
                message = wire.decode(frame)
            except wire.FrameError:
                continue
            if isinstance(message, wire.LaneDone):
                lane.open = True
                columns = zip(message.numbers, message.kinds, message.values, message.micros, strict=True)
                for number, kind, value, micros in columns:
                    call = lane.answered(number, now)
                    if call is None:
                        continue
                    self._seal(call.task, serialization.Packed(kind, value, [], []))
                    if isinstance(connection.route, FarWorker):
                        connection.route.misfits = 0
                        self._note(call.task, kind, micros)
            elif isinstance(message, wire.LaneKept) and message.taken:
                call = lane.kept(message.number, now)
                if call is not None:
                    self._hand_over(connection, [call])
                if isinstance(connection.route, FarWorker):
                    connection.route.misfits += 1
            elif isinstance(message, wire.LaneKept):
                call = lane.kept(message.number, now)
                if call is not None:
                    connection.route.refused(call, lane)
        if stream.ended:
            self._disarm(connection)
            if lane.open:
                lane.cut = True
                self._hand_over(connection, lane.all_unanswered())

    def _note(self, task: bytes, kind: int, micros: int) -> None:
        """Remember the end of a task for the records: the brokers know nothing of it."""
        self._ids += task
        self._statuses.append(wire.DONE_ERROR if kind & KIND_ERROR_FLAG else wire.DONE_OK)
        self._micros.append(micros)
        if len(self._micros) >= _REPORT_ENDS:
            self._report()

    def _report(self) -> None:
        """Let the records have what was noted."""
        if self._micros:
            message = wire.LaneTasksDone(self._session.job, bytes(self._ids), bytes(self._statuses), self._micros)
            self._ids, self._statuses, self._micros = bytearray(), bytearray(), []
            self._session.tell(message)

    def _seal(self, task: bytes, packed: serialization.Packed) -> None:
        """Make a result, unless it has come through the brokers."""
        session = self._session
        slot = session.store.claim(task, 1, 0)
        if slot is None:
            return
        try:
            code = session.objects.seal_result(slot, 0, packed)
        except (errors.ObjectStoreFullError, errors.OutOfDiskError, errors.ZraySystemError, OSError):
            ref = session.store.reference(return_id(task, 0))
            if ref is not None:
                session.store.seal_forced(ref, failures.NO_ROOM_DATA, KIND_ERROR_FLAG, FLAG_SYSTEM_ERROR)
            return
        if code == TELL_BROKER:
            session.tell(wire.Sealed(return_id(task, 0)))
