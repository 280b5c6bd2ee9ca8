"""What a host needs next so that the cluster is as its file says: facts in, one step out.

Pure. The runner performs the step, looks again and asks again, until the answer is `Finished` or `Refused`; so a host that needs nothing is
left alone, and one that was half done is finished:

    facts -> refused?  wrong Python, unusable directory, ...                                                  -> Refused
          -> a node runs: of this cluster (head's address, key, and alive there)?  yes                        -> Finished
                                                                                   no                         -> End, look again
          -> something else of it runs (a node that has no record, a job of an ended node)                    -> End, look again
          -> zray is to be installed and is not, or other wheels                                              -> Install, look again
          -> no zray, another version than the head's, port taken                                             -> Refused
          -> (a worker) the head does not run yet                                                             -> AwaitHead
          -> otherwise                                                                                        -> Start, look again

No step is taken twice for one host: one that did not help the first time is a failure.

With replicas the cluster may have gone on under another head than the file's: then that one is the head, and the file's head a worker.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray.launcher.facts import HostFacts, join_address, minor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.launcher.config import ClusterFile, Host

OLDEST_PYTHON: Final = (3, 10)


class Install(msgspec.Struct, frozen=True):
    """Install what the file names."""


class End(msgspec.Struct, frozen=True):
    """End what runs there of this cluster, which is of no use."""

    reason: str


class AwaitHead(msgspec.Struct, frozen=True):
    """Wait until the head runs."""


class Start(msgspec.Struct, frozen=True):
    """Start a node."""

    arguments: tuple[str, ...]
    """Of `zray start`."""
    settings: str
    """Digest of what was asked for."""


class Finished(msgspec.Struct, frozen=True):
    """The node runs as it should."""

    address: str
    note: str = ""
    """What differs from the file without being wrong."""


class Refused(msgspec.Struct, frozen=True):
    """Nothing can be done, and this is why."""

    column: str
    """Of the table of hosts, where it belongs."""
    reason: str


Step = Install | End | AwaitHead | Start | Finished | Refused


class HeadView(msgspec.Struct, frozen=True):
    """What others need to know of the head that runs."""

    address: str
    """host:port."""
    fingerprint: str
    zray: str
    python: str
    alive: frozenset[str]
    """Ids of nodes that belong to its cluster."""
    node: str = ""
    """Its own id."""


def living(rows: Iterable[dict[str, Any]]) -> frozenset[str]:
    """Return the ids of nodes that are not dead, of what `zray status --json` tells of nodes."""
    return frozenset(row["NodeID"] for row in rows if row["state"] != "DEAD")


def surviving(facts: HostFacts, found: dict[str, Any]) -> HeadView | None:
    """Return the head that a host's node has now, which with replicas need not be the file's.

    Args:
        facts: of a host on which a node runs.
        found: what `zray status --json` prints there.

    Returns:
        None: nobody leads its cluster now.
    """
    assert facts.node is not None
    head = next((row for row in found["nodes"] if row.get("is_head") and row["state"] == "ALIVE"), None)
    if head is None or found["cluster"]["head_lost"]:
        return None
    alive = living(found["nodes"])
    return HeadView(head["address"], facts.node.fingerprint, facts.zray, facts.python, alive, head["NodeID"])


def settings_digest(cluster: ClusterFile, host: Host) -> str:
    """Return a digest of all that a node is started with."""
    fields = msgspec.structs.asdict(host)
    kept = {key: value for key, value in fields.items() if key not in ("name", "destination", "ssh_options")}
    own = _head_arguments(cluster) if host.name == cluster.head else []
    return hashlib.sha256(json.dumps([kept, cluster.node_timeout, own], sort_keys=True).encode()).hexdigest()[:16]


def _head_arguments(cluster: ClusterFile) -> list[str]:
    """What `zray start` is told of the cluster's tables."""
    found = ["--storage", cluster.storage] if cluster.storage != "memory" else []
    found += ["--replicas", str(cluster.replicas)] if cluster.replicas > 1 else []
    return found + (["--head-grace", f"{cluster.head_grace:g}"] if cluster.head_grace is not None else [])


def install_digest(names: Iterable[tuple[str, bytes]], requirements: Iterable[str], options: Iterable[str]) -> str:
    """Return a digest of what is to be installed: names and contents of wheels, what pip is to fetch, and its options."""
    digest = hashlib.sha256()
    for name, content in sorted(names):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    digest.update(json.dumps([list(requirements), list(options)]).encode())
    return digest.hexdigest()[:16]


def start_arguments(cluster: ClusterFile, host: Host, address: str, head: str) -> tuple[str, ...]:
    """Return the arguments of `zray start`.

    Args:
        cluster: as configured.
        host: of it.
        address: where it listens.
        head: host:port of the head; empty: this is the head.
    """
    arguments = ["--address", head] if head else ["--head", *_head_arguments(cluster)]
    arguments += ["--host", address, "--port", str(host.port), "--node-timeout", f"{cluster.node_timeout:g}"]
    options = {
        "--num-cpus": host.num_cpus,
        "--num-gpus": host.num_gpus,
        "--memory": host.memory,
        "--object-store-memory": host.object_store_memory,
    }
    for name, value in options.items():
        if value is not None:
            arguments += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    if host.resources:
        arguments += ["--resources", json.dumps(host.resources, sort_keys=True)]
    if host.labels:
        arguments += ["--labels", json.dumps(host.labels, sort_keys=True)]
    return tuple(arguments)


def python_problem(version: str, head: str = "") -> str:
    """Return what is wrong with a host's Python, also beside the head's (if that is known); empty: nothing."""
    if tuple(map(int, minor(version).split("."))) < OLDEST_PYTHON:
        return f"Python {version} is too old: zray needs {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later; set 'python'"
    if head and minor(version) != minor(head):
        return f"Python {version} here, {head} on the head: functions do not travel between them; set 'python'"
    return ""


def version_problem(facts: HostFacts, head: str = "") -> str:
    """Return what is wrong with a host's zray, also beside the head's version (if that is known); empty: nothing."""
    if not facts.zray:
        why = f" ({facts.zray_problem})" if facts.zray_problem else ""
        return f"{facts.executable} has no zray{why}: set 'install', or 'python' to one that has it"
    if head and minor(facts.zray) != minor(head):
        return f"zray {facts.zray} here, {head} on the head: set 'install', or install the same there"
    return ""


def next_step(
    cluster: ClusterFile,
    host: Host,
    facts: HostFacts,
    head: HeadView | None,
    wanted: str,
    done: frozenset[type],
) -> Step:
    """Decide for one host.

    Args:
        cluster: the file.
        host: of it.
        facts: as just looked at.
        head: None: the head does not run (yet), or this is the head. The file's head has one, too, when another node leads the cluster.
        wanted: digest of what is to be installed; empty: nothing is.
        done: kinds of steps taken for this host since the runner began.
    """
    is_head = host.name == cluster.head
    problem = python_problem(facts.python, "" if head is None else head.python)
    if problem:
        return Refused("python", problem)
    if facts.directory_problem:
        return Refused("install", facts.directory_problem)
    if facts.node is not None:
        if not is_head and head is None:
            return AwaitHead()
        useless = _useless(cluster, facts, head)
        if not useless:
            return Finished(facts.node.address, _differences(cluster, host, facts, wanted))
        return _once(End(useless), done, useless)
    if facts.processes:
        return _once(End("it is what a crash has left"), done, f"{facts.processes} processes do not end")
    if wanted and facts.installed != wanted:
        return _once(Install(), done, "what was installed cannot be found")
    problem = version_problem(facts, "" if head is None else head.zray)
    if problem:
        return Refused("install", problem)
    if facts.port_problem:
        return Refused("port", facts.port_problem)
    if not is_head and head is None:
        return AwaitHead()
    arguments = start_arguments(cluster, host, facts.address, "" if head is None else head.address)
    return _once(Start(arguments, settings_digest(cluster, host)), done, "the node ended right after it began")


def _useless(cluster: ClusterFile, facts: HostFacts, head: HeadView | None) -> str:
    """Why the node that runs there is of no use; empty: it is."""
    node = facts.node
    assert node is not None
    if head is None:
        return "" if node.head == node.address else f"it belongs to the cluster of {node.head}, and is to be the head"
    # With replicas the head may be another one than the one that this node was told when it joined; key and head know better.
    if node.head != head.address and cluster.replicas == 1:
        return f"it belongs to the cluster of {node.head}"
    if node.fingerprint != head.fingerprint:
        return "it has the key of an earlier cluster"
    if node.node not in head.alive:
        return "the head does not count it among the living"
    return ""


def _differences(cluster: ClusterFile, host: Host, facts: HostFacts, wanted: str) -> str:
    changed = [
        *(["settings"] if facts.settings != settings_digest(cluster, host) else []),
        *(["what is installed"] if wanted and facts.installed != wanted else []),
    ]
    return f"runs on with other {' and '.join(changed)} than the file: down, then up" if changed else ""


def _once(step: Install | End | Start, done: frozenset[type], otherwise: str) -> Step:
    column = "install" if isinstance(step, Install) else "joined"
    return Refused(column, otherwise) if type(step) in done else step


# -- check: all hosts side by side -------------------------------------------------------------------------------------------


class Finding(msgspec.Struct, frozen=True):
    """Something that `check` found."""

    host: str
    column: str
    text: str
    fatal: bool = True


class Looked(msgspec.Struct, frozen=True):
    """A host that answered `check`."""

    facts: HostFacts
    before: float
    """When it was asked for its clock, and ..."""
    after: float
    """... when it had answered: this machine's clock."""


def clock_offset(looked: Looked) -> float:
    """Return by how many seconds a host's clock is ahead of this machine's, at least: 0 when the time of the answer explains it."""
    if looked.facts.time < looked.before:
        return looked.facts.time - looked.before
    return max(0.0, looked.facts.time - looked.after)


def check_host(cluster: ClusterFile, host: Host, looked: Looked, wanted: str) -> list[Finding]:
    """Judge one host by itself."""
    facts = looked.facts
    found: list[Finding] = []

    def note(column: str, text: str, fatal: bool = True) -> None:
        if text:
            found.append(Finding(host.name, column, text, fatal))

    note("python", python_problem(facts.python))
    note("install", facts.directory_problem)
    if wanted and facts.installed != wanted:
        note("install", "will be installed", fatal=False)
    else:
        note("install", version_problem(facts))
    note("port", facts.port_problem)
    offset = clock_offset(looked)
    if abs(offset) > cluster.max_clock_skew:
        note("clock", f"its clock is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'} (max_clock_skew)")
    if facts.address in ("127.0.0.1", "::1") and len(cluster.hosts) > 1:
        note("names", f"others cannot reach {facts.address}: set 'address'", fatal=len(set(_remote(cluster))) > 1)
    return found


def _remote(cluster: ClusterFile) -> list[str]:
    return [host.destination.rpartition("@")[2] for host in cluster.hosts]


def check_together(cluster: ClusterFile, looked: dict[str, Looked]) -> list[Finding]:
    """Compare hosts with the head: versions must fit."""
    head = looked.get(cluster.head)
    found = []
    for name, host in looked.items():
        if head is None or name == cluster.head:
            continue
        if python_problem(host.facts.python, head.facts.python) and not python_problem(host.facts.python):
            found.append(Finding(name, "python", python_problem(host.facts.python, head.facts.python)))
        if host.facts.zray and head.facts.zray and version_problem(host.facts, head.facts.zray):
            found.append(Finding(name, "install", version_problem(host.facts, head.facts.zray)))
    return found


def check_reach(addresses: dict[str, str], reached: dict[str, dict[str, str]]) -> list[Finding]:
    """Judge who reaches whom.

    Args:
        addresses: host's name -> its host:port.
        reached: host's name -> (host:port -> problem or nothing), as seen from there.
    """
    names = {address: name for name, address in addresses.items()}
    found = []
    for name, seen in sorted(reached.items()):
        problems: dict[str, list[str]] = {}
        for address, problem in seen.items():
            if problem:
                problems.setdefault(problem, []).append(names.get(address, address))
        for problem, others in problems.items():
            column = "names" if problem.startswith("the name") else "port"
            found.append(Finding(name, column, f"cannot reach {', '.join(sorted(others))}: {problem}"))
    return found


def targets(cluster: ClusterFile, looked: dict[str, Looked]) -> dict[str, str]:
    """Return host:port of each node that is to be tried, by host's name; those whose port cannot be had are left out."""
    found = {}
    for host in cluster.hosts:
        if host.name in looked:
            facts = looked[host.name].facts
            if facts.node is not None:
                found[host.name] = facts.node.address
            elif not facts.port_problem:
                found[host.name] = join_address(facts.address, host.port)
    return found
