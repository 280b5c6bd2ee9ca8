"""The Cython declarations repeat the header: every call, with the same number of arguments, and every constant.

Covers names and arity. Types are checked by the C compiler when the extension is built.
"""

from __future__ import annotations

import re

from tests.store.build import PACKAGE

HEADER = re.sub(r"/\*.*?\*/", "", (PACKAGE / "_store_core.h").read_text(), flags=re.S)
DECLARED = re.sub(r"#.*", "", (PACKAGE / "_store_core.pxd").read_text())


def functions(text: str) -> dict[str, int]:
    """Return {name: number of arguments} of the store's calls."""
    found = re.findall(r"\b(?:int|void|size_t|uint\d+_t)\s+(zs_\w+)\(([^)]*)\)", text)
    return {name: arguments.count(",") + 1 for name, arguments in found}


def test_calls_are_declared() -> None:
    header = functions(HEADER.partition("#ifdef ZS_CRASH_POINTS")[0])
    assert len(header) > 60
    assert functions(DECLARED) == header


def test_constants_are_declared() -> None:
    constants = set(re.findall(r"\b(ZS_[A-Z_]+)\b(?=\s*[=,}\n]|\s+\d|\s+0x)", HEADER)) - {"ZS_CRASH_POINTS"}
    assert len(constants) > 40
    assert constants <= set(re.findall(r"\bZS_[A-Z_]+\b", DECLARED))
