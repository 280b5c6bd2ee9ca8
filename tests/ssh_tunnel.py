"""A place that no way leads to but ssh: a network namespace with addresses of its own, and `ssh -L` into it.

Covers making and removing both; needs root, iproute2 and openssh. There is no network between the namespace and the outside at all: ssh reaches the
sshd in it through a pipe (`ProxyCommand`), as it would through a jump host, and each connection through the tunnel is made in the namespace.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from tests.helpers import wait_for
from tests.namespaces import SSHD


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


class Namespace:
    """The place: addresses on its loopback device, which exist nowhere else."""

    def __init__(self, directory: Path, addresses: list[str]) -> None:
        self.name = f"zc{os.getpid()}"
        self._directory = directory
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        for address in addresses:
            _run("ip", "-n", self.name, "addr", "add", f"{address}/32", "dev", "lo")
        for name in ("host_key", "user_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
        config = directory / "sshd_config"
        config.write_text(
            f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/user_key.pub\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\n"
        )
        host_key = (directory / "host_key.pub").read_text()
        (directory / "known_hosts").write_text(f"inside {host_key}")
        # sshd wants an empty /run/sshd: in a mount namespace of its own (`ip netns exec` makes one) it can have that.
        inner = f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {SSHD} -i -f {config}"
        entry = directory / "enter"
        entry.write_text(f"#!/bin/sh\nexec ip netns exec {self.name} sh -c '{inner}'\n")
        entry.chmod(0o700)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs a program there."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def close(self) -> None:
        """Remove it."""
        _run("ip", "netns", "del", self.name)


class Tunnel:
    """`ssh -L`: a port here that leads to an address there."""

    def __init__(self, namespace: Namespace, target: str) -> None:
        directory = namespace._directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        options = {
            "ProxyCommand": str(directory / "enter"),
            "IdentityFile": str(directory / "user_key"),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(directory / "known_hosts"),
            "GlobalKnownHostsFile": "none",
            "ExitOnForwardFailure": "yes",
            "BatchMode": "yes",
        }
        flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        self._log = (directory / "ssh.log").open("wb")
        self._process = subprocess.Popen(
            ["ssh", "-F", "none", *flags, "-N", "-L", f"{self.address}:{target}", "root@inside"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        wait_for(self._is_open, 20, f"a tunnel: {(directory / 'ssh.log').read_text()}")

    def _is_open(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        host, _, port = self.address.partition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(10)
        self._log.close()
