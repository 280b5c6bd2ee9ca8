"""Task rows: written in bulk at the rate tasks run, readable by id, flushed when old.

Covers one shard's task rows (`TaskRows`) and all shards' rows seen as one (`TaskTable`): submission, ends, reads,
bounds, lineage that outlives its row. Does not cover what a batch looks like (`task_batches`), the other tables
(`shard`), publishing or files (`service`, `storage`).

The budget is a microsecond a task for submission and end together, so a row has no record of its own:

- a *live* task is a dictionary entry that points at the spec its broker holds anyway;
- ends are gathered (`TaskTable`) and become an `EndedBatch` of columns and one block of encoded specs; the row is a
  dictionary entry that points at its batch. Batches stand in a ring in the order of their ends, numbered as the topic's
  notices are: the ring is the topic's log.
- when the rows or bytes of the ring exceed their bound the oldest batch is flushed as a whole. Rows with specs that
  somebody still needs (`keep`) are *held*: they move to batches of a second ring, which has a bound in bytes.

A task that ends twice (a re-execution, a superseded worker that reports late) is the row of its newest end; a task that
is submitted again is live again. Equations, checked by `validate()`:

    every id of a batch in the ring maps to that batch or to a newer one in the ring
    bytes == sum(batch.size for the ring)         held_bytes == sum(batch.held_size for the second ring)
    every held id maps to a batch in the second ring that has it
    rows in the ring + flushed == sum(totals)     len(ended) <= max_rows, bytes <= max_bytes once the ring is settled
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final

from zray.gcs.faults import NO_FAULTS, Fault, Faults
from zray.gcs.limits import GcsLimits
from zray.gcs.sharding import slot_table
from zray.gcs.tables import ABANDONED, LIVE, RowError, TaskRow
from zray.gcs.task_batches import EndedBatch, TaskEnds, decode_raw, each_id, encode_specs
from zray.ids import ID_SIZE
from zray.task import TaskSpec
from zray.wire import DONE_RETRY, DONE_SKIPPED

GATHERED: Final = 1024
"""Ends gathered before they are cut into batches. Reads and ticks do not wait for that many."""
_NIL: Final = b"\xc0"
"""The encoded spec of a row that has none."""


class TaskRows:
    """The task rows of one shard. Ends are to be followed by `due` and `flush` until nothing is due."""

    __slots__ = (
        "_ended",
        "_faults",
        "_held",
        "_held_ring",
        "_live",
        "_ring",
        "bytes",
        "flushed",
        "held_bytes",
        "lineage_bytes",
        "lineage_lost",
        "max_bytes",
        "max_rows",
        "sequence",
        "totals",
    )

    def __init__(self, limits: GcsLimits, faults: Faults = NO_FAULTS) -> None:
        """`limits`: of this shard (`GcsLimits.share`)."""
        self.max_rows = limits.ended_tasks
        self.max_bytes = limits.ended_task_bytes
        self.lineage_bytes = limits.lineage_bytes
        self.sequence = 0
        self.bytes = 0
        self.held_bytes = 0
        self.flushed = 0
        self.lineage_lost = 0
        """Held specs dropped because there were more than `lineage_bytes`."""
        self.totals: dict[int, int] = {}
        """Ends ever seen, by status."""
        self._live: dict[int, dict[bytes, TaskSpec]] = {}
        self._ended: dict[bytes, EndedBatch] = {}
        self._ring: deque[EndedBatch] = deque()
        self._held: dict[bytes, EndedBatch] = {}
        self._held_ring: deque[EndedBatch] = deque()
        self._faults = faults

    # -- writing -------------------------------------------------------------------------------------------------------

    def live_of(self, job: int) -> dict[bytes, TaskSpec]:
        """Return the live tasks of a job, for the caller to add to."""
        return self._live.setdefault(job, {})

    def end(
        self,
        job: int,
        ids: Sequence[bytes],
        statuses: bytes,
        micros: Sequence[int],
        workers: Sequence[int],
        times: Sequence[float],
    ) -> EndedBatch:
        """Move tasks from live to ended (tasks that never were live have no spec) and return the batch."""
        live = self._live.get(job, {})
        were_live = len(live)
        pop = live.pop
        specs: list[TaskSpec | None] = [pop(task, None) for task in ids]
        ended, held = self._ended, self._held
        self.sequence += 1
        batch = EndedBatch(self.sequence, job, b"".join(ids), statuses, micros, workers, times, b"")
        fresh = dict.fromkeys(ids, batch)
        batch.spec_count = were_live - len(live)
        known = False
        if batch.spec_count < len(ids):
            known = len(fresh) < len(ids) or not ended.keys().isdisjoint(ids)
        if known or (held and not held.keys().isdisjoint(ids)):
            self._find_earlier(ids, specs)
            batch.spec_count = sum([spec is not None for spec in specs])
        batch.specs = encode_specs(specs)
        if Fault.ENDED_TASK_LOST in self._faults:
            fresh.popitem()
        ended.update(fresh)
        self._ring.append(batch)
        self.bytes += batch.size
        totals = self.totals
        for status in set(statuses):
            totals[status] = totals.get(status, 0) + statuses.count(status)
        return batch

    def _find_earlier(self, ids: Sequence[bytes], specs: list[TaskSpec | None]) -> None:
        """A task that ends again without having been submitted again keeps its spec: that of its earlier end.

        Held specs of tasks that end again are released: the new row has the spec, and is newer than what is held.
        """
        here: dict[bytes, TaskSpec | None] = {}
        for index, task in enumerate(ids):
            if specs[index] is None:
                row = None if task in here else self._read_ended(task)
                specs[index] = here.get(task) if row is None else row.spec
            here[task] = specs[index]
            self._held.pop(task, None)

    def drop_job(self, job: int) -> None:
        """Forget the place for live tasks of a job."""
        self._live.pop(job, None)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def due(self) -> EndedBatch | None:
        """Return the oldest batch when the ring exceeds a bound, else None."""
        if len(self._ended) <= self.max_rows and self.bytes <= self.max_bytes:
            return None
        if Fault.TASK_RING_UNBOUNDED in self._faults:
            return None
        return self._ring[0]

    def flush(self, keep: Collection[bytes] = ()) -> EndedBatch:
        """Remove the oldest batch from the ring and return it; specs of the tasks in `keep` are held on to."""
        batch = self._ring.popleft()
        if keep and Fault.LINEAGE_FLUSHED not in self._faults:
            self._hold(batch, self._ended, keep)
        ended = self._ended
        pop = ended.pop
        drop_newer = Fault.TASK_END_DROPPED_WITH_OLD in self._faults
        for (task,) in each_id(batch.ids):
            newest = pop(task, None)
            if newest is not batch and newest is not None and not drop_newer:
                ended[task] = newest  # a newer end: rare, so it is put back instead of being looked up first
        self.flushed += len(batch)
        if Fault.TASK_BYTES_NOT_RETURNED not in self._faults:
            self.bytes -= batch.size
        return batch

    def _hold(self, batch: EndedBatch, rows: dict[bytes, EndedBatch], keep: Collection[bytes]) -> None:
        """Hold the rows of a batch that are in `keep`, have a spec, and are their task's row according to `rows`."""
        names = batch.names()
        if batch.spec_count == len(names):
            places = [place for place, task in enumerate(names) if task in keep and rows.get(task) is batch]
        elif batch.spec_count:
            raw = decode_raw(batch.specs)
            places = [place for place, spec in enumerate(raw) if bytes(spec) != _NIL]
            places = [place for place in places if names[place] in keep and rows.get(names[place]) is batch]
        else:
            return
        if not places:
            return
        held = batch if len(places) == len(names) else batch.only(places)
        self._held.update(dict.fromkeys([names[place] for place in places], held))
        self._held_ring.append(held)
        self.held_bytes += held.held_size
        while self.held_bytes > self.lineage_bytes:
            self.lineage_lost += self._let_go()

    def _let_go(self) -> int:
        """Remove the oldest held batch; return how many rows were lost with it."""
        batch = self._held_ring.popleft()
        self.held_bytes -= batch.held_size
        before = len(self._held)
        for (task,) in each_id(batch.ids):
            if self._held.get(task) is batch:
                del self._held[task]
        return before - len(self._held)

    @property
    def held_batches(self) -> int:
        """How many batches hold rows: how often `settle_held` goes once around."""
        return len(self._held_ring)

    def oldest_held(self) -> list[bytes]:
        """Return the tasks of the oldest held batch (some perhaps released meanwhile); [] when none is held."""
        return self._held_ring[0].names() if self._held_ring else []

    def settle_held(self, keep: Collection[bytes]) -> None:
        """Release the oldest held batch except for the tasks in `keep`, which go to the end of the queue."""
        batch = self._held_ring[0]
        rows = dict.fromkeys([task for task in batch.names() if self._held.get(task) is batch], batch)
        self._let_go()
        self._hold(batch, rows, keep)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, task: bytes) -> TaskRow | None:
        """Return a task's row.

        Live, else its newest end, else the held spec; None for a task that is not known (any more).
        """
        for job, live in self._live.items():
            spec = live.get(task)
            if spec is not None:
                return TaskRow(task, job, LIVE, spec=spec)
        return self._read_ended(task)

    def _read_ended(self, task: bytes) -> TaskRow | None:
        batch = self._ended.get(task)
        if batch is None:
            batch = self._held.get(task)
        return None if batch is None else batch.row(batch.place(task))

    def live(self, job: int | None, most: int) -> list[TaskRow]:
        """Return up to `most` live tasks (of a job, or of all), in the order of their submission."""
        found: list[TaskRow] = []
        for number, live in self._live.items():
            if job is None or job == number:
                tasks = zip(live.items(), range(most - len(found)))
                found += [TaskRow(task, number, LIVE, spec=spec) for (task, spec), _ in tasks]
        return found

    def newest(self, job: int | None, most: int) -> list[TaskRow]:
        """Return up to `most` ended tasks (of a job, or of all), newest end first."""
        found: list[TaskRow] = []
        for batch in reversed(self._ring):
            if len(found) >= most:
                break
            if job is not None and job != batch.job:
                continue
            rows = batch.ends(with_specs=True).rows()
            rows.reverse()
            found += [row for row in rows if self._ended.get(row.id) is batch]
        return found[:most]

    def ends_since(self, sequence: int) -> list[EndedBatch] | None:
        """Return the batches after number `sequence`; None when some of them are flushed already."""
        if sequence > self.sequence:
            return None
        missing = self.sequence - sequence
        if missing > len(self._ring):
            return None
        return [self._ring[i] for i in range(len(self._ring) - missing, len(self._ring))]

    def counts(self) -> tuple[int, int, int]:
        """Return (live, ended and readable, held) numbers of tasks."""
        return sum(map(len, self._live.values())), len(self._ended), len(self._held)

    def ids(self) -> Iterator[bytes]:
        """Iterate over all ids this shard knows, some perhaps twice."""
        for live in self._live.values():
            yield from live
        yield from self._ended
        yield from self._held

    def validate(self) -> None:
        """Raise AssertionError naming the first equation (module docstring) that does not hold."""
        ring = list(self._ring)
        members = {id(batch) for batch in ring}
        in_ring = 0
        for place, batch in enumerate(ring):
            count = len(batch)
            in_ring += count
            columns = (len(batch.ids) // ID_SIZE, len(batch.micros), len(batch.workers), len(batch.times))
            assert columns == (count,) * 4, "columns of a batch differ in length"
            raw = [bytes(spec) for spec in decode_raw(batch.specs)]
            assert len(raw) == count, "a batch has not as many specs as rows"
            assert batch.spec_count == count - raw.count(_NIL), "specs of a batch are miscounted"
            assert batch.sequence == self.sequence - len(ring) + place + 1, "batches are not numbered one after another"
            for task in batch.names():
                newest = self._ended.get(task)
                assert newest is not None, f"ended task {task.hex()} has no row"
                assert newest.sequence >= batch.sequence, f"the row of {task.hex()} is not its newest end"
        for task, batch in self._ended.items():
            assert id(batch) in members, f"the row of {task.hex()} is in a flushed batch"
            assert batch.place(task) >= 0, f"task {task.hex()} is not in its batch"
        assert self.bytes == sum(batch.size for batch in ring), "bytes of the ring are miscounted"
        held = {id(batch) for batch in self._held_ring}
        for task, batch in self._held.items():
            assert id(batch) in held, f"held task {task.hex()} is in a batch that was let go"
            assert batch.place(task) >= 0, f"held task {task.hex()} is not in its batch"
        assert self.held_bytes == sum(batch.held_size for batch in self._held_ring), "held bytes are miscounted"
        assert in_ring + self.flushed == sum(self.totals.values()), "ended tasks are miscounted"
        assert len(self._ended) <= self.max_rows, "more ended rows than allowed"
        assert self.bytes <= self.max_bytes, "more bytes of ended rows than allowed"
        assert self.held_bytes <= self.lineage_bytes, "more held specs than allowed"


_Columns = tuple[Sequence[bytes], bytes, Sequence[int], Sequence[int], Sequence[float]]


class _Gathered:
    """Columns of ends of one job that are not in a batch yet."""

    __slots__ = ("ids", "micros", "statuses", "times", "workers")

    def __init__(self) -> None:
        self.ids: list[bytes] = []
        self.statuses = bytearray()
        self.micros: list[int] = []
        self.workers: list[int] = []
        self.times: list[float] = []

    def all(self) -> _Columns:
        """Return the columns."""
        return self.ids, bytes(self.statuses), self.micros, self.workers, self.times

    def at(self, places: list[int]) -> _Columns:
        """Return the columns of the rows at some places."""
        # One call takes many items of a column, faster than a loop; the place named twice makes it a tuple even for one row.
        pick: Callable[[Any], Any] = itemgetter(*places, places[0])
        count = len(places)
        ids, statuses, micros = pick(self.ids)[:count], pick(self.statuses)[:count], pick(self.micros)[:count]
        return ids, bytes(statuses), micros, pick(self.workers)[:count], pick(self.times)[:count]


class TaskTable:
    """The task rows of all shards.

    `settle` gives ends their place; it is due when `gathered` reaches GATHERED, and before any read.
    """

    __slots__ = ("_gathered", "_live_by_slot", "_slots", "gathered", "shards")

    def __init__(self, shards: list[TaskRows]) -> None:
        self.shards = shards
        self.gathered = 0
        self._slots = slot_table(len(shards))
        self._gathered: dict[int, _Gathered] = {}
        self._live_by_slot: dict[int, list[dict[bytes, TaskSpec]]] = {}

    def rows_of(self, task: bytes) -> TaskRows:
        """Return the shard that keeps a task; RowError when the id has not 16 bytes."""
        if len(task) != ID_SIZE:
            raise RowError(f"a task id has {ID_SIZE} bytes, got {len(task)}")
        return self.shards[self._slots[task[0]]]

    def submitted(self, job: int, tasks: Sequence[TaskSpec]) -> None:
        """Note new tasks (or tasks to be run again) of a job. The specs are shared with the caller, not copied."""
        by_slot = self._live_by_slot.get(job)
        if by_slot is None:
            by_slot = self._live_by_slot[job] = [self.shards[shard].live_of(job) for shard in self._slots]
        for spec in tasks:
            task = spec.id
            by_slot[task[0]][task] = spec

    def finished(
        self, job: int, worker: int, ids: Sequence[bytes], statuses: bytes, micros: Sequence[int], now: float
    ) -> bool:
        """Note ends of tasks of one job on one worker; executions that did not end a task (retry, skipped) are left
        out.

        Returns whether it is time to `settle`. Raises ValueError when the columns differ in length.
        """
        count = len(ids)
        if len(statuses) != count or len(micros) != count:
            raise ValueError(f"columns of unequal length: {count}, {len(statuses)}, {len(micros)}")
        if DONE_RETRY in statuses or DONE_SKIPPED in statuses:
            kept = [i for i in range(count) if statuses[i] not in (DONE_RETRY, DONE_SKIPPED)]
            ids = [ids[i] for i in kept]
            statuses = bytes([statuses[i] for i in kept])
            micros = [micros[i] for i in kept]
            count = len(kept)
        if not count:
            return False
        gathered = self._gathered.get(job)
        if gathered is None:
            gathered = self._gathered[job] = _Gathered()
        gathered.ids += ids
        gathered.statuses += statuses
        gathered.micros += micros
        gathered.workers += [worker] * count
        gathered.times += [now] * count
        self.gathered += count
        return self.gathered >= GATHERED

    def settle(self) -> list[tuple[int, EndedBatch]]:
        """Give all gathered ends their place; return (shard, batch) for each batch made, for the caller to publish."""
        if not self.gathered:
            return []
        made: list[tuple[int, EndedBatch]] = []
        for job, ends in self._gathered.items():
            if len(self.shards) == 1:
                made.append((0, self.shards[0].end(job, *ends.all())))
                continue
            places: list[list[int]] = [[] for _ in self.shards]
            slots = self._slots
            for place, task in enumerate(ends.ids):
                places[slots[task[0]]].append(place)
            for shard, part in enumerate(places):
                if part:
                    made.append((shard, self.shards[shard].end(job, *ends.at(part))))
        self._gathered.clear()
        self.gathered = 0
        return made

    def replay(self, shard: int, ends: TaskEnds) -> None:
        """Note a batch of ends, with specs, of another life of this table; nothing may be gathered."""
        rows = [row for row in ends.rows() if row.spec is not None and row.spec.id == row.id]
        live = self.shards[shard].live_of(ends.job)
        live.update({row.id: row.spec for row in rows if row.spec is not None})
        names = [task for (task,) in each_id(ends.ids)]
        self.shards[shard].end(ends.job, names, ends.statuses, ends.micros, ends.workers, ends.times)

    def job_ended(self, job: int, now: float) -> None:
        """Gather an end (ABANDONED) for every task of the job that is still live.

        To be followed by `settle` and `drop_job`.
        """
        for rows in self.shards:
            left = list(rows.live_of(job))
            if job in self._gathered:
                ending = set(self._gathered[job].ids)
                left = [task for task in left if task not in ending]
            self.finished(job, 0, left, bytes((ABANDONED,)) * len(left), [0] * len(left), now)

    def drop_job(self, job: int) -> None:
        """Forget the places for live tasks of a job whose ends are all settled."""
        self._live_by_slot.pop(job, None)
        for rows in self.shards:
            rows.drop_job(job)
