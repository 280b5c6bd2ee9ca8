"""Where a cluster lives on a host: its directory, its environment, its processes.

Covers names, ownership and modes of files, and finding the processes that belong here. Does not cover starting or ending any (`node_life`).

    DIRECTORY/             0700, of this user, or it is refused: others could have made it in /tmp
      cluster.key          0600
      env.sh               0600, for shells: what programs of this cluster need in their environment
      settings             what the node was started with
      run/                 ZRAY_RUNTIME_DIR of the node: its mark, by which its processes are known
      jobs/ID/             submitted programs
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat

_RUNTIME = "ZRAY_RUNTIME_DIR"
ATTACHED = "ZRAY_ATTACHED"
"""In the environment of people's own shells: those are not ended with the cluster."""


class BadPlace(Exception):
    """The directory cannot be used; the text says why and what would mend it."""


class Place:
    """A cluster's directory on this host. Nothing is made before `make`."""

    def __init__(self, directory: str, python: str, environment: dict[str, str]) -> None:
        """
        Args:
            directory: as configured: "~" and "{uid}" are replaced.
            python: interpreter that runs the node.
            environment: variables of this host's configuration.
        """
        self.directory = os.path.expanduser(directory.replace("{uid}", str(os.getuid())))
        self.python = python
        self._given = environment
        self.runtime = os.path.join(self.directory, "run")
        self.key_file = os.path.join(self.directory, "cluster.key")
        self.settings_file = os.path.join(self.directory, "settings")
        self.environment_file = os.path.join(self.directory, "env.sh")
        self.jobs = os.path.join(self.directory, "jobs")

    def check(self) -> bool:
        """Return whether the directory exists. BadPlace: it is not ours alone."""
        try:
            found = os.lstat(self.directory)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise BadPlace(f"{self.directory}: {error.strerror}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise BadPlace(f"{self.directory} is not a directory of this user alone: remove it, or set 'directory'")
        return True

    def make(self) -> None:
        """Make the directories. BadPlace: they cannot be made, or belong to others."""
        try:
            os.makedirs(os.path.dirname(self.directory), mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
            self.check()
            for path in (self.runtime, self.jobs):
                os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise BadPlace(f"{error.filename}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove all of it."""
        if self.check():
            shutil.rmtree(self.directory)

    def write(self, path: str, text: str) -> None:
        """Write a file of mode 0600, as a whole or not at all."""
        part = f"{path}.{os.getpid()}.part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        os.replace(part, path)

    def additions(self, head: str = "") -> dict[str, str]:
        """Return the variables that programs of this cluster get on top of the user's.

        Args:
            head: host:port of the cluster's head; empty: it is not known yet.
        """
        found = dict(self._given)
        path = found.get("PATH") or os.environ.get("PATH") or os.defpath
        own = os.path.dirname(self.python)
        if own and own not in path.split(os.pathsep):
            path = os.pathsep.join([own, path])
        found["PATH"] = path
        found[_RUNTIME] = self.runtime
        if head:
            found["ZRAY_ADDRESS"] = head
        return found

    def environment(self, head: str = "") -> dict[str, str]:
        """Return the whole environment of programs of this cluster; `head` as in `additions`."""
        found = {name: value for name, value in os.environ.items() if name not in ("ZRAY_ADDRESS", "ZRAY_CLUSTER_KEY")}
        return {**found, **self.additions(head)}

    def write_environment(self, head: str) -> None:
        """Write `env.sh`, for shells."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.additions(head).items())]
        self.write(self.environment_file, "\n".join(lines) + "\n")

    def processes(self) -> list[int]:
        """Return the ids of this user's living processes that carry the mark, this one and people's own shells left out."""
        mark = f"{_RUNTIME}={self.runtime}".encode()
        shell = f"{ATTACHED}=".encode()
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                variables = file.read().split(b"\0")
                if mark in variables and not any(item.startswith(shell) for item in variables) and is_alive(int(name)):
                    found.append(int(name))
        return found


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False
