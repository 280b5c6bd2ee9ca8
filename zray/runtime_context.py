"""What a program can ask about where it runs: `zray.get_runtime_context()`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zray import placing, resources

if TYPE_CHECKING:
    from zray.session import Session


class RuntimeContext:
    """Ids (hexadecimal) and facts of the current driver, task or actor, as Ray Core names them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def namespace(self) -> str:
        return self._session.config.namespace

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor was restarted (its constructor ran more than once)."""
        return self._session.root.actor != b"" and self._session.root.attempt > 0

    @property
    def current_actor(self) -> Any:
        """A handle of the actor this code runs in. Raises RuntimeError elsewhere."""
        from zray import api

        return api.own_handle(self._session)

    def get_job_id(self) -> str:
        return self._session.config.job_id.hex()

    def get_node_id(self) -> str:
        return self._session.config.node.hex()

    def get_worker_id(self) -> str:
        return f"{self._session.config.node.hex()}{self._session.worker:08x}"

    def get_task_id(self) -> str | None:
        """Id of the running task; None in a driver."""
        context = self._session.current()
        return context.task.hex() if self._session.worker else None

    def get_task_name(self) -> str | None:
        return self._session.current().name or None

    def get_actor_id(self) -> str | None:
        """Id of the actor this code runs in; None elsewhere."""
        return self._session.root.actor.hex() or None

    def get_actor_name(self) -> str | None:
        from zray import api

        spec = api.own_actor_spec()
        return None if spec is None else spec.name

    def get_namespace(self) -> str:
        return self.namespace

    def get_assigned_resources(self) -> dict[str, float]:
        """Resources the running task or actor occupies."""
        packed = self._session.current().resources or self._session.root.resources
        return {name: amount / resources.UNIT for name, amount in resources.unpack(packed).items()} if packed else {}

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if self._session.worker else ""
        return {"GPU": [part for part in visible.split(",") if part]}

    def get_node_labels(self) -> dict[str, str]:
        """Labels of the node this code runs on."""
        from zray import api

        own = self.get_node_id()
        return next((dict(row["Labels"]) for row in api.nodes() if row["NodeID"] == own), {})

    def get_placement_group_id(self) -> str | None:
        """Id of the placement group the running task or actor is in; None when it is in none."""
        strategy = placing.unpack(self._session.current().strategy)
        return strategy.group.hex() if strategy.kind == placing.GROUP else None

    def get_pid(self) -> int:
        return os.getpid()

    def get_runtime_env_string(self) -> str:
        return "{}"

    @property
    def gcs_address(self) -> str:
        return self._session.config.directory

    def get(self) -> dict[str, Any]:
        """Job, node, task and actor ids as one dict."""
        return {
            "job_id": self.get_job_id(),
            "node_id": self.get_node_id(),
            "task_id": self.get_task_id(),
            "actor_id": self.get_actor_id(),
            "namespace": self.namespace,
        }
