"""What travels and what is shown: lines of conversations, command lines, output of programs, rows."""

from __future__ import annotations

import base64
import itertools
import shlex
import tarfile
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zray.launcher import bootstrap, jobs, rows, ssh, templates, transfer
from zray.launcher.config import ClusterFile, Host, Ssh
from zray.launcher.facts import Chatter, join_address, minor
from zray.launcher.output import Lines, Output
from zray.launcher.rows import Mark, Row

HOST = Host("alpha", "me@alpha", ssh_options=("Port=22",))
CLUSTER = ClusterFile("lab", "lab.yaml", "alpha", (HOST,), ssh=Ssh(options=("ConnectTimeout=3",)))

# -- conversations -------------------------------------------------------------------------------------------------------


def test_messages_are_told_apart_from_chatter_at_any_cut() -> None:
    text = b'Welcome!\nno end of line\ntoken {"ok": 1}\n\x1b[0mprompt$ token {"ok": 2}\ntoken nonsense\nbye'
    for size in range(1, len(text) + 1):
        chatter = Chatter("token")
        found = []
        for start in range(0, len(text), size):
            found += chatter.feed(text[start : start + size])
        assert found == [{"ok": 1}, {"ok": 2}]
        said = [line.strip() for line in chatter.rest().splitlines()]
        assert said == ["Welcome!", "no end of line", "\x1b[0mprompt$", "token nonsense", "bye"]


def test_endless_chatter_is_not_kept() -> None:
    chatter = Chatter("token")
    for _ in range(100):
        chatter.feed(b"x" * (1 << 20))
    assert len(chatter.rest()) < 100_000
    assert chatter.feed(b'\ntoken {"ok": true}\n') == [{"ok": True}]


def test_small_helpers() -> None:
    assert minor("3.11.7") == "3.11"
    assert join_address("10.0.0.1", 5) == "10.0.0.1:5"
    assert join_address("fe::1", 5) == "[fe::1]:5"


# -- command lines -------------------------------------------------------------------------------------------------------


def test_ssh_is_called_so_that_it_never_asks_and_the_files_options_win() -> None:
    command = ssh.command(CLUSTER.ssh, HOST, "remote words")
    assert command[0] == "ssh"
    assert command[-3:] == ["--", "me@alpha", "remote words"]
    options = [word for before, word in itertools.pairwise(command) if before == "-o"]
    assert options[:3] == ["BatchMode=yes", "Port=22", "ConnectTimeout=3"]  # the first of a kind counts
    assert "ConnectTimeout=10" in options
    assert "-F" not in command
    assert ssh.command(Ssh(config="/x"), HOST, "y")[1:3] == ["-F", "/x"]


def test_the_remote_command_has_nothing_to_quote_and_no_secret() -> None:
    remote, text = bootstrap.introduction("token", "/odd place/it's/python")
    inner = shlex.split(remote)
    assert inner[:2] == ["sh", "-c"]
    count = int(inner[2].split("count=")[1].split()[0])
    script, program = text[:count].decode(), text[count:].decode()
    assert shlex.quote("/odd place/it's/python") in script
    assert str(len(program)) in script
    compile(program, "program", "exec")
    assert "token" not in remote
    assert not set(remote) & set("!\n\\")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Host key verification failed.", "accept-new"),
        ("root@x: Permission denied (publickey).", "does not take your key"),
        ("ssh: Could not resolve hostname x: Name or service not known", "no such name"),
        ("something else", ""),
    ],
)
def test_advice(said: str, words: str) -> None:
    assert words in ssh.advice(said)
    assert bool(words) == bool(ssh.advice(said))


def test_rsync_takes_names_as_they_are() -> None:
    up = transfer.rsync_command(CLUSTER, HOST, transfer.Files("it's here", "there *", True, True, ("*.o",)), True)
    assert up[-3:] == ["--", "it's here", "me@alpha:there *"]
    assert "--delete" in up
    assert "--exclude=*.o" in up
    assert "-s" in up
    assert shlex.split(up[up.index("-e") + 1])[0] == "ssh"
    down = transfer.rsync_command(CLUSTER, HOST, transfer.Files("a", "b/", False), True)
    assert down[-2:] == ["me@alpha:a", "b/alpha/"]
    assert transfer.rsync_command(CLUSTER, HOST, transfer.Files("a", "b", False), False)[-1] == "b"
    six = Host("six", "fe::1")
    assert transfer.rsync_command(CLUSTER, six, transfer.Files("a", "b", True), False)[-1] == "[fe::1]:b"
    other = Host("b", "me@fe::1")
    assert transfer.rsync_command(CLUSTER, other, transfer.Files("a", "b", True), False)[-1] == "me@[fe::1]:b"


def test_a_shell_is_opened_by_a_line_that_every_shell_reads_alike() -> None:
    assert shlex.split(jobs.shell_command("/tmp/z"))[:2] == ["sh", "-c"]
    with pytest.raises(ssh.HostError, match="amiss"):
        jobs.shell_command("/home/o'neill/z")


def test_exit_codes_are_those_of_a_shell() -> None:
    assert [jobs.exit_code(status) for status in (0, 3, -15)] == [0, 3, 143]


def test_jobs_travel_with_their_directory(tmp_path: Path) -> None:
    for name in ("job.py", "data/a.txt", ".git/config", "data/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(packed: bytes) -> list[str]:
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            return sorted(member.name for member in archive if member.isfile())

    name, packed = jobs.pack(tmp_path / "job.py", tmp_path)
    assert (name, names(packed)) == ("job.py", ["./data/a.txt", "./job.py"])
    name, packed = jobs.pack(tmp_path / "data" / "a.txt", None)
    assert (name, names(packed)) == ("a.txt", ["a.txt"])
    with pytest.raises(ValueError, match=r"job\.py"):
        jobs.pack(tmp_path / "job.py", tmp_path / "data")


# -- output --------------------------------------------------------------------------------------------------------------


def event(text: str, **more: str) -> dict[str, Any]:
    return {"stream": "out", "data": base64.b64encode(text.encode()).decode(), **more}


def test_output_of_one_host_passes_as_it_comes() -> None:
    output = Output(["alpha"])
    assert output.feed("alpha", event("no end")) == ("out", b"no end")
    assert output.rest() == []


def test_output_of_several_hosts_is_whole_lines_with_names() -> None:
    output = Output(["a", "beta"])
    assert output.feed("a", event("one\ntw")) == ("out", b"a    | one\n")
    assert output.feed("beta", event("x\n")) == ("out", b"beta | x\n")
    assert output.feed("a", event("o\n")) == ("out", b"a    | two\n")
    assert output.feed("a", event("log\n", file="w1")) == ("out", b"a    w1 | log\n")
    output.feed("beta", event("end"))
    assert output.rest() == [("out", b"beta | end\n")]


def test_a_line_without_an_end_is_shown_in_the_end() -> None:
    lines = Lines("x | ")
    assert lines.feed(b"y" * 100_000) == b"x | " + b"y" * 100_000 + b"\n"


# -- rows ----------------------------------------------------------------------------------------------------------------


def drawn(rows_: list[Row]) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(rows.table(rows_, rows.UP, {"beta": 12.34}))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_rows_show_what_goes_on() -> None:
    alpha, beta = Row("alpha", rows.UP), Row("beta", rows.UP)
    alpha.set("ssh", Mark.GOOD, "0.2 s")
    alpha.set("joined", Mark.GOOD)
    alpha.seconds = 1.26
    alpha.note = "head"
    beta.set("ssh", Mark.WORKING)
    beta.set("install", Mark.WORKING, "pip")
    head, first, second = drawn([alpha, beta]).splitlines()
    assert head.split() == ["host", "ssh", "python", "install", "port", "joined", "seconds", "note"]
    assert first.split() == ["alpha", "0.2", "s", "-", "-", "-", "ok", "1.3", "head"]
    assert second.split() == ["beta", "...", "-", "pip", "...", "-", "-", "12.3"]
    assert rows.plain_line(alpha) == "alpha: ssh 0.2 s  python -  install -  port -  joined ok  1.3 s  head"


def test_text_of_hosts_is_no_markup() -> None:
    row = Row("alpha", rows.UP)
    row.set("ssh", Mark.GOOD, "[bold]x[/nonsense]")
    assert "[bold]x[/nonsense]" in drawn([row])


def test_failures_are_reported_with_names() -> None:
    alpha, beta = Row("alpha", rows.UP), Row("beta", rows.UP)
    assert rows.failures([alpha, beta]) == ""
    beta.fail("ssh", "one\ntwo")
    assert beta.failed
    assert rows.failures([alpha, beta]) == "beta:\n    one\n    two"
    assert beta.as_json() | {"seconds": 0} == {
        "host": "beta",
        "ok": False,
        "ssh": "failed",
        "python": "waiting",
        "install": "waiting",
        "port": "waiting",
        "joined": "waiting",
        "seconds": 0,
        "note": "",
        "error": "one\ntwo",
    }


# -- recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(templates.FILES))
def test_recipes_use_options_that_exist(kind: str) -> None:
    import re

    from zray import cli

    text = templates.text(kind)
    calls = re.findall(r"zray (start|key|stop|status)\b([^\n]*)", text.replace("\\\n", " "))
    assert {"start"} <= {name for name, _ in calls}
    for name, rest in calls:
        known = {option for parameter in cli.main.commands[name].params for option in parameter.opts}
        used = set(re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0]))
        assert used <= known, (name, used - known)
