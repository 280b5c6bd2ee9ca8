"""Hosts to be reached by ssh: network namespaces on a bridge, each with an sshd, keys and configuration of its own.

Covers making and removing them; needs root, iproute2, openssh. Does not cover what runs on them. Everything lies in namespaces and one
temporary directory: the machine's own network, sshd, keys and configuration are neither used nor changed. The hosts share the file system
(and process ids), so each has a home directory of its own, and clusters on them need a directory each.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.helpers import PROJECT, RUNTIME, processes_under, wait_for
from tests.namespaces import SSHD

_NETWORK: Final = ("10.213.77.", 24)
_IPV6_NETWORK: Final = ("fd00:213:77::", 64)
_OUTER_NETWORK: Final = ("10.213.78.", 24)
_PORT: Final = 2222
_numbers = itertools.count()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


class SshHost:
    """One namespace; `start` runs its sshd."""

    def __init__(self, network: SshNetwork, name: str, number: int) -> None:
        self.name = name
        self.address = f"{network.addresses[0]}{number}"
        self.outer_address = ""
        """Where who stands apart reaches it, if it is the gate."""
        self.namespace = f"{network.prefix}-{name}"
        self.place = network.place / name
        self.home = self.place / "home"
        self.home.mkdir(parents=True)
        self.clusters = self.place / "z"
        """Holds a directory for each cluster."""
        self._network = network
        self._sshd: subprocess.Popen[bytes] | None = None

    def start(self, *, authorized: bool = True, environment: dict[str, str] | None = None) -> None:
        """Run an sshd.

        Args:
            authorized: it takes the user's key.
            environment: of its sessions.
        """
        key = self.place / "host_key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        addresses = list(filter(None, (self.address, self.outer_address)))
        with self._network.known_hosts.open("a") as known:
            for address in addresses:
                known.write(f"[{address}]:{_PORT} {(self.place / 'host_key.pub').read_text()}")
        allowed = self.place / "authorized_keys"
        allowed.write_text(self._network.user_key.with_suffix(".pub").read_text() if authorized else "")
        given = {"HOME": str(self.home), **(environment or {})}
        config = self.place / "sshd_config"
        config.write_text(
            "".join(f"ListenAddress [{address}]:{_PORT}\n" for address in addresses)
            + f"HostKey {key}\nAuthorizedKeysFile {allowed}\nPidFile none\n"
            "UsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"UseDNS no\nSetEnv {' '.join(f'{name}={value}' for name, value in given.items())}\n"
        )
        # sshd wants an empty /run/sshd: in a mount namespace of its own (`ip netns exec` makes one) it can have that.
        inner = f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {SSHD} -D -e -f {config}"
        log = (self.place / "sshd.log").open("wb")
        with log:
            self._sshd = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "sh", "-c", inner],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: b"listening" in (self.place / "sshd.log").read_bytes(), what=f"sshd of {self.name} listens")

    def listen_mute(self) -> None:
        """Take connections where sshd would be, and never say a word."""
        program = f"import socket, time; s = socket.create_server(({self.address!r}, {_PORT})); print('listening', flush=True); time.sleep(9e5)"
        log = (self.place / "sshd.log").open("wb")
        with log:
            self._sshd = subprocess.Popen(
                self._network.command(sys.executable, "-c", program, namespace=self.namespace),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: b"listening" in (self.place / "sshd.log").read_bytes(), what=f"{self.name} listens")

    def stop(self) -> None:
        """End its sshd."""
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait(10)
            self._sshd = None

    def directory(self, cluster: str) -> Path:
        """Return where a cluster of this name is to live here."""
        return self.clusters / cluster

    def leftovers(self, cluster: str) -> list[object]:
        """What of a cluster is here: processes and files."""
        place = self.directory(cluster)
        running = processes_under(str(place / "run"))
        files = [place, *sorted(place.rglob("*"))] if place.exists() else []
        return [*running.items(), *map(str, files)]

    def kill_all(self, cluster: str) -> None:
        """End what a failed test left."""
        place = self.directory(cluster)
        for pid in processes_under(str(place / "run")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


class SshNetwork:
    """The namespaces, the user's key and ssh configuration. `close` removes all of it."""

    def __init__(self, *, ipv6: bool = False) -> None:
        """ipv6: its hosts have no other addresses."""
        self.prefix = f"zt{os.getpid()}n{next(_numbers)}"
        self.addresses = _IPV6_NETWORK if ipv6 else _NETWORK
        """What addresses begin with, and how many bits of them are the network's."""
        self.place = Path(tempfile.mkdtemp(prefix="zt-", dir="/tmp"))
        self.known_hosts = self.place / "known_hosts"
        self.known_hosts.touch()
        self.user_key = self.place / "user_key"
        self.ssh_config = self.place / "ssh_config"
        self.hosts: dict[str, SshHost] = {}
        self._namespaces: list[str] = []
        try:
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.user_key))
            self.ssh_config.write_text(
                f"Host *\n  User root\n  Port {_PORT}\n  IdentityFile {self.user_key}\n  IdentitiesOnly yes\n"
                f"  IdentityAgent none\n  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile none\n"
            )
            self.outside = self.user = self._namespace("out")
            """Where the bridge is; and where the user is: the launcher runs there."""
            _run("ip", "-n", self.outside, "link", "add", "br0", "type", "bridge")
            self._address(self.outside, "br0", self.addresses, 1)
            _run("ip", "-n", self.outside, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise

    def _namespace(self, name: str) -> str:
        full = f"{self.prefix}-{name}"
        _run("ip", "netns", "add", full)
        self._namespaces.append(full)
        _run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def _address(self, namespace: str, device: str, network: tuple[str, int], number: int) -> None:
        # Nobody else has it: waiting for somebody to say so (duplicate address detection, IPv6 only) is left out.
        _run("ip", "-n", namespace, "addr", "add", f"{network[0]}{number}/{network[1]}", "dev", device, "nodad")

    def stand_apart(self, gate: SshHost) -> None:
        """Put the user where no host but the gate is reached; ssh's configuration has the others behind it. Before its sshd runs."""
        self.user = self._namespace("far")
        _run(
            *("ip", "-n", self.user, "link", "add", "eth0", "type", "veth"),
            *("peer", "name", "eth1", "netns", gate.namespace),
        )
        for number, namespace, device in ((1, self.user, "eth0"), (2, gate.namespace, "eth1")):
            self._address(namespace, device, _OUTER_NETWORK, number)
            _run("ip", "-n", namespace, "link", "set", device, "up")
        gate.outer_address = f"{_OUTER_NETWORK[0]}2"
        with self.ssh_config.open("a") as config:
            config.write(f"Host {self.addresses[0]}*\n  ProxyJump {gate.outer_address}\n")

    def add(self, name: str) -> SshHost:
        """Make a host; its sshd does not run yet."""
        number = 11 + len(self.hosts)
        host = self.hosts[name] = SshHost(self, name, number)
        self._namespace(name)
        link = f"v{number}"
        _run(
            *("ip", "-n", self.outside, "link", "add", link, "type", "veth"),
            *("peer", "name", "eth0", "netns", host.namespace),
        )
        _run("ip", "-n", self.outside, "link", "set", link, "master", "br0", "up")
        self._address(host.namespace, "eth0", self.addresses, number)
        _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
        return host

    def command(self, *arguments: str, namespace: str = "") -> list[str]:
        """Return the command line that runs a program in the network, where the user is or (namespace) on a host."""
        return ["ip", "netns", "exec", namespace or self.user, *arguments]

    def popen(self, *arguments: str, variables: dict[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start `zray-cluster` where the user is."""
        environment = {name: value for name, value in os.environ.items() if name not in (RUNTIME, "SSH_AUTH_SOCK")}
        environment.update(variables or {})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environment.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            self.command(sys.executable, "-W", "error", "-m", "zray.launcher.cli", *arguments),
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "env": environment,
                "cwd": self.place,
                **more,
            },
        )

    def close(self) -> None:
        """End all sshd and remove namespaces and files."""
        for host in self.hosts.values():
            host.stop()
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False)
        shutil.rmtree(self.place, ignore_errors=True)
