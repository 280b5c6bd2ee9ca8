"""The way out of a process: packing calls into frames, and choosing their route (broker, leased worker, actor).

Covers when a packed call leaves, leases of workers for synchronous calls, and the connection to each actor (`ActorLink`). Does not cover
what a call is (`zray.remote_function`, `zray.actor`) or what the broker does with it.

**When a call leaves.** A lone call leaves at once. While the receiver is still busy with what it was sent before, further calls are packed and leave together:
when the receiver has caught up (seen at the next call), when a frame is full, when this process waits for anything, or when the flusher thread
finds them half a millisecond later. The flusher sleeps unless something is packed.

**Routes of a task.** A process that submits one call, waits for it, and submits the next asks the broker for a worker of its own; as long
as it has that lease and its previous call there is done, it sends the next straight to that worker. All else goes through the broker.

**Routes of an actor call.** Straight to the actor's inbox, numbered per caller and incarnation; through the broker while the actor is not (or no longer)
alive, and for the first call to an incarnation that replaced another. To an actor on another node through the brokers, or, when calls come one after
another, over a lane (`zray.lanes`).

**Interrupts.** A signal handler (Ctrl-C, an alarm) may raise between any two steps. A call that was interrupted before it has a number is
taken back (`Submitter.take_back`); one that has a number is sent, perhaps twice. Everywhere else the order of steps is such that what was
interrupted is done again: whoever receives a frame twice drops the second, because calls are numbered and results are claimed once.

**Calls within calls.** Python may run a finalizer or a signal handler while something is being sent, and that may call, too: in the same thread, to
which the lock is open. What is packed is therefore taken out only after it was sent, only so much as was sent, and only if nobody has sent it meanwhile
(then the list is another one). Nothing is called between taking hold of such a list and appending to it: it might be another one by then.
"""

from __future__ import annotations

import collections
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import _store, errors, failures, serialization, wire
from zray.lanes import FarActor, FarWorker, Lane, LaneReader, Sent
from zray.object_store import NOT_HERE, ObjectRef, StoreFull
from zray.session import reply_value
from zray.task import ARGS_IN_OBJECT, NO_DEPS, CallShape, LaneTag, TaskSpec

if TYPE_CHECKING:
    from zray.session import Session, TaskContext
    from zray.transport import Outbox

_FRAME_TASKS: Final = 128
"""Calls per frame at most."""
_FRAMES_AHEAD: Final = 256
"""Frames a driver may be ahead of the broker before `.remote()` waits."""
_NAPS_BLIND: Final = 1000
"""Milliseconds of such waiting after which it is looked whether there is a broker still."""
_ARGS_INLINE: Final = 16 << 10
"""Packed arguments larger than this travel as an object."""
_CALM_CALLS: Final = 2
_CALM_AGAIN: Final = -200
"""Where the count of such calls begins when there was no worker to be had, or it was of no use."""
"""Consecutive calls whose predecessor had finished, after which a lease is asked for."""
_FLUSH_DELAY_S: Final = 0.0005
_BURST_S: Final = 0.0002
"""Calls through the broker that come closer behind one another than this share frames."""
_LINKS_UNSWEPT: Final = 16
"""New connections to actors after which those to dead ones are looked for."""

_encode = msgspec.msgpack.Encoder().encode


class PackedCall:
    """Arguments of a call, ready to travel: at most one of `stream` and the last of `deps` carries the bytes."""

    __slots__ = ("borrowed", "dep_ids", "kind", "refs", "stream")

    def __init__(
        self,
        stream: bytes,
        kind: int,
        refs: list[ObjectRef] | None,
        dep_ids: tuple[bytes, ...],
        borrowed: tuple[bytes, ...],
    ):
        self.stream = stream
        self.kind = kind
        self.refs = refs
        """Everything the pending result must keep alive: dependencies, then borrowed references."""
        self.dep_ids = dep_ids
        self.borrowed = borrowed

    def holding(self, code: ObjectRef) -> PackedCall:
        """The same call, which keeps the code it runs, too."""
        borrowed = (*self.borrowed, code.binary())
        return PackedCall(self.stream, self.kind, [*(self.refs or ()), code], self.dep_ids, borrowed)


_EMPTY_CALL: Final = PackedCall(b"", 0, None, NO_DEPS, NO_DEPS)


def pack_call(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> PackedCall:
    """Pack the arguments of a call to `name`; large ones become an object. Raises the serialization errors of `zray.serialization`."""
    if not args and not kwargs:
        return _EMPTY_CALL
    packed, top, nested = serialization.dumps_args(args, kwargs, name)
    if isinstance(packed, bytes) and len(packed) > _ARGS_INLINE:
        packed = serialization.Packed(serialization.KIND_PICKLE, packed, [], nested)
    if isinstance(packed, bytes):
        if not top and not nested:
            return PackedCall(packed, serialization.KIND_PICKLE, None, NO_DEPS, NO_DEPS)
        refs = [*top, *nested]
        return PackedCall(
            packed,
            serialization.KIND_PICKLE,
            refs,
            tuple([r.binary() for r in top]),
            tuple([r.binary() for r in nested]),
        )
    if packed.size <= _ARGS_INLINE:
        stream, kind = packed.to_bytes(), packed.kind
    else:
        stream, kind = b"", packed.kind | ARGS_IN_OBJECT
        top = [*top, session.objects.put(session.next_put_id(), packed)]
    return PackedCall(
        stream, kind, [*top, *nested], tuple([r.binary() for r in top]), tuple([r.binary() for r in nested])
    )


def _taken_back(task: bytes, shape: CallShape) -> bytes:
    error = errors.TaskCancelledError(task_id=task.hex(), function_name=shape.name)
    return failures.dump(failures.from_error(error))


class _ShapeUse:
    """What this process knows of one shape: its lease and how calmly it is called."""

    __slots__ = ("calm", "defined", "far", "last_slot", "lease", "reply", "shape")

    def __init__(self, shape: CallShape) -> None:
        self.shape = shape
        self.defined = False
        self.lease: wire.Lease | None = None
        self.far: FarWorker | None = None
        """What another node has lent, where no worker of this one can run it."""
        self.reply: ObjectRef | None = None
        self.last_slot = 0
        self.calm = 0


class Submitter:
    """Sends this process's calls. All methods are thread-safe."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lock = session.lock
        self._links: weakref.WeakValueDictionary[bytes, ActorLink] = weakref.WeakValueDictionary()
        """All there are: an actor's calls are numbered, so it has one link at a time."""
        self._links_in_use: dict[bytes, ActorLink] = {}
        """Those that must outlive the handles here: their actor lives, or may yet, and knows the numbers of this process."""
        self._links_swept_at = _LINKS_UNSWEPT
        self.lane_reader = LaneReader(self)
        self._uses: dict[bytes, _ShapeUse] = {}
        self._tasks: list[TaskSpec] = []
        self._parent = b""
        self._frames_sent = 0
        self._dirty: dict[bytes, ActorLink] = {}
        self._known: dict[int, set[bytes]] = {}
        self._asleep = threading.Lock()
        """Held while the flusher has nothing to do. A bare lock: interrupted in the middle of Event.set, an Event can never be set again."""
        self._asleep.acquire()
        self._flusher: threading.Thread | None = None
        self._stopping = False
        session.before_wait.append(self.flush)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        shape: CallShape,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: str,
        code: ObjectRef | None = None,
    ) -> list[ObjectRef]:
        """Submit a task; return the references of its results (one at least, even for num_returns=0). `code` is given
        when the call must keep it."""
        session = self.session
        call = pack_call(session, args, kwargs, shape.name)
        if code is not None:
            call = call.holding(code)
        context = session.current()
        task = context.next_child_id()
        spec = TaskSpec(task, shape.key, call.stream, call.kind, call.dep_ids, call.borrowed)
        with self.lock:
            try:
                use = self._uses.get(shape.key)
                if use is None:
                    use = self._uses[shape.key] = _ShapeUse(shape)
                lease = None if use.far is not None else self._usable_lease(use, call)
                if use.far is not None:
                    refs = self._submit_far(use, use.far, spec, call, site, context)
                    if refs is not None:
                        return refs
                elif lease is not None:
                    refs = self._submit_direct(use, lease, spec, call, site)
                    if refs is not None:
                        return refs
                refs = [self.expect(_store.with_index(task, 1), 0, call.refs, None, site)]
                for index in range(1, shape.num_returns):
                    refs.append(self.expect(_store.with_index(task, index + 1), 0, None, None, site))
                use.last_slot = refs[0].slot
                self._pack_task(use, spec, context)
            except BaseException:
                self.take_back(task, shape)
                raise
        return refs

    def take_back(self, task: bytes, shape: CallShape) -> None:
        """End a call (or the creation of an actor) whose submission failed or was interrupted: nobody has its references. Wherever
        its spec got to, it can no longer be claimed."""
        store = self.session.store
        for index in range(max(1, shape.num_returns)):
            ref = store.reference(_store.with_index(task, index + 1))
            if ref is not None and not store.done(ref):
                store.seal_forced(ref, _taken_back(task, shape), _store.KIND_ERROR_FLAG, 0)
        self._wake_flusher()  # for those packed before it

    def expect(
        self, object_id: bytes, target: int, deps: list[ObjectRef] | None, spec: bytes | None, site: str
    ) -> ObjectRef:
        """Make a pending result, spilling others when the store has no room for the kept spec."""
        store = self.session.store
        try:
            return store.expect(object_id, target, deps, spec, site)
        except StoreFull as full:
            while self.session.objects.make_room(full.size):
                try:
                    return store.expect(object_id, target, deps, spec, site)
                except StoreFull:
                    continue
        raise errors.ObjectStoreFullError(
            "the object store is full: everything in it is being read or belongs to queued calls"
        )

    def _pack_task(self, use: _ShapeUse, spec: TaskSpec, context: TaskContext) -> None:
        if not use.defined:
            self._send_tasks()
            self.session.broker.send(wire.encode(wire.DefineShapes([use.shape])))
            # Afterwards, here and wherever shapes are defined: an interrupt in between has it sent twice.
            use.defined = True
        if context.task != self._parent:
            self._send_tasks()
            self._parent = context.task
        self._tasks.append(spec)
        packed = len(self._tasks)
        if packed >= _FRAME_TASKS or self.session.store.own_word(wire.WORD_CONSUMED) >= self._frames_sent:
            self._send_tasks()
        elif packed == 1:
            self._wake_flusher()

    def _send_tasks(self) -> None:
        packed = self._tasks
        if not packed:
            return
        session, count = self.session, len(packed)
        message = wire.SubmitTasks(session.store.process, session.job, self._parent, packed)
        session.broker.send(wire.encode(message))
        if self._tasks is packed:
            self._tasks = packed[count:]
        self._frames_sent += 1
        if session.worker == 0 and self._frames_sent & 63 == 0:
            self._hold_back()

    def _hold_back(self) -> None:
        """A driver far ahead of the broker waits for it. Workers never do: what they wait for may need them. Raises ZraySystemError when it is gone."""
        store, naps = self.session.store, 0
        while self._frames_sent - store.own_word(wire.WORD_CONSUMED) > _FRAMES_AHEAD and not self.session.closed:
            time.sleep(0.001)
            naps += 1
            if naps % _NAPS_BLIND == 0:
                store.wait_ring(0.1)  # raises when the broker is gone

    # -- leases -------------------------------------------------------------------------------------------------------

    def _usable_lease(self, use: _ShapeUse, call: PackedCall) -> wire.Lease | None:
        """The leased worker for this shape when the call can go there now; asks for a lease when calls come one after another."""
        store = self.session.store
        lease = use.lease
        if lease is None:
            if use.reply is not None:
                lease = self._take_lease(use)
            elif use.last_slot and not store.slot_pending(use.last_slot):
                use.calm += 1
                if use.calm >= _CALM_CALLS and use.defined:
                    self._request_lease(use)
            else:
                use.calm = 0
            if lease is None:
                return None
        if store.word(lease.process, wire.WORD_LEASE) != lease.epoch:
            use.lease = None
            use.calm = 0
            return None
        if store.expected(lease.process) or (
            call.refs and not all(store.done(ref) for ref in call.refs[: len(call.dep_ids)])
        ):
            return None
        return lease

    def _request_lease(self, use: _ShapeUse) -> None:
        session = self.session
        reply = session.expect_reply()
        message = wire.LeaseRequest(session.store.process, session.job, use.shape.key, reply.binary())
        session.broker.send(wire.encode(message))
        use.reply = reply

    def _take_lease(self, use: _ShapeUse) -> wire.Lease | None:
        store = self.session.store
        assert use.reply is not None
        if not store.done(use.reply):
            return None
        found = store.read(use.reply)
        use.reply = None
        use.calm = 0
        if found is NOT_HERE or found[0] & _store.KIND_ERROR_FLAG or not len(found[2]):
            use.calm = _CALM_AGAIN
            return None
        lease = reply_value(bytes(found[2]), wire.Lease)
        if lease.far is not None:
            use.far = FarWorker(self, lease.far)
        else:
            use.lease = lease
        return use.lease

    def _submit_far(
        self, use: _ShapeUse, far: FarWorker, spec: TaskSpec, call: PackedCall, site: str, context: TaskContext
    ) -> list[ObjectRef] | None:
        """Send a task straight to a worker that another node has lent; None when it must take the ordinary way."""
        if far.is_over():
            far.give_up()
            use.far = None
            use.calm = 0 if far.was_of_use() else _CALM_AGAIN
        elif call.refs is None and far.may_send() and self.lane_reader.fits(use.shape, call.stream):
            if use.last_slot and self.session.store.slot_pending(use.last_slot):
                return None  # the one before runs still: this one shall run beside it
            refs = [self.expect(_store.with_index(spec.id, 1), 0, None, None, site)]
            lane = far.lane
            while True:  # as for calls of actors: until nothing has come between
                last = lane.last
                spec.sequence = last + 1
                sent = Sent(last + 1, use.shape, _encode(spec), refs[0], time.monotonic(), context.task)
                if lane.last == last:
                    break
            lane.last = last + 1
            use.last_slot = refs[0].slot
            self.lane_reader.send(sent, lane)
            return refs
        return None

    def _submit_direct(
        self, use: _ShapeUse, lease: wire.Lease, spec: TaskSpec, call: PackedCall, site: str
    ) -> list[ObjectRef] | None:
        session = self.session
        body = _encode(spec)
        shape = use.shape
        try:
            refs = [self.expect(_store.with_index(spec.id, 1), lease.process, call.refs, body, site)]
            for index in range(1, shape.num_returns):
                refs.append(self.expect(_store.with_index(spec.id, index + 1), 0, None, None, site))
        except _store.TargetGone:
            use.lease = None
            self.disconnect(lease.worker)
            return None
        outbox = session.peer(lease.worker)
        self._define_at(lease.worker, outbox, shape)
        outbox.send(wire.encode(wire.RunDirect(session.store.process, lease.epoch, [spec])))
        return refs

    def disconnect(self, worker: int) -> None:
        """Close the connection to a worker, and forget what it was told over it (callers hold the lock)."""
        self.session.drop_peer(worker)
        self._known.pop(worker, None)

    def _define_at(self, worker: int, outbox: Outbox, shape: CallShape) -> None:
        known = self._known.get(worker)
        if known is None:
            known = self._known[worker] = set()
        if shape.key not in known:
            outbox.send(wire.encode(wire.DefineShapes([shape])))
            known.add(shape.key)

    # -- actors -------------------------------------------------------------------------------------------------------

    def link(self, actor: bytes) -> ActorLink:
        """The connection to an actor; made when first asked for."""
        with self.lock:
            link = self._links.get(actor)
            if link is None:
                link = self._links[actor] = ActorLink(self, actor)
                self.use_link(link)
            return link

    def use_link(self, link: ActorLink) -> None:
        """Keep a link; now and then let go of those whose actor is gone, with their connections."""
        self._links_in_use[link.actor] = link
        if len(self._links_in_use) >= self._links_swept_at:
            in_use: dict[bytes, ActorLink] = {}
            for actor, one in [*self._links_in_use.items()]:
                if not one.is_over():
                    in_use[actor] = one
                else:
                    one.close()
            self._links_in_use = in_use
            self._links_swept_at = 2 * len(in_use) + _LINKS_UNSWEPT

    def define_at_broker(self, shape: CallShape) -> None:
        """Make sure the broker knows a shape (callers hold the lock)."""
        use = self._uses.get(shape.key)
        if use is None:
            use = self._uses[shape.key] = _ShapeUse(shape)
        if not use.defined:
            self.session.broker.send(wire.encode(wire.DefineShapes([shape])))
            use.defined = True

    def packed_at(self, link: ActorLink) -> None:
        """A link has packed calls that nobody will send otherwise."""
        self._dirty[link.actor] = link
        self._wake_flusher()

    def hand_over_lanes(self) -> None:
        """Have the brokers know of all calls: they are about to be asked for something."""
        with self.lock:
            self.lane_reader.hand_over_all()

    def through_brokers(self, actor: bytes, calls: list[Sent], lane: LaneTag) -> None:
        """Send calls of a lane through the brokers (callers hold the lock)."""
        self.flush()
        for call in calls:
            self.define_at_broker(call.shape)
        session = self.session
        bodies = [msgspec.Raw(call.body) for call in calls]
        message = wire.SubmitActorCalls(session.store.process, session.job, actor, 0, bodies, lane)  # type: ignore[arg-type]
        session.broker.send(wire.encode(message))

    # -- flushing -----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Let everything packed leave now."""
        if not self._tasks and not self._dirty:
            return
        with self.lock:
            self._send_tasks()
            for actor, link in [*self._dirty.items()]:
                link.send()
                if link.is_empty:
                    self._dirty.pop(actor, None)

    def start_flusher(self) -> None:
        """Start the thread that sends what nobody else sends. Drivers do so at once, where no interrupt can leave it half started; workers,
        most of which never submit anything, when they need it."""
        flusher = threading.Thread(target=self._flush_loop, name="zray-flush", daemon=True)
        flusher.start()
        self._flusher = flusher

    def _wake_flusher(self) -> None:
        if self._flusher is None:
            self.start_flusher()
        if self._asleep.locked():
            try:
                self._asleep.release()
            except RuntimeError:
                pass  # another thread was faster

    def _flush_loop(self) -> None:
        while True:
            self._asleep.acquire()
            if self._stopping:
                return
            time.sleep(_FLUSH_DELAY_S)
            try:
                self.flush()
            except Exception:
                if not self._stopping and not self.session.closed:
                    traceback.print_exc()  # what is packed stays so: who waits for it flushes, and is told

    def stop(self) -> None:
        """Send what is packed and end the flusher."""
        self.flush()
        self.lane_reader.stop()
        self._stopping = True
        if self._flusher is not None:
            self._wake_flusher()
            self._flusher.join()


class ActorLink:
    """This process's connection to one actor, through all its incarnations. Methods are called with the submitter's lock held."""

    __slots__ = (
        "__weakref__",
        "_calls",
        "_far",
        "_for_broker",
        "_for_broker_lane",
        "_sent_at",
        "_unfinished",
        "actor",
        "address",
        "incarnation",
        "killed",
        "known_dead",
        "process",
        "sequence",
        "session",
        "submitter",
        "worker",
    )

    def __init__(self, submitter: Submitter, actor: bytes) -> None:
        self.submitter = submitter
        self.session = submitter.session
        self.actor = actor
        self.incarnation = 0
        self.killed = -1
        """The incarnation that this process asked to be killed: calls to it go through the broker, behind that request."""
        self.address: ObjectRef | None = None
        self.worker = 0
        self.process = 0
        """Process handle of the living incarnation; 0 while it is not known to live."""
        self.sequence = 0
        self.known_dead: bytes | None = None
        """Packed failure that ends every further call."""
        self._calls: list[msgspec.Raw] = []
        self._for_broker: list[msgspec.Raw] = []
        """Packed calls that take the way through the broker, of one lane or of none."""
        self._for_broker_lane: LaneTag | None = None
        self._far = FarActor(submitter, actor)
        self._sent_at = 0.0
        """When calls last left for the broker."""
        self._unfinished: collections.deque[bytes] = collections.deque()
        """First results of calls that took the way through the broker, kept where their number is limited."""

    def call(
        self,
        shape: CallShape,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: str,
        life: ObjectRef,
        max_pending: int = -1,
    ) -> list[ObjectRef]:
        """Call a method; return the references of its results. The pending result holds the actor's `life`: an actor has
        no handles left only when it has no calls left, wherever they are on their way."""
        submitter, session = self.submitter, self.session
        call = pack_call(session, args, kwargs, shape.name)
        held = [life] if call.refs is None else [*call.refs, life]
        context = session.current()
        task = context.next_child_id()
        number = 0
        lane: Lane | None = None
        with submitter.lock:
            try:
                if not self.process and self.known_dead is None:
                    self._look_up()
                if not self.process and session.in_cluster and self.known_dead is None:
                    lane = self._far.ready()
                if max_pending > 0 and self.known_dead is None and self._pending() >= max_pending:
                    raise errors.PendingCallsLimitExceeded(
                        f"the actor has {max_pending} unfinished calls, as many as max_pending_calls allows; wait for some of them"
                    )
                while True:
                    last = self.sequence if lane is None else lane.last
                    spec = TaskSpec(task, shape.key, call.stream, call.kind, call.dep_ids, call.borrowed, 0, last + 1)
                    body = _encode(spec)
                    try:
                        refs = [submitter.expect(_store.with_index(task, 1), self.process, held, body, site)]
                    except _store.TargetGone:
                        self._died()
                        continue
                    break
                for index in range(1, shape.num_returns):
                    further = _store.with_index(task, index + 1)
                    try:
                        refs.append(submitter.expect(further, self.process, None, None, site))
                    except _store.TargetGone:  # who comes to the first finds the others
                        refs.append(submitter.expect(further, 0, None, None, site))
                # A finalizer or a signal handler may have called the same actor meanwhile: then this call comes after that one. Nothing can come
                # between the last look and the number.
                while last != (self.sequence if lane is None else lane.last):
                    last = self.sequence if lane is None else lane.last
                    spec.sequence = last + 1
                    body = _encode(spec)
                number = spec.sequence
                if lane is not None:
                    lane.last = number
                    self._route_far(lane, shape, call, body, refs[0])
                    return refs
                self.sequence = number
                if number == 1:  # from now on the actor knows the numbers of this process, or will
                    submitter._links_in_use[self.actor] = self
                if max_pending > 0 and not self.process:
                    self._unfinished.append(_store.with_index(task, 1))
                self._route(shape, spec, body, refs)
            except BaseException:
                if number:  # the actor runs no later call before it has this one
                    if lane is not None:
                        self._pack_for_broker(shape, body, lane.tag(True))
                    else:
                        self._route(shape, spec, body, refs)
                    submitter.packed_at(self)
                else:
                    submitter.take_back(task, shape)
                raise
        return refs

    def _route(self, shape: CallShape, spec: TaskSpec, body: bytes, refs: list[ObjectRef]) -> None:
        """Have a numbered call go its way. May be done twice."""
        session = self.session
        if self.known_dead is not None:
            for ref in refs:
                session.store.seal_forced(ref, self.known_dead, _store.KIND_ERROR_FLAG, 0)
        elif self.process and not (self.incarnation and spec.sequence == 1):
            self._pack(shape, body)
        else:
            # The first call to a later incarnation, too: earlier calls, meant for the one before, may still be with the broker.
            self._pack_for_broker(shape, body)
            self._far.called(refs[0].slot)

    def _route_far(self, lane: Lane, shape: CallShape, call: PackedCall, body: bytes, ref: ObjectRef) -> None:
        """Have a call go its way that is numbered in a lane."""
        reader = self.submitter.lane_reader
        self._far.called(ref.slot)
        if call.refs is None and lane.may_send() and reader.fits(shape, call.stream):
            if not reader.send(Sent(lane.last, shape, body, ref, time.monotonic()), lane):
                self.submitter.packed_at(self)
        else:
            self._pack_for_broker(shape, body, lane.tag(False))

    def _pack_for_broker(self, shape: CallShape, body: bytes, lane: LaneTag | None = None) -> None:
        """Have a call go through the broker: at once, or in one frame with others that come right behind."""
        self.submitter.define_at_broker(shape)
        if self._for_broker and lane != self._for_broker_lane:
            self._send_to_broker()
        self._for_broker_lane = lane
        raw = msgspec.Raw(body)
        self._for_broker.append(raw)
        packed = len(self._for_broker)
        if packed >= _FRAME_TASKS or time.monotonic() - self._sent_at > _BURST_S:
            self._send_to_broker()
        elif packed == 1:
            self.submitter.packed_at(self)

    def _send_to_broker(self) -> None:
        session, packed = self.session, self._for_broker
        count = len(packed)
        message = wire.SubmitActorCalls(
            session.store.process,
            session.job,
            self.actor,
            self.incarnation,
            packed,  # type: ignore[arg-type]
            self._for_broker_lane,
        )
        session.broker.send(wire.encode(message))
        if self._for_broker is packed:
            self._for_broker = packed[count:]
        self._sent_at = time.monotonic()

    def _pending(self) -> int:
        """Calls that have not ended: of all callers, when the actor lives on this node; else those of this process."""
        store, unfinished = self.session.store, self._unfinished
        if self.process:
            return store.expected(self.process)
        while unfinished and ((ref := store.reference(unfinished[0])) is None or store.done(ref)):
            unfinished.popleft()
        return len(unfinished)

    def _pack(self, shape: CallShape, body: bytes) -> None:
        session = self.session
        known = self.submitter._known.get(self.worker)
        if known is None or shape.key not in known:
            self.send()
            # The broker needs it as well: it hands the calls to the next incarnation when this one dies.
            self.submitter.define_at_broker(shape)
            self.submitter._define_at(self.worker, session.peer(self.worker), shape)
        raw = msgspec.Raw(body)
        self._calls.append(raw)
        packed = len(self._calls)
        if packed >= _FRAME_TASKS or session.store.expected(self.process) <= packed:
            self.send()
        elif packed == 1:
            self.submitter.packed_at(self)

    def send(self) -> None:
        """Let the packed calls leave."""
        if self._for_broker:
            self._send_to_broker()
        if self._far.lane is not None:
            self.submitter.lane_reader.flush(self._far.lane)
        packed = self._calls
        if packed:
            count = len(packed)
            message = wire.CallActor(self.session.store.process, self.incarnation, packed)  # type: ignore[arg-type]
            self.session.peer(self.worker).send(wire.encode(message))
            if self._calls is packed:
                self._calls = packed[count:]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is packed."""
        lane = self._far.lane
        return not (
            self._calls or self._for_broker or (lane is not None and self.submitter.lane_reader.has_packed(lane))
        )

    def _look_up(self) -> None:
        """See whether the current incarnation lives by now (or is known to be dead)."""
        store = self.session.store
        if self.killed == self.incarnation:
            if store.reference(_store.with_index(self.actor, self.incarnation + 2)) is not None:
                self._died()
            return
        if self.address is None:
            self.address = store.reference(_store.with_index(self.actor, self.incarnation + 1))
        if self.address is None or not store.done(self.address):
            return
        found = store.read(self.address)
        if found is NOT_HERE:
            return
        if found[0] & _store.KIND_ERROR_FLAG:
            if self.session.objects.store.reference(_store.with_index(self.actor, self.incarnation + 2)) is None:
                self.known_dead = bytes(found[2])
            else:
                self._died()
                self._look_up()
            return
        address = reply_value(bytes(found[2]), wire.ActorAddress)
        if store.alive(address.process):
            self.worker, self.process = address.worker, address.process
            self.submitter._links_in_use[self.actor] = self
        else:
            self._died()

    def _died(self) -> None:
        """The incarnation this link knows is gone: look for the next, numbering calls anew."""
        self._calls.clear()
        if self._for_broker:
            self._send_to_broker()
        self.close()
        # Signal handlers run when something is called, never between plain assignments: these count as one step.
        self.worker = self.process = 0
        self.incarnation += 1
        self.sequence = 0
        self.address = None
        self._look_up()

    def is_over(self) -> bool:
        """Whether nobody would miss this link but the handles that have it: nothing was numbered for a process that lives
        or may yet. That no handle is left on this node is no sign: it may live on another one's, and come back to this process."""
        if not self.process and self.known_dead is None:
            self._look_up()
        if self.process and not self.session.store.alive(self.process):
            self._died()
        if self.process or self._calls or self._for_broker:
            return False
        return self.sequence == 0 or self.known_dead is not None or self.session.store.reference(self.actor) is None

    def close(self) -> None:
        """Let go of the connection. The link itself goes on, and connects anew when it is used."""
        if self.worker:
            self.submitter.disconnect(self.worker)
        self._far.give_up()

    def kill(self, no_restart: bool) -> None:
        """Have the incarnation that this link knows killed; no later call of this process gets there before the request."""
        with self.submitter.lock:
            self.send()
            self._far.give_up()
            self.session.tell(wire.KillActor(self.actor, no_restart))
            self.killed = self.incarnation
            self.process = 0

    def dead_reason(self) -> BaseException | None:
        """The error that ended the actor for good, if it is known here."""
        return None if self.known_dead is None else failures.rebuild(failures.load(self.known_dead))
