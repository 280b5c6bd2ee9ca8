"""Who serves in an epoch: the chain from head to tail, and the council that decides what comes after.

Covers the record, which configuration may follow another, and which one somebody who misses replicas should propose. Does
not cover how one is decided (`council`).

Epochs are numbered 1, 2, 3 ...; each has at most one configuration, decided by the council of the epoch before. Rules of
succession, which make every acknowledged write survive (`chain` says why):

    new.epoch == old.epoch + 1
    replicas of both stand in the same order in both, and there is at least one
    new ones stand at the end, and there is at most one
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

MEMBERS: Final = 3
"""Of a council, as soon as so many are there: a majority of three outlives one of them."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A process that may serve: its id, and which life of it."""

    id: bytes
    life: int = 0
    """Another one after each start. Rows die with a process, votes need not: a replica is a life, a member of the council an id."""
    address: str = ""
    """host:port."""


class Configuration(msgspec.Struct, frozen=True, array_like=True):
    """Who serves in an epoch."""

    epoch: int
    chain: tuple[Place, ...]
    """Head first, tail last; the same place when there is only one."""
    council: tuple[Place, ...]
    """Who decides the configuration of the next epoch; compared by id."""

    @property
    def head(self) -> Place:
        """Where writes go in."""
        return self.chain[0]

    @property
    def tail(self) -> Place:
        """Where reads are answered."""
        return self.chain[-1]

    @property
    def majority(self) -> int:
        """How many members of the council decide."""
        return len(self.council) // 2 + 1

    def members(self) -> list[bytes]:
        """Ids of the council."""
        return [place.id for place in self.council]

    def everybody(self) -> list[Place]:
        """All processes that are named, each once, replicas first."""
        found = {place.id: place for place in self.council}
        found.update((place.id, place) for place in self.chain)
        replicas = [place.id for place in self.chain]
        return [found[name] for name in dict.fromkeys(replicas + self.members())]

    def position(self, place: Place) -> int:
        """Index of a life in the chain; -1: it is none of its replicas."""
        for index, other in enumerate(self.chain):
            if is_same_life(other, place):
                return index
        return -1


def is_same_life(one: Place, other: Place) -> bool:
    """Whether two places are the same process."""
    return one.id == other.id and one.life == other.life


def why_not_successor(old: Configuration, new: Configuration) -> str:
    """Return which rule of succession (module docstring) is broken; empty: none."""
    if new.epoch != old.epoch + 1:
        return f"epoch {new.epoch} does not follow epoch {old.epoch}"
    if not new.council or len(set(new.members())) != len(new.council):
        return "a council has members, each once"
    stayed = [index for index in (old.position(place) for place in new.chain) if index >= 0]
    if not stayed:
        return "no replica stays"
    if stayed != sorted(set(stayed)):
        return "replicas change their order"
    if len(new.chain) > len(stayed) + 1:
        return "more than one replica joins at a time"
    if len(new.chain) > len(stayed) and old.position(new.tail) >= 0:
        return "a new replica stands not at the end"
    return ""


def without(
    old: Configuration,
    missing_replicas: Collection[bytes],
    missing_members: Collection[bytes],
    joining: Place | None = None,
) -> Configuration | None:
    """Return what should follow `old`; None when no replica would be left.

    Args:
        old: what is decided.
        missing_replicas: ids of processes whose life in the chain has ended, or that are silent.
        missing_members: ids of processes that do not answer. A process that was started anew with its votes is a member of
            the council as before, and a replica no more.
        joining: a new replica, which has all rows.

    Members of the council that are missing are replaced as far as there are other replicas; when there are none, they stay: a
    council never shrinks, or two halves of a cluster could each shrink theirs. One of one member becomes one of three at once.
    """
    chain = tuple([place for place in old.chain if place.id not in missing_replicas])
    if not chain:
        return None
    if joining is not None:
        chain = (*chain, joining)
    able = {place.id: place for place in old.council if place.id not in missing_members}
    able.update((place.id, place) for place in chain if place.id not in missing_members)
    size = max(MEMBERS, len(old.council)) if len(able) >= MEMBERS else len(old.council)
    unable = [place for place in old.council if place.id not in able]
    return Configuration(old.epoch + 1, chain, tuple([*able.values(), *unable][:size]))


def is_same(one: Configuration, other: Configuration) -> bool:
    """Whether two configurations name the same processes for the same tasks, in whatever epoch."""
    return one.chain == other.chain and {place.id for place in one.council} == {place.id for place in other.council}
