"""What each request to the control store does, and what is answered.

Covers one request at a time: checking it, reading or writing, and the reply. Does not cover its bytes (`messages`), when the reply leaves, or
repetition (`service`).
"""

from __future__ import annotations

import heapq
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from zray.gcs import messages as m
from zray.gcs.tables import RowError, Table, check_entry
from zray.gcs.task_history import task_change
from zray.ids import ID_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.gcs.service import GcsService

PAGE_BYTES: Final = 8 << 20
"""Bytes of values after which a page is full."""


class Requests:
    """The requests to one service."""

    def __init__(self, service: GcsService) -> None:
        self._service = service
        self._handlers: dict[type[m.Request], Callable[[Any], m.Reply]] = {
            m.Get: self._get,
            m.Put: self._put,
            m.Delete: self._delete,
            m.List: self._list,
            m.DeletePrefix: self._delete_prefix,
            m.Open: self._open,
            m.Read: self._read,
            m.SubmitTasks: self._submit_tasks,
            m.FinishTasks: self._finish_tasks,
            m.GetTask: self._get_task,
            m.ListTasks: self._list_tasks,
            m.Describe: lambda request: service.statistics(),
        }

    def carry_out(self, request: m.Request) -> m.Reply:
        """Do what is asked for.

        Raises:
            RowError: the request names or holds what cannot be a row.
        """
        return self._handlers[type(request)](request)

    def _get(self, request: m.Get) -> m.Reply:
        _refuse_tasks(request.table)
        row = self._service.shard_for(request.table, request.key).get(request.table, request.key)
        return m.Missing() if row is None else m.Found(row.value, row.version)

    def _put(self, request: m.Put) -> m.Reply:
        ended = check_entry(request.table, request.key, request.value)
        return self._service.put_bytes(
            request.table, request.key, request.value, expected=request.expected, ended=ended
        )

    def _delete(self, request: m.Delete) -> m.Reply:
        _refuse_tasks(request.table)
        return self._service.delete_bytes(request.table, request.key, expected=request.expected)

    def _list(self, request: m.List) -> m.Reply:
        _refuse_tasks(request.table)
        most = max(1, min(request.limit, m.MAX_PAGE))
        parts = [shard.page(request.table, request.prefix, request.after, most + 1) for shard in self._service.shards]
        found: list[tuple[bytes, bytes, int]] = []
        size = 0
        for key, row in heapq.merge(*parts, key=itemgetter(0)):
            if len(found) >= most or size >= PAGE_BYTES:
                return m.Page(found, True)
            value = b"" if request.keys_only else row.value
            size += len(value)
            found.append((key, value, row.version))
        return m.Page(found, False)

    def _delete_prefix(self, request: m.DeletePrefix) -> m.Reply:
        _refuse_tasks(request.table)
        count = 0
        for shard in self._service.shards:
            while found := shard.page(request.table, request.prefix, None, m.MAX_PAGE):
                for key, _ in found:
                    self._service.delete_bytes(request.table, key)
                count += len(found)
        return m.Deleted(count)

    def _open(self, request: m.Open) -> m.Reply:
        return m.Opened(self._service.epoch, self._service.open_topic(request.table))

    def _read(self, request: m.Read) -> m.Reply:
        if not 0 <= request.shard < len(self._service.shards):
            raise RowError(f"there are {len(self._service.shards)} shards, not one with number {request.shard}")
        known = request.epoch == self._service.epoch
        if request.table == Table.TASKS:
            self._service.settle_tasks()
            rows = self._service.history.table.shards[request.shard]
            batches = rows.ends_since(request.sequence) if known else None
            if batches is None:
                return m.Snapshot(self._service.epoch, rows.sequence, [])
            return m.Log(self._service.epoch, [task_change(batch) for batch in batches])
        shard = self._service.shards[request.shard]
        changes = shard.changes_since(request.table, request.sequence) if known else None
        if changes is None:
            return m.Snapshot(self._service.epoch, *shard.snapshot(request.table))
        return m.Log(self._service.epoch, changes)

    def _submit_tasks(self, request: m.SubmitTasks) -> m.Reply:
        for spec in request.tasks:
            self._service.history.table.rows_of(spec.id)
        self._service.tasks_submitted(request.job, request.tasks)
        return m.Done()

    def _finish_tasks(self, request: m.FinishTasks) -> m.Reply:
        count = len(request.statuses)
        if len(request.ids) != count * ID_SIZE or len(request.micros) != count:
            raise RowError("columns of unequal length")
        names = [request.ids[i : i + ID_SIZE] for i in range(0, len(request.ids), ID_SIZE)]
        self._service.tasks_finished(request.job, request.worker, names, request.statuses, request.micros)
        return m.Done()

    def _get_task(self, request: m.GetTask) -> m.Reply:
        row = self._service.task(request.task)
        return m.Missing() if row is None else m.FoundTask(row)

    def _list_tasks(self, request: m.ListTasks) -> m.Reply:
        limit = max(0, min(request.limit, m.MAX_PAGE))
        return m.Tasks(self._service.tasks(request.job or None, limit=limit, live=request.live, ended=request.ended))


def _refuse_tasks(table: Table) -> None:
    if table == Table.TASKS:
        raise RowError("task rows are read with GetTask and ListTasks, and written with SubmitTasks and FinishTasks")
