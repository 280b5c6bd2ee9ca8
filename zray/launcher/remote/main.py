"""The program's beginning and its loop: read a request, do it, answer; until the launcher hangs up.

Covers which request means what. What was begun for a launcher that has gone meanwhile is undone here. Requests ("do") and their fields are
those of `zray.launcher.ssh` and its callers; every answer has "ok" or "error", and "kind" tells kinds of errors apart.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
from typing import Any

from . import install, jobs, looks, node_life
from .channel import Channel, Gone
from .place import BadPlace, Place

_EXPECTED = (BadPlace, node_life.CannotStart, install.CannotInstall, jobs.NoJob, tarfile.TarError, OSError)


class Agent:
    """One conversation's state."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._listener = looks.Listener()

    def serve(self) -> None:
        """Do requests until the launcher has gone."""
        self._channel.send(ok=True, python=sys.version.split()[0], executable=sys.executable)
        while True:
            request = self._channel.receive()
            payload = self._channel.receive_bytes(request.get("payload", 0))
            try:
                answer: dict[str, Any] = {"ok": self._perform(request, payload)}
            except _EXPECTED as error:
                text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else ""
                answer = {"error": text or str(error) or type(error).__name__, "kind": type(error).__name__}
            try:
                self._channel.send(**answer)
            except Gone:
                # Nobody knows that this node runs: it must not.
                if request["do"] == "start" and "ok" in answer:
                    node_life.end(self._place(request))
                raise

    def _place(self, request: dict[str, Any]) -> Place:
        python = os.path.expanduser(request["python"] or sys.executable)
        return Place(request["directory"], python, request["env"])

    def _perform(self, request: dict[str, Any], payload: bytes) -> Any:
        what = request["do"]
        if what == "install":
            files = {}
            for name, size in request["files"]:
                files[name] = payload[:size]
                payload = payload[size:]
            return install.install(self._channel, sys.executable, request, files)
        if what == "uninstall":
            return install.remove(request["directory"])
        if what == "listen":
            return self._listener.open(request["address"], request["port"])
        if what == "close":
            return self._listener.close()
        if what == "reach":
            return looks.reach([(host, port) for host, port in request["addresses"]], request["limit"])
        place = self._place(request)
        if what == "facts":
            return looks.facts(place, request, request["limit"])
        if what == "start":
            return node_life.start(place, request["key"], request["arguments"], request["settings"], request["limit"])
        if what == "key":
            with open(place.key_file, encoding="ascii") as file:
                return file.read()
        if what == "end":
            return node_life.end(place)
        if what == "members":
            return node_life.members(place, request["limit"])
        return self._perform_job(what, place, request, payload)

    def _perform_job(self, what: str, place: Place, request: dict[str, Any], payload: bytes) -> Any:
        record = node_life.running(place) if place.check() else None
        head = "" if record is None else str(record["head"])
        if what == "run":
            return jobs.run(self._channel, place, head, request["command"])
        if what == "jobs":
            return jobs.listing(place)
        if what == "job":
            return jobs.follow_job(self._channel, place, request["job"], request["lines"], request["follow"])
        if what == "end_job":
            return jobs.end(place, request["job"])
        if what == "logs":
            return jobs.follow_logs(self._channel, place, request["lines"], request["follow"])
        if what == "submit":
            if record is None:
                raise node_life.CannotStart("no node of the cluster runs on this host")
            job = {**request["job"], "command": [place.python, *request["job"]["command"]]}
            return jobs.submit(place, head, job, payload)
        raise OSError(f"unknown request {what!r}")


def main(token: str) -> None:
    """Hold a conversation."""
    with contextlib.suppress(Gone, KeyboardInterrupt):
        Agent(Channel(token)).serve()
