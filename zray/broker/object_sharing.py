"""Objects that several nodes know: lending references, learning where values are, having them brought, and making lost ones again.

Covers what a broker says to others about objects, and what it does when copies come, go, or are lost. Does not cover counts (`lending`), the book
of copies (`locations`), which tasks run again (`recovery`), which values deserve a second copy (`second_copies`), or moving bytes
(`object_exchange`).

An object of which this node has no value yet, and which nobody here makes, is an entry of the store like any other: pending, with the mark that
lets it go with its last reference (`Store.elsewhere`). There are two sorts:

    borrowed   another node named it in a message. It is asked for at once (`Want`): a small value comes by itself, of a large one its lender
               says where it is (`Located`), as soon as it exists.
    a result   of a task that was sent from here and has ended: small values come with the news of the end, large ones stay where they were made,
               on loan to this node for as long as the result is referenced here.

Values that are elsewhere come when somebody here wants them: a process that waits for them (the store tells, or `wire.Wanted`), or a task that was
placed here. Whoever gets a copy of a borrowed object tells its lender, which may then name it as a source.

Of large results that would take long to make again a second copy is brought here (`second_copies`), beside what anybody wants.

When the last copy of an object is gone, who borrowed it asks its lender again; the lender of all, the node whose task made it, runs that task
again, or seals an error. Until then nothing wakes who waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from zray import _store, errors, failures, ids, wire
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker import walk
from zray.broker.lending import Lending
from zray.broker.locations import Locations
from zray.broker.object_exchange import INLINE_BYTES, ObjectExchange
from zray.broker.recovery import Recovery, Rerun
from zray.broker.second_copies import Copy, Hold, SecondCopies

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from zray.broker import second_copies
    from zray.broker.cluster import Cluster
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef
    from zray.task import TaskSpec

_LINEAGE_SHARE: Final = 4
"""Specs and arguments that are kept to make values again may take 1/so much of what the store may."""


_COPIES_SHARE: Final = 8
"""Second copies may take 1/so much of the store."""
_CROWDED: Final = 0.75
"""When so much of the store is in use, there is no room for second copies."""
_NEWEST: Final = 0.2
"""Weight of the newest measurement in the average bandwidth."""


class ObjectSharing:
    """One broker's dealings in objects that other nodes know."""

    def __init__(self, broker: Broker, cluster: Cluster) -> None:
        self._broker = broker
        self._store = broker.store
        self._cluster = cluster
        self.exchange = ObjectExchange(broker, cluster, self)
        self.lending = Lending()
        self.locations = Locations(cluster.own)
        self.recovery = Recovery(broker.objects.capacity // _LINEAGE_SHARE)
        # Outside the cluster it may be a long way to the nodes, and the store is that of somebody's own machine.
        bound = 0.0 if cluster.is_client else broker.config.rebuild_s
        self.copies = SecondCopies(cluster.own, bound, broker.objects.capacity // _COPIES_SHARE)
        self._spares: dict[bytes, ObjectRef] = {}
        """References to second copies that are kept for what was made from them."""
        self._kept: dict[bytes, ObjectRef] = {}
        """References to what is lent."""
        self._asked: dict[bytes, set[bytes]] = {}
        """Objects that do not exist yet, and the nodes that want to hear of them."""
        self._debts: dict[bytes, list[bytes]] = {}
        """Results of tasks from here, and the nodes that keep a copy on loan."""
        self._held: dict[bytes, list[ObjectRef]] = {}
        """By task: arguments without lineage of tasks that may have to run again."""
        self._inputs: dict[bytes, list[ObjectRef]] = {}
        """By task that runs again: its arguments and results, until it has ended."""
        self._began: dict[bytes, float] = {}
        """Values that are being brought, and since when."""
        self._gathered: list[bytes] | None = None
        """Objects that have arrived and were not told of; None: each is told of at once."""
        self._given_up: list[bytes] = []
        """Objects that were on their way here a moment ago, when nobody seemed to want them."""

    # -- lending ------------------------------------------------------------------------------------------------------

    def lend(self, node: bytes, refs: Iterable[ObjectRef]) -> list[bytes]:
        """A message to `node` is about to name these objects: keep them. Returns their ids."""
        by_id = {ref.binary(): ref for ref in refs}
        for name in self.lending.lend(node, list(by_id)):
            self._kept[name] = by_id[name]
        return list(by_id)

    def given_back(self, node: bytes, objects: list[bytes]) -> None:
        """A node needs these no more. It has no copies of them, unless it keeps one on loan to this node."""
        for name in self.lending.given_back(node, objects):
            self._kept.pop(name, None)
            self._asked.pop(name, None)
            if name not in self.lending.borrowed and not self.locations.wanted(name):  # it may be on its way here
                self.exchange.transfer.forget(name)
        for name in objects:
            if node not in self.lending.lent.get(name, {}) and node not in self._debts.get(name, ()):
                self._no_copy_at(name, node, "it was given up there")

    def places_of(self, names: Iterable[bytes]) -> list[pm.Located]:
        """What to say of those of these objects that are large."""
        found = []
        for name in names:
            ref = self._kept.get(name)
            if ref is not None and isinstance(place := self._describe(ref), pm.Located):
                found.append(place)
        return found

    def borrow(self, node: bytes, objects: Collection[bytes], places: Iterable[pm.Located] = ()) -> list[ObjectRef]:
        """A message of `node` lends these, and says where some of them are: return references, and ask for the others that are not here."""
        if not objects:
            return []
        known = {place.id: place for place in places}
        refs, want, back = [], [], []
        for name in objects:
            ref = self._store.reference(name)
            if ref is None:
                ref = self._store.expect(name, 0, None, None, "")
                self._store.elsewhere(ref, False)
                self.lending.borrow(node, name)
                if name in known:
                    self.located(node, known[name], False)
                else:
                    want.append(name)
            else:
                back.append(name)
            refs.append(ref)
        if want:
            self._cluster.send(node, pm.Want(want))
        if back:
            self._cluster.send(node, pm.GiveBack(back))
        return refs

    def make_here(self, name: bytes) -> ObjectRef | None:
        """A task that makes this object is to run here: return its reference, None when it has no entry. If it was borrowed, it is not any
        more; what was known of its places is worthless."""
        ref = self._store.reference(name)
        if ref is not None and self._store.marks(ref) & _store.MARK_REMOTE:
            lender = self.lending.done_with(name)
            if lender is not None:
                self._cluster.send(lender, pm.GiveBack([name]))
            self.locations.forget(name)
            self._reopen(ref)
        return ref

    def unreferenced(self, name: bytes) -> bool:
        """The store tells that nothing here refers to an object any more; False when it is none of those that other nodes know."""
        lender = self.lending.done_with(name)
        debts = self._debts.pop(name, None)
        self.exchange.forget(name)
        self._began.pop(name, None)
        self.locations.forget(name)
        self.locations.found(name)
        if name in self.copies:
            self._perform(self.copies.freed(name))
        self._forget_tasks(self.recovery.unreferenced(name))
        if lender is not None:
            self._cluster.send(lender, pm.GiveBack([name]))
        for node in debts or ():
            self._cluster.send(node, pm.GiveBack([name]))
        return lender is not None or ids.index_of(name) != 0

    # -- telling others ---------------------------------------------------------------------------------------------------

    def _describe(self, ref: ObjectRef) -> pm.Value | pm.Located | pm.Lost | None:
        """What can be said of an object: its value when it is small, else where it is; None when it does not exist yet."""
        name = ref.binary()
        if self._store.done(ref):
            size = self.exchange.size(ref)
            if size <= INLINE_BYTES:
                return None
            attempt = self.locations.attempt(name) if name in self.locations else self._store.attempt(ref)
            return pm.Located(name, size, attempt, [self._cluster.own, *self.locations.sources(name)])
        if self.locations.elsewhere(name):
            return pm.Located(
                name, self.locations.size(name), self.locations.attempt(name), list(self.locations.sources(name))
            )
        return None

    def tell(self, node: bytes, ref: ObjectRef) -> None:
        """Tell a node of an object that exists."""
        self._cluster.send(node, self._describe(ref) or self.exchange.value(node, ref))

    def results(self, node: bytes, refs: Iterable[ObjectRef]) -> tuple[list[pm.Value], list[pm.Located]]:
        """The results of a task that `node` sent: (small values, large ones, which are kept for it here)."""
        values: list[pm.Value] = []
        kept: list[pm.Located] = []
        for ref in refs:
            tiny = self.exchange.tiny(ref)
            if tiny is not None:
                values.append(tiny)
                continue
            found = self._describe(ref)
            if isinstance(found, pm.Located):
                self.lend(node, [ref])
                kept.append(found)
                continue
            value = self.exchange.value(node, ref)
            if isinstance(value, pm.Lost):
                self._cluster.send(node, value)
            else:
                values.append(value)
        return values, kept

    def wanted(self, node: bytes, objects: list[bytes]) -> None:
        """A node wants to hear of these, now or as soon as they exist."""
        for name in objects:
            ref = self._kept.get(name)
            if ref is None:
                self._cluster.send(node, pm.Lost(name, "it was not lent to that node"))
            elif self._store.done(ref) or self.locations.elsewhere(name):
                self.tell(node, ref)
            else:
                self._asked.setdefault(name, set()).add(node)
                if self._store.watch(name) is True:
                    self._broker.watched[name] = None
                else:
                    self.sealed([name])

    def found(self, objects: Iterable[bytes]) -> None:
        """These are here; some may have been lost, and were made again by this node's own workers."""
        if self.locations.any_lost:
            for name in objects:
                self.locations.found(name)

    def sealed(self, objects: Iterable[bytes]) -> None:
        """These exist now."""
        if not self._asked:
            return
        for name in objects:
            for node in sorted(self._asked.pop(name, ())):
                ref = self._kept.get(name)
                if ref is not None:
                    self.tell(node, ref)

    def fetch_for(self, node: bytes, objects: list[bytes]) -> None:
        """A node asks for these values."""
        for name in objects:
            ref = self._store.reference(name)
            if ref is None or not self._store.done(ref):
                self._cluster.send(node, pm.NoCopy(name, "it is not there any more"))
                continue
            value = self.exchange.value(node, ref)
            if isinstance(value, pm.Lost):
                self._cluster.send(node, pm.NoCopy(name, value.reason))
                self._damaged(ref, value.reason)
            else:
                self._cluster.send(node, value)

    # -- where values are ---------------------------------------------------------------------------------------------------

    def located(self, node: bytes, place: pm.Located, on_loan: bool) -> None:
        """A large value exists on other nodes; `on_loan`: `node` keeps its copy for this one."""
        name = place.id
        ref = self._store.reference(name)
        if ref is None or self._store.done(ref):
            if on_loan:
                self._cluster.send(node, pm.GiveBack([name]))
            return
        known = False
        for source in place.sources:
            if source == self._cluster.own:
                # It was here, and was given up. When its loan has been renewed meanwhile, its return does not tell `node` so.
                self._cluster.send(node, pm.CopyAt(name, source, place.size, place.attempt, False))
            elif source not in self._cluster.neighbours.dead:
                known = self.locations.made_at(name, source, place.size, place.attempt) or known
        if on_loan:
            self._debts.setdefault(name, []).append(node)
        if not known:
            self._lost([name], "the nodes that had it are dead")
            return
        wanted = self._store.elsewhere(ref, True)
        self.sealed([name])
        self._broker.objects_made([name])
        if wanted:
            self._pull(name)

    def copy_at(self, node: bytes, message: pm.CopyAt) -> None:
        """A borrower says that some node has a copy now, or has none any more."""
        name = message.id
        ref = self._kept.get(name)
        if ref is None or message.node in self._cluster.neighbours.dead:
            return
        lender = self.lending.borrowed.get(name)
        if lender is not None:
            self._cluster.send(lender, message)
        if not message.there:
            self._no_copy_at(name, message.node, "it has none any more")
        elif self._store.done(ref) or name in self.locations:
            self.locations.made_at(name, message.node, message.size, message.attempt)
            if self._store.done(ref):
                self.locations.made_at(name, self._cluster.own, message.size, message.attempt)
            self._placed(name)

    def _no_copy_at(self, name: bytes, node: bytes, reason: str) -> None:
        lost = self.locations.dropped_at(name, node) and self._store.watch(name) is True
        self._placed(name)
        if lost:
            self._lost([name], reason)

    # -- having values brought ------------------------------------------------------------------------------------------------

    def want(self, objects: Iterable[bytes]) -> None:
        """Somebody here wants these, and the store says that they are elsewhere."""
        for name in objects:
            self._pull(name)

    def fetch(self, objects: Iterable[bytes]) -> None:
        """A task that is to run here needs these, wherever they are and whenever they exist."""
        for name in objects:
            ref = self._store.reference(name)
            if ref is not None and self._store.want([ref]):
                self._pull(name)

    def look_at_wants(self) -> None:
        """A process has died, perhaps before it could say what it wants: look what the store knows. (Others may wait for the same.)"""
        for name in self.locations.unwanted():
            ref = self._store.reference(name)
            if ref is not None and self._store.marks(ref) & _store.MARK_WANTED:
                self._pull(name)

    def _pull(self, name: bytes) -> None:
        if self.locations.want(name):
            self._bring(name)

    def _bring(self, name: bytes) -> None:
        self._began[name] = time.monotonic()
        self.exchange.pull(name, self.locations.sources(name), self.locations.size(name))

    def arrived(self, name: bytes) -> None:
        """A value from another node is sealed here now."""
        began = self._began.pop(name, None)
        if self._broker.walk is not None:
            sources = " ".join(node.hex() for node in self.locations.sources(name))
            self._broker.walk.note("objects", name, walk.COPIED, sources)
        if name in self.locations:
            if began is not None:
                self._measure(self.locations.size(name) / max(time.monotonic() - began, 1e-6))
            size, attempt = self.locations.size(name), self.locations.attempt(name)
            self.locations.made_at(name, self._cluster.own, size, attempt)
            lender = self.lending.borrowed.get(name)
            if lender is not None:
                self._cluster.send(lender, pm.CopyAt(name, self._cluster.own, size, attempt, True))
        self._placed(name)
        self.locations.found(name)
        if self._gathered is None:
            self._broker.objects_there([name])
        else:
            self._gathered.append(name)

    def gather(self) -> None:
        """Tell of what arrives from now on all at once, in `tell_gathered`: much comes in one message."""
        self._gathered = []

    def tell_gathered(self) -> None:
        """Tell of what has arrived since `gather`."""
        found, self._gathered = self._gathered, None
        if found:
            self._broker.objects_there(found)

    def _measure(self, bandwidth: float) -> None:
        """A value came at so many bytes a second: the scheduler estimates from it what it costs to bring others."""
        node = self._broker.scheduler.node
        node.bandwidth += (bandwidth - node.bandwidth) * _NEWEST

    def not_brought(self, name: bytes, nodes: Iterable[bytes], reason: str) -> None:
        """A value did not come: these nodes do not have it, or what they sent is damaged. Others are asked, if there are any."""
        ref = self._store.reference(name)
        if ref is None:
            return
        self.locations.want_no_more(name)
        attempt, size = self.locations.attempt(name), self.locations.size(name)
        lender = self.lending.borrowed.get(name)
        for node in nodes:
            if lender is not None:
                self._cluster.send(lender, pm.CopyAt(name, node, size, attempt, False))
            debts = self._debts.get(name)
            if debts is not None and node in debts:
                debts.remove(node)
                self._cluster.send(node, pm.GiveBack([name]))
            self.locations.dropped_at(name, node)
        if self._store.done(ref):
            return
        if self.locations.elsewhere(name):
            self._store.elsewhere(ref, True)
            self._pull(name)
            self._placed(name)
        else:
            self._placed(name)
            self._lost([name], reason)

    def look_for_unwanted(self) -> None:
        """Give up what is on its way here and nobody refers to any more. Should somebody have come to want it just then, it is brought all the same."""
        for name in self._given_up:
            ref = self._store.reference(name)
            if ref is not None and self._store.references(ref) > 1 and self._store.marks(ref) & _store.MARK_WANTED:
                self._pull(name)
        self._given_up = self.exchange.give_up_unwanted()
        for name in self._given_up:
            ref = self._store.reference(name)
            self.locations.want_no_more(name)
            if ref is not None and self.locations.elsewhere(name):
                self._store.elsewhere(ref, True)
            self._placed(name)
        if self._spares and not self._has_room(0):
            self._perform(self.copies.crowded())

    def no_room(self, name: bytes, error: Exception) -> None:
        """A value cannot be brought: there is no room for it."""
        self.locations.want_no_more(name)
        if not self._stays_there(name):
            self._fail(name, error)
        self._placed(name)

    def _stays_there(self, name: bytes) -> bool:
        """Whether a value that could not be brought here was a second copy that nobody waits for."""
        ref = self._store.reference(name)
        if ref is None or not self.copies.ours(name):
            return False
        self._store.retry(ref, 0)  # pending again, not being filled
        return self._store.elsewhere(ref, True) is False

    # -- second copies ---------------------------------------------------------------------------------------------------------

    def _perform(self, actions: Iterable[second_copies.Action]) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            name = action.object
            if isinstance(action, Copy):
                todo.extend(self._copy_here(name))
            elif isinstance(action, Hold):
                ref = self._store.reference(name)
                if ref is not None:
                    self._spares[name] = ref
            else:
                self._spares.pop(name, None)

    def _copy_here(self, name: bytes) -> list[second_copies.Action]:
        """Bring a second copy, unless the value is about to go or somebody would have to make room. Nothing here is marked as wanting it."""
        ref = self._store.reference(name)
        if ref is not None and self._store.references(ref) > 1 and self._has_room(self.locations.size(name)):
            if self.locations.want(name, True):
                self._bring(name)
            if self.locations.wanted(name):
                return []
        return self.copies.placed(name, self._places(name))

    def _has_room(self, size: int) -> bool:
        return self._store.statistics()["used"] + size <= _CROWDED * self._broker.objects.capacity

    def _places(self, name: bytes) -> tuple[bytes, ...]:
        """The nodes that have a value."""
        ref = self._store.reference(name)
        here = (self._cluster.own,) if ref is not None and self._store.done(ref) else ()
        return (*here, *self.locations.sources(name))

    def _placed(self, name: bytes) -> None:
        """A copy of a value has come or gone, or did not come."""
        if name in self.copies:
            self._perform(self.copies.placed(name, self._places(name), self.locations.wanted(name)))

    def _is_here(self, name: bytes) -> bool:
        ref = self._store.reference(name)
        return ref is not None and self._store.done(ref)

    # -- losing and making again -------------------------------------------------------------------------------------------------

    def _damaged(self, ref: ObjectRef, reason: str) -> None:
        """The value of an object that this node has cannot be read any more. It stays an object whose reading fails; others ask elsewhere."""
        self.locations.dropped_at(ref.binary(), self._cluster.own)
        self._placed(ref.binary())

    def _lost(self, names: list[bytes], reason: str) -> None:
        """No copy is known of these, which are pending here."""
        own: list[bytes] = []
        for name in names:
            if name in self.lending.borrowed:
                self._ask_again([name])
            else:
                own.append(name)
        if own:
            for name in own:
                self.locations.lose(name)
            self._broker.tell(e.ObjectsLost(own))
            self._recover(own, reason)

    def _ask_again(self, names: list[bytes]) -> None:
        """What was known of the places of these is worthless: ask who lent them."""
        for name in names:
            ref = self._store.reference(name)
            lender = self.lending.borrowed.get(name)
            if ref is None or lender is None:
                continue
            self._reopen(ref)
            self._store.elsewhere(ref, False)
            self._cluster.send(lender, pm.Want([name]))

    def _reopen(self, ref: ObjectRef) -> int | None:
        """Make an object pending without any mark but that somebody wants it; return its attempt. A copy that is on its way here is of an older
        one: nothing that becomes of it matters."""
        self.exchange.forget(ref.binary())
        return self._store.retry(ref, 0)

    def _recover(self, names: list[bytes], reason: str) -> None:
        """Make own objects again, or seal why that cannot be."""
        plan = self.recovery.lost(names, self._exists)
        for rerun in [action for action in plan if isinstance(action, Rerun)]:
            self._prepare(rerun)
        for action in plan:
            if isinstance(action, Rerun):
                self._submit(action)
            else:
                text = f"{reason}; {action.reason}"
                self._fail(action.object, getattr(errors, action.kind).for_id(action.object, text))

    def _exists(self, name: bytes) -> bool:
        """Whether a value is somewhere, or is being made."""
        return not self.locations.lost(name) and self._store.watch(name) is not None

    def _prepare(self, action: Rerun) -> None:
        """Make the lost results of a task pending again, of its next attempt; those that are still here, or elsewhere, stay."""
        spec = action.task
        names = [ids.return_id(spec.id, index) for index in range(action.num_returns)]
        refs = [self._store.expect(name, 0, None, None, "") for name in names]
        lost = [
            ref
            for name, ref in zip(names, refs, strict=True)
            if not self._store.done(ref) and not self.locations.elsewhere(name)
        ]
        spec.attempt = max([spec.attempt + 1, *(self._reopen(ref) or 0 for ref in lost)])
        for ref in lost:
            while self._store.attempt(ref) < spec.attempt and self._reopen(ref) is not None:
                pass
        self._inputs[spec.id] = refs

    def _submit(self, action: Rerun) -> None:
        spec = action.task
        arguments = (*spec.deps, *spec.borrowed)
        self._inputs[spec.id] += [ref for name in arguments if (ref := self._store.reference(name)) is not None]
        self._broker.submit_again(action.job, spec)

    def sent(self, spec: TaskSpec, job: int) -> None:
        """A task is about to be sent to another node: remember how to run it again."""
        shape = self._broker.shapes[spec.shape]
        hold, forgotten = self.recovery.sent(spec, job, shape.num_returns, shape.max_retries, shape.name, self._size_of)
        if hold:
            self._held[spec.id] = [ref for name in hold if (ref := self._store.reference(name)) is not None]
        self._forget_tasks(forgotten)
        if spec.deps or spec.borrowed:
            self._perform(
                self.copies.sent(spec.id, (*spec.deps, *spec.borrowed), self.recovery.__contains__, self._is_here)
            )

    def _size_of(self, name: bytes) -> int:
        ref = self._store.reference(name)
        return self._store.describe(ref)[4] if ref is not None and self._store.done(ref) else 0

    def tasks_ended(self, tasks: list[bytes], kept: Mapping[bytes, Iterable[bytes]], micros: list[int]) -> None:
        """Tasks that were sent away, or were run again, have ended after so many microseconds; `kept`: by task, results that stay elsewhere."""
        forgotten: list[bytes] = []
        for task, ran in zip(tasks, micros, strict=True):
            if task in self._inputs:
                del self._inputs[task]
            if task not in self.recovery:
                continue
            live = [name for name in kept[task] if name in self._debts] if task in kept else []
            forgotten += self.recovery.ended(task, live)
            if task in self.recovery:
                places = {name: (self.locations.size(name), self.locations.sources(name)) for name in live}
                speed = self._broker.scheduler.node.bandwidth
                self._perform(self.copies.ended(task, ran / 1e6, places, speed))
        self._forget_tasks(forgotten)

    def ended_here(self, tasks: list[bytes], statuses: bytes, micros: list[int]) -> None:
        """Tasks have ended on workers of this node; some may have been sent away before, or are run again."""
        for index, task in enumerate(tasks):
            if task in self.recovery and statuses[index] not in (wire.DONE_SKIPPED, wire.DONE_RETRY):
                self.found([ref.binary() for ref in self._inputs.get(task, ()) if self._store.done(ref)])
                self.tasks_ended([task], {}, [micros[index]])

    def job_over(self, job: int) -> None:
        """The driver of a job has ended: nothing of it is made again."""
        self._forget_tasks(self.recovery.job_over(job))

    def _forget_tasks(self, tasks: list[bytes]) -> None:
        if self._held:
            for task in tasks:
                self._held.pop(task, None)
        if tasks and len(self.copies):
            self._perform(self.copies.forgotten(tasks))

    # -- failing ----------------------------------------------------------------------------------------------------------------

    def lost_at_lender(self, message: pm.Lost) -> None:
        """The lender has no value, and will have none."""
        self._fail(message.id, errors.ObjectLostError.for_id(message.id, message.reason))

    def _fail(self, name: bytes, error: Exception) -> None:
        ref = self._store.reference(name)
        if ref is not None and not self._store.done(ref):
            data = failures.dump(failures.from_error(error))
            self._broker.performer.seal_failure(ref, data)
        self.locations.forget(name)
        self.locations.found(name)
        self._broker.objects_there([name])

    # -- deaths -----------------------------------------------------------------------------------------------------------------

    def mark_lost(self, node: bytes) -> list[bytes]:
        """A node is dead: return what is lost with it, which nothing is to be handed for from now on. `node_gone` follows."""
        lost = []
        for name in self.locations.node_gone(node):
            if self._store.watch(name) is True:
                lost.append(name)
                if name not in self.lending.borrowed:
                    self.locations.lose(name)
        self._perform(self.copies.node_gone(node))
        return lost

    def node_gone(self, node: bytes, reason: str, lost: list[bytes]) -> None:
        """A node is dead: what was lent to it is free; what it owned and has not sent is lost; what it had copies of comes from others, or is
        made again."""
        free, orphans = self.lending.node_gone(node)
        for name in free:
            self._kept.pop(name, None)
            self._asked.pop(name, None)
        for nodes in self._asked.values():
            nodes.discard(node)
        for name in [name for name, lenders in self._debts.items() if node in lenders]:
            self._debts[name] = [lender for lender in self._debts[name] if lender != node]
        orphaned = set(orphans)
        for name in orphans:
            ref = self._store.reference(name)
            if ref is not None and not self._store.done(ref):
                self.exchange.forget(name)
                self._fail(name, errors.OwnerDiedError.for_id(name, f"the node that had it is dead: {reason}"))
        self.exchange.node_gone(node, reason)
        again = [name for name in lost if name not in orphaned and self._store.watch(name) is True]
        if again:
            self._lost(again, f"node {node.hex()[:8]}, which had it, is dead: {reason}")

    def validate(self) -> None:
        """Check the books; AssertionError names what does not hold."""
        self.locations.validate()
        self.recovery.validate()
        self.copies.validate()
        assert self._kept.keys() == self.lending.lent.keys(), "what is kept is not what is lent"

    def statistics(self) -> dict[str, int]:
        """Return counts for people and tests: nothing of this is left when nothing is referenced."""
        return {
            "objects_borrowed": len(self.lending.borrowed),
            "objects_lent": len(self.lending.lent),
            "objects_elsewhere": len(self.locations),
            "objects_kept_elsewhere": len(self._debts),
            "lineage_tasks": len(self.recovery),
            "lineage_bytes": self.recovery.bytes,
            "lineage_reruns": self.recovery.reruns,
            "second_copies": self.copies.copies,
            "second_copies_held": len(self._spares),
        }
