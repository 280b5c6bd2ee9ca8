"""What pickling must know of object references, and nothing else.

Covers the type test for a reference and the collector that notes references met inside a value while it is pickled, so
that whoever stores the value can hold them. Does not cover the reference itself: `ObjectRef` is a Cython class in
`_store.pyx`, which enters itself here (`set_ref_class`); tests enter a fake. Neighbour: `zray.serialization`.
"""

from __future__ import annotations

import threading
from typing import Any


class _NoClassYet:
    """Stands for the class of references until one is set: nothing is an instance of it."""


class _Collecting(threading.local):
    """Per thread: the list that takes the references met by the pickling in progress, None when there is none."""

    refs: list[Any] | None = None


collecting = _Collecting()
ref_class: type = _NoClassYet


def set_ref_class(cls: type) -> None:
    """Say which class references have; instances of subclasses do not count."""
    global ref_class
    ref_class = cls


def is_ref(value: object) -> bool:
    """Tell whether the value is a reference."""
    return type(value) is ref_class


def note_contained(ref: Any) -> bool:
    """Note a reference that is being pickled (called by its `__reduce__`).

    Returns:
        False when nobody collects: the reference leaves zray's sight (say, by a plain `pickle.dumps` of the user's).
    """
    refs = collecting.refs
    if refs is None:
        return False
    refs.append(ref)
    return True
