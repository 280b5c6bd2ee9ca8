"""How a cluster takes note of a node that is gone, in simulations of a few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.simulation.cluster_machine import Doors, Machine, Site
from zray.broker import peer_messages as pm
from zray.broker.cluster import Cluster
from zray.broker.membership import LOOK_S, SILENT_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NODE_TIMEOUT = 30.0
CUT_OFF_S = 10.0
"""Long after anybody looks at a port because a connection broke, and long before silence alone means death."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "logs").mkdir()
    site = Site(1, str(tmp_path), NODE_TIMEOUT)
    with Doors(site):
        yield site
    for machine in site.machines:
        machine.store.closed = True


def head_and_node(site: Site) -> tuple[Machine, Machine, Cluster]:
    """A head, a node, and what the head knows."""
    head, node = Machine(site, {"CPU": 1.0}), Machine(site, {"CPU": 1.0})
    head.start("")
    assert head.sockets is not None
    node.start(head.sockets.address)
    assert head.broker.cluster is not None
    return head, node, head.broker.cluster


def run_for(site: Site, seconds: float) -> None:
    end = site.world.now + seconds
    while site.world.heap[0][0] <= end:
        site.world.step()
    site.world.now = end


def test_a_node_that_ends_while_it_is_cut_off_is_dead_soon_after(site: Site) -> None:
    head, node, known = head_and_node(site)
    both_ways = [(head.id, node.id), (node.id, head.id)]
    site.network.block(both_ways)
    node.leave()
    run_for(site, CUT_OFF_S)
    assert node.id not in known.neighbours.dead, "it may be a cable that was pulled"
    site.network.heal(both_ways)
    run_for(site, 2 * LOOK_S)
    assert known.neighbours.dead[node.id].endswith("its port refuses connections")


def test_a_node_that_is_only_paused_is_not_dead(site: Site) -> None:
    _, node, known = head_and_node(site)
    node.pause()
    run_for(site, CUT_OFF_S)
    assert known.neighbours.members[node.id].state.name == "SILENT"
    node.resume()
    run_for(site, SILENT_S)
    assert known.neighbours.members[node.id].state.name == "ALIVE"


def test_no_conversation_begins_with_the_dead(site: Site) -> None:
    _, node, known = head_and_node(site)
    node.die("it was killed")
    run_for(site, 1.0)
    assert node.id in known.neighbours.dead
    known.send(node.id, pm.GiveBack([bytes(20)]))
    assert not known.links._links, "frames would be sent again and again, for ever"
