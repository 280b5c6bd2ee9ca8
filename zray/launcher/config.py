"""The cluster's file: which keys there are, what they mean, and the checked record that everything else reads.

Covers reading and checking; docs/launcher.md lists the keys for people. Does not cover YAML (`yaml_text`) or what is done with it (`plan`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from zray.launcher import hostlist
from zray.launcher.yaml_text import ConfigError, Problem, Value, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEFAULT_FILES: Final = ("zray-cluster.yaml", "zray-cluster.yml", "cluster.yaml")
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"
_HOST_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,252}"
_DIRECTORY: Final = r"(~|/)[A-Za-z0-9_./{}-]*"
_VARIABLE: Final = r"[A-Za-z_][A-Za-z0-9_]*"
_ADDRESS: Final = r"[A-Za-z0-9][A-Za-z0-9_.:-]*"
_RESERVED: Final = ("ZRAY_RUNTIME_DIR", "ZRAY_ADDRESS", "ZRAY_CLUSTER_KEY")
_MAX_LIMIT_S: Final = 3600.0
_REPLICAS: Final = 3
"""With copies of the tables there are so many: a majority of three outlives one of them."""


class Ssh(msgspec.Struct, frozen=True):
    """How ssh is called; the user's own configuration and agent are used in any case."""

    program: str = "ssh"
    config: str = ""
    """File for `ssh -F`; empty: the user's."""
    options: tuple[str, ...] = ()
    """Each is given with -o, before the launcher's own."""
    connect_timeout: float = 10.0
    """Seconds."""
    parallel: int = 64
    """Connections that are made at the same time: sshd of a jump host takes only so many (MaxStartups)."""


class Install(msgspec.Struct, frozen=True):
    """What is installed on hosts; nothing when neither wheels nor requirements are given."""

    wheels: tuple[str, ...] = ()
    """Files here, sent to each host."""
    requirements: tuple[str, ...] = ()
    """What pip fetches there."""
    directory: str = ""
    """Virtual environment on the hosts."""
    pip_options: tuple[str, ...] = ()
    timeout: float = 600.0
    """Seconds for all of it; a step may be silent only as long as the cluster's timeout."""

    @property
    def wanted(self) -> bool:
        """Whether anything is to be installed."""
        return bool(self.wheels or self.requirements)


class Host(msgspec.Struct, frozen=True):
    """One node to be; what the file says of all hosts is filled in."""

    name: str
    destination: str
    """For ssh."""
    address: str = ""
    """Where other nodes find it; empty: where ssh reached it."""
    port: int = 6480
    python: str = ""
    """Empty: the first of the usual names that is new enough."""
    directory: str = ""
    env: dict[str, str] = {}
    ssh_options: tuple[str, ...] = ()
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    object_store_memory: int | None = None
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}


class ClusterFile(msgspec.Struct, frozen=True):
    """All of a cluster's file."""

    name: str
    file: str
    head: str
    """Name of a host."""
    hosts: tuple[Host, ...]
    node_timeout: float = 30.0
    storage: str = "memory"
    """Where the head's tables survive it, as `zray start --storage` takes it."""
    replicas: int = 1
    """Nodes that keep the tables."""
    head_grace: float | None = None
    """Seconds for which nodes outlive their head; None: as `zray start` has it."""
    timeout: float = 30.0
    """Seconds that one host may cost, installing left out."""
    max_clock_skew: float = 5.0
    """Seconds."""
    ssh: Ssh = Ssh()
    install: Install = Install()

    @property
    def outlives_head(self) -> bool:
        """Whether other nodes may go on without the head: another one leads them then, or they wait for its next life."""
        return self.replicas > 1 or self.storage != "memory"

    @property
    def tables(self) -> str:
        """In words, where the tables are kept; empty: in the head's memory. A storage's name may hold a password: only its kind is told."""
        if self.replicas > 1:
            return f"{self.replicas} replicas"
        return "" if self.storage == "memory" else f"storage {self.storage.partition(':')[0]}"

    def host(self, name: str) -> Host:
        """Return a host by name. KeyError: there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise KeyError(name)


def find(given: str | None) -> Path:
    """Return the file that is meant. FileNotFoundError: there is none; the text says where it was looked for."""
    if given:
        return Path(given)
    for name in DEFAULT_FILES:
        if os.path.exists(name):
            return Path(name)
    raise FileNotFoundError(
        f"no cluster file: give --file FILE, set ZRAY_CLUSTER_FILE, or write {DEFAULT_FILES[0]} here"
    )


def load(path: Path) -> ClusterFile:
    """Read a cluster's file.

    Raises:
        ConfigError: something is wrong with it, or it cannot be read.
        ModuleNotFoundError: PyYAML is not installed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(str(path), [Problem(1, "", f"cannot be read: {words}")]) from None
    return read(text, str(path))


def read(text: str, file: str) -> ClusterFile:
    """Check a cluster file's text; `file` is its name, to which paths in it are relative. Raises as `load`."""
    problems: list[Problem] = []
    found = _read_cluster(parse(text, file, problems), file)
    if problems or found is None:
        raise ConfigError(file, problems)
    return found


# -- keys --------------------------------------------------------------------------------------------------------------------


def _text(value: Value) -> str:
    return value.string()


def _texts(value: Value) -> tuple[str, ...]:
    return tuple(value.list_of(_text))


def _limit(value: Value) -> float:
    return value.number(0.1, _MAX_LIMIT_S)


def _port(value: Value) -> int:
    return value.integer(1, 65535)


def _directory(value: Value) -> str:
    return value.string(_DIRECTORY, "an absolute directory (or one under ~) of letters, digits, _ . - /").rstrip("/")


def _environment(value: Value) -> dict[str, str]:
    found = value.mapping_of(_text)
    for name, line, _ in value.parts if value.kind == "mapping" else ():
        if not _matches(_VARIABLE, name):
            value.problem(f"{name!r} cannot be a variable's name", line)
        elif name in _RESERVED:
            value.problem(f"{name} is set by the launcher (see 'directory')", line)
    return found


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def _resources(value: Value) -> dict[str, float]:
    found = value.mapping_of(lambda part: part.number(0.0))
    for name, line, _ in value.parts if value.kind == "mapping" else ():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            value.problem(f"{name} has a key of its own: {_OWN_KEYS[name]}", line)
    return found


_OWN_KEYS: Final = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
    "object_store_memory": "object_store_memory",
}

_OF_HOSTS: Final[dict[str, Callable[[Value], Any]]] = {
    "port": _port,
    "python": lambda value: value.string(r"\S.*", "a program's name or path"),
    "directory": _directory,
    "env": _environment,
    "num_cpus": lambda value: value.number(0.0),
    "num_gpus": lambda value: value.number(0.0),
    "memory": lambda value: value.size(),
    "object_store_memory": lambda value: value.size(),
    "resources": _resources,
    "labels": lambda value: value.mapping_of(_text),
}
"""May stand at the top, for all hosts, and at a host, for this one."""


def _destination(value: Value) -> str:
    # What begins with a minus would be an option of ssh; quotes and blanks have no place in a destination.
    return value.string(r"[^-\s'\"\\$`;&|<>][^\s'\"\\$`;&|<>]*", "a destination for ssh, like user@host")


_ONE_HOST: Final[dict[str, Callable[[Value], Any]]] = {
    **_OF_HOSTS,
    "name": lambda value: value.string(),
    "destination": _destination,
    "address": lambda value: value.string(_ADDRESS, "an address or a host's name"),
    "ssh_options": _texts,
}


def _storage(value: Value) -> str:
    """As `zray start --storage` takes it, and told here rather than by the head: what cannot be one is a mistake in this file."""
    scheme, _, rest = value.string().partition(":")
    if value.kind != "scalar" or value.text == "memory":
        return value.text
    if scheme == "sqlite":
        if not rest.startswith("/"):
            value.problem(
                f"{value.text!r}: an SQLite file's path on the head must be absolute, like sqlite:/var/lib/zray/gcs.db"
            )
    elif scheme == "redis+unix":
        if not rest.startswith("///"):
            value.problem("must be redis+unix:///SOCKET")
    elif scheme in ("redis", "rediss"):
        if not _has_host(value.text):
            value.problem(f"must be {scheme}://HOST:PORT/DB")
    else:
        value.problem(
            f"{value.text!r} is no storage: memory, sqlite:PATH, redis://HOST:PORT/DB or redis+unix:///SOCKET"
        )
    return value.text


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or brackets do not fit
        return False


def _replicas(value: Value) -> int:
    found = value.integer(1)
    if found not in (1, _REPLICAS):
        value.problem(f"must be 1 or {_REPLICAS}, not {found}: a majority of {_REPLICAS} outlives one of them")
    return found


def _ssh(value: Value, file: str) -> Ssh:
    found = value.record(
        {
            "program": _text,
            "config": _text,
            "options": _texts,
            "connect_timeout": _limit,
            "parallel": lambda part: part.integer(1, 1000),
        }
    )
    if "config" in found and found["config"] != "none":
        found["config"] = _local(found["config"], file)
    return Ssh(**found)


def _install(value: Value, file: str) -> Install:
    def wheels(part: Value) -> tuple[str, ...]:
        return tuple(path for given in part.list_of(lambda item: _wheels_of(item, file)) for path in given)

    found = value.record(
        {
            "wheels": wheels,
            "requirements": _texts,
            "directory": _directory,
            "pip_options": _texts,
            "timeout": _limit,
        }
    )
    made = Install(**found)
    if not made.wanted:
        value.problem("needs wheels or requirements")
    return made


def _wheels_of(value: Value, file: str) -> list[str]:
    """A wheel, or a directory of wheels."""
    path = _local(value.string(), file)
    if os.path.isdir(path):
        found = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".whl"))
        if not found:
            value.problem(f"there are no wheels in {path}")
        return found
    if not os.path.isfile(path):
        value.problem(f"there is no file {path}")
    elif not path.endswith(".whl"):
        value.problem(f"{path} is not a wheel")
    return [path]


def _local(path: str, file: str) -> str:
    """Paths of this machine are relative to the cluster's file."""
    return os.path.join(os.path.dirname(os.path.abspath(file)), os.path.expanduser(path))


def _read_cluster(root: Value, file: str) -> ClusterFile | None:
    hosts_value: list[Value] = []
    found = root.record(
        {
            **_OF_HOSTS,
            "name": lambda value: value.string(_NAME, "a name of at most 40 letters, digits, _ . -"),
            "head": _text,
            "node_timeout": lambda value: value.number(0.5, _MAX_LIMIT_S),
            "storage": _storage,
            "replicas": _replicas,
            "head_grace": lambda value: value.number(0.0, _MAX_LIMIT_S),
            "timeout": lambda value: value.number(1.0, _MAX_LIMIT_S),
            "max_clock_skew": lambda value: value.number(0.0),
            "ssh": lambda value: _ssh(value, file),
            "install": lambda value: _install(value, file),
            "hosts": hosts_value.append,
        },
        required=["name", "hosts"],
    )
    found.pop("hosts", None)
    name = found.get("name", "")
    common = {key: found.pop(key) for key in _OF_HOSTS if key in found}
    common.setdefault("directory", f"/tmp/zray-{{uid}}-{name}")
    hosts = _hosts(hosts_value[0], common) if hosts_value else []
    if not hosts or not name:
        return None
    head = found.pop("head", hosts[0].name)
    if head not in {host.name for host in hosts}:
        line = next(line for key, line, _ in root.parts if key == "head")
        root.problem(f"{head!r} is none of the hosts: {_some([host.name for host in hosts])}", line, "head")
    if root.file_is_good:
        _check_tables(root, found, next(host for host in hosts if host.name == head), len(hosts))
    install = found.get("install")
    if install is not None and not install.directory:
        # Not in the cluster's directory: that goes with every `down`.
        found["install"] = msgspec.structs.replace(install, directory=f"~/.zray-cluster/{name}")
    return ClusterFile(file=os.path.abspath(file), head=head, hosts=tuple(hosts), **found)


def _check_tables(root: Value, found: dict[str, Any], head: Host, hosts: int) -> None:
    """See that what is said of the tables fits together, and outlives what it is to outlive."""
    lines = {key: line for key, line, _ in root.parts}
    replicas, storage = found.get("replicas", 1), found.get("storage", "memory")
    if replicas > hosts:
        root.problem(f"{replicas} replicas need as many hosts; there {_are(hosts)}", lines["replicas"], "replicas")
    if replicas > 1 and storage != "memory":
        words = f"replicas (line {lines['replicas']}) keep the tables in memory: either replicas or a storage, not both"
        root.problem(words, lines["storage"], "storage")
    if replicas > 1 and found.get("head_grace") == 0:
        root.problem(
            "must be above 0 with replicas: nodes have to outlive their head", lines["head_grace"], "head_grace"
        )
    if storage.startswith("sqlite:") and storage.partition(":")[2].startswith(f"{head.directory}/"):
        root.problem(f"lies in {head.directory}, which `down` removes", lines["storage"], "storage")


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _hosts(value: Value, common: dict[str, Any]) -> list[Host]:
    if value.kind != "list":
        value.problem("must be a list of hosts")
        return []
    if not value.parts:
        value.problem("there must be at least one host")
    hosts: list[Host] = []
    lines: dict[str, int] = {}
    for _, line, part in value.parts:
        for host in _one_pattern(part, common):
            if host.name in lines:
                part.problem(f"host {host.name} was named in line {lines[host.name]} already")
            lines[host.name] = line
            hosts.append(host)
    if value.file_is_good:
        _check_addresses(value, hosts)
    return hosts


def _one_pattern(part: Value, common: dict[str, Any]) -> list[Host]:
    """A host, or hosts in a range; a plain text is a name."""
    if part.kind == "scalar":
        own: dict[str, Any] = {"name": part.text}
    else:
        own = part.record(_ONE_HOST, required=["name"])
    try:
        names = hostlist.expand(own.get("name", ""))
    except ValueError as error:
        part.problem(str(error))
        return []
    if len(names) > 1 and (alone := [key for key in ("destination", "address") if key in own]):
        part.problem(f"{' and '.join(alone)} cannot be that of {len(names)} hosts")
    found = []
    for name in names:
        if not name:
            continue
        if not _matches(_HOST_NAME, name.rpartition("@")[2]):
            part.problem(f"{name!r} cannot be a host's name: set name, and destination for ssh")
        merged = {**common, **own}
        for key in ("env", "resources", "labels"):
            merged[key] = {**common.get(key, {}), **own.get(key, {})}
        merged.update(name=name.rpartition("@")[2], destination=own.get("destination", name))
        found.append(Host(**merged))
    return found


def _check_addresses(value: Value, hosts: list[Host]) -> None:
    """No two nodes can listen at the same place, and none can share a directory."""
    seen: dict[tuple[str, int], str] = {}
    places: dict[tuple[str, str], str] = {}
    for host in hosts:
        where = (host.address or host.destination, host.port)
        if where in seen:
            value.problem(f"{seen[where]} and {host.name} have the same address and port: set 'port'")
        seen[where] = host.name
        place = (host.destination, host.directory)
        if place in places:
            value.problem(f"{places[place]} and {host.name} have the same destination: set 'directory' of each")
        places[place] = host.name


def select(cluster: ClusterFile, names: Sequence[str]) -> tuple[Host, ...]:
    """Return the hosts of these names, which may be ranges; "all" and "head" have their meaning; none: all hosts.

    Raises:
        ValueError: no host has such a name.
    """
    wanted: set[str] = set()
    known = {host.name for host in cluster.hosts}
    for given in names:
        for name in given.split(",") if "[" not in given else [given]:
            if name == "all":
                wanted |= known
            elif name == "head":
                wanted.add(cluster.head)
            else:
                expanded = set(hostlist.expand(name))
                if not expanded <= known:
                    unknown = ", ".join(sorted(expanded - known))
                    raise ValueError(f"no host {unknown} in {cluster.file}: there are {_some(sorted(known))}")
                wanted |= expanded
    return tuple(host for host in cluster.hosts if host.name in wanted or not names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
