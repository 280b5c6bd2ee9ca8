"""Tasks that wait for objects: until they exist anywhere, or (when the task runs here) until they are here.

Covers who waits for what, and who may go when objects appear. Does not cover looking into the store: the event that
brings a task says which of its arguments are missing, and `ObjectsReady` when they are there (or are errors: the
executor finds out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from zray.broker.actor_table import ActorRecord
    from zray.broker.task_table import TaskQueue
    from zray.task import TaskSpec


class Waiting:
    """A task, or an actor to be made, that lacks arguments."""

    __slots__ = ("actor", "fetching", "here", "left", "queue", "spec")

    def __init__(self, spec: TaskSpec, queue: TaskQueue | None, actor: ActorRecord | None, here: bool = True) -> None:
        self.spec = spec
        self.queue = queue
        """Where it goes when it lacks nothing; None for actors."""
        self.actor = actor
        self.here = here
        """Whether objects on other nodes are of no use to it."""
        self.fetching: bool = False
        """Whether it was placed here already, and only waits for values on their way from other nodes."""
        self.left: int = 0
        """Objects it lacks; FORGOTTEN when it no longer wants to be woken."""

    def __repr__(self) -> str:
        return f"<Waiting {self.spec.id.hex()[:12]} for {self.left}>"


FORGOTTEN: Final = -1


class Dependencies:
    """Who waits for which object. Invariant: each w with w.left > 0 stands in exactly w.left of the lists, once in
    each."""

    __slots__ = ("fetching", "waiters")

    def __init__(self) -> None:
        self.waiters: dict[bytes, list[Waiting]] = {}
        self.fetching: int = 0
        """Those of them that are `fetching`."""

    def add(self, waiting: Waiting, missing: tuple[bytes, ...]) -> None:
        """Let it wait for these objects; one that is named twice counts once."""
        if waiting.fetching:
            self.fetching += 1
        if len(missing) > 1:
            missing = tuple(dict.fromkeys(missing))
        waiting.left += len(missing)
        for object_id in missing:
            found = self.waiters.get(object_id)
            if found is None:
                self.waiters[object_id] = [waiting]
            else:
                found.append(waiting)

    def ready(self, object_id: bytes) -> list[Waiting]:
        """The object is there: return those that now lack nothing, in the order in which they came."""
        free = []
        for waiting in self.waiters.pop(object_id, ()):
            if waiting.left != FORGOTTEN:
                waiting.left -= 1
                if not waiting.left:
                    free.append(waiting)
                    if waiting.fetching:
                        self.fetching -= 1
        return free

    def made(self, object_id: bytes) -> list[Waiting]:
        """The object exists on another node: return those that now lack nothing, as `ready`. Who needs it here waits on."""
        waiters = self.waiters.get(object_id, ())
        if not any(not waiting.here for waiting in waiters):
            return []
        stay = [waiting for waiting in waiters if waiting.here]
        go = [waiting for waiting in waiters if not waiting.here]
        self.waiters[object_id] = go
        free = self.ready(object_id)
        if stay:
            self.waiters[object_id] = stay
        return free

    def forget(self, waiting: Waiting) -> None:
        """It waits no longer (cancelled, or its job ended). It leaves the lists when the objects appear: to search them
        would cost more."""
        if waiting.fetching and waiting.left != FORGOTTEN:
            self.fetching -= 1
        waiting.left = FORGOTTEN

    def sweep(self) -> None:
        """Drop the forgotten (after a job has ended, when they may be many)."""
        for object_id in list(self.waiters):
            left = [waiting for waiting in self.waiters[object_id] if waiting.left != FORGOTTEN]
            if left:
                self.waiters[object_id] = left
            else:
                del self.waiters[object_id]

    def watched(self) -> list[bytes]:
        """Objects that somebody waits for."""
        return list(self.waiters)

    def validate(self) -> dict[int, Waiting]:
        """Check counts against lists; return everyone who waits, by the identity of the record."""
        found: dict[int, tuple[Waiting, int]] = {}
        for object_id, waiters in self.waiters.items():
            assert waiters, f"nobody waits for {object_id.hex()}, but it is watched"
            for waiting in waiters:
                found[id(waiting)] = (waiting, found.get(id(waiting), (waiting, 0))[1] + 1)
        for waiting, count in found.values():
            assert waiting.left in (count, FORGOTTEN), f"{waiting} stands in {count} lists"
        fetching = sum(waiting.fetching for waiting, _ in found.values() if waiting.left != FORGOTTEN)
        assert fetching == self.fetching, f"{self.fetching} counted as fetching, {fetching} are"
        return {key: waiting for key, (waiting, _) in found.items() if waiting.left != FORGOTTEN}
