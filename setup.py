"""Extensions of zray; everything else about the build is in pyproject.toml.

Two kinds: the object store (`_store.pyx` over `_store_core.c`) and the door of a node (`_door.pyx` over `_door_core.c`),
which zray cannot run without, and the hot pure machines, which are ordinary annotated Python files compiled as they stand:
with the compiled form absent the same source runs interpreted, so tests and the simulator always exercise the code that
ships.

Switches (environment): ZRAY_SANITIZE=1 builds the store with ASan and UBSan, ZRAY_DEBUG=1 with assertions and crash points,
ZRAY_COVERAGE=1 with gcov, ZRAY_PURE=1 leaves the machines uncompiled, ZRAY_BUILT=1 builds nothing: the extensions are in place.
"""

from __future__ import annotations

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED_MACHINES = [
    "zray/broker/dependencies.py",
    "zray/broker/dispatch.py",
    "zray/broker/jobs.py",
    "zray/broker/ledger.py",
    "zray/broker/node.py",
    "zray/broker/placement.py",
    "zray/broker/scheduler.py",
    "zray/broker/task_events.py",
    "zray/broker/task_table.py",
    "zray/broker/worker_pool.py",
]


SMALL = ["-Wl,--strip-all"]
"""Symbol tables are a tenth of what is installed."""


def compile_flags() -> tuple[list[str], list[str]]:
    """Return (compiler flags, linker flags) for the switches in the environment."""
    flags = ["-std=gnu11", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    link: list[str] = ["-pthread", *SMALL]
    if os.environ.get("ZRAY_SANITIZE"):
        flags += ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        link = ["-pthread", "-fsanitize=address,undefined"]
    if os.environ.get("ZRAY_DEBUG"):
        flags += ["-g", "-O1", "-DZS_DEBUG=1", "-DZS_CRASH_POINTS=1"]
        link = [flag for flag in link if flag not in SMALL]
    if os.environ.get("ZRAY_COVERAGE"):
        flags += ["--coverage"]
        link += ["--coverage"]
    return flags, link


def extensions() -> list[Extension]:
    """Return the extension modules to build: the store, then the compiled machines that exist."""
    if os.environ.get("ZRAY_BUILT"):
        return []
    flags, link = compile_flags()
    found = [
        Extension(
            "zray._store",
            ["zray/_store.pyx", "zray/_store_core.c"],
            depends=["zray/_store_core.h", "zray/_store_core.pxd"],
            extra_compile_args=flags,
            extra_link_args=link,
        ),
        Extension(
            "zray._door",
            ["zray/_door.pyx", "zray/_door_core.c"],
            depends=["zray/_door_core.h"],
            extra_compile_args=flags,
            extra_link_args=link,
        ),
    ]
    if not os.environ.get("ZRAY_PURE"):
        machine_flags = ["-O2", "-g0", "-Wno-unused-function"]
        for path in COMPILED_MACHINES:
            if Path(path).exists():
                module = path.removesuffix(".py").replace("/", ".")
                found.append(Extension(module, [path], extra_compile_args=machine_flags, extra_link_args=SMALL))
    return found


setup(
    ext_modules=cythonize(
        extensions(),
        compiler_directives={"language_level": "3", "embedsignature": False, "binding": True},
        quiet=True,
    )
)
