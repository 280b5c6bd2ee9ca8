"""Compiles the store, the door and their C tests, away from the extensions: with sanitizers, crash points and planted faults.

Covers finding the compiler and running it once per kind of build and test run. Does not cover the tests themselves (`core.c`, `kills.c`, `door.c`).
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "zray"
STRICT = [
    "-std=gnu11",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
    "-DZS_CRASH_POINTS",
    "-DZS_FAULTS",
    f"-I{PACKAGE}",
]
SANITIZED = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
PLAIN = ["-O2"]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zray-ctests-")


def _compile(output: str, sources: list[Path], flags: list[str]) -> Path:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    target = Path(_directory().name, output)
    command = [*compiler, *STRICT, *flags, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return target


@functools.cache
def core_tests(sanitized: bool) -> Path:
    """Return the program of `core.c`."""
    flags = SANITIZED if sanitized else PLAIN
    return _compile(f"core-{sanitized}", [HERE / "core.c", PACKAGE / "_store_core.c"], [*flags, "-Wl,--wrap=fallocate"])


@functools.cache
def kill_tests(sanitized: bool) -> Path:
    """Return the program of `kills.c`."""
    return _compile(
        f"kills-{sanitized}", [HERE / "kills.c", PACKAGE / "_store_core.c"], SANITIZED if sanitized else PLAIN
    )


@functools.cache
def door() -> Path:
    """Return the program of `door.c`, with sanitizers."""
    return _compile("door", [HERE / "door.c", PACKAGE / "_door_core.c"], SANITIZED)


@functools.cache
def shared_library() -> Path:
    """Return the store as a shared library for ctypes."""
    return _compile("store.so", [PACKAGE / "_store_core.c"], [*PLAIN, "-fPIC", "-shared"])


def run(program: Path, *arguments: str, timeout: float = 300.0) -> tuple[int, str]:
    """Run a program to its end; return (exit status, what it wrote). A watchdog's kill counts as status 124."""
    # Leak detection wants ptrace, which containers often forbid; the store never allocates.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    with subprocess.Popen(
        [str(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as running:
        try:
            output, _ = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            running.kill()  # its children end with it
            output, _ = running.communicate()
            return 124, output
    return running.returncode, output
