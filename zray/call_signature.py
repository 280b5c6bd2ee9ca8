"""Checking the arguments of a call where it is made, not where it runs: `f.remote(1, 2)` with a wrong number of arguments raises at once.

Covers functions and constructors whose signature can be told. What cannot be told (builtins, C extensions) is not checked.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """The parameters of a callable, with a quick answer for plain positional calls."""

    __slots__ = ("_signature", "least", "most")

    def __init__(self, signature: inspect.Signature | None, skip_first: bool) -> None:
        if signature is not None and skip_first:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self._signature = signature
        self.least, self.most = 0, 1 << 30
        """Numbers of positional arguments that a call without keywords may have; least > most: ask the signature."""
        if signature is not None:
            self._count(signature)

    def _count(self, signature: inspect.Signature) -> None:
        least = most = 0
        for parameter in signature.parameters.values():
            if parameter.kind in _POSITIONAL:
                most += 1
                least += parameter.default is parameter.empty
            elif parameter.kind is parameter.VAR_POSITIONAL:
                most = 1 << 30
            elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                least = 1 << 30
        self.least, self.most = least, most

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Raise TypeError when the callable does not take these arguments."""
        if not kwargs and self.least <= len(args) <= self.most:
            return
        if self._signature is not None:
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None


def signature_of(function: Callable[..., Any], *, skip_first: bool = False) -> Signature:
    """Return the signature of a callable; skip_first leaves out `self`."""
    try:
        return Signature(inspect.signature(function), skip_first)
    except (ValueError, TypeError):
        return Signature(None, skip_first)
