"""Amounts of resources in fixed point: parsing, arithmetic, and a short canonical form in bytes.

Covers vectors of named amounts as demands and as what is available. Does not cover which node or device is chosen
(`zray.broker`), or which options of a call make up its demand (`zray.options.resources_of`).

A vector is a plain dict of name to whole numbers of 1/10000 (UNIT is one), without zeros: thirds and tenths add up
exactly, on every machine. Packed, equal vectors are equal bytes, so the bytes serve as keys.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor, isfinite
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

UNIT: Final = 10_000
"""One, in fixed point."""

# Names that take one byte in the packed form; the numbers are part of the protocol and never change.
_CODES: Final = {"CPU": 1, "GPU": 2, "memory": 3, "object_store_memory": 4}
_NAMES: Final = {code: name for name, code in _CODES.items()}


def fixed(amount: float, name: str = "") -> int:
    """Return an amount in fixed point, rounded down (so that three thirds fit into one).

    Args:
        amount: number of units, not negative; whole for more than one GPU.
        name: of the resource, for the error.

    Raises:
        TypeError: not a number.
        ValueError: negative, not finite, or more than zero but below 0.0001.
    """
    if type(amount) is int:
        units = amount * UNIT
    elif isinstance(amount, (int, float)) and not isinstance(amount, bool):
        if not isfinite(amount):
            raise ValueError(f"The quantity of resource {name} must be a finite number, got {amount}")
        # Products such as 0.0003 * 10000 come out a little low: a millionth of a unit makes up for it.
        units = floor(amount * UNIT + 1e-6)
    else:
        raise TypeError(f"The quantity of resource {name} must be a number, got {type(amount).__name__}")
    if amount < 0:
        raise ValueError(f"The quantity of resource {name} cannot be negative, got {amount}")
    if units == 0 and amount > 0:
        raise ValueError(f"The precision of the fractional quantity of resource {name} cannot go beyond 0.0001")
    if name in ("GPU", "num_gpus") and units > UNIT and units % UNIT:
        raise ValueError(f"The quantity of resource {name} must be a whole number when it is more than 1, got {amount}")
    return units


def parse(amounts: Mapping[str, float]) -> dict[str, int]:
    """Return the vector of these amounts, sorted by name, without zeros.

    Raises:
        TypeError, ValueError: a bad name or amount; see `fixed`.
    """
    found = {}
    for name in sorted(check_name(name) for name in amounts):
        units = fixed(amounts[name], name)
        if units:
            found[name] = units
    return found


def check_name(name: object) -> str:
    """Return the name of a resource; TypeError or ValueError when it cannot be one."""
    if not isinstance(name, str):
        raise TypeError(f"The name of a resource must be a string, got {name!r}")
    if not name or len(name.encode()) > 255:
        raise ValueError(f"The name of a resource must have 1 to 255 bytes, got {name!r}")
    return name


def as_floats(vector: Mapping[str, int]) -> dict[str, float]:
    """Return the amounts as people write them."""
    return {name: units / UNIT for name, units in vector.items()}


def shown(vector: Mapping[str, int]) -> str:
    """Return the vector for people, e.g. "{CPU: 1, GPU: 0.5}"."""
    return "{" + ", ".join(f"{name}: {units / UNIT:g}" for name, units in sorted(vector.items())) + "}"


# -- arithmetic ------------------------------------------------------------------------------------------------------


def fits(demand: Mapping[str, int], available: Mapping[str, int]) -> bool:
    """Tell whether there is enough of everything."""
    return all(available.get(name, 0) >= units for name, units in demand.items())


def take(demand: Mapping[str, int], available: dict[str, int]) -> None:
    """Take the demand away, by force if it does not fit.

    A task that was blocked goes on with what it had lent, so what is available may fall below zero until others end.
    """
    for name, units in demand.items():
        available[name] = available.get(name, 0) - units


def give_back(demand: Mapping[str, int], available: dict[str, int], total: Mapping[str, int]) -> None:
    """Undo `take`.

    Raises:
        ValueError: more would be available than there is; nothing is changed then.
    """
    for name, units in demand.items():
        if available.get(name, 0) + units > total.get(name, 0):
            raise ValueError(f"more {name} given back than was taken: {shown(demand)} onto {shown(available)}")
    for name, units in demand.items():
        available[name] = available.get(name, 0) + units


# -- bytes -----------------------------------------------------------------------------------------------------------


def pack(vector: Mapping[str, int]) -> bytes:
    """Return the canonical bytes of a demand: equal vectors give equal bytes, {} gives b"".

    For each amount in the order of names: one byte for a well-known name, or 0, the length and the name; then the
    amount, seven bits a byte, low bits first, the high bit marks that more follow.
    """
    return _pack(tuple(sorted(vector.items())))


@lru_cache(maxsize=1024)
def _pack(items: tuple[tuple[str, int], ...]) -> bytes:
    out = bytearray()
    for name, units in items:
        if units <= 0:
            if units == 0:
                continue
            raise ValueError(f"a demand has no negative amounts: {name}: {units}")
        code = _CODES.get(name, 0)
        out.append(code)
        if not code:
            raw = check_name(name).encode()
            out.append(len(raw))
            out += raw
        while units > 127:
            out.append(units & 127 | 128)
            units >>= 7
        out.append(units)
    return bytes(out)


def unpack(data: bytes) -> dict[str, int]:
    """Return the vector that `pack` packed; ValueError for anything else."""
    found: dict[str, int] = {}
    try:
        place = 0
        while place < len(data):
            code = data[place]
            place += 1
            if code:
                name = _NAMES[code]
            else:
                end = place + 1 + data[place]
                name = data[place + 1 : end].decode()
                place = end
            units = shift = 0
            while True:
                byte = data[place]
                place += 1
                units |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            found[name] = units
    except (IndexError, KeyError, UnicodeDecodeError):
        raise ValueError(f"not a packed vector of resources: {data!r}") from None
    if pack(found) != data:
        raise ValueError(f"not a packed vector of resources: {data!r}")
    return found
