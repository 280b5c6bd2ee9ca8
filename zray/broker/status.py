"""Answers about the state of a node: nodes, resources, tasks, actors, objects, counters. Reads, changes nothing."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import msgspec

from zray.broker.membership import NodeInfo
from zray.broker.peers import Peer
from zray.gcs.tables import ActorRow, EventRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.server import Broker


def answer(broker: Broker, what: str, argument: str) -> bytes:
    """Return the packed answer to a query; an unknown one is answered with {"error": ...}."""
    query = _QUERIES.get(what)
    value: Any = {"error": f"unknown query {what!r}"} if query is None else query(broker, argument)
    return msgspec.msgpack.encode(value)


def clients(broker: Broker, _: str) -> list[dict[str, Any]]:
    """The drivers that are connected from outside the cluster, but for this one: their gateway nodes."""
    if broker.cluster is None:
        return []
    return [_node(member.info, "", member.state.name, head=False) for member in broker.cluster.clients()]


def nodes(broker: Broker, _: str) -> list[dict[str, Any]]:
    """All nodes of the cluster, this one first, the dead ones last. Clients are no nodes to people: nothing runs there."""
    cluster = broker.cluster
    if cluster is None:
        own = NodeInfo(
            broker.node,
            "",
            socket.gethostname(),
            os.getpid(),
            dict(broker.config.resources),
            dict(broker.config.labels),
            "",
            "",
            broker.config.session,
        )
        return [_node(own, "127.0.0.1", "ALIVE")]
    found = [
        _node(member.info, _host(member.info), member.state.name, head=member.info.id == cluster.head)
        for member in cluster.present()
    ]
    for info, node, reason in cluster.dead():
        row = {"NodeID": node.hex()} if info is None else _node(info, _host(info), "DEAD")
        found.append({**row, "Alive": False, "state": "DEAD", "reason": reason})
    return found


def _node(info: NodeInfo, host: str, state: str, *, head: bool = True) -> dict[str, Any]:
    return {
        "NodeID": info.id.hex(),
        "Alive": state != "DEAD",
        "NodeManagerAddress": host,
        "NodeManagerHostname": info.hostname,
        "Resources": dict(info.resources),
        "Labels": dict(info.labels),
        "session": info.session,
        "broker_pid": info.pid,
        "address": info.address,
        "state": state,
        "is_head": head,
    }


def _host(info: NodeInfo) -> str:
    return info.address.rpartition(":")[0].strip("[]")


def cluster_resources(broker: Broker, _: str) -> dict[str, float]:
    if broker.cluster is None:
        return dict(broker.config.resources)
    return _sum([member.info.resources for member in broker.cluster.present()])


def available_resources(broker: Broker, _: str) -> dict[str, float]:
    if broker.cluster is None:
        return broker.scheduler.available()
    return _sum([member.load.available for member in broker.cluster.present()])


def _sum(amounts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in amounts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def statistics(broker: Broker, _: str) -> dict[str, Any]:
    found = dict(broker.store.statistics())
    found["malformed_frames"] = broker.malformed
    found["workers"] = len(broker.workers)
    found["jobs"] = len(broker.jobs)
    found["watched"] = len(broker.watched)
    found["tasks_queued"] = broker.scheduler.node.tasks.queued
    if broker.cluster is not None:
        found["refused_connections"] = broker.cluster.links.sockets.refused
        if broker.lanes is not None:
            found["refused_connections"] += broker.lanes.refused
        if broker.sharing is not None and broker.sharing.exchange.transfer.giver is not None:
            found["refused_connections"] += broker.sharing.exchange.transfer.giver.refused
        found["malformed_peer_frames"] = broker.cluster.links.malformed
        found["frames_not_passed"] = broker.cluster.links.not_passed
        found["clients"] = len(broker.cluster.clients())
    if broker.sharing is not None and broker.remote is not None:
        found.update(broker.sharing.statistics())
        found["guests"] = broker.remote.guests
        found["code_borrowed"] = broker.remote.code_borrowed
        found["bytes_sent"] = broker.sharing.exchange.transfer.sent_bytes
        found["bytes_received"] = broker.sharing.exchange.transfer.bulk.received_bytes
    return found


def workers(broker: Broker, _: str) -> list[dict[str, Any]]:
    return [{"worker": w.number, "pid": w.pid, "job": w.job, "actor": w.actor.hex()} for w in broker.workers.values()]


def objects(broker: Broker, _: str) -> list[dict[str, Any]]:
    names = ("FREE", "OPEN", "PENDING", "CLAIMED", "SEALED", "SPILLED", "ZOMBIE")
    return [
        {"object_id": row[0].hex(), "state": names[row[1]], "attempt": row[2], "size": row[3], "job": row[9]}
        for row in broker.store.walk()
    ]


def events(broker: Broker, _: str) -> list[tuple[float, str, str, str, str]]:
    rows = broker.records.gcs.rows(EventRow)
    return [(row.time, row.subject_table, row.subject.hex(), row.what, row.detail) for row in rows]


def tasks(broker: Broker, argument: str) -> list[dict[str, Any]]:
    """The newest tasks, at most as many as the argument says (1,000): live ones, then ended ones."""
    found = []
    for row in broker.records.gcs.tasks(limit=int(argument or 1000)):
        shape = broker.shapes.get(row.spec.shape) if row.spec is not None else None
        found.append(
            {
                "task_id": row.id.hex(),
                "name": shape.name if shape is not None else "",
                "job": row.job,
                "status": row.status,
                "worker": row.worker,
                "micros": row.micros,
                "ended": row.ended,
            }
        )
    return found


def books(broker: Broker, _: str) -> dict[str, list[str]]:
    """The scheduler's books, for people who look for what holds something up: where each unfinished task is, who may run it, who sent it."""
    node = broker.scheduler.node
    return {
        "tasks": [f"{task.hex()} {home!r}" for task, home in node.tasks.home.items()],
        "workers": [
            f"{worker!r} job {worker.job.number} has {[spec.id.hex() for spec in worker.handed]} "
            f"of which {worker.ghosts} do not count{' blocked' if worker.blocked else ''}"
            for worker in node.pool.workers.values()
        ],
        "waiting": [f"{name.hex()} {waiters}" for name, waiters in node.dependencies.waiters.items()],
        "nodes": [
            f"{type(place).__name__} {place.id.hex()[:8]} has {place.available_floats()}"
            + (f", said {place.reported}{', silent' if place.silent else ''}" if isinstance(place, Peer) else "")
            for place in node.nodes
        ],
        "guests": [] if broker.remote is None else broker.remote.describe(),
        "lanes": [] if broker.lanes is None else broker.lanes.describe(),
    }


def checkpoints(broker: Broker, _: str) -> dict[str, dict[str, Any]]:
    """Actors with checkpoints that this node owns or runs, by id: the log of each."""
    return {
        actor.hex(): {
            "class_name": record.spec.class_name,
            "every": log.every,
            "owner": broker.checkpoints._owner(record).hex() or broker.node.hex(),
            "checkpoints": log.checkpoints,
            "checkpoint_number": log.number,
            "logged": len(log.entries),
            "longest_log": log.longest,
            "log_bytes": log.bytes,
            "calls": log.last,
            "replayed": log.replayed,
        }
        for actor, record in broker.scheduler.node.actors.actors.items()
        if (log := record.log) is not None
    }


def actors(broker: Broker, _: str) -> list[dict[str, Any]]:
    return [
        {
            "actor_id": row.id.hex(),
            "class_name": row.class_name,
            "state": row.state.name,
            "name": row.name,
            "namespace": row.namespace,
            "pid": row.pid,
            "restarts": row.incarnation,
            "reason": row.reason,
        }
        for row in broker.records.gcs.rows(ActorRow)
    ]


def cluster(broker: Broker, _: str) -> dict[str, Any]:
    """The cluster this node belongs to: its id, how the head keeps its tables, whether the head can be reached."""
    found = broker.cluster
    if found is None:
        return {
            "id": "",
            "storage": "memory",
            "head": "",
            "is_head": True,
            "head_lost": "",
            "storage_failure": "",
            "is_stored": True,
            "replicas": [],
            "replicas_wanted": 1,
            "council": [],
            "epoch": 0,
        }
    serving = found.succession.serving
    return {
        "id": found.id.hex(),
        "storage": found.storage,
        "head": found.head.hex(),
        "is_head": found.is_head,
        "head_lost": found.watch.reason if found.watch.is_lost and not found.is_head else "",
        "storage_failure": broker.records.tables.storage_failure,
        "is_stored": broker.records.gcs.is_stored and broker.records.tables.is_stored,
        "replicas": [] if serving is None else [node.hex() for node, _ in serving.chain],
        "replicas_wanted": 1 if serving is None else serving.wanted,
        "council": [] if serving is None else [node.hex() for node, _ in serving.council],
        "epoch": found.succession.epoch,
    }


def check(broker: Broker, _: str) -> dict[str, str]:
    """Verify the invariants of the store and of the scheduler; {"error": first violation} or {}."""
    try:
        broker.store.check()
        broker.scheduler.validate()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def named_actors(broker: Broker, namespace: str) -> list[tuple[str, str]]:
    names = broker.scheduler.node.actors.names
    return [(space, name) for space, name in names if not namespace or space == namespace]


_QUERIES: dict[str, Callable[[Broker, str], Any]] = {
    "nodes": nodes,
    "clients": clients,
    "cluster_resources": cluster_resources,
    "available_resources": available_resources,
    "statistics": statistics,
    "workers": workers,
    "objects": objects,
    "events": events,
    "tasks": tasks,
    "actors": actors,
    "books": books,
    "checkpoints": checkpoints,
    "cluster": cluster,
    "check": check,
    "named_actors": named_actors,
}
