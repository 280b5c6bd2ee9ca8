"""`zray-cluster` against real sshd on hosts of their own: network namespaces (`tests/ssh_hosts.py`).

Covers bringing clusters up and down, hosts that fail in every way, interrupts, programs and files. Does not cover decisions
(`tests/unit/test_launcher_plan.py`) or the file (`tests/unit/test_launcher_config.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests import namespaces
from tests.helpers import PROJECT, SLACK, alive, stop, wait_for
from tests.ssh_hosts import SshNetwork
from zray.launcher import bootstrap
from zray.launcher.facts import Chatter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytest.importorskip("yaml", reason="PyYAML is not installed (extra: cluster)")
_MISSING = namespaces.missing()
needs_hosts = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)
pytestmark = [pytest.mark.slow]

GOOD = ("alpha", "beta", "gamma")
DEAD = "10.213.77.99"
"""Nobody has this address."""
GREETING = 'it\'s a "test" $HOME'
CHATTER = "echo 'Welcome to the machine!'; printf 'no end of line'; echo 'careful' >&2\n"


class Done(NamedTuple):
    """A command of the launcher that has ended."""

    status: int
    out: str
    err: str


class Lab:
    """A cluster's file for some hosts, and the launcher's commands on it."""

    def __init__(self, network: SshNetwork, name: str) -> None:
        self.network = network
        self.name = name
        self.path = network.place / f"{name}.yaml"

    def write(self, content: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(content, indent=1))  # JSON is YAML

    @property
    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def directory(self, host: str) -> Path:
        return self.network.hosts[host].directory(self.name)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        return self.network.popen(*arguments, variables={"ZRAY_CLUSTER_FILE": str(self.path)}, **more)

    def run(self, *arguments: str, status: int | None = 0) -> Done:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=90 * SLACK)
        assert status in (None, process.returncode), f"status {process.returncode}\n{out}\n{err}"
        return Done(process.returncode, out, err)

    def rows(self, *arguments: str, status: int | None = 0) -> dict[str, dict[str, Any]]:
        return {row["host"]: row for row in json.loads(self.run(*arguments, "--json", status=status).out)}

    def brokers(self) -> dict[str, int]:
        """Process ids of brokers that run, by host."""
        found = {}
        for host in self.network.hosts:
            for record in self.directory(host).glob("run/*/node.json"):
                with contextlib.suppress(OSError, ValueError):
                    pid = int(json.loads(record.read_text())["broker_pid"])
                    if alive(pid):
                        found[host] = pid
        return found

    def leftovers(self) -> list[object]:
        return [thing for host in self.network.hosts.values() for thing in host.leftovers(self.name)]

    def assert_nothing_left(self) -> None:
        wait_for(lambda: not self.leftovers(), 5.0, f"nothing is left on hosts: {self.leftovers()}")

    def destroy(self) -> None:
        for host in self.network.hosts.values():
            host.kill_all(self.name)


def make_lab(network: SshNetwork, name: str, *hosts: str, **more: Any) -> Lab:
    """Write a cluster's file for some hosts."""
    lab = Lab(network, name)
    made = []
    for host in hosts:
        known = network.hosts.get(host)
        one = {"name": host, "destination": DEAD if known is None else known.address, "resources": {host: 1}}
        one["directory"] = str((network.place / "dead") if known is None else lab.directory(host))
        made.append(one if host == "bare" else {**one, "python": sys.executable})
    content = {
        "name": name,
        "num_cpus": 1,
        "num_gpus": 0,
        "object_store_memory": "50MB",
        "env": {"PYTHONPATH": str(PROJECT), "GREETING": GREETING},
        "ssh": {"config": str(network.ssh_config), "connect_timeout": 4},
        "hosts": made,
    }
    lab.write({**content, **more})
    return lab


@pytest.fixture(scope="module")
def network() -> Iterator[SshNetwork]:
    """Hosts: three good ones (beta's shell chatters), one that does not take the key, one without Python, one that is mute."""
    made = SshNetwork()
    try:
        for name in GOOD:
            made.add(name).start()
        (made.hosts["beta"].home / ".bashrc").write_text(CHATTER)
        made.add("locked").start(authorized=False)
        programs = made.add("bare").place / "bin"
        programs.mkdir()
        for program in ("sh", "dd"):
            (programs / program).symlink_to(shutil.which(program) or "")
        made.hosts["bare"].start(environment={"PATH": str(programs)})
        made.add("mute").listen_mute()
        yield made
    finally:
        made.close()


@pytest.fixture
def own_lab(network: SshNetwork) -> Iterator[Callable[..., Lab]]:
    """A function that makes a test's own cluster: name, hosts, and more of its file. It is gone at the end, whatever happened."""
    made: list[Lab] = []

    def make(name: str, *hosts: str, **more: Any) -> Lab:
        made.append(make_lab(network, name, *hosts, port=6481 + len(made), **more))
        return made[-1]

    yield make
    for one in made:
        one.destroy()


# -- one cluster for many tests ------------------------------------------------------------------------------------------------


class Watcher:
    """Looks at command lines and environments of all processes for a while."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        self.seen.add(Path("/proc", pid, name).read_bytes())

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module")
def watched_start() -> Watcher:
    """Sees how `lab` is brought up."""
    return Watcher()


@pytest.fixture(scope="module")
def lab(network: SshNetwork, watched_start: Watcher) -> Iterator[Lab]:
    """A running cluster on three hosts."""
    made = make_lab(network, "lab", *GOOD)
    try:
        with watched_start:
            rows = made.rows("up")
        assert {row["joined"] for row in rows.values()} == {"joined"}
        yield made
        rows = made.rows("down")
        assert all("process" in row["ended"] for row in rows.values())
        made.assert_nothing_left()
        assert {row["ended"] for row in made.rows("down").values()} == {"nothing was there"}
    finally:
        made.destroy()


PLACES = """
import os, sys, zray
zray.init()
@zray.remote
def where():
    print("a task says hello")
    return os.stat("/proc/self/ns/net").st_ino, os.environ["GREETING"]
for host in sys.argv[1:]:
    print(host, *zray.get(where.options(resources={host: 1}).remote()))
print("alive", sum(node["Alive"] for node in zray.nodes()))
"""


@needs_hosts
def test_a_submitted_program_runs_tasks_on_every_host(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "places.py"
    script.write_text(PLACES)
    told = lab.run("submit", str(script), *GOOD).out
    namespaces = {str(os.stat(f"/run/netns/{lab.network.hosts[host].namespace}").st_ino) for host in GOOD}
    lines = [line.split(" ", 2) for line in told.splitlines() if line.split(" ")[0] in GOOD]
    assert [line[0] for line in lines] == list(GOOD)
    assert {line[1] for line in lines} == namespaces, "each task ran in the network of its host"
    assert {line[2] for line in lines} == {'it\'s a "test" $HOME'}
    assert "alive 3" in told


@needs_hosts
def test_up_again_changes_nothing(lab: Lab) -> None:
    before = lab.brokers()
    rows = lab.rows("up")
    assert {row["joined"] for row in rows.values()} == {"was joined"}
    assert lab.brokers() == before
    assert len(before) == 3


@needs_hosts
def test_files_on_hosts_are_private(lab: Lab) -> None:
    for name in GOOD:
        place = lab.directory(name)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        for file in ("cluster.key", "env.sh", "settings"):
            assert stat.S_IMODE((place / file).stat().st_mode) == 0o600


@needs_hosts
def test_the_key_is_in_no_command_line_and_no_environment(lab: Lab, watched_start: Watcher) -> None:
    keys = [json.loads((lab.directory(name) / "cluster.key").read_text()) for name in GOOD]
    assert keys[0] == keys[1] == keys[2]
    assert any(b"sshd" in text for text in watched_start.seen)
    assert any(b"cluster.key" in text for text in watched_start.seen), "the start was seen"
    assert not [text for text in watched_start.seen if keys[0]["secret"].encode() in text]


@needs_hosts
def test_status_shows_nodes(lab: Lab) -> None:
    found = json.loads(lab.run("status", "--json").out)
    assert {row["host"]: row["state"] for row in found["hosts"]} == dict.fromkeys(GOOD, "ALIVE")
    assert found["total"]["CPU"] == 3
    assert found["strangers"] == []
    assert "beta" in lab.run("status").out


@needs_hosts
def test_exec_takes_words_as_they_are(lab: Lab) -> None:
    words = ["a b", "c'd", "$HOME", "*", 'e"f', "!", "\\"]
    assert lab.run("exec", "printf", "%s\n", *words).out.splitlines() == words
    assert lab.run("exec", "echo $ZRAY_ADDRESS | tr a-z A-Z").out == "10.213.77.11:6480\n"


@needs_hosts
def test_exec_on_all_hosts_names_them(lab: Lab) -> None:
    told = lab.run("exec", "--on", "all", "echo one; echo two").out
    assert sorted(told.splitlines()) == sorted(f"{host.ljust(5)} | {word}" for host in GOOD for word in ("one", "two"))


@needs_hosts
def test_exec_ends_as_the_command_does(lab: Lab) -> None:
    assert lab.run("exec", "exit 7", status=7).out == ""
    assert lab.run("exec", "kill -TERM $$", status=128 + signal.SIGTERM)
    done = lab.run("exec", "--on", "all", 'test "$(hostname)" = x', status=1)
    assert done.err.count("status 1") == 3
    assert lab.run("exec", "no-such-program", "x", status=1).err.count("no-such-program") == 1


@needs_hosts
def test_an_interrupted_exec_ends_what_it_ran(lab: Lab, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    process = lab.start("exec", f"echo $$ > {told}.part; mv {told}.part {told}; exec sleep 600")
    wait_for(told.exists, what="the command runs")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30 * SLACK)
    assert process.returncode == 128 + signal.SIGINT
    wait_for(lambda: not alive(int(told.read_text())), what="the command has ended")


@needs_hosts
def test_jobs_go_on_alone_and_can_be_cancelled(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "words.py").write_text("WORD = 'a module of its own'\n")
    script = tmp_path / "tree" / "job.py"
    script.write_text("import time, words\nprint(words.WORD)\ntime.sleep(600)\n")
    job = lab.run("submit", "--detach", "--working-dir", str(tmp_path / "tree"), str(script)).out.strip()
    wait_for(lambda: "a module of its own" in lab.run("logs", job).out, 30.0, "its output is there")
    assert f"job {job} on alpha: running" in lab.run("status").out
    assert "cancelled" in lab.run("cancel", job).out
    assert "there is no job nonsense" in lab.run("logs", "nonsense", status=1).err


@needs_hosts
def test_a_failing_job_tells_its_status(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("import sys\nprint('on its way')\nsys.exit(3)\n")
    done = lab.run("submit", str(script), status=3)
    assert done.out == "on its way\n"


@needs_hosts
def test_logs_of_nodes_name_host_and_file(lab: Lab, tmp_path: Path) -> None:
    # Every node has a worker that printed something by now.
    script = tmp_path / "places.py"
    script.write_text(PLACES)
    lab.run("submit", str(script), *GOOD)
    told = lab.run("logs").out
    for host in GOOD:
        assert any(line.startswith(host) and "a task says hello" in line for line in told.splitlines()), told
    assert len(lab.run("logs", "--on", "beta", "-n", "0").out.splitlines()) == 0


@needs_hosts
@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed: .ci/packages installs it")
def test_files_travel_both_ways(lab: Lab, tmp_path: Path) -> None:
    here = tmp_path / "some data"
    here.mkdir()
    (here / "it's *.txt").write_text("words")
    (here / "left.out").write_text("no")
    # beta's chattering shell breaks rsync's protocol, which is said with its cause.
    (lab.network.hosts["beta"].home / ".bashrc").unlink()
    try:
        there = lab.network.hosts["alpha"].place / "remote data"
        lab.run("rsync-up", "--exclude", "*.out", f"{here}/", f"{there}/")
        assert [path.name for path in there.iterdir()] == ["it's *.txt"]
        back = tmp_path / "back"
        lab.run("rsync-down", "--on", "all", f"{there}/", str(back))
        assert sorted(path.parent.name for path in back.glob("*/*.txt")) == sorted(GOOD)
        assert "No such file" in lab.run("rsync-down", "/nowhere/at all", str(back), status=1).err
    finally:
        (lab.network.hosts["beta"].home / ".bashrc").write_text(CHATTER)
    assert "silence it" in lab.run("rsync-up", "--on", "beta", f"{here}/", "x", status=1).err


def on_terminal(lab: Lab, arguments: list[str], typed: bytes = b"") -> tuple[int, str]:
    """Run a command of the launcher on a terminal; return its status and all that was shown."""
    leader, follower = pty.openpty()
    process = lab.start(*arguments, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    told = b""
    try:
        os.write(leader, typed)
        deadline = time.monotonic() + 30 * SLACK
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    told += os.read(leader, 65536)
                except OSError:  # nobody has the other end any more
                    break
            elif ended:
                break
        return process.wait(5), told.decode()
    finally:
        os.close(leader)
        process.kill()
        process.wait()


@needs_hosts
def test_attach_opens_a_shell_in_the_clusters_environment(lab: Lab) -> None:
    status, told = on_terminal(lab, ["attach"], b"echo at=$ZRAY_ADDRESS= attached=$ZRAY_ATTACHED=; exit 5\n")
    assert status == 5, told
    assert "at=10.213.77.11:6480= attached=1=" in told


@needs_hosts
def test_a_terminal_shows_the_table(lab: Lab) -> None:
    status, told = on_terminal(lab, ["check"])
    assert status == 0
    last = told[told.rindex("host ") :]
    for host in GOOD:
        assert host in last
    assert "clock" in last
    assert "in use" in last


@needs_hosts
def test_a_node_that_crashed_is_started_again_alone(lab: Lab) -> None:
    before = lab.brokers()
    os.kill(before["beta"], signal.SIGKILL)
    wait_for(lambda: not alive(before["beta"]))
    done = lab.run("status", status=1)
    assert "beta:" in done.err
    assert "gamma:" not in done.err
    rows = lab.rows("up")
    assert {host: row["joined"] for host, row in rows.items()} == {
        "alpha": "was joined",
        "beta": "joined",
        "gamma": "was joined",
    }
    after = lab.brokers()
    assert (after["alpha"], after["gamma"]) == (before["alpha"], before["gamma"])
    assert after["beta"] != before["beta"]


# -- hosts that fail ------------------------------------------------------------------------------------------------------------

ALL = (*GOOD, "dead", "locked", "bare", "mute")
WORDS = {
    "dead": ("ssh", "No route to host"),
    "locked": ("ssh", "Permission denied"),
    "bare": ("python", "no Python"),
    "mute": ("ssh", "timed out"),
}


# -- hosts that fail ------------------------------------------------------------------------------------------------------------

WORDS = {
    "dead": ("ssh", "No route to host"),
    "locked": ("ssh", "Permission denied"),
    "bare": ("python", "no Python"),
    "mute": ("ssh", "timed out"),
}


@needs_hosts
def test_bad_hosts_are_named_and_stop_no_other(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("several", *GOOD, *WORDS)
    checked = lab.rows("check", status=1)
    lab.assert_nothing_left()
    done = lab.run("up", "--json", status=1)
    rows = {row["host"]: row for row in json.loads(done.out)}
    for name in GOOD:
        assert rows[name]["joined"] == "joined"
        assert checked[name]["ok"], checked[name]
    for name, (column, words) in WORDS.items():
        for found in (rows[name], checked[name]):
            assert found[column] == "failed"
            assert words in found["error"]
        assert f"\n{name}:" in done.err
        assert words in done.err
    rows = lab.rows("down", "--only", ",".join(GOOD))
    assert list(rows) == list(GOOD)
    lab.assert_nothing_left()


@needs_hosts
def test_without_its_head_nothing_is_started(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("unheaded", "locked", "alpha", "beta")
    rows = lab.rows("up", status=1)
    for name in ("alpha", "beta"):
        assert "the head (locked) does not run" in rows[name]["error"]
    lab.assert_nothing_left()


@needs_hosts
def test_check_sees_what_would_go_wrong(own_lab: Callable[..., Lab]) -> None:
    """A port that is taken, an address of another host, zray that is not there: named, and nothing is started."""
    lab = own_lab("wrong", *GOOD)
    content = lab.content
    content["hosts"][0]["port"] = 2222  # its sshd listens there
    content["hosts"][1]["address"] = DEAD
    content["hosts"][2]["env"] = {"PYTHONPATH": "/nowhere"}
    content["hosts"][2]["python"] = "/usr/bin/python3"
    lab.write(content)
    rows = lab.rows("check", status=1)
    assert "taken by another program" in rows["alpha"]["error"]
    assert "is not an address of this host" in rows["beta"]["error"]
    assert rows["gamma"]["install"] == "failed"
    assert rows["gamma"]["error"]
    rows = lab.rows("up", status=1)
    assert rows["alpha"]["port"] == "failed"
    lab.assert_nothing_left()


@needs_hosts
def test_an_unknown_host_key_does_not_hang(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("stranger", "alpha")
    content = lab.content
    content["ssh"]["options"] = ["UserKnownHostsFile=/dev/null"]
    lab.write(content)
    error = lab.rows("check", status=1)["alpha"]["error"]
    assert "Host key verification failed" in error
    assert "accept-new" in error


@needs_hosts
def test_a_shell_that_hangs_costs_its_limit_and_no_more(network: SshNetwork, own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("stuck", "gamma", timeout=2)
    profile, go = network.hosts["gamma"].home / ".bashrc", network.place / "go"
    profile.write_text(f"while ! [ -e {go} ]; do sleep 0.05; done\n")
    try:
        assert "no answer within 2 s" in lab.rows("up", status=1)["gamma"]["error"]
    finally:
        go.touch()  # what the user's own shell does there is not the launcher's to end
        profile.unlink()
    lab.assert_nothing_left()


@needs_hosts
def test_a_lost_head_makes_a_new_cluster(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("headless", "alpha", "beta", node_timeout=60)
    lab.run("up")
    keys = [(lab.directory(name) / "cluster.key").read_text() for name in ("alpha", "beta")]
    before = lab.brokers()
    # The worker cannot see that its head ends: it is still there, with the key of the old cluster, when the new head begins.
    stop(before["beta"])
    os.kill(before["alpha"], signal.SIGKILL)
    wait_for(lambda: not alive(before["alpha"]))
    rows = lab.rows("up")
    assert {row["joined"] for row in rows.values()} == {"joined"}
    assert not alive(before["beta"])
    now = [(lab.directory(name) / "cluster.key").read_text() for name in ("alpha", "beta")]
    assert now[0] == now[1]
    assert keys[0] == keys[1] != now[0]
    lab.run("down")
    lab.assert_nothing_left()


# -- clusters that outlive their head ----------------------------------------------------------------------------------------------

REMEMBER = "import sys, zray; zray.init(); zray.kv.put(b'word', sys.argv[1].encode())"
RECALL = "import zray; zray.init(); print(zray.kv.get(b'word').decode(), sum(node['Alive'] for node in zray.nodes()))"


@needs_hosts
def test_a_cluster_with_replicas_goes_on_under_another_head(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("copied", *GOOD, replicas=3)
    assert lab.rows("check")["alpha"]["note"] == "head, 3 replicas"
    assert lab.rows("up")["alpha"]["note"] == "head"
    wait_for(lambda: "tables on 3 of 3 nodes" in lab.run("status").out, what="three nodes have the tables")
    lab.run("exec", sys.executable, "-c", REMEMBER, "kept")
    before = lab.brokers()
    os.kill(before["alpha"], signal.SIGKILL)
    wait_for(lambda: not alive(before["alpha"]))
    found = json.loads(lab.run("status", "--json", status=1).out)
    heads = [row["host"] for row in found["hosts"] if row["note"] == "head"]
    assert heads in (["beta"], ["gamma"])
    assert {row["host"]: row["ok"] for row in found["hosts"]} == {"alpha": False, "beta": True, "gamma": True}
    rows = lab.rows("up")
    assert {host: row["joined"] for host, row in rows.items()} == {
        "alpha": "joined",
        "beta": "was joined",
        "gamma": "was joined",
    }
    assert [host for host, row in rows.items() if row["note"] == "head"] == heads
    after = lab.brokers()
    assert (after["beta"], after["gamma"]) == (before["beta"], before["gamma"])
    assert lab.run("exec", sys.executable, "-c", RECALL).out == "kept 3\n"
    # The file's head runs as a worker now, and that is as it should be.
    assert {row["joined"] for row in lab.rows("up").values()} == {"was joined"}
    assert lab.brokers() == after
    lab.run("down")
    lab.assert_nothing_left()


@needs_hosts
def test_a_head_with_storage_comes_back_to_its_nodes(own_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = own_lab("stored", "alpha", "beta", storage=f"sqlite:{tmp_path}/gcs.db", head_grace=120)
    assert lab.rows("check")["alpha"]["note"] == "head, storage sqlite"
    lab.run("up")
    assert "storage: sqlite" in lab.run("status").out
    lab.run("exec", sys.executable, "-c", REMEMBER, "kept")
    before = lab.brokers()
    os.kill(before["alpha"], signal.SIGKILL)
    wait_for(lambda: not alive(before["alpha"]))
    rows = lab.rows("up")
    assert {host: row["joined"] for host, row in rows.items()} == {"alpha": "joined", "beta": "was joined"}
    assert lab.brokers()["beta"] == before["beta"]
    assert lab.run("exec", sys.executable, "-c", RECALL).out == "kept 2\n"
    # What the storage has outlives the whole cluster, too.
    lab.run("down")
    lab.assert_nothing_left()
    lab.run("up")
    assert lab.run("exec", sys.executable, "-c", RECALL).out == "kept 2\n"
    lab.run("down")
    lab.assert_nothing_left()


# -- other networks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def far_network() -> Iterator[SshNetwork]:
    """Two hosts that are reached only through a third one."""
    made = SshNetwork()
    try:
        gate = made.add("gate")
        made.stand_apart(gate)
        gate.start()
        for name in GOOD[:2]:
            made.add(name).start()
        yield made
    finally:
        made.close()


@needs_hosts
def test_hosts_behind_a_jump_host(far_network: SshNetwork, tmp_path: Path) -> None:
    lab = make_lab(far_network, "behind", *GOOD[:2])
    try:
        rows = lab.rows("check")
        # Nodes meet where the jump host reaches them.
        assert {host: row["names"] for host, row in rows.items()} == {
            name: far_network.hosts[name].address for name in GOOD[:2]
        }
        lab.run("up")
        script = tmp_path / "places.py"
        script.write_text(PLACES)
        assert "alive 2" in lab.run("submit", str(script), *GOOD[:2]).out
        assert lab.run("exec", "--on", "all", "echo $SSH_CONNECTION").out.count(f"{far_network.addresses[0]}11 ") == 2
        if shutil.which("rsync") is not None:
            lab.run("rsync-up", str(script), f"{far_network.place}/sent.py")
            assert (far_network.place / "sent.py").read_text() == PLACES
        assert on_terminal(lab, ["attach"], b"exit 5\n")[0] == 5
        lab.run("down")
        lab.assert_nothing_left()
        # When the jump host is away it is the way to each host that fails, and that is said.
        far_network.hosts["gate"].stop()
        rows = lab.rows("check", status=1)
        assert all(
            f"{far_network.hosts['gate'].outer_address} port 2222: Connection refused" in row["error"]
            for row in rows.values()
        )
    finally:
        lab.destroy()


@pytest.fixture
def ipv6_network() -> Iterator[SshNetwork]:
    """Three hosts without IPv4 addresses."""
    made = SshNetwork(ipv6=True)
    try:
        for name in GOOD:
            made.add(name).start()
        yield made
    finally:
        made.close()


EVERY_WAY = """
import os, sys, zray
zray.init()
@zray.remote
def large():
    return bytes(30_000_000)
@zray.remote
class Counter:
    def __init__(self):
        self.total = 0
    def add(self):
        self.total += 1
        return self.total
host = {"resources": {sys.argv[1]: 0.1}}
print(len(zray.get(large.options(**host).remote())))
counter = Counter.options(num_cpus=0, **host).remote()
print(max(zray.get(counter.add.remote()) for _ in range(200)))
print(sorted(node["NodeManagerAddress"] for node in zray.nodes() if node["Alive"]))
"""


def run_zray(network: SshNetwork, host: str, *arguments: str) -> str:
    """Run `zray` on a host, beside what the launcher has there."""
    environment = {**os.environ, "ZRAY_RUNTIME_DIR": str(network.place / "by-hand"), "PYTHONPATH": str(PROJECT)}
    command = network.command(sys.executable, "-m", "zray.cli", *arguments, namespace=network.hosts[host].namespace)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60 * SLACK
    ).stdout


@needs_hosts
@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_hosts_with_nothing_but_ipv6_addresses(ipv6_network: SshNetwork, tmp_path: Path) -> None:
    lab = make_lab(ipv6_network, "six", *GOOD, replicas=3)
    head = f"[{ipv6_network.hosts['alpha'].address}]:6480"
    try:
        rows = lab.rows("check")
        assert {row["names"] for row in rows.values()} == {host.address for host in ipv6_network.hosts.values()}
        done = lab.run("up")
        assert f"the head is {head}" in done.err
        assert {row["address"] for row in json.loads(lab.run("status", "--json").out)["hosts"]} >= {head}
        assert lab.run("exec", "echo $ZRAY_ADDRESS").out == f"{head}\n"
        script = tmp_path / "places.py"
        script.write_text(PLACES)
        assert "alive 3" in lab.run("submit", str(script), *GOOD).out
        if shutil.which("rsync") is not None:
            lab.run("rsync-up", "--on", "beta", str(script), f"{ipv6_network.place}/sent.py")
            assert (ipv6_network.place / "sent.py").read_text() == PLACES
        script.write_text(EVERY_WAY)
        told = lab.run("submit", str(script), "gamma").out
        assert told.split("\n")[:3] == [
            "30000000",
            "200",
            str(sorted(host.address for host in ipv6_network.hosts.values())),
        ]
        key = str(lab.directory("alpha") / "cluster.key")
        run_zray(ipv6_network, "gamma", "start", "--address", head, "--key", key, "--num-cpus", "1")
        try:
            told = run_zray(ipv6_network, "gamma", "status", "--address", head)
            assert told.count("ALIVE") == 4
            assert f"[{ipv6_network.hosts['gamma'].address}]:" in told
            assert [node["Alive"] for node in json.loads(lab.run("status", "--json").out)["strangers"]] == [True]
        finally:
            run_zray(ipv6_network, "gamma", "stop")
        # A port that refuses is proof of an end also behind an address with colons: nobody waits for a timeout.
        before = lab.brokers()
        wait_for(lambda: "tables on 3 of 3 nodes" in lab.run("status").out, what="three nodes have the tables")
        os.kill(before["alpha"], signal.SIGKILL)
        wait_for(lambda: not alive(before["alpha"]))
        assert {row["joined"] for row in lab.rows("up").values()} == {"joined", "was joined"}
        assert lab.brokers()["beta"] == before["beta"]
        lab.run("down")
        lab.assert_nothing_left()
    finally:
        lab.destroy()


# -- interrupts ------------------------------------------------------------------------------------------------------------------


def wait_line(process: subprocess.Popen[str], words: str) -> None:
    """Wait for a line of standard error."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it ended before it said {words!r}")


@needs_hosts
def test_an_interrupted_up_takes_back_what_it_began(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("broken", *GOOD[:2], "mute")
    content = lab.content
    content["ssh"]["connect_timeout"] = 25  # it waits for the mute one when the signal comes
    lab.write(content)
    process = lab.start("up")
    wait_line(process, "beta: ")
    assert set(lab.brokers()) == {"alpha", "beta"}
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60 * SLACK)
    assert process.returncode == 128 + signal.SIGINT
    assert err.count("its node was ended again") == 2
    lab.assert_nothing_left()


@needs_hosts
def test_an_up_that_was_killed_is_finished_by_the_next(own_lab: Callable[..., Lab]) -> None:
    lab = own_lab("killed", *GOOD[:2])
    process = lab.start("up")
    wait_for(lambda: lab.brokers(), 30.0, "the head starts")
    process.kill()
    process.communicate()
    rows = lab.rows("up")
    assert all(row["ok"] for row in rows.values())
    lab.run("down")
    lab.assert_nothing_left()


# -- shells, installing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish"])
def test_every_login_shell_starts_the_program(shell: str, tmp_path: Path) -> None:
    """sshd runs `SHELL -c COMMAND`; so does this."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    token = "token0123456789"
    remote, text = bootstrap.introduction(token, sys.executable)
    message = json.dumps({"do": "reach", "addresses": [], "limit": 1}).encode() + b"\n"
    done = subprocess.run(
        [shell, "-c", remote],
        input=text + message,
        capture_output=True,
        timeout=60 * SLACK,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "dumb"},
        check=False,
    )
    said = Chatter(token).feed(done.stdout)
    assert [message.get("ok") for message in said] == [True, {}], done
    assert said[0]["executable"]
    assert done.returncode == 0


def pack_wheel(place: Path) -> Path:
    """Pack the package as it is here, extensions included, into a wheel that pip takes."""
    import zray

    info = f"zray-{zray.__version__}.dist-info"
    path = place / f"zray-{zray.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        names = []
        for file in sorted((PROJECT / "zray").rglob("*")):
            if file.suffix in (".py", ".so", ".pyi", ".yaml", ".sh"):
                names.append(str(file.relative_to(PROJECT)))
                wheel.write(file, names[-1])
        texts = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: zray\nVersion: {zray.__version__}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        for name, text in texts.items():
            wheel.writestr(name, text)
        record = "".join(f"{name},,\n" for name in [*names, *texts, f"{info}/RECORD"])
        wheel.writestr(f"{info}/RECORD", record)
    return path


@needs_hosts
def test_zray_is_installed_where_it_is_not(network: SshNetwork, own_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = own_lab("fresh", "alpha", "beta")
    content = lab.content
    # What zray needs is borrowed from here, as these hosts reach no index; zray itself is not.
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(("zray", "__editable__")) and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    content["env"]["PYTHONPATH"] = str(borrowed)
    content["python"] = sys.executable
    # Both hosts install into one directory, as with a shared home.
    content["install"] = {
        "wheels": [str(pack_wheel(tmp_path))],
        "pip_options": ["--no-index", "--no-deps"],
        "directory": str(network.place / "shared" / "venv"),
    }
    lab.write(content)
    assert {row["install"] for row in lab.rows("check").values()} == {"will be installed"}
    rows = lab.rows("up")
    assert all(row["ok"] for row in rows.values())
    executed = lab.run("exec", "python -c 'import zray; print(zray.__file__)'").out
    assert executed.startswith(content["install"]["directory"])
    rows = lab.rows("down", "--purge")
    assert sum("installation" in row["ended"] for row in rows.values()) >= 1
    assert not (network.place / "shared").exists()
    lab.assert_nothing_left()
