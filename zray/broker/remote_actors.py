"""Actors that live on other nodes than the one that was asked for them, and their names in the whole cluster.

Covers sending actors to other nodes (`host`), running those that came from there, reports of their lives, names, and detached actors. Does not
cover where an actor shall live or whether it comes back (the scheduler of its owner), nor calls (`remote_tasks`).

The *owner* of an actor is the node that was asked for it; it decides where the actor lives, counts its handles, and brings it back elsewhere when the
node where it lives is lost. That node runs it like one of its own: a process that dies is started again there. A detached actor outlives whoever asked:
the head adopts it.

A name is a row of the cluster's control store, written only where there is none: of two claims one loses. It is deleted by the owner when the actor is
dead, or by the head when the owner is.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Final

import msgspec

from zray import wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker.jobs import GUEST_BIT
from zray.broker.remote_tasks import FROM_AFAR
from zray.gcs import messages as m
from zray.gcs.tables import ABSENT, ActorNameRow, Table, decode_row, encode_row, key_of, namespaced_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.cluster import Cluster
    from zray.broker.object_sharing import ObjectSharing
    from zray.broker.remote_tasks import RemoteTasks
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef
    from zray.task import ActorSpec, TaskSpec

_HANDED_OVER_S: Final = 5.0
"""Seconds that a handle is kept for the process that has asked for it by name and is about to take it."""


class _Hosted:
    """An actor of another node that lives here."""

    __slots__ = ("owner", "replayed", "slot")

    def __init__(self, owner: bytes, slot: int) -> None:
        self.owner = owner
        self.slot = slot
        self.replayed = 0
        """Logged calls that it was given to run again here, as far as its owner was told."""


class RemoteActors:
    """One broker's dealings in actors with other nodes."""

    def __init__(self, broker: Broker, cluster: Cluster, sharing: ObjectSharing, tasks: RemoteTasks) -> None:
        self._broker = broker
        self._store = broker.store
        self._cluster = cluster
        self._sharing = sharing
        self._tasks = tasks
        self._hosted: dict[bytes, _Hosted] = {}
        self.behind_broker: set[bytes] = set()
        """Actors that live here and were called from here before: later calls must not overtake those, so all take the way through this broker."""
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[bytes, Callable[[pm.Adopted | pm.ActorIs | None], None]]] = {}
        """Questions by number: who was asked, and what to do with the answer (None: the node is dead)."""
        self._handed_over: list[tuple[float, list[ObjectRef]]] = []
        cluster.serve_also(pm.HostActor, self._host)
        cluster.serve_also(pm.ActorUp, self._up)
        cluster.serve_also(pm.ActorGone, self._gone)
        cluster.serve_also(pm.EndActorAway, self._end)
        cluster.serve_also(pm.AdoptActor, self._adopt)
        cluster.serve_also(pm.Adopted, self._answered)
        cluster.serve_also(pm.CallsLoggedAway, self._calls_logged)
        cluster.serve_also(pm.CheckpointAway, self._checkpoint_made)
        cluster.serve_also(pm.LogConfirmed, broker.checkpoints.confirmed)
        cluster.serve_also(pm.AskActor, self._asked_for)
        cluster.serve_also(pm.ActorIs, self._answered)

    # -- sending ------------------------------------------------------------------------------------------------------

    def host_at(self, action: a.HostActor) -> None:
        """Have an actor live on another node."""
        spec = action.spec
        job = self._broker.job_specs[spec.job]
        state = self._broker.checkpoints.to_host(action) if spec.checkpoint_every else None
        log, logged = state or (None, [])
        shapes, lent = self._tasks.wrap(action.node, job.number, [spec.creation, *logged, *action.replay])
        message = pm.HostActor(
            job, self._tasks.home_of(job.number), action.slot, shapes, spec, action.incarnation, action.replay, lent
        )
        answers = action.replay
        if log is not None and log.checkpoint:
            state_ref = self._store.reference(log.checkpoint)
            lent += self._sharing.lend(action.node, [] if state_ref is None else [state_ref])
            answers = [*log.unsealed.values(), *action.replay]
            message = msgspec.structs.replace(
                message, checkpoint=log.checkpoint, number=log.number, logged=logged, unsealed=list(log.unsealed)
            )
        self._tasks.note_away(action.node, spec.creation.id, answers, spec.job)
        self._cluster.send(action.node, message)

    def kill_at(self, action: a.KillAt) -> None:
        """Have an actor on another node killed."""
        self._cluster.send(action.node, pm.KillActorAway(action.actor, action.no_restart))

    def end_at(self, action: a.EndActorAt) -> None:
        """Tell the node of an actor that no handle is left."""
        self._cluster.send(action.node, pm.EndActorAway(action.actor))

    # -- actors with checkpoints --------------------------------------------------------------------------------------

    def owner_of(self, actor: bytes) -> bytes:
        """The node that owns an actor which lives here; b"" when it is this one."""
        hosted = self._hosted.get(actor)
        return b"" if hosted is None else hosted.owner

    def log_at_owner(self, actor: bytes, job: int, first: int, calls: list[TaskSpec]) -> None:
        """Tell the owner of calls that its actor has run here."""
        hosted = self._hosted[actor]
        shapes, lent = self._tasks.wrap(hosted.owner, self._tasks.driver_job(job), calls)
        self._cluster.send(hosted.owner, pm.CallsLoggedAway(actor, hosted.slot, first, shapes, calls, lent))

    def save_at_owner(self, actor: bytes, number: int, checkpoint: ObjectRef) -> None:
        """Offer the owner a checkpoint that its actor has made here."""
        hosted = self._hosted[actor]
        self._sharing.lend(hosted.owner, [checkpoint])
        self._cluster.send(hosted.owner, pm.CheckpointAway(actor, hosted.slot, number, checkpoint.binary()))

    def _calls_logged(self, node: bytes, message: pm.CallsLoggedAway) -> None:
        lent = {ref.binary(): ref for ref in self._sharing.borrow(node, message.lent)}
        self._broker.checkpoints.logged_away(node, message, lent)

    def _checkpoint_made(self, node: bytes, message: pm.CheckpointAway) -> None:
        refs = self._sharing.borrow(node, [message.checkpoint])
        self._broker.checkpoints.saving_away(node, message, refs)

    # -- lives --------------------------------------------------------------------------------------------------------

    def _up(self, node: bytes, message: pm.ActorUp) -> None:
        self._broker.checkpoints.note_replayed(message.actor, message.replayed)
        self._broker.records.actor_alive(message.actor, message.incarnation, message.slot, message.pid, node)
        self._broker.tell(e.ActorHosted(message.slot, message.actor, message.incarnation))

    def _gone(self, node: bytes, message: pm.ActorGone) -> None:
        self._broker.tell(e.ActorGoneAway(message.slot, message.actor, message.kind, message.cause, message.error))

    # -- hosting ------------------------------------------------------------------------------------------------------

    def _host(self, node: bytes, message: pm.HostActor) -> None:
        """Run an actor of another node."""
        broker = self._broker
        creation = message.spec.creation
        lent = self._tasks.unwrap(node, message)
        job = GUEST_BIT | message.job.number
        spec = msgspec.structs.replace(message.spec, job=job)
        function = broker.shapes[creation.shape].function
        self._tasks.keep_function(message.job.number, function, lent)
        self._hosted[creation.id] = _Hosted(node, message.slot)
        if self._store.reference(creation.id) is not None:
            self.behind_broker.add(creation.id)
        broker.performer.skip_incarnations(creation.id, message.incarnation)
        needed = [dep for call in message.logged for dep in call.deps]
        state = (message.checkpoint,) if message.checkpoint else ()
        missing = broker._missing((function, *creation.deps, *state, *needed))
        broker.tell(e.ActorRequested(FROM_AFAR, spec, missing, b"", message.incarnation))
        if creation.id in broker.scheduler.node.actors.actors:
            broker.performer.hold_for(spec)
        broker.checkpoints.hosted(message, lent)
        unsealed = [call for call in message.logged if call.id in message.unsealed]
        self._tasks.expect_calls(node, message.job.number, creation.id, unsealed, lent)
        if message.replay:
            self._tasks.expect_calls(node, message.job.number, creation.id, message.replay, lent)
            broker.tell(e.ActorCallsQueued(FROM_AFAR, job, creation.id, message.incarnation, message.replay))
            self._tasks.look_at([call.id for call in message.replay])
        self._tasks.end_again(message.job.number)

    def alive(self, actor: bytes, incarnation: int, pid: int) -> None:
        """An actor has been constructed here."""
        hosted = self._hosted.get(actor)
        if hosted is not None:
            total = self._broker.checkpoints.replayed(actor)
            news, hosted.replayed = total - hosted.replayed, total
            self._cluster.send(hosted.owner, pm.ActorUp(actor, hosted.slot, incarnation, pid, news))

    def dead(self, actor: bytes, kind: str, cause: str, error: bytes) -> None:
        """An actor that was here is dead for good."""
        hosted = self._hosted.pop(actor, None)
        if hosted is not None:
            self.behind_broker.discard(actor)
            self._cluster.send(hosted.owner, pm.ActorGone(actor, hosted.slot, kind, cause, error))
            if self._store.reference(actor) is None:
                self._broker.performer.actor_unreferenced(actor)

    def _end(self, node: bytes, message: pm.EndActorAway) -> None:
        if message.actor in self._hosted:
            self._broker.tell(e.ActorUnreferenced(message.actor))

    def unreferenced(self, actor: bytes) -> None:
        """Nothing here refers to a borrowed actor any more: nobody here will look at its addresses."""
        if actor not in self._hosted:
            self._broker.performer.actor_unreferenced(actor)

    def node_gone(self, node: bytes) -> None:
        """A node is dead: so are the actors that it owned, and its answers will not come. (Its names go at the head.)"""
        for actor in [actor for actor, hosted in self._hosted.items() if hosted.owner == node]:
            self._broker.kill_actor(actor, True)
        for number in [number for number, (asked, _) in self._asked.items() if asked == node]:
            self._asked.pop(number)[1](None)

    # -- names --------------------------------------------------------------------------------------------------------

    def create(self, message: wire.CreateActor) -> None:
        """Somebody here wants an actor: claim its name first, if it has one; a detached one is the head's."""
        spec = message.spec
        if spec.detached and not self._cluster.is_head:
            self._give_to_head(message)
        elif spec.name:
            self._claim(spec, self._cluster.own, lambda bearer: self._claimed(message, bearer))
        else:
            self._broker.admit_actor(message)

    def _claim(self, spec: ActorSpec, owner: bytes, answer: Callable[[ActorNameRow | None], None]) -> None:
        """Write the row of a name. `answer` gets None when it is ours, else the row of whoever bears it."""
        row = ActorNameRow(spec.namespace, spec.name, spec.creation.id, owner)

        def written(reply: m.AnyReply) -> None:
            if isinstance(reply, m.Conflict):
                self._find(spec.namespace, spec.name, found)
            else:
                answer(None)

        def found(bearer: ActorNameRow | None) -> None:
            if bearer is None:  # freed meanwhile
                self._claim(spec, owner, answer)
            else:
                answer(None if bearer.actor == spec.creation.id else bearer)

        self._request(m.Put(Table.ACTOR_NAMES, key_of(row), encode_row(row), ABSENT), written)

    def _find(self, namespace: str, name: str, answer: Callable[[ActorNameRow | None], None]) -> None:
        key = namespaced_key(namespace.encode(), name.encode())

        def found(reply: m.AnyReply) -> None:
            answer(decode_row(ActorNameRow, reply.value) if isinstance(reply, m.Found) else None)

        self._request(m.Get(Table.ACTOR_NAMES, key), found)

    def _request(self, request: m.Request, answer: Callable[[m.AnyReply], None]) -> None:
        self._cluster.request(m.encode(request), lambda body: answer(m.decode_reply(body)))

    def _claimed(self, message: wire.CreateActor, bearer: ActorNameRow | None) -> None:
        if bearer is None:
            self._broker.admit_actor(message)
        else:
            self._taken(message, bearer.actor, bearer.node)

    def _taken(self, message: wire.CreateActor, bearer: bytes, owner: bytes) -> None:
        """The name is another's. With get_if_exists that one's handle is wanted: have it here before the answer."""
        spec = message.spec

        def ready(found: ActorSpec | None) -> None:
            if found is None and spec.get_if_exists:  # it died meanwhile
                self.create(message)
            else:
                self._broker.tell(e.ActorNameTaken(spec, bearer, message.reply))

        if spec.get_if_exists:
            self._fetch(bearer, owner, ready)
        else:
            ready(None)

    def lookup(self, message: wire.LookupActor) -> None:
        """Who bears a name, anywhere?"""
        broker = self._broker
        if (message.namespace, message.name) in broker.scheduler.node.actors.names:
            broker.tell(e.ActorLookup(message.name, message.namespace, message.reply))
            return

        def found(row: ActorNameRow | None) -> None:
            if row is None or row.node == self._cluster.own:
                broker.tell(e.ActorLookup(message.name, message.namespace, message.reply))
            else:
                self._fetch(row.actor, row.node, answer)

        def answer(spec: ActorSpec | None) -> None:
            if spec is None:
                broker.tell(e.ActorLookup(message.name, message.namespace, message.reply))
            else:
                broker.performer.seal_reply(a.SealReply(message.reply, spec))

        self._find(message.namespace, message.name, found)

    def _fetch(self, actor: bytes, owner: bytes, ready: Callable[[ActorSpec | None], None]) -> None:
        """Have a handle of an actor here; `ready` gets what it is made of, None when the actor is dead."""
        if owner == self._cluster.own:
            record = self._broker.scheduler.node.actors.actors.get(actor)
            ready(None if record is None else record.spec)
            return

        def answer(message: pm.Adopted | pm.ActorIs | None) -> None:
            if not isinstance(message, pm.ActorIs) or message.spec is None:
                ready(None)
                return
            refs = self._sharing.borrow(owner, message.lent)
            self._handed_over.append((time.monotonic() + _HANDED_OVER_S, refs))
            ready(message.spec)

        self._ask(owner, lambda number: pm.AskActor(number, actor), answer)

    def _ask(
        self,
        node: bytes,
        question: Callable[[int], pm.PeerMessage],
        answer: Callable[[pm.Adopted | pm.ActorIs | None], None],
    ) -> None:
        if not self._cluster.knows(node):
            answer(None)
            return
        number = next(self._numbers)
        self._asked[number] = (node, answer)
        self._cluster.send(node, question(number))

    def _answered(self, node: bytes, message: pm.Adopted | pm.ActorIs) -> None:
        asked, answer = self._asked.pop(message.number, (b"", None))
        if answer is not None and asked == node:
            answer(message)

    def _asked_for(self, node: bytes, message: pm.AskActor) -> None:
        """Another node wants a handle of an actor of ours."""
        record = self._broker.scheduler.node.actors.actors.get(message.actor)
        life = None if record is None or record.ending else self._store.reference(message.actor)
        if record is None or life is None:
            self._cluster.send(node, pm.ActorIs(message.number, None, []))
        else:
            self._cluster.send(node, pm.ActorIs(message.number, record.spec, self._sharing.lend(node, [life])))

    def name_freed(self, namespace: str, name: str) -> None:
        """An actor of ours is dead, and its name free."""
        key = namespaced_key(namespace.encode(), name.encode())
        self._request(m.Delete(Table.ACTOR_NAMES, key), lambda reply: None)

    def list_names(self, namespace: str, answer: Callable[[list[tuple[str, str]]], None]) -> None:
        """All names, or those of a namespace."""

        def listed(reply: m.AnyReply) -> None:
            rows = reply.rows if isinstance(reply, m.Page) else []
            found = [decode_row(ActorNameRow, value) for _, value, _ in rows]
            answer([(row.namespace, row.name) for row in found if not namespace or row.namespace == namespace])

        self._request(m.List(Table.ACTOR_NAMES), listed)

    # -- detached actors ----------------------------------------------------------------------------------------------

    def _give_to_head(self, message: wire.CreateActor) -> None:
        """Let the head own a detached actor. Calls made here take the way to it from now on, behind the request."""
        spec, head = message.spec, self._cluster.head
        job = self._broker.job_specs[spec.job]
        self._broker.performer.expect_address(spec.creation.id, 0)
        shapes, lent = self._tasks.wrap(head, job.number, [spec.creation])
        if spec.creation.id not in self._sharing.lending.borrowed:
            self._sharing.lending.borrow(head, spec.creation.id)

        def answer(reply: pm.Adopted | pm.ActorIs | None) -> None:
            if isinstance(reply, pm.Adopted) and reply.bearer == spec.creation.id:
                if message.reply:
                    self._broker.performer.seal_reply(a.SealReply(message.reply, spec.creation.id))
            elif isinstance(reply, pm.Adopted):
                self._sharing.lending.done_with(spec.creation.id)
                self._taken(message, reply.bearer, reply.owner)
            elif message.reply:
                text = "The head, which was to own this detached actor, has died. Make it again when the head is back."
                error: tuple[str, dict[str, object]] = (
                    "ActorDiedError",
                    {"actor_id": spec.creation.id.hex(), "message": text},
                )
                self._broker.performer.seal_reply(a.SealReply(message.reply, None, error))

        home = self._tasks.home_of(job.number)
        self._ask(head, lambda number: pm.AdoptActor(number, job, home, shapes, spec, lent), answer)

    def _adopt(self, node: bytes, message: pm.AdoptActor) -> None:
        """Own a detached actor that another node was asked for."""
        broker, spec = self._broker, message.spec
        creation = spec.creation
        lent = self._tasks.unwrap(node, message)
        function = broker.shapes[creation.shape].function
        self._tasks.keep_function(message.job.number, function, lent)
        # Until it is known whether the name is free: the answer may have to wait for other nodes.
        kept = [self._store.put_life(creation.id, b""), *lent.values()]

        def claimed(bearer: ActorNameRow | None) -> None:
            if bearer is None:
                broker.performer.skip_incarnations(creation.id, 0)
                broker.records.actor_requested(spec)
                broker.tell(e.ActorRequested(FROM_AFAR, spec, broker._missing((function, *creation.deps)), b""))
                broker.performer.hold_for(spec)
                self._cluster.send(node, pm.Adopted(message.number, creation.id, self._cluster.own))
            else:
                self._cluster.send(node, pm.Adopted(message.number, bearer.actor, bearer.node))
            kept.clear()

        if spec.name:
            self._claim(spec, self._cluster.own, claimed)
        else:
            claimed(None)

    def tick(self, now: float) -> None:
        """Let go of handles that were taken long ago."""
        while self._handed_over and self._handed_over[0][0] <= now:
            self._handed_over.pop(0)
