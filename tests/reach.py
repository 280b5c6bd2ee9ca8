"""The ways by which a driver reaches a cluster: the same tests run over all of them.

Covers clusters whose `connect` goes a chosen way. Does not cover the relay that stands for a tunnel (`tests/tcp_relay.py`); a real tunnel by
ssh, from a place where no other way leads, is in `tests/integration/test_client.py`.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.helpers import query
from tests.tcp_relay import Relay
from zray import api
from zray.cluster_utils import Cluster

WAYS: Final = ("head", "tunnel", pytest.param("outside", marks=pytest.mark.soak))
MOSTLY_AT_HEAD: Final = ("head", *(pytest.param(way, marks=pytest.mark.soak) for way in ("tunnel", "outside")))
"""head: a driver on the head. tunnel: a client, to which one port is everything that it has of the cluster. outside: a client without a
tunnel (which differs so little that the long run is enough). Tests of actors go all ways in the long run only: that of tasks shows the way."""


class ReachedCluster(Cluster):
    """A cluster to which `connect` goes by one of the ways."""

    def __init__(self, way: str, **settings: Any) -> None:
        self._way = way
        self._tunnels: list[Relay] = []
        super().__init__(**settings)

    def connect(self, namespace: str | None = None, **settings: Any) -> api.SessionContext:
        """Connect this process to it."""
        if self._way == "head":
            return super().connect(namespace, **settings)
        context = api.init(
            address=self._address_outside(), cluster_key=self._key_file(), namespace=namespace, **settings
        )
        assert context["node_id"] not in {row["NodeID"] for row in api.nodes()}, "this is no client"
        assert query("workers") == []
        return context

    def _address_outside(self) -> str:
        host, _, port = self.address.rpartition(":")
        if self._way == "outside":
            assert host == "127.0.0.1"
            return f"localhost:{port}"  # another name than any node's record has
        self._tunnels.append(Relay(self.address))
        return self._tunnels[-1].address

    def shutdown(self) -> None:
        """As `Cluster.shutdown`; tunnels end last."""
        super().shutdown()
        for tunnel in self._tunnels:
            tunnel.close()
        self._tunnels.clear()
