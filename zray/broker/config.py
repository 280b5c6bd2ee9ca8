"""What a broker is told when it is started."""

from __future__ import annotations

from typing import Final

import msgspec

REBUILD_S: Final = 0.5
"""Default of `BrokerConfig.rebuild_s`."""


class ClusterConfig(msgspec.Struct, frozen=True):
    """A node's place in a cluster."""

    host: str
    """Address to listen on, which is also where other nodes find it. Empty: it does not listen, has no workers, and speaks to the head only (it
    connects a driver outside the cluster)."""
    port: int
    """0: any free one."""
    head: str
    """host:port of the head; empty: this node is the head."""
    key_file: str
    """Holds the key that all nodes share (`zray.peer_transport.ClusterKey`)."""
    version: str
    """Of zray."""
    node_timeout: float
    """Seconds of silence after which a node counts as dead, or the head as lost."""
    storage: str = "memory"
    """Head: where its control store keeps rows (`zray.gcs.storage.open_storage`)."""
    head_grace: float = 0.0
    """Head: seconds for which the other nodes outlive it."""
    replicas: int = 1
    """Head: nodes that keep its control store's tables, itself among them. 1: it alone; else one of the others becomes the head when it dies."""
    serves_one: bool = False
    """It is the scheduler of one driver's job: it has no workers, and ends with the driver."""


class BrokerConfig(msgspec.Struct, frozen=True):
    """One frozen record instead of many parameters; travels as JSON on the broker's standard input."""

    directory: str
    """Runtime directory of the session (0700)."""
    spill_directory: str
    session: str
    """Name of the session, for people."""
    node: str
    """Node id in hex."""
    driver_pid: int
    """The driver that started the session: the node ends with it. 0: the node ends when told."""
    ready_fd: int
    resources: dict[str, float]
    labels: dict[str, str]
    store_capacity: int
    """Bytes."""
    max_objects: int
    preload: list[str]
    """Modules the fork parent imports once for all workers."""
    gcs_shards: int = 4
    log_to_driver: bool = True
    cluster_may_grow: bool = False
    """Requests that this node can never satisfy wait (for nodes that may join) instead of failing."""
    python: str = ""
    cluster: ClusterConfig | None = None
    """None: one machine, and no TCP port."""
    trace: bool = False
    """Note the walk of tasks through the cluster as events (`zray.broker.walk`)."""
    first_directory: str = ""
    """It was a head that was replaced, and comes back (`zray.broker.comeback`): directory of its first session, which holds its log. Nobody has
    started it, so it claims its directory and makes itself known."""
    rebuild_s: float = REBUILD_S
    """Values of this node's tasks that would take longer to make again get a second copy (`zray.broker.second_copies`); 0: none does."""
    options: dict[str, object] = {}
    """Rarer settings (`_system_config`)."""
