"""A small key-value store that all processes of a cluster share: `zray.kv.put(key, value)`.

Values are bytes; keys are strings or bytes within a namespace. The store is the GCS's (`zray.gcs`); it lives as long as the cluster.
"""

from __future__ import annotations

from zray import api, wire
from zray.gcs.client import GcsClient


def _client() -> GcsClient:
    session = api.current_session()
    return GcsClient(lambda body: session.request(lambda reply: wire.GcsRequest(body, reply)))


def put(key: str | bytes, value: bytes, *, overwrite: bool = True, namespace: str | None = None) -> bool:
    """Set a key. Returns whether the key was new (with overwrite=False an existing key keeps its value). Raises TypeError for values other than bytes."""
    return _client().kv_put(key, value, overwrite=overwrite, namespace=namespace)


def get(key: str | bytes, *, namespace: str | None = None) -> bytes | None:
    """Return the value of a key, or None."""
    return _client().kv_get(key, namespace=namespace)


def delete(key: str | bytes, *, namespace: str | None = None) -> bool:
    """Remove a key; return whether it was there."""
    return _client().kv_delete(key, namespace=namespace)


def exists(key: str | bytes, *, namespace: str | None = None) -> bool:
    """Return whether a key is set."""
    return _client().kv_exists(key, namespace=namespace)


def keys(prefix: str | bytes = b"", *, namespace: str | None = None) -> list[bytes]:
    """Return the keys that begin with a prefix, sorted."""
    return _client().kv_keys(prefix, namespace=namespace)
