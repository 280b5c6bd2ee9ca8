"""Batches of task ends: many rows in a few columns.

Covers one batch inside a shard (`EndedBatch`) and outside of it (`TaskEnds`, in notices and in the archive). Does not
cover which task's row is in which batch, or when a batch is flushed (`task_rows`).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec

from zray.gcs.tables import TaskRow
from zray.ids import ID_SIZE
from zray.task import TaskSpec

_ROW_BYTES: Final = 37
"""Bytes of a row's columns: id 16, status 1, run time 8, worker 4, time 8."""
_ENTRY_BYTES: Final = 140
"""About what the id and the dictionary entry of a row take."""

each_id = struct.Struct(f"{ID_SIZE}s").iter_unpack
"""Iterates over joined ids, as tuples of one."""
encode_specs = msgspec.msgpack.Encoder().encode
decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
"""Cuts a block of encoded specs into encoded specs."""
_decode_specs = msgspec.msgpack.Decoder(list[TaskSpec | None]).decode
_spec_decoder: Final[msgspec.msgpack.Decoder[TaskSpec | None]] = msgspec.msgpack.Decoder(TaskSpec | None)
_decode_spec = _spec_decoder.decode


class TaskEnds(msgspec.Struct, frozen=True, array_like=True):
    """An ended batch outside of a shard.

    Value of a notice on the task topic, record of the flush file. Columns of equal length.
    """

    job: int
    ids: bytes
    """16 bytes each."""
    statuses: bytes
    micros: list[int]
    workers: list[int]
    times: list[float]
    specs: bytes
    """msgpack list of TaskSpec or nil; b"" in notices."""

    def rows(self) -> list[TaskRow]:
        """Return the batch as rows, oldest end first."""
        specs = _decode_specs(self.specs) if self.specs else [None] * len(self.statuses)
        names = [task for (task,) in each_id(self.ids)]
        columns = zip(names, self.statuses, self.workers, self.micros, self.times, specs)
        return [
            TaskRow(name, self.job, status, worker, micros, ended, spec)
            for name, status, worker, micros, ended, spec in columns
        ]


def _column(code: str, values: Sequence[int]) -> array[int]:
    """Return the values as a column.

    What does not fit (only a broken sender says so) is brought to the nearest that does.
    """
    try:
        return array(code, values)
    except OverflowError:
        most = (1 << 8 * array(code).itemsize) - 1
        return array(code, [min(max(value, 0), most) for value in values])


class EndedBatch:
    """Ends of tasks of one job in one shard that became known together."""

    __slots__ = ("ids", "job", "micros", "sequence", "spec_count", "specs", "statuses", "times", "workers")

    def __init__(
        self,
        sequence: int,
        job: int,
        ids: bytes,
        statuses: bytes,
        micros: Sequence[int],
        workers: Sequence[int],
        times: Sequence[float],
        specs: bytes,
        spec_count: int = 0,
    ) -> None:
        self.sequence = sequence
        self.job = job
        self.ids = ids
        self.statuses = statuses
        self.micros = _column("Q", micros)
        self.workers = _column("I", workers)
        self.times = array("d", times)
        self.specs = specs
        self.spec_count = spec_count
        """How many of its rows have a spec."""

    def __len__(self) -> int:
        return len(self.statuses)

    @property
    def size(self) -> int:
        """Bytes of columns and specs."""
        return len(self.statuses) * _ROW_BYTES + len(self.specs)

    @property
    def held_size(self) -> int:
        """Bytes that its rows take when they are held: entries and ids count too, because there may be millions."""
        return len(self.statuses) * (_ROW_BYTES + _ENTRY_BYTES) + len(self.specs)

    def only(self, places: list[int]) -> EndedBatch:
        """Return a batch of the rows at some places, in that order; all of them have a spec."""
        raw = decode_raw(self.specs)
        names = self.names()
        return EndedBatch(
            self.sequence,
            self.job,
            b"".join([names[place] for place in places]),
            bytes([self.statuses[place] for place in places]),
            [self.micros[place] for place in places],
            [self.workers[place] for place in places],
            [self.times[place] for place in places],
            encode_specs([raw[place] for place in places]),
            len(places),
        )

    def names(self) -> list[bytes]:
        """Return the ids, one by one."""
        return [task for (task,) in each_id(self.ids)]

    def place(self, task: bytes) -> int:
        """Return the place of a task's last end in this batch, -1 for none."""
        place = self.ids.rfind(task)
        while place > 0 and place % ID_SIZE:  # found across the border of two ids
            place = self.ids.rfind(task, 0, place + ID_SIZE - 1)
        return place // ID_SIZE if place >= 0 else -1

    def spec(self, place: int) -> TaskSpec | None:
        """Return the spec at a place."""
        return _decode_spec(decode_raw(self.specs)[place])

    def row(self, place: int) -> TaskRow:
        """Return the row at a place."""
        task = self.ids[place * ID_SIZE : (place + 1) * ID_SIZE]
        spec = self.spec(place)
        return TaskRow(
            task, self.job, self.statuses[place], self.workers[place], self.micros[place], self.times[place], spec
        )

    def ends(self, *, with_specs: bool) -> TaskEnds:
        """Return the batch as a record that can travel."""
        specs = self.specs if with_specs else b""
        micros, workers, times = self.micros.tolist(), self.workers.tolist(), self.times.tolist()
        return TaskEnds(self.job, self.ids, self.statuses, micros, workers, times, specs)
