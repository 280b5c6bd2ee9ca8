"""What one driver, worker or actor owns: its place in the store, its sockets, its counters; and what they do together.

Covers identity and ids of what this process makes, requests to the broker, put / get / wait. Does not cover packing and routing of calls
(`zray.submission`), actor addresses (`zray.actor_link`), running tasks (`zray.worker`), or starting a node (`zray.node`).
A Session is passed in, not looked up; only `zray.api` holds a current one for convenience.
"""

from __future__ import annotations

import contextvars
import hashlib
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from zray import _store, errors, failures, ids, placing, serialization, wire
from zray.object_store import NOT_HERE, Failed, ObjectRef, ObjectStore, Store
from zray.transport import Context, Outbox, ipc_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KIND_REPLY: Final = 0x10
"""Kind of reply objects: msgpack, as `zray.wire` defines it."""
HOLDS_REFERENCES: Final = b"\1\0\0\0"
"""Last bytes of the ids of exported code that contains references."""
_BLOCK_NOTICE_S: Final = 0.0005
"""A worker that waits longer than this tells the broker, which lends its CPU."""
_LEND_EVERY_S: Final = 0.1
"""... and one that has not lent its CPU for this long tells it at its next wait at once."""
_EARLY_ERROR_S: Final = 0.1
"""While waiting for all of many results, look this often whether one has failed already."""


class SessionConfig(msgspec.Struct, frozen=True):
    """Where a session is and what this process is in it."""

    directory: str
    """Runtime directory of the session: sockets, logs, spilled objects."""
    spill_directory: str
    node: bytes
    job: int
    """Small number of the job; 0 before the broker has given one."""
    job_id: bytes
    namespace: str
    log_to_driver: bool = True


class TaskContext:
    """The task (or driver program) that the current thread runs: parent of what it submits and puts."""

    __slots__ = ("actor", "attempt", "children", "name", "origin", "puts", "resources", "strategy", "task")

    def __init__(
        self,
        task: bytes,
        name: str = "",
        attempt: int = 0,
        actor: bytes = b"",
        resources: bytes = b"",
        strategy: bytes = b"",
    ) -> None:
        self.task = task
        self.name = name
        self.attempt = attempt
        self.actor = actor
        self.resources = resources
        self.strategy = strategy
        """By which it came to this node (`zray.placing`)."""
        self.origin = ids.origin_of(task, attempt)
        """What the ids of its tasks, actors and puts are derived from. Each run has its own."""
        self.children = itertools.count(1)
        self.puts = itertools.count(1)

    def apart(self) -> TaskContext:
        """The same task with ids of its own: for a process that it forked, and for a run that repeats another one under its number."""
        context = TaskContext(self.task, self.name, self.attempt, self.actor, self.resources, self.strategy)
        context.origin = ids.random_id()
        return context

    def next_child_id(self) -> bytes:
        """Return the id of the next task or actor that it makes."""
        return _store.derive_id(self.origin, next(self.children))

    def next_put_id(self) -> bytes:
        """Return the id of the next value that it puts."""
        n = next(self.puts)
        if n < ids.MAX_PUTS:
            return _store.with_index(self.origin, ids.PUT_BIT | n)
        further = _store.derive_id(self.origin, ids.FURTHER_PUTS | n // ids.MAX_PUTS)
        return _store.with_index(further, ids.PUT_BIT | n % ids.MAX_PUTS)


RUNNING: Final[contextvars.ContextVar[TaskContext | None]] = contextvars.ContextVar("zray_task", default=None)
"""The task that the current thread or coroutine runs, in a worker or actor."""


class Session:
    """One process's part in a zray session. Public calls are thread-safe."""

    def __init__(self, config: SessionConfig, store: Store, worker: int = 0) -> None:
        self.config = config
        self.store = store
        self.objects = ObjectStore(store, config.spill_directory)
        self.worker = worker
        """Number of the worker this is; 0 in a driver."""
        self.pid = os.getpid()
        self.context = Context()
        self.broker: Outbox = self.context.outbox(ipc_endpoint(config.directory, "b"))
        self.lock = threading.RLock()
        """Guards the sockets and all that is packed for them."""
        self.root = TaskContext(ids.random_id() if worker else config.job_id)
        """What threads count to that no task runs in: the program of a driver, the process of a worker, an actor's constructor."""
        self._replies = TaskContext(ids.random_id())
        self.peers: dict[int, Outbox] = {}
        self.job = config.job
        self.closed = False
        self.capturing = False
        """Some task or actor of this process had its calls captured by its placement group."""
        self.before_wait: list[Callable[[], None]] = []
        """Called before this process waits: everything packed leaves."""
        self.take_in_until: Callable[[ObjectRef, float], bool] | None = None
        """Waits for a result that comes straight from another node, at most so many seconds; whether it is there (`zray.lanes`)."""
        self.after_get: Callable[[], None] | None = None
        """Called when results were read and workers have written output since the last time (drivers: print it)."""
        self.on_block: Callable[[], None] | None = None
        """Called before the calling thread of a worker waits longer than an instant: its CPU is lent."""
        self.on_unblock: Callable[[], None] | None = None
        """Called when it goes on; also when `on_block` was interrupted half-way or not called at all."""
        self.lent_at = time.monotonic()
        """When this worker last told the broker that it waits."""
        self.in_cluster = store.global_word(wire.GLOBAL_CLUSTER) != 0
        """Whether values may be on other nodes, so that who waits for them must say so."""
        self._log_events = 0
        self._functions: dict[bytes, ObjectRef] = {}

    # -- identity -----------------------------------------------------------------------------------------------------

    def current(self) -> TaskContext:
        """The task the calling thread or coroutine runs; threads that user code started count to the process's root task."""
        return RUNNING.get() or self.root

    def next_put_id(self) -> bytes:
        return self.current().next_put_id()

    def captured(self) -> bytes:
        """Return the strategy that calls without one of their own take over from who makes them; b"" for none."""
        strategy = placing.unpack(self.current().strategy)
        if not strategy.capture:
            return b""
        return placing.pack(placing.Strategy(placing.GROUP, group=strategy.group, capture=True))

    # -- messages -----------------------------------------------------------------------------------------------------

    def tell(self, message: wire.Message) -> None:
        """Send a message to the broker, after everything packed before it."""
        with self.lock:
            self.flush()
            self.broker.send(wire.encode(message))

    def flush(self) -> None:
        """Let everything leave that was packed."""
        for call in self.before_wait:
            call()

    def peer(self, worker: int) -> Outbox:
        """The outbox to a worker's or actor's inbox (callers hold the lock)."""
        outbox = self.peers.get(worker)
        if outbox is None:
            outbox = self.peers[worker] = self.context.outbox(ipc_endpoint(self.config.directory, f"w{worker}"))
        return outbox

    def drop_peer(self, worker: int) -> None:
        """Close the connection to a worker that is gone."""
        with self.lock:
            outbox = self.peers.pop(worker, None)
            if outbox is not None:
                outbox.close()

    def tell_last(self, message: wire.Message) -> None:
        """Send the message that says why this process ends; the broker waits for it when it learns of the exit first."""
        self.store.set_word(self.store.process, wire.WORD_LAST_WORDS, 1)
        self.tell(message)

    def expect_reply(self) -> ObjectRef:
        """Make the pending object that a request names as its reply."""
        return self.store.expect(self._replies.next_put_id(), 0, None, None, "")

    def request(self, make: Callable[[bytes], wire.Message], timeout: float = 60.0) -> bytes:
        """Send a message that names a reply, wait for it, return its bytes; raise the error it carries. timeout in seconds."""
        reply = self.expect_reply()
        try:
            self.tell(make(reply.binary()))
        except BaseException:  # interrupted, perhaps before it was sent: nobody may ever answer
            self.store.seal_forced(reply, b"", _store.KIND_ERROR_FLAG, 0)
            raise
        return self.reply_of(reply, timeout)

    def reply_of(self, reply: ObjectRef, timeout: float = 60.0) -> bytes:
        """Wait for a reply object and return its bytes; raise the error it carries."""
        self.store.wait([reply], 1, timeout)
        found = self.store.read(reply)
        if found is NOT_HERE:
            raise errors.GetTimeoutError(f"the broker gave no answer within {timeout:g} s")
        kind, _, data = found
        if kind & _store.KIND_ERROR_FLAG:
            raise failures.rebuild(failures.load(bytes(data)))
        return bytes(data)

    # -- objects ------------------------------------------------------------------------------------------------------

    def put(self, value: Any) -> ObjectRef:
        """Store a value and return a reference to it."""
        self.check_open()
        return self.objects.put(self.next_put_id(), serialization.dumps(value))

    def export(self, packed: serialization.Packed) -> tuple[bytes, ObjectRef | None]:
        """Store the packed code of a function or class; return its id, which follows from the content, and its reference
        when it is the caller's to keep.

        Code lasts as long as the session, except code that holds references itself: the objects it names should go when
        its function goes. Ids of such code end in HOLDS_REFERENCES; the function and each of its pending calls hold it.
        """
        digest = hashlib.blake2b(packed.stream, digest_size=12).digest()
        if packed.refs:
            object_id = digest + HOLDS_REFERENCES
            return object_id, self.objects.put_shared(object_id, packed)
        object_id = digest + b"\0\0\0\0"
        if object_id not in self._functions:
            self._functions[object_id] = self.objects.put_shared(object_id, packed)
        return object_id, None

    def get(self, refs: list[ObjectRef], timeout: float | None) -> list[Any]:
        """Return the values of references, waiting at most `timeout` seconds (None: for ever).

        Raises the error of the first that failed, GetTimeoutError, ZraySystemError when the node is gone.
        """
        self.check_open()
        store = self.store
        pending = store.last_pending(refs, len(refs))
        if pending >= 0:
            self._wait_all(refs, pending, timeout)
        values = store.values(refs)
        for index, value in enumerate(values):
            if value is NOT_HERE:
                values[index] = value = self._value_again(refs[index], timeout)
            if type(value) is Failed:
                self._after_reading()
                raise failures.rebuild(value.record, site=refs[index].site)
        if store.global_word(wire.GLOBAL_LOG_EVENTS) != self._log_events:
            self._after_reading()
        return values

    def _value_again(self, ref: ObjectRef, timeout: float | None) -> Any:
        """Read a value that was not in memory: spilled, or reopened by a retry between waiting and reading."""
        while True:
            value = self.objects.value(ref)
            if value is not NOT_HERE:
                return value
            self._wait_all([ref], 0, timeout)

    def get_writable(self, ref: ObjectRef, timeout: float | None) -> Any:
        """As `get` of one reference, with arrays in private copy-on-write memory."""
        self.check_open()
        if not self.store.done(ref):
            self._wait_all([ref], 0, timeout)
        value = self.objects.writable_value(ref)
        if type(value) is Failed:
            raise failures.rebuild(value.record, site=ref.site)
        return value

    def _after_reading(self) -> None:
        if self.after_get is not None:
            self._log_events = self.store.global_word(wire.GLOBAL_LOG_EVENTS)
            self.after_get()

    def want(self, refs: list[ObjectRef]) -> None:
        """Before waiting for values: have those that are, or will be, on other nodes brought here."""
        if self.in_cluster:
            names = self.store.want(refs)
            if names:
                self.tell(wire.Wanted(b"".join(names)))

    def _wait_all(self, refs: list[ObjectRef], pending: int, timeout: float | None) -> None:
        """Wait until all references up to index `pending` are done, or one of them failed.

        Waits for one at a time, the last first: results mostly come in order, so this sleeps and wakes once rather than once per result.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.flush()
        self.want(refs)
        store = self.store
        blocked = False
        try:
            while pending >= 0:
                ref = refs[pending]
                first = self._patience() if self.on_block is not None and not blocked else _EARLY_ERROR_S
                piece = first if deadline is None else min(first, deadline - time.monotonic())
                if piece > 0 and self.take_in_until is not None and self.take_in_until(ref, piece):
                    pending = store.last_pending(refs, pending)
                    continue
                if piece > 0 and store.wait([ref], 1, piece) == 1:
                    pending = store.last_pending(refs, pending)
                    continue
                if store.done(ref):
                    pending = store.last_pending(refs, pending)
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    raise errors.GetTimeoutError(self._timeout_text(refs, timeout))
                if self.on_block is not None and not blocked:
                    blocked = True
                    self.on_block()
                elif self._any_failed(refs, pending):
                    return
        finally:
            if blocked and self.on_unblock is not None:
                self.on_unblock()

    def _patience(self) -> float:
        """How long (seconds) a worker waits before it tells the broker. One that has waited often but always briefly lends its CPU now and then, so
        that endless tasks that wait for one another's results all get their turn."""
        return _BLOCK_NOTICE_S if time.monotonic() - self.lent_at < _LEND_EVERY_S else 0.0

    def _any_failed(self, refs: list[ObjectRef], end: int) -> bool:
        store = self.store
        return any(
            store.done(refs[index]) and store.describe(refs[index])[2] & _store.KIND_ERROR_FLAG for index in range(end)
        )

    def _timeout_text(self, refs: Sequence[ObjectRef], timeout: float | None) -> str:
        missing = [ref for ref in refs if not self.store.done(ref)]
        first = (
            f" First: {missing[0]!r}" + (f", submitted at {missing[0].site}" if missing[0].site else "")
            if missing
            else ""
        )
        return f"{len(missing)} of {len(refs)} results were not ready after {timeout:g} s.{first}"

    def wait(
        self, refs: list[ObjectRef], want: int, timeout: float | None, fetch: bool = True
    ) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Return (ready, not ready): waits until `want` are done or `timeout` seconds (None: for ever) passed; at most `want` are ready. Without `fetch`,
        values on other nodes are ready where they are."""
        self.check_open()
        store = self.store
        anywhere = not fetch
        ready, rest = store.split(refs, want, anywhere)
        if len(ready) >= want or timeout == 0:
            if rest:
                self.flush()
                if fetch:
                    self.want(rest)
            return ready, rest
        self.flush()
        if fetch:
            self.want(refs)
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.on_block is not None:
            patience = self._patience()
            first = patience if timeout is None else min(timeout, patience)
            if store.wait(refs, want, first, False, anywhere) >= want:
                return store.split(refs, want, anywhere)
        try:
            if self.on_block is not None:
                self.on_block()
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            store.wait(refs, want, left, False, anywhere)
        finally:
            if self.on_unblock is not None:
                self.on_unblock()
        return store.split(refs, want, anywhere)

    # -- end ----------------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise ZrayUsageError when the session has ended."""
        if self.closed:
            raise errors.ZrayUsageError("the zray session was shut down: call zray.init() first")

    def close(self) -> None:
        """Give back everything this process holds and close its sockets. References that live on become useless but harmless."""
        if self.closed:
            return
        self.closed = True
        self._functions.clear()
        with self.lock:
            self.context.close()
            self.peers.clear()
        # Functions and handles that outlive the session know it: the segment must not live on for their sake.
        self.before_wait.clear()
        self.after_get = self.take_in_until = None
        store = self.store
        self.store = self.objects.store = _EndedStore()  # type: ignore[assignment]
        store.close()
        if not self.worker:
            os.close(store.fd)


class _EndedStore:
    """Stands for the store of a session that has ended: any use says so."""

    closed = True

    def __getattr__(self, name: str) -> NoReturn:
        raise errors.ZrayUsageError("the zray session was shut down: call zray.init() first")


def reply_value(data: bytes, kind: Any) -> Any:
    """Decode a reply's bytes as `kind` (a msgspec type)."""
    return msgspec.msgpack.decode(data, type=kind)


def new_job_id() -> bytes:
    return ids.random_id()
