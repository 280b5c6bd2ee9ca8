"""The program that runs on hosts, here without any host: framing, programs that are watched, directories, installing, jobs, ports."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import SLACK, alive, wait_for
from zray.launcher.facts import Chatter
from zray.launcher.remote import install, jobs, looks, node_life, watched
from zray.launcher.remote.channel import Channel, Gone
from zray.launcher.remote.place import BadPlace, Place

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ends:
    """Both ends of a conversation."""

    def __init__(self) -> None:
        source, self.requests = os.pipe()
        self.answers, sink = os.pipe()
        self.channel = Channel("token", source, sink)
        self._open = {source, sink, self.requests, self.answers}

    def ask(self, data: bytes) -> None:
        os.write(self.requests, data)

    def told(self) -> list[dict[str, Any]]:
        found = b""
        while select.select([self.answers], [], [], 0)[0]:
            found += os.read(self.answers, 65536)
        return Chatter("token").feed(found)

    def hang_up(self) -> None:
        self._close(self.requests)

    def stop_reading(self) -> None:
        self._close(self.answers)

    def _close(self, fd: int) -> None:
        self._open.remove(fd)
        os.close(fd)

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(f"/tmp/zt-{os.getpid()}-place", sys.executable, {"COLOUR": "it's $green"})
    yield made
    shutil.rmtree(made.directory, ignore_errors=True)


# -- the channel ---------------------------------------------------------------------------------------------------------


def test_requests_and_payloads_are_told_apart(ends: Ends) -> None:
    ends.ask(b'{"do": "x", "payload": 5}\nab\ncd{"do": "y"}\n')
    assert ends.channel.receive() == {"do": "x", "payload": 5}
    assert ends.channel.receive_bytes(5) == b"ab\ncd"
    assert not ends.channel.is_gone()
    assert ends.channel.receive() == {"do": "y"}
    ends.channel.send(ok=[1])
    assert ends.told() == [{"ok": [1]}]
    ends.hang_up()
    assert ends.channel.is_gone()
    with pytest.raises(Gone):
        ends.channel.receive()
    ends.stop_reading()
    with pytest.raises(Gone):
        ends.channel.send(ok=1)


# -- watched programs ----------------------------------------------------------------------------------------------------


def test_a_program_tells_what_it_says(ends: Ends) -> None:
    found = watched.run(ends.channel, ["sh", "-c", "echo out; echo err >&2; exit 3"], dict(os.environ), 10)
    assert found == (3, b"out\n", b"err\n")


def test_a_program_that_left_a_child_behind_is_not_waited_for_longer(ends: Ends) -> None:
    begun = time.monotonic()
    status, out, _ = watched.run(ends.channel, ["sh", "-c", "sleep 100 & echo $!"], dict(os.environ), 60)
    os.kill(int(out), 9)
    assert status == 0
    assert time.monotonic() - begun < 50


@pytest.mark.parametrize(("limit", "silence"), [(1.0 * SLACK, None), (60.0, 1.0 * SLACK)])
def test_a_program_that_takes_too_long_is_ended_with_its_children(
    ends: Ends, limit: float, silence: float | None, tmp_path: Path
) -> None:
    told = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {told}; echo words; wait"
    with pytest.raises(watched.Late, match="words"):
        watched.run(ends.channel, ["sh", "-c", script], dict(os.environ), limit, silence=silence)
    wait_for(lambda: not alive(int(told.read_text())))


def test_a_program_ends_with_the_conversation(ends: Ends) -> None:
    ends.hang_up()
    with pytest.raises(Gone):
        watched.run(ends.channel, ["sleep", "600"], dict(os.environ), 60)


# -- directories ---------------------------------------------------------------------------------------------------------


def test_a_directory_is_private_and_goes_as_a_whole(place: Place) -> None:
    assert not place.check()
    place.make()
    place.make()
    assert place.check()
    place.write(place.key_file, "secret")
    assert stat.S_IMODE(os.stat(place.key_file).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(place.directory).st_mode) == 0o700
    place.remove()
    place.remove()
    assert not os.path.exists(place.directory)


def test_directories_that_others_could_have_made_are_refused(place: Place, tmp_path: Path) -> None:
    os.mkdir(place.directory, 0o755)
    with pytest.raises(BadPlace, match="remove it"):
        place.check()
    os.rmdir(place.directory)
    os.symlink(tmp_path, place.directory)
    try:
        for attempt in (place.check, place.make, place.remove):
            with pytest.raises(BadPlace, match="remove it"):
                attempt()
    finally:
        os.unlink(place.directory)


def test_the_environment_is_given_to_programs_and_shells_alike(place: Place) -> None:
    place.make()
    place.write_environment("10.0.0.1:5")
    script = f'. {place.environment_file}; printf \'%s|\' "$COLOUR" "$ZRAY_ADDRESS" "$ZRAY_RUNTIME_DIR"'
    _, out, _ = watched.run(None, ["sh", "-c", script], {"PATH": os.environ["PATH"]}, 10)
    variables = place.environment("10.0.0.1:5")
    assert out.decode().split("|")[:3] == [variables[name] for name in ("COLOUR", "ZRAY_ADDRESS", "ZRAY_RUNTIME_DIR")]
    assert (
        variables["PATH"].split(":")[0] == os.path.dirname(sys.executable)
        or os.path.dirname(sys.executable) in variables["PATH"]
    )
    assert Place("/tmp/z-{uid}", "x", {}).directory == f"/tmp/z-{os.getuid()}"


def test_ending_finds_processes_by_their_mark_and_leaves_peoples_shells(place: Place, ends: Ends) -> None:
    import subprocess

    place.make()
    environment = place.environment()
    lost = subprocess.Popen(["sleep", "600"], env=environment)
    shell = subprocess.Popen(["sleep", "600"], env={**environment, "ZRAY_ATTACHED": "1"})
    try:
        wait_for(lambda: place.processes() == [lost.pid], what="the mark is seen")
        assert node_life.end(place) == {"ended": 1, "killed": 0, "removed": True, "left": []}
        assert lost.wait(5) == -15
        assert shell.poll() is None
        assert node_life.end(place) == {"ended": 0, "killed": 0, "removed": False, "left": []}
    finally:
        for process in (lost, shell):
            process.kill()
            process.wait()


# -- installing ----------------------------------------------------------------------------------------------------------

PIP = """#!/bin/sh
echo "$@" >> {log}
{action}
"""


def venv_maker(tmp_path: Path, action: str) -> str:
    """Return an interpreter that makes environments whose pip does `action`."""
    pip = tmp_path / "pip"
    pip.write_text(PIP.format(log=tmp_path / "log", action=action))
    base = tmp_path / "base"
    base.write_text(f'#!/bin/sh\nmkdir -p "$3/bin" && cp {pip} "$3/bin/python"\n')
    pip.chmod(0o755)
    base.chmod(0o755)
    return str(base)


def request(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    settings = {"directory": str(tmp_path / "venv"), "digest": "d1", "requirements": ["numpy"], "pip_options": ["-U"]}
    return {**settings, "limit": 30.0, "silence": 10.0, **changes}


def test_installing_happens_once_for_each_digest(ends: Ends, tmp_path: Path) -> None:
    base = venv_maker(tmp_path, "exit 0")
    files = {"zray-1.whl": b"wheel", "msgspec-1.whl": b"other"}
    for digest in ("d1", "d1", "d2"):
        install.install(ends.channel, base, request(tmp_path, digest=digest), files)
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == 2
    words = calls[0].split()
    assert words[-1] == "numpy"
    assert words[-2].endswith("/zray-1.whl")  # the others are only at hand
    assert "-U" in words
    assert (tmp_path / "venv" / install.MARK).read_text() == "d2"
    assert install.remove(str(tmp_path / "venv"))
    assert not install.remove(str(tmp_path / "venv"))
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("action", "limits", "words"),
    [
        ("echo no such package >&2; exit 1", {}, "no such package"),
        ("echo fetching; exec sleep 600", {"silence": 1.0 * SLACK}, "without a word: fetching"),
        ("exec sleep 600", {"limit": 1.0}, "ended after"),
    ],
)
def test_an_installation_that_fails_leaves_nothing(
    ends: Ends, tmp_path: Path, action: str, limits: dict[str, float], words: str
) -> None:
    with pytest.raises(install.CannotInstall, match=words):
        install.install(ends.channel, venv_maker(tmp_path, action), request(tmp_path, **limits), {})
    assert not (tmp_path / "venv").exists()


def test_an_installation_ends_with_the_conversation(ends: Ends, tmp_path: Path) -> None:
    ends.hang_up()
    with pytest.raises(Gone):
        install.install(ends.channel, venv_maker(tmp_path, "exec sleep 600"), request(tmp_path), {})
    assert not (tmp_path / "venv").exists()


def test_what_somebody_else_made_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    assert not install.remove(str(tmp_path / "venv"))
    assert (tmp_path / "venv").exists()


# -- jobs and logs -------------------------------------------------------------------------------------------------------


def told_text(ends: Ends) -> str:
    import base64

    return b"".join(base64.b64decode(event["data"]) for event in ends.told()).decode()


def test_jobs_are_followed_to_their_end(place: Place, ends: Ends, tmp_path: Path) -> None:
    from zray.launcher.jobs import pack

    (tmp_path / "job.py").write_text("import os, sys\nprint(os.environ['COLOUR'], sys.argv[1:])\nsys.exit(5)\n")
    name, files = pack(tmp_path / "job.py", None)
    place.make()
    supervisor = jobs.submit(place, "10.0.0.1:5", {"id": "one", "command": [sys.executable, name, "a b"]}, files)
    found = jobs.follow_job(ends.channel, place, "one", None, True)
    assert found == {"state": "ended", "status": 5}
    assert told_text(ends) == "it's $green ['a b']\n"
    [job] = jobs.listing(place)
    assert (job["id"], job["state"], job["status"]) == ("one", "ended", 5)
    os.waitpid(supervisor, 0)
    assert not jobs.end(place, "one")
    with pytest.raises(jobs.NoJob):
        jobs.end(place, "two")
    with pytest.raises(jobs.NoJob):
        jobs.end(place, "../../etc")


@pytest.mark.parametrize(
    ("lines", "text"), [(None, "one\ntwo\nthree\n"), (2, "two\nthree\n"), (0, ""), (9, "one\ntwo\nthree\n")]
)
def test_logs_from_the_last_lines_on(place: Place, ends: Ends, lines: int | None, text: str) -> None:
    directory = Path(place.runtime, "session", "logs")
    directory.mkdir(parents=True)
    (directory / "w1.out").write_text("one\ntwo\nthree\n")
    (directory.parent / "store").write_text("not a log")
    jobs.follow_logs(ends.channel, place, lines, False)
    assert told_text(ends) == text


# -- ports ---------------------------------------------------------------------------------------------------------------


def test_who_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as unused:
        port = server.getsockname()[1]
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        found = looks.reach([("127.0.0.1", port), ("127.0.0.1", closed), ("no-such-host.invalid", 1)], 2.0)
        assert found[f"127.0.0.1:{port}"] == ""
        assert found[f"127.0.0.1:{closed}"] == "Connection refused"
        assert "is not known" in found["no-such-host.invalid:1"]
        listener = looks.Listener()
        assert "taken by another program" in listener.open("127.0.0.1", port)
        assert "not an address of this host" in listener.open("203.0.113.9", 5)
        assert "is not known" in listener.open("no-such-host.invalid", 5)


def test_facts_of_a_host_without_anything(place: Place) -> None:
    found = looks.facts(place, {"address": "127.0.0.1", "port": 1, "installed": ""}, 30.0)
    assert found["node"] is None
    assert not found["has_directory"]
    assert found["zray"] or found["zray_problem"]
    json.dumps(found)
    long = Place("/tmp/" + "x" * 100, sys.executable, {})
    assert (
        "too long" in looks.facts(long, {"address": "127.0.0.1", "port": 1, "installed": ""}, 30.0)["directory_problem"]
    )
