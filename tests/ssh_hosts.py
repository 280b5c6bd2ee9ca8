"""Hosts to be reached by ssh: network namespaces on a bridge, each with an sshd, keys and configuration of its own.

Covers making and removing them; needs root, iproute2, openssh. Does not cover what runs on them. Everything lies in namespaces and one
temporary directory: the machine's own network, sshd, keys and configuration are neither used nor changed. The hosts share the file system
(and process ids), so each has a home directory of its own, and clusters on them need a directory each.
"""

from __future__ import annotations

import contextlib
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

_NETWORK: Final = "10.213.77"
_PORT: Final = 2222


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


class SshHost:
    """One namespace; `start` runs its sshd."""

    def __init__(self, network: SshNetwork, name: str, number: int) -> None:
        self.name = name
        self.address = f"{_NETWORK}.{number}"
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
        with self._network.known_hosts.open("a") as known:
            known.write(f"[{self.address}]:{_PORT} {(self.place / 'host_key.pub').read_text()}")
        allowed = self.place / "authorized_keys"
        allowed.write_text(self._network.user_key.with_suffix(".pub").read_text() if authorized else "")
        given = {"HOME": str(self.home), **(environment or {})}
        config = self.place / "sshd_config"
        config.write_text(
            f"ListenAddress {self.address}:{_PORT}\nHostKey {key}\nAuthorizedKeysFile {allowed}\nPidFile none\n"
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

    def __init__(self) -> None:
        self.prefix = f"zt{os.getpid()}"
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
            self.outside = self._namespace("out")
            _run("ip", "-n", self.outside, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self.outside, "addr", "add", f"{_NETWORK}.1/24", "dev", "br0")
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
        _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
        return host

    def command(self, *arguments: str, namespace: str = "") -> list[str]:
        """Return the command line that runs a program in the network, beside the hosts or (namespace) on one."""
        return ["ip", "netns", "exec", namespace or self.outside, *arguments]

    def popen(self, *arguments: str, variables: dict[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start `zray-cluster` beside the hosts."""
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
