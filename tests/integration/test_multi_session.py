"""Sessions beside one another: of one user, of two users, and one that dies next to one that lives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import zray
from tests.helpers import PROJECT, RUNTIME, Program, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


def test_a_neighbour_that_is_killed_disturbs_nobody(
    zray_session: Callable[..., Any], program: Callable[..., Program]
) -> None:
    """Both in one runtime directory, as sessions of one user are."""
    running = program(
        """
zray.init(num_cpus=1, namespace="same")
@zray.remote
class Actor:
    def name(self):
        return "neighbour"
actor = Actor.options(name="actor", lifetime="detached").remote()
zray.get(actor.name.remote())
zray.kv.put("key", b"neighbour")
print("up", flush=True)
time.sleep(1000)
""",
        env={RUNTIME: os.environ[RUNTIME]},
    )
    running.wait_line("up")
    zray_session(namespace="same")

    class Actor:
        def name(self) -> str:
            return "mine"

    with pytest.raises(ValueError):
        zray.get_actor("actor")
    assert zray.kv.get("key") is None
    actor = zray.remote(Actor).options(name="actor").remote()
    assert zray.get(zray.get_actor("actor").name.remote()) == "mine"

    def sessions() -> list[str]:
        root = os.environ[RUNTIME]
        return [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name))]

    assert len(sessions()) == 2
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    wait_for(lambda: len(sessions()) == 1, 2.0, "only this session's directory is left")
    assert zray.get(actor.name.remote()) == "mine"
    assert zray.get([zray.remote(lambda x: x).remote(i) for i in range(50)]) == list(range(50))


def test_a_program_started_by_a_task_has_a_session_of_its_own(zray_session: Callable[..., Any]) -> None:
    zray_session()
    source = (
        "import zray; zray.init(num_cpus=1); print(zray.get(zray.remote(lambda: 41).remote()) + 1); zray.shutdown()"
    )

    @zray.remote
    def start() -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=60
        )
        return done.stdout + done.stderr

    assert zray.get(start.remote(), timeout=90) == "42\n"
    assert zray.get(zray.remote(lambda: 1).remote()) == 1


@pytest.fixture
def strangers_place() -> Iterator[str]:
    """A directory that everybody may enter."""
    place = f"/tmp/zray-stranger-{os.getpid()}"
    os.mkdir(place, 0o755)
    yield place
    shutil.rmtree(place)


@pytest.mark.slow
def test_two_users_at_once(zray_session: Callable[..., Any], strangers_place: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    stranger = 65534
    probe = [sys.executable, "-c", "import zray._store"]
    environment = {"PATH": os.environ["PATH"], "HOME": strangers_place, "PYTHONPATH": str(PROJECT)}
    try:
        readable = subprocess.run(probe, env=environment, user=stranger, cwd="/", capture_output=True).returncode == 0
    except PermissionError:
        readable = False
    if not readable:
        pytest.skip("the other user cannot read this installation")
    zray_session(num_cpus=1)
    source = f"""
import os, zray
context = zray.init(num_cpus=1)
assert os.getuid() == {stranger}
print(os.path.dirname(context["session_dir"]), zray.get(zray.remote(os.getuid).remote()))
# The other user's sessions are out of reach.
try:
    os.listdir({os.environ[RUNTIME]!r})
except PermissionError:
    print("closed")
zray.shutdown()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env=environment,
        user=stranger,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    directory, uid = done.stdout.splitlines()[0].split()
    assert int(uid) == stranger
    assert directory == f"/tmp/zray-{stranger}"
    assert "closed" in done.stdout
    assert os.listdir(directory) == []
    os.rmdir(directory)
    assert zray.get(zray.remote(lambda: 1).remote()) == 1
