"""Files to hosts and back, by the system's rsync over ssh.

Covers calling rsync for all hosts at once. rsync rather than tar: only what differs travels, a broken transfer is taken up again, and its
options (excludes, deletes) are known to people; where it is missing, here or there, the error says so before anything is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from zray.launcher import ssh
from zray.launcher.rows import Mark
from zray.launcher.running import HostRun, Run
from zray.launcher.ssh import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.launcher.config import ClusterFile, Host
    from zray.launcher.display import Board

COLUMNS: Final = ("ssh", "rsync")
_UNCLEAN: Final = "is your shell clean"
"""rsync's words when the host's shell prints something before rsync can speak."""


class Files(msgspec.Struct, frozen=True):
    """What is to be copied."""

    source: str
    target: str
    up: bool
    """To hosts; else from them."""
    delete: bool = False
    """What the source does not have goes at the target."""
    exclude: tuple[str, ...] = ()


def rsync_command(cluster: ClusterFile, host: Host, files: Files, several: bool) -> list[str]:
    """Return the command line for one host; several: there are others, and what comes from them must lie apart."""
    shell = shlex.join([cluster.ssh.program, *ssh.options(cluster.ssh, host)])
    # -s: names are told to rsync itself, not to the shell there, so blanks and stars in them need no quoting.
    options = ["-rlptz", "-s", f"--timeout={max(1, round(cluster.timeout))}", "-e", shell]
    options += ["--delete"] if files.delete else []
    options += [f"--exclude={pattern}" for pattern in files.exclude]
    user, at, address = host.destination.rpartition("@")
    destination = f"{user}{at}[{address}]" if ":" in address else host.destination
    if files.up:
        return ["rsync", *options, "--", files.source, f"{destination}:{files.target}"]
    target = f"{files.target.rstrip('/')}/{host.name}/" if several else files.target
    return ["rsync", *options, "--", f"{destination}:{files.source}", target]


class Transfer(Run):
    """Copies files to or from all hosts at once."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board, files: Files) -> None:
        super().__init__(cluster, hosts, board)
        self._files = files

    async def copy(self) -> None:
        """Do it; rows tell the outcome."""
        with self.interruptible():
            try:
                await self.run(self._copy)
            finally:
                await self.close()

    async def _copy(self, host: HostRun) -> None:
        host.column = "rsync"
        if shutil.which("rsync") is None:
            raise HostError("rsync", "rsync is not installed on this machine")
        facts = await host.facts()
        if not facts.rsync:
            raise HostError("rsync", "rsync is not installed there")
        several = len(self.hosts) > 1
        if several and not self._files.up:
            Path(self._files.target, host.host.name).mkdir(parents=True, exist_ok=True)
        host.row.set("rsync", Mark.WORKING)
        await self.unless_interrupted(_rsync(rsync_command(self.cluster, host.host, self._files, several)))
        host.row.set("rsync", Mark.GOOD)


async def _rsync(command: list[str]) -> None:
    """Run it. It notices by itself when nothing comes any more (--timeout, and ssh's own). HostError: it failed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # it takes its ssh along
        await process.wait()
        raise
    if process.returncode:
        text = said.decode("utf-8", "replace").strip()
        hint = "\na file like .bashrc prints something there: silence it where there is no terminal"
        raise HostError("rsync", text + (hint if _UNCLEAN in text else ""))
