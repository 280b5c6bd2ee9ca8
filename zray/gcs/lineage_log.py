"""The lineage log: how task rows get into a storage without a write for each, and back into the table.

Covers what is recorded, when the log is cut, and replay. Does not cover the rows themselves (`task_rows`) or where records are kept
(`storage`). Pure: calls in, records out.

Task rows are no business of acknowledgements: nobody waits for them, and there may be a hundred thousand a second. So they are stored some
times a second, in records of many:

    ENDS     a batch of ends with its specs (`task_batches.TaskEnds`): all that there is to know of those tasks
    LIVE     specs of tasks of one job that were submitted since the last record, and are still live now

A task that begins and ends between two records is written once, with its end. The log is cut when it is larger than its bound: the older half
goes, and the specs of all tasks that are live then are written again behind the rest, so that the log always holds

    every live task that was submitted before the last record          the newest ends, as many as fit
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from zray.gcs.task_batches import TaskEnds
from zray.task import TaskSpec

LOG_BYTES: Final = 64 << 20
"""Bytes of records kept."""
WAITING_BYTES: Final = 32 << 20
"""Bytes of records that wait while the storage takes none; the oldest go first."""
LIVE_AT_ONCE: Final = 1000
"""Specs in one record."""


class LiveTasks(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Tasks of a job that run or wait."""

    job: int
    tasks: list[TaskSpec]


class EndedTasks(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A batch of ends, of one shard."""

    shard: int
    ends: TaskEnds


_encode = msgspec.msgpack.Encoder().encode
_decoder: Final[msgspec.msgpack.Decoder[LiveTasks | EndedTasks]] = msgspec.msgpack.Decoder(LiveTasks | EndedTasks)


def decode(record: bytes) -> LiveTasks | EndedTasks:
    """Return what a record says; ValueError when it is none."""
    try:
        return _decoder.decode(record)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not a record of the lineage log: {error}") from None


class LineageLog:
    """What is to be written, and how much has been."""

    __slots__ = (
        "_drop",
        "_is_live",
        "_sizes",
        "_submitted",
        "_waiting",
        "_waiting_bytes",
        "bytes",
        "log_bytes",
        "lost",
    )

    def __init__(self, is_live: Callable[[int, TaskSpec], bool], log_bytes: int = LOG_BYTES) -> None:
        """`is_live` tells whether a task of a job is live and has this very spec."""
        self.log_bytes = log_bytes
        self.bytes = 0
        """Of the records in the storage."""
        self.lost = 0
        """Records that no storage took."""
        self._is_live = is_live
        self._sizes: deque[int] = deque()
        """Of each record in the storage, oldest first."""
        self._submitted: list[tuple[int, Sequence[TaskSpec]]] = []
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._drop = 0

    def loaded(self, record: bytes) -> None:
        """A record was found in the storage."""
        self._sizes.append(len(record))
        self.bytes += len(record)

    def submitted(self, job: int, tasks: Sequence[TaskSpec]) -> None:
        """Tasks were submitted."""
        self._submitted.append((job, tasks))

    def ended(self, shard: int, ends: TaskEnds) -> None:
        """Tasks have ended; `ends` has their specs."""
        self._wait(_encode(EndedTasks(shard, ends)))

    def _wait(self, record: bytes) -> None:
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > WAITING_BYTES and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1

    @property
    def waits(self) -> bool:
        """Whether there may be something to write."""
        return bool(self._submitted or self._waiting)

    def due(self, live: Callable[[], Iterable[tuple[int, Sequence[TaskSpec]]]]) -> tuple[list[bytes], int]:
        """Return (records to write, how many of the oldest ones to drop).

        To be followed by `written`, or asked again later when it could not be done. `live` gives all live tasks by job.
        """
        submitted, self._submitted = self._submitted, []
        if self.bytes + self._waiting_bytes > self.log_bytes and not self._drop and len(self._sizes) > 1:
            self._drop = max(1, len(self._sizes) // 2)
            submitted = list(live())
        by_job: dict[int, list[TaskSpec]] = {}
        for job, tasks in submitted:
            by_job.setdefault(job, []).extend([spec for spec in tasks if self._is_live(job, spec)])
        for job, specs in by_job.items():
            for start in range(0, len(specs), LIVE_AT_ONCE):
                self._wait(_encode(LiveTasks(job, specs[start : start + LIVE_AT_ONCE])))
        return list(self._waiting), self._drop

    def written(self) -> None:
        """What `due` returned is in the storage."""
        for _ in range(self._drop):
            self.bytes -= self._sizes.popleft()
        for record in self._waiting:
            self.loaded(record)
        self._waiting.clear()
        self._waiting_bytes = self._drop = 0

    def begin_again(self) -> None:
        """The storage was emptied."""
        self._sizes.clear()
        self.bytes = self._drop = 0
