"""A twin of one node's shared store with everything that brokers of a cluster ask of it: references, lists, zombies, attempts, claims.

Covers what `zray._store.Store` does for a broker, under the same names and rules (`_store_core.h`), and what simulated drivers and workers
do with it. Does not cover memory, files and pins. References are Python objects that count when they are made and when they go, as the
originals do, so that whoever forgets one here leaks it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zray import _store, errors
from zray._store import STATE_CLAIMED, STATE_PENDING, STATE_SEALED, STATE_ZOMBIE, TargetGone, with_index

BROKER = 1
"""Handle of the broker's process."""


class Entry:
    """One object."""

    __slots__ = (
        "attempt",
        "before",
        "claimant",
        "count",
        "data",
        "flags",
        "id",
        "kind",
        "list",
        "maker",
        "marks",
        "spec",
        "state",
        "target",
        "wakes",
        "watched",
    )

    def __init__(self, object_id: bytes) -> None:
        self.id = object_id
        self.state = STATE_PENDING
        self.attempt = 0
        self.count = 0
        """References, wherever they are."""
        self.list: list[Ref] = []
        """What it keeps alive: arguments while it is pending, else what the value refers to."""
        self.data = b""
        self.kind = 0
        self.flags = 0
        self.spec: bytes | None = None
        self.target = 0
        self.claimant = 0
        self.maker = 0
        self.watched = False
        self.wakes: list[Callable[[], None]] = []
        self.marks = 0
        """MARK_REMOTE and the like: its value is made, or kept, on another node."""
        self.before = 0
        """State before it became a zombie."""


class Ref:
    """A reference: counts while it exists."""

    __slots__ = ("entry", "store")

    def __init__(self, store: SimStore, entry: Entry) -> None:
        self.store = store
        self.entry = entry
        entry.count += 1

    def __del__(self) -> None:
        self.store.released(self.entry)

    def binary(self) -> bytes:
        """The id."""
        return self.entry.id


class SimStore:
    """All objects of a node."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.zombies: dict[bytes, None] = {}
        self.living: set[int] = {BROKER}
        self.reaped: set[int] = set()
        self.entered: list[int] = []
        """All processes that ever were, but the broker."""
        self.words: dict[tuple[int, int], int] = {}
        self.closed = False
        self.on_reap: Callable[[int], None] = lambda process: None
        self.on_claim: Callable[[bytes, int], None] = lambda task, attempt: None
        """Told of every claim of a worker: task, attempt."""
        self.reply_handlers: dict[bytes, Callable[[], None]] = {}

    # -- references ----------------------------------------------------------------------------------------------------

    def reference(self, object_id: bytes) -> Ref | None:
        """Find an entry; a zombie lives again."""
        entry = self.entries.get(object_id)
        if entry is None:
            return None
        if entry.state == STATE_ZOMBIE:
            entry.state = entry.before
            del self.zombies[object_id]
        return Ref(self, entry)

    def released(self, entry: Entry) -> None:
        """A reference goes."""
        entry.count -= 1
        assert entry.count >= 0, f"{entry.id.hex()} was released too often"
        if not entry.count and not self.closed:
            self._unreferenced(entry)

    def _unreferenced(self, entry: Entry) -> None:
        if entry.state in (STATE_PENDING, STATE_CLAIMED) and not entry.marks & _store.MARK_REMOTE:
            return  # whoever makes it holds it
        if entry.flags & _store.FLAG_NOTIFY:
            entry.before, entry.state = entry.state, STATE_ZOMBIE
            self.zombies[entry.id] = None
        else:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        del self.entries[entry.id]
        entry.list = []

    def next_zombie(self) -> bytes | None:
        """Take out an entry that told of its last reference."""
        for object_id in self.zombies:
            del self.zombies[object_id]
            self._free(self.entries[object_id])
            return object_id
        return None

    def contained(self, ref: Ref) -> list[Ref]:
        """References to what a sealed value refers to."""
        return [Ref(self, held.entry) for held in ref.entry.list] if ref.entry.state == STATE_SEALED else []

    # -- making --------------------------------------------------------------------------------------------------------

    def expect(
        self,
        object_id: bytes,
        target: int,
        deps: list[Ref] | None,
        spec: bytes | None,
        site: str,
        flags: int = 0,
        maker: int = BROKER,
    ) -> Ref:
        """Make a pending entry; TargetGone when its maker has been reaped."""
        if target in self.reaped:
            raise TargetGone
        found = self.reference(object_id)
        if found is not None:
            return found
        entry = self.entries[object_id] = Entry(object_id)
        entry.target, entry.spec, entry.flags, entry.maker = target, spec, flags, maker
        entry.list = [Ref(self, ref.entry) for ref in deps or ()]
        return Ref(self, entry)

    def put_life(self, object_id: bytes, data: bytes) -> Ref:
        """An actor's life object."""
        found = self.reference(object_id)
        if found is None:
            entry = self.entries[object_id] = Entry(object_id)
            entry.flags = _store.FLAG_NOTIFY
            found = Ref(self, entry)
            self._seal(entry, data, 0, entry.flags, [])
        return found

    def put(self, object_id: bytes, data: bytes, refs: list[Ref]) -> Ref:
        """Create and seal at once."""
        entry = self.entries[object_id] = Entry(object_id)
        ref = Ref(self, entry)
        self._seal(entry, data, 0, 0, refs)
        return ref

    def claim(self, task: bytes, num_returns: int, attempt: int, process: int = BROKER) -> Any:
        """Become the one executor; None: refused."""
        entries = [self.entries.get(with_index(task, index + 1)) for index in range(max(1, num_returns))]
        for entry in entries:
            if entry is None or entry.state != STATE_PENDING or entry.attempt != attempt:
                return None
            if entry.marks & (_store.MARK_ELSEWHERE | _store.MARK_SENT):
                return None
        for entry in entries:
            assert entry is not None
            entry.state, entry.claimant = STATE_CLAIMED, process
        if process != BROKER:
            self.on_claim(task, attempt)
        return entries[0]

    # -- values on other nodes -----------------------------------------------------------------------------------------

    def elsewhere(self, ref: Ref, made: bool) -> bool | None:
        """A pending object is made on another node, or kept there: is it wanted here?"""
        entry = ref.entry
        if entry.state != STATE_PENDING:
            return None
        entry.list = []
        entry.spec = None
        entry.target = entry.claimant = entry.maker = 0
        entry.flags |= _store.FLAG_NOTIFY
        wanted = entry.marks & _store.MARK_WANTED
        entry.marks = wanted | _store.MARK_REMOTE | (_store.MARK_ELSEWHERE if made else 0)
        return bool(wanted)

    def send_away(self, ref: Ref) -> bool:
        """The task of a pending entry is sent to another node: nobody here may claim this attempt."""
        entry = ref.entry
        if entry.state != STATE_PENDING or entry.marks & _store.MARK_SENT:
            return False
        entry.marks |= _store.MARK_SENT
        return True

    def want(self, refs: list[Ref]) -> list[bytes]:
        """Somebody here waits for these: which must the broker be told of?"""
        found = []
        for ref in refs:
            entry = ref.entry
            if entry.state in (STATE_PENDING, STATE_CLAIMED) and not entry.marks & _store.MARK_WANTED:
                if entry.marks & _store.MARK_ELSEWHERE:
                    found.append(entry.id)
                entry.marks |= _store.MARK_WANTED
        return found

    def marks(self, ref: Ref) -> int:
        """MARK_ bits."""
        return ref.entry.marks

    def references(self, ref: Ref) -> int:
        """How many there are."""
        return ref.entry.count

    def seal(self, entry: Entry, attempt: int, process: int, data: bytes, kind: int, refs: list[Ref]) -> int:
        """As the claimant."""
        if entry.state != STATE_CLAIMED or entry.attempt != attempt or entry.claimant != process:
            return _store.STALE
        tell = entry.watched
        self._seal(entry, data, kind, entry.flags & _store.FLAG_NOTIFY, refs)
        return _store.TELL_BROKER if tell else _store.OK

    def _seal(self, entry: Entry, data: bytes, kind: int, flags: int, refs: list[Ref]) -> None:
        entry.state = STATE_SEALED
        entry.data, entry.kind, entry.flags = data, kind, flags
        entry.spec = None
        entry.target = entry.claimant = 0
        entry.watched = False
        entry.marks = 0
        entry.list = [Ref(self, ref.entry) for ref in refs]
        wakes, entry.wakes = entry.wakes, []
        for wake in wakes:
            wake()
        if not entry.count:
            self._unreferenced(entry)

    # -- the broker's decisions ----------------------------------------------------------------------------------------

    def retry(self, ref: Ref, target: int) -> int | None:
        """From pending, claimed or a system error to pending with the next attempt."""
        entry = ref.entry
        if entry.state == STATE_SEALED and not entry.flags & _store.FLAG_SYSTEM_ERROR:
            return None
        entry.state = STATE_PENDING
        entry.claimant = 0
        entry.target = target
        entry.marks &= _store.MARK_WANTED
        entry.attempt += 1
        return entry.attempt

    def retarget(self, ref: Ref, target: int) -> bool:
        """Change who must seal a pending entry."""
        if target in self.reaped:
            raise TargetGone
        if ref.entry.state != STATE_PENDING:
            return False
        ref.entry.target = target
        return True

    def seal_forced(self, ref: Ref, stream: bytes, kind: int, flags: int) -> bool:
        """Seal whatever the claim."""
        return self.seal_copy(ref, stream, kind, flags, [])

    def seal_copy(self, ref: Ref, data: Any, kind: int, flags: int, refs: list[Ref]) -> bool:
        """Seal with a value made elsewhere, whatever the claim."""
        entry = ref.entry
        if entry.state not in (STATE_PENDING, STATE_CLAIMED):
            return False
        entry.attempt += 1
        self._seal(entry, bytes(data), kind, flags | (entry.flags & _store.FLAG_NOTIFY), refs)
        return True

    def watch(self, object_id: bytes) -> bool | None:
        """True: the broker will be told; False: it is there; None: no such entry."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state == STATE_ZOMBIE:
            return None
        if entry.state == STATE_SEALED:
            return False
        entry.watched = True
        return True

    # -- reading -------------------------------------------------------------------------------------------------------

    def state(self, ref: Ref) -> int:
        """Of an entry."""
        return ref.entry.state

    def attempt(self, ref: Ref) -> int:
        """Of an entry."""
        return ref.entry.attempt

    def done(self, ref: Ref) -> bool:
        """Is it sealed?"""
        return ref.entry.state == STATE_SEALED

    def sealed(self, object_id: bytes) -> bool:
        """Is there a value, or an error?"""
        return self.entries[object_id].state == STATE_SEALED

    def describe(self, ref: Ref) -> tuple[int, int, int, int, int]:
        """(state, attempt, kind, flags, size)."""
        entry = ref.entry
        return entry.state, entry.attempt, entry.kind, entry.flags, len(entry.data)

    def read_inline(self, ref: Ref) -> tuple[int, int, bytes] | None:
        """(kind, flags, bytes) of a small value that refers to nothing."""
        entry = ref.entry
        if entry.state != STATE_SEALED or entry.list or len(entry.data) > _store.INLINE_MAX:
            return None
        return entry.kind, entry.flags, entry.data

    def makers(self, ref: Ref) -> tuple[int, int]:
        """(target, claimant)."""
        return ref.entry.target, ref.entry.claimant

    def walk(self) -> list[tuple[bytes, int]]:
        """All objects: id and state."""
        return [(entry.id, entry.state) for entry in self.entries.values()]

    def statistics(self) -> dict[str, int]:
        """Figures the broker looks at."""
        return {"capacity": 1 << 30, "high_water": 0, "committed": 0, "used": 0}

    # -- processes -----------------------------------------------------------------------------------------------------

    def register(self, kind: int) -> int:
        """The broker enters itself."""
        return BROKER

    def alive(self, process: int) -> bool:
        """Is that process there?"""
        return process in self.living

    def reap(self, process: int) -> bool:
        """Give back everything of a dead process; entries that it had claimed stay so."""
        if process in self.living or process in self.reaped:
            return False
        self.reaped.add(process)
        self.on_reap(process)
        return True

    def sweep(self) -> int:
        """Reap whoever is dead and was not reaped yet."""
        dead = [process for process in self.entered if process not in self.living and process not in self.reaped]
        for process in dead:
            self.reap(process)
        return len(dead)

    def expected(self, process: int) -> int:
        """Entries that this process must seal."""
        return sum(
            entry.target == process and entry.state in (STATE_PENDING, STATE_CLAIMED) for entry in self.entries.values()
        )

    def orphans(self, process: int) -> list[tuple[bytes, int, bytes | None, bool, bool]]:
        """What a dead process should have made."""
        found = []
        for entry in self.entries.values():
            claimed = entry.state == STATE_CLAIMED and entry.claimant == process
            targeted = entry.state in (STATE_PENDING, STATE_CLAIMED) and entry.target == process
            if claimed or targeted:
                found.append((entry.id, entry.attempt, entry.spec, claimed, targeted))
        return found

    def made_by(self, process: int) -> list[tuple[bytes, int, bytes | None, int]]:
        """Pending entries that a process made and nobody has claimed."""
        return [
            (entry.id, entry.attempt, entry.spec, entry.target)
            for entry in self.entries.values()
            if entry.state == STATE_PENDING and entry.maker == process
        ]

    def word(self, process: int, word: int) -> int:
        """Of a process record."""
        return self.words.get((process, word), 0)

    def set_word(self, process: int, word: int, value: int) -> None:
        """Of a process record."""
        self.words[process, word] = value

    def add_word(self, process: int, word: int, delta: int) -> int:
        """Of a process record."""
        self.words[process, word] = self.word(process, word) + delta
        return self.words[process, word]

    def global_word(self, word: int) -> int:
        """Of the segment."""
        return self.word(0, word)

    def add_global(self, word: int, delta: int) -> int:
        """Of the segment."""
        return self.add_word(0, word, delta)


class SimObjects:
    """`zray.object_store.ObjectStore` for a store that is never full."""

    def __init__(self, store: SimStore, spill_directory: str) -> None:
        self.store = store
        self.capacity = 1 << 30

    def readable(self, ref: Ref) -> bytes:
        """As `raw`."""
        return self.raw(ref)

    def raw(self, ref: Ref) -> bytes:
        """The packed bytes of a finished object."""
        if ref.entry.state != STATE_SEALED:
            raise errors.ObjectLostError.for_id(ref.binary(), "it has no value")
        return ref.entry.data

    def make_room(self, size: int) -> bool:
        """There always is."""
        return False

    def remove_stale_files(self) -> None:
        """There are none."""
