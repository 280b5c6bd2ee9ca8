"""One shard: rows, versions, numbers and the change log of every table but the task table.

Covers reading, planning and applying changes, ordered listing, and bounded retention of ended rows. Does not cover task
rows (`task_rows`), which keys belong here (`sharding`), what a value means (`tables`), or where it is written before it
counts (`service`, `storage`).

A write has two steps, so that nothing counts before it is stored: `plan_put` / `plan_delete` / `plan_retention` say
what would change (or why not) and change nothing; `apply` makes a planned change happen. Whoever stores writes puts the
storing between the two.

Equations, checked by `validate()`; r ranges over rows, t over tables:

    1 <= r.version <= revision, all different          revision == base + sum(numbers.of(t))
    table.bytes == sum(len(key) + len(r.value))        keys (ordered) == rows (as sets)
    table.ended == keys of ended rows, <= its bound    len(log) and its bytes <= their bounds
    log: sequences without a hole up to numbers.of(t), versions growing
    for each key in the log: its newest entry there == its row (or the row is absent and the entry a deletion)
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec
from sortedcontainers import SortedList

from zray.gcs.faults import NO_FAULTS, Fault, Faults
from zray.gcs.limits import GcsLimits
from zray.gcs.tables import ABSENT, ANY, Change, Row, Table
from zray.gcs.topics import TopicNumbers

CONFLICT: Final = "conflict"
MISSING: Final = "missing"
FULL: Final = "full"


class Refusal(msgspec.Struct, frozen=True):
    """Why a change cannot be made."""

    reason: str
    """CONFLICT, MISSING or FULL."""
    version: int = 0
    """Of the row as it is; 0 when it is absent."""
    text: str = ""


class _TableRows:
    """One table's part of the shard."""

    __slots__ = ("bytes", "ended", "keys", "log", "log_bytes", "rows")

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.keys: SortedList = SortedList()
        self.ended: dict[bytes, None] = {}
        """Keys of ended rows, the one that ended first in front."""
        self.bytes = 0
        self.log: deque[Change] = deque()
        self.log_bytes = 0


class Shard:
    """One shard's rows. All methods are pure: the same calls in the same order give the same answers."""

    __slots__ = ("_base", "_faults", "_limits", "_tables", "index", "numbers", "revision")

    def __init__(self, index: int, limits: GcsLimits, faults: Faults = NO_FAULTS) -> None:
        """`limits`: of this shard (`GcsLimits.share`)."""
        self.index = index
        self.revision = 0
        """Version of the newest change."""
        self.numbers = TopicNumbers(faults)
        self._base = 0
        self._limits = limits
        self._faults = faults
        self._tables = {int(table): _TableRows() for table in Table if table != Table.TASKS}

    def load(self, revision: int, rows: list[tuple[int, bytes, Row]]) -> None:
        """Fill an empty shard with rows that were stored.

        `revision`: of the newest change that was stored, also of a deletion.
        """
        self.revision = self._base = revision
        for table, key, row in rows:
            self._insert(self._tables[table], key, row)

    def image(self) -> tuple[int, dict[int, int], list[tuple[int, bytes, bytes, int, bool]]]:
        """Return (revision, newest numbers of topics, rows as (table, key, value, version, ended)) for `become`.

        Ended rows stand last, in the order in which they ended.
        """
        rows: list[tuple[int, bytes, bytes, int, bool]] = []
        for table, part in self._tables.items():
            rows += [(table, key, row.value, row.version, False) for key, row in part.rows.items() if not row.ended]
            rows += [(table, key, part.rows[key].value, part.rows[key].version, True) for key in part.ended]
        return self.revision, dict(self.numbers.newest), rows

    def become(self, revision: int, numbers: dict[int, int], rows: list[tuple[int, bytes, bytes, int, bool]]) -> None:
        """Be what another replica's shard was when it made an `image`; whatever was here is gone, the change log too."""
        self._tables = {table: _TableRows() for table in self._tables}
        self.load(revision, [(table, key, Row(value, version, ended)) for table, key, value, version, ended in rows])
        self.numbers = TopicNumbers(self._faults)
        for table, number in numbers.items():
            self.numbers.take(table, number)
        self._base = revision - sum(numbers.values())

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, table: int, key: bytes) -> Row | None:
        """Return a row."""
        return self._tables[table].rows.get(key)

    def count(self, table: int) -> int:
        """Return how many rows a table has here."""
        return len(self._tables[table].rows)

    def bytes_of(self, table: int) -> int:
        """Return the bytes of a table's keys and values here."""
        return self._tables[table].bytes

    def page(self, table: int, prefix: bytes, after: bytes | None, most: int) -> list[tuple[bytes, Row]]:
        """Return up to `most` rows whose keys begin with `prefix` and come after `after`, in key order."""
        part = self._tables[table]
        start = part.keys.bisect_left(prefix)
        if after is not None and after >= prefix:
            start = max(start, part.keys.bisect_right(after))
        found: list[tuple[bytes, Row]] = []
        for key in part.keys.islice(start):
            if len(found) >= most or not key.startswith(prefix):
                break
            found.append((key, part.rows[key]))
        return found

    def snapshot(self, table: int) -> tuple[int, list[tuple[bytes, bytes, int]]]:
        """Return (number of the newest change, all rows as (key, value, version) in key order)."""
        part = self._tables[table]
        rows = [(key, part.rows[key].value, part.rows[key].version) for key in part.keys]
        ahead = 1 if Fault.SNAPSHOT_TOO_NEW in self._faults else 0
        return self.numbers.of(table) + ahead, rows

    def changes_since(self, table: int, sequence: int) -> list[Change] | None:
        """Return the changes after number `sequence`, oldest first; None when the log does not reach back that far."""
        log = self._tables[table].log
        missing = self.numbers.of(table) - sequence
        if missing < 0 or missing > len(log):
            return None
        return [log[i] for i in range(len(log) - missing, len(log))]

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan_put(
        self, table: int, key: bytes, value: bytes, *, expected: int = ANY, ended: bool = False
    ) -> Change | Refusal:
        """Return the change that writes a row, or why it cannot be made."""
        part = self._tables[table]
        row = part.rows.get(key)
        refusal = self._compare(row, expected)
        if refusal is not None:
            return refusal
        if len(value) > self._limits.value_bytes:
            text = f"a value has at most {self._limits.value_bytes} bytes, this one {len(value)}"
            return Refusal(FULL, row.version if row else 0, text)
        if table == Table.KV:
            grown = part.bytes + len(value) + (len(key) if row is None else -len(row.value))
            if grown > self._limits.kv_bytes and grown > part.bytes:
                text = (
                    f"user keys and values of this shard may take {self._limits.kv_bytes} bytes; {part.bytes} are taken"
                )
                return Refusal(FULL, row.version if row else 0, text)
        version = self.revision + 1
        if Fault.NO_VERSION_BUMP in self._faults and row is not None:
            version = row.version
        return Change(table, key, value, version, self.numbers.following(table), ended)

    def plan_delete(self, table: int, key: bytes, *, expected: int = ANY) -> Change | Refusal:
        """Return the change that deletes a row, or why it cannot be made."""
        row = self._tables[table].rows.get(key)
        refusal = self._compare(row, expected)
        if refusal is not None:
            return refusal
        if row is None:
            return Refusal(MISSING)
        return Change(table, key, None, self.revision + 1, self.numbers.following(table))

    def _compare(self, row: Row | None, expected: int) -> Refusal | None:
        found = ABSENT if row is None else row.version
        if expected in (ANY, found) or Fault.STALE_WRITE_ACCEPTED in self._faults:
            return None
        return Refusal(CONFLICT, found)

    def plan_retention(self, table: int) -> Change | None:
        """Return the deletion of a table's oldest ended row when it has more of them than its bound, else None."""
        part = self._tables[table]
        if len(part.ended) <= self._limits.ended_rows(table) or Fault.RETENTION_FORGOTTEN in self._faults:
            return None
        key = next(iter(part.ended))
        if Fault.LIVE_ROW_RETIRED in self._faults:
            key = part.keys[0]
        return Change(table, key, None, self.revision + 1, self.numbers.following(table))

    # -- applying ------------------------------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Make a planned change happen.

        Raises:
            ValueError: something else was applied since it was planned.
        """
        if change.version != self.revision + 1 and not self._faults:
            raise ValueError(f"change {change.version} was planned before change {self.revision} was applied")
        part = self._tables[change.table]
        self._remove(part, change.key, keep_index=change.value is not None)
        if change.value is not None:
            self._insert(part, change.key, Row(change.value, change.version, change.ended))
        self.revision = max(self.revision, change.version)
        if Fault.VERSION_REUSED in self._faults and change.value is None:
            self.revision = self._base
        self.numbers.take(change.table, change.sequence)
        self._note(part, change)

    def _insert(self, part: _TableRows, key: bytes, row: Row) -> None:
        if key not in part.rows:
            part.bytes += len(key)
            if key not in part.keys:
                part.keys.add(key)
        part.rows[key] = row
        part.bytes += len(row.value)
        if row.ended:
            part.ended[key] = None

    def _remove(self, part: _TableRows, key: bytes, *, keep_index: bool) -> None:
        """Take a row out; `keep_index`: another takes its place at once, so its key may stay in the ordered index."""
        row = part.rows.pop(key, None)
        if row is None:
            return
        part.ended.pop(key, None)
        if Fault.BYTES_NOT_RETURNED not in self._faults:
            part.bytes -= len(key) + len(row.value)
        if not keep_index and Fault.KEY_INDEX_KEPT not in self._faults:
            part.keys.remove(key)

    def _note(self, part: _TableRows, change: Change) -> None:
        if Fault.LOG_LOSES_CHANGE in self._faults and change.version % 5 == 0:
            return
        part.log.append(change)
        part.log_bytes += len(change.value or b"")
        if Fault.LOG_UNBOUNDED in self._faults:
            return
        while len(part.log) > self._limits.log_changes or part.log_bytes > self._limits.log_bytes:
            part.log_bytes -= len(part.log.popleft().value or b"")

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError naming the first equation (module docstring) that does not hold."""
        versions: list[int] = []
        for table, part in self._tables.items():
            name = Table(table).name
            assert list(part.keys) == sorted(part.rows), f"{name}: the ordered index differs from the rows"
            size = sum(len(key) + len(row.value) for key, row in part.rows.items())
            assert part.bytes == size, f"{name}: {part.bytes} bytes counted, {size} there"
            ended = {key for key, row in part.rows.items() if row.ended}
            assert part.ended.keys() == ended, f"{name}: ended rows are not the listed ones"
            assert len(ended) <= self._limits.ended_rows(table), f"{name}: more ended rows than allowed"
            versions += [row.version for row in part.rows.values()]
            self._validate_log(table, part)
        assert all(1 <= version <= self.revision for version in versions), "a version that was never given"
        assert len(set(versions)) == len(versions), "two rows have the same version"
        changes = sum(self.numbers.newest.values())
        assert self.revision == self._base + changes, f"{changes} changes, but revision {self.revision}"

    def _validate_log(self, table: int, part: _TableRows) -> None:
        name, newest = Table(table).name, self.numbers.of(table)
        log = list(part.log)
        assert len(log) <= self._limits.log_changes, f"{name}: the log is longer than allowed"
        assert part.log_bytes == sum(len(change.value or b"") for change in log), f"{name}: log bytes are miscounted"
        assert part.log_bytes <= self._limits.log_bytes, f"{name}: the log is larger than allowed"
        expected = list(range(newest - len(log) + 1, newest + 1))
        assert [change.sequence for change in log] == expected, f"{name}: the log has a hole"
        versions = [change.version for change in log]
        assert versions == sorted(set(versions)), f"{name}: versions in the log do not grow"
        for key, change in {change.key: change for change in log}.items():
            row = part.rows.get(key)
            found = (None, change.version) if row is None else (row.value, row.version)
            assert found == (change.value, change.version), f"{name}: a row differs from its newest change"
