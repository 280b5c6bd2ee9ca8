"""Who was lent which object, and by whom: references that cross nodes.

Covers counts only. Does not cover values (`object_exchange` moves them) or references within a node (the store counts
those).

A message that names objects *lends* each of them to its receiver, once per naming. The lender keeps an object as long as

    lent(node, object) == times it was named to that node - times that node gave it back  >  0

for some node. A receiver that has the object already gives it back at once; else it *borrows*: it makes an entry that stands
for the object, gets the value from the lender, and gives the object back when nothing on that node refers to it any more. So
a node owes each object at most once to at most one lender, however many it heard of it from; and since counts are of
namings, it does not matter in which order messages and returns cross.
"""

from __future__ import annotations


class Lending:
    """One node's loans, both ways."""

    __slots__ = ("borrowed", "lent")

    def __init__(self) -> None:
        self.lent: dict[bytes, dict[bytes, int]] = {}
        """object -> node -> count, never 0."""
        self.borrowed: dict[bytes, bytes] = {}
        """object -> lender."""

    # -- as the lender -------------------------------------------------------------------------------------------------

    def lend(self, node: bytes, objects: list[bytes]) -> list[bytes]:
        """A message to `node` names these; return those that were lent to nobody before: they must be kept from now on."""
        fresh = []
        for name in objects:
            nodes = self.lent.get(name)
            if nodes is None:
                nodes = self.lent[name] = {}
                fresh.append(name)
            nodes[node] = nodes.get(node, 0) + 1
        return fresh

    def given_back(self, node: bytes, objects: list[bytes]) -> list[bytes]:
        """`node` gives these back, each as often as it is named; return those that nobody has any more. What was not lent is ignored."""
        free = []
        for name in objects:
            nodes = self.lent.get(name, {})
            count = nodes.get(node, 0)
            if count > 1:
                nodes[node] = count - 1
            elif count:
                del nodes[node]
                if not nodes:
                    del self.lent[name]
                    free.append(name)
        return free

    # -- as the borrower -----------------------------------------------------------------------------------------------

    def borrow(self, node: bytes, name: bytes) -> None:
        """This node makes an entry for an object that `node` has lent to it."""
        assert name not in self.borrowed, f"{name.hex()} is borrowed twice"
        self.borrowed[name] = node

    def done_with(self, name: bytes) -> bytes | None:
        """Nothing here refers to an object any more: return to whom it is to be given back (None: it was not borrowed)."""
        return self.borrowed.pop(name, None)

    # -- deaths --------------------------------------------------------------------------------------------------------

    def node_gone(self, node: bytes) -> tuple[list[bytes], list[bytes]]:
        """A node is dead: return (objects lent to nobody any more, objects borrowed from it)."""
        free = []
        for name in [name for name, nodes in self.lent.items() if node in nodes]:
            del self.lent[name][node]
            if not self.lent[name]:
                del self.lent[name]
                free.append(name)
        orphans = [name for name, lender in self.borrowed.items() if lender == node]
        for name in orphans:
            del self.borrowed[name]
        return free, orphans
