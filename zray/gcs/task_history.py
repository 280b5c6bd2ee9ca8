"""Task rows as the running service keeps them: gathered, settled, held while somebody refers to their results, flushed, logged.

Covers what becomes of a task's row over its life, and who is asked and told on the way. Does not cover the compact form of rows (`task_rows`,
`task_batches`), what the log's records hold (`lineage_log`), or when and where records are stored (`service`, `storage`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from zray.gcs.lineage_log import LineageLog, LiveTasks, decode
from zray.gcs.storage import StorageError
from zray.gcs.tables import Change, Table
from zray.gcs.task_rows import TaskRows, TaskTable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from zray.clock import Clock
    from zray.gcs.faults import Faults
    from zray.gcs.limits import GcsLimits
    from zray.gcs.storage import TaskArchive
    from zray.gcs.tables import TaskRow
    from zray.gcs.task_batches import EndedBatch
    from zray.task import TaskSpec

HELD_ASKED: Final = 256
"""Tasks with held specs per shard that a tick asks about (more when a batch has more)."""
_encode: Final = msgspec.msgpack.Encoder().encode
_ALL: Final = 1 << 62


class TaskHistory:
    """The task rows of one service."""

    def __init__(
        self,
        shards: int,
        limits: GcsLimits,
        faults: Faults,
        clock: Clock,
        publish: Callable[[int, EndedBatch], None],
        archive: TaskArchive | None,
        referenced: Callable[[list[bytes]], Collection[bytes]] | None,
    ) -> None:
        """Begin empty.

        Args:
            shards: how many there are.
            limits: of one shard.
            faults: planted mistakes, for tests.
            clock: for the times of ends.
            publish: told of each batch of ends that has got its place, and of its shard.
            archive: where flushed rows are kept for later; None: nowhere.
            referenced: tells which of some tasks have results that somebody still refers to; None: no task has.
        """
        self.table = TaskTable([TaskRows(limits, faults) for _ in range(shards)])
        self.log: LineageLog | None = None
        """What storage is to have of the rows; None: it has none."""
        self._clock = clock
        self._publish = publish
        self._archive = archive
        self._referenced = referenced

    # -- what happens to tasks -----------------------------------------------------------------------------------------

    def submitted(self, job: int, tasks: Sequence[TaskSpec]) -> None:
        """Tasks of a job will run (again). The specs are shared."""
        self.table.submitted(job, tasks)
        if self.log is not None:
            self.log.submitted(job, tasks)

    def finished(self, job: int, worker: int, ids: Sequence[bytes], statuses: bytes, micros: Sequence[int]) -> None:
        """Tasks of one job have ended on one worker; arguments as in `GcsService.tasks_finished`."""
        if self.table.finished(job, worker, ids, statuses, micros, self._clock.wall()):
            self.settle()

    def abandon(self) -> None:
        """All tasks that are live have ended with the last life of this node."""
        self.settle()
        for job in {row.job for rows in self.table.shards for row in rows.live(None, _ALL)}:
            self.job_ended(job)

    def job_ended(self, job: int) -> None:
        """A job is over: its live tasks end as ABANDONED."""
        self.settle()
        self.table.job_ended(job, self._clock.wall())
        self.settle()
        self.table.drop_job(job)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, task: bytes) -> TaskRow | None:
        """Return a task, None when it is not known (any more)."""
        self.settle()
        return self.table.rows_of(task).read(task)

    def find(self, job: int | None, *, limit: int, live: bool, ended: bool) -> list[TaskRow]:
        """Return up to `limit` tasks of a job (None: of all): live ones, then ended ones with the newest end first."""
        self.settle()
        found: list[TaskRow] = []
        if live:
            for rows in self.table.shards:
                found += rows.live(job, limit - len(found))
        if ended and len(found) < limit:
            most = limit - len(found)
            parts = [rows.newest(job, most) for rows in self.table.shards]
            found += sorted([row for part in parts for row in part], key=_end, reverse=True)[:most]
        return found

    # -- settling ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Give gathered ends their place, publish them, and flush what is too old."""
        made = self.table.settle()
        for shard, batch in made:
            self._publish(shard, batch)
        if self.log is not None:
            for shard, batch in made:
                self.log.ended(shard, batch.ends(with_specs=True))
        if made:
            self._flush()

    def _flush(self) -> None:
        for rows in self.table.shards:
            while (batch_due := rows.due()) is not None:
                rows.flush(self._needed(batch_due))
                if self._archive is not None:
                    self._archive.append(batch_due.ends(with_specs=True))

    def _needed(self, batch: EndedBatch) -> Collection[bytes]:
        if self._referenced is None or not batch.spec_count:
            return ()
        return set(self._referenced(batch.names()))

    def tick(self) -> None:
        """Settle, and see which held specs nobody needs any more."""
        self.settle()
        if self._referenced is None:
            return
        for rows in self.table.shards:
            asked = 0
            for _ in range(rows.held_batches):
                names = rows.oldest_held()
                rows.settle_held(set(self._referenced(names)))
                asked += len(names)
                if asked >= HELD_ASKED:
                    break

    # -- the log -------------------------------------------------------------------------------------------------------

    def keep_log(self, records: Iterable[bytes]) -> None:
        """Bring back the rows that storage has records of, and make records from now on.

        Raises:
            StorageError: a record is none.
        """
        log = LineageLog(self._is_live)
        for record in records:
            log.loaded(record)
            try:
                found = decode(record)
            except ValueError as error:
                raise StorageError(f"the lineage log in the storage is damaged: {error}") from None
            if isinstance(found, LiveTasks):
                self.table.submitted(found.job, found.tasks)
            else:
                self.table.replay(found.shard, found.ends)
        self._flush()
        self.log = log

    def _is_live(self, job: int, spec: TaskSpec) -> bool:
        return self.table.rows_of(spec.id).live_of(job).get(spec.id) is spec

    def due(self) -> tuple[list[bytes], int]:
        """Return (records to store, how many of the oldest ones to drop); nothing without a log."""
        return ([], 0) if self.log is None else self.log.due(self._all_live)

    def _all_live(self) -> list[tuple[int, list[TaskSpec]]]:
        return [(row.job, [row.spec]) for rows in self.table.shards for row in rows.live(None, _ALL) if row.spec]

    def close(self) -> None:
        """Close the archive."""
        if self._archive is not None:
            self._archive.close()


def _end(row: TaskRow) -> float:
    return row.ended


def task_change(batch: EndedBatch) -> Change:
    """Return the notice of a batch of ends."""
    return Change(Table.TASKS, b"", _encode(batch.ends(with_specs=False)), 0, batch.sequence)
