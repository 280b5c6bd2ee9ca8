"""Actors with checkpoints: what this broker keeps of their states and calls, for actors of its own and for those that it runs for other nodes.

Covers taking in what their processes log and save, keeping the objects that are needed to make a state again, passing both on to the actor's owner,
confirming, and beginning a new incarnation with them. Does not cover what follows from what (`actor_log`), or the actor's process (`zray.checkpointing`).

The node where an actor lives keeps a copy of the log, which is ahead of the owner's: a process that dies is replaced there, from that copy. Nothing is
confirmed to the process before the owner has it, so when the node dies the owner has all that was ever acknowledged.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from zray import _store, wire
from zray.broker import peer_messages as pm
from zray.broker.actor_log import ActorLog, Entry, OutOfOrder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.broker import actions as a
    from zray.broker.actor_table import ActorRecord
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef
    from zray.task import CallShape, TaskSpec


class Checkpoints:
    """One broker's dealings in logs and checkpoints."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._store = broker.store
        self._waiting: dict[bytes, set[bytes]] = {}
        """Objects that must be here before something counts, and the actors that it concerns."""
        self._savings: dict[bytes, bytes] = {}
        """Checkpoints among them, and whose they are."""

    def _record(self, actor: bytes) -> tuple[ActorRecord, ActorLog] | None:
        record = self._broker.scheduler.node.actors.actors.get(actor)
        return None if record is None or record.log is None else (record, record.log)

    def _living_here(self, actor: bytes, worker: int) -> tuple[ActorRecord, ActorLog] | None:
        """The actor, if that worker is its present process. What a dead one has left in the inbox was never confirmed: it does not count."""
        found = self._record(actor)
        if found is None or found[0].worker is None or found[0].worker.number != worker:
            return None
        return found

    def _living_at(self, actor: bytes, node: bytes, slot: int) -> tuple[ActorRecord, ActorLog] | None:
        """The actor, if it lives in that slot of that node."""
        found = self._living_here(actor, slot)
        peer = None if found is None or found[0].worker is None else found[0].worker.peer
        return found if peer is not None and peer.id == node else None

    # -- news of processes here ----------------------------------------------------------------------------------------

    def logged(self, message: wire.LogCalls) -> None:
        """An actor here has run calls."""
        found = self._living_here(message.actor, message.worker)
        if found is None:
            return
        record, log = found
        self._keep_shapes(log, message.shapes)
        owner = self._owner(record)
        entries = self._entries(message.calls, {})
        missing = () if owner else self._absent(message.actor, [dep for call in message.calls for dep in call.deps])
        try:
            log.calls(message.first, entries, missing)
        except OutOfOrder as error:
            self._complain(record, error)
            return
        if not owner:
            self._confirm(record, log)
        elif self._broker.remote_actors is not None:
            self._broker.remote_actors.log_at_owner(message.actor, record.spec.job, message.first, message.calls)

    def saving(self, message: wire.SaveCheckpoint) -> None:
        """An actor here has made a checkpoint."""
        found = self._living_here(message.actor, message.worker)
        ref = self._store.reference(message.checkpoint)
        if (
            found is None or ref is None
        ):  # without the object its process is dead, and nothing that it said later counts
            return
        record, log = found
        try:
            log.saving(message.number, message.checkpoint, ref)
        except OutOfOrder as error:
            self._complain(record, error)
            return
        if not self._owner(record):
            self._confirm(record, log)
        elif self._broker.remote_actors is not None:
            self._broker.remote_actors.save_at_owner(message.actor, message.number, ref)

    def confirmed(self, node: bytes, message: pm.LogConfirmed) -> None:
        """The owner of an actor that lives here says what is safe."""
        found = self._record(message.actor)
        if found is None or self._owner(found[0]) != node:
            return
        found[1].confirm(message.logged, message.saved)
        self._confirm(*found, message.refused)

    # -- news of other nodes -------------------------------------------------------------------------------------------

    def logged_away(self, node: bytes, message: pm.CallsLoggedAway, lent: dict[bytes, ObjectRef]) -> None:
        """An actor of ours has run calls on another node."""
        found = self._living_at(message.actor, node, message.slot)
        if found is None:
            return
        record, log = found
        self._keep_shapes(log, message.shapes)
        self._keep_shapes(log, [shape for call in message.calls if (shape := self._broker.shapes.get(call.shape))])
        missing = self._absent(message.actor, [dep for call in message.calls for dep in call.deps])
        try:
            log.calls(message.first, self._entries(message.calls, lent), missing)
        except OutOfOrder as error:
            self._complain(record, error)
            return
        self._confirm(record, log)

    def saving_away(self, node: bytes, message: pm.CheckpointAway, refs: list[ObjectRef]) -> None:
        """An actor of ours has made a checkpoint on another node: it is safe when its value is here."""
        found = self._living_at(message.actor, node, message.slot)
        if found is None:
            return
        record, log = found
        missing = self._absent(message.actor, [message.checkpoint])
        if missing:
            self._savings[message.checkpoint] = message.actor
        try:
            log.saving(message.number, message.checkpoint, refs, missing)
        except OutOfOrder as error:
            self._complain(record, error)
            return
        if not missing and self._is_error(message.checkpoint):
            self._refuse(record, log, message.checkpoint)
        else:
            self._confirm(record, log)

    def objects_there(self, names: Iterable[bytes]) -> None:
        """These are sealed here."""
        if not self._waiting:
            return
        for name in names:
            for actor in self._waiting.pop(name, ()):
                found = self._record(actor)
                if found is None:
                    continue
                record, log = found
                if self._savings.pop(name, None) is not None and self._is_error(name):
                    self._refuse(record, log, name)
                elif log.ready(name):
                    self._confirm(record, log)

    def _refuse(self, record: ActorRecord, log: ActorLog, name: bytes) -> None:
        """The value of a checkpoint could not be brought here."""
        number = log.spoiled(name)
        if number >= 0:
            self._confirm(record, log, number + 1)

    def _is_error(self, name: bytes) -> bool:
        ref = self._store.reference(name)
        return ref is None or bool(self._store.describe(ref)[2] & _store.KIND_ERROR_FLAG)

    def _absent(self, actor: bytes, names: list[bytes]) -> tuple[bytes, ...]:
        """Those of these objects that are not here; they are brought."""
        if not names:
            return ()
        missing = self._broker._missing(tuple(dict.fromkeys(names)))
        for name in missing:
            self._waiting.setdefault(name, set()).add(actor)
        return missing

    def _entries(self, calls: list[TaskSpec], lent: dict[bytes, ObjectRef]) -> list[Entry]:
        entries = []
        for call in calls:
            names = (*call.deps, *call.borrowed)
            entries.append(
                Entry(
                    call, [ref for name in names if (ref := lent.get(name) or self._store.reference(name)) is not None]
                )
            )
        return entries

    def _keep_shapes(self, log: ActorLog, shapes: Iterable[CallShape]) -> None:
        for shape in shapes:
            log.shapes[shape.key] = shape
            self._broker.shapes.setdefault(shape.key, shape)

    def _owner(self, record: ActorRecord) -> bytes:
        """The node that owns an actor which lives here; b"" when it is this one."""
        remote = self._broker.remote_actors
        return b"" if remote is None else remote.owner_of(record.id)

    def _complain(self, record: ActorRecord, error: OutOfOrder) -> None:
        print(f"[zray] {record}: {error}", file=sys.stderr, flush=True)

    def _confirm(self, record: ActorRecord, log: ActorLog, refused: int = 0) -> None:
        """Tell an actor's process what is safe, wherever it lives."""
        worker = record.worker
        if worker is None:
            return
        if worker.peer is not None:
            if self._broker.cluster is not None:
                self._broker.cluster.send(worker.peer.id, pm.LogConfirmed(record.id, log.confirmed, log.saved, refused))
            return
        process = self._broker.workers.get(worker.number)
        if process is not None and process.process:
            self._set_words(process.process, log)
            if refused:
                self._store.set_word(process.process, wire.WORD_REFUSED, refused)
            self._broker.performer.send(worker.number, wire.CallsLogged())

    def _set_words(self, process: int, log: ActorLog) -> None:
        self._store.set_word(process, wire.WORD_LOGGED, log.confirmed)
        self._store.set_word(process, wire.WORD_SAVED, log.saved + 1)

    # -- lives ---------------------------------------------------------------------------------------------------------

    def start(self, action: a.BeginActor, process: int) -> wire.StartActor | None:
        """What the process of a new incarnation is told; None when the actor has no checkpoints."""
        found = self._record(action.spec.creation.id)
        if found is None:
            return None
        log = found[1]
        self._set_words(process, log)
        self._keep_shapes(log, log.shapes.values())
        logged = log.begun()
        return wire.StartActor(action.spec, action.incarnation, action.replay, log.checkpoint, log.number, logged)

    def to_host(self, action: a.HostActor) -> tuple[ActorLog, list[TaskSpec]] | None:
        """What another node must be sent to make an actor's state; None when it has no checkpoints."""
        found = self._record(action.spec.creation.id)
        if found is None:
            return None
        log = found[1]
        self._keep_shapes(log, log.shapes.values())
        return log, [entry.spec for entry in log.entries]

    def hosted(self, message: pm.HostActor, lent: dict[bytes, ObjectRef]) -> None:
        """An actor of another node comes here with its log."""
        found = self._record(message.spec.creation.id)
        if found is not None and message.checkpoint:
            log = found[1]
            shapes = self._broker.shapes
            self._keep_shapes(log, [shape for call in message.logged if (shape := shapes.get(call.shape))])
            entries = self._entries(message.logged, lent)
            log.seed(message.checkpoint, lent.get(message.checkpoint), message.number, entries, message.unsealed)

    def replayed(self, actor: bytes) -> int:
        """Logged calls that an actor was given to run again on this node, in all."""
        found = self._record(actor)
        return 0 if found is None else found[1].replayed

    def note_replayed(self, actor: bytes, count: int) -> None:
        """An actor of ours was given so many logged calls to run again, where it lives now."""
        found = self._record(actor)
        if found is not None:
            found[1].replayed += count

    def keeps(self, call: bytes) -> bool:
        """Whether a call is in a log, and will be answered by the next incarnation."""
        actors = self._broker.scheduler.node.actors.actors
        return any(record.log is not None and call in record.log.unsealed for record in actors.values())
