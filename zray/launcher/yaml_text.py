"""YAML text -> values that remember their line and key; typed reading that gathers every problem instead of stopping at the first.

Covers reading scalars as what is wanted there (so `no` can be a host's name and `0123` a label), unknown and repeated keys, merge keys
(`<<: *defaults`). Does not cover which keys there are (`config`). Pure, but for the import of PyYAML (its nodes carry lines; its constructor,
which would guess types and drop repeated keys, is not used).
"""

from __future__ import annotations

import difflib
import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_TRUE: Final = {"true", "yes", "on"}
_FALSE: Final = {"false", "no", "off"}
_MAX_DEPTH: Final = 20
_MAX_VALUES: Final = 50_000


class Problem(NamedTuple):
    """One thing that is wrong with a file."""

    line: int
    """From 1."""
    key: str
    """Like hosts[2].num_cpus; empty: the file as a whole."""
    text: str


class ConfigError(Exception):
    """The cluster's file cannot be used; the text has a line for each problem: file:line: key: what is wrong."""

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems)
        super().__init__("\n".join(f"{file}:{p.line}: {p.key + ': ' if p.key else ''}{p.text}" for p in self.problems))


class Value:
    """A node of the file: a scalar (text), a list, a mapping, or nothing (null)."""

    __slots__ = ("_problems", "key", "kind", "line", "parts", "text")

    def __init__(self, problems: list[Problem], key: str, line: int, kind: str) -> None:
        self._problems = problems
        self.key = key
        self.line = line
        self.kind = kind
        """scalar, list, mapping or null."""
        self.text = ""
        """Of a scalar, as written."""
        self.parts: list[tuple[str, int, Value]] = []
        """Of lists and mappings: key ("" in lists), its line, value."""

    @property
    def file_is_good(self) -> bool:
        """Whether nothing is wrong with the file so far."""
        return not self._problems

    def problem(self, text: str, line: int | None = None, key: str | None = None) -> None:
        """Note a problem of this value."""
        self._problems.append(Problem(self.line if line is None else line, self.key if key is None else key, text))

    # -- reading; each returns something usable when there is a problem, so that reading can go on ----------------------

    def string(self, pattern: str = "", what: str = "") -> str:
        """A text; `pattern` must match all of it, `what` says so in words."""
        if self.kind != "scalar":
            self.problem(f"must be {what or 'a text'}, not {self._kind_words()}")
            return ""
        if pattern and not re.fullmatch(pattern, self.text):
            self.problem(f"{self.text!r} is not {what}")
        return self.text

    def number(self, least: float = 0.0, most: float = math.inf) -> float:
        """A finite number within bounds."""
        try:
            if self.kind != "scalar":
                raise ValueError
            found = float(self.text)
        except ValueError:
            self.problem(f"must be a number, not {self._words()}")
            return least
        if not (least <= found <= most) or math.isinf(found):
            self.problem(f"must be {_between(least, most)}, not {self.text}")
        return found

    def integer(self, least: int = 0, most: int | None = None) -> int:
        """A whole number within bounds."""
        try:
            if self.kind != "scalar":
                raise ValueError
            found = int(self.text)
        except ValueError:
            self.problem(f"must be a whole number, not {self._words()}")
            return least
        if found < least or (most is not None and found > most):
            self.problem(f"must be {_between(least, math.inf if most is None else most)}, not {found}")
        return found

    def boolean(self) -> bool:
        """true or false."""
        word = self.text.lower() if self.kind == "scalar" else ""
        if word not in _TRUE | _FALSE:
            self.problem(f"must be true or false, not {self._words()}")
        return word in _TRUE

    def size(self) -> int:
        """Bytes: a whole number, or with a unit: 500MB, 4GiB."""
        match = _BYTES.fullmatch(self.text.strip()) if self.kind == "scalar" else None
        if match is None:
            self.problem(f"must be bytes, like 4000000000 or 4GB or 4GiB, not {self._words()}")
            return 0
        return int(float(match[1]) * {**_UNITS, **_BINARY}[(match[2] or "").lower()])

    def list_of(self, read: Callable[[Value], T]) -> list[T]:
        """A list; a single value counts as a list of one."""
        if self.kind == "list":
            return [read(value) for _, _, value in self.parts]
        if self.kind == "scalar":
            return [read(self)]
        self.problem(f"must be a list, not {self._kind_words()}")
        return []

    def mapping_of(self, read: Callable[[Value], T]) -> dict[str, T]:
        """A mapping with keys of the user's choice."""
        return {key: read(value) for key, _, value in self._entries()}

    def record(self, fields: dict[str, Callable[[Value], Any]], required: Iterable[str] = ()) -> dict[str, Any]:
        """A mapping with known keys: name -> how to read it. Null counts as not being there."""
        found: dict[str, Any] = {}
        for key, line, value in self._entries():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(fields))}"
                value.problem(f"unknown key; {hint}", line)
            elif value.kind != "null":
                found[key] = fields[key](value)
        for key in required:
            if key not in found and self.kind == "mapping":
                self.problem(f"{key} is missing")
        return found

    def _entries(self) -> list[tuple[str, int, Value]]:
        if self.kind == "mapping":
            return self.parts
        self.problem(f"must be a mapping (key: value), not {self._kind_words()}")
        return []

    def _kind_words(self) -> str:
        return {"scalar": f"the text {self.text!r}", "list": "a list", "mapping": "a mapping", "null": "nothing"}[
            self.kind
        ]

    def _words(self) -> str:
        return repr(self.text) if self.kind == "scalar" else self._kind_words()


def _between(least: float, most: float) -> str:
    return f"at least {least:g}" if math.isinf(most) else f"between {least:g} and {most:g}"


def parse(text: str, file: str, problems: list[Problem]) -> Value:
    """Read YAML.

    Args:
        text: of the file.
        file: its name, for errors.
        problems: those of the values returned come here, repeated keys at once.

    Raises:
        ConfigError: it is no YAML, more than one document, or without an end.
        ModuleNotFoundError: PyYAML is not installed.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(filter(None, [error.context, error.problem]))
        raise ConfigError(file, [Problem(mark.line + 1 if mark else 1, "", f"not YAML: {words}")]) from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(file, [Problem(1, "", f"not YAML: {error}")]) from None
    if root is None:
        raise ConfigError(file, [Problem(1, "", "the file is empty")])
    return _Reader(file, problems).value(root, "")


class _Reader:
    """Turns PyYAML's nodes into values. An alias is the same node again: what it stands for is read at each place."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self._file = file
        self._problems = problems
        self._around: list[Any] = []
        """Nodes that the one being read lies in."""
        self._count = 0

    def value(self, node: Any, key: str) -> Value:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > _MAX_VALUES:
            raise ConfigError(self._file, [Problem(line, key, f"more than {_MAX_VALUES} values: aliases of aliases?")])
        if any(node is other for other in self._around) or len(self._around) > _MAX_DEPTH:
            raise ConfigError(self._file, [Problem(line, key, "is nested in itself, or too deeply")])
        if node.id == "scalar":
            plain = node.style is None
            value = Value(self._problems, key, line, "null" if plain and node.tag.endswith(":null") else "scalar")
            value.text = node.value
            return value
        self._around.append(node)
        if node.id == "sequence":
            value = Value(self._problems, key, line, "list")
            for place, item in enumerate(node.value):
                value.parts.append(("", item.start_mark.line + 1, self.value(item, f"{key}[{place}]")))
        else:
            value = Value(self._problems, key, line, "mapping")
            self._fill(value, node)
        self._around.pop()
        return value

    def _fill(self, value: Value, node: Any) -> None:
        """Read a mapping's entries; those of merge keys come where there are no own ones."""
        own: dict[str, tuple[str, int, Value]] = {}
        merged: list[Any] = []
        for name, content in node.value:
            line = name.start_mark.line + 1
            if name.tag.endswith(":merge"):
                merged += content.value if content.id == "sequence" else [content]
                continue
            if name.id != "scalar":
                self._problems.append(Problem(line, value.key, "keys must be plain words"))
                continue
            path = f"{value.key}.{name.value}" if value.key else name.value
            if name.value in own:
                first = own[name.value][1]
                self._problems.append(Problem(line, path, f"stands here again; it was first in line {first}"))
            own[name.value] = (name.value, line, self.value(content, path))
        for other in merged:
            if other.id != "mapping":
                line = other.start_mark.line + 1
                self._problems.append(Problem(line, value.key, "only mappings can be merged with <<"))
                continue
            for part in self.value(other, value.key).parts:
                own.setdefault(part[0], part)
        value.parts = list(own.values())
