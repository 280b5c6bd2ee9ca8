"""What a head makes of the rows that its last life, or a dead node, has left: ends are noted, detached actors are made again.

Covers which rows end with a node, what is kept of a detached named actor so that it can be made again (`CreationRow`), and making it. Does not
cover members (`cluster`, `membership`) or storing (`zray.gcs`).

An actor that is made again is a new one under the old name: its constructor runs, and what it had in memory is lost (unless its constructor brings
it back from where the actor has saved it). It gets another id, so that handles of the old one stay what they are: handles of a dead actor.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from zray import _store
from zray.broker import events as e
from zray.broker.jobs import GUEST_BIT
from zray.broker.remote_tasks import FROM_AFAR
from zray.gcs.tables import (
    ActorNameRow,
    ActorRow,
    ActorState,
    CreationRow,
    GroupState,
    JobRow,
    NodeRow,
    PlacementGroupRow,
    StoredValue,
    key_of,
)
from zray.ids import random_id

if TYPE_CHECKING:
    from zray.broker.server import Broker
    from zray.gcs.service import GcsService
    from zray.object_store import ObjectRef
    from zray.task import ActorSpec

MOST_BYTES: Final = 16 << 20
"""Bytes of class and arguments that are kept for one actor."""


def end_rows_of(gcs: GcsService, node: bytes, reason: str) -> None:
    """A node is dead: so are its jobs and the actors that it owned, and their names are free."""
    now = time.time()
    row = gcs.row(NodeRow, node)
    if row is not None and row.alive:
        gcs.put_row(msgspec.structs.replace(row, alive=False, ended=now, reason=reason))
    for job in gcs.rows(JobRow):
        if job.node == node and job.running:
            gcs.put_row(msgspec.structs.replace(job, running=False, ended=now, reason=f"its node is dead: {reason}"))
    for actor in gcs.rows(ActorRow):
        if actor.owner == node and actor.state != ActorState.DEAD:
            gcs.put_row(msgspec.structs.replace(actor, state=ActorState.DEAD, ended=now, reason="NODE_DIED", spec=None))
    for name in gcs.rows(ActorNameRow):
        if name.node == node:
            gcs.delete_row(ActorNameRow, key_of(name))


def end_old_groups(gcs: GcsService) -> None:
    """Earlier versions kept placement groups in the head's memory: those of which there is only such a row are gone."""
    for group in gcs.rows(PlacementGroupRow):
        if group.spec is None and group.state != GroupState.REMOVED:
            gcs.put_row(msgspec.structs.replace(group, state=GroupState.REMOVED))


def newest_job(gcs: GcsService, bits: int) -> int:
    """Return the highest number that a job of a head ever had; numbers of other nodes' jobs are above `bits` bits."""
    return max([job.number for job in gcs.rows(JobRow) if job.number >> bits == 0], default=0)


def keep_creation(broker: Broker, actor: bytes) -> None:
    """An actor of ours lives: if it is detached and named, store all that makes it again."""
    gcs = broker.records.tables
    record = broker.scheduler.node.actors.actors.get(actor)
    if not gcs.durable or record is None:
        return
    spec = record.spec
    if not (spec.detached and spec.name) or spec.job & GUEST_BIT or gcs.row(CreationRow, actor) is not None:
        return
    gcs.put_row(_creation(broker, spec))


def _creation(broker: Broker, spec: ActorSpec) -> CreationRow:
    job, shape = broker.job_specs[spec.job], broker.shapes[spec.creation.shape]
    values: list[StoredValue] = []
    lacking = "its arguments hold references to objects, which end with the head" if spec.creation.borrowed else ""
    size = 0
    for name in dict.fromkeys((shape.function, *spec.creation.deps)):
        ref = broker.store.reference(name)
        if ref is None or not broker.store.done(ref):
            lacking = lacking or "its class or an argument is not on the head"
            continue
        if broker.store.contained(ref):
            lacking = lacking or "its class or an argument holds references to objects, which end with the head"
            continue
        data = broker.objects.raw(ref)
        size += len(data)
        if size > MOST_BYTES:
            lacking = lacking or f"its class and arguments have more than {MOST_BYTES >> 20} MiB"
            continue
        _, _, kind, flags, _ = broker.store.describe(ref)
        values.append(StoredValue(name, kind, flags & _store.FLAG_SYSTEM_ERROR, bytes(data)))
    if lacking:
        text = f"The detached actor {spec.name!r} will not come back after a restart of the head: {lacking}."
        broker.warn(spec.job, "not kept " + spec.creation.id.hex(), text)
        values = []
    return CreationRow(spec.creation.id, job, spec, shape, values, lacking)


def make_again(broker: Broker) -> None:
    """A head begins another life: make the detached named actors of the last one."""
    rows = broker.records.tables.rows(CreationRow)
    for row in rows:
        broker.records.tables.delete_row(CreationRow, row.id)
        if row.lacking:
            print(f"[zray] actor {row.spec.name!r} does not come back: {row.lacking}", file=sys.stderr, flush=True)
        else:
            _make_again(broker, row)
    for job in {row.job.number for row in rows}:
        broker.tell(e.JobEnded(job, "its driver's node is dead"))


def _make_again(broker: Broker, row: CreationRow) -> None:
    actor = _store.with_index(random_id(), 0)
    spec = msgspec.structs.replace(row.spec, creation=msgspec.structs.replace(row.spec.creation, id=actor))
    gcs = broker.records.tables
    # In the round that deletes the old row: the head may be killed at any time.
    gcs.put_row(msgspec.structs.replace(row, id=actor, spec=spec))
    gcs.put_row(ActorNameRow(spec.namespace, spec.name, actor, broker.node))
    held = [_bring_back(broker, value) for value in row.values]
    broker.job_specs[row.job.number] = row.job
    broker.tell(e.JobStarted(row.job, FROM_AFAR))
    broker.shapes[row.shape.key] = row.shape
    broker.records.shapes_defined([row.shape])
    broker.tell(e.ShapesDefined([row.shape]))
    life = broker.store.put_life(actor, b"")
    broker.performer.expect_address(actor, 0)
    broker.records.actor_requested(spec)
    broker.tell(e.ActorRequested(FROM_AFAR, spec, broker._missing(spec.creation.deps), b""))
    broker.performer.hold_for(spec)
    broker.performer.arguments[actor] = held
    gcs.record_event("actors", actor, "made again", f"{spec.name!r}, once {row.id.hex()}")
    del life


def _bring_back(broker: Broker, value: StoredValue) -> ObjectRef:
    ref = broker.store.reference(value.id)
    if ref is None:
        ref = broker.store.expect(value.id, 0, None, None, "")
        broker.store.seal_copy(ref, value.data, value.kind, value.flags, [])
    return ref
