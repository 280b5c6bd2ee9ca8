"""`zray-cluster` as far as no host is needed: mistakes, exit statuses, recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from zray.launcher import cli, templates


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_a_bad_file_is_told_with_line_and_key(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed (extra: cluster)")
    path = tmp_path / "lab.yaml"
    path.write_text("name: lab\nhosts: [alpha]\nprot: 1\n")
    for arguments in (["up", str(path)], ["exec", "-f", str(path), "true"], ["logs", "-f", str(path)]):
        found = run(*arguments)
        assert found.exit_code == 2
        assert f"{path}:3: prot: unknown key; did you mean port?" in found.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["down", "FILE", "--only", "gamma"], "no host gamma"),
        (["submit", "-f", "FILE", "--on", "all", "FILE"], "this takes one host, not 2"),
        (["exec", "-f", "FILE", "--on", "n[", "true"], "bracket"),
        (["up", "/nowhere/lab.yaml"], "/nowhere/lab.yaml:1: cannot be read: No such file"),
        (["template", "mesos"], "mesos"),
    ],
)
def test_mistakes_end_with_status_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed (extra: cluster)")
    path = tmp_path / "lab.yaml"
    path.write_text("name: lab\nhosts: [alpha, beta]\n")
    found = run(*(str(path) if word == "FILE" else word for word in arguments))
    assert found.exit_code == 2
    assert words in found.output


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "lab.yaml"
    path.write_text("name: lab\nhosts: [alpha]\n")
    found = run("status", str(path))
    assert found.exit_code == 1
    assert "pip install 'zray[cluster]'" in found.output


def test_recipes_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    assert run("template", "slurm").output == templates.text("slurm")
    assert run("template", "slurm", "--out", str(path)).exit_code == 0
    assert path.read_text() == templates.text("slurm")
    assert "is there already" in run("template", "slurm", "--out", str(path)).output


def test_help_is_quick() -> None:
    program = (
        "import sys\nfrom zray.launcher.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'zmq', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")
    for command in ("up", "down", "status", "check", "exec", "submit", "attach", "rsync-up", "rsync-down", "logs"):
        assert f"\n  {command} " in done.stdout
