"""Keeping the control store's rows true to what happens on this node.

Covers which row is written when: node, jobs, functions, tasks, actors, events. Does not cover the store itself (`zray.gcs`) or what happens
(`scheduler`). Writes are plain calls into the service of the same process; task rows are written in bulk.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import msgspec

from zray import _store
from zray.gcs.service import GcsService
from zray.gcs.storage import open_storage
from zray.gcs.tables import ActorRow, ActorState, CreationRow, FunctionRow, JobRow, NodeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from zray.broker.config import BrokerConfig
    from zray.gcs.notices import PublisherLike
    from zray.gcs.tables import GcsRow
    from zray.task import ActorSpec, CallShape, JobSpec, TaskSpec


class Records:
    """The rows this broker is responsible for."""

    def __init__(
        self, open_publisher: Callable[[str], PublisherLike], config: BrokerConfig, store: _store.Store
    ) -> None:
        place = config.cluster
        name = place.storage if place is not None and not place.head else "memory"
        self.gcs = GcsService(
            open_publisher,
            config.directory,
            shards=config.gcs_shards,
            referenced=self._referenced,
            storage=open_storage(name, config.gcs_shards),
        )
        self.tables = self.gcs
        """The cluster's tables, where this node is the head. (Of no use elsewhere.) The same, unless several nodes keep them."""
        self.share: Callable[[GcsRow], None] | None = None
        """Tells the head a row of this node that belongs into its tables, too."""
        self.on_alive: Callable[[bytes], None] | None = None
        """Told of each actor of this node that was constructed."""
        self._store = store
        self._node = bytes.fromhex(config.node)
        self.gcs.put_row(
            NodeRow(
                self._node,
                config.directory,
                socket.gethostname(),
                os.getpid(),
                dict(config.resources),
                dict(config.labels),
                started=time.time(),
            )
        )

    def _referenced(self, tasks: list[bytes]) -> Collection[bytes]:
        """Those of some tasks whose (first) result somebody still refers to."""
        return [task for task in tasks if self._store.reference(_store.with_index(task, 1)) is not None]

    def _put(self, row: JobRow | ActorRow) -> None:
        """Write a row that the head's tables have, too: all jobs, and actors that others than their makers may look for."""
        self.gcs.put_row(row)
        if self.share is not None and (isinstance(row, JobRow) or row.name or row.detached):
            self.share(row)

    def share_all(self) -> None:
        """The head may have lost rows: tell it again what is running here."""
        if self.share is None:
            return
        for job in self.gcs.rows(JobRow):
            if job.running:
                self.share(job)
        for actor in self.gcs.rows(ActorRow):
            if actor.state != ActorState.DEAD and (actor.name or actor.detached):
                self.share(actor)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def job_started(self, spec: JobSpec) -> None:
        """A driver was admitted."""
        self._put(JobRow(spec.id, spec.number, self._node, spec.driver_pid, spec.namespace, started=time.time()))

    def job_ended(self, spec: JobSpec, reason: str) -> None:
        """A driver has left or died."""
        self.gcs.job_ended(spec.number)
        row = self.gcs.row(JobRow, spec.id)
        if row is not None:
            self._put(msgspec.structs.replace(row, running=False, ended=time.time(), reason=reason))

    def shapes_defined(self, shapes: Sequence[CallShape]) -> None:
        """Functions (with their options) that may be called from now on."""
        for shape in shapes:
            self.gcs.put_row(FunctionRow(shape))

    def shape_forgotten(self, key: bytes) -> None:
        """A function of a job that is over."""
        self.gcs.delete_row(FunctionRow, key)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def tasks_submitted(self, job: int, tasks: Sequence[TaskSpec]) -> None:
        """Tasks that will run: their rows are the lineage of their results."""
        self.gcs.tasks_submitted(job, tasks)

    def tasks_finished(
        self, job: int, worker: int, ids: Sequence[bytes], statuses: bytes, micros: Sequence[int]
    ) -> None:
        """Ends of tasks on one worker."""
        self.gcs.tasks_finished(job, worker, ids, statuses, micros)

    # -- actors --------------------------------------------------------------------------------------------------------

    def actor_requested(self, spec: ActorSpec) -> None:
        """An actor that is to be made."""
        row = ActorRow(
            spec.creation.id,
            spec.job,
            ActorState.PENDING,
            spec.class_name,
            spec.name,
            spec.namespace,
            self._node,
            detached=spec.detached,
            started=time.time(),
            spec=spec,
            owner=self._node,
        )
        self._put(row)

    def actor_alive(self, actor: bytes, incarnation: int, worker: int, pid: int, node: bytes) -> None:
        """An incarnation was constructed, on a node."""
        self._change(actor, state=ActorState.ALIVE, incarnation=incarnation, worker=worker, pid=pid, node=node)
        if self.on_alive is not None:
            self.on_alive(actor)

    def actor_down(self, actor: bytes, restarting: bool, reason: str) -> None:
        """An incarnation is over."""
        if restarting:
            self._change(actor, state=ActorState.RESTARTING, reason=reason)
        else:
            self._change(actor, state=ActorState.DEAD, reason=reason, ended=time.time())
            self.tables.delete_row(CreationRow, actor)

    def _change(self, actor: bytes, **fields: object) -> None:
        row = self.gcs.row(ActorRow, actor)
        if row is not None:
            self._put(msgspec.structs.replace(row, **fields))

    # -- events --------------------------------------------------------------------------------------------------------

    def event(self, table: str, key: bytes, what: str, detail: str) -> None:
        """Something worth remembering."""
        self.gcs.record_event(table, key, what, detail)
