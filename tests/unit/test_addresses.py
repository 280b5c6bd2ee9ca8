"""host:port as people give it to `zray start` and `zray.init`."""

from __future__ import annotations

import pytest

from zray import node
from zray.transport import bracketed


@pytest.mark.parametrize("text", ["h:1", "10.0.0.1:65535", "node-1.example.org:6400", "[fd00::1]:6400", "[::1]:1"])
def test_addresses(text: str) -> None:
    assert node.is_address(text)
    host, _, port = text.rpartition(":")
    assert f"{bracketed(host.strip('[]'))}:{port}" == text, "brackets come and go without changing it"


@pytest.mark.parametrize(
    "text", ["", "h", ":1", "h:", "h:0", "h:65536", "h:one", "fd00::1:6400", "[fd00::1]", "[]:1", "[::1:1", "a/b:1"]
)
def test_what_is_none(text: str) -> None:
    assert not node.is_address(text)
