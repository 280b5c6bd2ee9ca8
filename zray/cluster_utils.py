"""Several nodes on one machine, for tests of programs that are to run on a cluster.

Each node is a broker with workers, a store and a runtime directory of its own; they speak over encrypted TCP on the loopback address, as
nodes on different machines do. The names are those of `ray.cluster_utils`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from zray import api, errors
from zray import node as nodes_

if TYPE_CHECKING:
    from types import TracebackType

_HOST = "127.0.0.1"


class ClusterNode:
    """A node that a `Cluster` has started."""

    def __init__(self, node: nodes_.Node) -> None:
        self._node = node
        self.node_id: str = node.record.node
        """In hex."""
        self.address: str = node.record.address
        """host:port."""
        self.pid: int = node.process.pid
        """Of its broker."""

    def kill(self) -> None:
        """End its broker at once (SIGKILL), as a crash of the machine would; its workers end with it."""
        self._node.process.kill()
        self._node.process.wait()

    def __repr__(self) -> str:
        return f"<ClusterNode {self.node_id[:8]} at {self.address}>"


class Cluster:
    """A cluster on this machine. Used in a `with` statement it is shut down at the end."""

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        node_timeout: float = 30.0,
        storage: str = "memory",
        head_grace: float | None = None,
        key_file: str = "",
        replicas: int = 1,
        **compatible: Any,
    ) -> None:
        """Begin a cluster.

        Args:
            initialize_head: start the head at once.
            connect: connect this process to it, too.
            head_node_args: of the head, as in `add_node`.
            node_timeout: seconds of silence after which a node counts as dead, or the head as lost.
            storage: where the head's tables survive it: "memory", "sqlite:PATH" or "redis://...".
            head_grace: seconds for which other nodes outlive the head; default: 60 with storage or replicas, else 0.
            key_file: where the cluster's key is, or shall be; default: beside an SQLite file, else a new one with each head.
            replicas: nodes that keep the head's tables: 3 for the first three; one of them becomes the head when the head dies.
            compatible: settings of Ray that have no effect here.
        """
        self.head_node: ClusterNode | None = None
        self.worker_nodes: list[ClusterNode] = []
        self._node_timeout = node_timeout
        self._storage = storage
        self._head_grace = head_grace
        self._replicas = replicas
        self._key = self._chosen_key = key_file
        self._last_address = ""
        """Of a head that was removed or killed, for the next one."""
        if initialize_head or connect:
            self.add_node(**(head_node_args or {}))
        if connect:
            self.connect()

    @property
    def address(self) -> str:
        """host:port of the head. ZrayUsageError when there is none yet."""
        return self._head().address

    def _head(self) -> ClusterNode:
        if self.head_node is None:
            raise errors.ZrayUsageError("the cluster has no node yet: call add_node()")
        return self.head_node

    def add_node(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        memory: int | None = None,
        resources: dict[str, float] | None = None,
        object_store_memory: int | None = None,
        labels: dict[str, str] | None = None,
        **compatible: Any,
    ) -> ClusterNode:
        """Start a node and wait until it belongs to the cluster; the first is the head.

        Args:
            num_cpus: CPUs that tasks may occupy there; default 1.
            num_gpus: GPUs; default none.
            memory: bytes of memory that tasks may ask for.
            resources: custom resources, name to amount.
            object_store_memory: bytes of its object store.
            labels: labels of the node.
            compatible: settings of Ray that have no effect here.

        Raises:
            ZraySystemError: it cannot be started.
        """
        settings = nodes_.NodeSettings(
            num_cpus=1 if num_cpus is None else num_cpus,
            num_gpus=num_gpus or 0,
            memory=memory,
            resources=dict(resources or {}),
            object_store_memory=object_store_memory,
            labels=dict(labels or {}),
        )
        head = self.head_node
        place = nodes_.ClusterSettings(
            _HOST,
            head="" if head is None else self._way_in().address,
            key_file=self._key,
            node_timeout=self._node_timeout,
            storage=self._storage if head is None else "memory",
            head_grace=self._head_grace if head is None else None,
            replicas=self._replicas if head is None else 1,
            port=int(self._last_address.rpartition(":")[2] or 0) if head is None else 0,
        )
        node = ClusterNode(nodes_.start(settings, os.getpid(), place))
        if head is None:
            self.head_node = node
            self._last_address = node.address
            self._key = node._node.record.key_file
        else:
            self.worker_nodes.append(node)
        return node

    def _way_in(self) -> ClusterNode:
        """A node that a newcomer may ask: the head, or with replicas any that lives, which knows the head."""
        running = [node for node in self.list_all_nodes() if node._node.process.poll() is None]
        return running[0] if running and self._replicas > 1 else self._head()

    def _key_file(self) -> str:
        return self._key

    def restart_head(self, **settings: Any) -> ClusterNode:
        """Start the head again, at the same address with the same key and storage, after it was killed (`head_node.kill()`). It is
        another node; those that are left come back to it.

        Args:
            settings: of the new head, as in `add_node`.

        Raises:
            ZraySystemError: it cannot be started; its storage is in use, perhaps, because the last one lives.
        """
        if self._replicas > 1:
            raise errors.ZrayUsageError("with replicas another node becomes the head by itself: call add_node()")
        if self.head_node is not None:
            self.head_node._node.stop(quiet=True)
            self.head_node = None
        return self.add_node(**settings)

    def list_all_nodes(self) -> list[ClusterNode]:
        """Return the nodes that were started and not removed, the head first."""
        return [*([] if self.head_node is None else [self.head_node]), *self.worker_nodes]

    def remove_node(self, node: ClusterNode, allow_graceful: bool = True) -> None:
        """End a node: in order, or (not allow_graceful) at once. The head can be removed last only."""
        if node is self.head_node:
            if self.worker_nodes:
                raise errors.ZrayUsageError("the head can be removed only when no other node is left")
            self.head_node = None
        else:
            self.worker_nodes.remove(node)
        if not allow_graceful:
            node.kill()
        node._node.stop(quiet=True)

    def connect(self, namespace: str | None = None, **settings: Any) -> api.SessionContext:
        """Connect this process to the cluster, by its head; as `zray.init(address=...)`."""
        return api.init(address=self.address, namespace=namespace, **settings)

    def wait_for_nodes(self, timeout: float = 30.0) -> None:
        """Wait until the connected node (the head, when this process is not connected) sees all nodes of this cluster alive, and no other.
        TimeoutError after `timeout` seconds."""
        wanted = {node.node_id for node in self.list_all_nodes()}
        deadline = time.monotonic() + timeout
        connected = api.is_initialized()
        if not connected:
            self.connect()
        try:
            while {row["NodeID"] for row in api.nodes() if row["Alive"]} != wanted:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not all of {len(wanted)} nodes were seen within {timeout:g} s: {api.nodes()}")
                time.sleep(0.01)
        finally:
            if not connected:
                api.shutdown()

    def shutdown(self) -> None:
        """Disconnect this process, if it is connected, and end all nodes."""
        if api.is_initialized():
            api.shutdown()
        for node in reversed(self.list_all_nodes()):
            node._node.stop(quiet=True)
        self.worker_nodes.clear()
        self.head_node = None
        self._key = self._chosen_key
        self._last_address = ""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
