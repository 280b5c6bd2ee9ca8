"""What the package declares about itself, read from pyproject.toml and the sources: dependencies, versions, scripts."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parents[2]
REQUIRED = {"pyzmq", "cloudpickle", "cryptography", "msgspec", "numpy", "sortedcontainers", "psutil", "click", "rich"}


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    if tomllib is None:
        pytest.skip("tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_required_packages_are_few_and_known(project: dict[str, list[str]]) -> None:
    names = [re.match(r"[\w-]+", requirement).group() for requirement in project["dependencies"]]
    assert sorted(names) == sorted(REQUIRED)


def test_extras_and_script(project: dict[str, dict[str, object]]) -> None:
    assert set(project["optional-dependencies"]) == {"cluster", "demo", "redis", "test"}
    assert project["scripts"] == {"zray": "zray.cli:main", "zray-cluster": "zray.launcher.cli:main"}


def test_one_version_everywhere(project: dict[str, str]) -> None:
    import zray

    assert zray.__version__ == project["version"] == metadata.version("zray")
    assert f"\n## {project['version']} " in (ROOT / "CHANGES.md").read_text()


def run_python(program: str) -> str:
    """Return what a fresh interpreter prints; warnings are errors in it."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["numpy", "rich", "click", "yaml", "matplotlib", "gymnasium"])
def test_importing_zray_leaves_heavy_packages_alone(name: str) -> None:
    # `remote` is what a module of the user's decorates with before anything runs, so it must be as light as the import.
    program = f"import sys, zray\n@zray.remote\ndef f(): pass\nprint({name!r} in sys.modules)"
    assert run_python(program) == "False\n"


def test_importing_zray_changes_nothing_of_the_process() -> None:
    program = (
        "import os, signal, sys, threading, warnings\n"
        "def state():\n"
        "    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]\n"
        "    hooks = (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, sys.getswitchinterval())\n"
        "    return dict(os.environ), os.getcwd(), handlers, hooks, threading.active_count()\n"
        "before = state()\n"
        "import zray\n"
        "print(state() == before, len(os.listdir('/proc/self/task')))\n"
    )
    assert run_python(program) == "True 1\n"


def test_the_command_line_answers_without_loading_the_engine() -> None:
    program = (
        "import sys\nfrom zray.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'zmq', 'numpy', 'rich', 'gymnasium'} & set(sys.modules)))"
    )
    output = run_python(program)
    assert output.endswith("[]\n")
    for command in ("demo", "microbenchmark", "version"):
        assert f"\n  {command} " in output
