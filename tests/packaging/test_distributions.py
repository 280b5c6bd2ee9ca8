"""The distributions: the sdist holds what a build needs, the wheel only what runs.

They are built here from a copy of the sources, unless ZRAY_DIST names a directory that holds fresh ones: `.ci/run`, which
also installs the wheel elsewhere and runs a program from it, has them already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytest.importorskip("build", reason="build is not installed (extra: test)")
pytest.importorskip("Cython", reason="Cython is not installed (extra: test)")

ROOT = Path(__file__).parents[2]
WHEEL_LIMIT = 2_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that holds both; build them from a copy, so that nothing is written beside the sources."""
    if ready := os.environ.get("ZRAY_DIST"):
        return Path(ready)
    place = tmp_path_factory.mktemp("distributions")
    unwanted = shutil.ignore_patterns(
        ".*_cache", ".venv", ".git", ".hypothesis", "build", "dist", "*.so", "__pycache__"
    )
    shutil.copytree(ROOT, place / "source", ignore=unwanted)
    # -O0: what is packed is asked here, not how fast it runs.
    environment = {**os.environ, "CFLAGS": "-O0"}
    # A wheel built by way of the sdist proves that the sdist is whole.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(place / "source")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=380, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return place / "dist"


@pytest.fixture(scope="module")
def wheel_names(distributions: Path) -> set[str]:
    (wheel,) = distributions.glob("zray-*.whl")
    assert wheel.stat().st_size < WHEEL_LIMIT
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(*suffixes: str) -> set[str]:
    """Return the paths of the package's files with one of `suffixes`, relative to the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "zray").rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_module_and_the_types(wheel_names: set[str]) -> None:
    missing = sources(".py", ".pyi") - wheel_names
    assert not missing
    assert {f"zray/_perf/{path.name}" for path in (ROOT / "perf").glob("*.py")} <= wheel_names
    assert "zray/py.typed" in wheel_names
    assert any(name.startswith("zray/_store.") and name.endswith(".so") for name in wheel_names)


def test_the_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    packed = {PurePosixPath(name) for name in wheel_names}
    assert {path.parts[0] for path in packed if "dist-info" not in path.parts[0]} == {"zray"}
    recipes = {path for path in packed if path.parts[:3] == ("zray", "launcher", "recipes")}
    assert {path.name for path in recipes} == {"slurm.sh", "k8s.yaml"}
    rest = {path.suffix for path in packed - recipes if path.parts[0] == "zray"}
    assert rest <= {".py", ".pyi", ".so", ".typed"}


def test_the_wheel_names_its_licence_and_script(wheel_names: set[str], distributions: Path) -> None:
    (info,) = {name.split("/")[0] for name in wheel_names if ".dist-info/" in name}
    assert f"{info}/licenses/LICENSE" in wheel_names
    (wheel,) = distributions.glob("zray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "zray = zray.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_sdist_holds_sources_tests_and_examples_and_nothing_built(distributions: Path) -> None:
    (sdist,) = distributions.glob("zray-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = sources(".py", ".pyi", ".pyx", ".pxd", ".h") | {"zray/_store_core.c", "Makefile", "setup.py", "LICENSE"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    expected |= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.*") if path.suffix != ".pyc"
    }
    assert not expected - names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}
    assert "zray/_store.c" not in names
