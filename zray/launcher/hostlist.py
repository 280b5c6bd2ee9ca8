"""Host names in ranges, as pdsh and clush write them: `node[01-03,7]-ib` is node01-ib, node02-ib, node03-ib, node7-ib. Pure."""

from __future__ import annotations

import re
from typing import Final

_BRACKETS: Final = re.compile(r"\[([^\[\]]*)\]")
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
MAX_HOSTS: Final = 10_000
"""More is a slip of the pen."""


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in order.

    Raises:
        ValueError: a bracket holds something else than numbers and ranges, or there are too many names.
    """
    found = _BRACKETS.search(pattern)
    if found is None:
        if "[" in pattern or "]" in pattern:
            raise ValueError(f"{pattern!r} has a bracket without its other half")
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    rests = expand(after)
    names = [before + number + rest for number in _numbers(found[1], pattern) for rest in rests]
    if len(names) > MAX_HOSTS:
        raise ValueError(f"{pattern!r} stands for more than {MAX_HOSTS} hosts")
    return names


def _numbers(text: str, pattern: str) -> list[str]:
    """Numbers of one bracket; as many digits as the first of a range has (01-10), at least."""
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{pattern!r}: {part!r} is neither a number nor a range like 01-16")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ValueError(f"{pattern!r}: {part!r} runs backwards")
        if int(last) - int(first) >= MAX_HOSTS:
            raise ValueError(f"{pattern!r} stands for more than {MAX_HOSTS} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
