"""The public key-value store."""

from __future__ import annotations

import os
from typing import Any

import pytest

import zray

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def space(request: pytest.FixtureRequest) -> str:
    """A namespace that only this test uses."""
    return f"space of {request.node.name}"


def test_put_get_overwrite(space: str) -> None:
    assert zray.kv.get("a", namespace=space) is None
    assert zray.kv.put("a", b"1", namespace=space)
    assert zray.kv.get("a", namespace=space) == b"1"
    assert not zray.kv.put("a", b"2", namespace=space)
    assert zray.kv.get("a", namespace=space) == b"2"
    assert not zray.kv.put("a", b"3", overwrite=False, namespace=space)
    assert zray.kv.get("a", namespace=space) == b"2"
    assert zray.kv.put("new", b"3", overwrite=False, namespace=space)
    assert zray.kv.get("new", namespace=space) == b"3"


def test_exists_and_delete(space: str) -> None:
    assert not zray.kv.exists("a", namespace=space)
    zray.kv.put("a", b"", namespace=space)
    assert zray.kv.exists("a", namespace=space)
    assert zray.kv.get("a", namespace=space) == b""
    assert zray.kv.delete("a", namespace=space)
    assert not zray.kv.delete("a", namespace=space)
    assert not zray.kv.exists("a", namespace=space)


def test_keys_by_prefix(space: str) -> None:
    for name in ("apple", "apricot", "banana", "a"):
        zray.kv.put(name, b"x", namespace=space)
    assert zray.kv.keys(namespace=space) == [b"a", b"apple", b"apricot", b"banana"]
    assert zray.kv.keys("ap", namespace=space) == [b"apple", b"apricot"]
    assert zray.kv.keys("c", namespace=space) == []


def test_namespaces_are_apart(space: str) -> None:
    zray.kv.put("same", b"one", namespace=space)
    zray.kv.put("same", b"two", namespace=space + "2")
    assert zray.kv.get("same", namespace=space) == b"one"
    assert zray.kv.get("same", namespace=space + "2") == b"two"
    assert zray.kv.get("same") is None


def test_keys_and_values_of_bytes(space: str) -> None:
    key, value = bytes(range(256)), os.urandom(100_000)
    zray.kv.put(key, value, namespace=space)
    assert zray.kv.get(key, namespace=space) == value
    assert zray.kv.keys(key[:3], namespace=space) == [key]
    zray.kv.put("text", b"x", namespace=space)
    assert zray.kv.get(b"text", namespace=space) == b"x"


@pytest.mark.parametrize("wrong", ["text", 5, None, [1]])
def test_values_are_bytes(space: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="bytes"):
        zray.kv.put("a", wrong, namespace=space)
    assert not zray.kv.exists("a", namespace=space)


def test_tasks_and_actors_see_the_same(space: str) -> None:
    @zray.remote
    def write(i: int) -> bool:
        return zray.kv.put(f"key {i}", str(i).encode(), namespace=space)

    class Reader:
        def read(self, i: int) -> bytes | None:
            return zray.kv.get(f"key {i}", namespace=space)

    assert all(zray.get([write.remote(i) for i in range(20)]))
    assert zray.get(zray.remote(Reader).remote().read.remote(7)) == b"7"
    assert len(zray.kv.keys("key", namespace=space)) == 20


def test_one_of_many_writers_wins(space: str) -> None:
    @zray.remote
    def claim(i: int) -> bool:
        return zray.kv.put("prize", str(i).encode(), overwrite=False, namespace=space)

    won = zray.get([claim.remote(i) for i in range(16)])
    assert sum(won) == 1
    assert zray.kv.get("prize", namespace=space) == str(won.index(True)).encode()
