"""zray.broker.links without sockets: which conversations there are."""

from __future__ import annotations

from zray.broker import peer_messages as pm
from zray.broker.links import Links

OWN, OTHER = (bytes([n]) * 16 for n in (1, 2))


class Sockets:
    """What leaves, and for whom."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def reaches(self, node: bytes) -> bool:
        return True

    def hang_up(self, node: bytes) -> None:
        """There is nothing to close."""

    def send(self, node: bytes, frame: bytes) -> bool:
        self.sent.append(node)
        return True


def test_the_dead_are_told_only_what_needs_no_answer() -> None:
    sockets, prober = Sockets(), object()
    links = Links(sockets, prober, OWN, client=False)  # type: ignore[arg-type]
    kept = pm.GiveBack([bytes(16)])
    links.send(OTHER, kept, 0.0)
    assert links.unacked_bytes(OTHER)
    links.bury(OTHER)
    sockets.sent.clear()
    links.send(OTHER, kept, 1.0)
    assert not links.unacked_bytes(OTHER)
    assert sockets.sent == []
    links.send(OTHER, pm.Rejected("it was silent for too long"), 1.0)
    assert sockets.sent == [OTHER]
