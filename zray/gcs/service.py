"""The running control store: shards in the head's broker, requests in, notices out.

Covers the order of a write (plan, apply, store, publish, acknowledge), rounds, repeated requests, and the direct calls that the broker
in the same process makes. Does not cover what each request does (`requests`), publishing (`notices`), what becomes of task rows
(`task_history`), rules of rows and versions (`shard`), where rows are stored (`storage`) or sockets: the reply travels however
the caller sends it.

With durable storage the changes of one *round* (all calls between two calls of `commit`) are stored together: notices and
answers, of reads too, which may have seen such a change, wait until they are. A round that storage refuses is taken back
as far as requests have made it: by further changes, so that versions and numbers go on. What the broker noted in it
(`put_row` and the like tell what *is*) stays, and is stored as soon as storage takes it. A store that leads copies of itself on other
nodes (`lead`) hands each round to them instead, and answers when they have it.

Single-threaded: all calls come from the broker's loop. No method waits.
"""

from __future__ import annotations

import heapq
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Final, Protocol

from zray.clock import Clock, SystemClock
from zray.gcs import messages as m
from zray.gcs.faults import NO_FAULTS, Faults
from zray.gcs.limits import GcsLimits
from zray.gcs.notices import Notices, PublisherLike
from zray.gcs.replication.state import ShardImage
from zray.gcs.requests import Requests
from zray.gcs.shard import CONFLICT, FULL, MISSING, Refusal, Shard
from zray.gcs.sharding import shard_of
from zray.gcs.storage import MemoryStorage, Storage, StorageBehind, StorageTaken, TaskArchive
from zray.gcs.tables import (
    ANY,
    ROW_TABLES,
    Change,
    EventRow,
    GcsRow,
    Row,
    RowError,
    RowT,
    Table,
    TaskRow,
    decode_row,
    encode_row,
    event_key,
    is_ended,
    key_of,
)
from zray.gcs.task_batches import EndedBatch
from zray.gcs.task_history import TaskHistory, task_change
from zray.gcs.topics import BeatTimer
from zray.ids import ID_SIZE
from zray.task import TaskSpec

LINEAGE_S: Final = 0.05
"""Seconds between two records of task rows in the storage at least; ticks decide how many more."""
RETRY_S: Final = 0.5
"""Seconds after which rows that storage did not take are tried again, when nobody asks for a write before."""

_READS: Final = (m.Get, m.List, m.Read, m.GetTask, m.ListTasks, m.Describe, m.Open)
_WRITES: Final = (m.Put, m.Delete, m.DeletePrefix)
_Place = tuple[int, int, bytes]
"""(shard, table, key) of a row."""


class _Held:
    """An answer that waits for its round to be stored."""

    __slots__ = ("answer", "reply", "request", "wrote")

    def __init__(self, request: m.Request | None, reply: m.Reply, wrote: bool, answer: Callable[[bytes], None]) -> None:
        self.request = request
        self.reply = reply
        self.wrote = wrote
        self.answer = answer


class Copies(Protocol):
    """The other replicas of a store, as the one sees them that leads."""

    def carry(self, changes: list[tuple[int, Change]], then: Callable[[], None]) -> None:
        """Let every replica have these changes, in order; call `then` when they have them and all earlier ones, and this process
        may still speak for the store. It is not called any more when another leads by then."""
        ...

    @property
    def settled(self) -> bool:
        """Whether all of them have everything, and this process may speak for the store now."""
        ...


class GcsService:
    """All shards of a control store."""

    def __init__(
        self,
        open_publisher: Callable[[str], PublisherLike] | None,
        directory: str,
        *,
        shards: int = 4,
        clock: Clock | None = None,
        limits: GcsLimits | None = None,
        storage: Storage | None = None,
        archive: TaskArchive | None = None,
        referenced: Callable[[list[bytes]], Collection[bytes]] | None = None,
        epoch: int | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """Make the shards and load what is stored; sockets are bound when somebody first asks for notices.

        Args:
            open_publisher: binds a PUB socket at an endpoint (`Context.publisher`); None: one can only read.
            directory: runtime directory of the session, for the sockets `g0`, `g1` ...
            shards: 1 to 256.
            clock: for beats and for times in rows.
            limits: bounds of the whole store.
            storage: where acknowledged writes survive; default: nowhere. One that is durable needs `commit` after each round.
            archive: where flushed task rows are kept for later; default: nowhere.
            referenced: tells which of some tasks have results that somebody still refers to: their specs outlive
                their rows.
            epoch: number of this life of the service, above 0; default: random.
            faults: planted mistakes, for tests.

        Raises:
            ValueError: the number of shards is out of range.
            StorageError: what is stored cannot be loaded.
        """
        whole = limits or GcsLimits()
        part = whole.share(max(1, shards))
        self.epoch = epoch or int.from_bytes(os.urandom(6), "little") + 1
        self.directory = directory
        self.malformed = 0
        self.failures = 0
        self.last_failure = ""
        """Traceback of the newest request that failed for the service's own fault."""
        self._clock: Clock = clock or SystemClock()
        self._storage: Storage = storage or MemoryStorage()
        self.shards: Final = [Shard(index, part, faults) for index in range(shards)]
        self.history: Final = TaskHistory(shards, part, faults, self._clock, self._publish_tasks, archive, referenced)
        """The task rows."""
        self._notices = Notices(open_publisher, directory, self._clock, shards, self._newest, faults)
        self._events = 0
        self.on_taken: Callable[[str], None] | None = None
        """Called when another head has taken the storage: this one must end."""
        self.storage_failure = ""
        """Why storage does not take writes now; empty while it does."""
        self.rounds_refused = 0
        self._serving = False
        self._pending: list[tuple[int, Change]] = []
        """Changes of this round."""
        self._held: list[_Held] = []
        self._undo: dict[_Place, Row | None] = {}
        """Rows as they were before requests of this round changed them."""
        self._unstored: dict[_Place, None] = {}
        """Rows that storage has not taken."""
        self._behind = False
        """It has lost rows, and needs all of them again."""
        self._answers: dict[bytes, list[int]] = {}
        """Requests of each node whose answers are kept."""
        self._store_at = self._retry_at = 0.0
        self._durable = self._storage.durable
        self._copies: Copies | None = None
        self._recorded: list[tuple[int, Change]] | None = None
        self.on_changes: Callable[[list[tuple[int, Change]]], None] | None = None
        """Told of the changes of each write that nobody records: a chain carries them to other replicas."""
        self._requests = Requests(self)
        self._load()

    def _load(self) -> None:
        for shard in self.shards:
            revision, rows = self._storage.load(shard.index)
            shard.load(revision, rows)
            numbers = [int.from_bytes(key, "big") for table, key, _ in rows if table == Table.EVENTS]
            self._events = max([self._events, *numbers])
        self._find_answers()
        if self._durable:
            self.history.keep_log(self._storage.load_records())

    def _find_answers(self) -> None:
        """See which answers are among the rows."""
        self._answers.clear()
        for shard in self.shards:
            for key, _ in shard.page(Table.ANSWERS, b"", None, shard.count(Table.ANSWERS)):
                self._answers.setdefault(key[:ID_SIZE], []).append(int.from_bytes(key[ID_SIZE:], "big"))

    # -- requests ------------------------------------------------------------------------------------------------------

    def handle_request(self, body: bytes) -> bytes:
        """Return the encoded reply to an encoded request (`messages`), after storing what it changed; never raises,
        whatever the bytes are."""
        replies: list[bytes] = []
        self.serve_request(body, replies.append)
        if not replies:
            self.commit()
        return replies[0]

    def serve_request(
        self, body: bytes, answer: Callable[[bytes], None], origin: tuple[bytes, int] | None = None
    ) -> None:
        """Carry out an encoded request; never raises, whatever the bytes are.

        Args:
            body: the request.
            answer: called with the encoded reply, at once, or by the `commit` that has stored what it depends on.
            origin: (id of the node, number) of a request that may be repeated to the next life of this service: the
                write is made once, and each repetition gets the first answer until `forget_answers`.
        """
        try:
            request: m.Request | None = m.decode_request(body)
        except m.ProtocolError as error:
            self.malformed += 1
            answer(m.encode(m.Refused(m.REFUSED_MALFORMED, str(error))))
            return
        assert request is not None
        key = b"" if origin is None or not self._durable else origin[0] + origin[1].to_bytes(8, "big")
        known = self.shard_for(Table.ANSWERS, key).get(Table.ANSWERS, key) if key else None
        before = len(self._pending)
        if known is not None:
            reply: m.Reply = m.decode_reply(known.value)
            request = None
        else:
            self._serving = True
            try:
                reply = self._carry_out(request)
                if key and len(self._pending) > before:
                    self.put_bytes(Table.ANSWERS, key, m.encode(reply))
                    self._answers.setdefault(key[:ID_SIZE], []).append(int.from_bytes(key[ID_SIZE:], "big"))
            finally:
                self._serving = False
        if not self._durable or not (self._pending or self._storage.lapsed() or self._is_carrying):
            answer(m.encode(reply))
        else:
            self._held.append(_Held(request, reply, len(self._pending) > before, answer))

    def _carry_out(self, request: m.Request) -> m.Reply:
        try:
            return self._requests.carry_out(request)
        except RowError as error:
            return m.Refused(m.REFUSED_ROW, str(error))
        except Exception as error:  # the request is answered and the broker goes on, whatever is wrong here
            self.failures += 1
            self.last_failure = traceback.format_exc()
            return m.Refused(m.REFUSED_INTERNAL, f"{type(error).__name__}: {error}")

    def forget_answers(self, node: bytes, below: int) -> None:
        """A node has heard the answers of all its requests with lower numbers."""
        kept = self._answers.get(node)
        if not kept:
            return
        old = [number for number in kept if number < below]
        for number in old:
            self.delete_bytes(Table.ANSWERS, node + number.to_bytes(8, "big"))
        self._answers[node] = [number for number in kept if number >= below]
        if not self._answers[node]:
            del self._answers[node]

    def when_stored(self, call: Callable[[], None]) -> None:
        """Call when all that was noted so far is stored (or storage has refused it, which concerns requests alone): at once when
        nothing waits for that."""
        if self._durable and (self._pending or self._is_carrying):
            self._held.append(_Held(None, m.Done(), False, lambda reply: call()))
        else:
            call()

    # -- storing -------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """End a round: store its changes, then publish and answer. Never raises: what storage refuses is refused."""
        while self._pending or self._held:  # what was told that something is stored may have written in turn
            self._store_round()

    def _store_round(self) -> None:
        if self._copies is not None:
            self._carry_round(self._copies)
            return
        records, drop = self.history.due()
        try:
            if self._behind:
                self._storage.rewrite(self._everything())
                self._behind = False
                if self.history.log is not None:
                    self.history.log.begin_again()
                    drop = 0
            self._storage.write([*self._current(self._unstored), *self._pending], records, drop)
        except StorageTaken as error:
            self._refuse_round(error)
            if self.on_taken is not None:
                self.on_taken(str(error))
        except StorageBehind as error:
            self._behind = True
            self._retry_at = 0.0
            self._refuse_round(error)
        except OSError as error:
            self._refuse_round(error)
        else:
            self._unstored.clear()
            self.storage_failure = ""
            if self.history.log is not None:
                self.history.log.written()
            self._end_round()

    def _carry_round(self, copies: Copies) -> None:
        """Other replicas get the changes; answers leave when all have them."""
        pending, self._pending = self._pending, []
        held, self._held = self._held, []
        self._undo.clear()

        def arrived() -> None:
            for shard, change in pending:
                self._notices.publish(self.epoch, shard, change)
            for waiting in held:
                waiting.answer(m.encode(waiting.reply))

        copies.carry(pending, arrived)

    def _current(self, places: Collection[_Place]) -> list[tuple[int, Change]]:
        """The rows at some places as they are, as changes."""
        found = []
        for index, table, key in places:
            shard = self.shards[index]
            row = shard.get(table, key)
            if row is None:
                found.append((index, Change(table, key, None, shard.revision, 0)))
            else:
                found.append((index, Change(table, key, row.value, row.version, 0, row.ended)))
        return found

    def _everything(self) -> list[tuple[int, Change]]:
        return self._current(
            [
                (shard.index, table, key)
                for shard in self.shards
                for table in Table
                if table != Table.TASKS
                for key, _ in shard.page(table, b"", None, shard.count(table))
            ]
        )

    def _refuse_round(self, error: OSError) -> None:
        """Storage took nothing: take back what requests have changed, and tell them."""
        self.storage_failure = text = str(error)
        self.rounds_refused += 1
        undo, self._undo = self._undo, {}
        for (index, table, key), row in reversed(undo.items()):
            shard = self.shards[index]
            plan = (
                shard.plan_delete(table, key) if row is None else shard.plan_put(table, key, row.value, ended=row.ended)
            )
            if isinstance(plan, Change):
                self._make(shard, plan)
        for index, change in self._pending:
            self._unstored[index, change.table, change.key] = None
        refused = m.Refused(m.REFUSED_STORAGE, f"it cannot be stored: {text}")
        for held in self._held:
            if held.wrote or isinstance(held.request, _WRITES):
                held.reply = refused
            elif isinstance(held.request, _READS):
                held.reply = refused if self._storage.lapsed() else self._carry_out(held.request)
        self._end_round()

    def _end_round(self) -> None:
        pending, self._pending = self._pending, []
        held, self._held = self._held, []
        self._undo.clear()
        for shard, change in pending:
            self._notices.publish(self.epoch, shard, change)
        for waiting in held:
            waiting.answer(m.encode(waiting.reply))

    def _keep_storing(self, now: float) -> None:
        """What time asks for: records of tasks, rows that could not be stored, the sign of life of this head."""
        lineage = self.history.log is not None and now >= self._store_at and not self.storage_failure
        again = (self._unstored or self._behind) and now >= self._retry_at
        if lineage or again or self._pending or self._held:
            self._store_at = now + LINEAGE_S
            self._retry_at = now + RETRY_S
            if again or self._pending or self._held or (self.history.log is not None and self.history.log.waits):
                self._store_round()
        try:
            self._storage.tick()
        except StorageTaken as error:
            if self.on_taken is not None:
                self.on_taken(str(error))
        except OSError as error:
            self.storage_failure = str(error)
            self._retry_at = min(self._retry_at, now + RETRY_S)

    def shard_for(self, table: int, key: bytes) -> Shard:
        """Return the shard that keeps a key."""
        return self.shards[shard_of(table, key, len(self.shards))]

    # -- rows, for the broker in the same process ----------------------------------------------------------------------

    def put_row(self, row: GcsRow, *, expected: int = ANY) -> int:
        """Write a row and return its version.

        Raises:
            VersionConflict: its version is not `expected`.
            RowError: its id is not one.
        """
        key = key_of(row)
        reply = self.put_bytes(ROW_TABLES[type(row)], key, encode_row(row), expected=expected, ended=is_ended(row))
        return m.expect_written(reply)

    def row(self, row_type: type[RowT], key: bytes) -> RowT | None:
        """Return a row by its key (`tables.key_of`), or None."""
        table = ROW_TABLES[row_type]
        found = self.shard_for(table, key).get(table, key)
        return None if found is None else decode_row(row_type, found.value)

    def rows(self, row_type: type[RowT], prefix: bytes = b"") -> list[RowT]:
        """Return all rows of a table whose keys begin with `prefix`, in key order."""
        table = ROW_TABLES[row_type]
        parts = [shard.page(table, prefix, None, shard.count(table)) for shard in self.shards]
        return [decode_row(row_type, row.value) for _, row in heapq.merge(*parts, key=itemgetter(0))]

    def delete_row(self, row_type: type[GcsRow], key: bytes) -> bool:
        """Delete a row; return whether there was one."""
        return isinstance(self.delete_bytes(ROW_TABLES[row_type], key), m.Written)

    def record_event(self, subject_table: str, subject: bytes, what: str, detail: str = "") -> None:
        """Add an event; the oldest go when there are more than `limits.events`. Some microseconds: not for every task."""
        self._events += 1
        row = EventRow(self._events, self._clock.wall(), subject_table, subject, what, detail)
        self.put_bytes(Table.EVENTS, event_key(row.number), encode_row(row), ended=True)

    def put_bytes(self, table: int, key: bytes, value: bytes, *, expected: int = ANY, ended: bool = False) -> m.Reply:
        """Write an encoded row: Written, Conflict or Refused."""
        shard = self.shard_for(table, key)
        created = shard.get(table, key) is None
        return self._commit(shard, shard.plan_put(table, key, value, expected=expected, ended=ended), created)

    def delete_bytes(self, table: int, key: bytes, *, expected: int = ANY) -> m.Reply:
        """Delete a row: Written, Missing or Conflict."""
        shard = self.shard_for(table, key)
        return self._commit(shard, shard.plan_delete(table, key, expected=expected))

    def _commit(self, shard: Shard, plan: Change | Refusal, created: bool = False) -> m.Reply:
        if isinstance(plan, Refusal):
            return _refusal(plan)
        if self._recorded is None and self.on_changes is not None:
            with self.recording() as changes:
                reply = self._commit(shard, plan, created)
            self.on_changes(changes)
            return reply
        place = shard.index, plan.table, plan.key
        if self._serving:
            self._undo.setdefault(place, shard.get(plan.table, plan.key))
        else:
            self._undo.pop(place, None)
        self._make(shard, plan)
        while (old := shard.plan_retention(plan.table)) is not None:
            self._undo.pop((shard.index, old.table, old.key), None)
            self._make(shard, old)
        return m.Written(plan.version, created)

    def _make(self, shard: Shard, change: Change) -> None:
        shard.apply(change)
        if self._recorded is not None:
            self._recorded.append((shard.index, change))
        if self._durable:
            self._pending.append((shard.index, change))
        else:
            self._notices.publish(self.epoch, shard.index, change)

    # -- copies of this store on other nodes ---------------------------------------------------------------------------

    def lead(self, copies: Copies) -> None:
        """From now on rounds of this store are carried to its copies, and count, and are answered, when those have them."""
        self._copies = copies
        self._durable = True
        self._pending.clear()
        self._find_answers()

    @property
    def _is_carrying(self) -> bool:
        return self._copies is not None and not self._copies.settled

    @contextmanager
    def recording(self) -> Iterator[list[tuple[int, Change]]]:
        """Collect what is changed meanwhile, as (shard, change) in order: what other replicas have to apply."""
        before, self._recorded = self._recorded, []
        try:
            yield self._recorded
        finally:
            self._recorded = before

    def apply_change(self, shard: int, change: Change) -> None:
        """Make a change happen that was planned by another replica of this store, after the same ones before.

        Raises:
            ValueError: it does not follow what is here, or there is no such shard.
            OSError: storage refused it; nothing has changed.
        """
        if not 0 <= shard < len(self.shards):
            raise ValueError(f"there are {len(self.shards)} shards, not one with number {shard}")
        self._make(self.shards[shard], change)
        if change.table == Table.EVENTS:
            self._events = max(self._events, int.from_bytes(change.key, "big"))

    def image(self) -> list[ShardImage]:
        """Return all rows but those of tasks, for `load_image`."""
        return [ShardImage(shard.index, *shard.image()) for shard in self.shards]

    def load_image(self, images: Sequence[ShardImage]) -> None:
        """Be what another replica was; rows that are not named are gone. Subscribers read anew.

        Raises:
            ValueError: the other replica has another number of shards.
        """
        named = {image.shard: image for image in images}
        if named and named.keys() != set(range(len(self.shards))):
            raise ValueError(f"this store has {len(self.shards)} shards, the snapshot those numbered {sorted(named)}")
        for shard in self.shards:
            image = named.get(shard.index) or ShardImage(shard.index, 0, {}, [])
            shard.become(image.revision, image.numbers, image.rows)
        keys = [row[1] for image in images for row in image.rows if row[0] == Table.EVENTS]
        self._events = max([0, *(int.from_bytes(key, "big") for key in keys)])
        self.epoch += 1

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def tasks_submitted(self, job: int, tasks: Sequence[TaskSpec]) -> None:
        """Note tasks of a job that will run (again).

        The specs are shared, not copied: a later rise of `attempt` shows in the row.
        """
        self.history.submitted(job, tasks)

    def tasks_finished(
        self, job: int, worker: int, ids: Sequence[bytes], statuses: bytes, micros: Sequence[int]
    ) -> None:
        """Note ends of tasks of one job on one worker (0: on none).

        Args:
            job: number of the job.
            worker: number of the worker, below 2**32.
            ids: ids of the tasks; those never submitted here (sent straight to a worker) get a row without a spec.
            statuses: a byte for each: `wire.DONE_*`, FAILED or ABANDONED. DONE_RETRY and DONE_SKIPPED end nothing and
                are left out.
            micros: run time of each in microseconds.

        Raises:
            ValueError: the columns differ in length.
        """
        self.history.finished(job, worker, ids, statuses, micros)

    @property
    def durable(self) -> bool:
        """Whether rows survive this process."""
        return self._durable

    @property
    def is_stored(self) -> bool:
        """Whether storage has everything, task rows too."""
        self.settle_tasks()
        waits = self.history.log is not None and self.history.log.waits
        return not (waits or self._pending or self._unstored or self._behind or self._is_carrying)

    def abandon_tasks(self) -> None:
        """All tasks that are live have ended with the last life of this node."""
        self.history.abandon()

    def job_ended(self, job: int) -> None:
        """Note that a job is over: its live tasks end as ABANDONED. The job's own row is written with `put_row`."""
        self.history.job_ended(job)

    def task(self, task: bytes) -> TaskRow | None:
        """Return a task, None when it is not known (any more); RowError when the id has not 16 bytes."""
        return self.history.read(task)

    def tasks(
        self, job: int | None = None, *, limit: int = 1000, live: bool = True, ended: bool = True
    ) -> list[TaskRow]:
        """Return up to `limit` tasks of a job (None: of all): live ones, then ended ones with the newest end first."""
        return self.history.find(job, limit=limit, live=live, ended=ended)

    def settle_tasks(self) -> None:
        """Give gathered ends their place, publish them, and flush what is too old.

        Reads and ticks do this by themselves.
        """
        self.history.settle()

    # -- notices -------------------------------------------------------------------------------------------------------

    def _newest(self, shard: int, timer: BeatTimer, opened: Sequence[int], now: float) -> dict[int, int]:
        newest = timer.beat(self.shards[shard].numbers, opened, now)
        if Table.TASKS in newest:
            newest[Table.TASKS] = self.history.table.shards[shard].sequence
        return newest

    def _publish_tasks(self, shard: int, batch: EndedBatch) -> None:
        if self._notices.wants(Table.TASKS):
            self._notices.publish(self.epoch, shard, task_change(batch))

    def open_topic(self, table: Table) -> list[str]:
        """Publish the changes of a table from now on.

        Return the endpoint of each shard ([] when there is no way to publish).
        """
        return self._notices.open(table)

    @property
    def published(self) -> int:
        """Notices that were sent."""
        return self._notices.published

    def tick(self, now: float) -> float:
        """Do what time asks for: settle and flush tasks, send beats. `now`: monotonic seconds of the service's clock.

        Returns when the next beat is due (infinity: none). A tick that comes late or early does no harm; ten a second
        are enough.
        """
        self.history.tick()
        if self._durable:
            self._keep_storing(now)
        return self._notices.tick(now, self.epoch)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def statistics(self) -> m.Statistics:
        """Return how full the store is and what it has done since it began."""
        self.settle_tasks()
        tables = [table for table in Table if table != Table.TASKS]
        rows = {table.name: sum(shard.count(table) for shard in self.shards) for table in tables}
        sizes = {table.name: sum(shard.bytes_of(table) for shard in self.shards) for table in tables}
        parts = self.history.table.shards
        counts = [part.counts() for part in parts]
        live, ended, held = (sum(column) for column in zip(*counts))
        rows[Table.TASKS.name] = live + ended
        sizes[Table.TASKS.name] = sum(part.bytes + part.held_bytes for part in parts)
        totals: dict[int, int] = {}
        for part in parts:
            for status, count in part.totals.items():
                totals[status] = totals.get(status, 0) + count
        return m.Statistics(
            shards=len(self.shards),
            rows=rows,
            bytes=sizes,
            tasks_live=live,
            tasks_ended=ended,
            tasks_held=held,
            tasks_flushed=sum(part.flushed for part in parts),
            lineage_lost=sum(part.lineage_lost for part in parts),
            task_totals=totals,
            changes=sum(sum(shard.numbers.newest.values()) for shard in self.shards),
            published=self.published,
            malformed=self.malformed,
            failures=self.failures,
        )

    def validate(self) -> None:
        """Raise AssertionError when a shard breaks its equations or keeps a key that is another's."""
        self.settle_tasks()
        count = len(self.shards)
        for shard, rows in zip(self.shards, self.history.table.shards):
            shard.validate()
            rows.validate()
            for table in Table:
                if table != Table.TASKS:
                    keys = [key for key, _ in shard.page(table, b"", None, shard.count(table))]
                    assert all(shard_of(table, key, count) == shard.index for key in keys), "a key of another shard"
            assert all(shard_of(Table.TASKS, task, count) == shard.index for task in rows.ids()), "a task of another"

    def close(self) -> None:
        """Close sockets, archive and storage, after storing what waits. The service is not to be used afterwards."""
        if self._durable:
            self.settle_tasks()
            self._store_round()
        self._notices.close()
        self.history.close()
        self._storage.close()


def _refusal(refusal: Refusal) -> m.Reply:
    if refusal.reason == CONFLICT:
        return m.Conflict(refusal.version)
    if refusal.reason == MISSING:
        return m.Missing()
    assert refusal.reason == FULL
    return m.Refused(m.REFUSED_FULL, refusal.text)
