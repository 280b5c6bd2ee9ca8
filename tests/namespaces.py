"""What tests need to make hosts of their own out of network namespaces. Covers whether that can be done here. Does not cover making them
(`ssh_hosts`, `ssh_tunnel`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

SSHD: Final = "/usr/sbin/sshd"


def missing() -> str:
    """Return why there can be no hosts with sshd in network namespaces here; empty: there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program in ("ip", "ssh", "ssh-keygen", SSHD, "mount"):
        if shutil.which(program) is None:
            return f"needs {program}: .ci/packages installs it"
    name = f"zt{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this machine allows no network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""
